"""How quantised weights lie in memory, and what they stand for: the one layout that the kernels read.

    integers   weight (N, K * bits / 8) uint8, zeros (N, ceil(G * bits / 8)) uint8 or None, scales (N, G)
    fp8        weight (N, K) float8_e4m3fn, scales (S, G) with S = ceil(N / block[0])

A row is one output's, as in a 16-bit ``(N, K)`` weight: the sums over K read it from its beginning to its end, and a
weight is cut for several GPUs by rows, or by columns. Eight bits are one byte a column. Four bits come in
pairs of columns 16 apart: byte j of the 16 bytes of 32 columns holds column j in its low half and column j + 16 in its
high half, so that sixteen neighbours of either half meet sixteen neighbours of x and no register is shuffled.

A value is ``(q - zero) * scale`` of its block of ``block = (rows, columns)`` weights, ``(1, group)`` for integers;
without zeros, ``zero = 2^(bits - 1)``. Zeros are packed as groups come, four-bit ones low half first.
"""

from __future__ import annotations

import torch

from .checks import Checker

#: What kernels read x and scales in; the extension counts them in this order.
KERNEL_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
#: Rows that one matrix instruction takes. More are worth the values of the weight, on a CPU too.
FEW_ROWS = 16
#: Columns that belong together in memory; K and groups are multiples of it.
COLUMNS = 32
FP8 = torch.float8_e4m3fn


def pack_columns(q: torch.Tensor, bits: int) -> torch.Tensor:
    """``(N, K)`` uint8 integers below ``2^bits`` as the ``(N, K * bits / 8)`` weight. ``bits`` is 4 or 8; K a multiple
    of 32."""
    if bits == 8:
        return q.contiguous()
    halves = q.view(q.shape[0], -1, 2, COLUMNS // 2)
    return (halves[:, :, 0] | halves[:, :, 1] << 4).flatten(1)


def unpack_columns(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """What :func:`pack_columns` packed."""
    if bits == 8:
        return weight
    bytes_ = weight.view(weight.shape[0], -1, 1, COLUMNS // 2)
    return torch.cat([bytes_ & 15, bytes_ >> 4], 2).flatten(1)


def pack_zeros(zeros: torch.Tensor, bits: int) -> torch.Tensor:
    """``(N, G)`` uint8 zero points as they are kept."""
    if bits == 8:
        return zeros.contiguous()
    even = torch.nn.functional.pad(zeros, (0, zeros.shape[1] % 2))
    return even[:, ::2] | even[:, 1::2] << 4


def unpack_zeros(zeros: torch.Tensor, bits: int, groups: int) -> torch.Tensor:
    """What :func:`pack_zeros` packed, of ``groups`` groups."""
    return zeros if bits == 8 else torch.stack([zeros & 15, zeros >> 4], 2).flatten(1)[:, :groups]


def dequantize(
    weight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    block: tuple[int, int],
    dtype: torch.dtype,
    columns: int,
) -> torch.Tensor:
    """The ``(N, K)`` values in ``dtype``, computed in float32 (float64 for float64) and rounded once; K columns."""
    wide = torch.promote_types(dtype, torch.float32)
    if weight.dtype == FP8:
        values = weight.to(wide)
    else:
        bits = 8 * weight.shape[1] // columns
        values = unpack_columns(weight, bits).to(wide)
        if zeros is None:
            values = values - (1 << (bits - 1))
        else:
            values = values - _spread(unpack_zeros(zeros, bits, scales.shape[1]), block, values.shape).to(wide)
    return (values * _spread(scales, block, values.shape).to(wide)).to(dtype)


def _spread(of_blocks: torch.Tensor, block: tuple[int, int], shape: torch.Size) -> torch.Tensor:
    """What is said of blocks, said of every weight."""
    rows = of_blocks.repeat_interleave(min(block[0], shape[0]), 0)[: shape[0]]
    return rows.repeat_interleave(min(block[1], shape[1]), 1)[:, : shape[1]]


def check_weight(
    check: Checker,
    columns: int,
    weight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    block: tuple[int, int],
    lead: tuple[str, ...] = (),
) -> None:
    """Refuse what is no weight of ``columns`` laid out so; ``lead``: names of dimensions before all of these."""
    check.tensor("weight", weight, (*lead, "N", "bytes"), dtypes=(torch.uint8, FP8), contiguous_last=True)
    outputs, bytes_ = weight.shape[-2:]
    check.require(columns > 0 and columns % COLUMNS == 0, f"K must be a multiple of {COLUMNS}, got {columns}")
    integers = weight.dtype == torch.uint8
    fits = bytes_ == columns or (bytes_ * 2 == columns and integers)
    check.require(fits, f"weight must have K = {columns} bytes a row, or half as many of 4 bits, got {bytes_}")
    check.require(block[0] > 0 and block[1] > 0, f"block must be two positive sizes, got {block}")
    check.require(
        block[1] % COLUMNS == 0 or block[1] >= columns,
        f"block must have a multiple of {COLUMNS} columns, or all, got {block[1]} of {columns}",
    )
    check.require(block[0] == 1 or not integers, f"block of integers must have 1 row, got {block[0]}")
    groups = -(-columns // block[1])
    shape = (*lead, -(-outputs // block[0]), groups)
    check.tensor("scales", scales, shape, dtypes=KERNEL_FLOATS, contiguous_last=True)
    if zeros is not None:
        check.require(integers, "zeros are for integers, the weight is float8_e4m3fn")
        bits = 8 * bytes_ // columns
        check.tensor("zeros", zeros, (*lead, "N", -(-groups * bits // 8)), dtypes=(torch.uint8,), contiguous_last=True)
