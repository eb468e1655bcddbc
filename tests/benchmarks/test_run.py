"""The benchmark runner on tiny cases: gates, interleaving, JSON, report, and the whole command once."""

from __future__ import annotations

import io
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import PIL
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from benchmarks import environment, providers, report
from benchmarks.__main__ import _command, app
from benchmarks.case import Case, Check, Context, Provider, Skip, Workload, equal, relative_error, two_times
from benchmarks.cases._worker import in_subprocess
from benchmarks.lines import write
from benchmarks.random_checkpoint import write_random_checkpoint
from benchmarks.run import GateError, case_names, load_case, run_case
from benchmarks.timing import Ceilings, Clock, floor_s, is_wide, measure, ratio, spread

ROOT = Path(__file__).resolve().parents[2]


def green(outputs) -> list[Check]:
    return [Check(name, 0.0, 0.0) for name in outputs]


def workload(**changes) -> Workload:
    given = {
        "name": "shape 3",
        "providers": [Provider("ours", lambda: 1), Provider("theirs", lambda: 1, peer=True)],
        "gate": green,
        "min_rounds": 3,
        "max_rounds": 3,
    }
    return Workload(**{**given, **changes})


def case(*workloads: Workload, gate=None) -> Case:
    return Case("tiny", "A case of this test", lambda context: iter(workloads), gate)


QUICK = Context(quick=True)


# ------------------------------------------------------------------------------------------------------------- gates


@pytest.mark.parametrize("error", [0.2, math.nan, math.inf])
def test_a_workload_with_a_red_gate_is_not_timed_and_the_others_are(error):
    later = []
    timed = workload(
        providers=[Provider("ours", lambda: 1, before=lambda: None, warm=lambda: later.append("timed"))],
        gate=lambda outputs: [Check("wrong", error, 0.1), Check("right", 0.0, 0.1)],
    )
    result = run_case(case(timed, workload(name="second")), QUICK)
    assert later == [] and {row["workload"] for row in result["rows"]} == {"second"}
    assert re.search(r"tiny, shape 3.*\n.*wrong", result["red"][0]) and len(result["red"]) == 1
    assert {"workload": "shape 3", "provider": "all", "reason": "the parity gate is red"} in result["skipped"]
    assert all(check["name"].startswith("second") for check in result["gate"])


def test_red_case_gate_stops_before_the_first_workload():
    def never(context):
        raise AssertionError("a workload was made")
        yield

    with pytest.raises(GateError, match="everything"):
        run_case(Case("tiny", "", never, gate=lambda context: [Check("everything", 1.0, 0.5)]), QUICK)


def test_a_workload_without_any_gate_is_refused():
    with pytest.raises(ValueError, match="has no parity gate"):
        run_case(case(workload(gate=None)), QUICK)
    with pytest.raises(ValueError, match="checked nothing"):
        run_case(case(workload(gate=lambda outputs: [])), QUICK)


def test_providers_are_made_at_their_turn_and_may_refuse():
    def refuse():
        raise ValueError("no heads of 7\nbut of 8")

    def skip():
        raise Skip("not installed")

    made = [
        Provider("ours", make=lambda: Provider("ours", lambda: "a")),
        Provider("x", make=refuse, refuses=(ValueError,), peer=True),
        Provider("y", make=lambda: Provider("y", refuse, peer=True), refuses=(ValueError,), peer=True),
        Provider("z", make=skip, peer=True),
    ]
    result = run_case(case(workload(providers=made, another=lambda: workload(providers=made))), QUICK)
    (row,) = result["rows"]
    assert row["provider"] == "ours" and row["first_call_s"] > 0 and row["another_shape_s"] > 0
    refused = "no heads of 7"
    assert {s["provider"]: s["reason"] for s in result["skipped"]} == {"x": refused, "y": refused, "z": "not installed"}
    with pytest.raises(ValueError, match="no heads"):
        run_case(case(workload(providers=[Provider("ours", make=refuse)])), QUICK)


def test_what_fails_on_another_shape_costs_no_sample():
    def fail():
        raise RuntimeError("no such shape")

    other = [Provider("ours", fail), Provider("theirs", fail, peer=True)]
    result = run_case(case(workload(another=lambda: workload(providers=other))), QUICK)
    assert [row["provider"] for row in result["rows"]] == ["ours", "theirs"]
    assert all("first_call_s" in row and "another_shape_s" not in row for row in result["rows"])
    assert result["red"] == ["tiny, shape 3: ours on another shape: no such shape"] and result["skipped"] == []


@pytest.mark.parametrize("how", ["red", "raises", "raises when timed", "raises in the gate", "on another shape"])
def test_what_is_ours_by_name_only_costs_no_other_its_row(how):
    """Its row is left out with the reason, or kept where only another shape fails; nothing of it is red."""
    calls = []

    def fail(when):
        calls.append(1)
        if len(calls) >= when:
            raise RuntimeError("no such kernel")
        return calls

    def gate(outputs):
        if how == "raises in the gate" and "new" in outputs:
            raise RuntimeError("no such kernel")
        return [Check(name, float(how == "red" and name == "new"), 0.5, name) for name in outputs]

    when = {"raises": 1, "raises when timed": 2}.get(how, 10**9)
    new = Provider("new", make=lambda: Provider("new", lambda: fail(when), trial=True), trial=True)
    other = Provider("new", lambda: fail(0), trial=True)
    shape = (lambda: workload(providers=[other])) if how == "on another shape" else None
    one = workload(providers=[Provider("ours", lambda: 1), new], gate=gate, another=shape)
    result = run_case(case(one), QUICK)
    kept = how == "on another shape"
    assert [row["provider"] for row in result["rows"]] == (["ours", "new"] if kept else ["ours"])
    assert result["red"] == [] and [skip["provider"] for skip in result["skipped"]] == ([] if kept else ["new"])
    assert kept or re.search("no such kernel|the parity gate is red", result["skipped"][0]["reason"])
    assert all(not row["peer"] for row in result["rows"])


def test_contenders_can_be_left_out():
    result = run_case(
        case(workload(), workload(name="second", another=workload)), Context(quick=True, without=("theirs",))
    )
    assert {(row["workload"], row["provider"]) for row in result["rows"]} == {("shape 3", "ours"), ("second", "ours")}
    assert {s["reason"] for s in result["skipped"]} == {"left out by --without"}


def test_a_lost_device_is_no_refusal():
    def lose():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    lost = Provider("peer", lose, refuses=(RuntimeError,), peer=True)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        run_case(case(workload(providers=[lost])), QUICK)


def test_gate_gets_the_outputs_of_everyone_who_runs():
    seen = {}
    names = [Provider("ours", lambda: "a"), Provider("x", lambda: "b", peer=True), Provider("y", skipped="absent")]
    run_case(case(workload(providers=names, gate=lambda outputs: seen.update(outputs) or green(outputs))), QUICK)
    assert seen == {"ours": "a", "x": "b"}


def test_checks():
    x = torch.tensor([1.0, 2.0])
    assert equal("e", x, x).passed
    assert not equal("e", x, x + torch.tensor([0.0, 1e-6])).passed
    assert not equal("e", x, x[:1]).passed
    assert two_times("t", x + 0.02, x + 0.01, x).passed
    assert not two_times("t", x + 0.021, x + 0.01, x).passed
    assert not two_times("t", x * math.nan, x + 0.01, x).passed
    assert relative_error(x, x[:1]) == math.inf


# ------------------------------------------------------------------------------------------------------------ rounds


def test_providers_take_turns_and_each_starts_a_round():
    order = []
    contenders = [
        Provider(name, lambda name=name: order.append(name), before=lambda: None, warm=lambda: None) for name in "abc"
    ]
    measure(workload(providers=contenders, gate=None), Clock(torch.device("cpu")))
    assert "".join(order) == "abcbcacab"


def test_before_runs_untimed_before_every_sample():
    events = []
    provider = Provider("a", lambda: events.append("call"), before=lambda: events.append("before"))
    samples, _ = measure(workload(providers=[provider], max_rounds=9), Clock(torch.device("cpu")), rounds=4)
    assert events == ["before", "call"] * (len(events) // 2)
    assert len(samples["a"]["time"]) == 4
    assert len(measure(workload(max_rounds=1), Clock(torch.device("cpu")), rounds=4)[0]["ours"]["time"]) == 1


def test_times_are_per_unit_of_work():
    class Fixed(Clock):
        def time(self, call, repeat=1):
            return 8.0

    samples, _ = measure(workload(per_call=16), Fixed(torch.device("cpu")))
    assert samples["ours"]["time"] == [0.5] * 3


def test_rounds_stop_at_the_budget_but_not_before_the_least():
    slow = workload(budget_s=0.0, min_rounds=2, max_rounds=50)
    assert len(measure(slow, Clock(torch.device("cpu")))[0]["ours"]["time"]) == 2


def test_returned_metrics_replace_timing():
    contenders = [Provider("ours", lambda: {"peak": 7, "other": 1}), Provider("x", lambda: {"peak": 14}, peer=True)]
    result = run_case(case(workload(providers=contenders, units={"peak": "B"})), QUICK)
    ours, theirs = result["rows"]
    assert (ours["metric"], ours["unit"], ours["median"], ours["ratios"]["x"]["median"]) == ("peak", "B", 7.0, 2.0)
    assert theirs["ratios"] == {}
    assert result["ceilings"] == {}


def test_time_of_each_token_is_also_a_rate():
    ours = Provider("ours", lambda: {"each token": 0.25})
    (row,) = run_case(case(workload(providers=[ours], units={"each token": "s"})), QUICK)["rows"]
    assert report.row_cells(row)[5] == "4 tokens/s"


def test_nothing_has_no_ratio_to_something():
    contenders = [Provider("ours", lambda: {"copies": 0}), Provider("x", lambda: {"copies": 3}, peer=True)]
    ours, _ = run_case(case(workload(providers=contenders, units={"copies": "s"})), QUICK)["rows"]
    assert ours["ratios"] == {}


@pytest.mark.parametrize(
    ("samples", "wide"),
    [
        ([1.0, 1.01, 1.02, 1.03, 1.04, 1.05, 1.06, 9.0], False),  # one disturbed round
        ([1.0, 1.0, 1.0, 1.3, 1.3, 1.3], True),
        ([4.0, 1.0, 3.0, 2.0], True),
        ([1.0, 1.0, 1.0, 1.0], False),
        ([1.0, 9.0, 5.0], False),  # too few to tell
    ],
)
def test_a_busy_machine_is_told(samples, wide):
    result = run_case(case(workload()), QUICK)
    for row in result["rows"][:1]:
        row.update(spread(samples))
    console = Console(record=True, width=300, file=io.StringIO())
    report.show(result, console)
    told = f"wide: shape 3, ours, time: the middle half of {len(samples)} rounds spans more than 20% of the median"
    assert (told in console.export_text()) == is_wide(samples) == wide


def test_spread_and_ratio():
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0, "samples": [3.0, 1.0, 2.0]}
    assert ratio([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]) == {"median": 2.0, "min": 1.0, "max": 3.0, "best": 2.0}


def test_the_ceiling_is_the_one_that_binds():
    given = {"copy_bytes_per_s": 100.0, "matmul_flops_per_s": {"float32": 1000.0}}
    assert floor_s(given, 5000.0, 100.0, "float32") == (5.0, "matmul")
    assert floor_s(given, 5000.0, 1000.0, "float32") == (10.0, "copy")
    assert floor_s(given, None, None, "float32") is None and floor_s({}, 1.0, 1.0, "float32") is None
    ceilings = Ceilings(Clock(torch.device("cpu")), quick=True)
    ceilings.update([torch.float32])
    assert ceilings.copy > 100 and ceilings.matmul[torch.float32] > 1000


def test_declarations_are_checked():
    with pytest.raises(ValueError, match="either call, or make, or the reason"):
        Provider("a")
    with pytest.raises(ValueError, match="unique"):
        workload(providers=[Provider("a", lambda: 1), Provider("a", lambda: 1)])


# ----------------------------------------------------------------------------------------------------------- results


@pytest.fixture
def result() -> dict:
    x = torch.randn(64, 64)
    contenders = [
        Provider("ours", lambda: x @ x),
        Provider("theirs", lambda: torch.mm(x, x), peer=True),
        Provider("absent", skipped="not installed", peer=True),
    ]
    timed = workload(
        name="64 | 64",
        providers=contenders,
        gate=lambda outputs: [Check("product", relative_error(outputs["ours"], outputs["theirs"]), 1e-6)],
        flops=2 * 64**3,
        bytes=3 * x.nbytes,
    )
    return run_case(case(timed), QUICK, command="python -m benchmarks run tiny")


def test_json(result, tmp_path):
    path = write(result, tmp_path / "new")
    assert path == tmp_path / "new" / "tiny.json"
    read = json.loads(path.read_text())
    assert read == result
    for key in (
        "schema",
        "case",
        "command",
        "date",
        "device",
        "threads",
        "versions",
        "load_average",
        "commit",
        "quick",
    ):
        assert key in read
    assert torch.__version__.startswith(read["versions"]["torch"])  # wheels may leave "+cu128" out of their metadata
    assert read["gate"] == [{"name": "64 | 64: product", "error": 0.0, "allowed": 1e-6}]
    assert read["skipped"] == [{"workload": "64 | 64", "provider": "absent", "reason": "not installed"}]
    ours, theirs = read["rows"]
    assert ours["min"] <= ours["median"] <= ours["max"] and len(ours["samples"]) == 2
    assert ours["flops_per_s"] == pytest.approx(2 * 64**3 / ours["median"])
    assert ours["bytes_per_s"] == pytest.approx(3 * 64 * 64 * 4 / ours["median"])
    floor = max(
        2 * 64**3 / read["ceilings"]["matmul_flops_per_s"]["float32"], 49152 / read["ceilings"]["copy_bytes_per_s"]
    )
    assert ours["of_ceiling"] == pytest.approx(floor / ours["median"])
    assert list(ours["ratios"]) == ["theirs"] and theirs["ratios"] == {}


def test_tables(result, capsys):
    rows = [line for line in report.table(result).splitlines() if line.startswith("|")]
    assert len(rows) == 4
    assert {line.count("|") - line.count("\\|") for line in rows} == {len(report.COLUMNS) + 1}
    assert "64 \\| 64" in rows[2] and rows[2].rstrip(" |").endswith("x) theirs")
    assert "Skipped: absent in 64 | 64: not installed" in report.notes(result)
    assert "Parity gate: 1 checks green; nearest to its bound: 64 | 64: product" in report.notes(result)
    report.show(result, Console(width=200))
    assert "absent in 64 | 64: not installed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("number", "unit", "text"),
    [
        (1.2345, "s", "1.23 s"),
        (0.0123, "s", "12.3 ms"),
        (4.56e-5, "s", "45.6 µs"),
        (57.04, "s", "57 s"),
        (1.5e9, "B", "1.50 GB"),
        (-2e6, "B", "-2.0 MB"),
        (83.5, "launches", "83.5"),
        (7.0, "launches", "7"),
    ],
)
def test_units(number, unit, text):
    assert report.value(number, unit) == text


# ---------------------------------------------------------------------------------------------- providers and places


def test_a_peer_that_is_absent_or_old_says_so(monkeypatch):
    monkeypatch.setitem(providers.PEERS, "absent", ("no-such-distribution", (1, 0)))
    monkeypatch.setitem(providers.PEERS, "torch", ("torch", (999, 0)))
    assert providers.why_not("absent") == "no-such-distribution is not installed"
    assert "999.0 or later is wanted" in str(providers.why_not("torch"))
    assert providers.why_not("PIL") is None
    assert providers.release("2.13.0+cpu") == (2, 13)


def test_a_peer_that_does_not_import_says_so(monkeypatch):
    monkeypatch.setitem(providers.PEERS, "torch.no_such_module", ("torch", (1, 0)))
    assert "does not import: No module named" in str(providers.why_not("torch.no_such_module"))


def test_device_folder():
    assert environment.slug("NVIDIA H200 (SXM)") == "nvidia-h200-sxm"
    folder = environment.folder_name(torch.device("cpu"))
    isa = environment.slug(torch.backends.cpu.get_cpu_capability())
    assert folder.endswith(f"-{isa}-{torch.get_num_threads()}-threads")


def test_every_case_declares_itself():
    assert {"model", "load", "positions"} <= set(case_names())
    for name in case_names():
        found = load_case(name)
        assert found.name == name and found.summary
    with pytest.raises(ValueError, match=r"the cases are .*positions"):
        load_case("nothing")


def test_temporary_folders_end_with_the_run():
    with Context() as context:
        folder = context.checkpoints()
        assert folder.is_dir() and context.checkpoints() == folder
    assert not folder.exists()


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )


def test_positions_by_command(tmp_path):
    done = command("run", "positions", "--quick", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr + done.stdout
    written = json.loads((tmp_path / "positions.json").read_text())
    assert written["quick"] is True and written["command"].startswith("python -m benchmarks run positions")
    ran = {row["provider"] for row in written["rows"]}
    assert {"eager", "transformers"} - {s["provider"] for s in written["skipped"]} <= ran
    assert "eager" in ran


@pytest.mark.skipif(
    int(PIL.__version__.split(".")[0]) < 13,
    reason="the gate takes Pillow's bytes, and before 13 it resizes columns first",
)
def test_preprocess_by_command(tmp_path):
    """Its gate holds ours to Pillow and transformers, bit by bit."""
    done = command("run", "preprocess", "--quick", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr + done.stdout
    written = json.loads((tmp_path / "preprocess.json").read_text())
    assert {"uint8", "uint8, 1 thread", "float32", "torch"} <= {row["provider"] for row in written["rows"]}
    assert all(row["bytes_per_s"] > 0 for row in written["rows"])
    assert any("against transformers" in check["name"] for check in written["gate"])


def test_command_refuses_unknown_cases_and_quick_numbers_among_results(tmp_path):
    unknown = CliRunner().invoke(app, ["run", "nothing", "--out", str(tmp_path)])
    assert unknown.exit_code == 2 and "nothing" in unknown.output
    quick = CliRunner().invoke(app, ["run", "positions", "--quick"])
    assert quick.exit_code == 2 and "--out" in quick.output


def test_load_measures_in_fresh_processes(tmp_path):
    folder = write_random_checkpoint(tmp_path, dtype=torch.bfloat16)
    got = in_subprocess("load", "ours", folder=folder, device="cpu")
    assert got["import"] > 0 and got["load and read every weight"] >= got["load"] > 0
    assert got["peak memory"] > 50e6


def test_a_failed_subprocess_is_an_error():
    with pytest.raises(RuntimeError, match=r"nothing of ours failed with status 1:[\s\S]*KeyError"):
        in_subprocess("nothing", "ours", folder="", device="cpu")


def test_the_quoted_command_names_no_folder(monkeypatch):
    words = ["run", "load", "--checkpoint-dir", "/somewhere", "--quick", "--out=/elsewhere", "--rounds", "2"]
    monkeypatch.setattr("sys.argv", ["benchmarks", *words])
    assert _command() == "python -m benchmarks run load --quick --rounds 2"
