"""Registration of the ops with PyTorch, in the namespace that ``namespace.py`` names.

An op whose only implementation is made of PyTorch operations is registered as *composite*: autograd, fake tensors and
``torch.compile`` follow from its parts, so a compiler may fuse them. An op backed by compiled code is *opaque*: it
comes with one kernel per dispatch key, a fake that gives shapes without running, and, where it has one, a backward.
An op with both kinds is a composite that asks which backend serves and then runs the formula or calls an opaque op.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .namespace import NAMESPACE

_LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def register_composite(schema: str, function: Callable) -> None:
    """Register ``schema`` (``"name(Tensor x, ...) -> Tensor"``) with the public ``function`` as its decomposition."""
    _LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
    _LIBRARY.impl(_name(schema), function, "CompositeImplicitAutograd")


def writes_only(function: Callable) -> Callable:
    """``function`` without its result: an op that declares what it writes to returns nothing."""

    @wraps(function)
    def run(*arguments: Any, **named: Any) -> None:
        function(*arguments, **named)

    return run


def register_opaque(
    schema: str,
    *,
    fake: Callable,
    check: Callable,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
    **kernels: Callable,
) -> None:
    """Register ``schema`` with a fake and one kernel per dispatch key, e.g. ``CPU=run_native, CUDA=run_cuda``.

    ``check(*arguments)`` raises where a kernel would leave the memory of its arguments. It is asked when the op is
    called by its name in ``torch.ops``, where nobody else has checked.
    ``setup_context(ctx, inputs, output)`` and ``backward(ctx, *grads)`` are ``torch.library.register_autograd``'s.
    """
    name = f"{NAMESPACE}::{_name(schema)}"
    _LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
    for key, kernel in kernels.items():
        _LIBRARY.impl(_name(schema), _checked(check, kernel), key)
    torch.library.register_fake(name, fake, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(name, backward, setup_context=setup_context, lib=_LIBRARY)


def _checked(check: Callable, kernel: Callable) -> Callable:
    @wraps(kernel)
    def run(*arguments: Any, **named: Any) -> Any:
        check(*arguments, **named)
        return kernel(*arguments, **named)

    return run


class _FirstOrder(torch.autograd.Function):
    """Gradients as they are, which have no derivatives of their own: PyTorch would take these for zero."""

    @staticmethod
    def forward(ctx, op, operands, *tensors):
        ctx.op = op
        return tuple(None if x is None else x.view_as(x) for x in tensors[operands:])

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(f"{ctx.op}: its gradients have no derivatives of their own")


def first_order(op: str, backward: Callable, *arguments: Any) -> tuple[torch.Tensor | None, ...]:
    """``backward(*arguments)``, an opaque op without a backward, for ``op``. What asks for derivatives of these
    gradients (``create_graph=True``) gets a ``NotImplementedError`` then."""
    with torch.no_grad():
        grads = backward(*arguments)
    if torch.is_grad_enabled():
        operands = [a for a in arguments if isinstance(a, torch.Tensor)]
        grads = _FirstOrder.apply(op, len(operands), *operands, *grads)
    return tuple(grads)  # pyright: ignore[reportArgumentType]


def direct(*tensors: torch.Tensor | None) -> bool:
    """Whether an opaque op's kernel may be called without PyTorch's dispatcher, which costs some 10 us a call.

    It may unless a compiler traces, autograd follows one of ``tensors``, or one is of a class with its own dispatch.

    Raises ``NotImplementedError`` inside a transform of ``torch.func``, and where one of ``tensors`` has a tangent: the
    kernels have neither forward-mode derivatives nor rules for batches, and would drop both without a word.
    """
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return False
    if peek_interpreter_stack() is not None:
        raise NotImplementedError(f"these kernels know no transform of torch.func (vmap, grad, jvp); {_INSTEAD}")
    if forward_ad._current_level >= 0 and any(map(_has_tangent, tensors)):
        raise NotImplementedError(f"these kernels have no forward-mode derivatives; {_INSTEAD}")
    tracked = torch.is_grad_enabled()
    return all(
        t is None or (type(t) in (torch.Tensor, torch.nn.Parameter) and not (tracked and t.requires_grad))
        for t in tensors
    )


def watched() -> bool:
    """Whether a dispatch mode wants to see the ops of a call: a tracer's, or a selective checkpoint's."""
    return is_in_torch_dispatch_mode()


_INSTEAD = "backend='eager', the formula in PyTorch's operations, has them"


def _has_tangent(tensor: torch.Tensor | None) -> bool:
    return tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None


def mark_written(*tensors: torch.Tensor | None) -> None:
    """Tell autograd that a kernel which ran without the dispatcher has written to these tensors.

    The dispatcher does so for ops that declare what they mutate. Otherwise a backward would take what a tensor holds
    now for what it held when it was saved, and give wrong gradients without a word.
    """
    torch.autograd.graph.increment_version([tensor for tensor in tensors if tensor is not None])


def _name(schema: str) -> str:
    return schema.partition("(")[0]
