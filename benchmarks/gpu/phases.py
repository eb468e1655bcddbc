"""What there is to run on a GPU, in the order of what it tells; and at small sizes without one."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from .. import wgmma
from ..environment import ROOT
from ..run import case_names
from .session import SECONDS, Part, Phase

#: Where attention's kernels for Hopper lie that no build links, if somebody brought them along, for the tuner.
CUBINS = ROOT / "build" / "sm90"


def phases(device: str, work: Path, checkpoints: Path, wheels: Path, cores: int) -> list[Phase]:
    """The phases for ``device``, ``cuda`` or ``cpu``; the latter a rehearsal.

    Args:
        work: the folder for results and for the peers' packages.
        checkpoints: the folder for random checkpoints.
        wheels: the folder of peers' wheels, which need not be there.
        cores: processes that compile or test at a time.
    """
    rehearsal = device == "cpu"
    python = sys.executable
    results = ("--out", str(work / "results"))

    def run(name: str, cases: Sequence[str], *options: str, where: str = device) -> Part:
        small = ("--quick",) if rehearsal else options
        command = (python, "-m", "benchmarks", "run", *cases, "--device", where, *small, *results)
        return Part(name, (*command, "--checkpoint-dir", str(checkpoints)), cases=tuple(cases), measures=True)

    ops = ["rope", "norm", "activation", "patch_embed", "merge", "positions", "experts"]
    towers = ["tower", "e2e", "model"]
    others = [name for name in case_names() if name not in ("attention", "preprocess", "decode", *towers, *ops)]
    if rehearsal:  # one of each kind
        ops, towers = ["rope", "positions"], ["tower"]
    # What torch.compile makes takes up to half a minute for every row.
    quickly = [word for name in ("FlexAttention", "the same, torch.compile") for word in ("--without", name)]
    slow = "torch.compile takes longer for its rows than there are minutes"
    compiled = "transformers, static cache, compiled"  # as slow
    steps = run("decode", ["decode"], "--rounds", "3", "--limit", "60", "--without", compiled)
    decoding = [] if rehearsal else [replace(steps, environment={"QWEN2VL_GRAPHS": "1"})]
    attention = run("attention", ["attention"], "--rounds", "6", "--limit", "30", *quickly)
    return [
        Phase("build", 110, (_peers(wheels, work), *_build(rehearsal, checkpoints, cores)), together=True),
        Phase("tests", 130, tuple(_tests(rehearsal, cores, work)), floor=90),
        Phase("attention", 90, (attention,), floor=70),
        Phase("tower", 90, (run("tower", towers, "--rounds", "3", "--limit", "60"), *decoding), floor=60),
        Phase(
            "ops",
            50,
            (
                run("ops", ops, "--rounds", "8", "--limit", "30", *quickly),
                *([] if rehearsal else [run("preprocess", ["preprocess"], "--rounds", "3", where="cpu")]),
                *([] if rehearsal else [run("others", others, "--rounds", "2")]),
            ),
            floor=40,
        ),
        Phase("tuning", 120, (_rates(device, results), _tuning(rehearsal, work)), floor=60),
        Phase("sanitizer", 60, (_sanitizer(rehearsal),)),
        Phase("compiled", 0, (replace(run("compiled", ["attention", *ops]), missing=slow),)),
    ]


def _peers(wheels: Path, work: Path) -> Part:
    found = sorted(str(path) for path in wheels.rglob("*.whl"))
    if not found:
        return Part("peers", missing=f"no wheels in {wheels}, so that only what is installed takes part")
    options = ["install", "-q", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--upgrade", "--target"]
    return Part("peers", (sys.executable, "-m", "pip", *options, str(work / "site"), *found), peers=False)


def _build(rehearsal: bool, checkpoints: Path, cores: int) -> Iterator[Part]:
    """None of these sees the peers, which are being installed."""
    python = sys.executable
    build = (python, "setup.py", "build_ext", "--inplace")
    small = ("tower", "--quick") if rehearsal else ()
    yield Part("checkpoints", (python, "-m", "benchmarks", "checkpoints", str(checkpoints), *small), peers=False)
    if rehearsal:
        from qwen2vl_kernels.core import native

        if native._cpu is not None:
            yield Part("extension", missing="the CPU's extension is built already, the GPU's needs a GPU's machine")
        else:
            yield Part("extension", build, environment={"QWEN2VL_BUILD_CUDA": "0"}, peers=False)
        kernels = ("activation", "--target", "sm_90", "--jobs", "1")
    else:
        major, minor = torch.cuda.get_device_capability()
        built = {
            "QWEN2VL_BUILD_CUDA": "1",
            "TORCH_CUDA_ARCH_LIST": os.environ.get("TORCH_CUDA_ARCH_LIST", f"{major}.{minor}"),
        }
        yield Part("extension", build, environment=built, peers=False)
        kernels = ("--jobs", str(cores))
        if wgmma.why_not(torch.device("cuda")) is None:
            yield Part("wgmma-build", (python, "-m", "benchmarks", "wgmma", "--build"), peers=False)
        # Those that are timed first, in the shadow of the extension, which takes one core and longer.
        candidates = ("--compile", "--limit", "40", "--jobs", str(max(cores // 2, 1)), *_cubins())
        yield Part("tuning-build", (python, "-m", "benchmarks", "tune", *candidates), measures=True, peers=False)
    yield Part("kernels", (python, "-m", "benchmarks", "warm", *kernels), peers=False)


def _tests(rehearsal: bool, cores: int, work: Path) -> Iterator[Part]:
    """Tests that need a GPU, those of Hopper's own attention before the others, and those that put their tensors on one
    where there is one. Only files that hold such tests are named, as a machine may lack what others import."""
    python = sys.executable
    texts = {path: path.read_text(encoding="utf-8") for path in sorted((ROOT / "tests").rglob("test_*.py"))}
    on_gpu = [str(path.relative_to(ROOT)) for path, text in texts.items() if "mark.gpu" in text]
    on_device = [
        str(path.relative_to(ROOT))
        for path, text in texts.items()
        if path.is_relative_to(ROOT / "tests" / "kernels")
        and any("import" in row and "DEVICE" in row for row in text.splitlines())
    ]
    # A test that loses CUDA's context or hangs ends its worker, which is replaced however often that happens.
    workers = ["-n", str(cores), "--dist", "worksteal", "--max-worker-restart", "1000", "--test-limit", "60"]
    options = ["-q", "-rs", *(["-p", "no:cacheprovider"] if rehearsal else workers)]
    if rehearsal:  # the first are skipped, the second interpret one op's kernels
        on_gpu = [name for name in on_gpu if "graphs" in name]
        on_device = [name for name in on_device if "append_kv" in name]
    first = [name for name in on_gpu if "sm90" in name]
    named = [("sm90-tests", "gpu", first)] if first else []
    named.append(("gpu-tests", "gpu", [name for name in on_gpu if name not in first]))
    for name, marked, files in (*named, ("device-tests", "not gpu", on_device)):
        told = work / "results" / f"{name}.jsonl"
        command = (python, "-m", "pytest", *options, "--test-lines", str(told), "-m", marked, *files)
        yield Part(name, command, environment={"OMP_NUM_THREADS": "1"}, tests=told)


def _tuning(rehearsal: bool, work: Path) -> Part:
    out = ("--out", str(work / "results" / "tune.json"))
    small = (
        ("swiglu forward", "--quick", "--device", "cpu", "--jobs", "1")
        if rehearsal
        else ("--limit", SECONDS, *_cubins())
    )
    return Part("tuning", (sys.executable, "-m", "benchmarks", "tune", *small, *out), measures=True)


def _cubins() -> tuple[str, ...]:
    return ("--cubins", str(CUBINS)) if CUBINS.is_dir() else ()


def _rates(device: str, results: Sequence[str]) -> Part:
    if (missing := wgmma.why_not(torch.device(device))) is not None:
        return Part("wgmma", missing=missing)
    return Part("wgmma", (sys.executable, "-m", "benchmarks", "wgmma", *results), measures=True)


def _sanitizer(rehearsal: bool) -> Part:
    """Without PyTorch's allocator, which keeps neighbours mapped, an access past the end is one past the allocation."""
    every = (sys.executable, "-m", "tests.kernels.one_of_each")
    if rehearsal:
        return Part("sanitizer", missing="there is no GPU whose memory to watch")
    tool = shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin")
    if tool is None:
        return Part("one of each, without compute-sanitizer, which is not installed", every)
    command = (tool, "--report-api-errors", "no", "--error-exitcode", "1", *every)
    return Part("sanitizer", command, environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
