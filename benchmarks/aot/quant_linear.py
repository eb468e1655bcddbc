"""Quantised products at the shapes of the language models: one row, few rows and many."""

from __future__ import annotations

from functools import partial

import torch

from qwen2vl_kernels.core.quant_layout import FP8
from qwen2vl_kernels.triton.quant_linear import launch_quant_linear

from .compiler import Specimen, label, meta


def _product(rows: int, outputs: int, columns: int, bits: int, block: tuple[int, int], zeros: bool, dtype) -> None:
    groups = -(-columns // block[1])
    weight = meta(outputs, columns * (bits or 8) // 8, dtype=torch.uint8 if bits else FP8)
    points = meta(outputs, groups * bits // 8, dtype=torch.uint8) if zeros else None
    scales = meta(-(-outputs // block[0]), groups, dtype=torch.float16)
    launch_quant_linear(meta(rows, columns, dtype=dtype), weight, scales, points, meta(outputs, dtype=dtype), block)


_FORMS = (
    # name, outputs, columns, bits, block, zeros, dtype
    ("int4 zeros g128", 1536, 8960, 4, (1, 128), True, torch.bfloat16),
    ("int4 g128", 18944, 3584, 4, (1, 128), False, torch.float16),
    ("int4 zeros g32", 3584, 3584, 4, (1, 32), True, torch.bfloat16),
    ("int8 g128", 1536, 8960, 8, (1, 128), False, torch.bfloat16),
    ("fp8 channels", 1536, 8960, 0, (1, 8960), False, torch.bfloat16),
    ("fp8 blocks", 29696, 8192, 0, (128, 128), False, torch.bfloat16),
    ("int4 float32", 1536, 1536, 4, (1, 128), True, torch.float32),
)


def _specimens():
    for n, (name, outputs, columns, bits, block, zeros, dtype) in enumerate(_FORMS):
        for rows, form in ((1, "row"), (8, "few rows"), (4100, "rows")):
            if rows > 8 and dtype == torch.float32:
                continue
            run = partial(_product, rows, outputs, columns, bits, block, zeros, dtype)
            yield Specimen(f"{name} {outputs}x{columns} {label(dtype)}, {form}", run, further=n > 0)


SPECIMENS = tuple(_specimens())
