"""SwiGLU's elementwise half: ``silu(gate) * up`` with ``silu(x) = x * sigmoid(x)`` (Shazeer 2020, eq. 6).

Shapes: gate, up ``(..., F)``, or one packed ``(..., 2F)`` tensor ``[gate | up]``. dtypes: float32, bfloat16, float16.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .._backend import resolve
from .._checks import Checker, no_grad_through
from .._library import register_composite


def swiglu_ref(gate: torch.Tensor, up: torch.Tensor | None = None, *, upcast: bool = False) -> torch.Tensor:
    """The formula in the working dtype (``silu`` is rounded before the product), or in float32 with ``upcast``."""
    if up is None:
        gate, up = gate.chunk(2, -1)
    if upcast:
        return (F.silu(gate.float()) * up.float()).to(gate.dtype)
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        return F.silu(gate) * up
    # Without autograd the second pass may overwrite the first one's result: less memory to allocate and to fault in.
    return F.silu(gate).mul_(up)


def _swiglu_inplace(gate: torch.Tensor, up: torch.Tensor) -> None:
    F.silu(gate, inplace=True).mul_(up)


register_composite("swiglu(Tensor gate, Tensor? up=None) -> Tensor", swiglu_ref)
register_composite("swiglu_(Tensor(a!) gate, Tensor up) -> ()", _swiglu_inplace)


def swiglu(gate: torch.Tensor, up: torch.Tensor | None = None, *, backend: str | None = None) -> torch.Tensor:
    """``silu(gate) * up``.

    Args:
        gate: ``(..., F)``, or ``(..., 2F)`` holding ``[gate | up]`` when ``up`` is ``None``.
        up: ``(..., F)``, same dtype as ``gate``.
        backend: ``None`` (choose), ``"eager"``.

    Returns ``(..., F)``. Raises ``TypeError``/``ValueError`` naming the argument that does not fit.
    """
    check = Checker("swiglu")
    check.tensor("gate", gate, (..., "F"))
    if up is None:
        check.require(gate.shape[-1] % 2 == 0, f"packed gate must have an even last size, got {gate.shape[-1]}")
    else:
        check.tensor("up", up, tuple(gate.shape), like=gate)
    resolve("swiglu", gate.device.type, backend)
    return swiglu_ref(gate, up)


def swiglu_(gate: torch.Tensor, up: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
    """:func:`swiglu` of split tensors in place: ``gate`` is overwritten and returned. Refused when it requires grad."""
    check = Checker("swiglu_")
    check.tensor("gate", gate, (..., "F"))
    check.tensor("up", up, tuple(gate.shape), like=gate)
    no_grad_through("swiglu_", "swiglu", gate=gate, up=up)
    resolve("swiglu", gate.device.type, backend)
    _swiglu_inplace(gate, up)
    return gate
