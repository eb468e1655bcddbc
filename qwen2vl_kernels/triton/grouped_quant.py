"""Triton kernel of grouped_quant_linear: rows sorted by group, times the group's quantised weight.

Tiles are those of ``grouped_gemm``, a flat list of which no group is padded to more than its last one, and programs
find their group in the bounds. What a tile sums is what ``quant_linear`` sums: x times ``q - zero``, exact in 16-bit
floats, with a group of columns' float32 sum scaled. Bytes M K + M N and, of the groups that have rows, the weights,
``N K bits / 8`` each; a step of decoding reads little else, so that tiles of few rows pad to the 16 of a matrix
instruction. No GPU has run this yet.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..core.launching import Target, cdiv, jit, launch, next_power_of_2, target_of, tl
from ..core.quant_layout import COLUMNS, FEW_ROWS
from .grouped_gemm import group_of
from .quant_linear import kind_of, runs_of, tile_sums


@dataclass(frozen=True)
class GroupedQuantConfig:
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def config(rows: int, groups: int, run: int, target: Target) -> GroupedQuantConfig:
    """Small tiles where groups have few rows on average, by what the host knows, and larger ones where they have many.
    A row's result has the same bits whatever rows are beside it in the same form. Not yet tuned."""
    stages = 3 if target.backend == "cuda" else 2  # AMD's shared memory holds two
    block_k = COLUMNS
    while block_k < 64 and run % (2 * block_k) == 0:
        block_k *= 2
    if rows > FEW_ROWS * groups:
        return GroupedQuantConfig(64, 128, block_k, target.warps(256), stages)
    return GroupedQuantConfig(FEW_ROWS, 32, block_k, target.warps(128), stages)


@jit(do_not_specialize=["rows"])
def _grouped_kernel(
    x,
    weight,
    scales,
    zeros,
    order,
    bounds,
    y,
    rows,
    x_row,
    weight_group,
    weight_row,
    scales_group,
    scales_row,
    zeros_group,
    zeros_row,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    POWER: tl.constexpr,
    RUNS: tl.constexpr,
    RUN: tl.constexpr,
    RUNS_PER_GROUP: tl.constexpr,
    ROWS_PER_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    KIND: tl.constexpr,
    HALF: tl.constexpr,
):
    across = tl.cdiv(N, BLOCK_N)
    program = tl.program_id(0)
    group, first, end = group_of(bounds, program // across, rows, GROUPS, POWER, BLOCK_M)
    if group > GROUPS:
        return
    m = first.to(tl.int64) + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
    n = (program % across).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    # Rows beyond the end, and outputs beyond the last one, read that one instead: what they make is not stored.
    x_rows = x + tl.minimum(m, end - 1) * x_row
    at = tl.minimum(n, N - 1)
    own = tl.minimum(group, GROUPS - 1).to(tl.int64)
    weight_rows = weight + own * weight_group + at * weight_row
    if zeros is not None:
        zeros += own * zeros_group
    if order is not None:
        order += own * K
    # Rows behind the last bound have no weight, and get a sum of nothing.
    runs = tl.where(group < GROUPS, RUNS, 0)
    acc = tile_sums(
        x_rows, weight_rows, scales + own * scales_group, zeros, order, at, 0, runs, scales_row, zeros_row, N, K, RUN,
        RUNS_PER_GROUP, ROWS_PER_SCALE, BLOCK_M, BLOCK_N, BLOCK_K, KIND, HALF, x.dtype.element_ty,
    )  # fmt: skip
    mask = (m < end)[:, None] & (n < N)[None, :]
    tl.store(y + m[:, None] * N + n[None, :], acc.to(y.dtype.element_ty), mask=mask)


def launch_grouped_quant(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    bounds: torch.Tensor,
    zeros: torch.Tensor | None,
    order: torch.Tensor | None,
    block: tuple[int, int],
) -> torch.Tensor:
    """Rows of ``x (M, K)``, of 16 bits, between ``bounds[g]`` and ``bounds[g + 1]`` times ``weight[g]``, ``(M, N)``;
    rows behind the last bound become zero."""
    (rows, columns), (groups, outputs) = x.shape, weight.shape[:2]
    y = x.new_empty((rows, outputs))
    x = x if x.stride(1) == 1 else x.contiguous()
    group, run = runs_of(block, columns)
    chosen = config(rows, groups, run, target_of(x.device))
    tiles = min(rows, rows // chosen.block_m + groups + 1)
    launch(
        _grouped_kernel,
        (tiles * cdiv(outputs, chosen.block_n),),
        x.device,
        x=x,
        weight=weight.view(torch.uint8),
        scales=scales,
        zeros=zeros,
        order=None if order is None else order.contiguous(),
        bounds=bounds.contiguous(),
        y=y,
        rows=rows,
        x_row=x.stride(0),
        weight_group=weight.stride(0),
        weight_row=weight.stride(1),
        scales_group=scales.stride(0),
        scales_row=scales.stride(1),
        zeros_group=0 if zeros is None else zeros.stride(0),
        zeros_row=0 if zeros is None else zeros.stride(1),
        N=outputs,
        K=columns,
        GROUPS=groups,
        POWER=next_power_of_2(groups + 1),
        RUNS=cdiv(columns, run),
        RUN=run,
        RUNS_PER_GROUP=group // run,
        ROWS_PER_SCALE=block[0],
        BLOCK_M=chosen.block_m,
        BLOCK_N=chosen.block_n,
        BLOCK_K=chosen.block_k,
        KIND=kind_of(weight, columns),
        HALF=COLUMNS // 2,
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
    )
    return y
