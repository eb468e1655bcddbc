"""How well the small model does what it was trained for, and the shipped file, whose header says so."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from qwen2vl.model import Qwen2VL
from qwen2vl.prompt.processor import Processor
from qwen2vl.samples.fonts import typefaces
from qwen2vl.samples.held_out import Scored, evaluate, report
from qwen2vl.samples.skills import DATA_VERSION
from qwen2vl.weights import SINGLE_NAME

from .plan import SCOPE, SEED
from .tokenizer import LANGUAGES

Results = dict[str, Any]
#: The key of the file's header under which it says how it was made. It is older than the names of the folders here, and
#: stays, so that the embedded file need not be written again.
KEY = "qwen2vl.small"


@dataclass(frozen=True)
class Goal:
    """A figure that the training aims at.

    Attributes:
        value: calculates the figure from a report of :func:`qwen2vl.samples.held_out.report`.
        wanted: the figure that is good enough.
        least: whether higher figures are better; with False lower ones are.
    """

    name: str
    value: Callable[[Results], float]
    wanted: float
    least: bool = True

    def reached(self, results: Results) -> bool:
        value = self.value(results)
        return value >= self.wanted if self.least else value <= self.wanted


def mean(skill: str, difficulties: Sequence[int], score: str = "accuracy") -> Callable[[Results], float]:
    """The mean of a score over some difficulties of a skill, as the `value` of a :class:`Goal`."""
    return lambda results: _total(results, skill, difficulties, score) / _total(results, skill, difficulties, None)


def error_rate(skill: str, difficulties: Sequence[int]) -> Callable[[Results], float]:
    """The character error rate of some difficulties of a skill: all edits divided by all characters."""
    return lambda results: (
        _total(results, skill, difficulties, "edits") / _total(results, skill, difficulties, "characters")
    )


def behind(language: str, other: str) -> Callable[[Results], float]:
    """How far the accuracy with prompts of one language lies below that with prompts of the other."""
    return lambda results: results["by_language"][other]["accuracy"] - results["by_language"][language]["accuracy"]


def _total(results: Results, skill: str, difficulties: Sequence[int], score: str | None) -> float:
    """The sum of a score over all samples of some difficulties; with None the number of the samples."""
    rows = [results["by_difficulty"][f"{skill} {level}"] for level in difficulties]
    return sum((1 if score is None else row[score]) * row["samples"] for row in rows)


GOALS = (
    Goal("reading 1 to 6 characters, character error rate", error_rate("read", SCOPE["read"]), 0.03, least=False),
    Goal("reading 1 to 6 characters, exact", mean("read", SCOPE["read"]), 0.92),
    Goal("colour and shape, accuracy", mean("colour_shape", SCOPE["colour_shape"]), 0.99),
    Goal("counting 0 to 5, accuracy", mean("count", SCOPE["count"]), 0.95),
    Goal("comparing two pictures, accuracy", mean("compare", SCOPE["compare"]), 0.95),
    Goal("pointing, mean IoU", mean("point", SCOPE["point"], "IoU"), 0.75),
    Goal("pointing, IoU above 0.5", mean("point", SCOPE["point"]), 0.90),
    Goal("what happens in a video, accuracy", mean("video", SCOPE["video"]), 0.97),
    Goal("screen game, episodes won", mean("screen", SCOPE["screen"]), 0.90),
    Goal("Chinese prompts behind English ones, accuracy", behind("zh", "en"), 0.03, least=False),
)


def measure(folder: Path, *, count: int, seed: int, processes: int) -> dict[str, Any]:
    """The report on held-out samples of every level in `SCOPE`, with weights and arithmetic in bfloat16.

    Args:
        count: samples of each level; skills of fewer levels are asked more of each, so that all are asked as many.
    """
    most = max(map(len, SCOPE.values()))
    jobs = [
        (str(folder), skill, level, count * most // len(levels), seed)
        for skill, levels in reversed(SCOPE.items())
        for level in reversed(levels)
    ]
    if processes == 1:
        return report([one for job in jobs for one in _measure(job)])
    with ProcessPoolExecutor(processes, get_context("spawn"), initializer=_one_thread) as pool:
        return report([one for found in pool.map(_measure, jobs) for one in found])


def _one_thread() -> None:
    torch.set_num_threads(1)


def _measure(job: tuple[str, str, int, int, int]) -> Sequence[Scored]:
    folder, skill, level, count, seed = job
    model = Qwen2VL.from_pretrained(folder, device="cpu", dtype="bfloat16")
    processor = Processor.from_pretrained(folder)
    which = {"skills": (skill,), "difficulties": (level,), "languages": LANGUAGES}
    return evaluate(model, processor, count=count, seed=seed, **which)


def ship(source: Path, folder: Path, facts: dict[str, Any]) -> None:
    """Write the model of `source` in bfloat16, with tokenizer and image settings, and `facts` in the file's header."""
    model = Qwen2VL.from_pretrained(source, device="cpu", dtype="bfloat16")
    model.save_pretrained(folder, metadata={KEY: json.dumps(facts, ensure_ascii=False)})
    Processor.from_pretrained(source).save_pretrained(folder)


def facts_of(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What :func:`ship` wrote into the header of a model in `folder`; :func:`facts` says what it holds."""
    with safe_open(Path(folder) / SINGLE_NAME, "pt") as file:
        return json.loads(file.metadata()[KEY])


def facts(sittings: Sequence[dict[str, Any]], results: Results, *, count: int, measured_seed: int) -> dict[str, Any]:
    """How the file was made, and how good the model is, for :func:`ship`.

    Args:
        sittings: what made it, in order, see `examples.small.sitting.sittings_of`.
        results: the report of :func:`measure` with `count` and `measured_seed`.
    """
    return {
        "sittings": list(sittings),
        "count": count,
        "measured_seed": measured_seed,
        "seed": SEED,
        "data_version": DATA_VERSION,
        "typefaces": [face.name for face in typefaces()],
        "versions": {name: metadata.version(name) for name in ("qwen2vl", "torch", "pillow", "matplotlib")},
        "goals": {
            goal.name: {"value": goal.value(results), "wanted": goal.wanted, "reached": goal.reached(results)}
            for goal in GOALS
        },
        "results": results,
    }


def table(told: dict[str, Any]) -> str:
    """Tables in Markdown of what a file says: goals beside what was reached, and every skill's accuracy by level."""
    lines = ["| held-out samples | reached | goal |", "|---|---|---|"]
    for name, found in told["goals"].items():
        sign = "at least" if (found["value"] >= found["wanted"]) == found["reached"] else "at most"
        missed = "" if found["reached"] else ", missed"
        lines.append(f"| {name} | {found['value']:.1%} | {sign} {found['wanted']:.0%}{missed} |")
    measured = told["results"]["by_difficulty"]
    levels = sorted({name.split()[1] for name in measured})
    lines += ["", f"| accuracy at difficulty | {' | '.join(levels)} |", "|---" * (1 + len(levels)) + "|"]
    for skill in told["results"]["by_skill"]:
        rows = [measured.get(f"{skill} {level}") for level in levels]
        lines.append(f"| {skill} | {' | '.join(format(row['accuracy'], '.0%') if row else '–' for row in rows)} |")
    languages = told["results"]["by_language"]
    lines += ["", "Accuracy by language: " + ", ".join(f"{k} {v['accuracy']:.1%}" for k, v in languages.items()) + "."]
    return "\n".join(lines)
