"""Figures of results, as SVG whose bytes depend on the results and matplotlib's version alone.

:data:`FIGURES` says which rows of a result a figure takes; a result without any has no such figure. Our marks are
filled, peers' hollow; our lines are solid, peers' dashed.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

Result = dict[str, Any]
Rows = list[dict[str, Any]]

#: How workloads of the case ``tower`` begin whose metrics are parts of a whole.
_PARTS, _TRAFFIC = "seconds by part", "traffic of a layer"

#: Characters of a line in the margin.
_LABEL = 44


def rooflines(result: Result, rows: Rows) -> Any:
    """FLOP/s over FLOPs a byte, under the copy's and the product's ceiling of the same run."""
    dtypes = result["ceilings"]["matmul_flops_per_s"]
    copy, (dtype, product) = result["ceilings"]["copy_bytes_per_s"], max(dtypes.items(), key=lambda item: item[1])
    figure, panel = _figure(9, 5.6)
    at = [r["flops"] / r["bytes"] for r in rows]
    low, high = min(*at, product / copy) / 3, max(*at, product / copy) * 3
    panel.plot([low, product / copy, high], [low * copy, product, product], color="0.4", linewidth=1.2)
    panel.text(high, product * 1.06, f"{dtype} matmul {product / 1e9:.0f} GFLOP/s", ha="right", fontsize=8, color="0.3")
    names, workloads = _names(rows, "provider"), _names(rows, "workload")
    marks = "osD^vPX<>ph*dH8"
    for row, x in zip(rows, at, strict=True):
        colour = f"C{names.index(row['provider']) % 10}"
        panel.plot(
            x,
            row["flops_per_s"],
            marks[workloads.index(row["workload"]) % len(marks)],
            color=colour,
            markerfacecolor="none" if row["peer"] else colour,
            markersize=6,
        )
    panel.set(xscale="log", yscale="log", xlabel="FLOPs a byte that must move", ylabel="FLOP/s")
    panel.grid(True, which="major", color="0.92")
    handles = [
        _mark("o", f"C{names.index(n) % 10}", n, any(r["peer"] for r in rows if r["provider"] == n)) for n in names
    ]
    handles += [_mark(marks[n % len(marks)], "0.3", w, False) for n, w in enumerate(workloads)]
    figure.legend(handles=handles, loc="outside right upper", fontsize=7, frameon=False)
    return figure


def shares(result: Result, rows: Rows) -> Any:
    """Per cent of the ceiling that bounds each workload, where it is known in one dimension only."""
    return _dots(rows, lambda r: [(r["provider"], 100 * r["of_ceiling"], None)], f"% of {_ceilings(rows)}", line=100)


def by_size(result: Result, rows: Rows) -> Any:
    """Per cent of the ceiling by tokens: one panel a series, one line a provider."""
    series = points(rows)
    columns = min(3, len(series))
    count = math.ceil(len(series) / columns)
    figure, _ = _figure(4.2 * columns, 3.0 * count + 0.8, bare=True)
    panels = list(figure.subplots(count, columns, squeeze=False).flat)
    names = list(dict.fromkeys(name for lines in series.values() for name in lines))
    handles = {}
    for panel, (title, lines) in zip(panels, series.items(), strict=False):
        ceilings = set()
        for name, (peer, line) in lines.items():
            sizes, percents, bounds = zip(*line, strict=True)
            ceilings |= set(bounds)
            style = {"linestyle": "--" if peer else "-", "marker": "o", "markersize": 3}
            handles[name] = panel.plot(sizes, percents, color=f"C{names.index(name) % 10}", **style)[0]
        panel.set_title(title, fontsize=9)
        panel.set_xscale("log", base=2)
        panel.set_ylim(0, 105)
        panel.set_xlabel("tokens", fontsize=8)
        panel.set_ylabel(f"% of {' or '.join(sorted(ceilings))}", fontsize=8)
        panel.tick_params(labelsize=7)
    for panel in panels[len(series) :]:
        panel.set_axis_off()
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(4, len(handles)), fontsize=8)
    return figure


def points(rows: Rows) -> dict[str, dict[str, tuple[bool, list[tuple[int, float, str]]]]]:
    """series -> provider -> (whether a peer, [(size, per cent of the ceiling, which)] by size)."""
    found: dict[str, dict[str, tuple[bool, list[tuple[int, float, str]]]]] = {}
    for row in rows:
        _, line = found.setdefault(row["series"], {}).setdefault(row["provider"], (row["peer"], []))
        line.append((row["size"], 100 * row["of_ceiling"], row["ceiling"]))
    for lines in found.values():
        for _, line in lines.values():
            line.sort()
    return found


def ratios(result: Result, rows: Rows) -> Any:
    """How many times ours is faster than each peer: medians of the rounds' ratios, lines from the least to the most."""

    def marks(row: dict[str, Any]) -> list[tuple[str, float, tuple[float, float] | None]]:
        return [
            (f"{row['provider']} to {peer}", ratio["median"], (ratio["min"], ratio["max"]))
            for peer, ratio in row["ratios"].items()
        ]

    return _dots(rows, marks, "times faster than the peer (log)", line=1, log=True)


def parts(result: Result, rows: Rows) -> Any:
    """The tower's time by operation, a bar an implementation."""
    return _stacked(rows, 1e-3, "ms")


def traffic(result: Result, rows: Rows) -> Any:
    """Bytes that one layer reads and writes, by operation."""
    return _stacked(rows, 1e6, "MB")


def memory(result: Result, rows: Rows) -> Any:
    """Peaks and weights, a group of bars a metric."""
    names, groups = _names(rows, "provider"), list(dict.fromkeys((r["workload"], r["metric"]) for r in rows))
    figure, panel = _figure(8.5, 1.2 + 0.32 * len(groups) * len(names))
    for row in rows:
        n, group = names.index(row["provider"]), groups.index((row["workload"], row["metric"]))
        y = group + 0.8 * (n + 0.5) / len(names) - 0.4
        hollow = {"fill": False, "edgecolor": f"C{n % 10}"} if row["peer"] else {"color": f"C{n % 10}"}
        panel.barh(y, row["median"] / 1e9, 0.7 / len(names), label=row["provider"] if group == 0 else None, **hollow)
        panel.text(row["median"] / 1e9, y, f" {row['median'] / 1e9:.2f}", va="center", fontsize=7)
    panel.set_yticks(range(len(groups)), [f"{_wrapped(w)}\n{metric}" for w, metric in groups], fontsize=8)
    panel.invert_yaxis()
    panel.set_xlabel("GB")
    panel.margins(x=0.1)
    figure.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


def by_frames(result: Result, rows: Rows) -> Any:
    """Accuracy by the frames of a clip, a panel a kind of longer clips, over a band of the lengths trained on."""
    figure, _ = _figure(9.5, 4.2, bare=True)
    panels = figure.subplots(1, 2, sharey=True)
    trained = [r["frames"] for r in rows if r["movement"] == "as trained"]
    titles = {"slower": "as far as ever, in smaller steps", "repeated": "the shortest clip again and again"}
    for panel, (movement, title) in zip(panels, titles.items(), strict=True):
        of = [r for r in rows if r["movement"] in ("as trained", movement)]
        panel.axvspan(min(trained) * 0.93, max(trained) * 1.07, color="0.92", zorder=0, label="trained on")
        _accuracies(panel, of, "frames")
        ticks = sorted({r["frames"] for r in of})
        panel.set_xscale("log", base=2)
        panel.set_xticks(ticks, [str(n) for n in ticks])
        panel.minorticks_off()
        panel.set_xlabel("frames of a clip (log)", fontsize=9)
        panel.set_title(title, fontsize=9)
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure


def by_resolution(result: Result, rows: Rows) -> Any:
    """Accuracy by the pictures' size, small ones first, and over all pictures by what each costs on average."""
    figure, _ = _figure(9.5, 4.2, bare=True)
    sizes, whole = figure.subplots(1, 2, sharey=True)
    by_size, all_sizes = ([r for r in rows if ("pixels" in r) == each] for each in (True, False))
    order = sorted({tuple(r["pixels"]) for r in by_size}, key=lambda size: (size[0] * size[1], size))
    _accuracies(sizes, [r | {"place": order.index(tuple(r["pixels"]))} for r in by_size], "place")
    sizes.set_xticks(range(len(order)), ["x".join(map(str, size)) for size in order], rotation=45)
    sizes.set_xlabel("pixels of a picture before any resizing", fontsize=9)
    _accuracies(whole, all_sizes, "vision_tokens")
    whole.set_xlabel("mean tokens of a picture, all sizes", fontsize=9)
    whole.margins(x=0.15)
    figure.legend(*sizes.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure


@dataclass(frozen=True)
class Kind:
    """``takes(row)`` chooses a result's rows, ``make(result, rows)`` draws them, ``shows`` begins the caption."""

    make: Callable[[Result, Rows], Any]
    takes: Callable[[dict[str, Any]], bool]
    shows: str

    def rows(self, result: Result) -> Rows:
        return [row for row in result["rows"] if self.takes(row)]


#: In the order of the page.
FIGURES = {
    "ratios": Kind(
        ratios,
        lambda r: not r["peer"] and r["unit"] == "s" and bool(r["ratios"]) and not _of(r, _PARTS),
        "How many times ours is faster than each peer: medians, and lines over the spread of the rounds",
    ),
    "rooflines": Kind(
        rooflines,
        lambda r: r.get("series") is None and r.get("flops") is not None and r.get("bytes") is not None,
        "Rates under the ceilings measured in the same run",
    ),
    "shares": Kind(
        shares,
        lambda r: r.get("series") is None and "of_ceiling" in r and ("flops" not in r or "bytes" not in r),
        "Share of the ceiling that bounds the work, measured in the same run",
    ),
    "sizes": Kind(
        by_size,
        lambda r: r.get("series") is not None and "of_ceiling" in r,
        "Share of the ceiling that bounds the work, by size, measured in the same run",
    ),
    "parts": Kind(
        parts, lambda r: _of(r, _PARTS), "The whole tower's time by operation, one forward under PyTorch's profiler"
    ),
    "traffic": Kind(
        traffic,
        lambda r: _of(r, _TRAFFIC) and r["metric"] != "all",
        "Bytes that the operations of one layer read and write",
    ),
    "memory": Kind(memory, lambda r: r["unit"] == "B" and not _of(r, _TRAFFIC), "Memory"),
    "frames": Kind(
        by_frames,
        lambda r: r["metric"] == "accuracy" and "frames" in r,
        "Directions told right, by the length of clips; bars are binomial 95 % intervals over the questions, small "
        "points the models of each seed",
    ),
    "resolution": Kind(
        by_resolution,
        lambda r: r["metric"] == "accuracy" and "vision_tokens" in r and "frames" not in r,
        "Things counted right, by picture size and by mean cost; bars are binomial 95 % intervals over the questions, "
        "small points the models of each seed",
    ),
}


def draw(result: Result, folder: Path) -> list[Path]:
    """Write every figure that ``result`` has to ``folder/<case>-<figure>.svg``; returns their paths."""
    written = []
    for name, kind in FIGURES.items():
        if rows := kind.rows(result):
            folder.mkdir(parents=True, exist_ok=True)
            written.append(folder / f"{result['case']}-{name}.svg")
            save(written[-1], partial(kind.make, result, rows))
    return written


def save(path: Path, make: Callable[[], Any], description: str | None = None) -> None:
    """Write the figure that ``make`` returns to ``path``, with a ``description`` in an SVG's metadata."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "qwen2vl", "font.family": "DejaVu Sans", "axes.spines.top": False}):
        make().savefig(path, metadata={"Date": None, "Description": description})
    if path.suffix == ".svg":  # clips are named by a hash of numbers whose last bits differ between CPUs: by order here
        drawn = path.read_text(encoding="utf-8")
        names = dict.fromkeys(re.findall(r'<clipPath id="(\w+)"', drawn))
        for n, name in enumerate(names):
            drawn = drawn.replace(name, f"clip{n}")
        path.write_text(drawn, encoding="utf-8")


def _accuracies(panel: Any, rows: Rows, key: str) -> None:
    """Per cent over ``row[key]``, a line a provider, Wilson's interval of so many questions, and a point a seed."""
    for n, name in enumerate(_names(rows, "provider")):
        line = sorted((r for r in rows if r["provider"] == name), key=lambda r: r[key])
        bounds = [wilson(r["median"] / 100, r["questions"]) for r in line]
        values = [r["median"] for r in line]
        away = [[v - 100 * low for v, (low, _) in zip(values, bounds, strict=True)],
                [100 * high - v for v, (_, high) in zip(values, bounds, strict=True)]]  # fmt: skip
        if any(len(r["samples"]) > 1 for r in line):
            single = [(r[key], value) for r in line for value in r["samples"]]
            panel.plot(*zip(*single, strict=True), ".", color=f"C{n}", markersize=4, alpha=0.5)
        style = {"linestyle": "--", "markerfacecolor": "none"} if line[0]["peer"] else {"linestyle": "-"}
        panel.errorbar([r[key] for r in line], values, away, marker="o", markersize=5, color=f"C{n}", capsize=2,
                       linewidth=1.2, label=name, **style)  # fmt: skip
    panel.set_ylim(-2, 102)
    panel.set_ylabel("% right", fontsize=9)
    panel.spines["right"].set_visible(False)
    panel.tick_params(labelsize=8)


def wilson(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share that was found among so many (Wilson 1927)."""
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return min(share, middle - half), max(share, middle + half)


def _dots(rows: Rows, marks: Callable, label: str, *, line: float, log: bool = False) -> Any:
    """A line of dots a workload, a colour a kind of mark; ``marks`` gives (kind, value, spread or None) of a row."""
    found = [(_title(row), row["peer"], *mark) for row in rows for mark in marks(row)]
    titles, kinds = (list(dict.fromkeys(f[n] for f in found)) for n in (0, 2))
    height = max(0.34, 0.13 * len(kinds))
    figure, panel = _figure(9, 1.3 + height * len(titles) + 0.17 * math.ceil(len(kinds) / 3))
    for title, peer, kind, value, spread in found:
        n = kinds.index(kind)
        y, colour = titles.index(title) + 0.7 * (n + 0.5) / len(kinds) - 0.35, f"C{n % 10}"
        mark = "o" if n < 10 else "s"
        panel.plot(value, y, mark, color=colour, markerfacecolor="none" if peer else colour, markersize=4.5)
        if spread is not None:
            panel.plot(spread, (y, y), color=colour, linewidth=1, alpha=0.6)
    panel.axvline(line, color="0.5", linewidth=0.8, zorder=0)
    for n in range(1, len(titles)):
        panel.axhline(n - 0.5, color="0.93", linewidth=0.8, zorder=0)
    panel.set_yticks(range(len(titles)), [_wrapped(t) for t in titles], fontsize=8)
    panel.set_ylim(len(titles) - 0.5, -0.5)
    if log:
        _log_of_ratios(panel, [v for _, _, _, value, spread in found for v in (value, *(spread or ()))])
    else:
        panel.set_xlim(0, 1.05 * max(100.0, *(value for *_, value, _ in found)))
    panel.set_xlabel(label, fontsize=9)
    handles = [
        _mark("o" if n < 10 else "s", f"C{n % 10}", k, any(f[1] for f in found if f[2] == k))
        for n, k in enumerate(kinds)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=7.5, frameon=False)
    return figure


def _log_of_ratios(panel: Any, values: list[float]) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator

    low, high = min(*values, 1.0) / 1.15, max(*values, 1.0) * 1.15
    bases = (1, 2, 5) if high / low > 8 else (1, 1.2, 1.5, 2, 3, 4, 5, 7)
    ticks = [base * 10.0**power for power in range(-3, 6) for base in bases]
    inside = [t for t in ticks if low <= t <= high]
    panel.set_xscale("log")
    panel.set_xlim(low, high)
    panel.xaxis.set_major_locator(FixedLocator(inside))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.set_xticklabels([f"{t:g}x" for t in inside], fontsize=8)


def _stacked(rows: Rows, unit: float, name: str) -> Any:
    from matplotlib.patches import Patch

    names, metrics = _names(rows, "provider"), _names(rows, "metric")
    figure, panel = _figure(9, 1.7 + 0.45 * len(names))
    left = dict.fromkeys(names, 0.0)
    for n, metric in enumerate(metrics):
        for row in (r for r in rows if r["metric"] == metric and r["median"]):
            width = row["median"] / unit
            panel.barh(names.index(row["provider"]), width, 0.62, left[row["provider"]], color=f"C{n % 10}")
            left[row["provider"]] += width
    for who, total in left.items():
        panel.text(total, names.index(who), f" {total:.3g} {name}", va="center", fontsize=8)
    panel.set_yticks(range(len(names)), names, fontsize=8)
    panel.invert_yaxis()
    panel.margins(x=0.1)
    panel.set_xlabel(name, fontsize=9)
    handles = [Patch(color=f"C{n % 10}", label=metric) for n, metric in enumerate(metrics)]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    return figure


def _figure(width: float, height: float, bare: bool = False) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # without pyplot, which would want a display

    figure = Figure(figsize=(width, height), layout="constrained")
    if bare:
        return figure, None
    panel = figure.subplots()
    panel.spines["right"].set_visible(False)
    panel.tick_params(labelsize=8)
    return figure, panel


def _mark(mark: str, colour: str, label: str, hollow: bool) -> Any:
    from matplotlib.lines import Line2D

    fill = "none" if hollow else colour
    return Line2D([], [], linestyle="", marker=mark, color=colour, markerfacecolor=fill, label=label, markersize=5)


def _of(row: dict[str, Any], workload: str) -> bool:
    return row["workload"].startswith(workload)


def _names(rows: Rows, key: str) -> list[str]:
    return list(dict.fromkeys(row[key] for row in rows))


def _title(row: dict[str, Any]) -> str:
    return row["workload"] if row["metric"] == "time" else f"{row['workload']}: {row['metric']}"


def _ceilings(rows: Rows) -> str:
    return " or ".join(sorted({row["ceiling"] for row in rows}))


def _wrapped(text: str) -> str:
    return textwrap.fill(text, _LABEL)
