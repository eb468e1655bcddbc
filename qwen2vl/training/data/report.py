"""The account of what a data set gave and what it could not use."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Reason = Literal["malformed", "media", "too long"]
KEPT_PROBLEMS = 100


@dataclass(frozen=True)
class Problem:
    """A sample that was not used: `source` is its position, `message` says what is wrong with it."""

    source: str
    reason: Reason
    message: str


@dataclass
class DataReport:
    """What one rank's data set has read so far.

    Attributes:
        used: samples given, those of every epoch counted.
        skipped: reason -> times that a sample was skipped for it. "malformed": the record; "media": an image or video
            that cannot be read, a damaged shard; "too long": more tokens than allowed, never cut.
        problems: the first `KEPT_PROBLEMS` of them, every position once.
        bad: number of different positions that were malformed or whose media were; what `max_bad` limits.
    """

    used: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    _bad_sources: set[str] = field(default_factory=set, repr=False)
    _listed: set[str] = field(default_factory=set, repr=False)
    _state: dict[str, Any] | None = field(default=None, repr=False, compare=False)

    @property
    def bad(self) -> int:
        return len(self._bad_sources)

    def add(self, problem: Problem) -> bool:
        """Count it; whether this position is new."""
        self._state = None
        self.skipped[problem.reason] = self.skipped.get(problem.reason, 0) + 1
        new = problem.source not in self._listed and problem.source not in self._bad_sources
        if problem.reason != "too long":
            self._bad_sources.add(problem.source)
        if new and len(self.problems) < KEPT_PROBLEMS:
            self.problems.append(problem)
            self._listed.add(problem.source)
        return new

    def summary(self) -> str:
        """One line, and one for each problem that was kept."""
        counts = ", ".join(f"{count} skipped as {reason}" for reason, count in sorted(self.skipped.items()))
        head = f"{self.used} samples used" + (f", {counts}" if counts else ", none skipped")
        return "\n".join([head, *(f"  {problem.message}" for problem in self.problems)])

    def state_dict(self) -> dict[str, Any]:
        """The account as JSON can hold it.

        It is asked for after every sample, so that what only a problem changes is made once for each problem.
        """
        if self._state is None:
            self._state = {
                "skipped": dict(self.skipped),
                "problems": [[problem.source, problem.reason, problem.message] for problem in self.problems],
                "bad_sources": sorted(self._bad_sources),
            }
        return {"used": self.used, **self._state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`'s counts."""
        self.used, self._state = state["used"], None
        self.skipped = dict(state["skipped"])
        self.problems = [Problem(*problem) for problem in state["problems"]]
        self._bad_sources = set(state["bad_sources"])
        self._listed = {problem.source for problem in self.problems}
