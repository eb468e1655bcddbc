"""Patch embedding as a matrix product, and the folding of pixel normalisation into its weight.

    patch_embed(x) = x @ weight.reshape(C, K)^T + bias

A patch is a row of K = in_channels * temporal * patch * patch values in the weight's own order, so the strided 3D
convolution of the checkpoint (weight ``(C, 3, 2, 14, 14)``) is one GEMM. uint8 patches enter as ``x = p - 128``,
exact in every float dtype. With the model's ``(p / 255 - mean) / std`` per channel, folding gives the same product
from bytes:

    weight' = weight / (255 std)        bias' = sum_k weight_k (128 / 255 - mean) / std

Centring matters in bfloat16: the rounding of weight' is multiplied by |x|, and |p - 128| is at most 128.
For a still image, whose two frames are equal, the temporal halves add up: K 1176 -> 588.
Shapes: patches ``(T, K)`` uint8 or float; weight ``(C, K)`` or ``(C, in, t, p, p)``; bias ``(C,)`` or ``None``.
The kernel is in ``triton.gemm``, which patch_merge shares.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..core.backends import resolve
from ..core.checks import EAGER_FLOATS, Checker
from ..core.library import register_composite
from ..core.matmul import in_autocast_dtype, linear
from ..triton.gemm import MATRIX_DTYPES, gemm


def patch_embed_ref(patches: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The product in the weight's dtype, bytes centred at 128."""
    x = patches.to(weight.dtype)
    return linear(x - 128 if patches.dtype == torch.uint8 else x, weight.flatten(1), bias)


def patch_embed(
    patches: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """Embed packed patches.

    Args:
        patches: ``(T, K)`` of any float dtype, or uint8 (weight and bias from :func:`fold_patch_embed`), of which 128
            is subtracted.
        weight: ``(C, K)``, or the 5-D convolution weight ``(C, in, t, p, p)`` with in*t*p*p = K.
        bias: ``(C,)`` in weight's dtype, or ``None``.
        backend: ``None`` (choose), ``"triton"``, ``"eager"``.

    Under autocast floats are taken in its dtype, as PyTorch does for matrix products.

    Returns ``(T, C)`` in weight's dtype. Raises ``TypeError``/``ValueError`` naming the argument that does not fit.
    """
    patches, weight, bias = in_autocast_dtype(patches, weight, bias)
    check = Checker("patch_embed")
    check.tensor("patches", patches, ("T", "K"), dtypes=(*EAGER_FLOATS, torch.uint8))
    check.tensor("weight", weight, ("C", "in", "t", "p", "q") if getattr(weight, "ndim", 0) == 5 else ("C", "K'"))
    width = math.prod(weight.shape[1:])
    check.require(width == patches.shape[1], f"patches has {patches.shape[1]} values a row, but weight takes {width}")
    if bias is not None:
        check.tensor("bias", bias, ("C",), like=weight)
    # The library's product is faster where the matrix units do not take the dtype.
    prefer = None if weight.dtype in MATRIX_DTYPES else "eager"
    if resolve("patch_embed", patches.device.type, backend, prefer) == "eager":
        return patch_embed_ref(patches, weight, bias)
    return gemm(patches, weight.flatten(1), bias)


register_composite("patch_embed(Tensor patches, Tensor weight, Tensor? bias=None) -> Tensor", patch_embed)


def fold_patch_embed(
    weight: torch.Tensor, mean: Sequence[float], std: Sequence[float], still: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fold ``(p / 255 - mean) / std`` into a convolution weight, so that uint8 patches go straight into patch_embed.

    Args:
        weight: ``(C, in, t, p, p)``.
        mean, std: one value a channel, in units of p / 255.
        still: add the temporal slices, for patches ``(T, in*p*p)`` of images whose frames are all equal. Never for
            video.

    Returns ``(weight, bias)``: ``(C, in*t*p*p)`` (or ``(C, in*p*p)``) and ``(C,)``, in weight's dtype, computed in
    float32 and rounded once. Differentiable. In bfloat16 the result of the product differs from the unfolded one by
    the rounding of the weight instead of the rounding of the normalised pixels, which is of the same size.
    """
    check = Checker("fold_patch_embed")
    check.tensor("weight", weight, ("C", "in", "t", "p", "q"))
    channels = weight.shape[1]
    for name, values in (("mean", mean), ("std", std)):
        check.require(len(values) == channels, f"{name} must have {channels} values, got {len(values)}")
    check.require(all(s > 0 for s in std), f"std must be positive, got {tuple(std)}")
    wide = torch.promote_types(weight.dtype, torch.float32)
    # A few numbers of the host's go into the kernels as they are: tensors of them would be copied to the device.
    of_channels = [part / s for part, s in zip(weight.to(wide).unbind(1), std, strict=True)]
    shifted = [part * (128 / 255 - m) for part, m in zip(of_channels, mean, strict=True)]
    bias = torch.stack(shifted, 1).flatten(1).sum(1)
    w = torch.stack(of_channels, 1) / 255
    if still:
        w = w.sum(2)
    return w.flatten(1).to(weight.dtype), bias.to(weight.dtype)
