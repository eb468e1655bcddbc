"""The page of results: complete, the same every time, and the committed one made from the committed results."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks import page, plot
from benchmarks.__main__ import app
from benchmarks.run import RESULTS

pytest.importorskip("matplotlib")


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


def links(text: str) -> list[str]:
    return re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_two_runs_give_the_same_bytes(results, tmp_path):
    for name in ("one", "two"):
        done = CliRunner().invoke(app, ["report", str(results), "--out", str(tmp_path / name / "REPORT.md")])
        assert done.exit_code == 0, done.output
    assert files(tmp_path / "one") == files(tmp_path / "two") and len(files(tmp_path / "one")) > 5


def test_every_result_is_there_with_its_figures_and_where_they_come_from(results, tmp_path):
    page.write(results, tmp_path / "out" / "REPORT.md")
    text = (tmp_path / "out" / "REPORT.md").read_text()
    assert {f"plots/{name}" for name in files(tmp_path / "out" / "plots")} == set(links(text))
    assert set(links(text)) == {
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
    captions = [line for line in text.splitlines() if line.startswith("*")]
    assert len(captions) == len(links(text))
    for line in captions:
        assert "other 1.5, torch 2.0; 2026-01-02; `python -m benchmarks run " in line and "commit abc" in line
    assert "A CPU, 3 threads, AVX9;" in captions[0] and "Some GPU/2;" in captions[1]


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


def test_the_committed_figures_are_those_of_the_page():
    beside = page.PAGE.parent
    there = {path.relative_to(beside).as_posix() for path in (beside / "plots").rglob("*.svg")}
    assert there == set(links(page.PAGE.read_text(encoding="utf-8"))) and there
