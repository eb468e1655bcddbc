"""What a case declares: workloads, who runs them, what they cost, and the parity gate.

A case is one file in ``benchmarks/cases`` that holds ``CASE = Case(name, summary, workloads)``; it is found by
being there. ``workloads(context)`` is a generator: it yields one :class:`Workload` at a time and may free or reuse
its inputs when resumed. One process measures the workloads of a case in turn, and another, which runs the generator up
to the next, those behind one that crashed: what takes long (models, compilation, big inputs) belongs into
``Provider.make`` and gates, which are called for what is measured.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

#: Bytes of all checkpoints that the cases ask for, and some to spare.
_CHECKPOINTS = 16 << 30


@dataclass(frozen=True)
class Check:
    """One line of a parity gate: green when ``error <= allowed``. A NaN is red.

    ``provider``: whose result it is, where that is one's alone. Red ones of a peer or a trial leave that one out; all
    others end the workload.
    """

    name: str
    error: float
    allowed: float
    provider: str | None = None

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed


class Skip(Exception):
    """Raised while a provider is made: it takes no part, and why."""


@dataclass(frozen=True)
class Provider:
    """One contender of a workload.

    Attributes:
        name: what the table shows.
        make: makes the provider that runs, of the same name, when it is its turn; :class:`Skip` says why it cannot.
        refuses: exceptions that making it or its first call may end with where it cannot serve these inputs; it is
            skipped in its own words then. A peer or a trial is skipped whatever it raises.
        call: the work of one sample. In a timed workload its duration is measured and its result goes to the
            gate; in one with ``units`` it returns the measured values by metric.
        peer: somebody else's implementation, to which ours are compared.
        trial: one of ours that is taken by name only, so that whatever it does costs no other its row.
        before: run before every sample, outside of the timing (to rewind a cache, say).
        warm: run instead of ``call`` to warm up where a whole call is too expensive.
        skipped: why this provider cannot run here; it is reported and never called.
    """

    name: str
    call: Callable[[], Any] | None = None
    peer: bool = False
    before: Callable[[], None] | None = None
    warm: Callable[[], Any] | None = None
    skipped: str | None = None
    make: Callable[[], Provider] | None = None
    refuses: tuple[type[Exception], ...] = ()
    trial: bool = False

    @property
    def apart(self) -> bool:
        """Whether its failures are its own, and end no workload."""
        return self.peer or self.trial

    def __post_init__(self) -> None:
        if sum(given is not None for given in (self.call, self.make, self.skipped)) != 1:
            raise ValueError(f"provider {self.name!r}: give either call, or make, or the reason in skipped")

    def ready(self) -> Provider:
        """The provider that runs, made where it is not yet."""
        return self if self.make is None else self.make()


@dataclass(frozen=True)
class Workload:
    """One input on which all providers are measured in turn.

    Attributes:
        name: shape and setting, readable in a table.
        providers: ours first, then the peers; names are unique.
        gate: outputs by provider name, one call each, to checks; ``None`` where the case's own gate stands for it.
        flops: floating-point operations of one unit of work, a multiply-add counting two.
        bytes: bytes that must move to and from memory at least.
        dtype: of the matrix products, selects the ceiling.
        per_call: units of work in one call (decoding steps, say); times are reported per unit.
        unit: what one unit is, where its rate is to be shown: ``"token"`` shows tokens/s.
        units: metrics to take from what ``call`` returns, with their unit (``"s"`` or ``"B"``); ``None`` times
            the call.
        another: makes the same workload on a second shape of the same kind. Each provider's first call there, beside
            its first call here, tells what every new shape costs from what the first costs once.
        late: dear and telling less: a command measures it after all other workloads of all its cases.
        series, size: what this is one point of, and which, for plots: an op and its tokens, say.
        min_rounds, max_rounds, budget_s: rounds are as many as fit the budget, within these bounds. Rounds that are
            asked for are never more than ``max_rounds``, which is 1 where a second round says nothing new.
    """

    name: str
    providers: Sequence[Provider]
    gate: Callable[[Mapping[str, Any]], Sequence[Check]] | None = None
    flops: float | None = None
    bytes: float | None = None
    dtype: torch.dtype = torch.float32
    per_call: int = 1
    unit: str | None = None
    units: Mapping[str, str] | None = None
    another: Callable[[], Workload] | None = None
    late: bool = False
    series: str | None = None
    size: int | None = None
    min_rounds: int = 5
    max_rounds: int = 100
    budget_s: float = 3.0

    def __post_init__(self) -> None:
        names = [provider.name for provider in self.providers]
        if len(set(names)) < len(names):
            raise ValueError(f"workload {self.name!r}: provider names must be unique, got {names}")


def _nothing(provider: str | None) -> None:
    pass


@dataclass
class Context:
    """Where and how a run measures; shared by the cases of one command.

    ``without`` names contenders that are left out, ``ended`` peers that ended a process in the workload that is next,
    and how. ``turn`` is told which peer is about to be called for the first time, and ``None`` after it.

    Use it as a context manager: leaving it removes the temporary folders that cases asked for.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    quick: bool = False
    rounds: int | None = None
    checkpoint_dir: Path | None = None
    without: tuple[str, ...] = ()
    ended: Mapping[str, str] = field(default_factory=dict)
    turn: Callable[[str | None], None] = field(default=_nothing, repr=False)
    _stack: ExitStack = field(default_factory=ExitStack, repr=False)

    def __enter__(self) -> Context:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def elsewhere(self) -> Context:
        """The same for another process, which leaves the folders alone."""
        return replace(self, _stack=ExitStack())

    def temporary(self, place: Path | None = None) -> Path:
        """A new folder that lives as long as the context, by default where temporary files are."""
        return Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="qwen2vl-bench-", dir=place)))

    def checkpoints(self) -> Path:
        """Where cases write or find their checkpoints: ``checkpoint_dir``, else one temporary folder.

        What a GPU is given lies in memory, where that has room: a disk may take longer than all measurements.
        """
        if self.checkpoint_dir is None:
            memory = Path("/dev/shm")
            roomy = memory.is_dir() and shutil.disk_usage(memory).free > _CHECKPOINTS
            self.checkpoint_dir = self.temporary(memory if roomy and self.device.type == "cuda" else None)
        return self.checkpoint_dir


@dataclass(frozen=True)
class Case:
    """A benchmark.

    Attributes:
        gate: for checks that stand for all workloads; each may have its own as well.
        limit_s: seconds on a GPU after which the gate, or a workload, counts as hanging; a CPU gets sixty times that.
        imports: modules to import once, before the processes of the workloads are forked. They may neither touch the
            GPU nor start threads.
    """

    name: str
    summary: str
    workloads: Callable[[Context], Iterator[Workload]]
    gate: Callable[[Context], Sequence[Check]] | None = None
    limit_s: float = 120.0
    imports: tuple[str, ...] = ()


def relative_error(got: torch.Tensor, exact: torch.Tensor) -> float:
    """Norm of the difference over the norm of the exact value, in float64; infinite where shapes differ.

    Where `exact` is, piece by piece: copies in float64 of all that a GPU holds would fit nowhere.
    """
    if got.shape != exact.shape:
        return math.inf
    pieces = zip(*(x.detach().to(exact.device).flatten().split(1 << 24) for x in (got, exact)), strict=True)
    sums = torch.zeros(2, dtype=torch.float64, device=exact.device)
    for one, true in pieces:
        true = true.double()
        sums += torch.stack([(one.double() - true).square().sum(), true.square().sum()])
    difference, whole = sums.sqrt().tolist()
    return difference / max(whole, 1e-30)


def equal(name: str, got: torch.Tensor, want: torch.Tensor, provider: str | None = None) -> Check:
    """Bitwise equality as a check: the error is the number of differing elements."""
    if got.shape != want.shape:
        return Check(name, math.inf, 0, provider)
    return Check(name, float((got != want.to(got.device)).sum()), 0, provider)


def two_times(
    name: str,
    got: torch.Tensor,
    low: torch.Tensor,
    exact: torch.Tensor,
    floor: float = 0.0,
    provider: str | None = None,
) -> Check:
    """The two-times rule: ``got`` at most twice as far from ``exact`` as ``low``, the plain way in its precision.

    ``floor`` is the rounding that no implementation avoids, as a relative error.
    """
    return Check(name, relative_error(got, exact), 2 * relative_error(low, exact) + floor, provider)
