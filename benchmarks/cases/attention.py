"""Attention over packed segments: what the towers and the decoder see (``benchmarks.packs``).

FLOPs are the useful ones: 4 D for every pair of a query and a key that it sees, 2.5 times that backward. Ours are
there by backend, and ``chosen`` is what runs where nobody names one: its ratios to the peers say whether the default is
slower than what is installed. ``sdpa`` is ours, which calls PyTorch's once a segment, or once for equal ones.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property, partial
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F

from qwen2vl_kernels import plan_tiles, varlen_attention
from qwen2vl_kernels.core.attention_peers import Call, why_not
from qwen2vl_kernels.core.launching import target_of
from qwen2vl_kernels.ops.varlen_attention import varlen_attention_ref

from .. import providers
from ..case import Case, Check, Context, Provider, Skip, Workload, two_times
from ..packs import Pack, packs, small_packs
from ._ops import DTYPE, keep_for_another_backward, made, random

#: FlexAttention compiles for half a minute a pack, so it is there for some.
_FLEX = ("16 of 1024", "4 of 4096", "9 photos", "causal 4096+2048+1333+715")
_BACKENDS = {"cuda": ("chosen", "sm90", "triton", "sdpa"), "cpu": ("chosen", "sdpa", "blocked")}
#: Backends that are not measured backward, and why.
_FORWARDS = {"blocked": "it has no backward", "sm90": "its backward is triton's"}
#: Distributions of flash-attn by what the table calls them.
_FLASH = {
    "flash-attn 2": "flash_attn",
    "flash-attn 3": "flash_attn_interface",
    "fa3-fwd": "fa3_fwd_interface",
    "flash-attn 4": "flash_attn.cute",
}


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


class _Inputs:
    """A pack's tensors, made when they are first asked for: a process that measures a later pack makes none."""

    def __init__(self, context: Context, pack: Pack) -> None:
        self.context, self.pack, self.total, self.longest = context, pack, sum(pack.lengths), max(pack.lengths)

    @cached_property
    def leaves(self) -> tuple[torch.Tensor, ...]:
        with torch.inference_mode(False):
            heads = (self.pack.heads, self.pack.kv_heads, self.pack.kv_heads)
            return tuple(random(self.context, self.total, n, self.pack.columns, seed=i) for i, n in enumerate(heads))

    @cached_property
    def grad(self) -> torch.Tensor:
        with torch.inference_mode(False):
            return random(self.context, self.total, self.pack.heads, self.pack.columns, seed=3)

    @cached_property
    def host(self) -> torch.Tensor:
        with torch.inference_mode(False):
            return torch.tensor([0, *self.pack.lengths]).cumsum(0, dtype=torch.int32)

    @cached_property
    def cu_seqlens(self) -> torch.Tensor:
        with torch.inference_mode(False):
            return self.host.to(self.context.device)

    def ours(self, backend: str | None) -> Callable:
        with torch.inference_mode(False):
            tiles = plan_tiles(self.host, self.total, device=self.context.device)
        settings = {"causal": self.pack.causal, "tiles": tiles, "backend": None if backend == "chosen" else backend}
        return lambda q, k, v: varlen_attention(q, k, v, self.host, self.longest, **settings)

    def prepared(self, run: Callable, backward: bool) -> Callable[[], Any]:
        return _gradient(self.leaves, self.grad, run) if backward else _forward(self.leaves, run)


def _both(context: Context, pack: Pack) -> Iterator[Workload]:
    inputs = _Inputs(context, pack)
    flops = 4 * pack.columns * pack.heads * pack.pairs
    heads = f"{pack.heads} heads" if pack.heads == pack.kv_heads else f"{pack.heads}/{pack.kv_heads} heads"
    for backward in (False, True):
        contenders: list[Provider] = []
        for backend in _BACKENDS[context.device.type]:
            if backward and backend in _FORWARDS:
                contenders.append(Provider(backend, skipped=_FORWARDS[backend]))
            else:
                make = lambda n=backend, b=backward: inputs.prepared(inputs.ours(n), b)  # noqa: E731
                contenders.append(made(backend, make, peer=False, trial=backend == "sm90"))
        for name, make in _peers(inputs, backward).items():
            contenders.append(made(name, lambda make=make, b=backward: inputs.prepared(make(), b)))
        yield Workload(
            f"{pack.name}, {heads} of {pack.columns}{', backward' if backward else ''}",
            contenders,
            gate=partial(_gate, inputs, backward),
            flops=2.5 * flops if backward else flops,
            bytes=2 * DTYPE.itemsize * inputs.total * (pack.heads + 2 * pack.kv_heads) * pack.columns,
            dtype=DTYPE,
            another=lambda place=int(backward): next(islice(_both(context, _fewer(pack)), place, None)),
        )


def _peers(inputs: _Inputs, backward: bool) -> dict[str, Callable[[], Callable]]:
    """What makes each peer's function of q, k and v."""
    pack = inputs.pack
    if inputs.context.device.type != "cuda":
        return {"SDPA, masked": lambda: _masked(pack)}
    peers: dict[str, Callable[[], Callable]] = {
        "torch varlen": lambda: _torch_varlen(inputs.cu_seqlens, inputs.longest, pack.causal),
        "cuDNN, ragged": lambda: inputs.ours("cudnn"),  # PyTorch has its operators, and nothing public that calls them
    }
    if len(set(pack.lengths)) == 1:
        peers["cuDNN"] = lambda: _cudnn(inputs.longest, pack.causal)
    for name, module in _FLASH.items():
        peers[name] = partial(_flash, module, inputs, backward)
    if pack.name in _FLEX:
        peers["FlexAttention"] = lambda: _flex(inputs.cu_seqlens, pack.causal)
    if pack.columns == 80:
        peers["ours, padded to 128"] = lambda: _padded(inputs.ours("triton"))
    return peers


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


def _flash(module: str, inputs: _Inputs, backward: bool) -> Callable:
    """flash-attn by itself, not where it is known to be wrong or to have no kernel: a red gate would stop everyone."""
    if (reason := providers.why_not(module)) is not None:
        raise Skip(reason)
    pack = inputs.pack
    capability = target_of(inputs.context.device).capability
    call = Call("cuda", capability, DTYPE, pack.columns, pack.columns, gradients=backward, causal=pack.causal)
    if (reason := why_not(module, call)) is not None:
        raise Skip(reason)
    attend = importlib.import_module(module).flash_attn_varlen_func
    bounds = {f"cu_seqlens_{x}": inputs.cu_seqlens for x in "qk"} | {f"max_seqlen_{x}": inputs.longest for x in "qk"}

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = attend(q, k, v, **bounds, causal=pack.causal)  # by name: the fourth argument of 4 is another
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


def _gate(inputs, backward, outputs) -> list[Check]:
    """The formula in float64, head by head's worth of memory at a time, on segments that are not too long for it."""
    bounds, causal, leaves = inputs.host.tolist(), inputs.pack.causal, inputs.leaves
    rows = next((slice(a, b) for a, b in zip(bounds, bounds[1:], strict=False) if b - a <= 4096), None)
    checks = []
    reference = "sdpa"  # where every segment is too long: against PyTorch's own
    if rows is not None:
        own = torch.tensor([0, rows.stop - rows.start], dtype=torch.int32)
        parts = tuple(x[rows] for x in leaves)
        formula = lambda q, k, v: varlen_attention_ref(q, k, v, own, causal)  # noqa: E731
        plan = partial(_gradient, grad=inputs.grad[rows]) if backward else _forward
        low, exact = (_tuple((plan(given, run=formula))()) for given in (parts, tuple(x.double() for x in parts)))
        for name, results in outputs.items():
            for n, got in enumerate(_tuple(results)):
                checks.append(two_times(f"{name}, result {n}", got[rows], low[n], exact[n], 1e-6, name))
        return checks
    want = _tuple(outputs[reference])
    for name, results in outputs.items():
        for n, got in enumerate(_tuple(results)):
            error = ((got.float() - want[n].float()).norm() / want[n].float().norm()).item()
            checks.append(Check(f"{name} against {reference}, result {n}", error, 1e-2, name))
    return checks


def _tuple(results: Any) -> tuple[torch.Tensor, ...]:
    return (results,) if isinstance(results, torch.Tensor) else tuple(results)


CASE = Case("attention", "Attention over packed segments, forward and backward", workloads)
