"""Attention's subjects: Triton's forward and the two passes of its backward, and the forward in CUDA C++ for Hopper."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from qwen2vl_kernels.core import attention_sm90, native
from qwen2vl_kernels.core.attention_sm90 import Kernel, Sm90Config
from qwen2vl_kernels.core.tile_plan import plan_tiles
from qwen2vl_kernels.ops.varlen_attention import varlen_attention, varlen_attention_ref
from qwen2vl_kernels.triton import attention_backward, attention_forward

from ..case import Check, relative_error
from .subject import Fields, Subject, Tensors, Work, checked, random_of, results_of

#: What two kernels that round in other places may differ by, as a relative error: as in the case attention.
_AGREEMENT = 1e-2

#: The first field is the height of the tile that a program owns: queries in the forward and in their pass.
_ATTENTION = {"block_m": (64, 128), "block_n": (32, 64, 128), "num_warps": (4, 8)}
#: The pass over tiles of keys owns keys and takes queries.
_KEY_PASS = {"block_n": (64, 128), "block_m": (32, 64, 128), "num_warps": (4, 8)}


def subjects(quick: bool) -> Iterator[Subject]:
    """What is Hopper's own, which needs no compiler; then each shape's forward, pass for keys and pass for queries."""
    yield from _of_sm90(quick)
    vision = [("4 of 4096", (4096,) * 4), ("16 of 1024", (1024,) * 16), ("1 of 16384", (16384,))]
    vision.append(("64 of 256", (256,) * 64))
    shapes = [(name, lengths, 16, 16, 80, False) for name, lengths in vision]
    shapes.insert(2, ("causal 4096+2048+1333+715", (4096, 2048, 1333, 715), 28, 4, 128, True))
    shapes += [(name, lengths, 16, 16, 72, False) for name, lengths in vision[:2]]
    if quick:
        shapes = [("40+24", (40, 24), 2, 2, 80, False), ("96", (96,), 2, 2, 80, False)]
        shapes.append(("causal 40", (40,), 2, 1, 64, True))
    for shape, lengths, heads, kv_heads, columns, causal in shapes:
        head = _head(heads, kv_heads, columns)
        make = partial(_work, lengths, heads, kv_heads, columns, causal)
        common = {"shape": shape, "columns": columns}
        yield Subject(
            f"attention forward {head}", kernel="_forward_kernel", module=attention_forward, function="forward_config",
            grid={**_ATTENTION, "num_stages": (2, 3, 4)}, make=partial(make, None), fixed=("block_n",), **common,
        )  # fmt: skip
        for place, (name, grid) in enumerate((("key", _KEY_PASS), ("query", _ATTENTION))):
            yield Subject(
                f"attention {name} pass {head}", kernel=f"_{name}_kernel", module=attention_backward,
                function="backward_config", grid={**grid, "num_stages": (1, 2, 3)}, make=partial(make, place),
                place=place, **common,
            )  # fmt: skip


#: Packs of Hopper's own forward: what long segments take, then what short ones do, each at packs of its kind alone.
_LONG, _SHORT = 2, 1  # places in what attention_sm90.configs returns
_SM90 = (
    (_LONG, (16, 16, 80, False), ("4 of 4096", (4096,) * 4), ("16 of 1024", (1024,) * 16), ("1 of 16384", (16384,))),
    (_SHORT, (16, 16, 80, False), ("64 of 256", (256,) * 64), ("32 of 512", (512,) * 32)),
    (_LONG, (28, 4, 128, True), ("causal 4096+2048+1333+715", (4096, 2048, 1333, 715))),
    (_SHORT, (28, 4, 128, True), ("causal 32 of 512", (512,) * 32)),
    (_LONG, (16, 16, 72, False), ("4 of 4096", (4096,) * 4)),
    (_SHORT, (16, 16, 72, False), ("64 of 256", (256,) * 64)),
)
_SM90_QUICK = (
    (_LONG, (2, 2, 80, False), ("520", (520,))),
    (_SHORT, (2, 2, 80, False), ("40+24", (40, 24))),
)


def _of_sm90(quick: bool) -> Iterator[Subject]:
    for place, (heads, kv_heads, columns, causal), *shapes in _SM90_QUICK if quick else _SM90:
        tried = tuple(asdict(config) for config in attention_sm90.tried(columns))
        grid = {name: tuple(dict.fromkeys(fields[name] for fields in tried)) for name in tried[0]}
        group = f"attention sm90 {'long' if place == _LONG else 'short'} {_head(heads, kv_heads, columns)}"
        for shape, lengths in shapes:
            yield Subject(
                group, shape, kernel=None, module=attention_sm90, function="configs", grid=grid, tried=tried,
                make=partial(_work, lengths, heads, kv_heads, columns, causal, None, forward=attention_sm90),
                place=place, columns=columns, capability=90, ready=partial(_linked_or_loaded, columns, causal),
            )  # fmt: skip


def _head(heads: int, kv_heads: int, columns: int) -> str:
    return f"{heads}{'' if heads == kv_heads else f'/{kv_heads}'}x{columns}"


_loaded: set[Kernel] = set()


def _linked_or_loaded(
    columns: int, causal: bool, fields: Fields, dtype: torch.dtype, cubins: Path | None, load: bool
) -> None:
    """Raises ``LookupError`` where a kernel of the grid is neither linked into the extension nor among the cubins."""
    kernel = Kernel(columns, dtype, causal, Sm90Config(**fields))  # pyright: ignore[reportArgumentType]
    if kernel in _loaded or kernel.key in map(tuple, native.cuda().attention_built()):
        return
    path = None if cubins is None else cubins / f"{kernel.label}.cubin"
    if path is None or not path.is_file():
        raise LookupError(f"it is not linked, and there is no {kernel.label}.cubin in {cubins}")
    if load:
        element, config = kernel.dtype == torch.float16, kernel.key[3:]
        native.cuda().attention_load(str(path), columns, element, causal, config)
        _loaded.add(kernel)


def _work(
    lengths: tuple[int, ...],
    heads: int,
    kv_heads: int,
    columns: int,
    causal: bool,
    place: int | None,
    device: torch.device,
    dtype: torch.dtype,
    forward: Any = attention_forward,
) -> Work:
    """``forward`` is the module of the forward. ``place`` is that of a pass of the backward, whose statistics are
    PyTorch's: no forward kernel has a say."""
    random, total, longest = random_of(device, dtype), sum(lengths), max(lengths)
    q, k, v = random(total, heads, columns), random(total, kv_heads, columns), random(total, kv_heads, columns)
    grad, scale = random(total, heads, columns), columns**-0.5
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    plan = plan_tiles(cu_seqlens, total, device=device)
    sdpa = partial(varlen_attention, cu_seqlens=cu_seqlens, max_seqlen=longest, causal=causal, backend="sdpa")
    formula = partial(varlen_attention_ref, cu_seqlens=cu_seqlens, causal=causal)
    grads = None if place is None else (grad,)
    which = slice(None) if place is None else (slice(1, 3), slice(0, 1))[place]
    if place is None:
        run = lambda: forward.launch_forward(q, k, v, plan, longest, causal, scale)[:1]  # noqa: E731
    else:
        if device.type == "meta":
            out, lse = torch.empty_like(grad), torch.empty(heads, total, device=device)
        else:
            out, lse = sdpa(q, k, v), _log_sums(q, k, lengths, causal, scale)
        inputs = (grad, q, k, v, out, lse, plan)
        run = lambda: attention_backward.launch_backward(*inputs, causal, scale)[which]  # noqa: E731
    # The first key head and its queries against float64, which is slow; the whole against PyTorch's kernel.
    group = heads // kv_heads
    first = [q[:, :group], k[:, :1], v[:, :1]]
    own = tuple(g[:, :group] for g in grads or ()) or None
    part = lambda results: tuple(x[:, : (1 if place == 0 else group)] for x in results)  # noqa: E731
    exact = checked(formula, first, own, which, part)
    whole = cache(lambda: results_of(sdpa, (q, k, v), grads, False)[which])

    def check(results: Tensors) -> list[Check]:
        agree = [Check(f"all of result {n}", relative_error(got, want), _AGREEMENT)
                 for n, (got, want) in enumerate(zip(results, whole(), strict=True))]  # fmt: skip
        return [*exact(results), *agree]

    return Work(run, check)


def _log_sums(q: torch.Tensor, k: torch.Tensor, lengths: Sequence[int], causal: bool, scale: float) -> torch.Tensor:
    """The softmax's sums as powers of two, ``(Hq, T)`` float32: one head's scores of one segment at a time."""
    group, rows = q.shape[1] // k.shape[1], []
    for head in range(q.shape[1]):
        parts, begin = [], 0
        for n in lengths:
            at = slice(begin, begin + n)
            scores = q[at, head].float() @ k[at, head // group].float().T * scale
            if causal:
                scores.masked_fill_(torch.ones_like(scores, dtype=torch.bool).triu_(1), -math.inf)
            parts.append(scores.logsumexp(1))
            begin += n
        rows.append(torch.cat(parts))
    return torch.stack(rows) * math.log2(math.e)
