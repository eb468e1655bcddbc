"""Modules that hold parameters under their checkpoint names: PyTorch's, uninitialised, and norms that call the ops."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules import module as modules

from qwen2vl_kernels import add_layer_norm, add_rms_norm, layer_norm, rms_norm, swiglu, swiglu_
from qwen2vl_kernels.core.matmul import linear

from .config import TextConfig


def _compute_alone() -> None:
    """In a forked process, which has its parent's pool of OpenMP's threads without the threads: the first operation
    that shares its work would wait for them without end."""
    if torch.get_num_threads() > 1:
        torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_compute_alone)


def idle_rows(x: torch.Tensor) -> int:
    """Rows to append to packed ``x (T, C)`` for the sake of the matrix products; nothing attends to them.

    16-bit products on a CPU (oneDNN) run at two thirds of their rate when T is no multiple of 8: on 2 Zen 5 cores
    1333 x 1536 times 1536 x 8960 takes 54 ms, with 1336 rows 41 ms. Float32 and small T show no difference.
    """
    if x.device.type != "cpu" or x.dtype not in (torch.bfloat16, torch.float16) or x.shape[0] < 256:
        return 0
    return -x.shape[0] % 8


def length_bound(lengths: Sequence[int]) -> int:
    """An upper bound of the lengths, a power of two: layers compiled for it serve packs of many lengths, and what
    kernels choose by it changes at powers of two only."""
    return 1 << (max(lengths) - 1).bit_length()


def inverse_frequencies(config: TextConfig, device: torch.device) -> torch.Tensor:
    """``theta^(-2j/D)`` for the D/2 pairs, float32 whatever the model's dtype (a buffer would be cast)."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    return 1.0 / config.rope_theta**exponent


#: Classes of tensors that have no form of their own of any operation; a fake one is a tracer's.
_PLAIN = (nn.Parameter, torch.Tensor, FakeTensor)


def untouched(module: nn.Module, parts: Collection[type]) -> bool:
    """Whether a module and all that it holds are of these classes, with no hook on any and no other forward, hold plain
    tensors, and nobody looks on: what they compute may then be computed without calling them."""
    if modules._global_forward_hooks or modules._global_forward_pre_hooks or torch._C._len_torch_function_stack():
        return False
    return all(
        type(one) in parts
        and not (one._forward_hooks or one._forward_pre_hooks or "forward" in one.__dict__)
        and one._compiled_call_impl is None
        and all(x is None or type(x) in _PLAIN for x in one._parameters.values())
        for one in module.modules()
    )


class Linear(nn.Linear):
    """PyTorch's, with values left to a checkpoint or :meth:`qwen2vl.Qwen2VL.from_config`.

    Models are built on the meta device, where the first random initialisation alone imports PyTorch's decompositions,
    four fifths of the time that loading a 2B checkpoint took.
    """

    def reset_parameters(self) -> None:
        pass

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return linear(input, self.weight, self.bias)


class Embedding(nn.Embedding):
    """PyTorch's, with values left to a checkpoint, as :class:`Linear`."""

    def reset_parameters(self) -> None:
        pass


class MLP(nn.Module):
    """SwiGLU of the language model: ``down(silu(gate(x)) * up(x))``."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = Linear(width, inner, bias=False)
        self.up_proj = Linear(width, inner, bias=False)
        self.down_proj = Linear(inner, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(swiglu(gate, up) if gate.requires_grad or up.requires_grad else swiglu_(gate, up))


class RMSNorm(nn.Module):
    """``norm(x)``, or with a pending residual ``norm(x, residual)`` giving the norm of the sum and the sum."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        if residual is None:
            return rms_norm(x, self.weight, self.eps), x
        return add_rms_norm(x, residual, self.weight, self.eps)


class LayerNorm(nn.Module):
    """As :class:`RMSNorm`, with mean and bias."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        if residual is None:
            return layer_norm(x, self.weight, self.bias, self.eps), x
        return add_layer_norm(x, residual, self.weight, self.bias, self.eps)
