"""Train and score all models of all ablations, each in a process of its own; the result as JSON and tables."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import environment
from benchmarks.case import Check
from benchmarks.lines import SCHEMA
from benchmarks.report import footer
from benchmarks.run import GateError
from benchmarks.timing import spread
from examples.small import shape as small
from qwen2vl.samples.draws import UNIT

from .model import BATCH, Job, Outcome, Scores, train_and_score
from .plan import ABLATIONS

SUMMARY = "Two ablations of the paper, each model a tiny one trained from nothing on generated samples"
DEPTH, LAYERS = 2, 3  # blocks of the tower, layers of the language model
#: Pictures keep their size from 56 x 56 pixels on, which is what arms differ in.
LIMITS = {**small.LIMITS, "min_pixels": 4 * UNIT * UNIT}


def measure(
    *,
    budget: float = 1.0,
    processes: int = 2,
    seeds: int = 1,
    quick: bool = False,
    command: str = "",
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Train and score every model; returns what goes into the JSON.

    Args:
        budget: a factor on the numbers of steps.
        processes: how many processes train at a time, each one model on one thread.
        seeds: how many models each arm has; they differ in the weights that they begin from and in their samples.
        quick: take a few steps and samples, to see that it works.
        command: the command line that the result quotes.
        log: called with a line for every model that is done.

    Raises:
        GateError: models to be compared did not begin from equal weights or did not see equal samples.
    """
    jobs: list[Job] = []
    with tempfile.TemporaryDirectory(prefix="qwen2vl-ablation-") as folder:
        for seed in range(1, seeds + 1):
            small.write_beginning(Path(folder) / str(seed), seed=seed, depth=DEPTH, layers=LAYERS, limits=LIMITS)
        for a, ablation in enumerate(ABLATIONS):
            steps = 3 if quick else max(1, round(budget * ablation.steps))
            count = 4 if quick else ablation.count
            for seed in range(1, seeds + 1):
                jobs += [Job(a, n, seed, f"{folder}/{seed}", steps, count) for n in range(len(ablation.arms))]
        jobs.sort(key=lambda job: -job.steps)  # the shortest last: no process then waits for a long one
        outcomes: list[Outcome] = []
        # Fresh interpreters: a fork would share the threads and the GPU of this one.
        with ProcessPoolExecutor(min(processes, len(jobs)), mp_context=get_context("spawn")) as pool:
            for job, outcome in zip(jobs, pool.map(train_and_score, jobs), strict=True):
                arm = ABLATIONS[job.ablation].arms[job.arm]
                log(f"{arm.name}, seed {job.seed}: {job.steps} steps in {outcome.seconds:.0f} s")
                outcomes.append(outcome)
    done = dict(zip(jobs, outcomes, strict=True))
    checks = [check for n in range(len(ABLATIONS)) for check in _equal(n, done)]
    if not all(check.passed for check in checks):
        raise GateError("ablation", checks)
    return {
        "schema": SCHEMA,
        "case": "ablation",
        "summary": SUMMARY,
        "command": command,
        "quick": quick,
        **environment.describe(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "ceilings": {},
        "gate": [{"name": c.name, "error": c.error, "allowed": c.allowed} for c in checks],
        "rows": [row for n in range(len(ABLATIONS)) for row in _rows(n, done)],
        "skipped": [],
        "models": [_model(job, outcome) for job, outcome in done.items()],
    }


def _equal(number: int, done: Mapping[Job, Outcome]) -> list[Check]:
    """Checks that all models of an ablation and seed began from the same weights and saw the same samples."""
    ablation = ABLATIONS[number]
    checks = []
    for seed in sorted({job.seed for job in done}):
        of = [outcome for job, outcome in done.items() if job.ablation == number and job.seed == seed]
        for what, values in (("weights to begin from", {o.begun for o in of}), ("samples", {o.seen for o in of})):
            name = f"{ablation.title}, seed {seed}: the same {what}"
            checks.append(Check(name, float(len(values) - 1), 0.0))
    return checks


def _rows(number: int, done: Mapping[Job, Outcome]) -> Iterator[dict[str, Any]]:
    """A row for every class of samples, measure and arm, whose `samples` has a value for every seed."""
    ablation = ABLATIONS[number]
    arms = range(len(ablation.arms))
    by_arm = [[o for job, o in done.items() if (job.ablation, job.arm) == (number, n)] for n in arms]
    first = by_arm[0][0].scores
    names = sorted(first, key=lambda name: _place(first[name]))
    for metric, measure in (("accuracy", "exact"), ("tokens right", "right")):
        for name in names:
            for arm, outcomes in zip(ablation.arms, by_arm, strict=True):
                scores = [outcome.scores[name] for outcome in outcomes]
                yield {
                    "workload": name,
                    "provider": arm.name,
                    "peer": arm.peer,
                    "metric": metric,
                    "unit": "%",
                    **spread([100 * getattr(one, measure) for one in scores]),
                    "ratios": {},
                    **scores[0].facts,
                    "questions": scores[0].samples,
                    "vision_tokens": scores[0].tokens,
                }


def _place(scores: Scores) -> int:
    """The place of a class among the rows: by frames or by pixels, and the class of all samples last."""
    width, height = scores.facts.get("pixels", (1 << 20, 1))
    return scores.facts.get("frames", width * height)


def _model(job: Job, outcome: Outcome) -> dict[str, Any]:
    ablation = ABLATIONS[job.ablation]
    return {
        "ablation": ablation.title,
        "provider": ablation.arms[job.arm].name,
        "seed": job.seed,
        "parameters": outcome.parameters,
        "steps": job.steps,
        "samples": job.steps * BATCH,
        "seconds": outcome.seconds,
        "losses": outcome.losses,
    }


def show(result: dict[str, Any], console: Console) -> None:
    """Print a table for each ablation: the share of answers right in full, and the mean number of vision tokens."""
    for ablation in ABLATIONS:
        names = [arm.name for arm in ablation.arms]
        rows = [r for r in result["rows"] if r["provider"] in names and r["metric"] == "accuracy"]
        table = Table(title=ablation.title, caption="% of answers right in full (mean number of vision tokens)")
        for column in ("", "questions", *names):
            table.add_column(column, justify="right" if column else "left")
        for workload in dict.fromkeys(row["workload"] for row in rows):
            of = {row["provider"]: row for row in rows if row["workload"] == workload}
            cells = [f"{of[name]['median']:.1f} ({of[name]['vision_tokens']:.1f})" for name in names]
            table.add_row(workload, str(of[names[0]]["questions"]), *cells)
        console.print(table)
    console.print(footer(result))
