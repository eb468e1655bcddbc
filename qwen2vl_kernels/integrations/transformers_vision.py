"""Methods that take the place of those of transformers' vision towers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL.

Each ``make`` takes stock's function and returns one with its parameters, which still calls stock's where an op does not
apply: under autocast, on sharded parameters, around hooked, offloaded or adapted submodules.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..ops.layer_norm import add_layer_norm, layer_norm
from ..ops.patch_embed import patch_embed
from ..ops.patch_merge import patch_merge
from ..ops.quick_gelu import quick_gelu, quick_gelu_
from ..ops.rms_norm import add_rms_norm, rms_norm
from ._modules import (
    Part,
    checkpointed,
    in_place_of,
    of_transformers,
    owned,
    parameters_after,
    project,
    takes,
    with_idle_rows,
    without_idle_rows,
)  # fmt: skip
from .transformers_text import RMS_NORMS


def block(stock: Callable) -> Callable:
    """``forward`` of a block: the second norm adds the attention's output to the residual as it reads it."""
    names, kinds = parameters_after(stock, 2), (nn.LayerNorm, *of_transformers(stock, *RMS_NORMS))

    def parts(self: Any) -> list[Part]:
        return [("norm1", self.norm1, kinds), ("norm2", self.norm2, kinds)]

    @in_place_of(stock, parts)
    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        norms = (self.norm1, self.norm2)
        weights = [w for n in norms for w in ((n.weight, n.bias) if isinstance(n, nn.LayerNorm) else (n.weight,))]
        if not takes(hidden_states, *weights):
            return stock(self, hidden_states, *args, **kwargs)
        given = dict(zip(names, args, strict=False)) | kwargs
        x, total = _norm(self.norm1, hidden_states), hidden_states
        x, total = _add_norm(self.norm2, self.attn(x, **given).to(total.dtype), total)
        x = self.mlp(x)
        return total + x if x.requires_grad or total.requires_grad else total.add_(x)

    return checkpointed(forward)


def _norm(norm: Any, x: torch.Tensor) -> torch.Tensor:
    if isinstance(norm, nn.LayerNorm):
        return layer_norm(x, norm.weight, norm.bias, norm.eps)
    return rms_norm(x, norm.weight, norm.variance_epsilon)


def _add_norm(norm: Any, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if isinstance(norm, nn.LayerNorm):
        return add_layer_norm(x, residual, norm.weight, norm.bias, norm.eps)
    return add_rms_norm(x, residual, norm.weight, norm.variance_epsilon)


def embed(stock: Callable) -> Callable:
    """``forward`` of the patch embedding: one matrix product with the convolution's 5-D weight as it is."""

    def parts(self: Any) -> list[Part]:
        return [("proj", self.proj, (nn.Conv3d,))]

    @in_place_of(stock, parts)
    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        weight, bias = self.proj.weight, self.proj.bias
        if not takes(weight, weight, *() if bias is None else (bias,)):
            return stock(self, hidden_states)
        return patch_embed(hidden_states.view(-1, weight[0].numel()), weight, bias)

    return forward


def merger(stock: Callable) -> Callable:
    """``forward`` of a merger with LayerNorm: Qwen2-VL's, and both of Qwen3-VL's (norm before or after gathering)."""

    kinds = ((nn.Linear,), (nn.GELU,), (nn.Linear,))

    def parts(self: Any) -> list[Part]:
        if not hasattr(self, "ln_q"):
            layers = {name: getattr(self, name) for name in ("linear_fc1", "act_fn", "linear_fc2")}
            inner = [(*layer, kind) for layer, kind in zip(layers.items(), kinds, strict=True)]
            return [("norm", self.norm, (nn.LayerNorm,)), *inner]
        layers = {f"mlp.{name}": layer for name, layer in self.mlp.named_children()}
        if len(layers) != len(kinds):  # wrapped, or with layers of the user's
            return [("mlp", self.mlp, ())]
        inner = [(*layer, kind) for layer, kind in zip(layers.items(), kinds, strict=True)]
        return [("ln_q", self.ln_q, (nn.LayerNorm,)), ("mlp", self.mlp, (nn.Sequential,)), *inner]

    @in_place_of(stock, parts)
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        norm, fc1, act, fc2 = (part for _, part, _ in parts(self) if not isinstance(part, nn.Sequential))
        weights = (norm.weight, norm.bias, fc1.weight, fc1.bias, fc2.weight, fc2.bias)
        if act.approximate != "none" or not takes(x, *weights):
            return stock(self, x)
        width = norm.weight.shape[0]  # of one patch, or of a block whose patches are side by side already
        side = round((fc1.weight.shape[1] // width) ** 0.5)
        return patch_merge(x.reshape(-1, width), *weights, merge_size=side, eps=norm.eps)

    return forward


def mlp(stock: Callable) -> Callable:
    """``forward`` of Qwen2-VL's MLP where its activation is QuickGELU."""
    from transformers.activations import QuickGELUActivation

    def parts(self: Any) -> list[Part]:
        return [("act", self.act, (QuickGELUActivation,))]

    @in_place_of(stock, parts)
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        h = project(self.fc1, with_idle_rows(x, self.fc1, self.fc2))
        h = quick_gelu_(h) if owned(h, self.fc1) else quick_gelu(h)
        return without_idle_rows(project(self.fc2, h), x)

    return forward
