"""Layers without state: ``kernelize`` puts their ``forward`` into modules that have the attributes declared."""

import torch
from torch import nn

from .ops.layer_norm import layer_norm
from .ops.quick_gelu import quick_gelu
from .ops.rms_norm import rms_norm
from .ops.swiglu import swiglu


class RMSNorm(nn.Module):
    """``hidden_states (..., C)``, as transformers' RMSNorms of Llama's kind."""

    can_torch_compile = True
    weight: torch.Tensor
    variance_epsilon: float

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)


class LayerNorm(nn.Module):
    """``input (..., C)``, as a ``torch.nn.LayerNorm`` over the last dimension with weight and bias."""

    can_torch_compile = True
    weight: torch.Tensor
    bias: torch.Tensor
    eps: float

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return layer_norm(input, self.weight, self.bias, self.eps)


class QuickGELU(nn.Module):
    """``input (..., F)``."""

    can_torch_compile = True

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return quick_gelu(input)


class SwiGLUMLP(nn.Module):
    """``x (..., C)``, as transformers' gated MLPs with SiLU."""

    can_torch_compile = True
    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))
