"""Products with quantised weights, and their values, by the extension, for what is on a CPU."""

from __future__ import annotations

import torch

from . import native
from .matmul import linear
from .quant_layout import FEW_ROWS, FP8, KERNEL_FLOATS, dequantize

#: Values of the weight that are held at a time while many rows are multiplied with it.
HELD = 1 << 21


def product(
    rows: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    block: tuple[int, int],
) -> torch.Tensor:
    """``(M, K)`` rows of 16 or 32 bits times a weight as ``quant_layout`` has it, ``(M, N)`` in their dtype."""
    if rows.shape[0] > FEW_ROWS:
        y = rows.new_empty(rows.shape[0], weight.shape[0])
        each = max(HELD // rows.shape[1], 1) // block[0] * block[0] or block[0]
        for begin in range(0, weight.shape[0], each):
            part = slice(begin, begin + each)
            values = native_values(*_cut(part, weight, scales, zeros, block), block, rows.dtype, rows.shape[1])
            y[:, part] = linear(rows, values, None if bias is None else bias[part])
        return y
    dtype = rows.dtype
    if dtype not in (torch.bfloat16, torch.float32):
        rows, bias = rows.float(), None if bias is None else bias.float()
    # A copy, as contiguous() may leave the stride of a single element as it is.
    rows = rows if rows.stride(1) == 1 else rows.clone(memory_format=torch.contiguous_format)
    bias = bias if bias is None or bias.stride(0) == 1 else bias.clone(memory_format=torch.contiguous_format)
    sums = rows.new_empty(rows.shape[0], weight.shape[0])
    native.cpu().quant_linear(
        *views(weight, scales, zeros), native.view(rows), native.view(bias), native.view(sums), rows.shape[0],
        (weight.shape[0], rows.shape[1], *block), (torch.get_num_threads(), 0),
    )  # fmt: skip
    return sums.to(dtype)


def values_of(weight, scales, zeros, block: tuple[int, int], dtype: torch.dtype, columns: int) -> torch.Tensor:
    """``quant_layout.dequantize``, by the extension where that is here for them."""
    if weight.device.type == "cpu" and dtype in KERNEL_FLOATS and native.cpu_reason() is None:
        return native_values(weight, scales, zeros, block, dtype, columns)
    return dequantize(weight, scales, zeros, block, dtype, columns)


def native_values(weight, scales, zeros, block: tuple[int, int], dtype: torch.dtype, columns: int) -> torch.Tensor:
    """``quant_layout.dequantize`` by the extension, rows by rows."""
    values = torch.empty(weight.shape[0], columns, dtype=torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    native.cpu().quant_values(
        *views(weight, scales, zeros), native.view(values), (*values.shape, *block), (torch.get_num_threads(), 0)
    )
    return values.to(dtype)


def views(weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None) -> tuple:
    """What the extension's functions take of a weight."""
    given = (native.view(weight), native.view(scales), KERNEL_FLOATS.index(scales.dtype), native.view(zeros))
    return *given, weight.dtype == FP8, weight.shape[1]


def _cut(part: slice, weight, scales, zeros, block):
    """Some rows of a weight, from the beginning of a block."""
    of_blocks = slice(part.start // block[0], -(-part.stop // block[0]))
    return weight[part], scales[of_blocks], None if zeros is None else zeros[part]
