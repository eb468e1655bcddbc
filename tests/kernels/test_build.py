"""The build: what it refuses, what it survives, and what nvcc makes of the CUDA sources."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
CSRC = ROOT / "csrc"
SETTINGS = ("QWEN2VL_BUILD_CUDA", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS", "CUDA_HOME", "CUDA_PATH")
#: What is built here is imported and no more, and the optimizer takes half of a build's time.
QUICK = {"CXXFLAGS": "-O0"}


def build(folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """``setup.py build_ext`` into ``folder``."""
    clean = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(folder / "lib")]
    return subprocess.run(
        [*command, "--build-temp", str(folder / "temp")],
        cwd=ROOT,
        env={**clean, **environment},
        capture_output=True,
        text=True,
    )


def toolkit_that_says(folder: Path, answer: str) -> str:
    """A CUDA_HOME whose nvcc knows sm_90 and answers everything else with an error."""
    nvcc = folder / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f'#!/bin/sh\n[ "$1" = --list-gpu-code ] && echo sm_90 && exit 0\necho "{answer}" >&2\nexit 1\n')
    nvcc.chmod(0o755)
    return str(folder / "cuda")


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("QWEN2VL_BUILD_CUDA", "yes", "QWEN2VL_BUILD_CUDA must be 0, 1 or auto, got 'yes'"),
        (
            "TORCH_CUDA_ARCH_LIST",
            "8.0;Hopper",
            "TORCH_CUDA_ARCH_LIST must list entries such as 8.0 .* got 'Hopper'",
        ),
        ("MAX_JOBS", "0", "MAX_JOBS must be a positive integer, got '0'"),
    ],
)
def test_bad_settings_are_refused(tmp_path, name, value, says):
    result = build(tmp_path, **{name: value})
    assert result.returncode != 0
    assert re.search(says, result.stderr), result.stderr
    assert not (tmp_path / "lib").exists()


def test_required_cuda_is_fatal(tmp_path):
    result = build(tmp_path, QWEN2VL_BUILD_CUDA="1", CUDA_HOME=str(tmp_path))
    assert result.returncode != 0
    assert f"no nvcc in {tmp_path}" in result.stderr
    home = toolkit_that_says(tmp_path, "unused")
    result = build(tmp_path, QWEN2VL_BUILD_CUDA="1", CUDA_HOME=home, TORCH_CUDA_ARCH_LIST="5.2 9.0")
    assert result.returncode != 0
    assert "does not know sm_52, which TORCH_CUDA_ARCH_LIST asks for" in result.stderr


def test_failed_cuda_leaves_a_working_cpu_build(tmp_path):
    home = toolkit_that_says(tmp_path, "mrope_positions.cu(1): error: no such GPU")
    result = build(tmp_path, CUDA_HOME=home, **QUICK)
    assert result.returncode == 0, result.stderr
    (library,) = (tmp_path / "lib").rglob("*.so")
    assert library.name.startswith("_cpu.")
    shutil.copy(library, tmp_path)
    ran = subprocess.run(
        [sys.executable, "-c", "import _cpu; print(_cpu.build_info()['cuda'])"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert re.match(r"left out: compiling qwen2vl_kernels\._cuda failed: .*error: no such GPU", ran.stdout)


def test_sources_are_torch_free():
    sources = [p for p in CSRC.rglob("*") if p.suffix in {".h", ".cpp", ".cu", ".cuh"}]
    assert len(sources) > 5
    for source in sources:
        for header in re.findall(r'#include\s*[<"]([^>"]+)', source.read_text()):
            assert not re.match(r"(torch|ATen|c10|caffe2)[/.]", header), f"{source.name} includes {header}"


def _nvcc() -> str:
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        pytest.skip("no nvcc: the CUDA sources are not compiled")
    return nvcc


@pytest.mark.parametrize("arch", ["80", "90", "100"])
@pytest.mark.parametrize("source", sorted(CSRC.glob("cuda/*.cu")), ids=lambda path: path.stem)
def test_cuda_kernels_compile_without_spills_or_warnings(tmp_path, source, arch):
    nvcc = _nvcc()
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    if f"sm_{arch}" not in known:
        pytest.skip(f"this nvcc does not know sm_{arch}")
    flags = ["-std=c++17", "-O3", "-fmad=false", "-Xcompiler", "-Wall,-Wextra", "-Xptxas", "-v"]
    flags += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    command = [nvcc, *flags, "-I", str(CSRC), "-cubin", "-o", str(tmp_path / "cubin"), str(source)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    kernels = re.findall(r"Compiling entry function '(\w+)'", result.stderr)
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", result.stderr)
    assert kernels and len(frames) >= len(kernels)
    assert set(frames) == {("0", "0", "0")}, result.stderr
    assert "warning" not in result.stderr.lower(), result.stderr


@pytest.mark.slow
def test_a_wheel_from_the_sdist_works_from_an_empty_folder(tmp_path):
    """sdist, wheel from that sdist, install, import: nothing is missing, and torch is not needed to build."""
    pytest.importorskip("build", reason="the package 'build' is not installed")
    blocker = tmp_path / "no-torch"
    blocker.mkdir()
    (blocker / "torch.py").write_text("raise ImportError('torch was imported at build time')\n")
    clean = {name: value for name, value in os.environ.items() if name not in SETTINGS}

    def run(*command: str, path: str) -> str:
        environment = {**clean, **QUICK, "QWEN2VL_BUILD_CUDA": "0", "PYTHONPATH": path}
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
        return result.stdout

    source, site = tmp_path / "source", tmp_path / "site"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".git", ".venv", "build", "*.so", "*.egg-info"))
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist", str(source), path=str(blocker))
    (wheel,), (sdist,) = (tmp_path / "dist").glob("*.whl"), (tmp_path / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    assert {str(path.relative_to(ROOT)) for path in CSRC.rglob("*") if path.is_file()} <= packed
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site), str(wheel), path=str(blocker))
    code = (
        "import qwen2vl, qwen2vl_kernels, qwen2vl_kernels.core.native as n\n"
        "from qwen2vl.assets import folder\n"
        "print(qwen2vl.__file__, n.cpu_reason(), n.cuda_reason(), qwen2vl.Qwen2VL.__name__, folder())\n"
    )
    # -S: an editable install of this tree hooks itself into imports there and would lend its own extensions.
    packages = Path(torch.__file__).parent.parent
    said = run(sys.executable, "-S", "-c", code, path=f"{site}{os.pathsep}{packages}")
    assert said.startswith(str(site)) and " None " in said and "Qwen2VL" in said
    assert f" {site / 'qwen2vl' / 'assets' / 'small'}" in said
    assert any(name.startswith("qwen2vl/assets/small/") for name in packed)
    assert "QWEN2VL_BUILD_CUDA" in said, "why there is no CUDA extension"
