"""Methods that take the place of those of transformers' vision towers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL.

Each ``make`` takes stock's function and returns one with its parameters, which still calls stock's where an op does not
apply: under autocast, on sharded parameters, around hooked, offloaded or adapted submodules.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import nn

from ..ops.layer_norm import add_layer_norm, layer_norm
from ..ops.patch_embed import patch_embed
from ..ops.patch_merge import patch_merge
from ..ops.quick_gelu import quick_gelu, quick_gelu_
from ..ops.rms_norm import add_rms_norm, rms_norm
from ._modules import owned, parameters_after, plain, project, same_dtype, takes, with_idle_rows


def block(stock: Callable) -> Callable:
    """``forward`` of a block: the second norm adds the attention's output to the residual as it reads it."""
    names = parameters_after(stock, 2)

    @wraps(stock)
    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        norms = (self.norm1, self.norm2)
        weights = [w for n in norms for w in ((n.weight, n.bias) if type(n) is nn.LayerNorm else (n.weight,))]
        if not all(map(plain, norms)) or not takes(hidden_states, *weights):
            return stock(self, hidden_states, *args, **kwargs)
        given = dict(zip(names, args, strict=False)) | kwargs
        x, total = _norm(self.norm1, hidden_states), hidden_states
        x, total = _add_norm(self.norm2, self.attn(x, **given).to(total.dtype), total)
        x = self.mlp(x)
        return total + x if x.requires_grad or total.requires_grad else total.add_(x)

    return forward


def _norm(norm: Any, x: torch.Tensor) -> torch.Tensor:
    if type(norm) is nn.LayerNorm:
        return layer_norm(x, norm.weight, norm.bias, norm.eps)
    return rms_norm(x, norm.weight, norm.variance_epsilon)


def _add_norm(norm: Any, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if type(norm) is nn.LayerNorm:
        return add_layer_norm(x, residual, norm.weight, norm.bias, norm.eps)
    return add_rms_norm(x, residual, norm.weight, norm.variance_epsilon)


def embed(stock: Callable) -> Callable:
    """``forward`` of the patch embedding: one matrix product with the convolution's 5-D weight as it is."""

    @wraps(stock)
    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        weight, bias = self.proj.weight, self.proj.bias
        mixed = torch.is_autocast_enabled(weight.device.type)
        if mixed or not plain(self.proj, nn.Conv3d) or not same_dtype(weight, weight, *() if bias is None else (bias,)):
            return stock(self, hidden_states)
        return patch_embed(hidden_states.view(-1, weight[0].numel()), weight, bias)

    return forward


def merger(stock: Callable) -> Callable:
    """``forward`` of a merger with LayerNorm: Qwen2-VL's, and both of Qwen3-VL's (norm before or after gathering)."""

    @wraps(stock)
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        norm, fc1, fc2 = (self.ln_q, self.mlp[0], self.mlp[2]) if hasattr(self, "ln_q") else (
            self.norm, self.linear_fc1, self.linear_fc2,
        )  # fmt: skip
        if not (plain(norm, nn.LayerNorm) and plain(fc1, nn.Linear) and plain(fc2, nn.Linear)):
            return stock(self, x)
        weights = (norm.weight, norm.bias, fc1.weight, fc1.bias, fc2.weight, fc2.bias)
        if not takes(x, *weights):
            return stock(self, x)
        width = norm.weight.shape[0]  # of one patch, or of a block whose patches are side by side already
        side = round((fc1.weight.shape[1] // width) ** 0.5)
        return patch_merge(x.reshape(-1, width), *weights, merge_size=side, eps=norm.eps)

    return forward


def mlp(stock: Callable) -> Callable:
    """``forward`` of Qwen2-VL's MLP where its activation is QuickGELU."""

    @wraps(stock)
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        if type(self.act).__name__ != "QuickGELUActivation" or not plain(self.act):
            return stock(self, x)
        h = project(self.fc1, with_idle_rows(x))
        h = quick_gelu_(h) if owned(h, self.fc1) else quick_gelu(h)
        return project(self.fc2, h)[: x.shape[0]]

    return forward
