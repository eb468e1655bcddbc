"""How well the small model does what it was trained for, and the file that is shipped, which says so in its header."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from qwen2vl.model import Qwen2VL
from qwen2vl.prompt.processor import Processor
from qwen2vl.samples import LEVELS, SKILLS
from qwen2vl.samples.fonts import typefaces
from qwen2vl.samples.held_out import Scored, evaluate, report
from qwen2vl.samples.skills import DATA_VERSION
from qwen2vl.weights import SINGLE_NAME

from .plan import SEED, Phase

Results = dict[str, Any]
#: The key of the file's header under which it says how it was made. It is older than the names of the folders here, and
#: stays, so that the embedded file need not be written again.
KEY = "qwen2vl.small"


@dataclass(frozen=True)
class Goal:
    """A figure that the training aims at.

    Attributes:
        value: calculates it from what :func:`qwen2vl.samples.held_out.report` gives.
        least: whether `wanted` is the least that is good; else it is the most.
    """

    name: str
    value: Callable[[Results], float]
    wanted: float
    least: bool = True

    def reached(self, results: Results) -> bool:
        value = self.value(results)
        return value >= self.wanted if self.least else value <= self.wanted


def mean(skill: str, difficulties: Sequence[int], score: str = "accuracy") -> Callable[[Results], float]:
    """Of a score over some difficulties of a skill."""
    return lambda results: _total(results, skill, difficulties, score) / _total(results, skill, difficulties, None)


def error_rate(skill: str, difficulties: Sequence[int]) -> Callable[[Results], float]:
    """All edits by all characters of some difficulties of a skill."""
    return lambda results: (
        _total(results, skill, difficulties, "edits") / _total(results, skill, difficulties, "characters")
    )


def behind(language: str, other: str) -> Callable[[Results], float]:
    """By how much less is right with prompts of a language than with those of another."""
    return lambda results: results["by_language"][other]["accuracy"] - results["by_language"][language]["accuracy"]


def _total(results: Results, skill: str, difficulties: Sequence[int], score: str | None) -> float:
    """The sum of a score over samples; None: their number."""
    rows = [results["by_difficulty"][f"{skill} {level}"] for level in difficulties]
    return sum((1 if score is None else row[score]) * row["samples"] for row in rows)


GOALS = (
    Goal("reading 1 to 4 characters, character error rate", error_rate("read", (0, 1, 2, 3)), 0.05, least=False),
    Goal("colour and shape, accuracy", mean("colour_shape", LEVELS), 0.97),
    Goal("counting 0 to 4, accuracy", mean("count", (0, 1, 2, 3)), 0.90),
    Goal("comparing two pictures, accuracy", mean("compare", LEVELS), 0.90),
    Goal("pointing, mean IoU", mean("point", LEVELS, "IoU"), 0.65),
    Goal("what happens in a video, accuracy", mean("video", LEVELS), 0.95),
    Goal("screen game, episodes won", mean("screen", LEVELS), 0.85),
    Goal("Chinese prompts behind English ones, accuracy", behind("zh", "en"), 0.03, least=False),
)


def measure(folder: Path, *, count: int, seed: int, processes: int) -> dict[str, Any]:
    """The report of `count` held-out samples of every skill and difficulty, weights and arithmetic in bfloat16."""
    jobs = [(str(folder), skill, level, count, seed) for level in reversed(LEVELS) for skill in reversed(list(SKILLS))]
    with ProcessPoolExecutor(processes, get_context("spawn"), initializer=_one_thread) as pool:
        scored = [one for found in pool.map(_measure, jobs) for one in found]
    return report(scored)


def _one_thread() -> None:
    torch.set_num_threads(1)


def _measure(job: tuple[str, str, int, int, int]) -> Sequence[Scored]:
    folder, skill, level, count, seed = job
    model = Qwen2VL.from_pretrained(folder, device="cpu", dtype="bfloat16")
    processor = Processor.from_pretrained(folder)
    return evaluate(model, processor, skills=(skill,), difficulties=(level,), count=count, seed=seed)


def ship(source: Path, folder: Path, facts: dict[str, Any]) -> None:
    """Write the model as bfloat16, with tokenizer and image settings, into `folder`; `facts` go into the header."""
    model = Qwen2VL.from_pretrained(source, device="cpu", dtype="bfloat16")
    model.save_pretrained(folder, metadata={KEY: json.dumps(facts, ensure_ascii=False)})
    Processor.from_pretrained(source).save_pretrained(folder)


def facts_of(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What :func:`ship` wrote about a model: the plan, its seed, budget and processes, the data's version, results."""
    with safe_open(Path(folder) / SINGLE_NAME, "pt") as file:
        return json.loads(file.metadata()[KEY])


def facts(
    phases: Sequence[Phase], results: Results, *, budget: float, processes: int, count: int, measured_seed: int
) -> dict[str, Any]:
    """What makes the file again, and what it is worth, for :func:`ship`. Steps of phases are those at a budget of 1."""
    return {
        "command": f"python -m examples.small --output DIR --budget {budget:g} --processes {processes} --count {count}",
        "budget": budget,
        "processes": processes,
        "count": count,
        "measured_seed": measured_seed,
        "seed": SEED,
        "data_version": DATA_VERSION,
        "typefaces": [face.name for face in typefaces()],
        "versions": {name: metadata.version(name) for name in ("qwen2vl", "torch", "pillow", "matplotlib")},
        "phases": [asdict(phase) for phase in phases],
        "goals": {
            goal.name: {"value": goal.value(results), "wanted": goal.wanted, "reached": goal.reached(results)}
            for goal in GOALS
        },
        "results": results,
    }


def table(told: dict[str, Any]) -> str:
    """The goals of such facts beside what was reached, and every skill by difficulty, as tables in Markdown."""
    lines = ["| held-out samples | reached | goal |", "|---|---|---|"]
    for goal in GOALS:
        found = told["goals"][goal.name]
        sign = "at least" if goal.least else "at most"
        missed = "" if found["reached"] else ", missed"
        lines.append(f"| {goal.name} | {found['value']:.1%} | {sign} {found['wanted']:.0%}{missed} |")
    lines += ["", f"| accuracy at difficulty | {' | '.join(map(str, LEVELS))} |", "|---" * (1 + len(LEVELS)) + "|"]
    for skill in SKILLS:
        rows = [told["results"]["by_difficulty"][f"{skill} {level}"] for level in LEVELS]
        lines.append(f"| {skill} | {' | '.join(format(row['accuracy'], '.0%') for row in rows)} |")
    languages = told["results"]["by_language"]
    lines += ["", "Accuracy by language: " + ", ".join(f"{k} {v['accuracy']:.1%}" for k, v in languages.items()) + "."]
    return "\n".join(lines)
