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
) -> None:
    q = meta(_TOKENS, heads, columns, dtype=dtype)
    k = v = meta(_TOKENS, kv_heads, columns, dtype=dtype)
    cu_seqlens = torch.linspace(0, _TOKENS, 65).int()  # on the host, which knows that no row is behind the last
    cos = sin = meta(_TOKENS, columns // 2, dtype=torch.float32) if rotated else None
    fused = fuses_rope(longest, columns, target_of(q.device))
    out, lse = launch_forward(
        q,
        k,
        v,
        plan_tiles(cu_seqlens, _TOKENS, device=q.device),
        longest,
        causal,
        columns**-0.5,
        cos=cos,
        sin=sin,
        fused=fused,
    )
    launch_backward(q, q, k, v, out, lse, cu_seqlens, cos, sin, causal, columns**-0.5, fused)


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
    Specimen(
        "attention, rope, windows 16/16x80 bfloat16",
        partial(_attention, 16, 16, 80, torch.bfloat16, False, rotated=True, longest=64),
    ),
)
