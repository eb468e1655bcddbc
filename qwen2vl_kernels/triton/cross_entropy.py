"""The Triton kernel of linear_cross_entropy: cross-entropy of rows of logits, its gradient in their place.

    lse = log(sum(exp(z))),  loss = lse - (1 - s) z[y] - s mean(z)
    dz = scale (softmax(z) - (1 - s) onehot(y) - s / V)

A program has a row. It goes over the V logits once for the sum, rescaled whenever a larger logit comes (online softmax,
Milakov & Gimelshein 2018, algorithm 3), and where a gradient is wanted once more, which writes what it reads. Bytes a
row of b-byte logits: V b for the loss alone, 3 V b with the gradient, of which the second reading may come from the L2
cache, as a row is 300 kB and few programs are under way at once. A row to be ignored is not read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..core.launching import Target, accumulator, jit, launch, next_power_of_2, target_of, tl


@dataclass(frozen=True)
class RowTile:
    block_n: int  # logits that a program holds at once
    num_warps: int


def config(columns: int, dtype: torch.dtype, target: Target) -> RowTile:
    """16 KiB of a row a program of 512 threads: two vectors of 16 bytes a thread on their way. Not yet tuned."""
    return RowTile(min(16384 // dtype.itemsize, next_power_of_2(columns)), target.warps(512))


@jit(do_not_specialize=["ignore_index"])
def _row_kernel(
    logits,
    target,
    scale,
    loss,
    ignore_index,
    logits_row,
    COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SMOOTHING: tl.constexpr,
    GRADIENT: tl.constexpr,
    ACC: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    z = logits + row * logits_row
    y = tl.load(target + row)
    column = tl.arange(0, BLOCK_N)
    if y == ignore_index:
        tl.store(loss + row, 0.0)
        if GRADIENT:
            for start in range(0, COLUMNS, BLOCK_N):
                zeros = tl.zeros((BLOCK_N,), ACC).to(logits.dtype.element_ty)
                tl.store(z + start + column, zeros, mask=start + column < COLUMNS)
    else:
        known = (y >= 0) & (y < COLUMNS)
        # Read before anything is written, which the sums over the program below see to.
        chosen = tl.load(z + tl.where(known, y, 0)).to(ACC)
        m_i = tl.full((), float("-inf"), ACC)
        l_i = tl.zeros((), ACC)
        total = tl.zeros((), ACC)
        for start in range(0, COLUMNS, BLOCK_N):
            valid = start + column < COLUMNS
            x = tl.load(z + start + column, mask=valid, other=float("-inf")).to(ACC)
            larger = tl.maximum(m_i, tl.max(x, 0))
            shift = tl.where(larger == float("-inf"), 0.0, larger)  # as long as all logits are -inf
            l_i = l_i * tl.exp(m_i - shift) + tl.sum(tl.exp(x - shift), 0)
            m_i = larger
            if SMOOTHING > 0:
                total += tl.sum(tl.where(valid, x, 0.0), 0)
        value = m_i + tl.log(l_i) - (1 - SMOOTHING) * chosen
        if SMOOTHING > 0:
            value -= SMOOTHING * (total / COLUMNS)
        # A target that names no column makes its loss and its gradient NaN, as nobody could refuse it on the host.
        poison = tl.where(known, 0.0, float("nan")).to(ACC)
        tl.store(loss + row, value + poison)
        if GRADIENT:
            factor = 1.0 + poison
            if scale is not None:
                factor *= tl.load(scale + row).to(ACC)
            inverse = 1.0 / l_i  # a product a number, where a quotient takes several instructions
            for start in range(0, COLUMNS, BLOCK_N):
                valid = start + column < COLUMNS
                x = tl.load(z + start + column, mask=valid, other=float("-inf")).to(ACC)
                d = tl.exp(x - m_i) * inverse
                if SMOOTHING > 0:
                    d -= SMOOTHING / COLUMNS
                d = tl.where(start + column == y, d - (1 - SMOOTHING), d)
                tl.store(z + start + column, (d * factor).to(logits.dtype.element_ty), mask=valid)


def launch_rows(
    logits: torch.Tensor,
    target: torch.Tensor,
    scale: torch.Tensor | None,
    loss: torch.Tensor,
    ignore_index: int,
    smoothing: float,
    gradient: bool,
) -> torch.Tensor:
    """Write the loss of each row to ``loss (R,)``; returns ``logits (R, V)``, overwritten by their gradient if wanted.

    ``target (R,)`` int64; ``scale (R,)``, contiguous, multiplies the gradient of each row, not its loss.
    """
    rows, columns = logits.shape
    chosen = config(columns, logits.dtype, target_of(logits.device))
    launch(
        _row_kernel,
        (rows,),
        logits.device,
        logits=logits,
        target=target,
        scale=scale,
        loss=loss,
        ignore_index=ignore_index,
        logits_row=logits.stride(0),
        COLUMNS=columns,
        BLOCK_N=chosen.block_n,
        SMOOTHING=smoothing,
        GRADIENT=gradient,
        ACC=accumulator(logits.dtype),
        num_warps=chosen.num_warps,
    )
    return logits
