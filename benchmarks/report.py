"""Tables of results: on the terminal after a run, and as Markdown."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from .timing import WIDE, is_wide

COLUMNS = (
    "workload",
    "provider",
    "median",
    "min .. max",
    "n",
    "rate",
    "of ceiling",
    "ratio to peers (best to best)",
)


#: Where the case gives a second shape: what the first call cost, and the first on the second shape.
FIRST = "first call, on a new shape"


def columns(result: dict[str, Any]) -> tuple[str, ...]:
    """The headings of a result's table."""
    return COLUMNS + ((FIRST,) if any("another_shape_s" in row for row in result["rows"]) else ())


def show(result: dict[str, Any], console: Console) -> None:
    """Print a result as a table."""
    table = Table(title=f"{result['case']}: {result['summary']}", caption=footer(result))
    for column in columns(result):
        table.add_column(column, justify="left" if column in ("workload", "provider") else "right")
    previous = None
    for row in result["rows"]:
        group = (row["workload"], row["metric"])
        if previous is not None and previous != group:
            table.add_section()
        cells = row_cells(row)[: len(table.columns)]
        table.add_row("" if previous == group else cells[0], *cells[1:], style="dim" if row["peer"] else None)
        previous = group
    console.print(table)
    for row in result["rows"]:
        if is_wide(row["samples"]):
            console.print(
                f"wide: {row['workload']}, {row['provider']}, {row['metric']}: the middle half of "
                f"{len(row['samples'])} rounds spans more than {WIDE:.0%} of the median, as on a busy machine; "
                "take best to best, or measure again",
                style="yellow",
                markup=False,
            )
    for skip in result["skipped"]:
        console.print(
            f"skipped: {skip['provider']} in {skip['workload']}: {skip['reason']}", style="yellow", markup=False
        )
    for name in result.get("missing", []):
        console.print(f"missing: the run did not come to {name}", style="yellow", markup=False)


def table(result: dict[str, Any]) -> str:
    """The rows of a result as a table in Markdown."""
    headings = columns(result)
    lines = ["| " + " | ".join(headings) + " |", "|---|---|" + "---:|" * (len(headings) - 2)]
    cells = [[cell.replace("|", "\\|") for cell in row_cells(row)[: len(headings)]] for row in result["rows"]]
    lines += ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join(lines)


def notes(result: dict[str, Any]) -> str:
    """Where and how it was measured, the gate, and who was skipped, in Markdown."""
    lines = [footer(result) + f" `{result['command']}`, {result['date']}, commit {result['commit']}.", ""]
    if "note" in result:  # what a reader must know of a result that was not written by its run
        lines += [result["note"], ""]
    text = f"Parity gate: {len(result['gate'])} checks green"
    bounded = [check for check in result["gate"] if check["allowed"]]
    if bounded:
        worst = max(bounded, key=lambda check: check["error"] / check["allowed"])
        text += f"; nearest to its bound: {worst['name']}, {worst['error']:.2g} of {worst['allowed']:.2g}"
    lines.append(text + ".")
    lines += [f"- Skipped: {s['provider']} in {s['workload']}: {s['reason']}." for s in result["skipped"]]
    lines += [f"- Missing, as the run was ended before it: {name}." for name in result.get("missing", [])]
    return "\n".join(lines)


def row_cells(row: dict[str, Any]) -> list[str]:
    """A row of a result in the order of :data:`COLUMNS`, and behind them :data:`FIRST`."""
    unit = row["unit"]
    name = row["workload"] if row["metric"] == "time" else f"{row['workload']}: {row['metric']}"
    rate = ""
    if "units_per_s" in row:
        rate = f"{row['units_per_s']:,.0f} {row['unit_of_work']}s/s"
    elif row.get("ceiling") == "matmul":
        rate = f"{quantity(row['flops_per_s'])}FLOP/s"
    elif row.get("ceiling") == "copy":
        rate = f"{quantity(row['bytes_per_s'])}B/s"
    elif row["metric"].startswith("each "):  # "each token after it" as tokens a second
        rate = f"{1 / row['median']:.3g} {row['metric'].split()[1]}s/s"
    ratios = [f"{r['median']:.2f}x ({r['best']:.2f}x) {peer}" for peer, r in row["ratios"].items()]
    return [
        name,
        row["provider"],
        value(row["median"], unit),
        f"{value(row['min'], unit)} .. {value(row['max'], unit)}",
        str(len(row["samples"]) or ""),
        rate,
        f"{100 * row['of_ceiling']:.0f} % {row['ceiling']}" if "of_ceiling" in row else "",
        ", ".join(ratios),
        ", ".join(_first_call(row, which) for which in ("first_call", "another_shape") if f"{which}_s" in row),
    ]


def _first_call(row: dict[str, Any], which: str) -> str:
    """Its seconds, and how many kernels Triton compiled in them where there were any."""
    compiled = row.get(f"{which}_compiled", 0)
    return value(row[f"{which}_s"], "s") + (f" ({compiled} compiled)" if compiled else "")


def footer(result: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    load = "".join(f", load {value}" for value in result["load_average"][:1])
    text = f"{result['device']}, {result['threads']} threads{load}; {versions}."
    ceilings = result["ceilings"]
    if ceilings:
        rates = [f"copy {quantity(ceilings['copy_bytes_per_s'])}B/s"]
        rates += [f"{d} matmul {quantity(r)}FLOP/s" for d, r in ceilings["matmul_flops_per_s"].items()]
        text += f" Ceilings in this run: {', '.join(rates)}."
    return text + (" Quick shapes, no measurement." if result["quick"] else "")


def value(x: float, unit: str) -> str:
    """A number with three digits in a unit that suits it: seconds or bytes; others are counts or per cent."""
    if unit == "%":
        return f"{x:.1f} %"
    if unit not in ("s", "B"):
        return f"{x:.1f}".removesuffix(".0")
    if unit == "B":
        return f"{x / 1e9:.2f} GB" if abs(x) >= 1e9 else f"{x / 1e6:.1f} MB"
    for factor, name in ((1.0, "s"), (1e-3, "ms")):
        if abs(x) >= factor:
            return f"{x / factor:.3g} {name}" if x < 1000 * factor else f"{x / factor:.0f} {name}"
    return f"{x * 1e6:.3g} µs"


def quantity(x: float) -> str:
    """``1.23e11`` as ``"123 G"``, ready for a unit."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if x >= factor:
            return f"{x / factor:.3g} {prefix}"
    return f"{x:.3g} "
