"""A linear layer with a quantised weight for each group of rows, as a mixture of quantised experts has.

    grouped_quant_linear(x, weight, scales, bounds, ...)[m] = W[g] x[m][order[g]]  for  bounds[g] <= m < bounds[g + 1]

and 0 behind the last bound, with ``W[g] = (q - zero) * scale`` of ``weight[g], scales[g], zeros[g]``. Shapes: x
``(M, K)`` in 16 or 32 bits, rows sorted by group; weight, scales and zeros as ``core.quant_layout`` lays them out, each
with a first dimension of G groups; bounds ``(G + 1,)`` int32; y ``(M, N)``. It is ``grouped_linear`` (arXiv 1701.06538)
of the weights of ``quant_linear`` (AWQ, arXiv 2306.00978; GPTQ, arXiv 2210.17323); sums are float32.

The kernel multiplies x with ``q - zero``, which 16-bit floats hold exactly, and scales the sum of a group of columns;
the reference rounds every weight to x's dtype first. The weight gets no gradient; x does. The reference and the loop of
the extension read the bounds on the host, where they tell which weights are met: only these are read. The Triton
kernel, which no GPU has run yet, does not wait for the host, nor does its gradient, which holds the values of all
weights in x's dtype for that.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from ..core import quant_native
from ..core.backends import resolve
from ..core.checks import EAGER_FLOATS, INTS, Checker
from ..core.groups import check_bounds
from ..core.library import direct, first_order, register_composite, register_opaque, watched
from ..core.matmul import in_autocast_dtype
from ..core.namespace import torch_ops
from ..core.quant_layout import KERNEL_FLOATS, check_weight, dequantize
from ..triton.grouped_gemm import launch_rows
from ..triton.grouped_quant import launch_grouped_quant

#: What each backend multiplies.
_DTYPES = {"eager": EAGER_FLOATS, "native": KERNEL_FLOATS, "triton": (torch.bfloat16, torch.float16)}


def grouped_quant_linear_ref(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    bounds: torch.Tensor,
    zeros: torch.Tensor | None = None,
    *,
    block: tuple[int, int],
    order: torch.Tensor | None = None,
    upcast: bool = False,
) -> torch.Tensor:
    """One product after another, for the groups that have rows, with the weight's values in x's dtype; in float32 with
    ``upcast``."""
    if upcast:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return grouped_quant_linear_ref(wide, weight, scales, bounds, zeros, block=block, order=order).to(x.dtype)
    parts = [
        F.linear(rows, dequantize(w, s, z, block, x.dtype, x.shape[1]))
        for rows, w, s, z in _groups(x, weight, scales, bounds, zeros, order)
    ]
    return torch.cat([*parts, x.new_zeros(x.shape[0] - sum(map(len, parts)), weight.shape[1])])


def _groups(x, weight, scales, bounds, zeros, order) -> Iterator[tuple]:
    """``(rows, weight, scales, zeros)`` of the groups that have rows, whose columns meet those of the weight; the first
    group where none has, so that what is differentiated depends on x."""
    ends = bounds.tolist()
    for g, (begin, end) in enumerate(zip(ends[:-1], ends[1:], strict=True)):
        if end > begin or (g == 0 and ends[-1] == 0):
            rows = x[begin:end] if order is None else x[begin:end].index_select(1, order[g])
            yield rows, weight[g], scales[g], None if zeros is None else zeros[g]


def _run_native(x, weight, scales, bounds, zeros, order, block_n, block_k):
    block = (block_n, block_k)
    parts = [
        quant_native.product(rows, w, s, z, None, block)
        for rows, w, s, z in _groups(x, weight, scales, bounds, zeros, order)
        if rows.shape[0]
    ]
    return torch.cat([*parts, x.new_zeros(x.shape[0] - sum(map(len, parts)), weight.shape[1])])


def _run_triton(x, weight, scales, bounds, zeros, order, block_n, block_k):
    return launch_grouped_quant(x, weight, scales, bounds, zeros, order, (block_n, block_k))


def _run_eager(x, weight, scales, bounds, zeros, order, block_n, block_k):
    return grouped_quant_linear_ref(x, weight, scales, bounds, zeros, block=(block_n, block_k), order=order)


_RUNS = {"eager": _run_eager, "native": _run_native, "triton": _run_triton}


def _forward(x, weight, scales, bounds, zeros, order, block_n, block_k, backend):
    return _RUNS[backend](x, weight, scales, bounds, zeros, order, block_n, block_k)


def _values(g, weight, scales, zeros, order, block, out) -> torch.Tensor:
    """The ``(N, K)`` values of one group's weight in ``out``, for x's columns as they come."""
    points, order = (None if t is None else t[g] for t in (zeros, order))
    found = quant_native.values_of(weight[g], scales[g], points, block, out.dtype, out.shape[1])
    return out.copy_(found) if order is None else out.index_copy_(1, order.long(), found)


def _run_backward(dy, weight, scales, bounds, zeros, order, block_n, block_k, columns, backend):
    block, (groups, outputs) = (block_n, block_k), weight.shape[:2]
    if backend == "triton":
        values = dy.new_empty(groups, outputs, columns)
        for g in range(groups):
            _values(g, weight, scales, zeros, order, block, values[g])
        return launch_rows(dy, values, bounds, transposed=True)
    ends, dx = bounds.tolist(), dy.new_zeros(dy.shape[0], columns)
    values = dy.new_empty(outputs, columns)  # of one group at a time
    for g, (begin, end) in enumerate(zip(ends[:-1], ends[1:], strict=True)):
        if end > begin:
            dx[begin:end] = dy[begin:end] @ _values(g, weight, scales, zeros, order, block, values)
    return dx


def _fake_forward(x, weight, scales, bounds, zeros, order, block_n, block_k, backend):
    return x.new_empty((x.shape[0], weight.shape[1]))


def _fake_backward(dy, weight, scales, bounds, zeros, order, block_n, block_k, columns, backend):
    return dy.new_empty((dy.shape[0], columns))


def _setup_context(ctx, inputs, output) -> None:
    x, *tensors, block_n, block_k, backend = inputs
    ctx.save_for_backward(*tensors)
    ctx.how = (block_n, block_k, x.shape[1], backend)


def _backward(ctx, dy):
    dx = None
    if ctx.needs_input_grad[0]:
        run = lambda *given: (torch_ops.grouped_quant_linear_backward(*given),)  # noqa: E731
        (dx,) = first_order("grouped_quant_linear", run, dy, *ctx.saved_tensors, *ctx.how)
    return dx, *[None] * 8


def _check_groups(check: Checker, rows: int, columns: int, weight, scales, bounds, zeros, order, block) -> None:
    check_weight(check, columns, weight, scales, zeros, block, ("G",))
    check.require(0 not in weight.shape, "weight must have a group and a row at least")
    check_bounds(check, bounds, weight.shape[0], rows)
    if order is not None:
        check.tensor("order", order, ("G", columns), dtypes=INTS)


def _check(op: str, x, weight, scales, bounds, zeros, order, block_n, block_k, backend=None) -> None:
    check = Checker(op)
    check.tensor("x", x, ("M", "K"), dtypes=EAGER_FLOATS)
    _check_groups(check, x.shape[0], x.shape[1], weight, scales, bounds, zeros, order, (block_n, block_k))
    if backend is not None:
        _check_backend(op, "x", x, resolve("grouped_quant_linear", x.device.type, backend))


def _check_backward(dy, weight, scales, bounds, zeros, order, block_n, block_k, columns, backend) -> None:
    check = Checker(op := "grouped_quant_linear_backward")
    check.tensor("dy", dy, ("M", "N"), dtypes=EAGER_FLOATS)
    _check_groups(check, dy.shape[0], columns, weight, scales, bounds, zeros, order, (block_n, block_k))
    _check_backend(op, "dy", dy, resolve("grouped_quant_linear", dy.device.type, backend))


def _check_backend(op: str, name: str, x: torch.Tensor, backend: str) -> None:
    if x.dtype not in _DTYPES[backend]:
        wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES[backend])
        raise TypeError(f"{op}: {name} must have one of the dtypes {wanted} for backend {backend!r}, got {x.dtype}")


_WEIGHT = "Tensor weight, Tensor scales, Tensor bounds, Tensor? zeros, Tensor? order, int block_n, int block_k"
register_opaque(
    f"grouped_quant_linear_forward(Tensor x, {_WEIGHT}, str backend) -> Tensor",
    fake=_fake_forward,
    check=lambda *given: _check("grouped_quant_linear_forward", *given),
    setup_context=_setup_context,
    backward=_backward,
    CPU=_forward,
    CUDA=_forward,
)
register_opaque(
    f"grouped_quant_linear_backward(Tensor dy, {_WEIGHT}, int columns, str backend) -> Tensor",
    fake=_fake_backward,
    check=_check_backward,
    CPU=_run_backward,
    CUDA=_run_backward,
)


def grouped_quant_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    bounds: torch.Tensor,
    zeros: torch.Tensor | None = None,
    *,
    block: tuple[int, int],
    order: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Each group's rows times its quantised weight; K is x's last size, a multiple of 32.

    Args:
        x: ``(M, K)`` float32, bfloat16 or float16 (float64 where eager serves, 16 bits alone where Triton does), rows
            sorted by group; under autocast, of its dtype.
        weight: ``(G, N, K / 2)`` or ``(G, N, K)`` uint8 for 4 or 8 bits, or ``(G, N, K)`` float8_e4m3fn.
        scales: ``(G, N, g)``, g groups of ``block[1]`` columns; for fp8 ``(G, ceil(N / block[0]), g)``.
        bounds: ``(G + 1,)`` int32 on the same device, rising from 0 to at most M; groups may be empty.
        zeros: ``(G, N, ceil(g * bits / 8))`` uint8; default ``2^(bits - 1)`` everywhere.
        block: rows and columns of a weight that share a scale, as :func:`qwen2vl_kernels.quant_linear` takes them.
        order: ``(G, K)`` integers, for each group the column of x that meets each column of its weight.
        backend: ``None`` (choose), ``"native"`` on CPUs, ``"triton"``, ``"eager"``.

    Returns ``(M, N)`` in x's dtype, zero in rows behind the last bound. With ``"triton"`` a row's bits depend on no
    other row's values, and on their number only in that M and G choose the height of tiles. Gradients reach x only, and
    have no derivatives but in eager. Raises ``TypeError``/``ValueError`` naming the argument that does not fit; bounds
    and orders on a GPU, which nobody reads on the host, are cut to the rows and columns.
    """
    (x,) = in_autocast_dtype(x)
    given = (x, weight, scales, bounds, zeros, order, *block)
    _check("grouped_quant_linear", *given)
    # Once a Triton kernel is the first choice it will not be for float32, whose tiles no compiler can be trusted with.
    prefer = "eager" if x.dtype == torch.float64 or (x.dtype == torch.float32 and x.is_cuda) else None
    chosen = resolve("grouped_quant_linear", x.device.type, backend, prefer)
    _check_backend("grouped_quant_linear", "x", x, chosen)
    if chosen == "eager" and not (x.is_meta or torch.compiler.is_compiling() or watched()):
        return _run_eager(*given)
    if chosen != "eager" and direct(x, weight, scales, zeros):
        return _RUNS[chosen](*given)
    return torch_ops.grouped_quant_linear_forward(*given, chosen)


def _composite(x, weight, scales, bounds, zeros, block, order):
    return grouped_quant_linear(x, weight, scales, bounds, zeros, block=tuple(block), order=order)


register_composite(
    "grouped_quant_linear(Tensor x, Tensor weight, Tensor scales, Tensor bounds, Tensor? zeros, int[] block, "
    "Tensor? order) -> Tensor",
    _composite,
)
