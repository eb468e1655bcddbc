"""Attention over packed segments: equal images, one large among many small, and the decoder's causal prefill.

FLOPs are the useful ones: 4 D for every pair of a query and a key that it sees, 2.5 times that backward. Peers that
know no packs (SDPA) are not here; ``sdpa`` is ours, which calls PyTorch's once a segment.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from qwen2vl_kernels import varlen_attention
from qwen2vl_kernels.ops.varlen_attention import varlen_attention_ref

from ..case import Case, Check, Context, Provider, Workload, two_times
from ._ops import DTYPE, made, random

_BACKENDS = {"cuda": ("triton", "sdpa"), "cpu": ("sdpa", "blocked")}


def workloads(context: Context) -> Iterator[Workload]:
    if context.quick:
        packs = {"2 of 32 rows": [32, 32], "mixed": [64, 16]}
    elif context.device.type == "cpu":
        packs = {"4 of 256 rows": [256] * 4, "1 of 1024 rows": [1024], "1 of 1024 and 8 of 64": [1024] + [64] * 8}
    else:
        packs = {f"{16384 // n} of {n} rows": [n] * (16384 // n) for n in (256, 1024, 4096, 16384)}
        packs["1 of 16384 and 63 of 256"] = [16384] + [256] * 63
    for name, lengths in packs.items():
        yield from _both(context, f"{name}, 16 heads of 80", lengths, 16, 16, 80, False)
    lengths = [40, 24] if context.quick else [512] if context.device.type == "cpu" else [4096, 2048, 1333, 715]
    yield from _both(context, f"causal {'+'.join(map(str, lengths))}, 28/4 heads of 128", lengths, 28, 4, 128, True)


def _both(
    context: Context, name: str, lengths: list[int], heads: int, kv_heads: int, columns: int, causal: bool
) -> Iterator[Workload]:
    total, longest = sum(lengths), max(lengths)
    with torch.inference_mode(False):
        q = random(context, total, heads, columns)
        k, v = (random(context, total, kv_heads, columns, seed=seed) for seed in (1, 2))
        grad = random(context, total, heads, columns, seed=3)
        cu_seqlens = torch.tensor([0, *lengths], device=context.device).cumsum(0, dtype=torch.int32)
    pairs = sum(n * (n + 1) // 2 if causal else n * n for n in lengths)
    flops = 4 * columns * heads * pairs

    def ours(backend: str) -> Callable:
        host = cu_seqlens if backend == "triton" else cu_seqlens.cpu()
        return lambda q, k, v: varlen_attention(q, k, v, host, longest, causal=causal, backend=backend)

    peers: dict[str, tuple[str | None, Callable[[], Callable]]] = {}
    if context.device.type == "cuda":
        peers["torch varlen"] = (None, partial(_torch_varlen, cu_seqlens, longest, causal))
        peers["flash-attn"] = ("flash_attn", partial(_flash, cu_seqlens, longest, causal))
        if columns == 80:
            peers["ours, padded to 128"] = (None, partial(_padded, ours("triton")))
    for suffix, prepare, work in (
        ("", partial(_forward, (q, k, v)), flops),
        (", backward", partial(_gradient, (q, k, v), grad), 2.5 * flops),
    ):
        contenders: list[Provider] = []
        for backend in _BACKENDS[context.device.type]:
            if suffix and backend == "blocked":
                contenders.append(Provider(backend, skipped="it has no backward"))
            else:
                contenders.append(made(backend, partial(prepare, ours(backend)), peer=False))
        contenders += [_peer(provider, prepare, make, module) for provider, (module, make) in peers.items()]
        yield Workload(
            name + suffix,
            contenders,
            gate=partial(_gate, prepare, cu_seqlens, causal, (q, k, v), grad if suffix else None),
            flops=work,
            bytes=2 * (q.nbytes + k.nbytes + v.nbytes),
            dtype=DTYPE,
        )


def _peer(name: str, prepare: Callable, make: Callable[[], Callable], module: str | None) -> Provider:
    """A peer that is there but refuses this GPU or these shapes is skipped, in its own words."""
    try:
        return made(name, lambda: prepare(make()), module=module)
    except RuntimeError as error:
        return Provider(name, skipped=str(error).splitlines()[0], peer=True)


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


def _flash(cu_seqlens: torch.Tensor, longest: int, causal: bool) -> Callable:
    from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    return lambda q, k, v: flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, longest, longest, causal=causal)


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
