"""Attention over packed segments: what the towers and the decoder see (``benchmarks.packs``).

FLOPs are the useful ones: 4 D for every pair of a query and a key that it sees, 2.5 times that backward.
``sdpa`` is ours, which calls PyTorch's once a segment, or once for equal ones.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F

from qwen2vl_kernels import plan_tiles, varlen_attention
from qwen2vl_kernels.ops.varlen_attention import varlen_attention_ref

from ..case import Case, Check, Context, Provider, Workload, two_times
from ..packs import Pack, packs, small_packs
from ._ops import DTYPE, keep_for_another_backward, made, random

#: FlexAttention compiles for half a minute a pack, so it is there for some.
_FLEX = ("16 of 1024", "4 of 4096", "9 photos", "causal 4096+2048+1333+715")
_BACKENDS = {"cuda": ("triton", "sdpa"), "cpu": ("sdpa", "blocked")}


def workloads(context: Context) -> Iterator[Workload]:
    if context.quick:
        chosen = (Pack("2 of 32", (32, 32)), Pack("mixed", (64, 16)), Pack("causal 40+24", (40, 24), 28, 4, 128, True))
    else:
        chosen = small_packs() if context.device.type == "cpu" else packs()
    for pack in chosen:
        yield from _both(context, pack)


def _fewer(pack: Pack) -> Pack:
    """A pack of the same kind that nothing has seen: every segment 16 rows shorter, or half as long."""
    lengths = tuple(n - 16 if n > 32 else max(n // 2, 1) for n in pack.lengths)
    return replace(pack, name=f"{pack.name}, fewer rows", lengths=lengths)  # not among those of FlexAttention


def _both(context: Context, pack: Pack) -> Iterator[Workload]:
    total, longest, causal, columns = sum(pack.lengths), max(pack.lengths), pack.causal, pack.columns
    with torch.inference_mode(False):
        q = random(context, total, pack.heads, columns)
        k, v = (random(context, total, pack.kv_heads, columns, seed=seed) for seed in (1, 2))
        grad = random(context, total, pack.heads, columns, seed=3)
        cu_seqlens = torch.tensor([0, *pack.lengths], device=context.device).cumsum(0, dtype=torch.int32)
        host = cu_seqlens.cpu()
        tiles = plan_tiles(host, total, device=context.device)
    flops = 4 * columns * pack.heads * pack.pairs

    def ours(backend: str) -> Callable:
        return lambda q, k, v: varlen_attention(q, k, v, host, longest, causal=causal, tiles=tiles, backend=backend)

    peers: dict[str, tuple[str | None, Callable[[], Callable]]] = {}
    if context.device.type == "cuda":
        peers["torch varlen"] = (None, partial(_torch_varlen, cu_seqlens, longest, causal))
        if pack.name in _FLEX:
            peers["FlexAttention"] = (None, partial(_flex, cu_seqlens, causal))
        if len(set(pack.lengths)) == 1:
            peers["cuDNN"] = (None, partial(_cudnn, longest, causal))
        for name, module in (("2", "flash_attn"), ("3", "flash_attn_interface"), ("4", "flash_attn.cute")):
            peers[f"flash-attn {name}"] = (None, partial(_flash, module, cu_seqlens, longest, causal))
        if columns == 80:
            peers["ours, padded to 128"] = (None, partial(_padded, ours("triton")))
    else:
        peers["SDPA, masked"] = (None, partial(_masked, pack))
    heads = f"{pack.heads} heads" if pack.heads == pack.kv_heads else f"{pack.heads}/{pack.kv_heads} heads"
    for place, (suffix, prepare, work) in enumerate(
        (
            ("", partial(_forward, (q, k, v)), flops),
            (", backward", partial(_gradient, (q, k, v), grad), 2.5 * flops),
        )
    ):
        contenders: list[Provider] = []
        for backend in _BACKENDS[context.device.type]:
            if suffix and backend == "blocked":
                contenders.append(Provider(backend, skipped="it has no backward"))
            else:
                contenders.append(made(backend, partial(prepare, ours(backend)), peer=False))
        contenders += [_peer(provider, prepare, make, module) for provider, (module, make) in peers.items()]
        yield Workload(
            f"{pack.name}, {heads} of {columns}{suffix}",
            contenders,
            gate=partial(_gate, prepare, cu_seqlens, causal, (q, k, v), grad if suffix else None),
            flops=work,
            bytes=2 * (q.nbytes + k.nbytes + v.nbytes),
            dtype=DTYPE,
            another=lambda place=place: next(islice(_both(context, _fewer(pack)), place, None)),
        )


def _peer(name: str, prepare: Callable, make: Callable[[], Callable], module: str | None) -> Provider:
    """A peer that is there but refuses this GPU or these shapes is skipped, in its own words."""
    try:
        return made(name, lambda: prepare(make()), module=module)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return Provider(name, skipped=(str(error).splitlines() or [type(error).__name__])[0], peer=True)


def _forward(inputs: tuple[torch.Tensor, ...], run: Callable) -> Callable[[], torch.Tensor]:
    return lambda: run(*inputs)


def _gradient(inputs: tuple[torch.Tensor, ...], grad: torch.Tensor, run: Callable) -> Callable[[], Any]:
    with torch.inference_mode(False), torch.enable_grad():
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        out = run(*leaves)

    def call() -> Any:
        with torch.inference_mode(False):
            return torch.autograd.grad(out, leaves, grad.to(out.dtype), retain_graph=True)

    return call


def _torch_varlen(cu_seqlens: torch.Tensor, longest: int, causal: bool) -> Callable:
    from torch.nn.attention.varlen import varlen_attn

    attend: Any = varlen_attn
    known = inspect.signature(varlen_attn).parameters
    settings: dict[str, Any] = {}
    if causal:  # 2.10 has the one, later versions the other
        settings |= {"is_causal": True} if "is_causal" in known else {"window_size": (-1, 0)}

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        grouped = q.shape[1] != k.shape[1]
        if grouped and "enable_gqa" not in known:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        gqa = {"enable_gqa": True} if grouped and "enable_gqa" in known else {}
        return attend(q, k, v, cu_seqlens, cu_seqlens, longest, longest, **settings, **gqa)

    return run


def _flash(module: str, cu_seqlens: torch.Tensor, longest: int, causal: bool) -> Callable:
    attend = importlib.import_module(module).flash_attn_varlen_func

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = attend(q, k, v, cu_seqlens, cu_seqlens, longest, longest, causal=causal)
        return out[0] if isinstance(out, tuple) else out

    return run


def _flex(cu_seqlens: torch.Tensor, causal: bool) -> Callable:
    """FlexAttention, compiled, with a mask of the packs' blocks made before the clock starts."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.reset()  # else only the first eight packs are compiled, and the others run without
    keep_for_another_backward()
    total = int(cu_seqlens[-1])
    segment = torch.bucketize(torch.arange(total, device=cu_seqlens.device), cu_seqlens[1:], right=True)

    def seen(batch: Any, head: Any, row: Any, key: Any) -> Any:
        own = segment[row] == segment[key]
        return own & (row >= key) if causal else own

    mask = create_block_mask(seen, None, None, total, total, device=str(cu_seqlens.device))
    attend: Any = torch.compile(flex_attention, dynamic=False)

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        heads_first = [x.transpose(0, 1)[None] for x in (q, k, v)]
        out = attend(*heads_first, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
        return out[0].transpose(0, 1)

    return run


def _cudnn(longest: int, causal: bool) -> Callable:
    """SDPA by cuDNN, which takes equal segments as a batch."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        qb, kb, vb = (x.unflatten(0, (-1, longest)).transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            out = F.scaled_dot_product_attention(qb, kb, vb, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
        return out.transpose(1, 2).flatten(0, 1)

    return run


def _masked(pack: Pack) -> Callable:
    """SDPA over the whole pack under a mask of its segments, as people without varlen attention do it."""
    segment = torch.repeat_interleave(torch.arange(len(pack.lengths)), torch.tensor(pack.lengths))
    mask = segment[:, None] == segment[None]
    if pack.causal:
        mask = mask.tril()

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        heads_first = [x.transpose(0, 1)[None] for x in (q, k, v)]
        gqa = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(*heads_first, attn_mask=mask, enable_gqa=gqa)[0].transpose(0, 1)

    return run


def _padded(run: Callable) -> Callable:
    """The control: the same kernel on heads that zeros fill up to 128 columns, which are not counted as work."""

    def padded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        columns = q.shape[-1]
        scaled = q * (128 / columns) ** 0.5  # the scale follows from the width
        wide = (F.pad(x, (0, 128 - columns)) for x in (scaled, k, v))
        return run(*wide)[..., :columns]

    return padded


def _gate(prepare, cu_seqlens, causal, inputs, grad, outputs) -> list[Check]:
    """The formula in float64, head by head's worth of memory at a time, on segments that are not too long for it."""
    bounds = cu_seqlens.tolist()
    rows = next((slice(a, b) for a, b in zip(bounds, bounds[1:], strict=False) if b - a <= 4096), None)
    checks = []
    reference = "sdpa"  # where every segment is too long: against PyTorch's own
    if rows is not None:
        own = torch.tensor([0, rows.stop - rows.start], dtype=torch.int32)
        parts = tuple(x[rows] for x in inputs)
        formula = lambda q, k, v: varlen_attention_ref(q, k, v, own, causal)  # noqa: E731
        plan = _forward if grad is None else partial(_gradient, grad=grad[rows])
        low, exact = (_tuple((plan(given, run=formula))()) for given in (parts, tuple(x.double() for x in parts)))
        for name, results in outputs.items():
            for n, got in enumerate(_tuple(results)):
                checks.append(two_times(f"{name}, result {n}", got[rows], low[n], exact[n], 1e-6))
        return checks
    want = _tuple(outputs[reference])
    for name, results in outputs.items():
        for n, got in enumerate(_tuple(results)):
            error = ((got.float() - want[n].float()).norm() / want[n].float().norm()).item()
            checks.append(Check(f"{name} against {reference}, result {n}", error, 1e-2))
    return checks


def _tuple(results: Any) -> tuple[torch.Tensor, ...]:
    return (results,) if isinstance(results, torch.Tensor) else tuple(results)


CASE = Case("attention", "Attention over packed segments, forward and backward", workloads)
