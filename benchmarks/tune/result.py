"""What a search found, as JSON with rows as every case has them, and as a table."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from qwen2vl_kernels._triton import Target

from .. import environment
from ..run import SCHEMA
from ..timing import ratio, spread
from .search import Trial, literal


def result(trials: Sequence[Trial], target: Target, device: torch.device, quick: bool, command: str) -> dict[str, Any]:
    """Everything measured so far.

    Beside what every case's result has: ``architecture``; ``subjects``, each with what ships, the best and how many
    candidates were timed, failed or left; ``groups``, each with the best for all its shapes; ``tables``, those of one
    chooser as the entry of its table; ``left``, the subjects of which nothing was measured.
    """
    timed = [trial for trial in trials if trial.finals]
    return {
        "schema": SCHEMA,
        "case": "tune",
        "summary": "Launch configurations: the best candidate beside the one that ships",
        "command": command,
        "quick": quick,
        **environment.describe(device),
        "architecture": f"{target.backend} {target.capability}",
        "ceilings": {},
        "gate": [_gate(trial) for trial in timed],
        "rows": [row for trial in timed for row in _rows(trial)],
        "skipped": _skipped(trials),
        "red": [],
        "subjects": [_subject(trial) for trial in trials if trial.rows],
        "groups": (found := groups(trials)),
        "tables": tables(found, target),
        "left": [trial.subject.name for trial in trials if not trial.finals],
    }


def write(found: dict[str, Any], path: Path) -> None:
    """Replace ``path`` as a whole: whoever is killed meanwhile leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def groups(trials: Iterable[Trial]) -> list[dict[str, Any]]:
    """By group, the candidate that is best for all shapes: least geometric mean of its time over each shape's best.

    Where bits depend on a field, its value is chosen first, by the best that each shape can do with it, for it has to
    serve all shapes; ``shapes`` names for each the fastest candidate, and the fastest one whose result has the very
    bits of the one for all, so may take its place there.
    """
    by_group: dict[str, list[Trial]] = {}
    for trial in trials:
        if any("median" in row for row in trial.rows):
            by_group.setdefault(trial.subject.group, []).append(trial)
    return [_group(name, members) for name, members in by_group.items()]


def _group(name: str, members: Sequence[Trial]) -> dict[str, Any]:
    subject = members[0].subject
    times = [{row["literal"]: row for row in trial.rows if "median" in row} for trial in members]
    least = [min(row["median"] for row in shape.values()) for shape in times]
    common = [text for text in times[0] if all(text in shape for shape in times)]
    fixed = {}
    for field in subject.fixed:
        values = {times[0][text]["fields"][field] for text in common}

        def cost(value: int, field: str = field) -> float:
            best = [min(r["median"] for r in shape.values() if r["fields"][field] == value) for shape in times]
            return _mean(best, least)

        if values:
            fixed[field] = min(values, key=cost)
    allowed = [t for t in common if all(times[0][t]["fields"][f] == value for f, value in fixed.items())]
    if not allowed:
        return {"group": name, "best": None, "why": "no candidate was timed at every shape"}
    best = min(allowed, key=lambda text: _mean([shape[text]["median"] for shape in times], least))
    ships = [literal(trial.shipped) for trial in members]  # shorter segments may have another
    shapes = {}
    for trial, shape in zip(members, times, strict=True):
        alike = [text for text, row in shape.items() if row["bits"] == shape[best]["bits"]]
        shapes[trial.subject.shape] = {
            "ships": literal(trial.shipped),
            "fastest": (fastest := min(shape, key=lambda text: shape[text]["median"])),
            "fastest_s": shape[fastest]["median"],
            "best_s": shape[best]["median"],
            "same_bits": (same := min(alike, key=lambda text: shape[text]["median"])),
            "same_bits_s": shape[same]["median"],
        }
    found = {
        "group": name,
        "function": f"{subject.module.__name__}.{subject.function}",
        "best": best,
        "fixed": fixed,
        "shapes": shapes,
    }
    if all(text in shape for text, shape in zip(ships, times, strict=True)):
        shipped = [shape[text]["median"] for text, shape in zip(ships, times, strict=True)]
        found["gain"] = _mean(shipped, [shape[best]["median"] for shape in times])
    if subject.columns is not None:
        found |= {"columns": subject.columns, "place": subject.place or 0}
    return found


def tables(groups: Iterable[dict[str, Any]], target: Target) -> dict[str, str]:
    """By chooser, the best of heads by width as a line of its table of architectures.

    A width of which a pass is missing is left out, as half an entry cannot be written in.
    """
    known: dict[str, dict[int, dict[int, str]]] = {}
    for group in groups:
        if "columns" in group:
            by_width = known.setdefault(group["function"], {})
            by_width.setdefault(group["columns"], {})[group["place"]] = group["best"]
    architecture = target.capability if target.backend == "cuda" else 0
    lines = {}
    for function, by_width in known.items():
        whole = max(map(len, by_width.values()))
        entries = [
            f"({columns}, {', '.join(places[place] for place in sorted(places))})"
            for columns, places in sorted(by_width.items())
            if len(places) == whole
        ]
        lines[function] = f"{architecture}: ({', '.join(entries)},),"
    return lines


def _mean(times: Sequence[float], others: Sequence[float]) -> float:
    """The geometric mean of quotients."""
    return math.exp(statistics.fmean(math.log(a / b) for a, b in zip(times, others, strict=True)))


def _best(trial: Trial) -> str:
    return min(trial.finals, key=lambda text: statistics.median(trial.finals[text]))


def _subject(trial: Trial) -> dict[str, Any]:
    """In the numbers of the last comparison, where all took turns."""
    failed = [row for row in trial.rows if "failed" in row]
    told = {
        "subject": trial.subject.name,
        "ships": literal(trial.shipped),
        "timed": len(trial.rows) - len(failed),
        "failed": [{"literal": row["literal"], "failed": row["failed"], "why": row["why"]} for row in failed],
        "left": trial.left,
    }
    if trial.finals:
        told |= {"best": (best := _best(trial)), "best_s": spread(trial.finals[best])}
        if (ships := literal(trial.shipped)) in trial.finals:
            told |= {"ships_s": spread(trial.finals[ships])}
    return told


def _rows(trial: Trial) -> list[dict[str, Any]]:
    best, ships = _best(trial), literal(trial.shipped)
    rows = []
    for text in dict.fromkeys((ships, best)):
        if (samples := trial.finals.get(text)) is not None:
            others = {f"ships, {ships}": trial.finals[ships]} if text != ships and ships in trial.finals else {}
            rows.append({
                "workload": trial.subject.name, "provider": f"ships, {ships}" if text == ships else text,
                "peer": text == ships, "metric": "time", "unit": "s", **spread(samples),
                "ratios": {name: ratio(theirs, samples) for name, theirs in others.items()},
            })  # fmt: skip
    return rows


def _gate(trial: Trial) -> dict[str, Any]:
    row = next(row for row in trial.rows if row["literal"] == _best(trial))
    return {**row["check"], "name": f"{trial.subject.name}, {row['literal']}: {row['check']['name']}"}


def _skipped(trials: Iterable[Trial]) -> list[dict[str, str]]:
    told = []
    for trial in trials:
        reasons = [(row["literal"], f"{row['failed']}: {row['why']}") for row in trial.rows if "failed" in row]
        reasons += [(f"{trial.left} candidates", "the limit came first")] if trial.left else []
        told += [{"workload": trial.subject.name, "provider": what, "reason": why} for what, why in reasons]
    return told


def show(found: dict[str, Any], console: Console) -> None:
    """A row a subject, then what each group's configuration should be."""
    table = Table(title=f"Launch configurations on {found['device']}, {found['architecture']}")
    for heading in ("subject", "ships", "time", "best", "time", "gain", "failed"):
        table.add_column(heading, justify="right" if heading in ("time", "gain") else "left")
    for s in found["subjects"]:
        ships, best = s.get("ships_s"), s.get("best_s")
        kinds = [failure["failed"] for failure in s["failed"]]
        table.add_row(
            s["subject"],
            s["ships"],
            _time(ships) if ships else "not timed",
            s.get("best", ""),
            _time(best) if best else "",
            f"{ships['median'] / best['median']:.2f}x" if ships and best else "",
            ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds)),
        )
    console.print(table)
    for g in found["groups"]:
        if g["best"] is None:
            console.print(f"{g['group']}: {g['why']}", markup=False)
            continue
        gain = f"{g['gain']:.2f}x what ships" if "gain" in g else "what ships was not timed at every shape"
        one = "".join(f", one {field} for all shapes: {value}" for field, value in g["fixed"].items())
        console.print(f"{g['group']}: {g['best']}: {gain}{one}", markup=False, soft_wrap=True)
    for function, line in found["tables"].items():
        console.print(f"{function}:\n    {line}", markup=False, soft_wrap=True)
    if found["left"]:
        console.print(f"not measured: {', '.join(found['left'])}", style="yellow", markup=False, soft_wrap=True)


def _time(samples: dict[str, Any]) -> str:
    return f"{1e6 * samples['median']:.1f} us ({1e6 * samples['min']:.1f} .. {1e6 * samples['max']:.1f})"
