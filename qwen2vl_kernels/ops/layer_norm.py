"""LayerNorm, and LayerNorm of a sum that also returns the sum.

    layer_norm(x) = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias     (Ba et al. 2016, eq. 4; biased variance)
    add_layer_norm(x, r): s = x + r (rounded to the input dtype); return layer_norm(s), s

Shapes: x, residual ``(..., C)``; weight, bias ``(C,)``. dtypes: float32, bfloat16, float16; statistics are float32. The
kernels are in ``triton.norm``, which rms_norm shares.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..core.backends import resolve
from ..core.checks import Checker
from ..core.library import register_composite
from ..triton.norm import norm


def layer_norm_ref(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """PyTorch's own LayerNorm, which keeps the statistics of 16-bit inputs in float32 and rounds once."""
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def add_layer_norm_ref(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor]:
    """Norm of the rounded sum: the same values as an addition followed by :func:`layer_norm_ref`."""
    total = x + residual
    return layer_norm_ref(total, weight, bias, eps), total


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float = 1e-6,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """LayerNorm over the last dimension.

    Args:
        x: ``(..., C)``.
        weight, bias: ``(C,)``, same dtype as ``x``.
        eps: added to the variance.
        backend: ``None`` (choose), ``"triton"``, ``"eager"``.

    Returns ``(..., C)`` in x's dtype. Raises ``TypeError``/``ValueError`` naming the argument that does not fit.
    """
    check = Checker("layer_norm")
    check.tensor("x", x, (..., "C"))
    check.tensor("weight", weight, ("C",), like=x)
    check.tensor("bias", bias, ("C",), like=x)
    if resolve("layer_norm", x.device.type, backend) == "eager":
        return layer_norm_ref(x, weight, bias, eps)
    return norm(x, None, weight, bias, eps, centred=True)[0]


def add_layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float = 1e-6,
    *,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``x + residual``, and its LayerNorm over the last dimension.

    Args as in :func:`layer_norm`; ``residual`` has x's shape and dtype. Returns ``(normed, sum)``, both ``(..., C)``.
    """
    check = Checker("add_layer_norm")
    check.tensor("x", x, (..., "C"))
    check.tensor("residual", residual, tuple(x.shape), like=x)
    check.tensor("weight", weight, ("C",), like=x)
    check.tensor("bias", bias, ("C",), like=x)
    if resolve("layer_norm", x.device.type, backend) == "eager":
        return add_layer_norm_ref(x, residual, weight, bias, eps)
    return norm(x, residual, weight, bias, eps, centred=True)


register_composite("layer_norm(Tensor x, Tensor weight, Tensor bias, float eps=1e-6) -> Tensor", layer_norm)
register_composite(
    "add_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps=1e-6) -> (Tensor, Tensor)",
    add_layer_norm,
)
