"""The Triton kernels of quick_gelu and swiglu, which are one function.

    y = h sigmoid(SCALE h) (* up),  h = x (+ bias)

QuickGELU has the scale 1.702 and the bias of the projection before it, SwiGLU the scale 1 and a factor up. Backward:

    s = sigmoid(SCALE h),  g = dy (* up)
    dx = g s (1 + SCALE h (1 - s)),  dup = dy h s,  dbias = sum over rows of dx

Bytes a row of F values of b bytes: 2 F b forward and 3 F b backward without ``up``, 3 F b and 5 F b with it. The bias'
gradient is summed without atomics: each program adds up a run of rows, in float32, and PyTorch adds the programs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..core.launching import Target, accumulator, cdiv, jit, launch, next_power_of_2, strides, target_of, tl


@dataclass(frozen=True)
class Tile:
    block_m: int  # rows
    block_n: int  # columns
    num_warps: int


def tile(columns: int, dtype: torch.dtype, target: Target) -> Tile:
    """8 KiB of input a program of 128 threads: four vectors of 16 bytes a thread on their way. Not yet tuned."""
    block = min(1024, next_power_of_2(columns))
    return Tile(max(1, 8192 // (block * dtype.itemsize)), block, target.warps(128))


#: Programs along the rows where sums over them are kept, with one row of partial sums each.
_SUM_PROGRAMS = 128


@jit
def _load(x, row, column, x_row, x_column, mask, ACC: tl.constexpr):
    return tl.load(x + row * x_row + column.to(tl.int64) * x_column, mask=mask, other=0.0).to(ACC)


@jit(do_not_specialize=["rows"])
def _forward_kernel(
    x,
    bias,
    up,
    y,
    rows,
    x_row,
    x_column,
    up_row,
    up_column,
    y_row,
    y_column,
    COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SCALE: tl.constexpr,
    ACC: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    mask = (row < rows) & (column < COLUMNS)
    h = _load(x, row, column, x_row, x_column, mask, ACC)
    if bias is not None:
        h += tl.load(bias + column, mask=column < COLUMNS, other=0.0).to(ACC)
    out = h / (1 + tl.exp(-SCALE * h))
    if up is not None:
        out *= _load(up, row, column, up_row, up_column, mask, ACC)
    tl.store(y + row * y_row + column.to(tl.int64) * y_column, out.to(y.dtype.element_ty), mask=mask)


@jit(do_not_specialize=["rows", "run"])
def _backward_kernel(
    dy,
    x,
    bias,
    up,
    dx,
    dup,
    dbias,
    rows,
    run,
    dy_row,
    dy_column,
    x_row,
    x_column,
    up_row,
    up_column,
    dx_row,
    dup_row,
    COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SCALE: tl.constexpr,
    ACC: tl.constexpr,
):
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    valid = column < COLUMNS
    begin = tl.program_id(0).to(tl.int64) * run
    end = tl.minimum(begin + run, rows)
    bias_sum = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for first in range(begin, end, BLOCK_M):
        row = (first + tl.arange(0, BLOCK_M)[:, None]).to(tl.int64)
        mask = (row < end) & valid
        h = _load(x, row, column, x_row, x_column, mask, ACC)
        g = _load(dy, row, column, dy_row, dy_column, mask, ACC)
        if bias is not None:
            h += tl.load(bias + column, mask=valid, other=0.0).to(ACC)
        if up is not None:
            u = _load(up, row, column, up_row, up_column, mask, ACC)  # before anything is stored, as all loads
        sigmoid = 1 / (1 + tl.exp(-SCALE * h))
        if up is not None:
            tl.store(dup + row * dup_row + column, (g * h * sigmoid).to(dup.dtype.element_ty), mask=mask)
            g *= u
        g *= sigmoid * (1 + SCALE * h * (1 - sigmoid))
        if dbias is not None:
            bias_sum += g
        tl.store(dx + row * dx_row + column, g.to(dx.dtype.element_ty), mask=mask)
    if dbias is not None:
        at = tl.program_id(0).to(tl.int64) * COLUMNS + column
        tl.store(dbias + at, tl.sum(bias_sum, 0, keep_dims=True), mask=valid)


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """``(..., C)`` as ``(rows, C)``: a view wherever the leading dimensions can be walked with one stride."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def launch_forward(
    x: torch.Tensor, bias: torch.Tensor | None, up: torch.Tensor | None, y: torch.Tensor, scale: float
) -> None:
    """Rows ``x (R, F)`` and ``up (R, F)`` of any strides to rows ``y (R, F)``, which may be x."""
    if x.numel() == 0:
        return
    rows, columns = x.shape
    cut = tile(columns, x.dtype, target_of(x.device))
    launch(
        _forward_kernel,
        (cdiv(rows, cut.block_m), cdiv(columns, cut.block_n)),
        x.device,
        x=x,
        bias=None if bias is None else bias.contiguous(),
        up=up,
        y=y,
        rows=rows,
        **strides(("row", "column"), x=x, up=up, y=y),
        COLUMNS=columns,
        BLOCK_M=cut.block_m,
        BLOCK_N=cut.block_n,
        SCALE=scale,
        ACC=accumulator(x.dtype),
        num_warps=cut.num_warps,
    )


def launch_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    up: torch.Tensor | None,
    dx: torch.Tensor,
    dup: torch.Tensor | None,
    scale: float,
) -> torch.Tensor | None:
    """Write the gradients of rows to ``dx`` and ``dup``, rows with contiguous columns; returns that of the bias."""
    rows, columns = x.shape
    if x.numel() == 0:
        return None if bias is None else torch.zeros_like(bias)
    cut, wide = tile(columns, x.dtype, target_of(x.device)), torch.promote_types(x.dtype, torch.float32)
    run = cut.block_m * (1 if bias is None else cdiv(rows, cut.block_m * _SUM_PROGRAMS))  # rows of a program
    programs = cdiv(rows, run)
    partial = None if bias is None else torch.empty((programs, columns), dtype=wide, device=x.device)
    launch(
        _backward_kernel,
        (programs, cdiv(columns, cut.block_n)),
        x.device,
        dy=dy,
        x=x,
        bias=None if bias is None else bias.contiguous(),
        up=up,
        dx=dx,
        dup=dup,
        dbias=partial,
        rows=rows,
        run=run,
        **strides(("row", "column"), dy=dy, x=x, up=up),
        **strides(("row",), dx=dx, dup=dup),
        COLUMNS=columns,
        BLOCK_M=cut.block_m,
        BLOCK_N=cut.block_n,
        SCALE=scale,
        ACC=accumulator(x.dtype),
        num_warps=cut.num_warps,
    )
    return None if partial is None else partial.sum(0).to(x.dtype)
