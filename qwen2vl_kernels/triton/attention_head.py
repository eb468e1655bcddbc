"""What the attention kernels share: one head's columns as two blocks, loaded, rotated, multiplied and stored, and a
step of the softmax.

A head of D columns is two blocks, the largest power of two and the rest (80 = 64 + 16), so that the matrix units do
62.5 % of the work that padding to 128 costs. ``HEAD`` is (D, width of the first block, width of the second or 0).

With rotary tables the rows are rotated as they are loaded. Column j pairs with column j + D/2, across the blocks'
border, so both of a pair are put side by side, in columns 2 j and 2 j + 1, for queries and keys alike. That permutes
the columns of a dot product, which leaves it what it was, and the blocks keep their sizes. ``rotary.launch_rotation``
with ``pairs_adjacent_out``, a pass of its own, writes the same order, so the bits are those of the fused form.
"""

from __future__ import annotations

import math

import torch

from ..core.launching import jit, next_power_of_2, tl
from .rotary import rotate_pair


def column_blocks(columns: int) -> tuple[int, int]:
    """The two blocks of a head: powers of two of at least 16 (a matrix instruction's least), the second may be 0."""
    first = max(16, 1 << (columns.bit_length() - 1))
    rest = columns - first
    return first, max(16, next_power_of_2(rest)) if rest > 0 else 0


def head_of(x: torch.Tensor) -> tuple[int, int, int]:
    """``HEAD`` of a tensor ``(rows, heads, D)``."""
    return x.shape[2], *column_blocks(x.shape[2])


def head_strides(**tensors: torch.Tensor) -> dict[str, int]:
    """Strides of rows and heads by the names that kernels give them, and ``UNIT``, in which those of heads come.

    Triton knows of no divisor but 16 of a number that it is given: heads of 72 columns are 9 units of 8, which a kernel
    that multiplies by the unit loads 16 bytes at a time, and not 2.
    """
    unit = math.gcd(16, *(x.stride(1) for x in tensors.values()))
    named = {f"{name}_row": x.stride(0) for name, x in tensors.items()}
    return named | {f"{name}_head": x.stride(1) // unit for name, x in tensors.items()} | {"UNIT": unit}


@jit
def tile_bounds(tiles, SPLIT: tl.constexpr):
    """The program's own tile: its first row, begin and end of the segment that it is multiplied with, and the end of
    its own. Where the tile's rows and the others have one set of boundaries, both segments are the same."""
    tile = tiles + (4 if SPLIT else 3) * tl.program_id(0)
    first, begin, end = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    own_end = end
    if SPLIT:
        own_end = tl.load(tile + 3)
    return first, begin, end, own_end


@jit
def load_block(x, row, live, x_row, START: tl.constexpr, BLOCK: tl.constexpr, STOP: tl.constexpr):
    """``(rows, BLOCK)``: columns [START, START + BLOCK) of the rows, zero where not ``live`` or from STOP on."""
    column = START + tl.arange(0, BLOCK)[None, :]
    at = x + row.to(tl.int64)[:, None] * x_row + column
    if START + BLOCK <= STOP:
        value = tl.load(at, mask=live[:, None], other=0.0)
    else:
        value = tl.load(at, mask=live[:, None] & (column < STOP), other=0.0)
    return value


@jit
def store_block(x, value, row, live, x_row, START: tl.constexpr, BLOCK: tl.constexpr, STOP: tl.constexpr):
    column = START + tl.arange(0, BLOCK)[None, :]
    at = x + row.to(tl.int64)[:, None] * x_row + column
    tl.store(at, value.to(x.dtype.element_ty), mask=live[:, None] & (column < STOP))


@jit
def _rotated_block(
    x,
    cos,
    sin,
    row,
    live,
    x_row,
    cos_row,
    PAIR: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """``(rows, BLOCK)``: pairs [PAIR, PAIR + BLOCK / 2), rotated, both of a pair side by side."""
    a = load_block(x, row, live, x_row, PAIR, BLOCK // 2, PAIRS).to(ACC)
    b = load_block(x + PAIRS, row, live, x_row, PAIR, BLOCK // 2, PAIRS).to(ACC)
    c = load_block(cos, row, live, cos_row, PAIR, BLOCK // 2, PAIRS).to(ACC)
    s = load_block(sin, row, live, cos_row, PAIR, BLOCK // 2, PAIRS).to(ACC)
    first, second = rotate_pair(a, b, c, s)
    dtype = x.dtype.element_ty
    return tl.reshape(tl.join(first.to(dtype), second.to(dtype)), (row.shape[0], BLOCK))


@jit
def _store_rotated_block(
    x,
    value,
    cos,
    sin,
    row,
    live,
    x_row,
    cos_row,
    PAIR: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """The gradient of :func:`_rotated_block`'s rows from that of its result: rotated back, in the usual order."""
    a, b = tl.split(tl.reshape(value, (row.shape[0], BLOCK // 2, 2)))
    c = load_block(cos, row, live, cos_row, PAIR, BLOCK // 2, PAIRS).to(ACC)
    s = load_block(sin, row, live, cos_row, PAIR, BLOCK // 2, PAIRS).to(ACC)
    first, second = rotate_pair(a, b, c, -s)
    store_block(x, first, row, live, x_row, PAIR, BLOCK // 2, PAIRS)
    store_block(x + PAIRS, second, row, live, x_row, PAIR, BLOCK // 2, PAIRS)


@jit
def load_head(
    x,
    cos,
    sin,
    row,
    live,
    x_row,
    cos_row,
    HEAD: tl.constexpr,
    ACC: tl.constexpr,
):
    """Both blocks of the rows, rotated where ``cos`` is given. Where the head has one block, the second repeats it."""
    D: tl.constexpr = HEAD[0]
    D0: tl.constexpr = HEAD[1]
    D1: tl.constexpr = HEAD[2]
    if cos is not None:
        first = _rotated_block(x, cos, sin, row, live, x_row, cos_row, 0, D // 2, D0, ACC)
    else:
        first = load_block(x, row, live, x_row, 0, D0, D)
    second = first
    if D1 > 0:
        if cos is not None:
            second = _rotated_block(x, cos, sin, row, live, x_row, cos_row, D0 // 2, D // 2, D1, ACC)
        else:
            second = load_block(x, row, live, x_row, D0, D1, D)
    return first, second


@jit
def store_head(
    x,
    first,
    second,
    cos,
    sin,
    row,
    live,
    x_row,
    cos_row,
    HEAD: tl.constexpr,
    ACC: tl.constexpr,
):
    """Store both blocks in the columns that :func:`load_head` takes them from, rotated back where ``cos`` is given."""
    D: tl.constexpr = HEAD[0]
    D0: tl.constexpr = HEAD[1]
    D1: tl.constexpr = HEAD[2]
    if cos is not None:
        _store_rotated_block(x, first, cos, sin, row, live, x_row, cos_row, 0, D // 2, D0, ACC)
    else:
        store_block(x, first, row, live, x_row, 0, D0, D)
    if D1 > 0:
        if cos is not None:
            _store_rotated_block(x, second, cos, sin, row, live, x_row, cos_row, D0 // 2, D // 2, D1, ACC)
        else:
            store_block(x, second, row, live, x_row, D0, D1, D)


@jit
def zeros_head(rows: tl.constexpr, HEAD: tl.constexpr, ACC: tl.constexpr):
    """Accumulators for both blocks; the second one is not used where the head has one block."""
    FIRST: tl.constexpr = HEAD[1]  # named, as Triton 3.6 takes no plain number for a size
    SECOND: tl.constexpr = HEAD[2] if HEAD[2] > 0 else 16  # pyright: ignore[reportAssignmentType]
    return tl.zeros((rows, FIRST), ACC), tl.zeros((rows, SECOND), ACC)


@jit
def dot_heads(a0, a1, b0, b1, HEAD: tl.constexpr, ACC: tl.constexpr):
    """``a b^T`` over both blocks of columns."""
    out = tl.dot(a0, tl.trans(b0), input_precision="ieee", out_dtype=ACC)
    if HEAD[2] > 0:
        out = tl.dot(a1, tl.trans(b1), out, input_precision="ieee", out_dtype=ACC)
    return out


@jit
def softmax_step(qk, m_i, l_i, scale):
    """The scores' weights by the largest score so far, and by how much what was summed with the last one shrinks."""
    m_new = tl.maximum(m_i, tl.max(qk, 1) * scale)
    p = tl.exp2(qk * scale - m_new[:, None])  # one multiply-add an element; scale is in powers of two
    alpha = tl.exp2(m_i - m_new)
    return p, alpha, m_new, l_i * alpha + tl.sum(p, 1)
