"""A test that loses CUDA's context, dies or hangs fails alone, and says why."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import xml.etree.ElementTree as xml
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

#: CUDA as a process sees it after an illegal access: initialized, and every call raises.
_LOSE = """
    import os, pytest, time, torch

    def lose():
        def fail(*_):
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        torch.cuda.is_initialized = lambda: True
        torch.cuda.synchronize = fail
"""
#: What a test does, and what its report must say.
_FAILING = {
    "raises": ("lose(); torch.cuda.synchronize()", "AcceleratorError: CUDA error: an illegal memory access"),
    "launches": ("lose()", "AcceleratorError: CUDA error: an illegal memory access"),  # and is found out afterwards
    "fails_as_expected": ("lose(); pytest.xfail('known')", "known"),
    "aborts": ("os.abort()", "Fatal Python error: Aborted"),
    "hangs": ("time.sleep(600)", "Timeout (0:00:03)!"),
    "only_fails": ("assert not 'the context is there'", "the context is there"),
}


def _run(
    folder: Path, tests: dict[str, str], *arguments: str
) -> tuple[subprocess.CompletedProcess[str], dict[str, str]]:
    """What pytest made of tests by name and what they do: the process, and why each failed or "" ."""
    lines = "".join(f"def test_{name}(): {does}\n" for name, does in tests.items())
    (folder / "conftest.py").write_text("from tests.crashes import *\n")
    (folder / "test_it.py").write_text(textwrap.dedent(_LOSE) + lines)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--junitxml=it.xml", "--test-limit=3"]
    command.append("--test-lines=lines.jsonl")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    outcomes: dict[str, str] = {}
    if (folder / "it.xml").is_file():
        for case in xml.parse(folder / "it.xml").getroot().iter("testcase"):
            name = case.attrib["name"].removeprefix("test_")
            assert name not in outcomes, f"{name} is reported twice:\n{done.stdout}"
            outcomes[name] = "".join(f"{part.get('message')}\n{part.text}" for part in case)
    return done, outcomes


@pytest.mark.slow
def test_one_test_fails_and_the_others_run(tmp_path):
    """Every way to fail, between tests that pass: each costs one worker, but for the plain one, and one test."""
    tests = {"first": "pass"}
    for name, (does, _) in _FAILING.items():
        tests |= {name: does, f"after_{name}": "pass", f"long_after_{name}": "pass"}
    done, outcomes = _run(tmp_path, tests, "-n", "1", "--dist", "worksteal", "--max-worker-restart", "1000")
    assert done.returncode == 1, done.stdout + done.stderr
    assert {name for name, why in outcomes.items() if why} == set(_FAILING) and set(outcomes) == set(tests)
    assert f"{len(_FAILING)} failed, {len(tests) - len(_FAILING)} passed" in done.stdout, done.stdout
    lines = [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    told = {line["test"].partition("::test_")[2]: line.get("why", "") for line in lines[1:]}
    for name, (_, reason) in _FAILING.items():
        assert reason in outcomes[name] and reason in told[name]
        assert ("crashed while running" in outcomes[name]) == (name != "only_fails")


def test_a_run_without_workers_ends_with_a_message(tmp_path):
    tests = {"first": "pass", "raises": _FAILING["raises"][0], "after": "pass"}
    done, outcomes = _run(tmp_path, tests, "-p", "no:xdist")
    assert done.returncode == 1 and list(outcomes) == ["first", "raises"]
    assert "test_raises lost CUDA's context" in done.stdout, done.stdout


def test_a_hang_without_workers_shows_where(tmp_path):
    done, _ = _run(tmp_path, {"hangs": _FAILING["hangs"][0]}, "-p", "no:xdist")
    assert done.returncode == 1 and "Timeout (0:00:03)!" in done.stderr and "in test_hangs" in done.stderr


@pytest.mark.parametrize("workers", ["-n1", "-pno:xdist"])
def test_a_stopped_run_leaves_its_failures_and_names_what_did_not_run(tmp_path, workers):
    (tmp_path / "conftest.py").write_text("from tests.crashes import *\n")
    (tmp_path / "test_it.py").write_text(
        "import os, pytest, time\n"
        "def test_passes(): pass\n"
        "def test_fails(): assert not 'a reason'\n"
        "@pytest.mark.skip('no GPU')\ndef test_skips(): pass\n"
        "def test_takes_long(): time.sleep(600)\n"
        "def test_comes_later(): pass\n"
    )
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--test-lines=lines.jsonl", workers]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"PYTHONPATH": str(ROOT)}
    run = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    path, deadline = tmp_path / "lines.jsonl", time.monotonic() + 120
    while not path.is_file() or path.read_text().count("\n") < 4:
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(run.pid, signal.SIGKILL)
    run.communicate()
    collected, *tests = map(json.loads, path.read_text().splitlines())
    ran = {line["test"].rpartition("_")[2]: line for line in tests}
    assert {name: line["outcome"] for name, line in ran.items()} == {
        "passes": "passed", "fails": "failed", "skips": "skipped",
    }  # fmt: skip
    assert "assert not 'a reason'" in ran["fails"]["why"] and "no GPU" in ran["skips"]["why"]
    assert sorted(set(collected["collected"]) - {line["test"] for line in tests}) == [
        "test_it.py::test_comes_later", "test_it.py::test_takes_long",
    ]  # fmt: skip
