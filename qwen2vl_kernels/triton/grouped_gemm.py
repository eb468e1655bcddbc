"""Triton kernels of grouped_linear, matrix products of rows that are sorted by their group, and of that sort.

The forward and the gradient of the rows are one kernel: a flat list of tiles, each of rows of one group, so that no
group is padded to more than its last tile. Programs find their group in the bounds, which nobody reads on the host: the
grid has room for a broken tile in every group, and what is too many ends at once. FLOPs 2 M N K, whatever the groups;
bytes M K + M N and the weights of the groups that have rows, E N K at most.

The weights' gradient has a program for each tile of each group's matrix, which sums over the group's rows in order.

The sort is a counting sort in two launches with a cumulative sum between: how many entries of each group a block has,
then where each of them goes, behind its group's earlier ones. Both are quadratic in a block or linear in the groups.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..core.launching import Target, accumulator, cdiv, jit, launch, next_power_of_2, target_of, tl
from .gemm import MATRIX_DTYPES


@dataclass(frozen=True)
class GroupedConfig:
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def config(dtype: torch.dtype, target: Target) -> GroupedConfig:
    """One tile for every shape, so that a row's result does not depend on how many there are. Rows of 64, as a group
    has few of them: 60 experts, of which a token meets 4, get 68 of 1024 tokens. Not yet tuned."""
    if dtype not in MATRIX_DTYPES:
        # With 32 columns ptxas makes a program of the weights' gradient that reads a predicate before it is written.
        return GroupedConfig(32, 64, 32, target.warps(128), 1)
    stages = 3 if target.backend == "cuda" else 2  # AMD's shared memory holds two
    return GroupedConfig(64, 128, 64, target.warps(128), stages)


@jit
def group_of(bounds, tile, rows, GROUPS: tl.constexpr, POWER: tl.constexpr, BLOCK_M: tl.constexpr):
    """``(group, first row, end)`` of a tile. Group GROUPS are the rows behind the last bound; one more: there is no
    such tile. Bounds that leave the rows are cut to them."""
    group = tl.arange(0, POWER)
    begin = tl.load(bounds + group, mask=group <= GROUPS, other=0)
    end = tl.load(bounds + group + 1, mask=group < GROUPS, other=0)
    begin = tl.minimum(tl.maximum(begin, 0), rows)
    end = tl.where(group == GROUPS, rows, tl.minimum(end, rows))
    tiles = tl.where(group <= GROUPS, tl.cdiv(tl.maximum(end - begin, 0), BLOCK_M), 0)
    upto = tl.cumsum(tiles, 0)
    found = tl.sum(((upto <= tile) & (group <= GROUPS)).to(tl.int32), 0)
    own = group == found
    first = tl.sum(tl.where(own, begin + (tile - upto + tiles) * BLOCK_M, 0), 0)
    return found, first, tl.sum(tl.where(own, end, 0), 0)


@jit(do_not_specialize=["rows"])
def _rows_kernel(
    x,
    weight,
    bounds,
    y,
    rows,
    x_row,
    weight_group,
    weight_row,
    X_UNIT: tl.constexpr,
    WEIGHT_UNIT: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    POWER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
):
    across = tl.cdiv(N, BLOCK_N)
    program = tl.program_id(0)
    group, first, end = group_of(bounds, program // across, rows, GROUPS, POWER, BLOCK_M)
    if group > GROUPS:
        return
    m = first.to(tl.int64) + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
    n = (program % across) * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    k = tl.arange(0, BLOCK_K)
    # Strides come in units, as Triton knows of no divisor but 16 of a number it is given.
    x_row = tl.cast(x_row, tl.int64) * X_UNIT
    weight_row = tl.cast(weight_row, tl.int64) * WEIGHT_UNIT
    # Rows beyond the end, and columns that are rows in memory, read the last one instead: what they make is not stored.
    x_at = x + tl.minimum(m, end - 1)[:, None] * x_row + k[None, :]
    weight_at = weight + tl.minimum(group, GROUPS - 1).to(tl.int64) * weight_group
    if TRANSPOSED:  # (K, N) in memory
        weight_at += k[:, None] * weight_row + n[None, :]
        step = BLOCK_K * weight_row
    else:  # (N, K) in memory
        weight_at += tl.minimum(n, N - 1).to(tl.int64)[None, :] * weight_row + k[:, None]
        step = BLOCK_K
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for start in range(0, K, BLOCK_K):
        if K % BLOCK_K == 0 and (N % BLOCK_N == 0 or not TRANSPOSED):
            a, b = tl.load(x_at), tl.load(weight_at)
        else:
            valid = k < K - start
            a = tl.load(x_at, mask=valid[None, :], other=0)
            b = tl.load(weight_at, mask=valid[:, None] & (n < N)[None, :], other=0)
        acc = tl.dot(a, b, acc, input_precision="ieee", out_dtype=ACC)
        x_at += BLOCK_K
        weight_at += step
    acc = tl.where(group < GROUPS, acc, 0.0)
    mask = (m < end)[:, None] & (n < N)[None, :]
    tl.store(y + m[:, None] * N + n[None, :], acc.to(y.dtype.element_ty), mask=mask)


def launch_rows(x: torch.Tensor, weight: torch.Tensor, bounds: torch.Tensor, transposed: bool = False) -> torch.Tensor:
    """Rows of ``x (M, K)`` between ``bounds[g]`` and ``bounds[g + 1]`` times ``weight[g] (N, K)``, with ``transposed``
    times ``weight[g] (K, N)``; rows behind the last bound become zero."""
    (rows, depth), groups = x.shape, weight.shape[0]
    columns = weight.shape[2 if transposed else 1]
    y = torch.empty((rows, columns), dtype=x.dtype, device=x.device)
    x = x if x.stride(1) == 1 else x.contiguous()
    weight = weight if weight.stride(2) == 1 else weight.contiguous()
    chosen = config(x.dtype, target_of(x.device))
    x_unit, weight_unit = math.gcd(x.stride(0), 16), math.gcd(weight.stride(1), 16)
    tiles = min(rows, rows // chosen.block_m + groups + 1)
    launch(
        _rows_kernel,
        (tiles * cdiv(columns, chosen.block_n),),
        x.device,
        x=x,
        weight=weight,
        bounds=bounds.contiguous(),
        y=y,
        rows=rows,
        x_row=x.stride(0) // x_unit,
        weight_group=weight.stride(0),
        weight_row=weight.stride(1) // weight_unit,
        X_UNIT=x_unit,
        WEIGHT_UNIT=weight_unit,
        TRANSPOSED=transposed,
        N=columns,
        K=depth,
        GROUPS=groups,
        POWER=next_power_of_2(groups + 1),
        BLOCK_M=chosen.block_m,
        BLOCK_N=chosen.block_n,
        BLOCK_K=chosen.block_k,
        ACC=accumulator(x.dtype),
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
    )
    return y


@jit(do_not_specialize=["rows"])
def _weight_kernel(
    dy,
    x,
    bounds,
    dweight,
    rows,
    dy_row,
    x_row,
    DY_UNIT: tl.constexpr,
    X_UNIT: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
):
    down, across = tl.cdiv(N, BLOCK_N), tl.cdiv(K, BLOCK_K)
    program = tl.program_id(0)
    group, tile = program // (down * across), program % (down * across)
    n = (tile // across) * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    k = (tile % across) * BLOCK_K + tl.arange(0, BLOCK_K)  # (BLOCK_K,)
    begin = tl.minimum(tl.maximum(tl.load(bounds + group), 0), rows)
    end = tl.minimum(tl.load(bounds + group + 1), rows)
    dy_row = tl.cast(dy_row, tl.int64) * DY_UNIT
    x_row = tl.cast(x_row, tl.int64) * X_UNIT
    inside_n, inside_k = n < N, k < K
    acc = tl.zeros((BLOCK_N, BLOCK_K), ACC)
    for first in range(begin, end, BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)
        valid, at = m < end, m.to(tl.int64)
        a = tl.load(dy + at[None, :] * dy_row + n[:, None], mask=valid[None, :] & inside_n[:, None], other=0)
        b = tl.load(x + at[:, None] * x_row + k[None, :], mask=valid[:, None] & inside_k[None, :], other=0)
        acc = tl.dot(a, b, acc, input_precision="ieee", out_dtype=ACC)
    at = dweight + group.to(tl.int64) * N * K + n.to(tl.int64)[:, None] * K + k[None, :]
    tl.store(at, acc.to(dweight.dtype.element_ty), mask=inside_n[:, None] & inside_k[None, :])


def launch_weight(dy: torch.Tensor, x: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    """``(G, N, K)``: for each group ``dy (M, N)^T @ x (M, K)`` over its rows, zero where it has none."""
    (rows, columns), depth, groups = dy.shape, x.shape[1], bounds.shape[0] - 1
    dweight = torch.empty((groups, columns, depth), dtype=x.dtype, device=x.device)
    dy, x = (t if t.stride(1) == 1 else t.contiguous() for t in (dy, x))
    chosen = config(x.dtype, target_of(x.device))
    dy_unit, x_unit = (math.gcd(t.stride(0), 16) for t in (dy, x))
    launch(
        _weight_kernel,
        (groups * cdiv(columns, chosen.block_n) * cdiv(depth, chosen.block_n),),
        x.device,
        dy=dy,
        x=x,
        bounds=bounds.contiguous(),
        dweight=dweight,
        rows=rows,
        dy_row=dy.stride(0) // dy_unit,
        x_row=x.stride(0) // x_unit,
        DY_UNIT=dy_unit,
        X_UNIT=x_unit,
        N=columns,
        K=depth,
        BLOCK_M=chosen.block_m,
        BLOCK_N=chosen.block_n,
        BLOCK_K=chosen.block_n,
        ACC=accumulator(x.dtype),
        num_warps=2 * chosen.num_warps,
        num_stages=chosen.num_stages,
    )
    return dweight


@jit
def _group(experts, index, entries, GROUPS: tl.constexpr):
    """The group of each entry; GROUPS: of none, and behind the last entry one more, which is nobody's."""
    found = tl.load(experts + index, mask=index < entries, other=0).to(tl.int64)
    found = tl.where((found < 0) | (found >= GROUPS), GROUPS, found).to(tl.int32)
    return tl.where(index < entries, found, GROUPS + 1)


@jit(do_not_specialize=["entries", "blocks"])
def _count_kernel(experts, counts, entries, blocks, GROUPS: tl.constexpr, POWER: tl.constexpr, BLOCK: tl.constexpr):
    block = tl.program_id(0)
    found = _group(experts, block * BLOCK + tl.arange(0, BLOCK), entries, GROUPS)
    group = tl.arange(0, POWER)
    count = tl.sum((found[:, None] == group[None, :]).to(tl.int32), 0)
    # Block after block of a group, so that one sum over all of them says where each begins.
    tl.store(counts + group * blocks + block, count, mask=group <= GROUPS)


@jit(do_not_specialize=["entries", "blocks"])
def _place_kernel(
    experts,
    upto,
    counts,
    order,
    places,
    bounds,
    entries,
    blocks,
    GROUPS: tl.constexpr,
    POWER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    slot = tl.arange(0, BLOCK)
    index = block * BLOCK + slot
    found = _group(experts, index, entries, GROUPS)
    valid = index < entries
    cell = found * blocks + block
    begin = tl.load(upto + cell, mask=valid, other=0) - tl.load(counts + cell, mask=valid, other=0)
    earlier = (found[None, :] == found[:, None]) & (slot[None, :] < slot[:, None])
    place = begin.to(tl.int64) + tl.sum(earlier.to(tl.int32), 1)
    tl.store(order + place, index.to(tl.int64), mask=valid)
    tl.store(places + index, place, mask=valid)
    if block == 0:
        group = tl.arange(0, POWER)
        head, inside = group * blocks, group <= GROUPS
        first = tl.load(upto + head, mask=inside, other=0) - tl.load(counts + head, mask=inside, other=0)
        tl.store(bounds + group, first, mask=inside)


def launch_sort(experts: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(order, places, bounds)`` as :func:`qwen2vl_kernels.ops.grouped_linear.group_by_expert` returns them."""
    flat = experts.reshape(-1).contiguous()
    entries, power = flat.shape[0], next_power_of_2(groups + 1)
    block = max(16, min(128, 8192 // power))
    blocks = max(1, cdiv(entries, block))
    counts = torch.empty((groups + 1) * blocks, dtype=torch.int32, device=flat.device)
    order, places = (torch.empty(entries, dtype=torch.int64, device=flat.device) for _ in range(2))
    bounds = torch.empty(groups + 1, dtype=torch.int32, device=flat.device)
    given = {"experts": flat, "counts": counts, "entries": entries, "blocks": blocks}
    given |= {"GROUPS": groups, "POWER": power, "BLOCK": block, "num_warps": 4}
    launch(_count_kernel, (blocks,), flat.device, **given)
    upto = counts.cumsum(0, dtype=torch.int32)
    launch(_place_kernel, (blocks,), flat.device, upto=upto, order=order, places=places, bounds=bounds, **given)
    return order, places, bounds
