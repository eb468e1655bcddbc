"""sample_tokens_ over the released models' vocabularies: what chat asks for by default, and every other form."""

from __future__ import annotations

from functools import partial

import torch

from qwen2vl_kernels.triton.sampling import launch_sampling

from .compiler import Specimen, meta


def choose(
    rows: int, columns: int, dtype: torch.dtype, top_k: int, top_p: float, penalised: bool = True, drawn: bool = True
) -> None:
    uniforms = meta(rows, 64, dtype=torch.float64)[:, 3] if drawn else None
    seen = meta(rows, columns, dtype=torch.bool) if penalised else None
    logits, banned = meta(rows, columns, dtype=dtype), meta(3, dtype=torch.int64)
    launch_sampling(logits, uniforms, seen, banned, 0.01, top_k, top_p, 1.05)


def _specimen(name: str, *given: object, **named: object) -> Specimen:
    run = partial(choose, *given, **named)  # pyright: ignore[reportArgumentType]
    return Specimen(name, run, further=name != "all")


SPECIMENS = (
    _specimen("all", 1, 151_936, torch.bfloat16, 1, 0.001),
    _specimen("top_k", 8, 152_064, torch.bfloat16, 20, 1.0, penalised=False),
    _specimen("top_p", 64, 152_064, torch.float32, 0, 0.9),
    _specimen("temperature", 1, 151_936, torch.float16, 0, 1.0, penalised=False),
    _specimen("greedy", 1, 151_936, torch.bfloat16, 0, 1.0, drawn=False),
)
