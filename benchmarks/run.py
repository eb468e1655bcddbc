"""Measure a case: gates, first calls, interleaved rounds; a line for each workload, as ``lines`` describes them.

``isolate`` calls these in processes of their own; :func:`run_case` calls them all in this one.
"""

from __future__ import annotations

import importlib
import pkgutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from . import cases, environment
from .case import Case, Check, Context, Provider, Skip, Workload
from .lines import SCHEMA, Line, assemble
from .timing import Ceilings, Clock, dtype_name, measure

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
    """The case called ``name``; one with a dot is a module anywhere, which holds a ``CASE`` too.

    Raises ``ValueError`` with the names there are.
    """
    if "." in name:
        return importlib.import_module(name).CASE
    if name not in case_names():
        raise ValueError(f"case: {name!r} is unknown; the cases are {', '.join(case_names())}")
    return importlib.import_module(f"{cases.__name__}.{name}").CASE


def run_case(
    case: Case, context: Context, command: str = "", log: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Measure ``case`` in this process; the result is what goes into its JSON. ``log`` gets a line a provider.

    A workload whose gate is red is not timed: it is among the ``"skipped"`` ones, and ``"red"`` says what was wrong.

    Raises :class:`GateError` if the case's own gate is red, and ``ValueError`` for a workload that no gate covers.
    """
    own = gate(case, context)  # before anything is made
    lines = [plan(case, context, command), own]
    with torch.inference_mode():
        for workload in case.workloads(context):
            try:
                lines.append(measured(case, workload, context))
                for text in brief(lines[-1]):
                    log(text)
            except GateError as error:
                lines.append(red(workload.name, error))
                log(str(error))
            del workload  # its inputs, before the case makes the next ones
    return assemble([*lines, again(lines[0], context)])


def plan(case: Case, context: Context, command: str) -> Line:
    """Where and how ``case`` is measured, its workloads' names, and the ceilings of the products they want."""
    dtypes: set[torch.dtype] = set()
    names = []
    with torch.inference_mode():
        for workload in case.workloads(context):
            names.append(workload.name)
            if workload.flops or workload.bytes:
                dtypes.add(workload.dtype)
            del workload
    if len(set(names)) < len(names):
        raise ValueError(f"{case.name}: names of workloads must be unique, got {names}")
    return {
        "line": "plan",
        "schema": SCHEMA,
        "case": case.name,
        "summary": case.summary,
        "command": command,
        "quick": context.quick,
        **environment.describe(context.device),
        "workloads": names,
        "ceilings": _ceilings(context, dtypes),
    }


def again(plan: Line, context: Context) -> Line:
    """The ceilings that ``plan`` holds, measured after the workloads."""
    dtypes = {getattr(torch, name) for name in plan["ceilings"].get("matmul_flops_per_s", {})}
    return {"line": "ceilings", "ceilings": _ceilings(context, dtypes)}


def gate(case: Case, context: Context) -> Line:
    """Hold the case to its own gate. Raises :class:`GateError` where it is red."""
    with torch.inference_mode():
        return {"line": "gate", "checks": _green(case.name, case.gate(context) if case.gate is not None else [])}


def nth(case: Case, index: int, context: Context) -> Line:
    """Measure the workload of ``case`` at ``index``; those before it are declared and left alone."""
    workloads = case.workloads(context)  # kept until the end, when it puts right what it changed
    with torch.inference_mode():
        return measured(case, next(islice(workloads, index, None)), context)


def measured(case: Case, workload: Workload, context: Context) -> Line:
    """First calls, gate, rounds. Raises :class:`GateError` for a red gate, ``ValueError`` for none at all."""
    if workload.gate is None and case.gate is None:
        raise ValueError(f"{case.name}, {workload.name}: has no parity gate")
    clock = Clock(context.device)
    workload, outputs, first = _first_calls(workload, clock)
    checks = _green(f"{case.name}, {workload.name}", _workload_checks(workload, outputs))
    del outputs
    other: Mapping[str, float] = {}
    if workload.another is not None:
        running = {provider.name for provider in workload.providers if provider.call is not None}
        second = workload.another()
        second = replace(second, providers=[p for p in second.providers if p.name in running])
        other = _first_calls(second, clock)[2]
        del second
    samples = measure(workload, clock, context.rounds or (2 if context.quick else None), first)
    return {
        "line": "workload",
        "workload": workload.name,
        "declared": {
            "flops": workload.flops,
            "bytes": workload.bytes,
            "dtype": dtype_name(workload.dtype),
            "unit": workload.unit,
            "units": None if workload.units is None else dict(workload.units),
            "series": workload.series,
            "size": workload.size,
        },
        "providers": [
            {"name": p.name, "peer": p.peer}
            | ({"skipped": p.skipped} if p.skipped is not None else {})
            | ({"first_call_s": first[p.name]} if p.name in first else {})
            | ({"another_shape_s": other[p.name]} if p.name in other else {})
            for p in workload.providers
        ],
        "checks": checks,
        "samples": samples,
    }


def red(workload: str | None, error: GateError) -> Line:
    """The line of a workload, or of the case, whose gate is red."""
    return {
        "line": "failed",
        "kind": "red",
        "workload": workload,
        "reason": "the parity gate is red",
        "message": str(error),
    }


def brief(line: Line) -> list[str]:
    """What a terminal shows of a measured workload, a line a provider."""
    return [
        f"{line['workload']}, {provider}: " + ", ".join(map(_brief, by_metric.items()))
        for provider, by_metric in line["samples"].items()
    ]


def _brief(metric: tuple[str, list[float]]) -> str:
    name, values = metric
    return f"{name} {statistics.median(values):.4g} ({min(values):.4g} .. {max(values):.4g})"


def _first_calls(workload: Workload, clock: Clock) -> tuple[Workload, dict[str, Any], dict[str, float]]:
    """Make every provider and call it once, where the gate wants its result or the call is what is timed.

    Returns the workload with the providers that run or say why not, outputs and seconds by their names.
    """
    outputs, seconds, ready = {}, {}, []
    for provider in workload.providers:
        try:
            made = provider.ready()
            timed = workload.units is None and made.warm is None
            if made.call is not None and (workload.gate is not None or timed):
                if made.before is not None:
                    made.before()
                seconds[made.name], output = clock.first(made.call)
                if workload.gate is not None:
                    outputs[made.name] = output
                del output
        except (Skip, *provider.refuses) as error:
            if "CUDA error" in str(error):  # the device is lost for this process: no refusal
                raise
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            made = Provider(provider.name, skipped=reason, peer=provider.peer)
        ready.append(made)
    return replace(workload, providers=ready), outputs, seconds


def _workload_checks(workload: Workload, outputs: Mapping[str, Any]) -> Sequence[Check]:
    if workload.gate is None:
        return []
    checks = workload.gate(outputs)
    if not checks:
        raise ValueError(f"{workload.name}: the gate checked nothing")
    return [Check(f"{workload.name}: {c.name}", c.error, c.allowed) for c in checks]


def _green(where: str, checks: Sequence[Check]) -> list[dict[str, Any]]:
    if any(not check.passed for check in checks):
        raise GateError(where, checks)
    return [{"name": c.name, "error": c.error, "allowed": c.allowed} for c in checks]


def _ceilings(context: Context, dtypes: set[torch.dtype]) -> dict[str, Any]:
    if not dtypes:
        return {}
    ceilings = Ceilings(Clock(context.device), context.quick)
    with torch.inference_mode():
        ceilings.update(sorted(dtypes, key=str))
    return ceilings.as_json()
