"""Which configuration the shapes of a group should have: the first pass names who is compared, that decides."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .subject import Subject

#: How many of a group's ranking are compared with what ships in the end.
FINALISTS = 3
#: What ships is kept unless another one is faster by this factor, and by more than rounds differ from each other.
LEAST_GAIN = 1.02


@dataclass
class Trial:
    """What became of a subject.

    Attributes:
        shapes: that the subject's group has, whether they are tried or not.
        rows: what became of each candidate, in the first pass.
        again: samples of what ships, taken once more after the first pass, in which it was timed before all others.
        finals: samples of those that were compared in turn, by their literal text.
        broken: why they could not be compared.
    """

    subject: Subject
    shipped: Any
    candidates: list[dict[str, int]]
    shapes: int = 1
    rows: list[dict[str, Any]] = field(default_factory=list)
    again: list[float] = field(default_factory=list)
    finals: dict[str, list[float]] = field(default_factory=dict)
    broken: str | None = None

    @property
    def left(self) -> int:
        """Candidates that the limit kept from being looked at."""
        return len(self.candidates) - len(self.rows)

    @property
    def ships(self) -> str:
        return literal(self.shipped)

    @property
    def medians(self) -> dict[str, float]:
        """Medians of the first pass, by candidate, with the samples of what ships from its end."""
        timed = {row["literal"]: row["samples"] for row in self.rows if "samples" in row}
        return {text: statistics.median([*s, *(self.again if text == self.ships else ())]) for text, s in timed.items()}


def literal(config: Any) -> str:
    """``ForwardConfig(128, 64, 8, 2)``: as configurations are written."""
    return f"{type(config).__name__}({', '.join(map(str, asdict(config).values()))})"


def whole(trials: Iterable[Trial]) -> list[Trial]:
    """Those whose every candidate was looked at: the best of a handful is no verdict on the others."""
    return [trial for trial in trials if not trial.left and trial.medians and trial.broken is None]


def by_group(trials: Iterable[Trial]) -> dict[str, list[Trial]]:
    found: dict[str, list[Trial]] = {}
    for trial in trials:
        found.setdefault(trial.subject.group, []).append(trial)
    return found


def ranking(trials: Sequence[Trial]) -> tuple[dict[str, int], list[str]]:
    """The values of fixed fields, and the candidates that all shapes can have, the best first, by the first pass.

    It goes by the geometric mean of a candidate's time over each shape's best. Where bits depend on a field, its value
    is chosen before all else, by the best that each shape can do with it, for it has to serve all shapes.
    """
    times = [trial.medians for trial in trials]
    fields = {row["literal"]: row["fields"] for trial in trials for row in trial.rows}
    least = [min(shape.values()) for shape in times]
    common = [text for text in times[0] if all(text in shape for shape in times)]
    fixed = {}
    for name in trials[0].subject.fixed if common else ():

        def cost(value: int, name: str = name) -> float:
            best = [min(s for text, s in shape.items() if fields[text][name] == value) for shape in times]
            return mean_ratio(best, least)

        fixed[name] = min({fields[text][name] for text in common}, key=cost)
    allowed = [text for text in common if all(fields[text][name] == value for name, value in fixed.items())]
    return fixed, sorted(allowed, key=lambda text: mean_ratio([shape[text] for shape in times], least))


def finalists(trial: Trial, ranked: Sequence[str]) -> list[str]:
    """Who is compared at one shape: the group's first few, what ships there, and the fastest there.

    The fastest with the bits of the group's first, too, which may take its place at this shape.
    """
    medians, bits = trial.medians, {row["literal"]: row.get("bits") for row in trial.rows}
    named = [*ranked[:FINALISTS], trial.ships, min(medians, key=medians.__getitem__)]
    if ranked:
        named.append(min((t for t in medians if bits[t] == bits[ranked[0]]), key=medians.__getitem__))
    return [text for text in dict.fromkeys(named) if text in medians]


def verdict(group: str, members: Sequence[Trial]) -> dict[str, Any]:
    """What one group should have, in the numbers of the last comparison, where all took turns.

    ``best`` is what to write in: ``candidate``, the best of those compared, where it ``changes`` anything, else what
    ships, and ``None`` where there is neither; ``why`` says so. ``from`` tells of how many shapes, as those that the
    limit cut have no say. ``shapes`` names for each the fastest candidate, and the fastest one that has the very bits
    of the group's, so may take its place there.
    """
    subject, finished = members[0].subject, [trial for trial in whole(members) if trial.finals]
    count = max(len(members), *(trial.shapes for trial in members))
    found: dict[str, Any] = {
        "group": group,
        "function": f"{subject.module.__name__}.{subject.function}",
        "from": f"{len(finished)} of {count} shapes",
        "best": None,
    }
    if not finished:
        return found | {"why": "at no shape was every candidate timed"}
    fixed, ranked = ranking(finished)
    compared = [text for text in ranked if all(text in trial.finals for trial in finished)]
    if not compared:
        return found | {"why": "no candidate was timed at every shape"}
    medians = [{text: statistics.median(s) for text, s in trial.finals.items()} for trial in finished]
    least = [min(shape.values()) for shape in medians]
    best = min(compared, key=lambda text: mean_ratio([shape[text] for shape in medians], least))
    found |= {"candidate": best, "fixed": fixed, **_decision(best, finished)}
    shapes = {}
    for trial, shape in zip(finished, medians, strict=True):
        bits = {row["literal"]: row.get("bits") for row in trial.rows}
        same = min((text for text in shape if bits[text] == bits[best]), key=shape.__getitem__)
        fastest = min(shape, key=shape.__getitem__)
        shapes[trial.subject.shape] = {
            "ships": trial.ships, "ships_s": shape.get(trial.ships), "candidate_s": shape[best],
            "fastest": fastest, "fastest_s": shape[fastest], "same_bits": same, "same_bits_s": shape[same],
        }  # fmt: skip
    if subject.columns is not None:
        found |= {"columns": subject.columns, "place": subject.place or 0}
    return found | {"shapes": shapes}


def _decision(candidate: str, trials: Sequence[Trial]) -> dict[str, Any]:
    """Whether ``candidate`` takes the place of what ships, and why."""
    ships = {trial.ships for trial in trials}  # shorter segments may have another
    kept = ships.pop() if len(ships) == 1 else None
    failing = [trial.subject.shape for trial in trials if trial.ships not in trial.finals]
    if failing:
        return {"best": candidate, "changes": True, "why": f"what ships fails at {' and '.join(failing)}"}
    pairs = [zip(trial.finals[trial.ships], trial.finals[candidate], strict=True) for trial in trials]
    # The ratio of every round, in which all had the same machine, over all shapes.
    gains = [mean_ratio(*zip(*turn, strict=True)) for turn in zip(*pairs, strict=False)]
    gain, spread = statistics.median(gains), 0.0
    if len(gains) > 1:
        lower, _, upper = statistics.quantiles(gains, n=4, method="inclusive")
        spread = upper - lower
    told = {"gain": gain, "spread": spread, "best": kept, "changes": False}
    if gain < LEAST_GAIN:
        return told | {"why": f"what ships is within {LEAST_GAIN - 1:.0%} of the best"}
    if gain - 1 <= spread:
        return told | {"why": "rounds differ from each other by more than the gain"}
    return told | {"best": candidate, "changes": True, "why": "faster by more than rounds differ"}


def mean_ratio(times: Sequence[float], others: Sequence[float]) -> float:
    """The geometric mean of quotients."""
    return math.exp(statistics.fmean(math.log(a / b) for a, b in zip(times, others, strict=True)))
