"""patch_embed and patch_merge at the shapes of the vision tower and of the three language models."""

from __future__ import annotations

from functools import partial

import torch

from qwen2vl_kernels.triton import norm
from qwen2vl_kernels.triton.gemm import launch_gemm

from .compiler import Specimen, label, meta

_TOKENS = 4100


def _linear(rows: int, depth: int, columns: int, dtype: torch.dtype, x_dtype: torch.dtype, gelu: bool) -> None:
    bias = meta(columns, dtype=dtype)
    x, weight = meta(rows, depth, dtype=x_dtype), meta(columns, depth, dtype=dtype)
    launch_gemm(x, weight, bias, gelu, keep=gelu)
    launch_gemm(x, weight, None if depth < 2000 else bias, gelu)


def _gathering_norm(dtype: torch.dtype) -> None:
    x, weight = meta(_TOKENS, 1280, dtype=dtype), meta(1280, dtype=dtype)
    order, statistics = meta(_TOKENS, dtype=torch.int64), meta(_TOKENS, dtype=torch.float32)
    norm.launch_forward(x, None, weight, weight, 1e-6, True, order)
    norm.launch_backward(x, x, None, weight, statistics, statistics, True, True, order)


def _specimen(
    name: str, depth: int, columns: int, dtype: torch.dtype, x_dtype: torch.dtype, gelu: bool, further: bool = False
) -> Specimen:
    name = f"{name} {depth}x{columns} {label(dtype)}"
    return Specimen(name, partial(_linear, _TOKENS, depth, columns, dtype, x_dtype, gelu), matrix=True, further=further)


SPECIMENS = (
    _specimen("patch_embed still, bytes", 588, 1280, torch.bfloat16, torch.uint8, False),
    _specimen("patch_embed video, bytes", 1176, 1280, torch.bfloat16, torch.uint8, False, further=True),
    _specimen("patch_embed", 1176, 1280, torch.bfloat16, torch.bfloat16, False, further=True),
    _specimen("patch_embed from float32", 1176, 1280, torch.float16, torch.float32, False, further=True),
    _specimen("patch_merge fc1 + GELU", 5120, 5120, torch.bfloat16, torch.bfloat16, True),
    _specimen("patch_merge fc2", 5120, 1536, torch.bfloat16, torch.bfloat16, False, further=True),
    _specimen("patch_merge fc2", 5120, 3584, torch.float16, torch.float16, False, further=True),
    Specimen("patch_merge norm, raster order", partial(_gathering_norm, torch.bfloat16), wide=0.85),
)
