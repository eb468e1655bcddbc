"""``python -m benchmarks tune``: time launch configurations on the GPU at hand, beside the ones that ship.

The ops choose a configuration with a pure function, so that no call searches. This runs every candidate of a grid on
the shapes that matter, through the op's own launcher with that function replaced, and prints what the best one gains.
Whoever changes the function's constants quotes this table; nothing is written by itself.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch

from qwen2vl_kernels import _attention, _attention_backward, _linear, _norm, _rotary
from qwen2vl_kernels._tiles import plan_tiles
from qwen2vl_kernels._triton import reason
from qwen2vl_kernels.ops import quick_gelu, swiglu

from .timing import Clock


@dataclass(frozen=True)
class Subject:
    """``run()`` launches with what ``getattr(module, function)`` returns; ``grid`` are fields to try values of."""

    name: str
    module: Any
    function: str
    grid: dict[str, tuple[int, ...]]
    run: Callable[[], object]


@dataclass(frozen=True)
class Trial:
    subject: str
    chosen: Any
    chosen_s: float
    best: Any
    best_s: float
    failed: int  # candidates that do not fit the GPU


def subjects(tokens: int = 8192, device: str = "cuda") -> Iterable[Subject]:
    """The ops at Qwen2-VL-2B's and -7B's shapes in bfloat16, inputs made as each is reached."""

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.bfloat16, device=device)

    warps = (1, 2, 4, 8, 16)
    for columns, centred in ((1280, True), (1536, False), (3584, False), (8192, False)):
        x, weight = random(tokens, columns), random(columns)
        bias = weight if centred else None
        name = f"{'layer' if centred else 'rms'}_norm {columns}"
        grid = {"rows": (1, 2, 4, 8), "num_warps": warps}
        forward = lambda x=x, w=weight, b=bias, c=centred: _norm.launch_forward(x, x, w, b, 1e-6, c)  # noqa: E731
        yield Subject(name, _norm, "forward_config", grid, forward)
        mean, rstd = (torch.ones(tokens, device=device) for _ in range(2))
        backward = lambda x=x, w=weight, m=mean, r=rstd, c=centred: _norm.launch_backward(x, x, x, w, m, r, c, c)  # noqa: E731
        yield Subject(f"{name} backward", _norm, "backward_config", {"rows": (1, 2), "num_warps": warps}, backward)
    grid = {"rows": (2, 4, 8, 16, 32), "heads": (2, 4, 8, 16, 32), "num_warps": (2, 4, 8)}
    qkv, table = random(tokens, 3, 16, 80), torch.rand(tokens, 40, device=device)
    q, k = qkv[:, 0], qkv[:, 1]
    angles = _rotary.Angles(cos=table, sin=table)
    yield Subject("vision_rope 16x80", _rotary, "config", grid, lambda: _rotary.launch_rotation(q, k, q, k, angles))
    for heads, kv_heads in ((12, 2), (28, 4)):
        a, b = random(tokens, heads, 128), random(tokens, kv_heads, 128)
        positions = torch.randint(0, 4096, (3, tokens), device=device)
        source = _rotary.Angles(positions, torch.rand(64, device=device), section=(16, 24, 24))
        run = lambda a=a, b=b, s=source: _rotary.launch_rotation(a, b, a, b, s)  # noqa: E731
        yield Subject(f"mrope {heads}+{kv_heads}", _rotary, "config", grid, run)
    grid = {"rows": (1, 2, 4, 8, 16), "columns": (512, 1024, 2048), "num_warps": (2, 4, 8)}
    x, bias = random(tokens, 5120), random(5120)
    yield Subject("quick_gelu 5120 + bias", quick_gelu, "tile", grid, lambda: quick_gelu.launch_forward(x, bias))
    yield Subject("quick_gelu backward", quick_gelu, "tile", grid, lambda: quick_gelu.launch_backward(x, x, bias))
    gate, up = random(tokens, 8960), random(tokens, 8960)
    yield Subject("swiglu 8960", swiglu, "tile", grid, lambda: swiglu.launch_forward(gate, up))
    yield Subject("swiglu backward", swiglu, "tile", grid, lambda: swiglu.launch_backward(gate, gate, up))
    cu_seqlens = torch.arange(0, tokens + 1, max(tokens // 8, 1), dtype=torch.int32, device=device)
    plan = plan_tiles(cu_seqlens, tokens)
    grid = {"rows": (64, 128), "step": (32, 64, 128), "num_warps": (4, 8), "num_stages": (1, 2, 3)}
    for heads, kv_heads, columns, causal in ((16, 16, 80, False), (28, 4, 128, True)):
        q, k = random(tokens, heads, columns), random(tokens, kv_heads, columns)
        forward = lambda q=q, k=k, c=causal: _attention.launch_forward(q, k, k, plan, tokens // 8, c, 0.1)  # noqa: E731
        name = f"attention {heads}/{kv_heads}x{columns}"
        yield Subject(name, _attention, "forward_config", grid, forward)
        out, lse = forward()
        backward = lambda q=q, k=k, o=out, lse=lse, c=causal: _attention_backward.launch_backward(  # noqa: E731
            o, q, k, k, o, lse, cu_seqlens, c, 0.1
        )
        yield Subject(f"{name} backward", _attention_backward, "backward_config", grid, backward)
    grid = {
        "rows": (64, 128, 256),
        "columns": (64, 128, 256),
        "depth": (32, 64),
        "num_warps": (4, 8),
        "num_stages": (2, 3, 4),
    }
    pixels, folded = torch.randint(0, 256, (tokens, 588), dtype=torch.uint8, device=device), random(1280, 588)
    run = lambda: _linear.launch_linear(pixels, folded, None, False)  # noqa: E731
    yield Subject("patch_embed of bytes", _linear, "config", grid, run)
    h, fc1 = random(tokens // 4, 5120), random(5120, 5120)
    yield Subject("patch_merge fc1 + GELU", _linear, "config", grid, lambda: _linear.launch_linear(h, fc1, None, True))


def tune(subject: Subject, clock: Clock, samples: int = 15) -> Trial:
    """The configuration that ships and the fastest candidate, timed in the same rounds in the end."""
    choose = getattr(subject.module, subject.function)
    seen = []

    def watched(*arguments: Any) -> Any:
        seen.append(choose(*arguments))
        return seen[-1]

    with mock.patch.object(subject.module, subject.function, watched):
        subject.run()
    chosen = seen[0]
    timed, failed = {}, 0
    for values in itertools.product(*subject.grid.values()):
        candidate = replace(chosen, **dict(zip(subject.grid, values, strict=True)))
        try:
            timed[candidate] = min(_time(subject, candidate, clock) for _ in range(3))
        except Exception as error:  # Triton has an exception of its own for every resource, in versions' own places
            if "CUDA error" in str(error):
                raise
            failed += 1
    best = min(timed, key=timed.__getitem__)
    rounds = [(_time(subject, chosen, clock), _time(subject, best, clock)) for _ in range(samples)]
    chosen_s, best_s = (statistics.median(column) for column in zip(*rounds, strict=True))
    return Trial(subject.name, chosen, chosen_s, best, best_s, failed)


def _time(subject: Subject, candidate: Any, clock: Clock) -> float:
    with mock.patch.object(subject.module, subject.function, lambda *arguments: candidate):
        return clock.time(subject.run)


def why_not() -> str | None:
    """Why nothing can be tuned here, or ``None``."""
    return reason("cuda") or (None if torch.cuda.is_available() else "PyTorch sees no CUDA device")
