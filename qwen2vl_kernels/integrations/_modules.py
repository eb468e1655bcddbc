"""What the adapters of transformers ask about modules and tensors before they bypass a module's own code."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as of_all

from ..core.matmul import linear
from ._subclass import stock_class

#: Whether TorchScript's tracer is at work, by which ONNX's older exporter goes.
tracing: Callable[[], bool] = torch.jit.is_tracing  # pyright: ignore[reportPrivateImportUsage]

_ORDINARY = (nn.Parameter, torch.Tensor)
#: A module of a patched one that its code bypasses: name, module, and the classes whose parameters may be read instead.
Part = tuple[str, Any, tuple[type, ...]]


def in_place_of(stock: Callable, parts: Callable[[Any], list[Part]] | None = None) -> Callable[[Callable], Callable]:
    """A decorator: the function with stock's name and signature, and stock itself where the function does not serve.

    That is where a part is not what it is taken for (hooked, offloaded, wrapped), and while a model is exported, as it
    must then run where this package is not. The flag is read, as PyTorch 2.10 says is_exporting() when it compiles.
    """

    def decorate(function: Callable) -> Callable:
        @wraps(stock)
        def standing_in(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler._is_exporting_flag or tracing():
                return stock(*args, **kwargs)
            if parts is not None and not all(plain(part, *kinds) for _, part, kinds in parts(args[0])):
                return stock(*args, **kwargs)
            return function(*args, **kwargs)

        standing_in.parts = parts  # type: ignore[attr-defined]
        return standing_in

    return decorate


def in_the_way(module: nn.Module) -> list[str]:
    """Names of the parts of a patched module for which stock's code runs."""
    parts = getattr(type(module).forward, "parts", None)
    return [name for name, part, kinds in parts(module) if not plain(part, *kinds)] if parts else []


def checkpointed(function: Callable) -> Callable:
    """``function`` as a class has it whose base is transformers' layer with checkpointing, which from 5.x on wraps it
    when the class is made."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    body = {"forward": function}
    made: Any = types.new_class("Layer", (GradientCheckpointingLayer,), exec_body=lambda space: space.update(body))
    return made.forward


def of_transformers(stock: Callable, *names: str) -> tuple[type, ...]:
    """The classes of these names where ``stock`` was written, but for those that somebody has put there."""
    found = (inspect.unwrap(stock).__globals__.get(name) for name in names)
    return tuple(cls for cls in found if isinstance(cls, type) and cls.__module__.startswith("transformers."))


def plain(module: Any, *kinds: type) -> bool:
    """Whether nothing is lost by reading the parameters of ``module`` instead of calling it: it is of one of these
    classes itself, no subclass or wrapper (LoRA, quantised weights), and nothing but its class's code would run."""
    cls = type(module)
    return (cls in kinds or stock_class(cls) in kinds) and unhooked(module)


def unhooked(module: nn.Module) -> bool:
    """Whether nothing but its class's ``forward`` runs: no hook, its or all modules', no own one (accelerate's)."""
    own = module.__dict__
    if "forward" in own and getattr(own["forward"], "__func__", None) is not type(module).forward:
        return False
    # A call asks for each of these, and a step of decoding asks here a few hundred times.
    if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
        return False
    backward = of_all._global_backward_hooks or of_all._global_backward_pre_hooks
    return not (backward or of_all._global_forward_hooks or of_all._global_forward_pre_hooks)


def step_on_cpu(x: torch.Tensor) -> bool:
    """Whether ``x (B, 1, ...)`` is a step of decoding on a CPU, where the checks of ops cost more than they save."""
    return x.ndim > 2 and x.shape[1] == 1 and x.device.type == "cpu"


def same_dtype(x: torch.Tensor, *weights: torch.Tensor | None) -> bool:
    """Whether ordinary tensors of x's dtype are all there is; sharded or mixed ones are left to stock's code."""
    dtype = x.dtype
    for weight in weights:  # noqa: SIM110, a generator costs more than it asks
        if weight is None or weight.dtype != dtype or type(weight) not in _ORDINARY:
            return False
    return True


def takes(x: torch.Tensor, *weights: torch.Tensor | None) -> bool:
    """:func:`same_dtype`, and no autocast, which would choose dtypes inside of an op (and knows no meta device)."""
    return same_dtype(x, *weights) and not x.is_meta and not torch.is_autocast_enabled(x.device.type)


def owned(x: torch.Tensor, maker: nn.Module, *kinds: type) -> bool:
    """Whether ``x``, what ``maker`` returned, may be overwritten: no gradient needs it, and nobody else has seen it.

    Modules of ``kinds`` and linear layers, quantised ones too, return new memory; of others nobody knows.
    """
    if x.requires_grad or maker._modules or not unhooked(maker):
        return False
    return isinstance(maker, nn.Linear) or stock_class(type(maker)) in kinds


def project(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """``layer(x)``; an ordinary linear layer's product as this CPU does it best."""
    if x.device.type == "cpu" and plain(layer, nn.Linear) and takes(x, layer.weight):
        return linear(x, layer.weight, layer.bias)
    return layer(x)


def with_idle_rows(x: torch.Tensor, *layers: nn.Module) -> torch.Tensor:
    """``x (..., C)`` as it is, or for 16-bit inference on a CPU as rows ``(T, C)`` with zeros appended up to a multiple
    of 8, where all ``layers`` that it goes through are ordinary ones: others see stock's shapes.

    oneDNN's products run at two thirds of their rate otherwise (2 Zen 5 cores); float32 and small T gain nothing.
    """
    tokens = x.shape[:-1].numel()
    if x.device.type != "cpu" or x.dtype.itemsize != 2 or tokens < 256 or tokens % 8 == 0:
        return x
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not all(plain(one, nn.Linear) for one in layers):
        return x
    return F.pad(x.flatten(0, -2), (0, 0, 0, -tokens % 8))


def without_idle_rows(rows: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """What became of :func:`with_idle_rows`'s result, ``(..., C')`` in the leading shape of ``x``."""
    shape = x.shape[:-1]
    return rows if rows.shape[:-1] == shape else rows[: shape.numel()].unflatten(0, shape)


def parameters_after(function: Callable, count: int) -> tuple[str, ...]:
    """Names of the parameters of ``function`` from the ``count``-th on, without ``**kwargs``."""
    found = list(inspect.signature(function).parameters.values())[count:]
    return tuple(p.name for p in found if p.kind is not inspect.Parameter.VAR_KEYWORD)
