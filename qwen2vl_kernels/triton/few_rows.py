"""The Triton kernel of matrix products with few rows, as decoding has them: norm before, SwiGLU or a residual after.

    y = n W^T (+ b)                       n = x r g,  r = 1 / sqrt(mean(x^2) + eps), or n = x without a norm
    y = silu(n G^T) * (n U^T)             with two weights of one shape
    y = residual + n W^T

Bytes: the weights, once; all the rest is thousandths of them. So the kernel is a stream of 16-byte loads with what must
be done on the way beneath them: a program takes BLOCK_N rows of W, and its warps share the columns. It holds three
tiles of (WARPS, BLOCK_N, BLOCK_K) in registers, 48 KB of weights, and loads the next as soon as one has been
multiplied. All three are asked for before the program waits for the kernel ahead of it (programmatic dependent launch):
weights are what no kernel of a step writes. **Whoever asks for that sees to it**: between the write of a weight and the
first of a chain of such launches one kernel must have been launched that waits in the ordinary way, as a step's
embedding does.

Tensor cores multiply, W as the side of 16 rows and x as that of 8, so that one to eight rows cost the same and a row's
bits do not depend on how many there are. The norm is that of its formula but for one rounding less: ``x g`` is rounded
to 16 bits, and ``r``, which is known when the whole row has been read, multiplies the float32 sums. Float16 could
overflow there, so that bfloat16 alone is served. Sums have one order: over BLOCK_K by the tensor core, along the
columns, then over the warps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..core.launching import Target, cdiv, gdc_launch_dependents, gdc_wait, jit, launch, target_of, tl

#: What one launch takes at most: the columns of a tensor core's smaller side.
MAX_ROWS = 8


@dataclass(frozen=True)
class FewRowsConfig:
    block_n: int  # rows of the weight that a program takes
    block_k: int  # columns that a warp takes at a time
    num_warps: int


def config(gated: bool, target: Target) -> FewRowsConfig:
    """Tiles of 16 KB; of two weights, each has half of them. Not yet timed on any GPU.

    Four warps leave room for a program of the next launch beside one of this: each takes 40 % of the registers.
    """
    return FewRowsConfig(block_n=16, block_k=64 if gated else 128, num_warps=target.warps(128))


@jit
def _tile(weight, n, k, at, N: tl.constexpr, K: tl.constexpr, TILE: tl.constexpr):
    """``(WARPS, BLOCK_N, BLOCK_K)``: columns ``at + k`` of the rows ``n``, zero beyond the last column.

    Rows beyond the last are the last once more: what they make is not stored.
    """
    where = weight + tl.minimum(n, N - 1).to(tl.int64) * K + (at + k)
    mask = at + k < K
    if K % TILE == 0:
        mask = at < K  # one condition for the whole tile
    return tl.load(where, mask=mask, other=0.0)


@jit
def _row_tile(x, row, k, at, rows, K: tl.constexpr):
    """``(WARPS, 8, BLOCK_K)``: the same columns of x, zero in rows that there are not."""
    return tl.load(x + row * K + (at + k), mask=(row < rows) & (at + k < K), other=0.0)


@jit(do_not_specialize=["rows"])
def _product_kernel(
    x,
    norm,
    weight,
    second,
    third,
    bias,
    second_bias,
    third_bias,
    residual,
    y,
    rows,
    eps,
    N: tl.constexpr,
    N_SECOND: tl.constexpr,
    N_THIRD: tl.constexpr,
    K: tl.constexpr,
    GATED: tl.constexpr,
    WARPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Up to three weights one below the other, whose products stand side by side in y; or a gate and what it gates, of
    which N_SECOND says nothing."""
    TILE: tl.constexpr = WARPS * BLOCK_K
    program = tl.program_id(0)
    first, last, shift = 0, N, 0
    if N_SECOND > 0:
        BELOW: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
        if program >= BELOW:
            weight, bias = second, second_bias
            first, last, shift = BELOW, N_SECOND, N
        if N_THIRD > 0:
            LOWEST: tl.constexpr = BELOW + (N_SECOND + BLOCK_N - 1) // BLOCK_N
            if program >= LOWEST:
                weight, bias = third, third_bias
                first, last, shift = LOWEST, N_THIRD, N + N_SECOND
    start = (program - first) * BLOCK_N
    n = start + tl.arange(0, BLOCK_N)[None, :, None]
    k = tl.arange(0, WARPS)[:, None, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, None, :]
    row = tl.arange(0, 8)[None, :, None]
    w = _tile(weight, n, k, 0, last, K, TILE)
    w_next = _tile(weight, n, k, TILE, last, K, TILE)
    w_last = _tile(weight, n, k, 2 * TILE, last, K, TILE)
    if GATED:
        u = _tile(second, n, k, 0, last, K, TILE)
        u_next = _tile(second, n, k, TILE, last, K, TILE)
        u_last = _tile(second, n, k, 2 * TILE, last, K, TILE)
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()
    acc = tl.zeros((WARPS, BLOCK_N, 8), tl.float32)
    up = tl.zeros((WARPS, BLOCK_N, 8), tl.float32)
    squares = tl.zeros((WARPS, 8), tl.float32)
    values = _row_tile(x, row, k, 0, rows, K)
    for at in range(0, K, TILE):
        values_next = _row_tile(x, row, k, at + TILE, rows, K)
        if norm is not None:
            wide = values.to(tl.float32)
            squares += tl.sum(wide * wide, 2)
            values = (wide * tl.load(norm + at + k, mask=at + k < K, other=0.0).to(tl.float32)).to(y.dtype.element_ty)
        turned = tl.permute(values, (0, 2, 1))
        acc = tl.dot(w, turned, acc)
        w, w_next = w_next, w_last
        w_last = _tile(weight, n, k, at + 3 * TILE, last, K, TILE)
        if GATED:
            up = tl.dot(u, turned, up)
            u, u_next = u_next, u_last
            u_last = _tile(second, n, k, at + 3 * TILE, last, K, TILE)
        values = values_next
    out = tl.sum(acc, 0)  # (BLOCK_N, 8)
    n = start + tl.arange(0, BLOCK_N)
    row = tl.arange(0, 8)
    if norm is not None:
        r = 1 / tl.sqrt(tl.sum(squares, 0) / K + eps)
        out *= r[None, :]
    if bias is not None:
        out += tl.load(bias + n, mask=n < last, other=0.0).to(tl.float32)[:, None]
    # What is added or gated is rounded before, as the product of a linear layer is.
    out = out.to(y.dtype.element_ty)
    if GATED:
        other = tl.sum(up, 0)
        if norm is not None:
            other *= r[None, :]  # pyright: ignore[reportPossiblyUnboundVariable]
        gate = out.to(tl.float32)
        out = gate / (1 + tl.exp(-gate)) * other.to(y.dtype.element_ty).to(tl.float32)
    mask = (row < rows)[None, :] & (n < last)[:, None]
    at = row[None, :] * (N + N_SECOND + N_THIRD) + (shift + n)[:, None]
    if residual is not None:
        out = out.to(tl.float32) + tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + at, out.to(y.dtype.element_ty), mask=mask)


def _launch(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    y: torch.Tensor,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    biases: Sequence[torch.Tensor | None] = (),
    residual: torch.Tensor | None = None,
    gated: bool = False,
    prefetch: bool = False,
) -> None:
    (rows, columns), target = x.shape, target_of(x.device)
    chosen = config(gated, target)
    weight, second, third = (*weights, None, None)[:3]
    bias, second_bias, third_bias = (*biases, None, None, None)[:3]
    n, n_second, n_third = (0 if one is None else one.shape[0] for one in (weight, second, third))
    counted = (n,) if gated else (n, n_second, n_third)
    launch(
        _product_kernel,
        (sum(cdiv(count, chosen.block_n) for count in counted) if rows else 0,),
        x.device,
        x=x.contiguous(),
        norm=norm,
        weight=weight,
        second=second,
        third=third,
        bias=bias,
        second_bias=second_bias,
        third_bias=third_bias,
        residual=residual,
        y=y,
        rows=rows,
        eps=eps,
        N=n,
        N_SECOND=0 if gated else n_second,
        N_THIRD=n_third,
        K=columns,
        GATED=gated,
        WARPS=chosen.num_warps,
        BLOCK_N=chosen.block_n,
        BLOCK_K=chosen.block_k,
        DEPENDENT=prefetch and target.dependent,
        num_warps=chosen.num_warps,
        max_registers=255,
    )


def launch_norm_linear(
    x: torch.Tensor,
    norm: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    eps: float,
    prefetch: bool,
) -> torch.Tensor:
    """``(R, N)``, N that of all weights; shapes as :func:`qwen2vl_kernels.rms_norm_linear` has them."""
    y = x.new_empty((x.shape[0], sum(one.shape[0] for one in weights)))
    _launch(x, weights, y, norm, eps, biases, prefetch=prefetch)
    return y


def launch_norm_swiglu(
    x: torch.Tensor, norm: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, eps: float, prefetch: bool
) -> torch.Tensor:
    """``(R, N)``; shapes as :func:`qwen2vl_kernels.rms_norm_swiglu` has them."""
    y = x.new_empty((x.shape[0], gate.shape[0]))
    _launch(x, (gate, up), y, norm, eps, gated=True, prefetch=prefetch)
    return y


def launch_linear_add(residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, prefetch: bool) -> None:
    """Into ``residual (R, N)``; shapes as :func:`qwen2vl_kernels.linear_add_` has them."""
    _launch(x, (weight,), residual, residual=residual, prefetch=prefetch)
