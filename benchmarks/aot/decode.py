"""kvcache_attention with lengths on the device, at the language models' heads and at others' widths."""

from __future__ import annotations

from functools import partial

import torch

from qwen2vl_kernels.triton.attention_decode import launch_decode

from .compiler import Specimen, label, meta

_ROWS, _CAPACITY = 8, 8192


def _decode(heads: int, kv_heads: int, columns: int, dtype: torch.dtype, page: int = 0) -> None:
    q = meta(_ROWS, heads, columns, dtype=dtype)
    cache = meta(*(_ROWS * _CAPACITY // page, page) if page else (_ROWS, _CAPACITY), kv_heads, columns, dtype=dtype)
    table = meta(_ROWS, _CAPACITY // page, dtype=torch.int32) if page else None
    launch_decode(q, cache, cache, meta(_ROWS, dtype=torch.int32), columns**-0.5, table)


_SHAPES = (
    (12, 2, 128, torch.bfloat16),
    (28, 4, 128, torch.float16),
    (64, 8, 128, torch.bfloat16),
    (16, 16, 80, torch.bfloat16),
    (16, 16, 72, torch.bfloat16),
    (16, 2, 64, torch.bfloat16),
    (16, 2, 96, torch.bfloat16),
    (12, 2, 128, torch.float32),
)

SPECIMENS = tuple(
    Specimen(
        f"decode {heads}/{kv_heads}x{columns} {label(dtype)}",
        partial(_decode, heads, kv_heads, columns, dtype),
        wide=0.7,
        further=n > 0,
    )
    for n, (heads, kv_heads, columns, dtype) in enumerate(_SHAPES)
) + tuple(
    Specimen(
        f"decode {heads}/{kv_heads}x128 {label(torch.bfloat16)}, pages of {page}",
        partial(_decode, heads, kv_heads, 128, torch.bfloat16, page),
        wide=0.7,
        further=page > 16,
    )
    for heads, kv_heads, page in ((12, 2, 16), (28, 4, 256), (12, 2, 48))
)
