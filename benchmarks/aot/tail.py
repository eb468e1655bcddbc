"""Zeros behind the last segment, in rows as wide as the towers' and the decoders' heads together."""

from __future__ import annotations

from functools import partial

import torch

from qwen2vl_kernels.core.tile_plan import Side
from qwen2vl_kernels.triton.tail import zero_behind

from .compiler import Specimen, label, meta


def _zero(heads: int, columns: int, dtype: torch.dtype) -> None:
    x, cu_seqlens = meta(4100, heads, columns, dtype=dtype), meta(65, dtype=torch.int32)
    zero_behind(x, Side(cu_seqlens, 4100, x.device, padded=True))


SPECIMENS = tuple(
    Specimen(f"rows past the last segment, {heads}x{columns} {label(dtype)}", partial(_zero, heads, columns, dtype))
    for heads, columns, dtype in ((16, 80, torch.bfloat16), (28, 128, torch.bfloat16), (16, 72, torch.float32))
)
