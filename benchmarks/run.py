"""Measure a case: gates, first calls, interleaved rounds; a line for each workload, as ``lines`` describes them.

``isolate`` calls these in other processes; :func:`run_case` calls them all in this one.
"""

from __future__ import annotations

import importlib
import pkgutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from . import cases, environment
from .case import Case, Check, Context, Provider, Skip, Workload
from .lines import SCHEMA, Line, assemble
from .timing import Ceilings, Clock, compilations, dtype_name, measure, words

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
    with environment.full_float32(), torch.inference_mode():
        own = gate(case, context)  # before anything is made
        lines = [plan(case, context, command), own]
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
    names, late = [], []
    with torch.inference_mode():
        for workload in case.workloads(context):
            names.append(workload.name)
            late += [workload.name] if workload.late else []
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
        "late": late,
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


def measured(case: Case, workload: Workload, context: Context) -> Line:
    """First calls, gate, rounds. Raises :class:`GateError` for a red gate, ``ValueError`` for none at all."""
    if workload.gate is None and case.gate is None:
        raise ValueError(f"{case.name}, {workload.name}: has no parity gate")
    clock = Clock(context.device)
    workload = _leave_out(workload, dict.fromkeys(context.without, "left out by --without") | dict(context.ended))
    workload, outputs, first = _first_calls(workload, clock, context.turn)
    out, checks = _peers_out(*_workload_checks(workload, outputs))
    green = _green(f"{case.name}, {workload.name}", checks)
    del outputs
    workload = _leave_out(workload, out)
    rounds = context.rounds or (2 if context.quick else None)
    samples, dropped = measure(workload, clock, rounds, _seconds(first), context.turn)
    workload = _leave_out(workload, dropped)
    other, failures = _another(workload, clock)
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
            | _first_call(first.get(p.name), "first_call")
            | _first_call(other.get(p.name), "another_shape")
            for p in workload.providers
        ],
        "checks": green,
        "samples": samples,
        "failures": [f"{case.name}, {workload.name}: {failure}" for failure in failures],
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


def _leave_out(workload: Workload, reasons: Mapping[str, str]) -> Workload:
    given = [
        Provider(p.name, skipped=reasons[p.name], peer=p.peer) if p.name in reasons else p for p in workload.providers
    ]
    return replace(workload, providers=given)


#: Seconds of a provider's first call, and the kernels that Triton compiled in it, which Triton's cache did not hold.
First = tuple[float, int]


def _seconds(first: Mapping[str, First]) -> dict[str, float]:
    return {name: seconds for name, (seconds, _) in first.items()}


def _first_call(first: First | None, name: str) -> dict[str, Any]:
    return {} if first is None else {f"{name}_s": first[0], f"{name}_compiled": first[1]}


def _first_calls(
    workload: Workload, clock: Clock, turn: Callable[[str | None], None]
) -> tuple[Workload, dict[str, Any], dict[str, First]]:
    """Make every provider and call it once, where the gate wants its result or the call is what is timed.

    Returns the workload with the providers that run or say why not, outputs and first calls by their names.
    """
    outputs, first, ready = {}, {}, []
    for provider in workload.providers:
        turn(provider.name if provider.apart else None)
        try:
            made = provider.ready()
            timed = workload.units is None and made.warm is None
            if made.call is not None and (workload.gate is not None or timed):
                if made.before is not None:
                    made.before()
                with compilations() as compiled:
                    seconds, output = clock.first(made.call)
                first[made.name] = (seconds, sum(compiled))
                if workload.gate is not None:
                    outputs[made.name] = output
                del output
        except Exception as error:
            if not (provider.apart or isinstance(error, (Skip, *provider.refuses))):
                raise
            if clock.lost(error):  # for this process: no refusal
                raise
            first.pop(provider.name, None)
            made = Provider(provider.name, skipped=words(error), peer=provider.peer)
        ready.append(made)
    turn(None)
    return replace(workload, providers=ready), outputs, first


def _another(workload: Workload, clock: Clock) -> tuple[Mapping[str, First], list[str]]:
    """First calls on another shape of those that were measured, and why ours have none.

    It comes last, so that what goes wrong there costs none of the samples.
    """
    if workload.another is None:
        return {}, []
    running = {provider.name for provider in workload.providers if provider.call is not None}
    found: dict[str, First] = {}
    second = workload.another()
    for provider in second.providers:
        if provider.name not in running:
            continue
        try:
            found |= _first_calls(replace(second, providers=[provider]), clock, lambda peer: None)[2]
        except Exception as error:
            why = [] if provider.apart else [f"{provider.name} on another shape: {words(error)}"]
            if why or clock.lost(error):
                return found, why
    return found, []


def _workload_checks(workload: Workload, outputs: Mapping[str, Any]) -> tuple[Workload, Sequence[Check]]:
    """The checks, and the workload without the peers whose results the gate cannot even read."""
    if workload.gate is None:
        return workload, []
    try:
        checks = workload.gate(outputs)
    except Exception:
        workload, outputs = _readable(workload, outputs)
        checks = workload.gate(outputs)  # type: ignore[misc]
    if not checks:
        raise ValueError(f"{workload.name}: the gate checked nothing")
    return workload, [replace(c, name=f"{workload.name}: {c.name}") for c in checks]


def _readable(workload: Workload, outputs: Mapping[str, Any]) -> tuple[Workload, Mapping[str, Any]]:
    """Without the peers whose results, beside ours, the gate ends on with an exception."""
    assert workload.gate is not None
    peers = [provider.name for provider in workload.providers if provider.apart and provider.name in outputs]
    reasons: dict[str, str] = {}
    for name in peers:
        try:
            workload.gate({who: output for who, output in outputs.items() if who == name or who not in peers})
        except Exception as error:
            reasons[name] = f"the parity gate cannot compare its result: {words(error)}"
    return _leave_out(workload, reasons), {who: out for who, out in outputs.items() if who not in reasons}


def _peers_out(workload: Workload, checks: Sequence[Check]) -> tuple[dict[str, str], Sequence[Check]]:
    """Peers that take no part, and why, those whose checks are red among them; and the checks of all others."""
    peers = {provider.name for provider in workload.providers if provider.apart}
    reasons = {p.name: p.skipped for p in workload.providers if p.skipped is not None}
    for check in checks:
        if check.provider in peers and not check.passed:
            name = check.name.removeprefix(f"{workload.name}: ")
            told = f"the parity gate is red: {name}: error {check.error:.3g}, allowed {check.allowed:.3g}"
            reasons.setdefault(check.provider, told)  # type: ignore[arg-type]
    return reasons, [check for check in checks if check.provider not in reasons]


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
