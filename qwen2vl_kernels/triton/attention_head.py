"""What the attention kernels share: one head's columns as two blocks, loaded, turned, multiplied and stored.

A head of D columns is two blocks, the largest power of two and the rest (80 = 64 + 16), so that the matrix units do
62.5 % of the work that padding to 128 costs. With rotary tables the rows are turned as they are loaded: column j pairs
with j + D/2, across the blocks' border, so both of a pair are put side by side, 2 i and 2 i + 1, for queries and keys
alike. That permutes the columns of a dot product, which leaves it what it was, and the blocks keep their sizes.
:func:`turned_for_attention`, a pass of its own, writes the same order: the bits are those of the fused form.
"""

from __future__ import annotations

import math

import torch

from ..core.launching import jit, next_power_of_2, tl
from .rotary import Angles, launch_rotation, turn


def column_blocks(columns: int) -> tuple[int, int]:
    """The two blocks of a head: powers of two of at least 16 (a matrix instruction's least), the second may be 0."""
    first = max(16, 1 << (columns.bit_length() - 1))
    rest = columns - first
    return first, max(16, next_power_of_2(rest)) if rest > 0 else 0


def blocks_of(q: torch.Tensor, v: torch.Tensor) -> dict[str, int]:
    (d0, d1), (v0, v1) = column_blocks(q.shape[2]), column_blocks(v.shape[2])
    return {"D": q.shape[2], "D0": d0, "D1": d1, "V": v.shape[2], "V0": v0, "V1": v1}


def strides_of(*tensors: torch.Tensor) -> tuple[list[int], int]:
    """Strides of rows and heads of all, as kernels take them, and the unit that those of heads come in.

    Triton knows of no divisor but 16 of a number that it is given: heads of 72 columns are 9 units of 8, which a kernel
    that multiplies by the unit loads 16 bytes at a time, and not 2.
    """
    unit = math.gcd(16, *(x.stride(1) for x in tensors))
    return [stride for x in tensors for stride in (x.stride(0), x.stride(1) // unit)], unit


def tables(rope: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines with the one layout that kernels read."""
    cos, sin = rope
    if cos.stride() != sin.stride() or cos.stride(-1) != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
    return cos, sin


def turned_for_attention(q, k, cos, sin) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k turned by tables ``(T, D/2)``, the columns of a pair side by side, as :func:`load_head` turns them."""
    outputs = (_empty(q), _empty(k))
    launch_rotation(q, k, *outputs, Angles(cos=cos, sin=sin), to_side=True)
    return outputs


def turned_back(dq, dk, cos, sin, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of q and k, of ``dtype``, from those of :func:`turned_for_attention`'s results."""
    outputs = (_empty(dq, dtype), _empty(dk, dtype))
    launch_rotation(dq, dk, *outputs, Angles(cos=cos, sin=sin, inverse=True), from_side=True)
    return outputs


def _empty(x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    return torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)


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
def _turned_block(
    x, cos, sin, row, live, x_row, table_row,
    PAIR: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """``(rows, BLOCK)``: pairs [PAIR, PAIR + BLOCK / 2), turned, both of a pair side by side."""
    a = load_block(x, row, live, x_row, PAIR, BLOCK // 2, PAIRS).to(ACC)
    b = load_block(x + PAIRS, row, live, x_row, PAIR, BLOCK // 2, PAIRS).to(ACC)
    c = load_block(cos, row, live, table_row, PAIR, BLOCK // 2, PAIRS).to(ACC)
    s = load_block(sin, row, live, table_row, PAIR, BLOCK // 2, PAIRS).to(ACC)
    first, second = turn(a, b, c, s)
    dtype = x.dtype.element_ty
    return tl.reshape(tl.join(first.to(dtype), second.to(dtype)), (row.shape[0], BLOCK))


@jit
def _store_turned_block(
    x, value, cos, sin, row, live, x_row, table_row,
    PAIR: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The gradient of :func:`_turned_block`'s rows from that of what it returned: turned back, in the usual order."""
    a, b = tl.split(tl.reshape(value, (row.shape[0], BLOCK // 2, 2)))
    c = load_block(cos, row, live, table_row, PAIR, BLOCK // 2, PAIRS).to(ACC)
    s = load_block(sin, row, live, table_row, PAIR, BLOCK // 2, PAIRS).to(ACC)
    first, second = turn(a, b, c, -s)
    store_block(x, first, row, live, x_row, PAIR, BLOCK // 2, PAIRS)
    store_block(x + PAIRS, second, row, live, x_row, PAIR, BLOCK // 2, PAIRS)


@jit
def load_head(
    x, cos, sin, row, live, x_row, table_row,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Both blocks of the rows, turned where ``cos`` is given; the second is only there to be named where D1 is 0."""
    if cos is not None:
        first = _turned_block(x, cos, sin, row, live, x_row, table_row, 0, D // 2, D0, ACC)
    else:
        first = load_block(x, row, live, x_row, 0, D0, D)
    second = first
    if D1 > 0:
        if cos is not None:
            second = _turned_block(x, cos, sin, row, live, x_row, table_row, D0 // 2, D // 2, D1, ACC)
        else:
            second = load_block(x, row, live, x_row, D0, D1, D)
    return first, second


@jit
def store_head(
    x, first, second, cos, sin, row, live, x_row, table_row,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Store both blocks in the columns that :func:`load_head` takes them from, turned back where ``cos`` is given."""
    if cos is not None:
        _store_turned_block(x, first, cos, sin, row, live, x_row, table_row, 0, D // 2, D0, ACC)
    else:
        store_block(x, first, row, live, x_row, 0, D0, D)
    if D1 > 0:
        if cos is not None:
            _store_turned_block(x, second, cos, sin, row, live, x_row, table_row, D0 // 2, D // 2, D1, ACC)
        else:
            store_block(x, second, row, live, x_row, D0, D1, D)


@jit
def product(a0, a1, b0, b1, REST: tl.constexpr, ACC: tl.constexpr):
    """``a b^T`` over both blocks of columns."""
    out = tl.dot(a0, tl.trans(b0), input_precision="ieee", out_dtype=ACC)
    if REST > 0:
        out = tl.dot(a1, tl.trans(b1), out, input_precision="ieee", out_dtype=ACC)
    return out
