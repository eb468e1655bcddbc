"""grouped_linear and its sort at the shapes of Qwen2-MoE's 60 experts and of Qwen3-VL-MoE's 128."""

from __future__ import annotations

from functools import partial

import torch

from qwen2vl_kernels.triton.grouped_gemm import launch_rows, launch_sort, launch_weight

from .compiler import Specimen, label, meta

_ROWS = 4100


def _products(experts: int, depth: int, columns: int, dtype: torch.dtype) -> None:
    x, dy = meta(_ROWS, depth, dtype=dtype), meta(_ROWS, columns, dtype=dtype)
    weight, bounds = meta(experts, columns, depth, dtype=dtype), meta(experts + 1, dtype=torch.int32)
    launch_rows(x, weight, bounds)
    launch_rows(dy, weight, bounds, transposed=True)
    launch_weight(dy, x, bounds)


def _sort(experts: int, chosen: int) -> None:
    launch_sort(meta(_ROWS, chosen, dtype=torch.int64), experts)


def _specimen(experts: int, depth: int, columns: int, dtype: torch.dtype, further: bool = False) -> Specimen:
    run = partial(_products, experts, depth, columns, dtype)
    matrix = dtype != torch.float32
    return Specimen(f"experts {experts}x{columns}x{depth} {label(dtype)}", run, matrix=matrix, further=further)


SPECIMENS = (
    _specimen(60, 2048, 2816, torch.bfloat16),
    _specimen(128, 2048, 1536, torch.float32, further=True),
    _specimen(8, 72, 40, torch.bfloat16, further=True),
    Specimen("group_by_expert 60", partial(_sort, 60, 4)),
)
