"""``benchmarks/REPORT.md``: every result as a table, by device. The same results give the same page.

The figures of the results are drawn into ``plots`` beside the page. They are not kept in the repository, so the page
names them and does not show them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import plot, report
from .lines import SCHEMA
from .run import case_names

PAGE = Path(__file__).resolve().parent / "REPORT.md"

#: What the page promises, and which case's results it takes: where there are none it says so.
PROMISED = {
    "rooflines": "Rooflines: `python -m benchmarks run attention model`",
    "ratios": "Ratios to each peer: any case",
    "parts": "Time of the whole tower by operation: `python -m benchmarks run tower`",
    "memory": "Memory: `python -m benchmarks run model load`",
}

_HEAD = """\
# Measured

Made by `python -m benchmarks report` from the JSON under `benchmarks/results/`, and by nothing else: to change a
number, run its case and make the page again. All contenders of a workload took turns in one process, after a parity
gate. A ratio is the median over the rounds of peer / ours, so need not be the quotient of the medians; in brackets the
quotient of both sides' best rounds. Ceilings are a copy and a matrix product timed in the same run.

The same command draws the figures that are named below, as SVG in `benchmarks/plots/`. They are not kept.
"""


def read(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Results by subfolder, which is a device. Raises ``ValueError`` for a file that is no result."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.rglob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        if result.get("schema") != SCHEMA:
            raise ValueError(f"{path}: schema must be {SCHEMA}, got {result.get('schema')!r}")
        found.setdefault(path.parent.relative_to(folder).as_posix(), []).append(result)
    return found


def write(results: Path, page: Path) -> list[Path]:
    """Write ``page`` and ``plots/<device>/*.svg`` beside it; figures of results that are gone are removed."""
    found, plots = read(results), page.parent / "plots"
    if not found:
        raise ValueError(f"{results} holds no results")
    for old in plots.rglob("*.svg") if plots.is_dir() else ():
        old.unlink()
    figures = [path for device in found for result in found[device] for path in plot.draw(result, plots / device)]
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(markdown(found), encoding="utf-8")
    return [page, *figures]


def markdown(found: Mapping[str, list[dict[str, Any]]]) -> str:
    """The page. Which figures there are follows from the results; nothing is drawn here."""
    parts = [_HEAD]
    for device, results in found.items():
        parts.append(f"## {_where(results[0])}\n\nFolder `{device}`: {_listed([r['case'] for r in results])}.\n")
        drawn = {name for result in results for name in _figures(result)}
        lines = [f"- {text}: no results yet." for name, text in PROMISED.items() if name not in drawn]
        if absent := [name for name in case_names() if name not in {r["case"] for r in results}]:
            lines.append(f"- Not measured here: {_listed(absent)}.")
        parts.append("\n".join(lines) + "\n" if lines else "")
        parts += [_section(device, result) for result in results]
    return "\n".join(part for part in parts if part)


def _section(device: str, result: dict[str, Any]) -> str:
    lines = [f"### {result['case']}", "", f"{result['summary']}.", ""]
    for name in _figures(result):
        lines.append(f"- Figure `plots/{device}/{result['case']}-{name}.svg`: {plot.FIGURES[name].shows}.")
    if _figures(result):
        lines.append("")
    lines += ["<details><summary>Rows</summary>", "", report.table(result), "", "</details>", "", report.notes(result)]
    return "\n".join(lines) + "\n"


def caption(result: dict[str, Any]) -> str:
    """What a figure says of itself: device, versions, date, command and commit of its result."""
    versions = ", ".join(f"{name} {result['versions'][name]}" for name in sorted(result["versions"]))
    return f"{_where(result)}; {versions}; {result['date'][:10]}; `{result['command']}`, commit {result['commit']}."


def _where(result: dict[str, Any]) -> str:
    """The device; of a CPU its threads too, and its instructions where the result has them."""
    if result["device_type"] != "cpu":
        return result["device"]
    return f"{result['device']}, {result['threads']} threads" + (f", {result['isa']}" if "isa" in result else "")


def _figures(result: dict[str, Any]) -> list[str]:
    """Names of the figures that ``result`` has, without drawing: matplotlib may not be there."""
    return [name for name, kind in plot.FIGURES.items() if kind.rows(result)]


def _listed(names: list[str]) -> str:
    return ", ".join(names)
