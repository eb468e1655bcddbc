"""What the adapters of transformers ask about modules and tensors before they bypass a module's own code."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from ..core.matmul import linear
from ._target import MARK


def plain(module: nn.Module, *kinds: type) -> bool:
    """Whether nothing is lost by reading the parameters instead of calling the module.

    Hooks, an own ``forward`` (accelerate's offloading) or a class in its place (LoRA, quantised weights) would be.
    """
    own = module.__dict__.get("forward")
    ours = own is None or getattr(own, MARK, False)
    hooked = module._forward_hooks or module._forward_pre_hooks
    return ours and not hooked and (not kinds or type(module) in kinds)


def same_dtype(x: torch.Tensor, *weights: torch.Tensor | None) -> bool:
    """Whether ordinary tensors of x's dtype are all there is; sharded or mixed ones are left to stock's code."""
    return all(w is not None and w.dtype == x.dtype and type(w) in (nn.Parameter, torch.Tensor) for w in weights)


def takes(x: torch.Tensor, *weights: torch.Tensor | None) -> bool:
    """:func:`same_dtype`, and no autocast, which would choose dtypes inside of an op."""
    return same_dtype(x, *weights) and not torch.is_autocast_enabled(x.device.type)


def owned(x: torch.Tensor, *makers: nn.Module) -> bool:
    """Whether ``x``, what ``makers`` returned, may be overwritten: no gradient needs it, and no hook has seen it."""
    return not x.requires_grad and not any(maker._forward_hooks for maker in makers)


def project(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """``layer(x)``; an ordinary linear layer's product as this CPU does it best."""
    if x.device.type == "cpu" and type(layer) is nn.Linear and plain(layer) and takes(x, layer.weight):
        return linear(x, layer.weight, layer.bias)
    return layer(x)


def with_idle_rows(x: torch.Tensor) -> torch.Tensor:
    """``(..., C)`` as rows ``(T, C)``, on a CPU with zeros appended up to a multiple of 8 for 16-bit inference.

    oneDNN's products run at two thirds of their rate otherwise (2 Zen 5 cores); float32 and small T gain nothing.
    """
    rows = x.flatten(0, -2)
    if x.device.type != "cpu" or x.dtype.itemsize != 2 or rows.shape[0] < 256:
        return rows
    if rows.shape[0] % 8 == 0 or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return rows
    return F.pad(rows, (0, 0, 0, -rows.shape[0] % 8))


def parameters_after(function: Callable, count: int) -> tuple[str, ...]:
    """Names of the parameters of ``function`` from the ``count``-th on, without ``**kwargs``."""
    found = list(inspect.signature(function).parameters.values())[count:]
    return tuple(p.name for p in found if p.kind is not inspect.Parameter.VAR_KEYWORD)
