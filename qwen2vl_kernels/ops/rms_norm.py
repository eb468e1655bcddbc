"""RMSNorm, and RMSNorm of a sum that also returns the sum.

    rms_norm(x) = x / sqrt(mean(x^2) + eps) * weight                      (Zhang & Sennrich 2019, eq. 4)
    add_rms_norm(x, r): s = x + r (rounded to the input dtype); return rms_norm(s), s

Shapes: x, residual ``(..., C)``; weight ``(C,)``. dtypes: float32, bfloat16, float16; statistics are float32. The
kernels are in ``triton.norm``, which layer_norm shares.
"""

from __future__ import annotations

import torch

from ..core.backends import resolve
from ..core.checks import Checker
from ..core.formulas import rms_normed
from ..core.library import register_composite
from ..triton.norm import norm


def rms_norm_ref(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """The formula with statistics and the product with ``weight`` in (at least) float32, rounded once."""
    return rms_normed(x, weight, eps)


def add_rms_norm_ref(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor]:
    """Norm of the rounded sum: the same values as an addition followed by :func:`rms_norm_ref`."""
    total = x + residual
    return rms_norm_ref(total, weight, eps), total


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6, *, backend: str | None = None) -> torch.Tensor:
    """RMSNorm over the last dimension.

    Args:
        x: ``(..., C)``.
        weight: ``(C,)``, same dtype as ``x``.
        eps: added to the mean square.
        backend: ``None`` (choose), ``"triton"``, ``"eager"``.

    Returns ``(..., C)`` in x's dtype. Raises ``TypeError``/``ValueError`` naming the argument that does not fit.
    """
    check = Checker("rms_norm")
    check.tensor("x", x, (..., "C"))
    check.tensor("weight", weight, ("C",), like=x)
    if resolve("rms_norm", x.device.type, backend) == "eager":
        return rms_norm_ref(x, weight, eps)
    return norm(x, None, weight, None, eps, centred=False)[0]


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    *,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``x + residual``, and its RMSNorm over the last dimension.

    Args as in :func:`rms_norm`; ``residual`` has x's shape and dtype. Returns ``(normed, sum)``, both ``(..., C)``.
    """
    check = Checker("add_rms_norm")
    check.tensor("x", x, (..., "C"))
    check.tensor("residual", residual, tuple(x.shape), like=x)
    check.tensor("weight", weight, ("C",), like=x)
    if resolve("rms_norm", x.device.type, backend) == "eager":
        return add_rms_norm_ref(x, residual, weight, eps)
    return norm(x, residual, weight, None, eps, centred=False)


register_composite("rms_norm(Tensor x, Tensor weight, float eps=1e-6) -> Tensor", rms_norm)
register_composite(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps=1e-6) -> (Tensor, Tensor)", add_rms_norm
)
