"""Run a case: gate, ceilings, interleaved rounds, then rows with spread, rates and ratios."""

from __future__ import annotations

import importlib
import json
import math
import pkgutil
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from . import cases, environment
from .case import Case, Check, Context, Workload
from .timing import Ceilings, Clock, Samples, measure, ratio, spread

SCHEMA = 1
RESULTS = Path(__file__).resolve().parent / "results"


class GateError(RuntimeError):
    """A parity check is red: what it stands for is not timed."""

    def __init__(self, case: str, checks: Sequence[Check]) -> None:
        lines = [f"  {c.name}: error {c.error:.3g}, allowed {c.allowed:.3g}" for c in checks if not c.passed]
        super().__init__(f"{case}: the parity gate is red, nothing was timed\n" + "\n".join(lines))


def case_names() -> list[str]:
    """Every module of ``benchmarks.cases`` that does not begin with an underscore."""
    return sorted(m.name for m in pkgutil.iter_modules(cases.__path__) if not m.name.startswith("_"))


def load_case(name: str) -> Case:
    """The case called ``name``. Raises ``ValueError`` with the names there are."""
    if name not in case_names():
        raise ValueError(f"case: {name!r} is unknown; the cases are {', '.join(case_names())}")
    return importlib.import_module(f"{cases.__name__}.{name}").CASE


def run_case(
    case: Case, context: Context, command: str = "", log: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Measure ``case``; the result is what goes into its JSON. ``log`` gets a line a provider as it is measured.

    A workload whose gate is red is not timed: it is among the ``"skipped"`` ones, and ``"red"`` says what was wrong.

    Raises :class:`GateError` if the case's own gate is red, and ``ValueError`` for a workload that no gate covers.
    """
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "case": case.name,
        "summary": case.summary,
        "command": command,
        "quick": context.quick,
        **environment.describe(context.device),
    }
    with torch.inference_mode():
        checks = _green(case.name, case.gate(context) if case.gate is not None else [])
        clock = Clock(context.device)
        ceilings = Ceilings(clock, context.quick)
        measured: list[tuple[Workload, Samples]] = []
        red: list[tuple[str, GateError]] = []
        dtypes: set[torch.dtype] = set()
        for workload in case.workloads(context):
            if workload.gate is None and case.gate is None:
                raise ValueError(f"{case.name}, {workload.name}: has no parity gate")
            try:
                checks += _green(f"{case.name}, {workload.name}", _workload_checks(workload))
            except GateError as error:
                red.append((workload.name, error))
                log(str(error))
                del workload
                continue
            if new := _wanted_ceilings(workload) - dtypes:
                ceilings.update(sorted(new, key=str))
                dtypes |= new
            rounds = context.rounds or (2 if context.quick else None)
            samples = measure(workload, clock, rounds)
            for provider, by_metric in samples.items():
                log(f"{workload.name}, {provider}: " + ", ".join(map(_brief, by_metric.items())))
            measured.append((_without_calls(workload), samples))
            del workload  # its inputs, before the case makes the next ones
        if dtypes:
            ceilings.update(sorted(dtypes, key=str))
    result["ceilings"] = ceilings.as_json() if dtypes else {}
    result["gate"] = [{"name": c.name, "error": c.error, "allowed": c.allowed} for c in checks]
    result["rows"] = [row for workload, samples in measured for row in _rows(workload, samples, ceilings)]
    result["skipped"] = [
        {"workload": workload.name, "provider": provider.name, "reason": provider.skipped}
        for workload, _ in measured
        for provider in workload.providers
        if provider.skipped is not None
    ] + [{"workload": name, "provider": "all", "reason": "the parity gate is red"} for name, _ in red]
    result["red"] = [str(error) for _, error in red]
    return result


def write(result: dict[str, Any], out: Path) -> Path:
    """Write a result to ``out/<case>.json``."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{result['case']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return path


def _green(where: str, checks: Sequence[Check]) -> list[Check]:
    if any(not check.passed for check in checks):
        raise GateError(where, checks)
    return list(checks)


def _workload_checks(workload: Workload) -> Sequence[Check]:
    if workload.gate is None:
        return []
    outputs = {}
    for provider in workload.providers:
        if provider.call is not None:
            if provider.before is not None:
                provider.before()
            outputs[provider.name] = provider.call()
    checks = workload.gate(outputs)
    if not checks:
        raise ValueError(f"{workload.name}: the gate checked nothing")
    return [Check(f"{workload.name}: {c.name}", c.error, c.allowed) for c in checks]


def _wanted_ceilings(workload: Workload) -> set[torch.dtype]:
    return {workload.dtype} if workload.flops or workload.bytes else set()


def _brief(metric: tuple[str, list[float]]) -> str:
    name, values = metric
    return f"{name} {statistics.median(values):.4g} ({min(values):.4g} .. {max(values):.4g})"


def _without_calls(workload: Workload) -> Workload:
    """The declaration alone: calls hold on to inputs and models, whose memory the next workload needs."""
    bare = [replace(p, call=None if p.call is None else _nothing, before=None, warm=None) for p in workload.providers]
    return replace(workload, providers=bare, gate=None)


def _nothing() -> None:
    return None


def _rows(workload: Workload, samples: Samples, ceilings: Ceilings) -> list[dict[str, Any]]:
    """One row a provider and metric; ``ratios`` holds peer / this for every peer."""
    peers = [provider.name for provider in workload.providers if provider.peer]
    floor = ceilings.floor_s(workload.flops, workload.bytes, workload.dtype)
    rows = []
    for metric in dict.fromkeys(metric for by_metric in samples.values() for metric in by_metric):
        unit = "s" if workload.units is None else workload.units[metric]
        for provider in workload.providers:
            values = samples.get(provider.name, {}).get(metric)
            if values is None:
                continue
            row: dict[str, Any] = {
                "workload": workload.name,
                "provider": provider.name,
                "peer": provider.peer,
                "metric": metric,
                "unit": unit,
                **spread(values),
                "ratios": {
                    peer: ratio(theirs, values)
                    for peer in peers
                    if peer != provider.name and (theirs := samples.get(peer, {}).get(metric))
                    if any(theirs) and any(values)  # nothing is no part of something
                },
            }
            if workload.series is not None:
                row |= {"series": workload.series, "size": workload.size}
            if workload.units is None:
                row.update(_rates(workload, row["median"], floor))
            rows.append(row)
    return rows


def _rates(workload: Workload, seconds: float, floor: tuple[float, str] | None) -> dict[str, Any]:
    rates: dict[str, Any] = {}
    if workload.unit is not None:
        rates |= {"unit_of_work": workload.unit, "units_per_s": 1 / seconds}
    if workload.flops:
        rates |= {"flops": workload.flops, "flops_per_s": workload.flops / seconds}
    if workload.bytes:
        rates |= {"bytes": workload.bytes, "bytes_per_s": workload.bytes / seconds}
    if floor is not None and math.isfinite(seconds):
        rates |= {"ceiling": floor[1], "of_ceiling": floor[0] / seconds}
    return rates
