"""Zeros in the rows behind the last segment, where only a device knows where that ends.

Writing a whole tensor for it, or reading and writing it as ``masked_fill_`` does, costs others' attention up to a tenth
of its time. Here a program looks at the last boundary and writes only what lies behind it.
"""

from __future__ import annotations

import torch

from ..core.launching import cdiv, jit, launch, reason, target_of, tl
from ..core.tile_plan import TilePlan

#: Rows that a program looks after, values that it writes at a time.
_ROWS, _BLOCK = 64, 1024


@jit(do_not_specialize=["last", "total"])
def _zero_past_kernel(x, cu_seqlens, last, total, ROW: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    held = tl.load(cu_seqlens + last)
    first = tl.program_id(0) * ROWS
    begin = tl.maximum(first, held).to(tl.int64) * ROW
    end = tl.minimum(first + ROWS, total).to(tl.int64) * ROW
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        tl.store(x + at, tl.zeros((BLOCK,), x.dtype.element_ty), mask=at < end)


def zero_behind(x: torch.Tensor, plan: TilePlan) -> torch.Tensor:
    """A contiguous ``x (T, ...)`` with zeros in the rows behind the plan's last segment, which nobody wrote; nothing
    runs where the host knows that there are none."""
    held = plan.held()
    if held is None:
        zero_past(x, plan.bounds())
    elif held < x.shape[0]:
        x[held:].zero_()
    return x


def zero_past(x: torch.Tensor, cu_seqlens: torch.Tensor) -> None:
    """Zero the rows ``cu_seqlens[-1]`` and later of a contiguous ``x (T, ...)``, both on one device."""
    if reason(x.device.type) is not None:
        past = torch.arange(x.shape[0], device=x.device) >= cu_seqlens[-1]
        x.masked_fill_(past.view(-1, *[1] * (x.ndim - 1)), 0)
    elif x.numel():
        launch_zero_past(x, cu_seqlens)


def launch_zero_past(x: torch.Tensor, cu_seqlens: torch.Tensor) -> None:
    launch(
        _zero_past_kernel,
        (cdiv(x.shape[0], _ROWS),),
        x.device,
        x,
        cu_seqlens,
        cu_seqlens.shape[0] - 1,
        x.shape[0],
        ROW=x.shape[1:].numel(),
        ROWS=_ROWS,
        BLOCK=_BLOCK,
        num_warps=target_of(x.device).warps(128),
    )
