"""``python -m benchmarks gpu``: phases under one budget, what they leave, and its rehearsal without a GPU."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import environment, gpu
from benchmarks.__main__ import app
from benchmarks.case import Context
from benchmarks.cases._qwen2vl import checkpoint
from benchmarks.cases.decode import COMPILED
from benchmarks.gpu import session as session_module
from benchmarks.gpu.session import SECONDS, Part, Phase, Session
from benchmarks.random_checkpoint import small_config, write_random_checkpoint
from benchmarks.run import case_names
from qwen2vl import Qwen2VL
from qwen2vl_kernels.core import launching
from tests.conftest import DEVICE

ROOT = Path(__file__).resolve().parents[2]
PHASES = ["build", "tests", "attention", "tower", "ops", "tuning", "sanitizer", "compiled"]


def python(code: str, **options) -> Part:
    return Part(options.pop("name", "part"), (sys.executable, "-c", code), **options)


def session(tmp_path: Path, budget: float = 60.0) -> Session:
    return Session(budget, tmp_path / "out", tmp_path / "work", lambda text: None, {})


def packed(out: Path) -> dict[str, bytes]:
    with tarfile.open(out / "logs.tgz") as archive:
        return {entry.name: archive.extractfile(entry).read() for entry in archive.getmembers()}  # type: ignore[union-attr]


# ------------------------------------------------------------------------------------------------------------- phases


def test_a_part_that_fails_leaves_the_others(tmp_path):
    made = session(tmp_path)
    bad, good = python("print('oh no'); raise SystemExit(3)", name="bad"), python("print('fine')", name="good")
    made.run([Phase("one", 60, (bad, good)), Phase("two", 60, (python("", name="quiet"),))])
    assert [(o.phase, o.part, o.state, o.last) for o in made.outcomes] == [
        ("one", "bad", "failed", "oh no"),
        ("one", "good", "done", "fine"),
        ("two", "quiet", "done", "it said nothing"),
    ]
    assert made.failed()
    assert packed(tmp_path / "out")["logs/bad.log"] == b"oh no\n"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["logs.tgz", "summary.json", "summary.txt"]


def test_parts_of_a_phase_run_at_once_where_it_says_so(tmp_path):
    made = session(tmp_path)
    meet = (
        "import pathlib, time\nhere, there = map(pathlib.Path, {0!r})\nhere.touch()\n"
        "while not there.exists(): time.sleep(0.01)"
    )
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    parts = (python(meet.format((a, b)), name="a"), python(meet.format((b, a)), name="b"))
    made.run([Phase("both", 60, parts, together=True)])
    assert [o.state for o in made.outcomes] == ["done", "done"]


def test_what_hangs_is_stopped_with_all_it_started(tmp_path, monkeypatch):
    monkeypatch.setattr(session_module, "_LEAST", 0.0)
    monkeypatch.setattr(session_module, "_GRACE", 0.5)
    made = session(tmp_path)
    deaf = (
        "import signal, subprocess, sys, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(child.pid, flush=True)\ntime.sleep(600)"
    )
    made.run([Phase("tests", 1.5, (python(deaf),)), Phase("next", 60, (python("print('on')"),))])
    stopped, following = made.outcomes
    assert stopped.state == "failed" and stopped.seconds < 10  # it does not measure: nothing says that it is right
    assert following.state == "done"
    deadline = time.monotonic() + 10
    while Path(f"/proc/{stopped.last}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{stopped.last}/cmdline").exists() or not Path(f"/proc/{stopped.last}/cmdline").read_bytes()


def test_the_budget_ends_what_measures_and_names_what_is_left(tmp_path, monkeypatch):
    """Of a case that was cut the lines are made into results, and only what is unfinished is named."""
    monkeypatch.setattr(session_module, "_LEAST", 1.0)
    made = session(tmp_path, budget=12.0)
    case = "tests.benchmarks.broken_cases.slow"
    command = [sys.executable, "-m", "benchmarks", "run", case, "--quick", "--device", "cpu"]
    command += ["--out", str(tmp_path / "work" / "results"), "--checkpoint-dir", str(tmp_path)]
    slow = Part("slow", tuple(command), cases=("slow",), measures=True, environment={"OMP_NUM_THREADS": "1"})
    lines = tmp_path / "work" / "results" / "slow.jsonl"
    wait = f"import pathlib, time\nwhile not pathlib.Path({str(lines)!r}).exists(): time.sleep(0.05)"
    later = python("print(1)", name="later")
    made.run([Phase("one", 60, (slow, python(wait, name="never"))), Phase("two", 60, (later,))])
    first, *others = made.outcomes
    assert first.state == "stopped" and not made.failed()
    assert first.rest == "slow" and "--checkpoint-dir" not in first.command  # its checkpoints end with this run
    assert first.command.startswith("OMP_NUM_THREADS=1 python -m benchmarks run tests.benchmarks.broken")
    assert [o.state for o in others] == ["did not fit", "did not fit"]
    text = (tmp_path / "out" / "summary.txt").read_text()
    assert "  one, slow: slow\n  one, never: all of it\n  two, later: all of it\n" in text
    assert text.endswith('\n  make gpu PHASES="one two"\n')
    result = json.loads(packed(tmp_path / "out")["results/slow.json"])
    assert result["missing"] == ["hangs", "last"] and {row["workload"] for row in result["rows"]} == {"first"}


def test_finished_cases_are_not_named_again(tmp_path):
    made = session(tmp_path)
    phase, part = Phase("ops", 1, ()), Part("ops", ("run", "one", "two"), cases=("one", "two"), measures=True)
    plan = {"line": "plan", "case": "one", "ceilings": {}, "workloads": [], "late": []}
    (tmp_path / "work" / "results" / "one.jsonl").write_text(json.dumps(plan) + "\n")
    made._note(phase, part, "stopped", 1.0, "")
    assert made.outcomes[0].rest == "two"
    (tmp_path / "work" / "results" / "two.jsonl").write_text(json.dumps(plan) + "\n")
    made._note(phase, part, "stopped", 1.0, "")
    assert made.outcomes[1].rest is None


def test_what_is_left_is_never_lost_to_a_broken_file_or_a_missing_program(tmp_path):
    said = []
    made = Session(60.0, tmp_path / "out", tmp_path / "work", said.append, {})
    broken = Part("ops", (sys.executable, "-c", "import time; time.sleep(600)"), cases=("one",), measures=True)
    (tmp_path / "work" / "results" / "one.jsonl").write_text('{"line": "plan"}\n{"line": "workload"}\n')
    missing = Part("missing", (str(tmp_path / "no such program"),))
    made.run([Phase("one", 9, (missing, broken)), Phase("two", 60, (python("print('on')"),))])
    assert [outcome.state for outcome in made.outcomes] == ["failed", "stopped", "done"]
    assert "it does not start" in made.outcomes[0].last and made.outcomes[1].rest == "one"
    assert any(text.startswith("one.jsonl makes no results: KeyError") for text in said)


def test_tests_that_are_stopped_tell_their_failures_and_what_did_not_run(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import time\ndef test_passes(): pass\ndef test_fails(): assert not 'a reason'\n"
        "def test_takes_long(): time.sleep(600)\ndef test_comes_later(): pass\n"
    )
    made = session(tmp_path)
    told = tmp_path / "work" / "results" / "tests.jsonl"
    command = (sys.executable, "-m", "pytest", "-p", "tests.crashes", "-p", "no:cacheprovider", "-p", "no:xdist")
    part = Part("tests", (*command, "--test-lines", str(told), str(tmp_path / "test_it.py")), tests=told)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a background job of a shell
    try:
        made.run([Phase("tests", 15, (part,))])
    finally:
        signal.signal(signal.SIGINT, before)
    (outcome,) = made.outcomes
    assert outcome.state == "failed" and outcome.last == "1 failed, 1 passed, 2 did not run"
    assert outcome.rest is not None and outcome.rest.startswith("2 tests: 2 of ")
    found = packed(tmp_path / "out")
    assert b"assert not 'a reason'" in found["results/tests.jsonl"]
    assert b"KeyboardInterrupt" in found["logs/tests.log"] and b"1 failed, 1 passed" in found["logs/tests.log"]


def test_a_command_is_given_the_seconds_that_are_left(tmp_path):
    made = session(tmp_path, budget=1000.0)
    tell = (sys.executable, "-c", "import sys; print(sys.argv[1:])", "--limit", SECONDS)
    made.run([Phase("tuning", 100, (Part("tuning", tell),))])
    assert made.outcomes[0].last == "['--limit', '95']" and "--limit" not in made.outcomes[0].command


def test_a_phase_leaves_the_seconds_of_those_behind_it(tmp_path):
    made = Session(480.0, tmp_path / "out", tmp_path / "work", lambda text: None, {})
    tell = (sys.executable, "-c", "import sys; print(sys.argv[1])", SECONDS)
    phases = [Phase("long", 1000, (Part("long", tell),)), Phase("tuning", 100, (Part("tuning", tell),), floor=60)]
    made.run(phases)
    assert 405 <= int(made.outcomes[0].last) <= 416


def test_what_is_left_is_run_by_the_command_that_is_named(tmp_path):
    """Alone a phase needs what is built, and the peers; one that is left out by default runs where it is named."""
    wheels = ROOT / "build" / "wheels"
    made = gpu.phases("cpu", tmp_path, tmp_path, wheels, 1)
    assert [phase.name for phase in gpu.chosen(made, ["ops"])] == ["build", "ops"]
    assert "peers" in [part.name for part in gpu.chosen(made, ["ops"])[0].parts]
    (_, compiled) = gpu.chosen(made, ["compiled"])
    assert compiled.limit > 0 and all(part.missing is None for part in compiled.parts)
    told = gpu._command("cpu", 60.0, tmp_path, ["ops", "compiled"])
    assert told == f'make gpu PHASES="ops compiled" DEVICE=cpu BUDGET=60 WHEELS={tmp_path}'
    done = subprocess.run(["make", "-n", *shlex.split(told)[1:]], cwd=ROOT, capture_output=True, text=True)
    assert "--only ops --only compiled" in done.stdout and f"--wheels {tmp_path}" in done.stdout


def test_the_commit_can_be_given(monkeypatch):
    monkeypatch.setenv("QWEN2VL_COMMIT", "0123456789ab")
    assert environment.commit() == "0123456789ab"
    given = ["make", "-s", "gpu", "QWEN2VL_COMMIT=feed", "PYTHON=sh -c 'echo $$QWEN2VL_COMMIT'"]
    done = subprocess.run(given, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "feed", done.stderr


def test_a_run_that_is_ended_brings_back_what_it_had(tmp_path):
    code = (
        "import sys\nfrom pathlib import Path\nfrom benchmarks import isolate\n"
        "from benchmarks.gpu.session import Part, Phase, Session\n"
        "quick = Part('quick', (sys.executable, '-c', 'print(5)'))\n"
        "slow = Part('slow', (sys.executable, '-c', 'import time; print(6, flush=True); time.sleep(600)'))\n"
        f"made = Session(600, Path({str(tmp_path)!r}) / 'out', Path({str(tmp_path)!r}) / 'work', print, {{}})\n"
        "with isolate.stopped_by_sigterm():\n"
        "    made.run([Phase('one', 600, (quick, slow)), Phase('two', 600, (quick,))])\n"
    )
    run = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL)
    log = tmp_path / "work" / "logs" / "slow.log"
    while not (log.is_file() and log.read_text()):
        assert run.poll() is None
        time.sleep(0.05)
    run.send_signal(signal.SIGTERM)
    assert run.wait(30) == 128 + signal.SIGTERM
    told = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [(p["phase"], p["part"], p["state"]) for p in told["parts"]] == [
        ("one", "quick", "done"), ("one", "slow", "stopped"), ("two", "quick", "did not fit"),
    ]  # fmt: skip
    assert packed(tmp_path / "out")["logs/slow.log"] == b"6\n"


# ------------------------------------------------------------------------------------------------------------ commands


def test_the_phases_of_a_gpu(tmp_path, monkeypatch):
    """Without one: what would be run there, in the order of what it tells, and only files and options that exist."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (9, 0))
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(sys.modules[gpu.phases.__module__], "CUBINS", tmp_path)
    (tmp_path / "wheels" / "set").mkdir(parents=True)
    (tmp_path / "wheels" / "set" / "peer-1-py3-none-any.whl").touch()
    made = gpu.phases("cuda", tmp_path, tmp_path / "checkpoints", tmp_path / "wheels", cores=16)
    assert [phase.name for phase in made] == PHASES
    parts = {part.name: part for phase in made for part in phase.parts}
    assert parts["peers"].command[-1].endswith("peer-1-py3-none-any.whl") and "--no-index" in parts["peers"].command
    assert parts["extension"].environment == {"QWEN2VL_BUILD_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0"}
    assert parts["kernels"].command[3:] == ("warm", "--jobs", "16")
    assert parts["tuning-build"].command[3:5] == ("tune", "--compile") and SECONDS in parts["tuning"].command
    for name in ("tuning-build", "tuning"):
        assert ("--cubins", str(tmp_path)) in zip(parts[name].command, parts[name].command[1:], strict=False)
    assert {part.name for part in made[0].parts} >= {"peers", "extension", "kernels", "checkpoints", "tuning-build"}
    assert made[0].together and not any(part.peers for part in made[0].parts)
    assert [part.name for part in made[PHASES.index("tuning")].parts] == ["wgmma", "tuning"]
    tests = ["sm90-tests", "gpu-tests", "device-tests"]
    assert [part.name for part in made[PHASES.index("tests")].parts] == tests
    for name in tests:
        files = [word for word in parts[name].command if word.endswith(".py")]
        assert files and all((ROOT / file).is_file() for file in files)
        assert ("tests/kernels/ops/test_attention_sm90_gpu.py" in files) == (name == "sm90-tests")
    measured = {case for part in parts.values() for case in part.cases}
    assert measured == set(case_names())
    assert COMPILED in parts["decode"].command and parts["decode"].environment == {"QWEN2VL_GRAPHS": "1"}
    assert "one_of_each" in parts["one of each, without compute-sanitizer, which is not installed"].command[-1]
    for part in parts.values():
        if part.command[1:3] == ("-m", "benchmarks"):
            options = {word for word in part.command if word.startswith("--")}
            shown = CliRunner().invoke(app, [part.command[3], "--help"], env={"COLUMNS": "250"}).output
            assert all(option in shown for option in options), (part.command, shown)


def test_kernels_are_compiled_into_tritons_cache(tmp_path):
    """By Triton's own just-in-time compiler, so that a launch finds them; a second time there is nothing to do."""
    if (reason := launching.reason("cuda")) is not None:
        pytest.skip(reason)
    code = (
        "from pathlib import Path\nfrom benchmarks.gpu import warm\nfrom benchmarks.timing import compilations\n"
        "warm._begin(warm.named('sm_90'))\n"
        "with compilations() as compiled: launches, error = warm._compile(('linear', 0))\n"
        "assert compiled and all(compiled), compiled\n"
        f"found = sorted(Path({str(tmp_path)!r}).rglob('*.cubin'))\n"
        "assert error is None and 0 < len(found) <= launches, (error, found, launches)\n"
        "times = [path.stat().st_mtime_ns for path in found]\n"
        "assert warm._compile(('linear', 0)) == (launches, None)\n"
        f"assert found == sorted(Path({str(tmp_path)!r}).rglob('*.cubin'))\n"
        "assert times == [path.stat().st_mtime_ns for path in found]\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert CliRunner().invoke(app, ["warm", "nothing", "--target", "sm_90"]).exit_code == 2
    assert CliRunner().invoke(app, ["warm", "linear", "--target", "nothing"]).exit_code == 2


def test_a_budget_too_small_names_every_command(tmp_path):
    places = ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"), "--wheels", str(tmp_path)]
    done = CliRunner().invoke(app, ["gpu", "--device", "cpu", "--budget", "1", *places])
    assert done.exit_code == 0, done.output
    told = json.loads((tmp_path / "out" / "summary.json").read_text())
    states = {part["part"]: part["state"] for part in told["parts"]}
    assert states["attention"] == states["ops"] == states["gpu-tests"] == "did not fit"
    for part in told["parts"]:
        assert (part["rest"] is not None) == (part["state"] == "did not fit" or part["part"] == "compiled")
        assert part["rest"] is None or f"  {part['phase']}, {part['part']}: {part['rest']}\n" in done.output
    unknown = CliRunner().invoke(app, ["gpu", "--device", "cpu", "--only", "nothing", *places])
    assert unknown.exit_code == 2 and "nothing" in unknown.output


def test_without_a_gpu_it_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = CliRunner().invoke(app, ["gpu"])
    assert done.exit_code == 2 and "no CUDA device" in done.output


def test_the_rehearsal(tmp_path):
    """Every phase is at work without a GPU, at small sizes, or says why it is not."""
    with zipfile.ZipFile(tmp_path / "quickpeer-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("quickpeer.py", "here = True\n")
        wheel.writestr("quickpeer-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: quickpeer\nVersion: 1.0\n")
        wheel.writestr(
            "quickpeer-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("quickpeer-1.0.dist-info/RECORD", "")
    out = tmp_path / "out"
    rehearse = [sys.executable, "-m", "benchmarks", "gpu", "--device", "cpu"]
    done = subprocess.run(
        [*rehearse, "--out", str(out), "--work", str(tmp_path / "work"), "--wheels", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    parts = json.loads((out / "summary.json").read_text())["parts"]
    assert list(dict.fromkeys(part["phase"] for part in parts)) == PHASES
    cannot = {part["part"]: part["last"] for part in parts if part["state"] != "done"}
    assert set(cannot) <= {"extension", "wgmma", "sanitizer", "compiled"} and all(cannot.values())
    assert (tmp_path / "work" / "site" / "quickpeer.py").is_file()
    found = packed(out)
    for case in ("attention", "tower", "rope", "positions"):
        result = json.loads(found[f"results/{case}.json"])
        assert result["rows"] and result["missing"] == [] and result["quick"] is True
        assert f"logs/{'ops' if case in ('rope', 'positions') else case}.log" in found
    for part, state in ((part, part["state"]) for part in parts if part["phase"] == "tests"):
        assert state == "done" and ("passed" in part["last"] or "skipped" in part["last"])
        assert found[f"results/{part['part']}.jsonl"].startswith(b'{"collected": ')
    assert "results/tune.json" in found
    assert f"packed into {out / 'logs.tgz'}" in done.stdout


# --------------------------------------------------------------------------------------------------------- checkpoints


def test_checkpoints_are_made_where_the_measurements_are(tmp_path, monkeypatch):
    seen = []
    write = write_random_checkpoint
    monkeypatch.setattr(
        "benchmarks.cases._qwen2vl.write_random_checkpoint",
        lambda *given, device, **options: seen.append(device) or write(*given, device=device, **options),
    )
    with Context(torch.device(DEVICE), checkpoint_dir=tmp_path) as context:
        folder = checkpoint(context, "small", small_config())
        assert checkpoint(context, "small", small_config()) == folder
    assert seen == [torch.device(DEVICE)]
    model = Qwen2VL.from_pretrained(folder, device=DEVICE)
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            assert weight.float().std().item() == pytest.approx(0.02, rel=0.1), name
            assert abs(weight.float().mean().item()) < 0.002, name


def test_a_deep_model_of_random_weights_stays_finite(tmp_path):
    """As deep as the 2B's decoder: rows of numbers that are none would be fast and compare as nothing."""
    from dataclasses import replace

    small = small_config()
    config = replace(small, text=replace(small.text, num_hidden_layers=28))
    folder = write_random_checkpoint(tmp_path / "deep", config, device=DEVICE)
    model = Qwen2VL.from_pretrained(folder, device=DEVICE)
    with torch.inference_mode():
        logits = model(torch.arange(40, device=DEVICE)[None])
    assert torch.isfinite(logits).all() and 0.01 < logits.float().std().item() < 100


def test_the_seed_leaves_the_generator_alone(tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    write_random_checkpoint(tmp_path / "a", device=DEVICE)
    assert torch.equal(torch.get_rng_state(), before)
    if DEVICE == "cuda":
        torch.cuda.manual_seed(5)
        held = torch.cuda.get_rng_state()
        write_random_checkpoint(tmp_path / "b", device=DEVICE)
        assert torch.equal(torch.cuda.get_rng_state(), held)
