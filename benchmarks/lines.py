"""What a run writes as it goes: a JSON line for everything that is done; and the results file made of the lines.

A killed run leaves its lines, of which the same file is made: it says what is missing. The kinds of lines, in order:

- ``plan``: where and how it is measured, names of all workloads and of those to come last, ceilings of the machine.
- ``gate``: the checks of the case's own gate.
- ``workload``: one that was measured: what it declares, providers, checks, samples.
- ``failed``: one that was not, or the case's gate (``workload`` is null): ``kind`` is ``red`` or ``ended``.
- ``ceilings``: those after the workloads; the better ones count.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .timing import floor_s, ratio, spread

SCHEMA = 1

Line = dict[str, Any]

_FIRST = ("first_call_s", "first_call_compiled", "another_shape_s", "another_shape_compiled")


def read(path: Path) -> list[Line]:
    """The lines of a run. The last may be torn, as the run was killed while writing it.

    Raises ``ValueError`` where another line is no JSON, or the plan is not there.
    """
    found = []
    texts = path.read_text(encoding="utf-8").splitlines()
    for n, text in enumerate(texts):
        try:
            found.append(json.loads(text))
        except json.JSONDecodeError as error:
            if n + 1 < len(texts):
                raise ValueError(f"{path}, line {n + 1}: {error}") from error
    if not found or found[0].get("line") != "plan":
        raise ValueError(f"{path}: its first line is no plan, so that nothing tells what was measured")
    return found


def append(line: Line, path: Path) -> None:
    """Write one line behind the others, so that whatever ends the run later leaves it."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def write(result: Mapping[str, Any], out: Path) -> Path:
    """Write a result to ``out/<case>.json``."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{result['case']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return path


def assemble(lines: Sequence[Line]) -> dict[str, Any]:
    """The result of a run, which is what goes into its JSON.

    ``skipped`` names who was not measured, and why, with the end of what a process said that ended early; ``red`` what
    makes the exit status 1; ``missing`` the workloads that the run did not come to.
    """
    plan = lines[0]
    kinds: dict[str, list[Line]] = {}
    for line in lines[1:]:
        kinds.setdefault(line["line"], []).append(line)
    measured, failed = kinds.get("workload", []), kinds.get("failed", [])
    ceilings = _best([plan["ceilings"], *(line["ceilings"] for line in kinds.get("ceilings", []))])
    result = {key: value for key, value in plan.items() if key not in ("line", "workloads", "late", "ceilings")}
    result["ceilings"] = ceilings
    result["gate"] = [check for line in [*kinds.get("gate", []), *measured] for check in line["checks"]]
    result["rows"] = [row for line in measured for row in _rows(line, ceilings)]
    result["skipped"] = [
        {"workload": line["workload"], "provider": provider["name"], "reason": provider["skipped"]}
        for line in measured
        for provider in line["providers"]
        if provider.get("skipped") is not None
    ]
    for line in failed:
        told = {"stderr": line["stderr"]} if line.get("stderr") else {}
        where = "all" if line["workload"] is None else line["workload"]
        result["skipped"].append({"workload": where, "provider": "all", "reason": line["reason"], **told})
    result["red"] = [line["message"] for line in failed]
    result["red"] += [failure for line in measured for failure in line.get("failures", ())]
    done = {line["workload"] for line in [*measured, *failed]}
    result["missing"] = [] if None in done else [name for name in plan["workloads"] if name not in done]
    return result


def _best(several: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The highest value of each ceiling, which is what can be reached."""
    given = [ceilings for ceilings in several if ceilings]
    if not given:
        return {}
    rates: dict[str, float] = {}
    for ceilings in given:
        for dtype, rate in ceilings["matmul_flops_per_s"].items():
            rates[dtype] = max(rate, rates.get(dtype, 0.0))
    return {"copy_bytes_per_s": max(c["copy_bytes_per_s"] for c in given), "matmul_flops_per_s": rates}


def _rows(line: Line, ceilings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row a provider and metric; ``ratios`` holds peer / this for every peer."""
    declared, samples = line["declared"], line["samples"]
    peers = [provider["name"] for provider in line["providers"] if provider["peer"]]
    floor = floor_s(ceilings, declared["flops"], declared["bytes"], declared["dtype"])
    rows = []
    for metric in dict.fromkeys(metric for by_metric in samples.values() for metric in by_metric):
        unit = "s" if declared["units"] is None else declared["units"][metric]
        for provider in line["providers"]:
            values = samples.get(provider["name"], {}).get(metric)
            if values is None:
                continue
            row: dict[str, Any] = {
                "workload": line["workload"],
                "provider": provider["name"],
                "peer": provider["peer"],
                "metric": metric,
                "unit": unit,
                **spread(values),
                "ratios": {
                    peer: ratio(theirs, values)
                    for peer in peers
                    if peer != provider["name"] and (theirs := samples.get(peer, {}).get(metric))
                    if any(theirs) and any(values)  # nothing is no part of something
                },
            }
            row |= {key: provider[key] for key in _FIRST if key in provider}
            if declared["series"] is not None:
                row |= {"series": declared["series"], "size": declared["size"]}
            if declared["units"] is None:
                row.update(_rates(declared, row["median"], floor))
            rows.append(row)
    return rows


def _rates(declared: Mapping[str, Any], seconds: float, floor: tuple[float, str] | None) -> dict[str, Any]:
    rates: dict[str, Any] = {}
    if declared["unit"] is not None:
        rates |= {"unit_of_work": declared["unit"], "units_per_s": 1 / seconds}
    if declared["flops"]:
        rates |= {"flops": declared["flops"], "flops_per_s": declared["flops"] / seconds}
    if declared["bytes"]:
        rates |= {"bytes": declared["bytes"], "bytes_per_s": declared["bytes"] / seconds}
    if floor is not None and math.isfinite(seconds):
        rates |= {"ceiling": floor[1], "of_ceiling": floor[0] / seconds}
    return rates
