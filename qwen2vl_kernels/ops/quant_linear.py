"""A linear layer whose weight is quantised: ``y = x W^T + bias``, ``W = (q - zero) * scale``, x in 16 or 32 bits.

Shapes: x ``(..., K)``; weight, scales and zeros as ``core.quant_layout`` lays them out, for which AWQ's, GPTQ's and
compressed-tensors' weights are rearranged once when they are loaded; y ``(..., N)`` in x's dtype. Source: AWQ (arXiv
2306.00978), GPTQ (arXiv 2210.17323). Only the weight is quantised: x stays as it is, sums are float32.

The kernels multiply x with ``q - zero``, which 16-bit floats hold exactly, and scale the sum of a group; the reference
rounds every weight to x's dtype first. The weight gets no gradient; x does, for adapters over a quantised base.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from ..core import quant_native
from ..core.backends import resolve
from ..core.checks import EAGER_FLOATS, Checker
from ..core.library import direct, register_composite, register_opaque
from ..core.matmul import in_autocast_dtype
from ..core.namespace import torch_ops
from ..core.quant_layout import FEW_ROWS, KERNEL_FLOATS, check_weight, dequantize
from ..triton.quant_linear import launch_quant_linear


def quant_linear_ref(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    block: tuple[int, int],
    order: torch.Tensor | None = None,
    upcast: bool = False,
) -> torch.Tensor:
    """The formula: the weight's values in x's dtype, then a product; in float32 with ``upcast``."""
    x = x if order is None else x.index_select(-1, order)
    dtype = torch.promote_types(x.dtype, torch.float32) if upcast else x.dtype
    values = dequantize(weight, scales, zeros, block, dtype, x.shape[-1])
    return F.linear(x.to(dtype), values, None if bias is None else bias.to(dtype)).to(x.dtype)


def _fake(x, weight, scales, zeros, bias, block_n, block_k):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _run_triton(x, weight, scales, zeros, bias, block_n, block_k):
    rows = x.reshape(-1, x.shape[-1])
    y = launch_quant_linear(rows, weight, scales, zeros, bias, (block_n, block_k))
    return y.view(*x.shape[:-1], weight.shape[0])


def _run_native(x, weight, scales, zeros, bias, block_n, block_k):
    rows = x.reshape(-1, x.shape[-1])
    y = quant_native.product(rows, weight, scales, zeros, bias, (block_n, block_k))
    return y.view(*x.shape[:-1], weight.shape[0])


def _values(weight, scales, zeros, block_n, block_k, dtype, columns) -> torch.Tensor:
    return quant_native.values_of(weight, scales, zeros, (block_n, block_k), dtype, columns)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, scales, zeros, _, block_n, block_k = inputs
    ctx.save_for_backward(weight, scales, zeros)
    ctx.how = (block_n, block_k, x.dtype, x.shape[-1])


def _backward(ctx, dy):
    dx = None
    if ctx.needs_input_grad[0]:
        dx = dy @ torch_ops.quant_linear_values(*ctx.saved_tensors, *ctx.how)
    dbias = dy.flatten(0, -2).sum(0) if ctx.needs_input_grad[4] else None
    return dx, None, None, None, dbias, None, None


def _check_values(weight, scales, zeros, block_n, block_k, dtype, columns) -> None:
    check = Checker("quant_linear_values")
    check.require(dtype in EAGER_FLOATS, f"dtype must be a float type, got {dtype}")
    check_weight(check, columns, weight, scales, zeros, (block_n, block_k))


def _check(op: str, x, weight, scales, zeros, bias, block_n, block_k, order=None) -> None:
    check = Checker(op)
    check.tensor("x", x, (..., "K"), dtypes=EAGER_FLOATS)
    columns = x.shape[-1]
    if order is not None:
        check.tensor("order", order, ("columns",), dtypes=(torch.int32, torch.int64))
        check.require(order.numel() >= columns, f"order must have K = {columns} entries or more, got {order.numel()}")
        columns = order.numel()
    check_weight(check, columns, weight, scales, zeros, (block_n, block_k))
    if bias is not None:
        check.tensor("bias", bias, ("N",), like=x)


_SCHEMA = "(Tensor x, Tensor weight, Tensor scales, Tensor? zeros, Tensor? bias, int block_n, int block_k) -> Tensor"
register_opaque(
    "quant_linear_values(Tensor weight, Tensor scales, Tensor? zeros, int block_n, int block_k, ScalarType dtype, "
    "int columns) -> Tensor",
    fake=lambda weight, scales, zeros, block_n, block_k, dtype, columns: scales.new_empty(
        (weight.shape[0], columns), dtype=dtype
    ),
    check=_check_values,
    CPU=_values,
    CUDA=_values,
)
_shared = {"fake": _fake, "setup_context": _setup_context, "backward": _backward}
register_opaque(
    f"quant_linear_forward{_SCHEMA}",
    check=partial(_check, "quant_linear_forward"),
    **_shared,
    CPU=_run_triton,
    CUDA=_run_triton,
)
register_opaque(
    f"quant_linear_native{_SCHEMA}", check=partial(_check, "quant_linear_native"), **_shared, CPU=_run_native
)


def quant_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    block: tuple[int, int],
    order: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """``x W^T + bias`` of a quantised weight; K is x's last size, a multiple of 32.

    Args:
        x: ``(..., K)`` float32, bfloat16 or float16 (and float64 where eager serves); under autocast, of its dtype.
        weight: ``(N, K / 2)`` or ``(N, K)`` uint8 for 4 or 8 bits, or ``(N, K)`` float8_e4m3fn.
        scales: ``(N, G)``, G groups of ``block[1]`` columns; for fp8 ``(ceil(N / block[0]), G)``.
        zeros: ``(N, ceil(G * bits / 8))`` uint8; default ``2^(bits - 1)`` everywhere.
        bias: ``(N,)`` in x's dtype.
        block: rows and columns of weights that share a scale: ``(1, 128)`` for integers in groups of 128, ``(N, K)``,
            ``(1, K)`` or ``(128, 128)`` for fp8.
        order: ``(K',)`` integers, the column of x that meets each column of the weight, where groups of columns that
            were chosen by activation (``desc_act``) have been brought together. K' in the place of K above, and more
            where the weight has columns that fill its blocks up.
        backend: ``None`` (choose), ``"native"`` on CPUs, ``"triton"``, ``"eager"``.

    Returns ``(..., N)`` in x's dtype. Gradients reach x and bias only. Raises ``TypeError``/``ValueError`` naming the
    argument that does not fit.
    """
    x, bias = in_autocast_dtype(x, bias)
    _check("quant_linear", x, weight, scales, zeros, bias, *block, order)
    # Of float32 the Triton kernels take rows one by one, and of float64 none.
    many = x.dtype == torch.float32 and x.is_cuda and x.shape[:-1].numel() > FEW_ROWS
    prefer = "eager" if many or x.dtype == torch.float64 else None
    chosen = resolve("quant_linear", x.device.type, backend, prefer)
    if chosen == "eager":
        return quant_linear_ref(x, weight, scales, zeros, bias, block=block, order=order)
    if x.dtype not in KERNEL_FLOATS:
        raise TypeError(f"quant_linear: x must have one of the dtypes float32, bfloat16, float16, got {x.dtype}")
    x = x if order is None else x.index_select(-1, order)
    if chosen == "native":
        run = _run_native if direct(x, weight, scales, zeros, bias) else torch_ops.quant_linear_native
    else:
        run = _run_triton if direct(x, weight, scales, zeros, bias) else torch_ops.quant_linear_forward
    return run(x, weight, scales, zeros, bias, *block)


def _composite(x, weight, scales, zeros, bias, block, order):
    return quant_linear(x, weight, scales, zeros, bias, block=tuple(block), order=order)


register_composite(
    "quant_linear(Tensor x, Tensor weight, Tensor scales, Tensor? zeros, Tensor? bias, int[] block, Tensor? order) "
    "-> Tensor",
    _composite,
)
