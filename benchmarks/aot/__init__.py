"""Every Triton kernel compiled ahead of time, without a GPU, as a real call would launch it; see ``compiler``.

A file here that holds ``SPECIMENS``, a tuple of :class:`compiler.Specimen`, is a group, found by being there.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import pkgutil
import subprocess
import sys
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .compiler import TARGETS, TRITONS, Report, Specimen, compile_for


def groups() -> dict[str, tuple[Specimen, ...]]:
    """The specimens of every group, by its name."""
    modules = {name: importlib.import_module(f"{__name__}.{name}") for _, name, _ in pkgutil.iter_modules(__path__)}
    return {name: module.SPECIMENS for name, module in sorted(modules.items()) if hasattr(module, "SPECIMENS")}


def check_names(what: str, given: Sequence[str] | None, have: Collection[str]) -> None:
    """Raises ``ValueError`` for a name that is none of those there are."""
    for name in given or ():
        if name not in have:
            raise ValueError(f"no {what} is called {name!r}; there are {', '.join(have)}")


def compile_all(
    names: Sequence[str] | None = None,
    targets: Sequence[str] | None = None,
    jobs: int | None = None,
    further: bool = True,
) -> list[Report]:
    """Compile groups for targets, by default all for all, in ``jobs`` processes. ``further``: as of ``Specimen``.

    Raises ``ValueError`` for a name that is none and ``RuntimeError`` where Triton cannot compile.
    """
    known = groups()
    check_names("group", names, known)
    check_names("target", targets, TARGETS)
    work = [
        (group, place, target)
        for group in names or known
        for place, specimen in enumerate(known[group])
        if further or not specimen.further
        for target in targets or TARGETS
    ]
    jobs = min(jobs or os.cpu_count() or 1, len(work))
    if jobs == 1:
        return [report for part in map(_compile, work) for report in part]
    # Fresh processes: threads of PyTorch and LLVM that run here do not survive a fork.
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        return [report for part in pool.map(_compile, work, chunksize=1) for report in part]


def compile_with(
    version: str,
    names: Sequence[str] | None = None,
    targets: Sequence[str] | None = None,
    jobs: int | None = None,
    further: bool = True,
) -> list[Report]:
    """:func:`compile_all` in a process of its own with another Triton, which ``make build/triton/VERSION`` installs.

    Raises ``ValueError`` where that version is not there, and ``RuntimeError`` with what the process said if it failed.
    """
    folder = TRITONS / version
    if not (folder / "triton").is_dir():
        raise ValueError(f"Triton {version} is not installed in build/triton: make build/triton/{version} does it")
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "reports.json"
        command = [sys.executable, "-m", "benchmarks", "aot", *(names or ()), "--json", str(out)]
        command += [word for target in targets or () for word in ("--target", target)]
        command += ["--jobs", str(jobs)] if jobs else []
        command += [] if further else ["--no-further"]
        path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
        done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
        if not out.is_file():
            raise RuntimeError(f"Triton {version}: {done.stderr.strip()}")
        reports = read(out)
    if wrong := {r.triton for r in reports} - {version}:
        raise RuntimeError(f"Triton {', '.join(wrong)} was imported where {version} was wanted")
    return reports


def write(reports: Sequence[Report], path: Path) -> None:
    path.write_text(json.dumps([asdict(report) for report in reports]))


def read(path: Path) -> list[Report]:
    return [Report(**{**found, "failures": tuple(found["failures"])}) for found in json.loads(path.read_text())]


def _compile(work: tuple[str, int, str]) -> list[Report]:
    group, place, target = work
    return list(compile_for(groups()[group][place], target))


def show(reports: Sequence[Report], console: Console) -> None:
    """A table with one row for each kernel and target."""
    table = Table(title="Ahead-of-time compilation")
    for heading in ("call", "kernel", "target", "Triton"):
        table.add_column(heading)
    for heading in ("registers", "spilled", "shared", "16-byte", "matrix"):
        table.add_column(heading, justify="right")
    table.add_column("fails")
    previous = None
    for r in reports:
        if previous is not None and r.specimen != previous:
            table.add_section()
        call, previous = (r.specimen if r.specimen != previous else ""), r.specimen
        wide = f"{r.wide:.0%}" if r.wide is not None else "-"
        row = (call, r.kernel, r.target, r.triton, str(r.registers), str(r.spilled), str(r.shared), wide, str(r.matrix))
        table.add_row(*row, "; ".join(r.failures), style="red" if r.failures else None)
    console.print(table)
