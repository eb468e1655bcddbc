"""How the elementwise ops cut rows of columns into programs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..core.launching import Target, next_power_of_2

#: Programs along the rows where sums over them are kept, one row of partial sums each.
SUM_PROGRAMS = 128


@dataclass(frozen=True)
class Tile:
    rows: int
    columns: int
    num_warps: int


def tile(columns: int, dtype: torch.dtype, target: Target) -> Tile:
    """8 KiB of input a program of 128 threads: four vectors of 16 bytes a thread on their way. Not yet tuned."""
    block = min(1024, next_power_of_2(columns))
    return Tile(max(1, 8192 // (block * dtype.itemsize)), block, target.warps(128))


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """``(..., C)`` as ``(rows, C)``: a view wherever the leading dimensions can be walked with one stride."""
    return x.reshape(-1, x.shape[-1])


def rows_view(x: torch.Tensor) -> torch.Tensor | None:
    """:func:`as_rows` where it is a view, for what is written in place."""
    rows = as_rows(x)
    return rows if rows.data_ptr() == x.data_ptr() or x.is_meta or x.numel() == 0 else None
