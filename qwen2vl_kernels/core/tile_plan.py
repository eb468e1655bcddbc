"""The work of attention over packed segments as one flat list of tiles, longest segments first.

Queries and keys share their boundaries in a packed sequence; a chat's new turn over a cache has two sets of them.
A grid by the longest segment launches programs for rows that shorter segments do not have: with one segment of 16384
rows and 63 of 256 in tiles of 128, 8192 a head of which 254 work. Here every program has rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from .checks import Checker

_plans: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


class Side:
    """The boundaries of a plan's queries, or of its keys where these have their own, and what was learnt of them."""

    def __init__(
        self, cu_seqlens: torch.Tensor, total: int, device: torch.device, padded: bool, suffix: str = ""
    ) -> None:
        self.cu_seqlens = cu_seqlens
        self.total = total
        self.device = device
        self.padded = padded
        self._suffix = suffix  # of the arguments' names
        self._captured = _capturing(device)
        self._there: torch.Tensor | None = None
        self._longest: int | None = None
        self._span: tuple[int, int] | None = None
        self._checked: int | None = None  # against these boundaries
        self._held_to: int | None = None  # by a graph, whatever they become

    def bounds(self) -> torch.Tensor:
        """``cu_seqlens`` on the plan's device, copied there once, for kernels that read boundaries themselves."""
        if self.cu_seqlens.device == self.device:
            return self.cu_seqlens.contiguous()
        there = self._there
        if there is None:
            there = self.cu_seqlens.to(self.device, non_blocking=True)
            if self.keeps():
                self._there = there
        return there

    def keeps(self) -> bool:
        """Whether what is made now may be kept: what a capture makes lies in the graph's memory, and holds nothing
        before the first replay."""
        return self._captured or not _capturing(self.device)

    def held(self) -> int | None:
        """The rows that segments hold, ``None`` where the host does not know or a replay may bring others."""
        fixed = not self.padded and self.cu_seqlens.device.type == "cpu"
        return int(self.cu_seqlens[-1]) if fixed else None

    def span(self) -> tuple[int, int] | None:
        """Rows of the shortest segment that has any and of the longest, as :meth:`held`."""
        if self._span is None and not self.padded and self.cu_seqlens.device.type == "cpu":
            bounds = self.cu_seqlens.tolist()
            lengths = [b - a for a, b in zip(bounds, bounds[1:], strict=False) if b > a] or [0]
            self._span = min(lengths), max(lengths)
        return self._span

    @property
    def longest(self) -> int | None:
        """Rows of the longest segment, ``None`` where the host does not know. They may change with an update."""
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

    def check_update(self, check: Checker, cu_seqlens: torch.Tensor) -> None:
        """Refuse boundaries that :meth:`update_` cannot take."""
        name, shape = f"cu_seqlens{self._suffix}", (self.cu_seqlens.shape[0],)
        check.tensor(name, cu_seqlens, shape, dtypes=(torch.int32,), any_device=True)
        if self._held_to is not None:
            self._check_longest("TilePlan.update_", cu_seqlens, self._held_to)

    def update_(self, cu_seqlens: torch.Tensor) -> None:
        self.cu_seqlens.copy_(cu_seqlens)
        self._longest = self._checked = None
        if self._there is not None:
            self._there.copy_(cu_seqlens)

    def _check_longest(self, caller: str, cu_seqlens: torch.Tensor, most: int) -> None:
        name = f"max_seqlen{self._suffix}"
        if cu_seqlens.device.type == "cpu":
            longest = longest_of(cu_seqlens.tolist())
            words = f"{name} is {most}, but cu_seqlens{self._suffix} has a segment of {longest} rows"
            if caller == "TilePlan.update_":
                words = (
                    f"cu_seqlens{self._suffix} has a segment of {longest} rows, but another's kernel was captured with "
                    f"this plan and {name}={most}; give that call a larger one, or backend='triton', which takes any"
                )
            Checker(caller).require(longest <= most, words)
        elif cu_seqlens.shape[0] > 1:
            torch.ops.aten._assert_async.msg(cu_seqlens.diff().max() <= most, f"a segment is longer than {name}")


class TilePlan:
    """Lists of tiles of one ``cu_seqlens``, made once and shared by all layers, forward and backward.

    A kernel whose programs own ``rows`` query rows (or key rows, in the backward) asks for the list of that height,
    which is made when it is first asked for. Make plans with :func:`plan_tiles`.

    Attributes:
        cu_seqlens: ``(S + 1,)`` int32, the boundaries of the queries, and of the keys where these have none of their
            own.
        total: rows of the packed queries, T.
        device: where the kernels run.
        padded: whether lists are as long as any boundaries of this shape may need.
        queries, keys: a :class:`Side` each; one and the same, unless ``split``.

    Our kernels find all rows in these lists. Others' launch programs by ``max_seqlen``, and leave rows of a longer
    segment unwritten: a plan that one of them has worked with takes no longer segments in :meth:`update_`.
    """

    def __init__(
        self,
        cu_seqlens: torch.Tensor,
        total: int,
        device: torch.device,
        padded: bool,
        cu_seqlens_k: torch.Tensor | None = None,
        total_k: int | None = None,
    ) -> None:
        self.device = device
        self.padded = padded
        self.split = cu_seqlens_k is not None
        self.queries = self.keys = Side(cu_seqlens, total, device, padded, "_q" if self.split else "")
        if cu_seqlens_k is not None:
            assert total_k is not None
            self.keys = Side(cu_seqlens_k, total_k, device, padded, "_k")
        self._lists: dict[tuple[int, bool], torch.Tensor] = {}

    cu_seqlens = property(lambda self: self.queries.cu_seqlens)
    total = property(lambda self: self.queries.total)

    def tiles(self, rows: int, of_keys: bool = False) -> torch.Tensor:
        """Every tile of ``rows`` rows, int32 on the plan's device, those with the most work first.

        ``(n, 3)``: first row, segment begin and segment end; tiles too many are zero. Where keys have boundaries of
        their own ``(n, 4)``: first row, begin and end of the keys' segment, end of the queries' segment; with
        ``of_keys`` the sides change places.
        """
        own, other = (self.keys, self.queries) if of_keys else (self.queries, self.keys)
        made = self._lists.get((rows, of_keys and self.split))
        if made is None:
            made = self._made(rows, own, other).to(self.device, non_blocking=True)
            if own.keeps():
                self._lists[rows, of_keys and self.split] = made
        return made

    def _made(self, rows: int, own: Side, other: Side) -> torch.Tensor:
        across = other.cu_seqlens if self.split else None
        return make_tiles(own.cu_seqlens, rows, own.total, not self.padded, across, other.total)

    def update_(self, cu_seqlens: torch.Tensor, cu_seqlens_k: torch.Tensor | None = None) -> TilePlan:
        """Write the tiles of other boundaries over those that were made, where they lie: a captured CUDA graph that
        reads them then works on the new segments when it is replayed.

        Args:
            cu_seqlens: ``(S + 1,)`` int32 with the plan's S (repeat the last entry to pad), on any device.
            cu_seqlens_k: the keys', for a plan whose keys have boundaries of their own, and for no other.

        Raises ``ValueError`` unless the plan is padded, and where a graph has captured another's kernel with a
        ``max_seqlen`` that a segment passes: a replay launches programs for no more rows. For boundaries on a device
        that is asserted there, so that nobody waits.
        """
        check = Checker("TilePlan.update_")
        check.require(self.padded, "the plan must be padded to take other boundaries: plan_tiles(..., padded=True)")
        words = "cu_seqlens_k must be given if and only if the plan's keys have boundaries of their own"
        check.require(self.split == (cu_seqlens_k is not None), words)
        self.queries.check_update(check, cu_seqlens)
        if cu_seqlens_k is not None:
            self.keys.check_update(check, cu_seqlens_k)
            self.keys.update_(cu_seqlens_k)
        self.queries.update_(cu_seqlens)
        for (rows, of_keys), made in self._lists.items():
            sides = (self.keys, self.queries) if of_keys else (self.queries, self.keys)
            made.copy_(self._made(rows, *sides))
        return self


def plan_tiles(
    cu_seqlens: torch.Tensor,
    total: int,
    *,
    cu_seqlens_k: torch.Tensor | None = None,
    total_k: int | None = None,
    device: torch.device | str | None = None,
    padded: bool | None = None,
) -> TilePlan:
    """The :class:`TilePlan` of packed segments, for ``varlen_attention(..., tiles=plan)`` in every layer of a model.

    Args:
        cu_seqlens: ``(S + 1,)`` int32 row at which each segment starts, then the last one's end. On the CPU it must
            rise from 0 to at most ``total``, which is checked; on a GPU nothing is read by the host.
        total: rows of the packed tensors, T.
        cu_seqlens_k: likewise of the keys, where these have boundaries of their own (``cu_seqlens`` is then the
            queries'); on the same device.
        total_k: rows of the packed keys, given with ``cu_seqlens_k``.
        device: of the packed tensors; default ``cu_seqlens``'s.
        padded: lists as long as any S segments in T rows may need, for CUDA graphs whose segments change; by default
            they are exact where ``cu_seqlens`` is on the CPU, and padded where they must be, on a GPU.

    The plan keeps a copy of the boundaries, and what is written to ``cu_seqlens`` later does not change it. Inside a
    CUDA graph's capture, make the plan there too: each replay then plans by what ``cu_seqlens`` holds. Or make it
    before, padded, and call :meth:`TilePlan.update_` before a replay.

    Raises ``TypeError``/``ValueError`` naming the argument that does not fit.
    """
    check = Checker("plan_tiles")
    check.tensor("cu_seqlens", cu_seqlens, ("S+1",), dtypes=(torch.int32,))
    check.require(cu_seqlens.shape[0] >= 1, "cu_seqlens must have at least one entry, got shape (0,)")
    check.require(isinstance(total, int) and total >= 0, f"total must be a non-negative int, got {total!r}")
    ok = (cu_seqlens_k is None) == (total_k is None)
    check.require(ok, "cu_seqlens_k and total_k must be given together")
    on_host = cu_seqlens.device.type == "cpu"
    if on_host:
        check_bounds(check, cu_seqlens.tolist(), total)
    if cu_seqlens_k is not None:
        check.tensor("cu_seqlens_k", cu_seqlens_k, ("S+1",), dtypes=(torch.int32,), like=cu_seqlens)
        ok = isinstance(total_k, int) and total_k >= 0
        check.require(ok, f"total_k must be a non-negative int, got {total_k!r}")
        if on_host and total_k is not None:
            check_bounds(check, cu_seqlens_k.tolist(), total_k, suffix="_k")
        cu_seqlens_k = cu_seqlens_k.detach().clone()
    check.require(
        on_host or padded is not False, "padded must not be False for a cu_seqlens on a GPU: the host would wait"
    )
    place = cu_seqlens.device if device is None else torch.device(device)
    if place.type == "cuda" and place.index is None:  # as tensors name theirs
        place = torch.device("cuda", torch.cuda.current_device())
    padded = not on_host if padded is None else padded
    return TilePlan(cu_seqlens.detach().clone(), total, place, padded, cu_seqlens_k, total_k)


def plan_for(
    cu_seqlens: torch.Tensor,
    total: int,
    device: torch.device,
    cu_seqlens_k: torch.Tensor | None = None,
    total_k: int | None = None,
) -> TilePlan:
    """A plan of these boundaries, the one that was made before unless they were written to since.

    Not while a CUDA graph is captured: a replay must plan by what ``cu_seqlens`` holds then.
    """
    padded = cu_seqlens.device.type != "cpu"
    inference = cu_seqlens.is_inference() or (cu_seqlens_k is not None and cu_seqlens_k.is_inference())
    if _capturing(device) or inference:  # whether inference tensors were written to cannot be told
        return TilePlan(cu_seqlens, total, device, padded, cu_seqlens_k, total_k)
    known = _known_of(_plans, cu_seqlens)
    if cu_seqlens_k is not None:
        known = _known_of(known.setdefault("by keys", WeakTensorKeyDictionary()), cu_seqlens_k)
        cu_seqlens_k = cu_seqlens_k.detach()
    key = (total, total_k, device)
    if key not in known:
        known[key] = TilePlan(cu_seqlens.detach(), total, device, padded, cu_seqlens_k, total_k)
    return known[key]


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _known_of(plans: WeakTensorKeyDictionary, cu_seqlens: torch.Tensor) -> dict[Any, Any]:
    """Those made since the boundaries were last written to; they live as long as the tensor.

    On the host the values are compared, as what is written through numpy or ``.data`` is not counted. On a device only
    PyTorch's count of writes is, since the host would wait for the values.
    """
    state = (cu_seqlens._version, cu_seqlens.tolist() if cu_seqlens.device.type == "cpu" else None)
    known = plans.get(cu_seqlens)
    if known is None or known[0] != state:
        known = plans[cu_seqlens] = (state, {})
    return known[1]


def make_tiles(
    cu_seqlens: torch.Tensor,
    rows: int,
    total: int,
    exact: bool,
    across: torch.Tensor | None = None,
    total_across: int = 0,
) -> torch.Tensor:
    """:meth:`TilePlan.tiles` where ``cu_seqlens`` is; ``exact`` leaves those too many out, which has to know how many
    are not. ``across``: the boundaries of the other side, if there are two."""
    begins, lengths = _segments(cu_seqlens, total)
    others, work = (begins, lengths) if across is None else _segments(across.to(cu_seqlens.device), total_across)
    segments = lengths.shape[0]
    most = total // rows + min(segments, total) if segments else 0
    order = work.argsort(descending=True, stable=True)
    begins, lengths, others, work = (x.index_select(0, order) for x in (begins, lengths, others, work))
    counts = (lengths + rows - 1) // rows
    ends = counts.cumsum(0)
    place = torch.arange(most, device=cu_seqlens.device)
    segment = torch.searchsorted(ends, place, right=True)
    real = segment < segments
    segment = segment.clamp(max=max(segments - 1, 0))
    begin, before, other, end = (x.index_select(0, segment) for x in (begins, ends - counts, others, others + work))
    columns = [begin + (place - before) * rows, other, end]
    if across is not None:
        columns.append((begins + lengths).index_select(0, segment))
    made = torch.stack(columns, 1)
    return (made[real] if exact else made * real.unsqueeze(1)).int()


def _segments(cu_seqlens: torch.Tensor, total: int) -> tuple[torch.Tensor, torch.Tensor]:
    """First row and length of each."""
    bounds = cu_seqlens.long().clamp(0, total)
    return bounds.narrow(0, 0, bounds.shape[0] - 1), bounds.diff().clamp_min(0)


def check_bounds(
    check: Checker, bounds: list[int], total: int, max_seqlen: int | None = None, suffix: str = ""
) -> None:
    """Refuse boundaries that do not rise from 0 to at most ``total``, or a segment longer than ``max_seqlen``."""
    lengths = [b - a for a, b in zip(bounds, bounds[1:], strict=False)]
    name, longest = f"cu_seqlens{suffix}", max(lengths, default=0)
    if bounds[0] != 0 or min(lengths, default=0) < 0 or bounds[-1] > total:  # words only then: this is every call's
        of = "k" if suffix == "_k" else "q"
        check.require(False, f"{name} must rise from 0 to at most {of}'s {total} rows, got {_short(bounds)}")
    if max_seqlen is not None and max_seqlen < longest:
        check.require(False, f"max_seqlen{suffix} is {max_seqlen}, but {name} has a segment of {longest} rows")


def check_tiles(check: Checker, tiles: object, q, k, bounds, longest, packed: bool, traced: bool) -> None:
    """Refuse what is no plan of such a call of varlen_attention; ``longest``: bounds of its queries and of its keys."""
    if not isinstance(tiles, TilePlan):
        raise TypeError(f"varlen_attention: tiles must be a TilePlan, got {type(tiles).__name__}")
    check.require(
        tiles.split != packed,
        f"tiles are planned for {'' if tiles.split else 'no '}keys with boundaries of their own, and the call gives "
        f"{'none' if packed else 'some'}",
    )
    have, want = tiles.cu_seqlens.shape[0], bounds.shape[0]
    if have != want:  # words only then: a compiler that writes a number into them compiles for that number
        check.require(False, f"tiles are planned for {have - 1} segments, but cu_seqlens has {want - 1}")
    if traced:  # not to be compiled in: code for one number of rows would serve no other
        return
    check.require(tiles.device == q.device, f"tiles must be on {q.device} like q, got {tiles.device}")
    for name, side, x, most in zip("qk", (tiles.queries, tiles.keys), (q, k), longest, strict=True):
        ok = side.total == x.shape[0]
        check.require(ok, f"tiles are planned for {side.total} rows, but {name} has {x.shape[0]}")
        known, suffix = side.longest, "" if packed else f"_{name}"
        words = f"max_seqlen{suffix} is {most}, but tiles are planned for a segment of {known} rows"
        check.require(known is None or most >= known, words)


def longest_of(bounds: list[int]) -> int:
    """Rows of the longest segment, 0 where there is none."""
    return max((b - a for a, b in zip(bounds, bounds[1:], strict=False)), default=0)


def _short(values: list[int]) -> str:
    return str(values) if len(values) <= 12 else f"[{', '.join(map(str, values[:6]))}, ..., {values[-1]}]"
