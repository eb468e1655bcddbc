"""QuickGELU, ``x * sigmoid(1.702 * x)``, with the bias of the projection before it.

The sigmoid approximation of GELU (Hendrycks & Gimpel 2016, section 2) that CLIP and Qwen2-VL's vision tower use.
Shapes: x ``(..., F)``, bias ``(F,)``. dtypes: float32, bfloat16, float16.
"""

from __future__ import annotations

import torch

from .._backend import resolve
from .._checks import Checker
from .._library import register_composite


def quick_gelu_ref(x: torch.Tensor, bias: torch.Tensor | None = None, *, upcast: bool = False) -> torch.Tensor:
    """The formula in the working dtype (each step rounded), or in float32 and rounded once with ``upcast``."""
    h = x.float() if upcast else x
    if bias is not None:
        h = h + bias.to(h.dtype)
    if torch.is_grad_enabled() and h.requires_grad:
        return (h * torch.sigmoid(1.702 * h)).to(x.dtype)
    # Without autograd one buffer is enough: three times less memory to allocate and to fault in.
    return h.mul(1.702).sigmoid_().mul_(h).to(x.dtype)


register_composite("quick_gelu(Tensor x, Tensor? bias=None) -> Tensor", quick_gelu_ref)


def quick_gelu(x: torch.Tensor, bias: torch.Tensor | None = None, *, backend: str | None = None) -> torch.Tensor:
    """``h * sigmoid(1.702 * h)`` with ``h = x + bias``.

    Args:
        x: ``(..., F)``.
        bias: ``(F,)`` in x's dtype, or ``None``.
        backend: ``None`` (choose), ``"eager"``.

    Returns ``(..., F)`` in x's dtype. Raises ``TypeError``/``ValueError`` naming the argument that does not fit.
    """
    check = Checker("quick_gelu")
    check.tensor("x", x, (..., "F"))
    if bias is not None:
        check.tensor("bias", bias, ("F",), like=x)
    resolve("quick_gelu", x.device.type, backend)
    return quick_gelu_ref(x, bias)
