"""QuickGELU, ``x * sigmoid(1.702 * x)``, with the bias of the projection before it.

The sigmoid approximation of GELU (Hendrycks & Gimpel 2016, section 2) that CLIP and Qwen2-VL's vision tower use.
Shapes: x ``(..., F)``, bias ``(F,)``. dtypes: float32, bfloat16, float16.
The kernels are in ``triton.elementwise``, which swiglu shares.
"""

from __future__ import annotations

from functools import partial

import torch

from ..core.backends import resolve
from ..core.checks import Checker, no_grad_through, no_overlap
from ..core.launching import like
from ..core.library import direct, first_order, mark_written, register_composite, register_opaque, writes_only
from ..core.namespace import torch_ops
from ..triton.elementwise import as_rows, launch_backward, launch_forward


def quick_gelu_ref(x: torch.Tensor, bias: torch.Tensor | None = None, *, upcast: bool = False) -> torch.Tensor:
    """The formula in the working dtype (each step rounded), or in float32 and rounded once with ``upcast``."""
    h = x.float() if upcast else x
    if bias is not None:
        h = h + bias.to(h.dtype)
    if torch.is_grad_enabled() and h.requires_grad:
        return (h * torch.sigmoid(1.702 * h)).to(x.dtype)
    # Without autograd one buffer is enough: three times less memory to allocate and to fault in.
    return h.mul(1.702).sigmoid_().mul_(h).to(x.dtype)


def _in_place_ref(x: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    # In pieces whose temporaries stay in a core's cache: 4x faster than whole on 5184 x 5120 bf16 (2 Zen 5 cores).
    rows = max(1, _PIECE_BYTES // max(1, x[:1].numel() * x.element_size()))
    pieces = x.split(rows) if x.device.type == "cpu" and not torch.compiler.is_compiling() else (x,)
    for piece in pieces:
        h = piece if bias is None else piece.add_(bias)
        h.mul_(torch.sigmoid(1.702 * h))


#: Bytes of the input that the in-place form works on at a time on a CPU.
_PIECE_BYTES = 1 << 19


#: The factor of the sigmoid's argument, see ``triton.elementwise``.
SCALE = 1.702


def _forward(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    (y,) = like(x)
    launch_forward(as_rows(x), bias, None, as_rows(y), SCALE)
    return y


def _forward_in_place(x: torch.Tensor, bias: torch.Tensor | None) -> None:
    rows = as_rows(x)
    launch_forward(rows, bias, None, rows, SCALE)
    if rows.data_ptr() != x.data_ptr():  # the leading dimensions have more than one stride: rows is a copy
        x.copy_(rows.view(x.shape))


def _run_backward(dy: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """``(dx, dbias)``, dbias empty without a bias."""
    (dx,) = like(x)
    dbias = launch_backward(as_rows(dy), as_rows(x), bias, None, as_rows(dx), None, SCALE)
    return dx, x.new_empty(0) if dbias is None else dbias


def _fake_backward(dy, x, bias):
    return *like(x), x.new_empty(0 if bias is None else bias.shape[0])


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, dy):
    x, bias = ctx.saved_tensors
    dx, dbias = first_order("quick_gelu", torch_ops.quick_gelu_backward, dy, x, bias)
    return dx, None if bias is None else dbias


def _check(op: str, x, bias, dy=None) -> None:
    check = Checker(op)
    check.tensor("x", x, (..., "F"))
    if bias is not None:
        check.tensor("bias", bias, ("F",), like=x)
    if dy is not None:
        check.tensor("dy", dy, tuple(x.shape))


register_opaque(
    "quick_gelu_forward(Tensor x, Tensor? bias) -> Tensor",
    fake=lambda x, bias: like(x)[0],
    check=partial(_check, "quick_gelu_forward"),
    setup_context=_setup_context,
    backward=_backward,
    CPU=_forward,
    CUDA=_forward,
)
register_opaque(
    "quick_gelu_forward_(Tensor(a!) x, Tensor? bias) -> ()",
    fake=lambda x, bias: None,
    check=partial(_check, "quick_gelu_forward_"),
    CPU=_forward_in_place,
    CUDA=_forward_in_place,
)
register_opaque(
    "quick_gelu_backward(Tensor dy, Tensor x, Tensor? bias) -> (Tensor, Tensor)",
    fake=_fake_backward,
    check=lambda dy, x, bias: _check("quick_gelu_backward", x, bias, dy),
    CPU=_run_backward,
    CUDA=_run_backward,
)


def quick_gelu(x: torch.Tensor, bias: torch.Tensor | None = None, *, backend: str | None = None) -> torch.Tensor:
    """``h * sigmoid(1.702 * h)`` with ``h = x + bias``.

    Args:
        x: ``(..., F)``.
        bias: ``(F,)`` in x's dtype, or ``None``.
        backend: ``None`` (choose), ``"triton"``, ``"eager"``.

    Returns ``(..., F)`` in x's dtype. Raises ``TypeError``/``ValueError`` naming the argument that does not fit.
    """
    _check("quick_gelu", x, bias)
    if resolve("quick_gelu", x.device.type, backend) == "eager":
        return quick_gelu_ref(x, bias)
    return (_forward if direct(x, bias) else torch_ops.quick_gelu_forward)(x, bias)


def quick_gelu_(x: torch.Tensor, bias: torch.Tensor | None = None, *, backend: str | None = None) -> torch.Tensor:
    """:func:`quick_gelu` in place: x is overwritten and returned. Refused when it requires grad, or shares memory
    with bias or, like an expanded tensor, with itself."""
    _check("quick_gelu_", x, bias)
    no_grad_through("quick_gelu_", "quick_gelu", x=x, **({} if bias is None else {"bias": bias}))
    no_overlap("quick_gelu_", {"x": x}, {"bias": bias})
    if resolve("quick_gelu", x.device.type, backend) == "eager":
        _in_place_ref(x, bias)
    elif direct(x, bias):
        _forward_in_place(x, bias)
        mark_written(x)
    else:
        torch_ops.quick_gelu_forward_(x, bias)
    return x


register_composite("quick_gelu(Tensor x, Tensor? bias=None) -> Tensor", quick_gelu)
register_composite("quick_gelu_(Tensor(a!) x, Tensor? bias=None) -> ()", writes_only(quick_gelu_))
