"""The Triton matrix product of patch_embed and patch_merge: ``y = act(x @ weight^T + bias)`` with its epilogue.

``x (M, K)`` may be uint8, which enters as ``x - 128``, exact in 16-bit floats; the product then reads an eighth of the
bytes that normalised float32 rows would be. FLOPs 2 M N K; bytes M K + N K + M N once each, of which the tiles' reuse
within the L2 cache takes care: programs go down ``_GROUP`` rows of tiles before they go across.

The backward is three products that PyTorch's library does, and the derivative of GELU from the kept sum before it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..core.checks import EAGER_FLOATS, Checker
from ..core.launching import Target, accumulator, cdiv, jit, launch, target_of, tl
from ..core.library import direct, register_opaque
from ..core.namespace import torch_ops

#: What tensor cores multiply; other dtypes run without them.
MATRIX_DTYPES = (torch.bfloat16, torch.float16)

_GROUP = 8


@dataclass(frozen=True)
class GemmConfig:
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def config(dtype: torch.dtype, target: Target) -> GemmConfig:
    """One tile for every shape, so that a row's result does not depend on how many there are. Not yet tuned."""
    if dtype not in MATRIX_DTYPES:
        return GemmConfig(32, 32, 32, target.warps(128), 1)
    stages = 3 if target.backend == "cuda" else 2  # AMD's shared memory holds two
    return GemmConfig(128, 128, 64, target.warps(256), stages)


@jit(do_not_specialize=["rows"])
def _gemm_kernel(
    x,
    weight,
    bias,
    y,
    kept,
    rows,
    x_row,
    weight_row,
    X_UNIT: tl.constexpr,
    WEIGHT_UNIT: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    BYTES: tl.constexpr,
    GELU: tl.constexpr,
    ACC: tl.constexpr,
):
    across = tl.cdiv(N, BLOCK_N)
    down = tl.cdiv(rows, BLOCK_M)
    program = tl.program_id(0)
    first = program // (GROUP * across) * GROUP
    height = tl.minimum(down - first, GROUP)
    inside = program % (GROUP * across)
    m = (first + inside % height).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
    n = (inside // height).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    k = tl.arange(0, BLOCK_K)
    # Strides come in units, as Triton knows of no divisor but 16 of a number it is given: 588 bytes are 147 words.
    x_row *= X_UNIT
    weight_row *= WEIGHT_UNIT
    # Rows and columns beyond the end read the last one instead: what they make is not stored.
    x_at = x + tl.minimum(m, rows - 1)[:, None] * x_row + k[None, :]
    weight_at = weight + tl.minimum(n, N - 1)[:, None] * weight_row + k[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for start in range(0, K, BLOCK_K):
        if K % BLOCK_K == 0:
            a, b = tl.load(x_at + start), tl.load(weight_at + start)
        else:
            valid = k[None, :] < K - start
            a, b = tl.load(x_at + start, mask=valid, other=0), tl.load(weight_at + start, mask=valid, other=0)
        if BYTES:  # beyond K these are -128, times zero
            a = a.to(tl.int16) - 128
        a = a.to(weight.dtype.element_ty)
        acc = tl.dot(a, tl.trans(b), acc, input_precision="ieee", out_dtype=ACC)
    if bias is not None:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(ACC)[None, :]
    mask = (m < rows)[:, None] & (n < N)[None, :]
    at = m[:, None] * N + n[None, :]
    if kept is not None:
        tl.store(kept + at, acc.to(y.dtype.element_ty), mask=mask)
    if GELU:
        acc = 0.5 * acc * (1 + tl.erf(acc * 0.7071067811865476))
    tl.store(y + at, acc.to(y.dtype.element_ty), mask=mask)


def _fake(x, weight, bias, gelu, keep):
    y = weight.new_empty((x.shape[0], weight.shape[0]))
    return y, torch.empty_like(y) if keep else weight.new_empty(0)


def launch_gemm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, gelu: bool, keep: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(y, sum before GELU)`` in weight's dtype, the second one empty unless ``keep``."""
    y, kept = _fake(x, weight, bias, gelu, keep)
    if y.numel() == 0:
        return y, kept
    x = x if x.stride(1) == 1 else x.contiguous()
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    chosen = config(weight.dtype, target_of(x.device))
    (rows, depth), columns = x.shape, weight.shape[0]
    x_unit, weight_unit = (math.gcd(t.stride(0), 16) for t in (x, weight))
    launch(
        _gemm_kernel,
        (cdiv(rows, chosen.block_m) * cdiv(columns, chosen.block_n),),
        x.device,
        x=x,
        weight=weight,
        bias=None if bias is None else bias.contiguous(),
        y=y,
        kept=kept if keep else None,
        rows=rows,
        x_row=x.stride(0) // x_unit,
        weight_row=weight.stride(0) // weight_unit,
        X_UNIT=x_unit,
        WEIGHT_UNIT=weight_unit,
        N=columns,
        K=depth,
        BLOCK_M=chosen.block_m,
        BLOCK_N=chosen.block_n,
        BLOCK_K=chosen.block_k,
        GROUP=_GROUP,
        BYTES=x.dtype == torch.uint8,
        GELU=gelu,
        ACC=accumulator(weight.dtype),
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
    )
    return y, kept


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias, ctx.gelu, keep = inputs
    ctx.biased = bias is not None
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, output[1] if keep else None)


def _backward(ctx, dy, _):
    x, weight, kept = ctx.saved_tensors
    if dy is None:
        return None, None, None, None, None
    if ctx.gelu:
        dy = torch.ops.aten.gelu_backward(dy, kept)
    wants_x, wants_weight = ctx.needs_input_grad[:2]
    dx = (dy @ weight).to(x.dtype) if wants_x else None
    dweight = None
    if wants_weight:
        values = x.to(weight.dtype)
        dweight = dy.T @ (values - 128 if x.dtype == torch.uint8 else values)
    return dx, dweight, dy.sum(0) if ctx.biased else None, None, None


def _check(x, weight, bias, gelu, keep) -> None:
    check = Checker("gemm_forward")
    check.tensor("x", x, ("M", "K"), dtypes=(torch.uint8, *EAGER_FLOATS))
    check.tensor("weight", weight, ("N", "K"))
    if bias is not None:
        check.tensor("bias", bias, ("N",))


register_opaque(
    "gemm_forward(Tensor x, Tensor weight, Tensor? bias, bool gelu, bool keep) -> (Tensor, Tensor)",
    fake=_fake,
    check=_check,
    setup_context=_setup_context,
    backward=_backward,
    CPU=launch_gemm,
    CUDA=launch_gemm,
)


def gemm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, gelu: bool = False
) -> torch.Tensor:
    """``x (M, K) @ weight (N, K)^T + bias`` and, where asked, the erf form of GELU; ``(M, N)`` in weight's dtype."""
    if direct(x, weight, bias):
        return launch_gemm(x, weight, bias, gelu)[0]
    tracked = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    return torch_ops.gemm_forward(x, weight, bias, gelu, gelu and tracked)[0]
