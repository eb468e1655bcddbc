"""Zeros in the rows behind the last segment, where only a device knows where that ends.

Writing a whole tensor for it, or reading and writing it as ``masked_fill_`` does, costs others' attention up to a tenth
of its time. Here a program looks at the last boundary and writes only what lies behind it.
"""

from __future__ import annotations

import torch

from ..core.launching import cdiv, jit, launch, reason, target_of, tl
from ..core.tile_plan import Side

#: Rows that a program looks after, and values that it writes at a time.
_BLOCK_M, _BLOCK_N = 64, 1024


@jit(do_not_specialize=["last", "total"])
def _zero_past_kernel(x, cu_seqlens, last, total, ROW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    held = tl.load(cu_seqlens + last)
    first = tl.program_id(0) * BLOCK_M
    begin = tl.maximum(first, held).to(tl.int64) * ROW
    end = tl.minimum(first + BLOCK_M, total).to(tl.int64) * ROW
    for start in range(begin, end, BLOCK_N):
        at = start + tl.arange(0, BLOCK_N)
        tl.store(x + at, tl.zeros((BLOCK_N,), x.dtype.element_ty), mask=at < end)


def zero_behind(x: torch.Tensor, side: Side) -> torch.Tensor:
    """A contiguous ``x (T, ...)`` with zeros in the rows behind the last segment of its side, which nobody wrote.

    Nothing runs where the host knows that there are none, and PyTorch's operations run where Triton cannot.
    """
    held = side.held()
    if held is not None:
        if held < x.shape[0]:
            x[held:].zero_()
    elif reason(x.device.type) is not None:
        past = torch.arange(x.shape[0], device=x.device) >= side.bounds()[-1]
        x.masked_fill_(past.view(-1, *[1] * (x.ndim - 1)), 0)
    elif x.numel():
        bounds = side.bounds()
        launch(
            _zero_past_kernel,
            (cdiv(x.shape[0], _BLOCK_M),),
            x.device,
            x=x,
            cu_seqlens=bounds,
            last=bounds.shape[0] - 1,
            total=x.shape[0],
            ROW=x.shape[1:].numel(),
            BLOCK_M=_BLOCK_M,
            BLOCK_N=_BLOCK_N,
            num_warps=target_of(x.device).warps(128),
        )
    return x
