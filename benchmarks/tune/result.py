"""What a search found, as JSON with rows as every case has them, and as a table."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from qwen2vl_kernels.core.launching import Target

from .. import environment
from ..run import SCHEMA
from ..timing import ratio, spread
from .verdict import Trial, by_group, verdict, whole


def result(trials: Sequence[Trial], target: Target, device: torch.device, quick: bool, command: str) -> dict[str, Any]:
    """Everything measured so far.

    Beside what every case's result has: ``architecture``; ``subjects``, each with what ships, the best and how many
    candidates were timed, failed or left; ``groups``, each with the verdict for all its shapes; ``tables``, those
    of one chooser as the entry of its table; ``left``, the subjects without a verdict.
    """
    timed = [trial for trial in whole(trials) if trial.finals]
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
        "groups": (found := [verdict(*g) for g in by_group(trials).items() if any(t.rows for t in g[1])]),
        "tables": tables(found, target),
        "left": [trial.subject.name for trial in trials if trial not in timed],
    }


def write(found: dict[str, Any], path: Path) -> None:
    """Replace ``path`` as a whole: whoever is killed meanwhile leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def tables(groups: Iterable[dict[str, Any]], target: Target) -> dict[str, str]:
    """By chooser, the best of heads by width as a line of its table of architectures.

    A width of which a pass is missing is left out, as half an entry cannot be written in. A comment says which widths
    do not come from all shapes.
    """
    known: dict[str, dict[int, dict[int, str]]] = {}
    partial: dict[str, list[str]] = {}
    for group in groups:
        if "columns" in group and group["best"] is not None:
            by_width = known.setdefault(group["function"], {})
            by_width.setdefault(group["columns"], {})[group["place"]] = group["best"]
            count, _, of, _ = group["from"].split()
            if count != of:
                partial.setdefault(group["function"], []).append(f"{group['columns']} from {group['from']}")
    architecture = target.capability if target.backend == "cuda" else 0
    lines = {}
    for function, by_width in known.items():
        whole = max(map(len, by_width.values()))
        entries = [
            f"({columns}, {', '.join(places[place] for place in sorted(places))})"
            for columns, places in sorted(by_width.items())
            if len(places) == whole
        ]
        comment = f"  # {', '.join(dict.fromkeys(partial[function]))}" if function in partial else ""
        lines[function] = f"{architecture}: ({', '.join(entries)},),{comment}"
    return lines


def _best(trial: Trial) -> str:
    return min(trial.finals, key=lambda text: statistics.median(trial.finals[text]))


def _subject(trial: Trial) -> dict[str, Any]:
    """In the numbers of the last comparison, where all took turns."""
    failed = [row for row in trial.rows if "failed" in row]
    told = {
        "subject": trial.subject.name,
        "ships": trial.ships,
        "timed": len(trial.rows) - len(failed),
        "failed": [{"literal": row["literal"], "failed": row["failed"], "why": row["why"]} for row in failed],
        "left": trial.left,
    }
    if trial.again:
        first = next(row["samples"] for row in trial.rows if row["literal"] == trial.ships)
        told["drift"] = statistics.median(trial.again) / statistics.median(first)  # of the machine, in the first pass
    if trial.broken is not None:
        told["broken"] = trial.broken
    if trial.finals and not trial.left:
        told |= {"best": (best := _best(trial)), "best_s": spread(trial.finals[best])}
        if (ships := trial.ships) in trial.finals:
            told |= {"ships_s": spread(trial.finals[ships])}
    return told


def _rows(trial: Trial) -> list[dict[str, Any]]:
    best, ships = _best(trial), trial.ships
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
        reasons += [("the best", trial.broken)] if trial.broken is not None else []
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
    for s in found["subjects"]:
        if s["left"]:
            looked = s["timed"] + len(s["failed"])
            told = f"{s['subject']}: the limit came after {looked} of {looked + s['left']} candidates: no verdict"
            console.print(told, style="yellow", markup=False, soft_wrap=True)
    for g in found["groups"]:
        if "candidate" not in g:
            console.print(f"{g['group']}: {g['why']}", markup=False)
            continue
        gain = f" is {g['gain']:.2f}x what ships (rounds within {g['spread']:.2f})" if "gain" in g else ""
        one = "".join(f", one {field} for all shapes: {value}" for field, value in g["fixed"].items())
        does = "change to it" if g["changes"] else "keep what ships"
        told = f"{g['group']}, from {g['from']}: {g['candidate']}{gain}: {does}, {g['why']}{one}"
        console.print(told, markup=False, soft_wrap=True)
    for function, line in found["tables"].items():
        console.print(f"{function}:\n    {line}", markup=False, soft_wrap=True)
    if found["left"]:
        console.print(f"not measured: {', '.join(found['left'])}", style="yellow", markup=False, soft_wrap=True)


def _time(samples: dict[str, Any]) -> str:
    return f"{1e6 * samples['median']:.1f} us ({1e6 * samples['min']:.1f} .. {1e6 * samples['max']:.1f})"
