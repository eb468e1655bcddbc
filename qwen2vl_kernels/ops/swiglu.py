"""SwiGLU's elementwise half: ``silu(gate) * up`` with ``silu(x) = x * sigmoid(x)`` (Shazeer 2020, eq. 6).

Shapes: gate, up ``(..., F)``, or one packed ``(..., 2F)`` tensor ``[gate | up]``. dtypes: float32, bfloat16, float16.
Bytes a row of F values of b bytes: forward 3 F b, backward 5 F b (gate, up, dy, dgate, dup).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..core.backends import resolve
from ..core.checks import Checker, no_grad_through
from ..core.launching import accumulator, cdiv, jit, launch, target_of, tl
from ..core.library import direct, first_order, register_composite, register_opaque, run_in_place
from ..core.namespace import torch_ops
from ..triton.elementwise import as_rows, rows_view, tile


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


@jit(do_not_specialize=["rows"])
def _forward_kernel(
    gate, up, y, rows, gate_row, gate_column, up_row, up_column, y_row, y_column,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = (row < rows) & (column < COLUMNS)
    g = tl.load(gate + row * gate_row + column.to(tl.int64) * gate_column, mask=mask, other=0.0).to(ACC)
    u = tl.load(up + row * up_row + column.to(tl.int64) * up_column, mask=mask, other=0.0).to(ACC)
    out = g / (1 + tl.exp(-g)) * u
    tl.store(y + row * y_row + column.to(tl.int64) * y_column, out.to(y.dtype.element_ty), mask=mask)


@jit(do_not_specialize=["rows"])
def _backward_kernel(
    dy, gate, up, dgate, dup, rows, dy_row, dy_column, gate_row, gate_column, up_row, up_column, out_row,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = (row < rows) & (column < COLUMNS)
    d = tl.load(dy + row * dy_row + column.to(tl.int64) * dy_column, mask=mask, other=0.0).to(ACC)
    g = tl.load(gate + row * gate_row + column.to(tl.int64) * gate_column, mask=mask, other=0.0).to(ACC)
    u = tl.load(up + row * up_row + column.to(tl.int64) * up_column, mask=mask, other=0.0).to(ACC)
    sigmoid = 1 / (1 + tl.exp(-g))
    out = row * out_row + column
    tl.store(dgate + out, (d * u * sigmoid * (1 + g * (1 - sigmoid))).to(dgate.dtype.element_ty), mask=mask)
    tl.store(dup + out, (d * g * sigmoid).to(dup.dtype.element_ty), mask=mask)


def _halves(gate: torch.Tensor, up: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of both, views of a packed one."""
    if up is not None:
        return as_rows(gate), as_rows(up)
    first, second = as_rows(gate).chunk(2, -1)
    return first, second


def _launch(gate: torch.Tensor, up: torch.Tensor, y: torch.Tensor) -> None:
    """Rows to rows; ``y`` may be ``gate``."""
    rows, columns = gate.shape
    cut = tile(columns, gate.dtype, target_of(gate.device))
    launch(
        _forward_kernel,
        (cdiv(rows, cut.rows), cdiv(columns, cut.columns)),
        gate.device,
        gate,
        up,
        y,
        rows,
        *gate.stride(),
        *up.stride(),
        *y.stride(),
        COLUMNS=columns,
        BLOCK=cut.columns,
        ROWS=cut.rows,
        ACC=accumulator(gate.dtype),
        num_warps=cut.num_warps,
    )


def _fake_forward(gate, up):
    columns = gate.shape[-1] if up is not None else gate.shape[-1] // 2
    return torch.empty((*gate.shape[:-1], columns), dtype=gate.dtype, device=gate.device)


def launch_forward(gate: torch.Tensor, up: torch.Tensor | None) -> torch.Tensor:
    y = _fake_forward(gate, up)
    if y.numel():
        _launch(*_halves(gate, up), as_rows(y))
    return y


def launch_in_place(gate: torch.Tensor, up: torch.Tensor) -> None:
    if gate.numel() == 0:
        return
    rows = rows_view(gate)
    if rows is None:
        gate.copy_(launch_forward(gate, up))
    else:
        _launch(rows, as_rows(up), rows)


def launch_backward(dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """``(dgate, dup)``, or the gradient of the packed tensor and nothing."""
    dgate, dup = _fake_backward(dy, gate, up)
    if dy.numel() == 0:
        return dgate, dup
    (first, second), grad = _halves(gate, up), as_rows(dy)
    out_first, out_second = _halves(dgate, None if up is None else dup)
    rows, columns = grad.shape
    cut = tile(columns, gate.dtype, target_of(gate.device))
    launch(
        _backward_kernel,
        (cdiv(rows, cut.rows), cdiv(columns, cut.columns)),
        gate.device,
        grad,
        first,
        second,
        out_first,
        out_second,
        rows,
        *grad.stride(),
        *first.stride(),
        *second.stride(),
        out_first.stride(0),
        COLUMNS=columns,
        BLOCK=cut.columns,
        ROWS=cut.rows,
        ACC=accumulator(gate.dtype),
        num_warps=cut.num_warps,
    )
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


register_opaque(
    "swiglu_forward(Tensor gate, Tensor? up) -> Tensor",
    fake=_fake_forward,
    setup_context=_setup_context,
    backward=_backward,
    CPU=launch_forward,
    CUDA=launch_forward,
)
register_opaque(
    "swiglu_forward_(Tensor(a!) gate, Tensor up) -> ()",
    fake=lambda gate, up: None,
    CPU=launch_in_place,
    CUDA=launch_in_place,
)
register_opaque(
    "swiglu_backward(Tensor dy, Tensor gate, Tensor? up) -> (Tensor, Tensor)",
    fake=_fake_backward,
    CPU=launch_backward,
    CUDA=launch_backward,
)


def _run(gate, up=None, backend=None) -> torch.Tensor:
    if resolve("swiglu", gate.device.type, backend) == "eager":
        return swiglu_ref(gate, up)
    return (launch_forward if direct(gate, up) else torch_ops.swiglu_forward)(gate, up)


def _run_in_place(gate, up, backend=None) -> None:
    if resolve("swiglu", gate.device.type, backend) == "eager":
        _swiglu_inplace(gate, up)
    else:
        run_in_place(launch_in_place, torch_ops.swiglu_forward_, (gate,), gate, up)


register_composite("swiglu(Tensor gate, Tensor? up=None) -> Tensor", _run)
register_composite("swiglu_(Tensor(a!) gate, Tensor up) -> ()", _run_in_place)


def swiglu(gate: torch.Tensor, up: torch.Tensor | None = None, *, backend: str | None = None) -> torch.Tensor:
    """``silu(gate) * up``.

    Args:
        gate: ``(..., F)``, or ``(..., 2F)`` holding ``[gate | up]`` when ``up`` is ``None``.
        up: ``(..., F)``, same dtype as ``gate``.
        backend: ``None`` (choose), ``"triton"``, ``"eager"``.

    Returns ``(..., F)``. Raises ``TypeError``/``ValueError`` naming the argument that does not fit.
    """
    check = Checker("swiglu")
    check.tensor("gate", gate, (..., "F"))
    if up is None:
        check.require(gate.shape[-1] % 2 == 0, f"packed gate must have an even last size, got {gate.shape[-1]}")
    else:
        check.tensor("up", up, tuple(gate.shape), like=gate)
    return _run(gate, up, backend)


def swiglu_(gate: torch.Tensor, up: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
    """:func:`swiglu` of split tensors in place: ``gate`` is overwritten and returned. Refused when it requires grad."""
    check = Checker("swiglu_")
    check.tensor("gate", gate, (..., "F"))
    check.tensor("up", up, tuple(gate.shape), like=gate)
    no_grad_through("swiglu_", "swiglu", gate=gate, up=up)
    _run_in_place(gate, up, backend)
    return gate
