"""The rotation that every rotary op shares, in eager PyTorch."""

from __future__ import annotations

import torch


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate pairs (j, j + R/2) of ``x (T, H, D)`` by ``cos, sin (T, R/2)`` in their dtype; columns from R pass."""
    half = cos.shape[-1]
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # (T, 1, R/2): one angle for all heads
    a, b = x[..., :half].to(cos.dtype), x[..., half : 2 * half].to(cos.dtype)
    turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)
    return turned if 2 * half == x.shape[-1] else torch.cat((turned, x[..., 2 * half :]), -1)
