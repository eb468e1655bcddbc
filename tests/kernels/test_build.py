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
SETTINGS = ("QWEN2VL_BUILD_CUDA", "QWEN2VL_SM90", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS", "CUDA_HOME", "CUDA_PATH")
#: Attention for Hopper is compiled for sm_90a alone. attention.cu launches it and has no kernels of its own.
CUDA_SOURCES = sorted(path for path in CSRC.glob("cuda/*.cu") if not path.stem.startswith("attention_forward"))
WITH_KERNELS = [path for path in CUDA_SOURCES if path.stem != "attention"]
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
        ("QWEN2VL_SM90", "1", "QWEN2VL_SM90 must be 0, all or auto, got '1'"),
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
        [sys.executable, "-c", "import _cpu; print(*(_cpu.build_info()[key] for key in ('cuda', 'sm90')), sep='\\n')"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    said = ran.stdout.splitlines()
    assert re.match(r"left out: compiling qwen2vl_kernels\._cuda failed: .*error: no such GPU", said[0])
    assert said[1] == said[0], "attention for Hopper is a part of it"


class Pretended:
    """A toolkit and a C++ compiler that only touch what they are asked for: what is built holds nothing.

    ``nvcc`` knows sm_80, sm_90 and sm_100. What ``said`` has for a source's stem is what it says of that source.
    """

    def __init__(self, folder: Path, version: str = "12.8.93") -> None:
        self.folder, self.calls = folder, folder / "calls.txt"
        self.said = folder / "said"
        self.said.mkdir()
        answers = f'echo "Cuda compilation tools, release {version.rpartition(".")[0]}, V{version}"'
        for name in ("cuda/bin/nvcc", "c++"):
            program = folder / name
            program.parent.mkdir(parents=True, exist_ok=True)
            program.write_text(
                f"""#!/bin/sh
case $1 in
  --list-gpu-code) echo sm_80 sm_90 sm_100; exit;;
  --version) {answers}; exit;;
esac
echo "$*" >> "{self.calls}"
while [ $# -gt 0 ]; do [ "$1" = -o ] && out=$2; shift; done
touch "$out"
said="{self.said}/$(basename "$out" .o)"
if [ -f "$said" ]; then cat "$said" >&2; ! grep -q "error:" "$said"; fi
"""
            )
            program.chmod(0o755)

    def build(self, **environment: str) -> tuple[str, list[str]]:
        """What became of attention for Hopper, in words, and the commands that were run."""
        self.calls.write_text("")
        given = {"CUDA_HOME": str(self.folder / "cuda"), "CXX": str(self.folder / "c++"), **environment}
        result = build(self.folder, **given)
        assert result.returncode == 0, result.stdout + result.stderr
        (words,) = re.findall(r"(?m)^attention for Hopper: (.*)$", result.stdout)
        header = (self.folder / "temp" / "build_info.h").read_text()
        assert f'QWEN2VL_SM90_STATUS R"info({words})info"' in header
        return words, self.calls.read_text().splitlines()


@pytest.fixture
def pretended(tmp_path):
    return Pretended(tmp_path)


HEADS = (64, 72, 80, 96, 128)


@pytest.mark.parametrize("archs", ["", "9.0", "8.0;9.0a+PTX"])
def test_hoppers_attention_has_flags_of_its_own(pretended, archs):
    words, calls = pretended.build(TORCH_CUDA_ARCH_LIST=archs, QWEN2VL_BUILD_CUDA="1")
    assert words == "built for sm_90a by nvcc 12.8.93"
    own = [call for call in calls if re.search(r"-c \S+/attention_forward_\d+\.cu ", call)]
    assert len(own) == len(HEADS)
    for call in own:
        assert re.findall(r"-gencode (\S+)", call) == ["arch=compute_90a,code=sm_90a"]
        assert "-Xptxas -v" in call and "-fmad" not in call
    others = [call for call in calls if "-fmad=false" in call]
    assert all("-DQWEN2VL_SM90=1" in call for call in others)
    assert {source.stem for source in CUDA_SOURCES} <= {Path(word).stem for call in others for word in call.split()}
    (link,) = [call for call in calls if "-cudart static" in call]
    assert all(f"/attention_forward_{head_dim}.o" in link for head_dim in HEADS)


PTXAS = """ptxas info    : Compiling entry function '{kernel}' for 'sm_90a'
ptxas info    : Function properties for {kernel}
    {frame} bytes stack frame, {spilled} bytes spill stores, {spilled} bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers
"""
CLEAN = PTXAS.format(kernel="_Z5otheri", frame=0, spilled=0)
LOSS = "ptxas info    : (C7512) Potential Performance Loss: wgmma are serialized in function '_Z3oneIfEvi'\n"
WAIT = "ptxas info    : (C7514) warpgroup.wait is injected in around line 9 by compiler in function '_Z3oneIfEvi'\n"
ARRIVE = "ptxas info    : (C7519) warpgroup.arrive is injected in around line 9 by compiler in function '_Z3oneIfEvi'\n"


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (CLEAN + PTXAS.format(kernel="_Z3oneIfEvi", frame=0, spilled=48), "48 bytes spill stores, .* in one<float>"),
        (CLEAN + PTXAS.format(kernel="_Z3oneIfEvi", frame=16, spilled=0), "16 bytes stack frame, .* in one<float>"),
        (LOSS + CLEAN, "C7512: Potential Performance Loss: .* in function one<float>"),
        (WAIT + CLEAN, "C7514: warpgroup.wait is injected .* in function one<float>"),
    ],
)
def test_hoppers_attention_is_left_out_where_ptxas_makes_it_slow(pretended, said, words):
    """Each time the build runs, with an object that is compiled but once; the rest of the extension is built."""
    (pretended.said / "attention_forward_80").write_text(ARRIVE + said)
    for first in (True, False):
        found, calls = pretended.build(QWEN2VL_BUILD_CUDA="1")
        assert re.fullmatch(rf"left out: nvcc 12\.8\.93 makes attention_forward_80 slow: .*{words}", found), found
        assert bool([call for call in calls if "attention_forward_80.cu" in call]) == first
        if first:
            assert "-DQWEN2VL_SM90=0" in " ".join(calls) and "-DQWEN2VL_SM90=1" not in " ".join(calls)
            (link,) = [call for call in calls if "-cudart static" in call]
            assert "attention_forward_" not in link
    # What ptxas says is an output of the compilation, which is done again where it is lost.
    (pretended.said / "attention_forward_80").write_text(ARRIVE + CLEAN)
    (pretended.folder / "temp" / "_cuda" / "csrc" / "cuda" / "attention_forward_80.o.txt").unlink()
    assert pretended.build()[0] == "built for sm_90a by nvcc 12.8.93"


def test_hoppers_attention_that_does_not_compile_is_left_out(pretended):
    (pretended.said / "attention_forward_72").write_text("sm90.cuh(7): error: no such instruction\n")
    words, _ = pretended.build(QWEN2VL_BUILD_CUDA="1")
    assert re.fullmatch(r"left out: compiling qwen2vl_kernels\._cuda failed: .*error: no such instruction", words)


def test_every_tile_is_a_switch(pretended):
    words, calls = pretended.build(QWEN2VL_SM90="all")
    assert words == "built for sm_90a by nvcc 12.8.93, with every tile"
    assert sum("-DQWEN2VL_SM90_ALL" in call for call in calls) == len(HEADS)


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"QWEN2VL_BUILD_CUDA": "0"}, "left out: QWEN2VL_BUILD_CUDA=0"),
        ({"QWEN2VL_SM90": "0"}, "left out: QWEN2VL_SM90=0"),
        ({"CUDA_HOME": "/nowhere"}, "left out: no nvcc in /nowhere, which CUDA_HOME or CUDA_PATH names"),
        ({"TORCH_CUDA_ARCH_LIST": "8.0;10.0"}, "left out: TORCH_CUDA_ARCH_LIST is without 9.0"),
    ],
)
def test_it_is_told_why_hoppers_attention_is_left_out(pretended, environment, words):
    assert pretended.build(**environment)[0] == words


def test_an_old_nvcc_has_no_attention_for_hopper(tmp_path):
    words, calls = Pretended(tmp_path, "11.8.89").build(QWEN2VL_BUILD_CUDA="1")
    assert words == "left out: it takes nvcc 12.0 or newer, this one is 11.8.89"
    assert "-DQWEN2VL_SM90=0" in " ".join(calls)


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
@pytest.mark.parametrize("source", WITH_KERNELS, ids=lambda path: path.stem)
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
