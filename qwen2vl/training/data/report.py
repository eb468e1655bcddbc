"""The account of what a data set gave and what it could not use."""

from __future__ import annotations

import os
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
        problems: the first `KEPT_PROBLEMS` of them, every position once.
    """

    used: int = 0
    problems: list[Problem] = field(default_factory=list)
    # Reason -> the positions skipped for it, in the order in which they were met.
    _positions: dict[Reason, dict[str, None]] = field(default_factory=dict, repr=False)
    _state: dict[str, Any] | None = field(default=None, repr=False, compare=False)

    @property
    def skipped(self) -> dict[Reason, int]:
        """Reason -> number of different positions skipped for it, however often they came.

        "malformed": the record; "media": an image or video that cannot be read, a damaged shard; "too long": more
        tokens than allowed, never cut.
        """
        return {reason: len(positions) for reason, positions in self._positions.items()}

    @property
    def bad(self) -> int:
        """Number of different positions that were malformed or whose media were; what `max_bad` limits."""
        return len(self._positions.get("malformed", {}).keys() | self._positions.get("media", {}).keys())

    def add(self, problem: Problem) -> bool:
        """Count it, unless an earlier epoch did; whether this position is new."""
        new = all(problem.source not in positions for positions in self._positions.values())
        positions = self._positions.setdefault(problem.reason, {})
        if problem.source in positions:
            return False
        self._state = None
        positions[problem.source] = None
        if new and len(self.problems) < KEPT_PROBLEMS:
            self.problems.append(problem)
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
                "skipped": {reason: list(positions) for reason, positions in self._positions.items()},
                "problems": [[problem.source, problem.reason, problem.message] for problem in self.problems],
            }
        return {"used": self.used, **self._state}

    def load_state_dict(self, state: dict[str, Any], *, moved: tuple[str, str] = ("", "")) -> None:
        """Go on from `state_dict`'s counts. `moved`: the folder that positions were in, and the one they are in now."""
        old, new = (os.path.join(folder, "") for folder in moved)

        def now(text: str) -> str:
            return new + text[len(old) :] if all(moved) and text.startswith(old) else text

        self.used, self._state = state["used"], None
        self._positions = {reason: dict.fromkeys(map(now, positions)) for reason, positions in state["skipped"].items()}
        self.problems = [Problem(now(source), reason, now(text)) for source, reason, text in state["problems"]]
