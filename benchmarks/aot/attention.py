"""varlen_attention at the vision towers' heads and at the language models', forward and backward."""

from __future__ import annotations

from functools import partial

import torch

from qwen2vl_kernels.core.launching import target_of
from qwen2vl_kernels.core.tile_plan import plan_tiles
from qwen2vl_kernels.triton.attention_backward import launch_backward
from qwen2vl_kernels.triton.attention_forward import fuses_rope, launch_forward

from .compiler import Specimen, label, meta

_TOKENS = 4100


def _attention(
    heads: int,
    kv_heads: int,
    columns: int,
    dtype: torch.dtype,
    causal: bool,
    rotated: bool = False,
    longest: int = 1024,
    split: bool = False,
) -> None:
    rows = _TOKENS // 2 if split else _TOKENS
    q = meta(rows, heads, columns, dtype=dtype)
    k = v = meta(_TOKENS, kv_heads, columns, dtype=dtype)
    # On the host, which knows that no row is behind the last.
    cu_seqlens = torch.linspace(0, rows, 65).int()
    keys = {"cu_seqlens_k": torch.linspace(0, _TOKENS, 65).int(), "total_k": _TOKENS} if split else {}
    cos = sin = meta(_TOKENS, columns // 2, dtype=torch.float32) if rotated else None
    fused = fuses_rope(longest, columns, target_of(q.device))
    plan, scale = plan_tiles(cu_seqlens, rows, **keys, device=q.device), columns**-0.5
    rope = {"cos": cos, "sin": sin, "fused": fused}
    out, lse = launch_forward(q, k, v, plan, longest, causal, scale, **rope)
    launch_backward(q, q, k, v, out, lse, plan, causal, scale, **rope)


def _name(kind: str, heads: int, kv_heads: int, columns: int, dtype: torch.dtype, causal: bool) -> str:
    return f"{kind} {heads}/{kv_heads}x{columns} {label(dtype)}{' causal' * causal}"


_SHAPES = (
    (16, 16, 80, torch.bfloat16, False),
    (16, 16, 80, torch.bfloat16, True),
    (16, 16, 80, torch.float16, False),
    (16, 16, 72, torch.bfloat16, False),
    (16, 16, 64, torch.bfloat16, False),
    (16, 16, 96, torch.bfloat16, False),
    (28, 4, 128, torch.bfloat16, True),
)

SPECIMENS = (
    *(
        Specimen(_name("attention", *shape), partial(_attention, *shape), further=shape != _SHAPES[0])
        for shape in _SHAPES
    ),
    *(
        Specimen(_name("attention, rope", *shape), partial(_attention, *shape, rotated=True), further=True)
        for shape in ((16, 16, 80, torch.bfloat16, False), (16, 16, 72, torch.bfloat16, False))
    ),
    *(
        Specimen(
            _name("attention over keys of their own", *shape), partial(_attention, *shape, split=True), further=more
        )
        for shape, more in (
            ((28, 4, 128, torch.bfloat16, True), False),
            ((16, 16, 80, torch.bfloat16, True), True),
            ((16, 16, 80, torch.bfloat16, False), True),
        )
    ),
    Specimen(
        "attention, rope, windows 16/16x80 bfloat16",
        partial(_attention, 16, 16, 80, torch.bfloat16, False, rotated=True, longest=64),
    ),
)
