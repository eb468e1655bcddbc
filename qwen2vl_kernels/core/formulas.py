"""Formulas, in PyTorch's operations, that the references of several ops share."""

from __future__ import annotations

import torch


def rms_normed(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm over the last dimension with statistics and the product with ``weight`` in (at least) float32, rounded
    once."""
    wide = torch.promote_types(x.dtype, torch.float32)
    h = x.to(wide)
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    return (h * weight.to(wide)).to(x.dtype)


def attend_to_cache(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, seen: torch.Tensor, softmax_scale: float
) -> torch.Tensor:
    """``(B, Hq, Dv)``: one query ``q (B, Hq, D)`` a row over the slots ``seen (B, capacity)`` of its row of the caches,
    the softmax in (at least) float32; zeros in a row that has seen nothing."""
    queries = (q * softmax_scale).unflatten(1, (k_cache.shape[2], -1))  # (B, Hk, Hq / Hk, D)
    scores = (queries @ k_cache.permute(0, 2, 3, 1)).to(torch.promote_types(q.dtype, torch.float32))
    future = ~seen[:, None, None]
    weights = scores.masked_fill(future, float("-inf")).softmax(-1).masked_fill(future, 0)
    # What lies behind a row's end may be no number, and a weight of zero would not hide that.
    values = v_cache.masked_fill(~seen[:, :, None, None], 0)
    return (weights.to(values.dtype) @ values.transpose(1, 2)).flatten(1, 2)
