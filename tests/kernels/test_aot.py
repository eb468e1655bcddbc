"""Every Triton kernel compiled for GPUs that need not be here, and the gates on what it became."""

import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from benchmarks import aot
from benchmarks.aot.compiler import NEWEST
from tests.kernels.commands import Commands

ROOT = Path(__file__).resolve().parent.parent.parent
#: The Triton that PyTorch 2.10 and 2.11 bring, with ptxas 12.8.93 for capability 9.
OLD = "3.6.0"
TRITON = metadata.version("triton")
needs_old = pytest.mark.skipif(
    not (aot.TRITONS / OLD / "triton").is_dir(),
    reason=f"Triton {OLD} is not installed in build/triton (make build/triton/{OLD})",
)


def _python(*arguments: str, path: str = "") -> subprocess.CompletedProcess:
    """A process of its own: the kernels of this one may be interpreted. ``path`` comes before others' packages."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if path:
        environment["PYTHONPATH"] = path
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def pinned():
    with Commands() as commands:
        yield commands


@pytest.fixture(scope="module")
def old():
    with Commands(str(aot.TRITONS / OLD)) as commands:
        yield commands


def _compiled(commands: Commands, triton: str, place: Path, group: str, *options: str) -> int:
    """How many kernels the command has compiled, none of which fails a gate."""
    reports = place / "reports.json"
    done = commands.run("aot", group, "--failures", "--jobs", "1", "--json", str(reports), *options)
    assert done.code == 0, done.output
    assert {report.triton for report in aot.read(reports)} == {triton}
    return int(done.output.split()[-7])


@pytest.mark.parametrize("group", aot.groups())
def test_every_kernel_passes_the_gates(pinned, tmp_path, group):
    """Each in its first forms; the compiler that most have takes all forms below, and ``make aot`` has all of both."""
    first = sum(not specimen.further for specimen in aot.groups()[group])
    assert _compiled(pinned, TRITON, tmp_path, group, "--no-further", "--target", "sm_90") >= first > 0


@pytest.mark.skipif(not TRITON.startswith(NEWEST), reason=f"only sm_90 is gated with Triton {TRITON}")
@pytest.mark.parametrize("group", aot.groups())
def test_every_kernel_passes_the_gates_on_other_targets(pinned, tmp_path, group):
    """Each in its first forms; ``make aot`` has all of them."""
    others = [target for target in aot.TARGETS if target != "sm_90"]
    options = [word for target in others for word in ("--target", target)]
    first = sum(not specimen.further for specimen in aot.groups()[group])
    assert _compiled(pinned, TRITON, tmp_path, group, "--no-further", *options) >= len(others) * first > 0


@needs_old
@pytest.mark.parametrize("group", aot.groups())
def test_every_kernel_passes_the_gates_with_the_compiler_that_most_have(old, tmp_path, group):
    assert _compiled(old, OLD, tmp_path, group, "--target", "sm_90") >= len(aot.groups()[group])


@needs_old
def test_another_compiler_by_its_version(tmp_path):
    """As a command of its own: it starts the process that imports the other Triton."""
    out = tmp_path / "reports.json"
    result = _python("-m", "benchmarks", "aot", "tail", "--target", "sm_90", "--triton", OLD, "--json", str(out))
    assert result.returncode == 0, result.stdout + result.stderr
    assert int(result.stdout.split()[-7]) == len(aot.read(out)) >= len(aot.groups()["tail"])
    assert {report.triton for report in aot.read(out)} == {OLD}


@needs_old
def test_the_kernel_that_was_wrong_on_a_gpu_fails_the_gates():
    """The reads that made the first GPU's results wrong are found, with instruction and kernel, and only there."""
    found = {}
    for path in (str(aot.TRITONS / OLD), ""):
        result = _python("-m", "tests.kernels.miscompiled", path=path)
        assert result.returncode == 0, result.stderr
        report = json.loads(result.stdout.splitlines()[-1])
        assert report["kernel"] == "two_loops_kernel"
        found[report["triton"]] = report["failures"]
    assert any(re.match(r"reads UR\d+ before anything writes it: UIADD3 UR", line) for line in found[OLD]), found
    assert all(not failures for version, failures in found.items() if version != OLD), found


def test_a_version_that_is_not_there_is_told():
    result = _python("-m", "benchmarks", "aot", "norm", "--triton", "0.0.1")
    assert result.returncode == 2 and "make build/triton/0.0.1" in re.sub(r"[│\s]+", " ", result.stderr)


_FAILING = """
import json, torch
from qwen2vl_kernels.triton import norm
from benchmarks.aot.compiler import Specimen, TARGETS, compile_for, meta

def run(columns):
    x, weight = (meta(*shape, dtype=torch.float32) for shape in ((64, columns), (columns,)))
    norm.launch_forward(x, x, weight, weight, 1e-6, True)

found = {}
for target in ("sm_90", "gfx942"):  # one for each reader of machine code
    narrow = Specimen("narrow", lambda: run(81), wide=0.9, matrix=True)
    large = Specimen("large", lambda: run(131072))
    reports = [report for specimen in (narrow, large) for report in compile_for(specimen, target)]
    found[target] = [failure for report in reports for failure in report.failures]
print(json.dumps(found))
"""


def test_a_kernel_that_breaks_them_fails_the_gates():
    """Rows of 81 values cannot be read 16 bytes at a time, and 131072 values do not fit a program's registers."""
    result = _python("-c", _FAILING)
    assert result.returncode == 0, result.stderr
    for target, failures in json.loads(result.stdout.splitlines()[-1]).items():
        spills = ("bytes spilled",) if target == "sm_90" or TRITON.startswith(NEWEST) else ()
        for part in ("of the bytes in 16-byte accesses", "no instruction on the matrix units", *spills):
            assert any(part in failure for failure in failures), (target, part, failures)


def test_it_refuses_to_compile_interpreted_kernels():
    command = [sys.executable, "-m", "benchmarks", "aot", "norm", "--target", "sm_90", "--jobs", "1"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 2 and "interpreted in this process" in result.stderr
    assert "no group is called 'rotary'" in " ".join(_python("-m", "benchmarks", "aot", "rotary").stderr.split())


_SPECIALISED = """
import json, torch
from benchmarks.aot import compiler
from benchmarks.aot.compiler import meta
from qwen2vl_kernels.core.launching import Target, record
from benchmarks.aot.sampling import choose
from benchmarks.aot.step import layer
from qwen2vl_kernels.triton import attention_decode, cache, cross_entropy, elementwise, gemm, norm, rope_tables, rotary

bf16 = torch.bfloat16

def run(tokens):
    x, weight = meta(tokens, 1280, dtype=bf16), meta(1280, dtype=bf16)
    statistics = meta(tokens, dtype=torch.float32)
    norm.launch_forward(x, x, weight, weight, 1e-6, True)
    norm.launch_backward(x, x, x, weight, statistics, statistics, True, True)
    elementwise.launch_forward(x, weight, None, x, 1.702)
    elementwise.launch_backward(x, x, weight, None, x, None, 1.702)
    elementwise.launch_forward(x, None, x, x, 1.0)
    elementwise.launch_backward(x, x, None, x, x, x, 1.0)
    gemm.launch_gemm(meta(tokens, 588, dtype=torch.uint8), meta(1280, 588, dtype=bf16), weight, False)
    q, k = meta(tokens, 12, 128, dtype=bf16), meta(tokens, 2, 128, dtype=bf16)
    positions, inv_freq = meta(3, tokens, dtype=torch.int64), meta(64, dtype=torch.float32)
    rotary.launch_rotation(q, k, q, k, positions, inv_freq, section=(16, 24, 24))
    pages, slots = meta(3 + tokens % 5, 16 * (1 + tokens % 3), 2, 128, dtype=bf16), meta(tokens, dtype=torch.int64)
    cache.launch_append(k, k, pages, pages, slots, q, positions, inv_freq, (16, 24, 24), False, None, True)
    rope_tables.launch_tables(meta(tokens, 2, dtype=torch.int64), meta(20, dtype=torch.float32))
    keys, lengths = meta(tokens, 4097 + tokens % 7, 2, 128, dtype=bf16), meta(2 * tokens, dtype=torch.int32)
    attention_decode.launch_decode(q, keys, keys, lengths[:: 1 + tokens % 2][:tokens], 0.1)
    table, pages = meta(tokens, 257 + tokens % 7, dtype=torch.int32), meta(99 + tokens, 16, 2, 128, dtype=bf16)
    attention_decode.launch_decode(q, pages, pages, lengths[:tokens], 0.1, table)
    layer(tokens, 12, 2, 8960)
    choose(tokens, 151_936, bf16, tokens, 0.9)
    target, loss = meta(tokens, dtype=torch.int64), meta(tokens, dtype=torch.float32)
    cross_entropy.launch_rows(meta(tokens, 1000, dtype=bf16), target, None, loss, -tokens, 0.0, True)

kinds = []
for tokens in (1, 2, 15, 16, 100, 4096, 100_000):
    with record(Target("cuda", 90)) as launches:
        run(tokens)
    kinds.append([compiler._source(launch)[1] for launch in launches])
print(json.dumps([len(kinds[0]), [n for n, names in enumerate(zip(*kinds)) if len(set(names)) > 1]]))
"""


def test_no_kernel_is_compiled_again_for_another_number_of_tokens():
    result = _python("-c", _SPECIALISED)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == [22, []]


_WORK = """
import json, torch
from functools import partial
from benchmarks.aot.attention import _attention
from benchmarks.aot.compiler import TARGETS, Specimen, compile_for
from qwen2vl_kernels.triton.attention_forward import forward_config

found = []
for target in ("sm_80", "sm_90", "sm_120"):
    for columns in (64, 80, 96, 128):
        specimen = Specimen("attention", partial(_attention, 16, 16, columns, torch.bfloat16, False))
        config = forward_config(torch.bfloat16, columns, 1024, TARGETS[target][0])
        found.append((target, columns, config.block_m * config.block_n, next(compile_for(specimen, target)).products))
print(json.dumps(found))
"""


def test_a_head_of_80_columns_costs_what_80_columns_need():
    """Multiply-adds of an iteration, read from the machine code: rows x step x (D for the scores + D for the sums).

    Padding to 128 would cost 1.6 times that of 80.
    """
    result = _python("-c", _WORK)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert len(found) == 12
    for target, columns, pairs, products in found:
        assert products == pairs * 2 * columns, (target, columns, products)
