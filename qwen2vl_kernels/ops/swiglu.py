"""SwiGLU's elementwise half: ``silu(gate) * up`` with ``silu(x) = x * sigmoid(x)`` (Shazeer 2020, eq. 6).

Shapes: gate, up ``(..., F)``, or one packed ``(..., 2F)`` tensor ``[gate | up]``. dtypes: float32, bfloat16, float16.
The kernels are in ``triton.elementwise``, which quick_gelu shares.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from ..core.backends import resolve
from ..core.checks import Checker, no_grad_through, no_overlap
from ..core.library import direct, first_order, mark_written, register_composite, register_opaque, writes_only
from ..core.namespace import torch_ops
from ..triton.elementwise import as_rows, launch_backward, launch_forward


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


def _in_place_ref(gate: torch.Tensor, up: torch.Tensor) -> None:
    F.silu(gate, inplace=True).mul_(up)


def _halves(gate: torch.Tensor, up: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of both, views of a packed one."""
    if up is not None:
        return as_rows(gate), as_rows(up)
    first, second = as_rows(gate).chunk(2, -1)
    return first, second


def _fake_forward(gate, up):
    columns = gate.shape[-1] if up is not None else gate.shape[-1] // 2
    return torch.empty((*gate.shape[:-1], columns), dtype=gate.dtype, device=gate.device)


def _forward(gate: torch.Tensor, up: torch.Tensor | None) -> torch.Tensor:
    y = _fake_forward(gate, up)
    gate_rows, up_rows = _halves(gate, up)
    launch_forward(gate_rows, None, up_rows, as_rows(y), 1.0)
    return y


def _forward_in_place(gate: torch.Tensor, up: torch.Tensor) -> None:
    rows = as_rows(gate)
    launch_forward(rows, None, as_rows(up), rows, 1.0)
    if rows.data_ptr() != gate.data_ptr():  # the leading dimensions have more than one stride: rows is a copy
        gate.copy_(rows.view(gate.shape))


def _run_backward(dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """``(dgate, dup)``, or the gradient of the packed tensor and nothing."""
    dgate, dup = _fake_backward(dy, gate, up)
    gate_rows, up_rows = _halves(gate, up)
    dgate_rows, dup_rows = _halves(dgate, None if up is None else dup)
    launch_backward(as_rows(dy), gate_rows, None, up_rows, dgate_rows, dup_rows, 1.0)
    return dgate, dup


def _fake_backward(dy, gate, up):
    dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    return dgate, torch.empty((0,) if up is None else up.shape, dtype=gate.dtype, device=gate.device)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, dy):
    gate, up = ctx.saved_tensors
    dgate, dup = first_order("swiglu", torch_ops.swiglu_backward, dy, gate, up)
    return dgate, None if up is None else dup


def _check(op: str, gate, up, dy=None) -> None:
    check = Checker(op)
    check.tensor("gate", gate, (..., "F"))
    shape = tuple(gate.shape)
    if up is None:
        check.require(shape[-1] % 2 == 0, f"packed gate must have an even last size, got {shape[-1]}")
        shape = (*shape[:-1], shape[-1] // 2)
    else:
        check.tensor("up", up, shape, like=gate)
    if dy is not None:
        check.tensor("dy", dy, shape)


register_opaque(
    "swiglu_forward(Tensor gate, Tensor? up) -> Tensor",
    fake=_fake_forward,
    check=partial(_check, "swiglu_forward"),
    setup_context=_setup_context,
    backward=_backward,
    CPU=_forward,
    CUDA=_forward,
)
register_opaque(
    "swiglu_forward_(Tensor(a!) gate, Tensor up) -> ()",
    fake=lambda gate, up: None,
    check=partial(_check, "swiglu_forward_"),
    CPU=_forward_in_place,
    CUDA=_forward_in_place,
)
register_opaque(
    "swiglu_backward(Tensor dy, Tensor gate, Tensor? up) -> (Tensor, Tensor)",
    fake=_fake_backward,
    check=lambda dy, gate, up: _check("swiglu_backward", gate, up, dy),
    CPU=_run_backward,
    CUDA=_run_backward,
)


def swiglu(gate: torch.Tensor, up: torch.Tensor | None = None, *, backend: str | None = None) -> torch.Tensor:
    """``silu(gate) * up``.

    Args:
        gate: ``(..., F)``, or ``(..., 2F)`` holding ``[gate | up]`` when ``up`` is ``None``.
        up: ``(..., F)``, same dtype as ``gate``.
        backend: ``None`` (choose), ``"triton"``, ``"eager"``.

    Returns ``(..., F)``. Raises ``TypeError``/``ValueError`` naming the argument that does not fit.
    """
    _check("swiglu", gate, up)
    if resolve("swiglu", gate.device.type, backend) == "eager":
        return swiglu_ref(gate, up)
    return (_forward if direct(gate, up) else torch_ops.swiglu_forward)(gate, up)


def swiglu_(gate: torch.Tensor, up: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
    """:func:`swiglu` of split tensors in place: ``gate`` is overwritten and returned. Refused when it requires grad,
    or shares memory with ``up`` or, like an expanded tensor, with itself."""
    _check("swiglu_", gate, up)
    no_grad_through("swiglu_", "swiglu", gate=gate, up=up)
    no_overlap("swiglu_", {"gate": gate}, {"up": up})
    if resolve("swiglu", gate.device.type, backend) == "eager":
        _in_place_ref(gate, up)
    elif direct(gate, up):
        _forward_in_place(gate, up)
        mark_written(gate)
    else:
        torch_ops.swiglu_forward_(gate, up)
    return gate


register_composite("swiglu(Tensor gate, Tensor? up=None) -> Tensor", swiglu)
register_composite("swiglu_(Tensor(a!) gate, Tensor up) -> ()", writes_only(swiglu_))
