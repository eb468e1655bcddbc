"""What goes wrong in a workload costs that workload only, and a killed run leaves what it had measured."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import environment, isolate
from benchmarks.__main__ import app
from benchmarks.case import Context
from benchmarks.lines import assemble, read
from tests.benchmarks.broken_cases.workloads import WAYS

ROOT = Path(__file__).resolve().parents[2]
SLOW = [
    sys.executable,
    *["-m", "benchmarks", "run", "tests.benchmarks.broken_cases.slow", "--quick", "--device", "cpu", "--out"],
]
ROW_KEYS = {"workload", "provider", "peer", "metric", "unit", "median", "min", "max", "samples", "ratios"}


def command(*arguments: str):
    return CliRunner().invoke(app, [*arguments])


@pytest.fixture(scope="module")
def broken(tmp_path_factory) -> tuple[int, str, Path]:
    """Exit status, output and folder of one run of all that go wrong."""
    out = tmp_path_factory.mktemp("broken")
    case = "tests.benchmarks.broken_cases.workloads"
    # Five seconds are what starting a process may take on a machine with much else to do.
    done = command("run", case, "--quick", "--device", "cpu", "--limit", "5", "--out", str(out))
    return done.exit_code, done.output, out


def test_each_costs_itself_only(broken):
    status, _, out = broken
    result = json.loads((out / "broken.json").read_text())
    assert status == 1
    assert [(row["workload"], row["provider"]) for row in result["rows"]] == [
        (name, who) for name in ("first", "last") for who in ("ours", "theirs")
    ]
    assert all(set(row) >= ROW_KEYS and len(row["samples"]) == 2 for row in result["rows"])
    assert all(row["first_call_s"] >= 0 for row in result["rows"])
    reasons = {skip["workload"]: skip["reason"] for skip in result["skipped"] if skip["provider"] == "all"}
    assert reasons == {
        "aborts": "ended by SIGABRT",
        "crashes": "ended by SIGSEGV",
        "leaves": "ended with status 3 before it was done",
        "fails": "RuntimeError: CUDA error: an illegal memory access was encountered",
        "hangs": "hung: ended after 5 s",
        "red": "the parity gate is red",
    }
    assert result["missing"] == [] and len(result["red"]) == len(reasons)


def test_the_end_of_what_a_process_said_is_kept(broken):
    _, output, out = broken
    result = json.loads((out / "broken.json").read_text())
    said = {skip["workload"]: "\n".join(skip.get("stderr", [])) for skip in result["skipped"]}
    assert "about to read address 0" in said["crashes"] and "Segmentation fault" in said["crashes"]
    assert "in hang" in said["hangs"] and "in fail" in said["fails"]  # where each was
    assert "broken, crashes: ended by SIGSEGV" in output and "parity gate is red" in output


def test_every_line_is_there(broken):
    *_, out = broken
    lines = read(out / "broken.jsonl")
    assert [line["line"] for line in lines] == ["plan", "workload", *["failed"] * 6, "workload"]
    assert lines[0]["workloads"] == list(WAYS)
    assert assemble(lines) == json.loads((out / "broken.json").read_text())


def test_late_workloads_come_after_those_of_all_cases(tmp_path, monkeypatch):
    order, append = [], isolate.append

    def noted(line, path):
        order.append((path.stem, line.get("workload")))
        append(line, path)

    monkeypatch.setattr(isolate, "append", noted)
    names = ["tests.benchmarks.broken_cases.late", "tests.benchmarks.broken_cases.peers"]
    small = ["aborts", "hangs", "loses CUDA", "loses CUDA later"]
    small = [word for name in small for word in ("--without", name)]
    done = command("run", *names, *small, "--quick", "--device", "cpu", "--out", str(tmp_path))
    assert done.exit_code == 0, done.output
    assert order == [
        ("late", None), ("late", "last"),
        ("broken_peers", None), ("broken_peers", "all of them"), ("broken_peers", "behind them"),
        ("late", "first"),
    ]  # fmt: skip
    result = json.loads((tmp_path / "late.json").read_text())
    assert result["missing"] == [] and len(result["rows"]) == 4


def test_a_gate_of_the_case_that_crashes_is_red_and_writes_no_results(tmp_path):
    done = command("run", "tests.benchmarks.broken_cases.gate", "--quick", "--device", "cpu", "--out", str(tmp_path))
    assert done.exit_code == 1 and "broken_gate: ended by SIGABRT" in done.output
    assert [path.name for path in tmp_path.iterdir()] == ["broken_gate.jsonl"]


def test_what_cannot_name_its_workloads_does_not_end_the_cases_behind_it(tmp_path):
    names = ["tests.benchmarks.broken_cases.plan", "tests.benchmarks.broken_cases.gate"]
    done = command("run", *names, "--quick", "--device", "cpu", "--out", str(tmp_path))
    assert done.exit_code == 1 and "broken_plan, naming the workloads: OSError: no such device" in done.output
    assert [path.name for path in tmp_path.iterdir()] == ["broken_gate.jsonl"]


def test_what_a_peer_does_costs_that_peer_only(tmp_path):
    """Also one that ends or hangs the process: the workload is measured again without it."""
    done = command(
        *("run", "tests.benchmarks.broken_cases.peers", "--quick", "--device", "cpu"),
        *("--limit", "5", "--out", str(tmp_path)),
    )
    result = json.loads((tmp_path / "broken_peers.json").read_text())
    assert done.exit_code == 0, done.output
    assert {(row["workload"], row["provider"]) for row in result["rows"]} == {
        (name, who) for name in ("all of them", "behind them") for who in ("ours", "well")
    }
    reasons = {skip["provider"]: skip["reason"] for skip in result["skipped"] if skip["workload"] == "all of them"}
    assert reasons == {
        "aborts": "ended by SIGABRT",
        "loses CUDA": "RuntimeError: CUDA error: an illegal memory access was encountered",
        "hangs": "hung: ended after 5 s",
        "does not compile": "CompilationError",
        "is wrong": "the parity gate is red: is wrong: error 1, allowed 0",
        "is no number": "the parity gate cannot compare its result: a result",
        "tires": "out of resource: shared memory",
        "loses CUDA later": "RuntimeError: CUDA error: an illegal memory access was encountered",
    }
    assert [check["name"] for check in result["gate"]] == [
        *(f"all of them: {who}" for who in ("ours", "tires", "well")),
        *(f"behind them: {who}" for who in ("ours", "well")),
    ]
    assert "broken_peers, all of them, aborts: ended by SIGABRT" in done.output


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_is_killed_leaves_its_lines(tmp_path, number):
    run = subprocess.Popen(
        [*SLOW, str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    lines, results = tmp_path / "slow.jsonl", tmp_path / "slow.json"
    deadline = time.monotonic() + 120
    while not (lines.is_file() and lines.read_text().count("\n") == 2):
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    run.send_signal(number)
    output, _ = run.communicate(timeout=30)
    if number == signal.SIGTERM:
        assert run.returncode == 128 + number and "missing: the run did not come to hangs" in output
        assert json.loads(results.read_text())["missing"] == ["hangs", "last"]
        results.unlink()
    assert not results.exists()
    with lines.open("a") as file:
        file.write('{"line": "worklo')  # as a run leaves it that was killed while writing
    done = command("collect", str(lines))
    assert done.exit_code == 1 and "missing: the run did not come to last" in done.output
    made = json.loads(results.read_text())
    assert made["missing"] == ["hangs", "last"]
    assert {(row["workload"], row["provider"]) for row in made["rows"]} == {("first", "ours"), ("first", "theirs")}


def test_lines_that_are_none_are_refused(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"line": "workload"}\n')
    assert command("collect", str(path)).exit_code == 2
    path.write_text('{"line": "plan"\n{"line": "workload"}\n')
    with pytest.raises(ValueError, match="line 1"):
        read(path)
    assert command("collect", str(tmp_path / "absent.jsonl")).exit_code == 2


def test_threads_and_device_are_those_asked_for():
    """What is measured in a process of its own has the parent's threads, and what it is forked from has but one: a
    parallel loop of that one would hang in all others."""
    task = isolate.Task("plan", "tests.benchmarks.broken_cases.gate", Context(quick=True), torch.get_num_threads())
    with isolate.Processes() as processes:
        plan = processes.run(task, 60)
        server = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
        assert len(list(Path(f"/proc/{server}/task").iterdir())) == 1
    assert isinstance(plan, dict) and plan["threads"] == torch.get_num_threads()


def test_a_process_that_cannot_be_forked_is_started_anew(monkeypatch):
    kinds = []

    class Process(isolate._Process):
        def __init__(self, kind: str, case: str) -> None:
            super().__init__(kind, case)
            kinds.append(kind)
            if kind == "forkserver":
                self.heard.append(("no fork", None))

    monkeypatch.setattr(isolate, "_Process", Process)
    task = isolate.Task("plan", "tests.benchmarks.broken_cases.gate", Context(quick=True), 1)
    with isolate.Processes() as processes:
        for _ in range(2):
            plan = processes.run(task, 60)
            assert isinstance(plan, dict) and plan["workloads"] == ["first"]
    assert kinds == ["forkserver", "spawn"]


def test_a_case_has_one_process_until_something_ends_it(monkeypatch):
    """And there is never a second one, which would disturb what is timed."""
    alive: list[isolate._Process] = []

    class Process(isolate._Process):
        def __init__(self, kind: str, case: str) -> None:
            assert all(process.process.exitcode is not None for process in alive)
            super().__init__(kind, case)
            alive.append(self)

    monkeypatch.setattr(isolate, "_Process", Process)
    with isolate.Processes() as processes:
        for name in ("first", "aborts", "red", "last"):
            place = {"index": list(WAYS).index(name), "workload": name}
            task = isolate.Task("workload", "tests.benchmarks.broken_cases.workloads", Context(quick=True), 1, **place)
            got = processes.run(task, 60)
            assert isinstance(got, isolate.Ended) == (name == "aborts")
            assert isinstance(got, isolate.Ended) or got["workload"] == name
        assert len(alive) == 2
        processes.run(isolate.Task("plan", "tests.benchmarks.broken_cases.gate", Context(quick=True), 1), 60)
    assert len(alive) == 3


def test_float32_is_measured_in_float32():
    """cuDNN's convolutions are in TF32 unless one says no, and a gate would find that."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    assert before[1], "PyTorch's default is another: say so in environment.full_float32"
    with environment.full_float32():
        assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == before
    task = isolate.Task("plan", "tests.benchmarks.broken_cases.gate", Context(quick=True), 1)
    with isolate.Processes() as processes:
        plan = processes.run(task, 60)
    assert isinstance(plan, dict) and plan["tf32"] is False


def test_what_a_workload_started_ends_with_the_run(tmp_path):
    """Nothing of a killed run is left at work on the device."""
    run = subprocess.Popen(
        [*SLOW, str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "QWEN2VL_TEST_MARK": str(tmp_path)},
    )
    lines = tmp_path / "slow.jsonl"
    while not (lines.is_file() and lines.read_text().count("\n") == 2):
        assert run.poll() is None
        time.sleep(0.05)
    assert _marked(str(tmp_path))
    run.kill()
    run.wait()
    deadline = time.monotonic() + 30
    while left := _marked(str(tmp_path)):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def _marked(mark: str) -> list[int]:
    """Processes that were started with ``mark`` in their environment."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"QWEN2VL_TEST_MARK={mark}".encode() in entry.read_bytes():
                found.append(int(entry.parent.name))
        except OSError:
            continue
    return found
