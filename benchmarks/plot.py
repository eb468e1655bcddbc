"""Roofline plots of results: per cent of the measured ceiling by size, one panel a series, one line a provider."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def plot(result: dict[str, Any], path: Path) -> bool:
    """Draw ``result`` to ``path`` (.svg or .png); ``False``, and no file, where it has no series.

    The ceiling is the one that bounds a row: the machine's copy, or its matrix product in the row's dtype, measured in
    the same run. Our lines are solid, peers' dashed; a series with one size is drawn as points.
    """
    series = points(result)
    if not series:
        return False
    from matplotlib.figure import Figure  # without pyplot, which would want a display

    columns = min(3, len(series))
    rows = math.ceil(len(series) / columns)
    figure = Figure(figsize=(4.6 * columns, 3.2 * rows + 0.8), layout="constrained")
    figure.suptitle(f"{result['summary']}\n{result['device']}, torch {result['versions']['torch']}", fontsize=10)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    names = list(dict.fromkeys(name for lines in series.values() for name in lines))
    handles = {}
    for panel, (title, lines) in zip(panels, series.items(), strict=False):
        ceilings = set()
        for name, (peer, line) in lines.items():
            sizes, shares, bounds = zip(*line, strict=True)
            ceilings |= set(bounds)
            style = {"linestyle": "--" if peer else "-", "marker": "o", "markersize": 3}
            handles[name] = panel.plot(sizes, shares, color=f"C{names.index(name) % 10}", **style)[0]
        panel.set_title(title, fontsize=9)
        panel.set_xscale("log", base=2)
        panel.set_ylim(0, 105)
        panel.axhline(85, color="0.8", linewidth=0.8, zorder=0)
        panel.set_xlabel("tokens", fontsize=8)
        panel.set_ylabel(f"% of {' or '.join(sorted(ceilings))}", fontsize=8)
        panel.tick_params(labelsize=7)
    for panel in panels[len(series) :]:
        panel.set_axis_off()
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(4, len(handles)), fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    return True


def points(result: dict[str, Any]) -> dict[str, dict[str, tuple[bool, list[tuple[int, float, str]]]]]:
    """series -> provider -> (whether a peer, [(size, per cent of the ceiling, which)] by size)."""
    found: dict[str, dict[str, tuple[bool, list[tuple[int, float, str]]]]] = {}
    for row in result["rows"]:
        if row.get("series") is None or "of_ceiling" not in row:
            continue
        _, line = found.setdefault(row["series"], {}).setdefault(row["provider"], (row["peer"], []))
        line.append((row["size"], 100 * row["of_ceiling"], row["ceiling"]))
    for lines in found.values():
        for _, line in lines.values():
            line.sort()
    return found


def plot_all(results: Iterable[dict[str, Any]], folder: Path) -> list[Path]:
    """One ``<device>-<case>.svg`` a result that has series; returns their paths."""
    written = []
    for result in results:
        name = "-".join((*result["device"].lower().split(), result["case"]))
        path = folder / f"{''.join(c if c.isalnum() or c in '-.' else '-' for c in name)}.svg"
        if plot(result, path):
            written.append(path)
    return written
