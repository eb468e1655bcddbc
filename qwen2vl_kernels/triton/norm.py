"""The Triton kernels of layer_norm and rms_norm: one forward and one backward for both, with and without a residual.

With m the row's mean (0 for RMSNorm), r = 1 / sqrt(mean((s - m)^2) + eps) and n = (s - m) r, s = x (+ residual):

    y = n * weight (+ bias)
    ds = r (g - n mean(g n) (- mean(g))) (+ dtotal),  g = dy * weight
    dweight = sum over rows of dy n,  dbias = sum over rows of dy

Bytes a row of C values of b bytes, each once: forward 2 C b, with a residual 4 C b (x, residual, sum, y); backward
3 C b (dy, s, ds), 4 C b with dtotal. A program holds whole rows in registers, so the variance is that of centred
values. The weight's gradient is summed without atomics: each program adds up a run of rows, in float32, and PyTorch
adds the programs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..core.checks import INTS, Checker
from ..core.launching import Target, accumulator, cdiv, jit, launch, next_power_of_2, strides, target_of, tl
from ..core.library import direct, first_order, register_opaque
from ..core.namespace import torch_ops
from .elementwise import as_rows


@dataclass(frozen=True)
class NormConfig:
    block_m: int  # rows of a program's tile
    num_warps: int


def forward_config(columns: int, dtype: torch.dtype, target: Target) -> NormConfig:
    """Two vectors of 16 bytes a thread and row, then rows until a program has enough loads in flight. Not yet tuned."""
    block = next_power_of_2(columns)
    lanes = block * dtype.itemsize // 16  # threads that one row keeps busy with one vector each
    return NormConfig(block_m=max(1, min(8, 4096 // block)), num_warps=target.warps(min(256, lanes // 2)))


def backward_config(columns: int, dtype: torch.dtype, target: Target) -> NormConfig:
    """One row at a time: the sums for the weight's gradient take the registers. Not yet tuned."""
    lanes = next_power_of_2(columns) * dtype.itemsize // 16
    return NormConfig(block_m=1, num_warps=target.warps(min(512, lanes)))


#: Programs of a backward, each with a run of rows and a row of partial sums of the weight's gradient.
_BACKWARD_PROGRAMS = 512


@jit(do_not_specialize=["rows"])
def _forward_kernel(
    x,
    order,
    residual,
    weight,
    bias,
    y,
    total,
    mean,
    rstd,
    rows,
    x_row,
    x_column,
    residual_row,
    residual_column,
    eps,
    COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CENTRED: tl.constexpr,
    ACC: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]  # (BLOCK_M, 1)
    column = tl.arange(0, BLOCK_N)[None, :]  # (1, BLOCK_N)
    valid = column < COLUMNS
    mask = (row < rows) & valid
    source = row if order is None else tl.load(order + row, mask=row < rows, other=0)
    s = tl.load(x + source * x_row + column.to(tl.int64) * x_column, mask=mask, other=0.0)
    if residual is not None:
        s = s.to(ACC) + tl.load(
            residual + row * residual_row + column.to(tl.int64) * residual_column, mask=mask, other=0.0
        ).to(ACC)
        s = s.to(total.dtype.element_ty)
        tl.store(total + row * COLUMNS + column, s, mask=mask)
    s = s.to(ACC)  # of the rounded sum, as an addition followed by a norm has it
    if CENTRED:
        m = tl.sum(s, 1, keep_dims=True) / COLUMNS  # (BLOCK_M, 1)
        s = tl.where(valid, s - m, 0.0)
        if mean is not None:
            tl.store(mean + row, m, mask=row < rows)
    r = 1 / tl.sqrt(tl.sum(s * s, 1, keep_dims=True) / COLUMNS + eps)  # (BLOCK_M, 1)
    if rstd is not None:
        tl.store(rstd + row, r, mask=row < rows)
    out = s * r * tl.load(weight + column, mask=valid, other=0.0).to(ACC)
    if bias is not None:
        out += tl.load(bias + column, mask=valid, other=0.0).to(ACC)
    tl.store(y + row * COLUMNS + column, out.to(y.dtype.element_ty), mask=mask)


@jit(do_not_specialize=["rows", "run"])
def _backward_kernel(
    dy,
    s,
    order,
    dtotal,
    weight,
    mean,
    rstd,
    ds,
    dweight,
    dbias,
    rows,
    run,
    dy_row,
    dy_column,
    s_row,
    s_column,
    dtotal_row,
    dtotal_column,
    COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CENTRED: tl.constexpr,
    ACC: tl.constexpr,
):
    column = tl.arange(0, BLOCK_N)[None, :]  # (1, BLOCK_N)
    valid = column < COLUMNS
    w = tl.load(weight + column, mask=valid, other=0.0).to(ACC)
    weight_sum = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    bias_sum = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    begin = tl.program_id(0).to(tl.int64) * run
    end = tl.minimum(begin + run, rows)
    for first in range(begin, end, BLOCK_M):
        row = (first + tl.arange(0, BLOCK_M)[:, None]).to(tl.int64)  # (BLOCK_M, 1)
        mask = (row < end) & valid
        r = tl.load(rstd + row, mask=row < end, other=0.0)
        source = row if order is None else tl.load(order + row, mask=row < end, other=0)
        n = tl.load(s + source * s_row + column.to(tl.int64) * s_column, mask=mask, other=0.0).to(ACC)
        g = tl.load(dy + row * dy_row + column.to(tl.int64) * dy_column, mask=mask, other=0.0).to(ACC)
        if CENTRED:
            n -= tl.load(mean + row, mask=row < end, other=0.0)
        n = tl.where(mask, n * r, 0.0)
        weight_sum += g * n
        if dbias is not None:
            bias_sum += g
        g *= w
        out = g - n * (tl.sum(g * n, 1, keep_dims=True) / COLUMNS)
        if CENTRED:
            out -= tl.sum(g, 1, keep_dims=True) / COLUMNS
        out *= r
        if dtotal is not None:
            out += tl.load(dtotal + row * dtotal_row + column.to(tl.int64) * dtotal_column, mask=mask, other=0.0).to(
                ACC
            )
        tl.store(ds + source * COLUMNS + column, out.to(ds.dtype.element_ty), mask=mask)
    at = tl.program_id(0).to(tl.int64) * COLUMNS + column
    tl.store(dweight + at, tl.sum(weight_sum, 0, keep_dims=True), mask=valid)
    if dbias is not None:
        tl.store(dbias + at, tl.sum(bias_sum, 0, keep_dims=True), mask=valid)


def launch_forward(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    centred: bool,
    order: torch.Tensor | None = None,
    statistics: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(y, total, mean, rstd)``: total is empty without a residual, the statistics ``(rows,)`` unless wanted.

    ``order (rows,)`` int64: row r of y and of the statistics is that of row ``order[r]`` of x; not with a residual.
    """
    y, total, mean, rstd = _fake_forward(x, residual, weight, bias, eps, centred, order, statistics)
    if x.numel() == 0:
        return y, total, mean, rstd
    acc, columns = accumulator(x.dtype), x.shape[-1]
    chosen = forward_config(columns, x.dtype, target_of(x.device))
    flat = as_rows(x)
    other = None if residual is None else as_rows(residual)
    launch(
        _forward_kernel,
        (cdiv(flat.shape[0], chosen.block_m),),
        x.device,
        x=flat,
        order=order,
        residual=other,
        weight=weight.contiguous(),
        bias=None if bias is None else bias.contiguous(),
        y=y,
        total=None if residual is None else total,
        mean=mean if statistics and centred else None,
        rstd=rstd if statistics else None,
        rows=flat.shape[0],
        **strides(("row", "column"), x=flat, residual=other),
        eps=eps,
        COLUMNS=columns,
        BLOCK_N=next_power_of_2(columns),
        BLOCK_M=chosen.block_m,
        CENTRED=centred,
        ACC=acc,
        num_warps=chosen.num_warps,
    )
    return y, total, mean, rstd


def launch_backward(
    dy: torch.Tensor,
    s: torch.Tensor,
    dtotal: torch.Tensor | None,
    weight: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    centred: bool,
    biased: bool,
    order: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(ds, dweight, dbias)``, dbias empty unless ``biased``."""
    ds = torch.empty(s.shape, dtype=s.dtype, device=s.device)
    columns = s.shape[-1]
    if s.numel() == 0:
        return ds, torch.zeros_like(weight), weight.new_zeros(columns if biased else 0)
    acc = accumulator(s.dtype)
    chosen = backward_config(columns, s.dtype, target_of(s.device))
    flat, grad = as_rows(s), as_rows(dy)
    other = None if dtotal is None else as_rows(dtotal)
    rows = flat.shape[0]
    run = chosen.block_m * cdiv(rows, chosen.block_m * _BACKWARD_PROGRAMS)  # rows of a program
    programs = cdiv(rows, run)
    partial = torch.empty((1 + biased, programs, columns), dtype=rstd.dtype, device=s.device)
    launch(
        _backward_kernel,
        (programs,),
        s.device,
        dy=grad,
        s=flat,
        order=order,
        dtotal=other,
        weight=weight.contiguous(),
        mean=mean if centred else None,
        rstd=rstd,
        ds=ds,
        dweight=partial[0],
        dbias=partial[1] if biased else None,
        rows=rows,
        run=run,
        **strides(("row", "column"), dy=grad, s=flat, dtotal=other),
        COLUMNS=columns,
        BLOCK_N=next_power_of_2(columns),
        BLOCK_M=chosen.block_m,
        CENTRED=centred,
        ACC=acc,
        num_warps=chosen.num_warps,
    )
    sums = partial.sum(1).to(weight.dtype)
    return ds, sums[0], sums[1] if biased else weight.new_empty(0)


def _fake_forward(x, residual, weight, bias, eps, centred, order=None, statistics=True):
    wide = torch.promote_types(x.dtype, torch.float32)
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = torch.empty(x.shape if residual is not None else (0,), dtype=x.dtype, device=x.device)
    mean = torch.empty(rows if statistics and centred else 0, dtype=wide, device=x.device)
    rstd = torch.empty(rows if statistics else 0, dtype=wide, device=x.device)
    return y, total, mean, rstd


def _fake_backward(dy, s, dtotal, weight, mean, rstd, centred, biased, order=None):
    return s.new_empty(s.shape), torch.empty_like(weight), weight.new_empty(weight.shape[0] if biased else 0)


def _setup_context(ctx, inputs, output) -> None:
    x, residual, weight, bias, _, ctx.centred, order = inputs
    _, total, mean, rstd = output
    ctx.added, ctx.biased = residual is not None, bias is not None
    ctx.mark_non_differentiable(*((mean, rstd) if ctx.added else (total, mean, rstd)))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(total if ctx.added else x, weight, mean, rstd, order)


def _backward(ctx, dy, dtotal, _dmean, _drstd):
    s, weight, mean, rstd, order = ctx.saved_tensors
    if dy is None:
        return dtotal, dtotal, None, None, None, None, None
    arguments = (dy, s, dtotal, weight, mean, rstd, ctx.centred, ctx.biased, order)
    ds, dweight, dbias = first_order("layer_norm" if ctx.centred else "rms_norm", torch_ops.norm_backward, *arguments)
    return ds, ds if ctx.added else None, dweight, dbias if ctx.biased else None, None, None, None


def _check_order(check: Checker, rows: int, order: torch.Tensor | None) -> None:
    """Refuse another number of rows, and on the CPU, where reading them costs no wait, rows that are not there."""
    if order is None:
        return
    check.tensor("order", order, (rows,), dtypes=INTS)
    if order.device.type == "cpu" and rows:
        low, high = int(order.min()), int(order.max())
        check.require(low >= 0 and high < rows, f"order must be in [0, {rows}), got {low} to {high}")


def _check_forward(x, residual, weight, bias, eps, centred, order) -> None:
    check = Checker("norm_forward")
    check.tensor("x", x, (..., "N"))
    check.tensor("weight", weight, ("N",))
    if residual is not None:
        check.tensor("residual", residual, tuple(x.shape))
    if bias is not None:
        check.tensor("bias", bias, ("N",))
    _check_order(check, x[..., 0].numel() if x.shape[-1] else 0, order)


def _check_backward(dy, s, dtotal, weight, mean, rstd, centred, biased, order) -> None:
    check = Checker("norm_backward")
    check.tensor("s", s, (..., "N"))
    check.tensor("weight", weight, ("N",))
    rows = s[..., 0].numel() if s.shape[-1] else 0
    for name, x in (("dy", dy), ("dtotal", dtotal)):
        if x is not None:
            check.tensor(name, x, tuple(s.shape))
    for name, x in (("rstd", rstd), *((("mean", mean),) if centred else ())):
        check.tensor(name, x, (rows,))
        check.require(x.is_contiguous(), f"{name} must be contiguous, got strides {x.stride()}")
    _check_order(check, rows, order)


register_opaque(
    "norm_forward(Tensor x, Tensor? residual, Tensor weight, Tensor? bias, float eps, bool centred, Tensor? order)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_forward,
    check=_check_forward,
    setup_context=_setup_context,
    backward=_backward,
    CPU=launch_forward,
    CUDA=launch_forward,
)
register_opaque(
    "norm_backward(Tensor dy, Tensor s, Tensor? dtotal, Tensor weight, Tensor mean, Tensor rstd, bool centred,"
    " bool biased, Tensor? order) -> (Tensor, Tensor, Tensor)",
    fake=_fake_backward,
    check=_check_backward,
    CPU=launch_backward,
    CUDA=launch_backward,
)


def norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    centred: bool,
    order: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(y, total)`` of either norm; total is empty without a residual. ``order`` as for :func:`launch_forward`."""
    if direct(x, residual, weight, bias):
        return launch_forward(x, residual, weight, bias, eps, centred, order, statistics=False)[:2]
    return torch_ops.norm_forward(x, residual, weight, bias, eps, centred, order)[:2]
