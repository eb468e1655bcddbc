"""The work of attention over packed segments as one flat list of tiles, longest segments first.

A grid by the longest segment launches programs for rows that shorter segments do not have: with one segment of 16384
rows and 63 of 256 in tiles of 128, 8192 a head of which 254 work. Here every program has rows.
"""

from __future__ import annotations

import torch
from torch.utils.weak import WeakTensorKeyDictionary

_plans: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def tiles(cu_seqlens: torch.Tensor, rows: int, total: int, device: torch.device) -> torch.Tensor:
    """``(n, 3)`` int32 on ``device``: first row, segment begin and segment end of every tile of ``rows`` rows.

    From boundaries on the CPU n is what they need; on a device it is the most that ``total`` rows in these segments can
    need, tiles too many are (0, 0, 0), and nothing is read on the host. Made once for a ``cu_seqlens`` and shared by
    all layers, until it is written to.
    """

    def make() -> torch.Tensor:
        exact = cu_seqlens.device.type == "cpu"
        return make_tiles(cu_seqlens, rows, total, exact).to(device, non_blocking=True)

    if cu_seqlens.is_inference():  # whether it was written to cannot be told
        return make()
    known = _plans.get(cu_seqlens)
    if known is None or known[0] != cu_seqlens._version:
        known = _plans[cu_seqlens] = (cu_seqlens._version, {})
    key = (rows, total, device)
    if key not in known[1]:
        known[1][key] = make()
    return known[1][key]


def make_tiles(cu_seqlens: torch.Tensor, rows: int, total: int, exact: bool) -> torch.Tensor:
    """The tiles where ``cu_seqlens`` is; ``exact`` leaves those too many out, which has to know how many are not."""
    bounds = cu_seqlens.long().clamp(0, total)
    begins, lengths = bounds[:-1], bounds.diff().clamp_min(0)
    segments = lengths.shape[0]
    most = total // rows + min(segments, total) if segments else 0
    order = lengths.argsort(descending=True, stable=True)
    begins, lengths = begins[order], lengths[order]
    counts = (lengths + rows - 1) // rows
    ends = counts.cumsum(0)
    place = torch.arange(most, device=cu_seqlens.device)
    segment = torch.searchsorted(ends, place, right=True)
    real = segment < segments
    segment = segment.clamp(max=max(segments - 1, 0))
    first = begins[segment] + (place - (ends - counts)[segment]) * rows
    made = torch.stack((first, begins[segment], begins[segment] + lengths[segment]), 1)
    return (made[real] if exact else made * real[:, None]).int()
