"""Groups of rows that lie one behind the other, as ops over a mixture of experts take them."""

from __future__ import annotations

import torch

from .checks import Checker
from .library import watched


def check_bounds(check: Checker, bounds: torch.Tensor, groups: int, rows: int) -> None:
    """Refuse ``bounds`` that are not those of ``groups`` among ``rows`` of x; by their values where the host has them,
    and nobody traces."""
    check.require(rows < 2**31, "x must have fewer than 2^31 rows")  # a compiler compiles for a number in words
    check.tensor("bounds", bounds, (groups + 1,), dtypes=(torch.int32,))
    if bounds.device.type == "cpu" and not (torch.compiler.is_compiling() or watched()):
        ends = bounds.tolist()
        rising = ends == sorted(ends) and ends[0] == 0 and ends[-1] <= rows
        check.require(rising, f"bounds must rise from 0 to at most the {rows} rows of x, got {ends[:8]}")
