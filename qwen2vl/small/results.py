"""How well the small model does what it was trained for, and the file that is shipped, which says so in its header."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..evaluation.held_out import Scored, evaluate, report
from ..model import Qwen2VL
from ..processor import Processor
from ..synthetic import LEVELS, SKILLS
from ..synthetic.skills import DATA_VERSION
from ..weights import SINGLE_NAME
from .plan import SEED, Phase

#: Key of the header under which the file says how it was made.
KEY = "qwen2vl.small"


@dataclass(frozen=True)
class Goal:
    """A figure that the training aims at: the mean of a score over some difficulties of a skill.

    Attributes:
        least: whether `wanted` is the least that is good; else it is the most.
    """

    name: str
    skill: str
    difficulties: tuple[int, ...]
    score: str
    wanted: float
    least: bool = True

    def value(self, results: dict[str, Any]) -> float:
        """Of what :func:`qwen2vl.evaluation.held_out.report` gives."""
        rows = [results["by_difficulty"][f"{self.skill} {level}"] for level in self.difficulties]
        return sum(row[self.score] * row["samples"] for row in rows) / sum(row["samples"] for row in rows)

    def reached(self, results: dict[str, Any]) -> bool:
        value = self.value(results)
        return value >= self.wanted if self.least else value <= self.wanted


GOALS = (
    Goal("reading 1 to 4 characters, character error rate", "read", (0, 1, 2, 3), "CER", 0.05, least=False),
    Goal("colour and shape, accuracy", "colour_shape", LEVELS, "accuracy", 0.97),
    Goal("counting 0 to 4, accuracy", "count", (0, 1, 2, 3), "accuracy", 0.90),
    Goal("comparing two pictures, accuracy", "compare", LEVELS, "accuracy", 0.90),
    Goal("pointing, mean IoU", "point", LEVELS, "IoU", 0.65),
    Goal("what happens in a video, accuracy", "video", LEVELS, "accuracy", 0.95),
    Goal("screen game, episodes won", "screen", LEVELS, "accuracy", 0.85),
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


def facts(phases: Sequence[Phase], results: dict[str, Any], *, budget: float, processes: int) -> dict[str, Any]:
    """What makes the file again, and what it is worth, for :func:`ship`."""
    return {
        "command": f"python -m qwen2vl.small --budget {budget:g} --processes {processes}",
        "seed": SEED,
        "data_version": DATA_VERSION,
        "torch": torch.__version__,
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
