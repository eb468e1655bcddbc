"""Triton kernels of ``y = x W^T + bias`` for quantised W: one row, few rows, many rows.

One row reads ``N K bits / 8`` bytes and does little else: programs take `_ROW_OUTPUTS` outputs and a share of K, large
enough in number that every multiprocessor streams, each step one chunk of one group by 16-byte loads. Few rows pad to
the 16 of a matrix instruction and share the same split of K. Many rows use larger tiles and no split. Where K is split,
partial sums are float32 in memory and a second kernel adds them in their order. Rows of float32 go one by one, as tiles
of them meet a fault of ptxas 12.8 (Triton 3.6): a predicate that is read before it is written.

All of them multiply x with ``q - zero``, exact in 16-bit floats, and scale a group's float32 sum. How K is split and
how tiles are cut depends on N, K and the form alone, so that a row's result has the same bits whatever rows are beside
it in the same form. No GPU has timed these yet.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..core.launching import Target, cdiv, jit, launch, target_of, tl
from ..core.quant_layout import COLUMNS, FEW_ROWS, FP8

#: Programs that keep every multiprocessor of a large GPU at its loads.
_PROGRAMS = 512
#: A share of K is at least so many columns: less would be read before the first load has arrived.
_LEAST_SHARE = 512
#: Groups that are longer are taken as several with one scale, so that K can be split inside them.
_LONGEST_RUN = 512


@dataclass(frozen=True)
class QuantLinearConfig:
    block_m: int  # 1: no matrix instruction
    block_n: int
    block_k: int
    split: int  # shares of K
    num_warps: int
    num_stages: int


def config(rows: int, outputs: int, columns: int, run: int, dtype: torch.dtype, target: Target) -> QuantLinearConfig:
    """The form by the number of rows, the rest by N and K. Not yet tuned."""
    stages = 3 if target.backend == "cuda" else 2  # AMD's shared memory holds two
    block_k = COLUMNS
    alone = rows == 1 or dtype == torch.float32
    while block_k < (256 if alone else 64) and run % (2 * block_k) == 0:
        block_k *= 2
    runs = cdiv(columns, run)
    if rows > FEW_ROWS and not alone:
        return QuantLinearConfig(64, 128, block_k, 1, target.warps(256), stages)
    block_m, block_n = (1, 16) if alone else (FEW_ROWS, 32)
    split = 1
    # A share holds whole runs, each of which has one scale for all of its sum.
    while cdiv(outputs, block_n) * split < _PROGRAMS and runs >= 2 * split and columns >= 2 * split * _LEAST_SHARE:
        split *= 2
    return QuantLinearConfig(block_m, block_n, block_k, split, target.warps(128), stages)


@jit
def low_high(packed, zero, KIND: tl.constexpr, dtype: tl.constexpr):
    """Values before scales, of the low and of the high halves of bytes; the same twice where a byte is one value."""
    if KIND == 4:
        low = ((packed & 15).to(tl.int16) - zero).to(dtype)
        high = ((packed >> 4).to(tl.int16) - zero).to(dtype)
    elif KIND == 8:
        low = (packed.to(tl.int16) - zero).to(dtype)
        high = low
    else:
        # e4m3's exponent and mantissa where those of float16 begin, 2^8 too small; 0x7f is no number.
        bits = packed.to(tl.int16)
        half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
        value = half.to(tl.float16, bitcast=True) * 256.0
        low = tl.where((bits & 0x7F) == 0x7F, float("nan"), value.to(tl.float32)).to(dtype)
        high = low
    return low, high


@jit
def zero_of(zeros, n, g, zeros_row, N: tl.constexpr, KIND: tl.constexpr):
    if zeros is None:
        zero = tl.full((1,), 8 if KIND == 4 else 128, tl.int16)
    elif KIND == 4:
        zero = (tl.load(zeros + n * zeros_row + g // 2).to(tl.int16) >> (g % 2 * 4)) & 15
    else:
        zero = tl.load(zeros + n * zeros_row + g).to(tl.int16)
    return zero


@jit(do_not_specialize=["rows"])
def _row_kernel(
    x,
    weight,
    scales,
    zeros,
    bias,
    y,
    rows,
    x_row,
    weight_row,
    scales_row,
    zeros_row,
    N: tl.constexpr,
    K: tl.constexpr,
    RUNS: tl.constexpr,
    RUN: tl.constexpr,
    RUNS_PER_GROUP: tl.constexpr,
    SHARE: tl.constexpr,
    ROWS_PER_SCALE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    KIND: tl.constexpr,
    HALF: tl.constexpr,
    SPLIT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(2)
    x += row * x_row
    at = tl.minimum(n, N - 1)  # beyond the end the last row is read, and not stored
    BYTES: tl.constexpr = BLOCK_K // 2 if KIND == 4 else BLOCK_K
    j = tl.arange(0, BYTES)
    # Columns of the low halves: 16 neighbours, then those 32 further.
    low_k = j // HALF * (2 * HALF) + j % HALF if KIND == 4 else j
    w_rows = weight + at[:, None] * weight_row + j[None, :]
    acc = tl.zeros((BLOCK_N, BYTES), tl.float32)
    for r in range(part * SHARE, tl.minimum(part * SHARE + SHARE, RUNS)):
        g = r // RUNS_PER_GROUP
        zero = zero_of(zeros, at, g, zeros_row, N, KIND) if KIND != 1 else tl.zeros((1,), tl.int16)
        sums = tl.zeros((BLOCK_N, BYTES), tl.float32)
        for begin in range(0, RUN, BLOCK_K):
            k = r * RUN + begin
            if K % RUN == 0:
                packed = tl.load(w_rows + (k // 2 if KIND == 4 else k))
                x_low = tl.load(x + k + low_k).to(tl.float32)
                x_high = tl.load(x + k + low_k + HALF).to(tl.float32) if KIND == 4 else x_low
            else:
                valid = k + low_k < K  # K has whole runs of 32, so that both halves of a byte are there or neither
                packed = tl.load(w_rows + (k // 2 if KIND == 4 else k), mask=valid[None, :], other=0)
                x_low = tl.load(x + k + low_k, mask=valid, other=0.0).to(tl.float32)
                x_high = tl.load(x + k + low_k + HALF, mask=valid, other=0.0).to(tl.float32) if KIND == 4 else x_low
            low, high = low_high(packed, zero[:, None], KIND, tl.float32)
            sums += low * x_low[None, :]
            if KIND == 4:
                sums += high * x_high[None, :]
        scale = tl.load(scales + at // ROWS_PER_SCALE * scales_row + g).to(tl.float32)
        acc += sums * scale[:, None]
    out = tl.sum(acc, 1)
    if SPLIT == 1 and bias is not None:
        out += tl.load(bias + at).to(tl.float32)
    tl.store(y + (part.to(tl.int64) * rows + row) * N + n, out.to(y.dtype.element_ty), mask=n < N)


@jit
def _columns_of(x_rows, x_at, order, k, low_k, valid, K: tl.constexpr):
    """Of each row of x what meets columns ``k + low_k`` of the weight, zeros where these are not ``valid``."""
    if order is None:
        at = x_at + k
    else:
        # What an order names outside of x, which nobody reads on the host, is cut to it.
        found = tl.load(order + k + low_k) if valid is None else tl.load(order + k + low_k, mask=valid, other=0)
        at = x_rows[:, None] + tl.minimum(tl.maximum(found, 0), K - 1)[None, :]
    return tl.load(at) if valid is None else tl.load(at, mask=valid[None, :], other=0.0)


@jit
def tile_sums(
    x_rows,
    weight_rows,
    scales,
    zeros,
    order,
    at,
    first,
    end,
    scales_row,
    zeros_row,
    N: tl.constexpr,
    K: tl.constexpr,
    RUN: tl.constexpr,
    RUNS_PER_GROUP: tl.constexpr,
    ROWS_PER_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    KIND: tl.constexpr,
    HALF: tl.constexpr,
    dtype: tl.constexpr,
):
    """``(BLOCK_M, BLOCK_N)`` float32 products over runs ``[first, end)`` of K, of rows of x, ``(BLOCK_M,)`` pointers,
    and of rows ``at`` of a weight, ``(BLOCK_N,)`` pointers to their beginnings; ``order``: of columns of x, or None."""
    BYTES: tl.constexpr = BLOCK_K // 2 if KIND == 4 else BLOCK_K
    j = tl.arange(0, BYTES)
    low_k = j // HALF * (2 * HALF) + j % HALF if KIND == 4 else j
    w_rows = weight_rows[:, None] + j[None, :]
    x_at = x_rows[:, None] + low_k[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for r in range(first, end):
        g = r // RUNS_PER_GROUP
        zero = zero_of(zeros, at, g, zeros_row, N, KIND) if KIND != 1 else tl.zeros((1,), tl.int16)
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for begin in range(0, RUN, BLOCK_K):
            k = r * RUN + begin
            if K % RUN == 0:
                valid = None
                packed = tl.load(w_rows + (k // 2 if KIND == 4 else k))
            else:
                valid = k + low_k < K
                packed = tl.load(w_rows + (k // 2 if KIND == 4 else k), mask=valid[None, :], other=0)
            x_low = _columns_of(x_rows, x_at, order, k, low_k, valid, K)
            low, high = low_high(packed, zero[:, None], KIND, dtype)
            sums = tl.dot(x_low, tl.trans(low), sums, input_precision="ieee")
            if KIND == 4:
                x_high = _columns_of(x_rows, x_at, order, k + HALF, low_k, valid, K)
                sums = tl.dot(x_high, tl.trans(high), sums, input_precision="ieee")
        scale = tl.load(scales + at // ROWS_PER_SCALE * scales_row + g).to(tl.float32)
        acc += sums * scale[None, :]
    return acc


@jit(do_not_specialize=["rows"])
def _tile_kernel(
    x,
    weight,
    scales,
    zeros,
    bias,
    y,
    rows,
    x_row,
    weight_row,
    scales_row,
    zeros_row,
    N: tl.constexpr,
    K: tl.constexpr,
    RUNS: tl.constexpr,
    RUN: tl.constexpr,
    RUNS_PER_GROUP: tl.constexpr,
    SHARE: tl.constexpr,
    ROWS_PER_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    KIND: tl.constexpr,
    HALF: tl.constexpr,
    SPLIT: tl.constexpr,
):
    # Rows of tiles go first: programs that run side by side share their part of the weight, the larger operand.
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(2)
    at = tl.minimum(n, N - 1)
    x_rows = x + tl.minimum(m, rows - 1) * x_row
    end = tl.minimum(part * SHARE + SHARE, RUNS)
    acc = tile_sums(
        x_rows, weight + at * weight_row, scales, zeros, None, at, part * SHARE, end, scales_row, zeros_row, N, K, RUN,
        RUNS_PER_GROUP, ROWS_PER_SCALE, BLOCK_M, BLOCK_N, BLOCK_K, KIND, HALF, x.dtype.element_ty,
    )  # fmt: skip
    if SPLIT == 1 and bias is not None:
        acc += tl.load(bias + at).to(tl.float32)[None, :]
    to = y + (part.to(tl.int64) * rows + m)[:, None] * N + n[None, :]
    tl.store(to, acc.to(y.dtype.element_ty), mask=(m < rows)[:, None] & (n < N)[None, :])


@jit(do_not_specialize=["values"])
def _add_parts_kernel(parts, bias, y, values, N: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < values
    total = tl.load(parts + at, mask=mask, other=0.0)
    for part in tl.static_range(1, SPLIT):  # pyright: ignore[reportGeneralTypeIssues]
        total += tl.load(parts + part * values.to(tl.int64) + at, mask=mask, other=0.0)
    if bias is not None:
        total += tl.load(bias + at % N, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=mask)


def runs_of(block: tuple[int, int], columns: int) -> tuple[int, int]:
    """Columns of a group that has a scale, and of the runs that it is taken as."""
    group = run = min(block[1], columns)
    while run > _LONGEST_RUN and run % (2 * COLUMNS) == 0:
        run //= 2
    return group, run


def kind_of(weight: torch.Tensor, columns: int) -> int:
    """What kernels call a weight: 4 or 8 for the bits of its integers, 1 for fp8."""
    return 1 if weight.dtype == FP8 else 4 if 2 * weight.shape[-1] == columns else 8


def launch_quant_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    block: tuple[int, int],
) -> torch.Tensor:
    """``x (M, K)`` times the weight, ``(M, N)`` in x's dtype; two launches where K is split, else one."""
    (rows, columns), outputs = x.shape, weight.shape[0]
    y = x.new_empty((rows, outputs))
    if y.numel() == 0:
        return y
    x = x if x.stride(1) == 1 else x.contiguous()
    group, run = runs_of(block, columns)
    chosen = config(rows, outputs, columns, run, x.dtype, target_of(x.device))
    runs, split = cdiv(columns, run), chosen.split
    parts = y if split == 1 else x.new_empty((split, rows, outputs), dtype=torch.float32)
    given = {
        "x": x,
        "weight": weight.view(torch.uint8),
        "scales": scales,
        "zeros": zeros,
        "bias": bias if bias is None else bias.contiguous(),
        "y": parts,
        "rows": rows,
        "x_row": x.stride(0),
        "weight_row": weight.stride(0),
        "scales_row": scales.stride(0),
        "zeros_row": 0 if zeros is None else zeros.stride(0),
        "N": outputs,
        "K": columns,
        "RUNS": runs,
        "RUN": run,
        "RUNS_PER_GROUP": group // run,
        "SHARE": cdiv(runs, split),
        "ROWS_PER_SCALE": block[0],
        "BLOCK_N": chosen.block_n,
        "BLOCK_K": chosen.block_k,
        "KIND": kind_of(weight, columns),
        "HALF": COLUMNS // 2,
        "SPLIT": split,
        "num_warps": chosen.num_warps,
        "num_stages": chosen.num_stages,
    }
    across = cdiv(outputs, chosen.block_n)
    if chosen.block_m == 1:
        launch(_row_kernel, (rows, across, split), x.device, **given)
    else:
        launch(_tile_kernel, (cdiv(rows, chosen.block_m), across, split), x.device, **given, BLOCK_M=chosen.block_m)
    if split > 1:
        launch(
            _add_parts_kernel,
            (cdiv(rows * outputs, 256),),
            x.device,
            parts=parts,
            bias=given["bias"],
            y=y,
            values=rows * outputs,
            N=outputs,
            SPLIT=split,
            BLOCK=256,
            num_warps=target_of(x.device).warps(128),
        )
    return y
