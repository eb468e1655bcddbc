"""Grouped products with quantised weights at the shapes of Qwen2-MoE's 60 experts and of Qwen3-VL-MoE's 128."""

from __future__ import annotations

from functools import partial

import torch

from qwen2vl_kernels.core.quant_layout import FP8
from qwen2vl_kernels.triton.grouped_quant import launch_grouped_quant

from .compiler import Specimen, label, meta


def _product(rows, experts, outputs, columns, bits, block, zeros, ordered, dtype) -> None:
    groups = -(-columns // block[1])
    weight = meta(experts, outputs, columns * (bits or 8) // 8, dtype=torch.uint8 if bits else FP8)
    points = meta(experts, outputs, -(-groups * bits // 8), dtype=torch.uint8) if zeros else None
    scales = meta(experts, -(-outputs // block[0]), groups, dtype=torch.float32 if block[0] > 1 else torch.float16)
    order = meta(experts, columns, dtype=torch.int32) if ordered else None
    bounds = meta(experts + 1, dtype=torch.int32)
    launch_grouped_quant(meta(rows, columns, dtype=dtype), weight, scales, bounds, points, order, block)


_FORMS = (
    # name, experts, outputs, columns, bits, block, zeros, whether columns have an order, dtype
    ("int4 zeros g128", 128, 1536, 2048, 4, (1, 128), True, False, torch.bfloat16),
    ("fp8 blocks", 128, 2048, 768, 0, (128, 128), False, False, torch.bfloat16),
    ("int4 act-order g128", 60, 2816, 2048, 4, (1, 128), True, True, torch.float16),
    ("int4 g96, a last group of 64", 60, 2048, 1408, 4, (1, 96), False, False, torch.bfloat16),
    ("int8 g128", 60, 2048, 1408, 8, (1, 128), False, False, torch.bfloat16),
    ("fp8 tensors", 8, 2816, 2048, 0, (2816, 2048), False, False, torch.float16),
)


def _specimens():
    for n, (name, experts, outputs, columns, *form, dtype) in enumerate(_FORMS):
        for rows, tiles in ((8, "few rows"), (8200, "rows")):
            run = partial(_product, rows, experts, outputs, columns, *form, dtype)
            title = f"{name} {experts}x{outputs}x{columns} {label(dtype)}, {tiles}"
            yield Specimen(title, run, matrix=True, further=n > 1)


SPECIMENS = tuple(_specimens())
