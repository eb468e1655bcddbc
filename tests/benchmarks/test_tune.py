"""The tuner: every launcher reached, right results only, a candidate's end costs that candidate, the best of shapes."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from benchmarks import report, tune
from benchmarks.__main__ import app
from benchmarks.run import SCHEMA
from benchmarks.tune import attention as of_attention
from benchmarks.tune import search
from benchmarks.tune.subject import DTYPES, configured
from benchmarks.tune.worker import Compiler, Timer, bits, rounds
from qwen2vl_kernels.core import attention_sm90
from qwen2vl_kernels.core.attention_sm90 import Sm90Config
from qwen2vl_kernels.core.backends import unavailable
from qwen2vl_kernels.core.launching import Target, record, target_of
from tests.conftest import DEVICE
from tests.kernels import sm90_stand_in

ROOT = Path(__file__).resolve().parents[2]
HOPPER = Target("cuda", 90)
META = torch.device("meta")
NAMES = [subject.name for subject in tune.subjects(quick=True)]


def needs_triton():
    if (reason := unavailable("triton", DEVICE)) is not None:
        pytest.skip(f"triton: {reason}")


def launches_of(subject, fields):
    with record(HOPPER) as launches, torch.no_grad(), configured(subject, fields):
        subject.make(META, torch.bfloat16).run()
    return [one for one in launches if subject.kernel is None or one.kernel.fn.__name__ == subject.kernel]


def is_sm90(subject):
    return subject.module is attention_sm90


# ---------------------------------------------------------------------------------------------------------- subjects


@pytest.mark.parametrize("quick", [False, True])
def test_every_candidate_reaches_its_kernel(quick):
    """One launch of the subject's kernel, with the candidate's fields, of either end of the grid."""
    subjects = tune.subjects(quick)
    assert len({subject.name for subject in subjects}) == len(subjects) >= 15
    for subject in subjects:
        shipped, tried = search.candidates(subject, HOPPER, torch.bfloat16)
        assert tried[0] == {name: getattr(shipped, name) for name in subject.grid}, "what ships is timed first"
        assert len({str(fields) for fields in tried}) == len(tried) >= 3
        for fields in (tried[1], tried[-1]):
            (launch,) = launches_of(subject, fields)
            if is_sm90(subject):
                assert launch.kernel.config == Sm90Config(**fields) and launch.kernel.columns == subject.columns
                continue
            assert launch.options["num_warps"] == fields["num_warps"]
            if "num_stages" in fields:
                assert launch.options["num_stages"] == fields["num_stages"]
            if {"block_m", "block_n"} <= fields.keys():
                blocks = {name: launch.arguments[name.upper()] for name in ("block_m", "block_n")}
                assert blocks == {name: fields[name] for name in blocks}


def test_passes_of_the_backward_are_tuned_apart():
    key, query = (next(s for s in tune.subjects() if f"{name} pass 16x80" in s.group) for name in ("key", "query"))
    wanted = {"block_m": 128, "block_n": 32, "num_warps": 4, "num_stages": 3}
    for tuned, other in ((key, query), (query, key)):
        with record(HOPPER) as launches, torch.no_grad(), configured(tuned, wanted):
            tuned.make(META, torch.bfloat16).run()
        by_kernel = {launch.kernel.fn.__name__: launch for launch in launches}
        assert by_kernel[tuned.kernel].options["num_stages"] == 3
        assert by_kernel[other.kernel].options["num_stages"] == 1, "the other pass keeps what ships"


def test_the_most_telling_come_first():
    sm90 = [is_sm90(subject) for subject in tune.subjects()]
    assert sm90[:9] == [True] * 9 and not any(sm90[9:]), "which nothing is compiled for"
    first = [subject.name for subject in tune.subjects()][9:12]
    assert first == [f"attention {name} 16x80, 4 of 4096" for name in ("forward", "key pass", "query pass")]
    shapes = {subject.shape for subject in tune.subjects() if subject.group == "attention forward 16x80"}
    assert {shape.split()[-1] for shape in shapes} == {"256", "1024", "4096", "16384"}


def test_what_is_compiled_once_is_the_same_for_every_length():
    """Subjects that share ``compiled_as`` are the same kernels for the compiler: strides, alignments and constants."""
    needs_triton()
    keys: dict[str, set] = {}
    for subject in tune.subjects():
        if subject.columns is not None and not is_sm90(subject):
            _, tried = search.candidates(subject, HOPPER, torch.bfloat16)
            (launch,) = launches_of(subject, tried[-1])
            keys.setdefault(subject.compiled_as, set()).add(str(_identity(launch)))
    assert len(keys) == 9 and all(len(found) == 1 for found in keys.values())


def _identity(launch):
    """As the just-in-time compiler specialises: types, alignments, constants, options."""
    constexprs = {name for name in launch.arguments if name.isupper() or name[:-1].isupper()}
    kinds = [
        (str(a.dtype), a.data_ptr() % 16) if isinstance(a, torch.Tensor) else (a == 1, a % 16 == 0, type(a))
        if isinstance(a, int) and a < 16000  # rows of the pack are not specialised
        else type(a)
        for name, a in sorted(launch.arguments.items())
        if name not in constexprs
    ]  # fmt: skip
    return kinds, {name: str(launch.arguments[name]) for name in sorted(constexprs)}, launch.options


@pytest.mark.parametrize("name", NAMES)
def test_what_ships_is_right_at_every_subject(name, monkeypatch):
    """The comparison that a candidate has to stand is one that right results do; in the interpreter where no GPU is."""
    needs_triton()
    subject = next(s for s in tune.subjects(quick=True) if s.name == name)
    if is_sm90(subject) and DEVICE == "cpu":
        sm90_stand_in.install(monkeypatch)
    elif is_sm90(subject) and (reason := unavailable("sm90", DEVICE)) is not None:
        pytest.skip(f"sm90: {reason}")
    work = subject.make(torch.device(DEVICE), DTYPES[DEVICE])
    with torch.no_grad():
        results = work.run()
        checks = work.check(results)
        assert checks and all(check.passed for check in checks), checks
        for n in range(len(results)):  # and wrong ones do not: one element is off by the largest there is
            wrong = [x.clone() for x in results]
            wrong[n].view(-1)[wrong[n].numel() // 2] += 8 * wrong[n].abs().max()
            assert not all(check.passed for check in work.check(tuple(wrong)))


@pytest.mark.skipif(DEVICE != "cpu", reason="the stand-in reads the CPU's memory")
def test_hoppers_own_kernels_are_linked_or_come_as_cubins(tmp_path, monkeypatch):
    """What is neither costs itself, and says which file is missing; a cubin is loaded once, by who launches it."""
    extension, loads = sm90_stand_in.install(monkeypatch), []

    def load(path, head, fp16, causal, config):
        loads.append(Path(path).name)
        extension.built.append((head, int(fp16), causal, *config))

    extension.attention_load = load
    monkeypatch.setattr(of_attention, "_loaded", set())
    name = next(subject.name for subject in tune.subjects(quick=True) if is_sm90(subject))
    linked, other = (asdict(Sm90Config(3, keys)) for keys in (96, 112))
    compiler = Compiler(HOPPER, True, torch.float16, tmp_path)
    timer = Timer(torch.device("cpu"), quick=True, cubins=tmp_path)
    ask = lambda worker, fields: worker({"subject": name, "fields": fields, "beat": None, "samples": 2})  # noqa: E731
    for fields, file in ((linked, None), (other, "80-fp16-full-3x112-0-registers.cubin")):
        if file is not None:
            for worker, failed in ((compiler, "does not compile"), (timer, "raises")):
                reply = ask(worker, fields)
                assert reply["failed"] == failed and f"it is not linked, and there is no {file}" in reply["why"]
            (tmp_path / file).touch()
        assert "failed" not in ask(compiler, fields) and not loads
        for _ in range(2):
            assert len(ask(timer, fields)["samples"]) == 2
        assert extension.launches[-1].config == Sm90Config(**fields)
        assert loads == ([] if file is None else [file])
        loads.clear()


def test_hoppers_own_kernels_are_hoppers():
    names = {}
    for target in (HOPPER, Target("cuda", 100), Target("hip", 0)):
        one = tune.Search(torch.device("cuda"), target)
        names[target.capability] = {trial.subject.name for trial in one.trials(("attention",))}
    assert names[90] - names[100] == names[90] - names[0] == {s.name for s in tune.subjects() if is_sm90(s)}


# ------------------------------------------------------------------------------------------------------- compilation

_FOUND = """
import sys, torch
from triton import knobs
from benchmarks.tune.subject import configured
from benchmarks.tune.subjects import subjects
from benchmarks.tune.worker import Compiler
from qwen2vl_kernels.core import launching
subject = next(s for s in subjects(True) if s.name == sys.argv[1])
fields = {name: values[-1] for name, values in subject.grid.items()}
Compiler(target := launching.Target("cuda", 90), True, torch.float16)  # its driver, on real tensors
with launching.record(target) as launches, configured(subject, fields):
    subject.make(torch.device("cpu"), torch.float16).run()
compiled, found = [], []
knobs.compilation.listener = lambda *, src, cache_hit, **_: (found if cache_hit else compiled).append(src.name)
for launch in launches:
    launch.kernel.warmup(grid=launch.grid, **launch.arguments, **launch.options)
print(len(found), compiled)
"""


def test_a_launch_finds_what_was_compiled_ahead(tmp_path):
    """The worker compiles for tensors without memory; the just-in-time compiler finds it for those that have some."""
    needs_triton()
    name = "rms_norm backward 1536, 32 rows"
    subject = next(s for s in tune.subjects(quick=True) if s.name == name)
    cache = {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": None}
    with tune.Worker(("benchmarks.tune.worker", "compile", "cuda:90:float16", "quick"), cache) as worker:
        fields = {name: values[-1] for name, values in subject.grid.items()}
        reply = worker.ask({"subject": name, "fields": fields}, 120)
        assert "failed" not in reply, reply
        refused = worker.ask({"subject": name, "fields": fields | {"num_warps": 3}}, 120)
        assert refused["failed"] == "does not compile" and "power of 2" in refused["why"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", _FOUND, name]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout == "1 []\n", done.stdout + done.stderr


# ------------------------------------------------------------------------------------------------------------ search


@pytest.fixture(scope="module")
def search_forward(tmp_path_factory):
    """A search of the quick forward kernels with processes that fail in every way: its trials, its rows, its result."""
    folder = tmp_path_factory.mktemp("search")
    grid = {"block_m": (64, 128), "block_n": (16, 32, 64, 128), "num_warps": (4,), "num_stages": (3, 4)}
    subjects = [dataclasses.replace(s, grid=grid) for s in tune.subjects(quick=True) if "forward 2x80" in s.group]

    def run(**settings):
        rows = tune.Rows(folder / "tune.jsonl")
        one = tune.Search(
            torch.device("cpu"), HOPPER, quick=True, rows=rows, worker="tests.benchmarks.tune_worker", **settings
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(search, "_RUN_LIMIT", 2.0)
            patch.setattr(search, "_START_LIMIT", 3.0)
            patch.setattr(search, "subjects", lambda quick: subjects)
            trials = one.run()
        rows.close()
        written = [json.loads(line) for line in (folder / "tune.jsonl").read_text().splitlines()]
        return trials, written, tune.result(trials, HOPPER, torch.device("cpu"), True, "python -m benchmarks tune")

    return run


@pytest.fixture(scope="module")
def searched(search_forward):
    return search_forward(jobs=2)


def test_one_candidate_costs_itself(searched):
    trials, rows, _ = searched
    for trial in trials:
        failed = {row["literal"]: row["failed"] for row in trial.rows if "failed" in row}
        # What ships takes 64 keys a step and two stages, of 64 rows in the first shape.
        assert failed.pop("ForwardConfig(64, 64, 4, 2)", "hangs") == "hangs"
        uncompiled = [f"ForwardConfig({rows}, {step}, 4, 4)" for rows in (64, 128) for step in (16, 32, 64, 128)]
        assert failed == {
            "ForwardConfig(64, 16, 4, 3)": "CUDA error",
            "ForwardConfig(64, 32, 4, 3)": "dies",
            "ForwardConfig(64, 64, 4, 3)": "hangs",
            "ForwardConfig(64, 128, 4, 3)": "wrong result",
            **dict.fromkeys(uncompiled, "does not compile"),
        }
        dead = next(row for row in trial.rows if row.get("failed") == "dies")
        assert "status -6" in dead["why"] and "MLIR has had enough" in dead["why"]
        assert min(trial.finals, key=trial.finals.__getitem__) == "ForwardConfig(128, 16, 4, 3)"
        assert trial.left == 0
    assert len({row["process"] for row in rows if "process" in row}) > 1
    measured = [row for row in rows if "literal" in row]
    assert measured == [row for trial in trials for row in trial.rows], "every row is in the file, as it was measured"


def test_a_limit_ends_with_what_is_measured(search_forward):
    trials, _, found = search_forward(limit=5.0)
    assert trials[0].rows and trials[-1].left == len(trials[-1].candidates), [t.rows for t in trials]
    assert trials[-1].subject.name in found["left"]
    left = {"provider": f"{trials[-1].left} candidates", "reason": "the limit came first"}
    assert {"workload": trials[-1].subject.name, **left} in found["skipped"]


def test_the_result_has_rows_as_every_case(searched):
    _, _, found = searched
    assert found["schema"] == SCHEMA and found["architecture"] == "cuda 90"
    by_provider = {row["provider"]: row for row in found["rows"] if row["workload"].endswith(", 96")}
    best = by_provider["ForwardConfig(128, 16, 4, 3)"]
    assert best["ratios"]["ships, ForwardConfig(128, 64, 8, 2)"]["median"] == pytest.approx(4)
    assert "ForwardConfig(64, 32, 4, 3)" in {skip["provider"] for skip in found["skipped"]}
    report.table(found)
    console = Console(width=250, record=True, file=io.StringIO())
    tune.show(found, console)
    shown = console.export_text()
    assert "4.00x" in shown and "1 wrong result" in shown and "one block_n for all shapes: 16" in shown
    assert "90: ((80, ForwardConfig(128, 16, 4, 3)),)," in shown


@pytest.fixture
def forwards(monkeypatch):
    """A search by the process that stands in, of two groups: 4 candidates of each of two shapes, then 12 of one."""
    own = {"block_m": (128,), "block_n": (16, 32, 64), "num_warps": (4,), "num_stages": (3,)}
    many = own | {"block_n": (16, 32, 64, 128), "num_stages": (1, 2, 3)}
    one = next(s for s in tune.subjects(quick=True) if s.name == "attention forward 2x80, 96")
    first = dataclasses.replace(one, grid=own)
    last = dataclasses.replace(one, grid=many, group="attention forward 2x64", columns=64)
    found = [first, dataclasses.replace(first, shape="97"), last]
    monkeypatch.setattr(search, "subjects", lambda quick: found)

    def run(**settings):
        told: list[str] = []
        settings = {"rows": tune.Rows(None), "worker": "tests.benchmarks.tune_worker", "log": told.append, **settings}
        one = tune.Search(torch.device("cpu"), HOPPER, quick=True, **settings)
        return one.run(("forward",)), told

    return run


def test_each_subject_is_decided_before_the_next_is_compiled(forwards, tmp_path):
    trials, told = forwards(rows=(rows := tune.Rows(tmp_path / "rows.jsonl")))
    rows.close()
    assert [line.split()[0] for line in told] == ["compiled", "attention", "attention", "compiled", "attention"]
    assert "compiled 4 of 4" in told[0] and "2x80, 96: 16.0 us" in told[1] and "compiled 1" in told[3]
    written = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    for trial in trials:
        own = [row for row in written if row["subject"] == trial.subject.name]
        order = ["literal", "again", "final"]  # what ships once more, before the comparison in turn
        kinds = [next(kind for kind in order if kind in row) for row in own]
        assert kinds == sorted(kinds, key=order.index)
        assert own[0]["literal"] == trial.ships and own[kinds.index("again")]["again"] == trial.ships
        assert len(trial.again) == 5


def test_a_short_limit_decides_the_first_subjects(forwards, monkeypatch):
    """The 13 candidates of the last one take longer to compile than there is, the 4 of the first do not."""
    monkeypatch.setenv("TUNE_WORKER_COMPILES", "0.5")
    trials, told = forwards(limit=7.0)
    assert not trials[0].left and not trials[1].left and trials[2].left
    found = tune.result(trials, HOPPER, torch.device("cpu"), True, "")
    first, last = found["groups"] if len(found["groups"]) == 2 else (*found["groups"], None)
    assert first["from"] == "2 of 2 shapes" and first["best"] == "ForwardConfig(128, 16, 4, 3)" and first["changes"]
    assert found["left"] == [trials[2].subject.name] and set(found["tables"]) == {
        "qwen2vl_kernels.triton.attention_forward.forward_config"
    }
    assert "64, Forward" not in str(found["tables"])
    if last is not None:
        assert last["best"] is None and last["from"] == "0 of 1 shapes"
        assert any("candidates: no verdict" in line for line in told)
        console = Console(width=250, record=True, file=io.StringIO())
        tune.show(found, console)
        assert "the limit came after" in console.export_text()


def test_finalists_take_turns():
    order: list[int] = []
    calls = [lambda n=n: order.append(n) for n in range(3)]
    samples = rounds(calls, lambda call: (call(), float(order[-1]))[1], 4)
    assert order == [0, 1, 2, 1, 2, 0, 2, 0, 1, 0, 1, 2]
    assert samples == [[0.0] * 4, [1.0] * 4, [2.0] * 4]


def test_bits_tell_results_apart():
    results = torch.randn(64, 48).bfloat16(), torch.randn(7)
    assert len(known := bits(results)) == 16 and known == bits(tuple(x.clone() for x in results))
    for n in (0, 1):
        changed = [x.clone() for x in results]
        flat = changed[n].view(-1)
        flat[3] = torch.nextafter(flat[3], torch.tensor(9.0, dtype=flat.dtype))
        assert bits(tuple(changed)) != known, "one bit"
        flat.copy_(results[n].view(-1).flip(0))
        assert bits(tuple(changed)) != known, "the same values in other places"
    assert bits((torch.zeros(4),)) != bits((-torch.zeros(4),)), "the sign of zero"


def test_a_wrong_candidate_is_never_timed(monkeypatch):
    """Through the real worker: a kernel that leaves half of its rows to what memory held is told."""
    needs_triton()
    subject = next(s for s in tune.subjects(quick=True) if s.name == "swiglu forward 8960, 8 rows")
    timer = Timer(torch.device(DEVICE), quick=True)
    request = {
        "subject": subject.name,
        "fields": {"block_m": 4, "block_n": 1024, "num_warps": 4},
        "beat": None,
        "samples": 2,
    }
    assert len(timer(request)["samples"]) == 2
    launch = subject.module.launch
    half = lambda kernel, grid, *given, **named: launch(kernel, (grid[0] // 2, *grid[1:]), *given, **named)  # noqa: E731
    monkeypatch.setattr(subject.module, "launch", half)
    reply = timer(request)
    assert reply["failed"] == "wrong result" and "samples" not in reply and "result 0: error nan" in reply["why"]
    assert not torch.are_deterministic_algorithms_enabled()


# ----------------------------------------------------------------------------------------------------------- command


def test_the_command_rehearses_without_a_gpu(tmp_path):
    """The whole way on tiny shapes: compiled for a Hopper card, run by the interpreter, compared, timed, written."""
    needs_triton()
    out = tmp_path / "tune.json"
    words = ["tune", "rms_norm forward 1536", "--device", "cpu", "--quick", "--jobs", "1", "--out", str(out)]
    done = CliRunner().invoke(app, [*words, "--compile"])
    assert done.exit_code == 0 and "compiled 5 of 5 candidates" in done.output and not list(tmp_path.iterdir())
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    found = json.loads(out.read_text())
    assert found["case"] == "tune" and not found["skipped"] and not found["left"]
    (subject,) = found["subjects"]
    assert subject["best"].startswith("NormConfig(") and subject["timed"] == 5
    assert len(out.with_suffix(".jsonl").read_text().splitlines()) >= 5


@pytest.mark.gpu
def test_a_gpu_times_what_was_compiled_ahead(tmp_path):
    """The whole way on a GPU: the process that times finds every kernel compiled, and every result is right."""
    if not torch.cuda.is_available():
        pytest.skip("PyTorch sees no CUDA device")
    rows = tune.Rows(tmp_path / "tune.jsonl")
    one = tune.Search(torch.device("cuda"), target_of(torch.device("cuda")), quick=True, jobs=4, rows=rows)
    trials = one.run(("forward 2x80, 96", "key pass 2/1x64", "swiglu forward"))
    rows.close()
    for trial in trials:
        assert trial.finals and trial.left == 0
        for row in trial.rows:
            assert row.get("failed") in (None, "does not fit"), row
            assert row.get("compiled", 0) == 0, row


def test_the_command_says_what_it_lacks(tmp_path):
    out = ["--out", str(tmp_path / "tune.json")]
    if not torch.cuda.is_available():
        assert "no CUDA device" in CliRunner().invoke(app, ["tune", *out]).output
    assert "it takes a GPU" in CliRunner().invoke(app, ["tune", "--device", "cpu", *out]).output
    words = ["tune", "no such thing", "--device", "cpu", "--quick", *out]
    assert "no subject's name has one of no such thing" in CliRunner().invoke(app, words).output
