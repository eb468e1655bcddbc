"""Build of the two compiled extensions, and the line that Python runs as it starts; the rest is in pyproject.toml.

``qwen2vl_kernels._cpu`` is always built, ``qwen2vl_kernels._cuda`` where nvcc is found; neither needs
PyTorch.

Environment:
    QWEN2VL_BUILD_CUDA    auto (default): build _cuda if it builds, else install without it and remember why;
                          1: fail the installation when it cannot be built; 0: leave it out
    TORCH_CUDA_ARCH_LIST  e.g. "8.0;9.0+PTX"; default 8.0;9.0;10.0+PTX, as far as nvcc knows them
    MAX_JOBS              compilers run at once; default: ninja's choice
    CUDA_HOME, CXX, CXXFLAGS, LDFLAGS as everywhere
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Command, Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
# Beside the packages in site-packages; Python runs its one line at every start, so it does next to nothing.
PTH = "qwen2vl_kernels.pth"
PTH_LINE = 'import os; os.environ.get("QWEN2VL_KERNELS") and __import__("_qwen2vl_kernels_switch")\n'
DEFAULT_ARCHS = ("8.0", "9.0", "10.0")
CPU = Extension(
    "qwen2vl_kernels._cpu",
    [
        "csrc/bind_cpu.cpp",
        "csrc/cpu/image_to_patches.cpp",
        "csrc/cpu/mrope_positions.cpp",
        "csrc/cpu/resample.cpp",
        "csrc/cpu/resample_x86.cpp",
        "csrc/cpu/vision_positions.cpp",
    ],
)
CUDA = Extension(
    "qwen2vl_kernels._cuda",
    [
        "csrc/bind_cuda.cpp",
        "csrc/cuda/device.cu",
        "csrc/cuda/image_to_patches.cu",
        "csrc/cuda/mrope_positions.cu",
        "csrc/cuda/vision_positions.cu",
    ],
)


class BuildError(Exception):
    """The extension cannot be built here; the message says why."""


def cuda_mode() -> str:
    mode = os.environ.get("QWEN2VL_BUILD_CUDA", "auto")
    if mode not in ("0", "1", "auto"):
        raise SystemExit(f"QWEN2VL_BUILD_CUDA must be 0, 1 or auto, got {mode!r}")
    return mode


def max_jobs() -> list[str]:
    value = os.environ.get("MAX_JOBS")
    if value is None:
        return []
    if not value.isdecimal() or int(value) < 1:
        raise SystemExit(f"MAX_JOBS must be a positive integer, got {value!r}")
    return ["-j", value]


def requested_archs() -> list[tuple[str, bool]] | None:
    """TORCH_CUDA_ARCH_LIST as (architecture such as "90a", keep its PTX), or None for the default."""
    value = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    archs = []
    for entry in re.split(r"[\s;,]+", value.strip(" ;,")) if value.strip(" ;,") else []:
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", entry)
        if match is None:
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST must list entries such as 8.0 or 9.0a+PTX, got {entry!r}")
        archs.append((match[1] + match[2], match[3] is not None))
    return archs or None


def find_nvcc() -> str:
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    if homes:  # who names a toolkit wants that one and no other
        nvcc = Path(homes[0]) / "bin" / "nvcc"
        if not os.access(nvcc, os.X_OK):
            raise BuildError(f"no nvcc in {homes[0]}, which CUDA_HOME or CUDA_PATH names")
        return str(nvcc)
    found = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if found is None:
        raise BuildError("no nvcc found (CUDA_HOME, PATH, /usr/local/cuda)")
    return found


def gencode(nvcc: str, requested: list[tuple[str, bool]] | None) -> tuple[list[str], str]:
    """nvcc's -gencode flags, and the architectures in words."""
    listing = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True)
    known = set(re.findall(r"sm_(\w+)", listing.stdout))
    if listing.returncode != 0 or not known:
        raise BuildError(f"{nvcc} does not run: {first_error(listing.stdout + listing.stderr)}")
    if requested is None:
        names = [arch.replace(".", "") for arch in DEFAULT_ARCHS]
        names = [name for name in names if name in known]
        if not names:
            raise BuildError(f"{nvcc} knows none of {', '.join(DEFAULT_ARCHS)}; set TORCH_CUDA_ARCH_LIST")
        requested = [(name, name == names[-1]) for name in names]
    flags, words = [], []
    for name, ptx in requested:
        if name.rstrip("af") not in known:
            raise BuildError(f"{nvcc} does not know sm_{name}, which TORCH_CUDA_ARCH_LIST asks for")
        flags += ["-gencode", f"arch=compute_{name},code=sm_{name}"]
        if ptx:
            flags += ["-gencode", f"arch=compute_{name},code=compute_{name}"]
        words.append(f"sm_{name}{'+PTX' if ptx else ''}")
    return flags, ", ".join(words)


def first_error(output: str) -> str:
    """The line of a compiler's output that says what is wrong, short enough for a status line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"\berror\b|fatal|not found", line, re.IGNORECASE)]
    return (errors or lines or ["no output"])[0][:300]


def compiler_name(cxx: list[str]) -> str:
    if shutil.which(cxx[0]) is None:
        raise BuildError(f"no C++ compiler {cxx[0]!r} found; set CXX")
    version = subprocess.run([*cxx, "--version"], capture_output=True, text=True)
    if version.returncode != 0 or not version.stdout.strip():
        raise BuildError(f"the C++ compiler {shlex.join(cxx)} does not run")
    return version.stdout.splitlines()[0]


class Build(build_ext):
    """Compiles and links with ninja, so that C++ and CUDA share one parallel, incremental build."""

    def build_extensions(self) -> None:
        if os.name != "posix":
            raise SystemExit("qwen2vl builds on Linux and macOS")
        # A bad value stops the build before it starts.
        mode, archs, jobs = cuda_mode(), requested_archs(), max_jobs()
        self.temp = Path(self.build_temp).resolve()
        self.temp.mkdir(parents=True, exist_ok=True)
        cxx = shlex.split(os.environ.get("CXX", "c++"))
        status = "left out: QWEN2VL_BUILD_CUDA=0"
        cuda_built = False
        try:
            compiler = compiler_name(cxx)
            if mode != "0":
                try:
                    status = "built for " + self.build_cuda(archs, jobs)
                    cuda_built = True
                except BuildError as error:
                    if mode == "1":
                        raise
                    status = f"left out: {error}"
            if not cuda_built:
                # What an earlier build left in place would be out of step with these sources.
                for folder in {self.build_lib, str(ROOT)} if self.inplace_requested else {self.build_lib}:
                    (Path(folder) / self.get_ext_filename(CUDA.name)).unlink(missing_ok=True)
            self.write_build_info(compiler, status)
            self.build_cpu(cxx, jobs)
        except BuildError as error:
            raise SystemExit(f"qwen2vl: {error}") from error
        print(f"qwen2vl_kernels._cuda: {status}", flush=True)
        self.extensions = [CPU, CUDA] if cuda_built else [CPU]

    def run(self) -> None:
        self.inplace_requested = bool(self.inplace)  # setuptools clears it while it builds
        super().run()

    def build_cpu(self, cxx: list[str], jobs: list[str]) -> None:
        # No contraction into multiply-adds: weights of the resize are to be the same numbers on every machine.
        common = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-pthread", "-ffp-contract=off"]
        common += ["-Wall", "-Wextra"]
        common += shlex.split(os.environ.get("CXXFLAGS", "")) + self.includes()
        link = ["-shared", "-pthread", *shlex.split(os.environ.get("LDFLAGS", ""))]
        if sys.platform == "darwin":
            link += ["-undefined", "dynamic_lookup"]
        self.run_ninja(CPU, {".cpp": [*cxx, *common]}, [*cxx, *link], jobs)

    def build_cuda(self, archs: list[tuple[str, bool]] | None, jobs: list[str]) -> str:
        nvcc = find_nvcc()
        flags, words = gencode(nvcc, archs)
        host = ["-Xcompiler", "-fPIC,-fvisibility=hidden,-ffp-contract=off,-Wall,-Wextra"]
        common = [nvcc, "-std=c++17", "-O3", "-fmad=false", *host, *self.includes()]
        link = [nvcc, "-shared", "-cudart", "static"]
        self.run_ninja(CUDA, {".cpp": common, ".cu": [*common, *flags]}, link, jobs)
        return words

    def includes(self) -> list[str]:
        import pybind11

        ours = ["-I", str(ROOT / "csrc"), "-I", str(self.temp)]
        # As system headers: warnings stay about our own code.
        return [*ours, "-isystem", sysconfig.get_path("include"), "-isystem", pybind11.get_include()]

    def write_build_info(self, compiler: str, cuda_status: str) -> None:
        version = self.distribution.get_version()
        values = {"VERSION": version, "COMPILER": compiler, "CUDA_STATUS": cuda_status}
        lines = [f'#define QWEN2VL_{name} R"info({value})info"\n' for name, value in values.items()]
        text = "#pragma once\n" + "".join(lines)
        header = self.temp / "build_info.h"
        if not header.exists() or header.read_text() != text:
            header.write_text(text)

    def run_ninja(self, extension: Extension, compile: dict[str, list[str]], link: list[str], jobs: list[str]) -> None:
        """Build one extension; ``compile`` maps a source suffix to the command that compiles it."""
        import ninja

        short = extension.name.rpartition(".")[2]
        output = Path(self.get_ext_fullpath(extension.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        lines = []
        for suffix, command in compile.items():
            words = [*command, "-MMD", "-MF", "$out.d", "-c", "$in", "-o", "$out"]
            lines += [f"rule compile_{suffix[1:]}", f"  command = {rule_command(words)}"]
            lines += ["  depfile = $out.d", "  deps = gcc", ""]
        lines += ["rule link", f"  command = {rule_command([*link, '$in', '-o', '$out'])}", ""]
        objects = []
        for source in map(Path, extension.sources):
            objects.append(ninja_path(self.temp / short / source.with_suffix(".o")))
            lines.append(f"build {objects[-1]}: compile_{source.suffix[1:]} {ninja_path(ROOT / source)}")
        lines += [f"build {ninja_path(output)}: link {' '.join(objects)}", ""]
        file = self.temp / f"{short}.ninja"
        file.write_text("\n".join(lines))

        program = os.path.join(ninja.BIN_DIR, "ninja")
        result = subprocess.run(
            [program, "-f", str(file), *jobs],
            cwd=self.temp,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        print(result.stdout, flush=True)
        if result.returncode != 0:
            raise BuildError(f"compiling {extension.name} failed: {first_error(result.stdout)}")


class BuildPth(Command):
    """Writes ``PTH`` where wheels are made from, so that their RECORD has it, and an uninstall removes it.

    An editable wheel takes no modules from there, so it goes into the wheel's own folder.
    """

    description = "write the line that Python runs as it starts"
    user_options = [("build-lib=", "b", "folder to write it into")]  # noqa: RUF012  (as distutils has it)
    editable_mode = False

    def initialize_options(self) -> None:
        self.build_lib: str | None = None

    def finalize_options(self) -> None:
        self.build_lib = self.build_lib or self.get_finalized_command("build").build_lib

    def run(self) -> None:
        folder = self.get_finalized_command("install").install_lib if self.editable_mode else self.build_lib
        file = Path(str(folder), PTH)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(PTH_LINE, encoding="utf-8")

    def get_outputs(self) -> list[str]:
        return [] if self.editable_mode else [str(Path(str(self.build_lib), PTH))]

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        return []


def rule_command(words: list[str]) -> str:
    """A shell command for a ninja rule; $in and $out stay ninja's."""
    return " ".join(word if word.startswith("$") else shlex.quote(word).replace("$", "$$") for word in words)


def ninja_path(path: Path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))


build.sub_commands = [*build.sub_commands, ("build_pth", None)]
setup(ext_modules=[CPU, CUDA], cmdclass={"build_ext": Build, "build_pth": BuildPth})
