"""The work of attention over packed segments as one flat list of tiles, longest segments first.

A grid by the longest segment launches programs for rows that shorter segments do not have: with one segment of 16384
rows and 63 of 256 in tiles of 128, 8192 a head of which 254 work. Here every program has rows.
"""

from __future__ import annotations

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from .checks import Checker

_plans: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


class TilePlan:
    """Lists of tiles of one ``cu_seqlens``, made once and shared by all layers, forward and backward.

    A kernel whose programs own ``rows`` query rows (or key rows, in the backward) asks for the list of that height,
    which is made when it is first asked for. Make plans with :func:`plan_tiles`.

    Attributes:
        cu_seqlens: ``(S + 1,)`` int32, the boundaries.
        total: rows of the packed tensors, T.
        device: where the kernels run.
        padded: whether lists are as long as any boundaries of this shape may need.

    Our kernels find all rows in these lists. Others' launch programs by ``max_seqlen``, and leave rows of a longer
    segment unwritten: a plan that one of them has worked with takes no longer segments in :meth:`update_`.
    """

    def __init__(self, cu_seqlens: torch.Tensor, total: int, device: torch.device, padded: bool) -> None:
        self.cu_seqlens = cu_seqlens
        self.total = total
        self.device = device
        self.padded = padded
        self._captured = _capturing(device)
        self._lists: dict[int, torch.Tensor] = {}
        self._there: torch.Tensor | None = None
        self._longest: int | None = None
        self._checked: int | None = None  # against these boundaries
        self._held_to: int | None = None  # by a graph, whatever they become

    def tiles(self, rows: int) -> torch.Tensor:
        """``(n, 3)`` int32 on the plan's device: first row, segment begin and segment end of every tile of ``rows``
        rows, longest segments first; tiles too many are (0, 0, 0)."""
        made = self._lists.get(rows)
        if made is None:
            made = make_tiles(self.cu_seqlens, rows, self.total, exact=not self.padded)
            made = made.to(self.device, non_blocking=True)
            # What a capture makes lies in the graph's memory, and holds nothing before the first replay.
            if self._captured or not _capturing(self.device):
                self._lists[rows] = made
        return made

    def bounds(self) -> torch.Tensor:
        """``cu_seqlens`` on the plan's device, copied there once, for kernels that read boundaries themselves."""
        if self.cu_seqlens.device == self.device:
            return self.cu_seqlens.contiguous()
        there = self._there
        if there is None:
            there = self.cu_seqlens.to(self.device, non_blocking=True)
            if self._captured or not _capturing(self.device):
                self._there = there
        return there

    def held(self) -> int | None:
        """The rows that segments hold, ``None`` where the host does not know or a replay may bring others."""
        fixed = not self.padded and self.cu_seqlens.device.type == "cpu"
        return int(self.cu_seqlens[-1]) if fixed else None

    @property
    def longest(self) -> int | None:
        """Rows of the longest segment, ``None`` where the host does not know. They may change with :meth:`update_`."""
        if self._longest is None and self.cu_seqlens.device.type == "cpu":
            self._longest = longest_of(self.cu_seqlens.tolist())
        return self._longest

    def hold_to(self, max_seqlen: int) -> None:
        """Check that no segment has more than the ``max_seqlen`` rows that a kernel's grid has, which a graph keeps.

        Raises ``ValueError`` where the host sees a longer segment; where only the device does, the device asserts.
        """
        if max_seqlen >= self.total:
            return
        if self._checked is None or max_seqlen < self._checked:  # once for all layers
            self._check_longest("varlen_attention", self.cu_seqlens, max_seqlen)
            self._checked = max_seqlen
        if self._held_to is None or max_seqlen < self._held_to:
            self._held_to = max_seqlen if _capturing(self.device) else self._held_to

    def _check_longest(self, caller: str, cu_seqlens: torch.Tensor, most: int) -> None:
        if cu_seqlens.device.type == "cpu":
            longest = longest_of(cu_seqlens.tolist())
            words = f"max_seqlen is {most}, but cu_seqlens has a segment of {longest} rows"
            if caller == "TilePlan.update_":
                words = (
                    f"cu_seqlens has a segment of {longest} rows, but another's kernel was captured with this "
                    f"plan and max_seqlen={most}; give that call a larger one, or backend='triton', which takes any"
                )
            Checker(caller).require(longest <= most, words)
        elif cu_seqlens.shape[0] > 1:
            torch.ops.aten._assert_async.msg(cu_seqlens.diff().max() <= most, "a segment is longer than max_seqlen")

    def update_(self, cu_seqlens: torch.Tensor) -> TilePlan:
        """Write the tiles of other boundaries over those that were made, where they lie: a captured CUDA graph that
        reads them then works on the new segments when it is replayed.

        Args:
            cu_seqlens: ``(S + 1,)`` int32 with the plan's S (repeat the last entry to pad), on any device.

        Raises ``ValueError`` unless the plan is padded, and where a graph has captured another's kernel with a
        ``max_seqlen`` that a segment passes: a replay launches programs for no more rows. For boundaries on a device
        that is asserted there, so that nobody waits.
        """
        check = Checker("TilePlan.update_")
        check.require(self.padded, "the plan must be padded to take other boundaries: plan_tiles(..., padded=True)")
        check.tensor("cu_seqlens", cu_seqlens, (self.cu_seqlens.shape[0],), dtypes=(torch.int32,), any_device=True)
        if self._held_to is not None:
            self._check_longest("TilePlan.update_", cu_seqlens, self._held_to)
        self.cu_seqlens.copy_(cu_seqlens)
        self._longest = self._checked = None
        if self._there is not None:
            self._there.copy_(cu_seqlens)
        for rows, made in self._lists.items():
            made.copy_(make_tiles(self.cu_seqlens, rows, self.total, exact=False))
        return self


def plan_tiles(
    cu_seqlens: torch.Tensor, total: int, *, device: torch.device | str | None = None, padded: bool | None = None
) -> TilePlan:
    """The :class:`TilePlan` of packed segments, for ``varlen_attention(..., tiles=plan)`` in every layer of a model.

    Args:
        cu_seqlens: ``(S + 1,)`` int32 row at which each segment starts, then the last one's end. On the CPU it must
            rise from 0 to at most ``total``, which is checked; on a GPU nothing is read by the host.
        total: rows of the packed tensors, T.
        device: of those tensors; default ``cu_seqlens``'s.
        padded: lists as long as any S segments in T rows may need, for CUDA graphs whose segments change; by default
            they are exact where ``cu_seqlens`` is on the CPU, and padded where they must be, on a GPU.

    Inside a CUDA graph's capture, make the plan there too: each replay then plans by what ``cu_seqlens`` holds. Or make
    it before, padded, and call :meth:`TilePlan.update_` before a replay.
    """
    check = Checker("plan_tiles")
    check.tensor("cu_seqlens", cu_seqlens, ("S+1",), dtypes=(torch.int32,))
    check.require(cu_seqlens.shape[0] >= 1, "cu_seqlens must have at least one entry, got shape (0,)")
    check.require(isinstance(total, int) and total >= 0, f"total must be a non-negative int, got {total!r}")
    on_host = cu_seqlens.device.type == "cpu"
    if on_host:
        check_bounds(check, cu_seqlens.tolist(), total)
    check.require(
        on_host or padded is not False, "padded must not be False for a cu_seqlens on a GPU: the host would wait"
    )
    place = cu_seqlens.device if device is None else torch.device(device)
    if place.type == "cuda" and place.index is None:  # as tensors name theirs
        place = torch.device("cuda", torch.cuda.current_device())
    plan = TilePlan(cu_seqlens.detach(), total, place, not on_host if padded is None else padded)
    if not cu_seqlens.is_inference():
        _plans_of(cu_seqlens)[total, place] = plan  # for the backward, which gets tensors only
    return plan


def plan_for(cu_seqlens: torch.Tensor, total: int, device: torch.device) -> TilePlan:
    """A plan of these boundaries, the one that was made before unless they were written to since.

    Not while a CUDA graph is captured: a replay must plan by what ``cu_seqlens`` holds then.
    """
    padded = cu_seqlens.device.type != "cpu"
    if _capturing(device) or cu_seqlens.is_inference():  # whether inference tensors were written to cannot be told
        return TilePlan(cu_seqlens, total, device, padded)
    known = _plans_of(cu_seqlens)
    if (total, device) not in known:
        known[total, device] = TilePlan(cu_seqlens.detach(), total, device, padded)
    return known[total, device]


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _plans_of(cu_seqlens: torch.Tensor) -> dict[tuple[int, torch.device], TilePlan]:
    """Those made since the boundaries were last written to, by rows and device; they live as long as the tensor.

    On the host the values are compared, as what is written through numpy or ``.data`` is not counted. On a device only
    PyTorch's count of writes is, since the host would wait for the values.
    """
    state = (cu_seqlens._version, cu_seqlens.tolist() if cu_seqlens.device.type == "cpu" else None)
    known = _plans.get(cu_seqlens)
    if known is None or known[0] != state:
        known = _plans[cu_seqlens] = (state, {})
    return known[1]


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


def check_bounds(check: Checker, bounds: list[int], total: int, max_seqlen: int | None = None) -> None:
    """Refuse boundaries that do not rise from 0 to at most ``total``, or a segment longer than ``max_seqlen``."""
    lengths = [b - a for a, b in zip(bounds, bounds[1:], strict=False)]
    ok = bounds[0] == 0 and min(lengths, default=0) >= 0 and bounds[-1] <= total
    check.require(ok, f"cu_seqlens must rise from 0 to at most q's {total} rows, got {_short(bounds)}")
    longest = longest_of(bounds)
    ok = max_seqlen is None or max_seqlen >= longest
    check.require(ok, f"max_seqlen is {max_seqlen}, but cu_seqlens has a segment of {longest} rows")


def longest_of(bounds: list[int]) -> int:
    """Rows of the longest segment, 0 where there is none."""
    return max((b - a for a, b in zip(bounds, bounds[1:], strict=False)), default=0)


def _short(values: list[int]) -> str:
    return str(values) if len(values) <= 12 else f"[{', '.join(map(str, values[:6]))}, ..., {values[-1]}]"
