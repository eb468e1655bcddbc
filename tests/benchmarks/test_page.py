"""The page of results: complete, the same every time, and the committed one made from the committed results."""

from __future__ import annotations

import html
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks import __main__ as main
from benchmarks import page, plot, readme
from benchmarks.__main__ import app
from benchmarks.run import RESULTS

pytest.importorskip("matplotlib")

ROOT = Path(__file__).resolve().parents[2]


def row(workload: str, provider: str, median: float, metric: str = "time", unit: str = "s", **more: Any) -> dict:
    peer = provider == "theirs"
    ratios = {} if peer else {"theirs": {"median": 2.0, "min": 1.5, "max": 2.5, "best": 2.1}}
    spread = {"median": median, "min": median, "max": median, "samples": [median]}
    return {"workload": workload, "provider": provider, "peer": peer, "metric": metric, "unit": unit, "ratios": ratios,
            **spread, **more}  # fmt: skip


def result(case: str, rows: list[dict], device: str = "Some GPU/2", **more: Any) -> dict:
    return {
        "schema": 1, "case": case, "summary": f"What {case} is", "command": f"python -m benchmarks run {case}",
        "quick": False, "date": "2026-01-02T03:04:05+00:00", "device": device, "device_type": "cuda", "threads": 3,
        "load_average": [0.5], "versions": {"torch": "2.0", "other": "1.5"}, "commit": "abc", "skipped": [],
        "ceilings": {"copy_bytes_per_s": 1e11, "matmul_flops_per_s": {"bfloat16": 1e12}},
        "gate": [{"name": "bitwise", "error": 0.0, "allowed": 0}], "rows": rows, **more,
    }  # fmt: skip


def both(*given: Any, **more: Any) -> list[dict]:
    return [row(given[0], who, *given[1:], **more) for who in ("ours", "theirs")]


RATES = {"ceiling": "copy", "of_ceiling": 0.5, "bytes": 1e6, "bytes_per_s": 5e10}
TOWER = [
    *both("tower, pack", 0.5, flops=1e9, flops_per_s=2e11, **RATES),
    *(r for part in ("linear", "attention") for r in both("seconds by part, pack", 0.2, part)),
    *(r for part in ("all", "linear") for r in both("traffic of a layer, pack", 2e6, part, "B")),
]
DEVICES = {
    "some-gpu-2": [
        result("norm", both("norm", 0.1, **RATES, series="norm", size=64)),
        result("positions", both("16k", 0.1, **RATES)),
        result("tower", TOWER),
    ],
    "cpu": [
        result("model", both("memory", 5e9, "peak", "B"), "A CPU", device_type="cpu", isa="AVX9", ceilings={}),
    ],
}


@pytest.fixture
def results(tmp_path) -> Path:
    for device, of_device in DEVICES.items():
        for made in of_device:
            path = tmp_path / "results" / device / f"{made['case']}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(made))
    return tmp_path / "results"


def named(text: str) -> list[str]:
    """The figures that a page names. It must not show them, as they are not kept with it."""
    assert not re.findall(r"\]\(plots", text) and "![" not in text
    return re.findall(r"^- Figure `([^`]+)`: \w", text, re.MULTILINE)


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_two_runs_give_the_same_bytes(results, tmp_path):
    for name in ("one", "two"):
        done = CliRunner().invoke(app, ["report", str(results), "--out", str(tmp_path / name / "REPORT.md")])
        assert done.exit_code == 0, done.output
    assert files(tmp_path / "one") == files(tmp_path / "two") and len(files(tmp_path / "one")) > 5


def test_the_default_page_comes_with_the_figures_of_the_readme(results, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(readme, "draw", lambda folder: drawn.append(folder) or [])
    monkeypatch.setattr(main, "RESULTS", results)
    monkeypatch.setattr(main, "PAGE", tmp_path / "one" / "REPORT.md")
    for name in ("one", "two"):
        done = CliRunner().invoke(app, ["report", str(results), "--out", str(tmp_path / name / "REPORT.md")])
        assert done.exit_code == 0, done.output
    assert drawn == [results]


def test_every_result_is_there_with_its_figures_and_where_they_come_from(results, tmp_path):
    page.write(results, tmp_path / "out" / "REPORT.md")
    text = (tmp_path / "out" / "REPORT.md").read_text()
    assert {f"plots/{name}" for name in files(tmp_path / "out" / "plots")} == set(named(text))
    assert set(named(text)) == {
        *(f"plots/some-gpu-2/norm-{name}.svg" for name in ("ratios", "sizes")),
        *(f"plots/some-gpu-2/positions-{name}.svg" for name in ("ratios", "shares")),
        *(f"plots/some-gpu-2/tower-{name}.svg" for name in ("ratios", "rooflines", "parts", "traffic")),
        "plots/cpu/model-memory.svg",
    }
    assert [line for line in text.splitlines() if line.startswith("#")] == [
        "# Measured",
        "## A CPU, 3 threads, AVX9", "### model",
        "## Some GPU/2", "### norm", "### positions", "### tower",
    ]  # fmt: skip
    sources = [line for line in text.splitlines() if "`python -m benchmarks run " in line and "commit abc" in line]
    assert len(sources) == len(list(results.rglob("*.json"))), "one for every result"
    for line in sources:
        assert "3 threads" in line and "torch 2.0, other 1.5" in line and "`, 2026-01-02T03:04:05+00:00, commit" in line
    assert sources[0].startswith("A CPU, ") and sources[1].startswith("Some GPU/2, ")
    made = DEVICES["cpu"][0]
    assert page.caption(made) == (
        "A CPU, 3 threads, AVX9; other 1.5, torch 2.0; 2026-01-02; `python -m benchmarks run model`, commit abc."
    )


def test_what_is_not_there_is_said(results, tmp_path):
    cpu, gpu = page.markdown(page.read(results)).split("## Some GPU/2")
    for words in ("Rooflines: ", "Time of the whole tower by operation: "):
        assert re.search(rf"- {words}.*: no results yet", cpu) and not re.search(rf"- {words}.*: no results yet", gpu)
    assert re.search("- Memory: .*: no results yet", gpu) and not re.search("- Memory: .*: no results yet", cpu)
    assert re.search(r"- Not measured here: .*attention.*tower", cpu)
    assert re.search(r"- Not measured here: .*attention", gpu) and not re.search(r"- Not measured here: .*tower", gpu)


def test_figures_of_results_that_are_gone_are_removed(results, tmp_path):
    out = tmp_path / "out"
    page.write(results, out / "REPORT.md")
    (results / "cpu" / "model.json").unlink()
    page.write(results, out / "REPORT.md")
    assert not (out / "plots" / "cpu" / "model-memory.svg").exists()
    assert (out / "plots" / "some-gpu-2" / "tower-parts.svg").exists()


def test_other_files_are_refused_before_anything_is_written(tmp_path):
    out = tmp_path / "out" / "REPORT.md"
    (tmp_path / "x.json").write_text('{"schema": 99}')
    with pytest.raises(ValueError, match="schema must be 1, got 99"):
        page.write(tmp_path, out)
    (tmp_path / "x.json").unlink()
    with pytest.raises(ValueError, match="holds no results"):
        page.write(tmp_path, out)
    assert CliRunner().invoke(app, ["report", str(tmp_path), "--out", str(out)]).exit_code == 2
    assert not out.parent.exists()


def test_series_are_sorted_by_size():
    rows = [r for size in (1024, 64) for r in both("op", 0.1, **RATES, series="op 80", size=size)]
    assert plot.points(rows)["op 80"]["ours"] == (False, [(64, 50.0, "copy"), (1024, 50.0, "copy")])
    assert plot.points(rows)["op 80"]["theirs"][0]


# ------------------------------------------------------------------------------------------------- what is committed


def test_the_committed_page_is_what_the_command_makes():
    text = page.PAGE.read_text(encoding="utf-8")
    assert text == page.markdown(page.read(RESULTS)), "run python -m benchmarks report"
    for path in RESULTS.rglob("*.json"):
        heading = f"Folder `{path.parent.relative_to(RESULTS).as_posix()}`"
        section = next(s for s in text.split("\n## ") if heading in s)
        assert f"\n### {path.stem}\n" in section


def test_figures_are_made_and_not_kept():
    kept = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if kept.returncode:
        pytest.skip("no history here to ask for what is kept")
    figures = {path for path in kept.stdout.split() if path.endswith((".svg", ".png"))}
    assert figures == {f"docs/figures/{figure.name}.svg" for figure in readme.FIGURES}
    assert len(figures) <= 2


def test_the_figures_of_the_readme_are_small_and_drawn_from_the_committed_results(tmp_path):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = re.findall(r"!\[[^]]+\]\(([^)]+)\)", text)
    made = readme.draw(RESULTS, tmp_path)
    assert sorted(shown) == sorted(f"docs/figures/{path.name}" for path in made)
    results = page.read(RESULTS)
    for path, figure in zip(made, readme.FIGURES, strict=True):
        committed = (readme.FOLDER / path.name).read_text(encoding="utf-8")
        assert len(committed.encode()) < 60_000
        result = next(r for r in results[figure.device] if r["case"] == figure.case)
        assert html.escape(page.caption(result), quote=False) in committed, "run python -m benchmarks report"
        here, there = (re.search(r"Matplotlib v[\d.]+", svg) for svg in (path.read_text(encoding="utf-8"), committed))
        if here is not None and there is not None and here[0] == there[0]:  # another version draws other bytes
            assert path.read_text(encoding="utf-8") == committed, "run python -m benchmarks report"


def test_a_figure_of_the_readme_leaves_nothing_out_of_what_it_names():
    for figure in readme.FIGURES:
        result = next(r for r in page.read(RESULTS)[figure.device] if r["case"] == figure.case)
        drawn = readme.rows(figure, result)
        assert [row["workload"] for row in drawn] == list(figure.workloads.values())
        for row, workload in zip(drawn, figure.workloads, strict=True):
            (of,) = (r for r in result["rows"] if (r["workload"], r["provider"]) == (workload, figure.provider))
            assert row["ratios"] == {figure.peers[p]: ratio for p, ratio in of["ratios"].items() if p in figure.peers}
            assert row["ratios"] and row["median"] == of["median"]
