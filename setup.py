"""Build of the two compiled extensions, and the line that Python runs as it starts; the rest is in pyproject.toml.

``qwen2vl_kernels._cpu`` is always built, ``qwen2vl_kernels._cuda`` where nvcc is found; neither needs
PyTorch.

Environment:
    QWEN2VL_BUILD_CUDA    auto (default): build _cuda if it builds, else install without it and remember why;
                          1: fail the installation when it cannot be built; 0: leave it out
    QWEN2VL_SM90          auto (default): _cuda has attention for Hopper if the architectures include 9.0 and nvcc makes
                          of it what it is meant to be; all: in every tile that the tuner tries; 0: leave it out
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
from collections.abc import Sequence
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
        "csrc/cpu/decoder_step.cpp",
        "csrc/cpu/few_rows.cpp",
        "csrc/cpu/few_rows_x86.cpp",
        "csrc/cpu/image_to_patches.cpp",
        "csrc/cpu/mrope_positions.cpp",
        "csrc/cpu/quant_linear.cpp",
        "csrc/cpu/quant_linear_x86.cpp",
        "csrc/cpu/resample.cpp",
        "csrc/cpu/resample_x86.cpp",
        "csrc/cpu/vision_positions.cpp",
        "csrc/cpu/workers.cpp",
    ],
)
CUDA = Extension(
    "qwen2vl_kernels._cuda",
    [
        "csrc/bind_cuda.cpp",
        "csrc/cuda/attention.cu",
        "csrc/cuda/device.cu",
        "csrc/cuda/image_to_patches.cu",
        "csrc/cuda/mrope_positions.cu",
        "csrc/cuda/vision_positions.cu",
    ],
)
# Attention for Hopper, a file a head width; its instructions are sm_90a's alone, and those of CUDA 12.0.
SM90_SOURCES = [f"csrc/cuda/attention_forward_{head_dim}.cu" for head_dim in (64, 72, 80, 96, 128)]
SM90_TOOLKIT = (12, 0)


class BuildError(Exception):
    """The extension cannot be built here; the message says why."""


def setting(name: str, *values: str) -> str:
    """The environment's choice among ``values``, the last of which is the default."""
    value = os.environ.get(name, values[-1])
    if value not in values:
        raise SystemExit(f"{name} must be {', '.join(values[:-1])} or {values[-1]}, got {value!r}")
    return value


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


def sm90_missing(nvcc: str, requested: list[tuple[str, bool]] | None, wanted: str) -> str | None:
    """Why attention for Hopper is not even compiled, or ``None``."""
    if wanted == "0":
        return "QWEN2VL_SM90=0"
    if requested is not None and not {"90", "90a"} & {name for name, _ in requested}:
        return "TORCH_CUDA_ARCH_LIST is without 9.0"
    version = toolkit(nvcc)
    if tuple(map(int, version.split(".")[:2])) < SM90_TOOLKIT:
        return f"it takes nvcc {'.'.join(map(str, SM90_TOOLKIT))} or newer, this one is {version}"
    return None


def toolkit(nvcc: str) -> str:
    """nvcc's version, which is that of the ptxas it runs."""
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"\bV(\d+\.\d+\.\d+)", said) or re.search(r"release (\d+\.\d+)", said)
    if found is None:
        raise BuildError(f"{nvcc} does not tell its version: {first_error(said)}")
    return found[1]


def ptxas_complaint(said: str) -> str | None:
    """What ``ptxas -v`` says of the first kernel that will not run as it is meant to, or ``None``.

    Such a kernel is right, but it has lost what it was written for: products that ptxas waits for one by one, and
    registers that live in memory. ptxas warns of neither; it tells them in passing.
    """
    kernel = ""
    for line in said.splitlines():
        if (found := re.search(r"Compiling entry function '(\w+)'|Function properties for (\w+)", line)) is not None:
            kernel = found[1] or found[2]
        if re.search(r"Potential Performance Loss|warpgroup\.wait is injected|\(C75(?:12|14|15)\)", line):
            text = re.sub(r"^.*?\(C(\d+)\)\s*", r"C\1: ", line.strip())
            return re.sub(r"'(_Z\w+)'", lambda name: demangled(name[1]), text)
        frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line)
        if frame is not None and any(map(int, frame.groups())):
            return f"{frame[0]} in {demangled(kernel)}"
    return None


def demangled(symbol: str) -> str:
    """A kernel's name without its parameters, as far as binutils are here."""
    if shutil.which("c++filt") is None:
        return symbol
    name = subprocess.run(["c++filt", symbol], capture_output=True, text=True).stdout.strip()
    return re.sub(r"^void |\((?!qwen2vl|anonymous).*$", "", name) or symbol


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
        mode = setting("QWEN2VL_BUILD_CUDA", "0", "1", "auto")
        sm90 = setting("QWEN2VL_SM90", "0", "all", "auto")
        archs, jobs = requested_archs(), max_jobs()
        self.temp = Path(self.build_temp).resolve()
        self.temp.mkdir(parents=True, exist_ok=True)
        cxx = shlex.split(os.environ.get("CXX", "c++"))
        status = self.sm90_status = "left out: QWEN2VL_BUILD_CUDA=0"
        cuda_built = False
        try:
            compiler = compiler_name(cxx)
            if mode != "0":
                try:
                    status = "built for " + self.build_cuda(archs, sm90, jobs)
                    cuda_built = True
                except BuildError as error:
                    if mode == "1":
                        raise
                    status = f"left out: {error}"
                    self.sm90_status = status
            if not cuda_built:
                # What an earlier build left in place would be out of step with these sources.
                for folder in {self.build_lib, str(ROOT)} if self.inplace_requested else {self.build_lib}:
                    (Path(folder) / self.get_ext_filename(CUDA.name)).unlink(missing_ok=True)
            self.write_build_info(compiler, status)
            self.build_cpu(cxx, jobs)
        except BuildError as error:
            raise SystemExit(f"qwen2vl: {error}") from error
        print(f"qwen2vl_kernels._cuda: {status}\nattention for Hopper: {self.sm90_status}", flush=True)
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
        self.run_ninja(CPU, {source: [*cxx, *common] for source in CPU.sources}, jobs, [*cxx, *link])

    def build_cuda(self, archs: list[tuple[str, bool]] | None, sm90: str, jobs: list[str]) -> str:
        nvcc = find_nvcc()
        flags, words = gencode(nvcc, archs)
        host = ["-Xcompiler", "-fPIC,-fvisibility=hidden,-ffp-contract=off,-Wall,-Wextra"]
        common = [nvcc, "-std=c++17", "-O3", *host, *self.includes()]
        self.sm90_status, objects = self.build_sm90(nvcc, common, archs, sm90, jobs)
        common += ["-fmad=false", f"-DQWEN2VL_SM90={int(bool(objects))}"]
        compile = {source: [*common, *(flags if source.endswith(".cu") else [])] for source in CUDA.sources}
        self.run_ninja(CUDA, compile, jobs, [nvcc, "-shared", "-cudart", "static"], objects)
        return words

    def build_sm90(
        self, nvcc: str, common: list[str], archs: list[tuple[str, bool]] | None, sm90: str, jobs: list[str]
    ) -> tuple[str, list[Path]]:
        """Attention for Hopper: what became of it in words, and its objects, none where it is left out.

        What it says never fails a build, not even a required one: the rest of the extension does all that it did, and
        no call takes this backend but by its name, which then says why it is not there.
        """
        flags = ["-gencode", "arch=compute_90a,code=sm_90a", "-Xptxas", "-v"]
        flags += ["-DQWEN2VL_SM90_ALL"] if sm90 == "all" else []
        try:
            if (missing := sm90_missing(nvcc, archs, sm90)) is not None:
                return f"left out: {missing}", []
            version = toolkit(nvcc)
            objects = self.run_ninja(CUDA, {source: [*common, *flags] for source in SM90_SOURCES}, jobs)
        except BuildError as error:
            return f"left out: {error}", []
        for file in objects:
            # Beside the object, so that one which is not compiled again still tells.
            if (complaint := ptxas_complaint(Path(f"{file}.txt").read_text())) is not None:
                return f"left out: nvcc {version} makes {file.stem} slow: {complaint}", []
        return f"built for sm_90a by nvcc {version}{', with every tile' if sm90 == 'all' else ''}", objects

    def includes(self) -> list[str]:
        import pybind11

        ours = ["-I", str(ROOT / "csrc"), "-I", str(self.temp)]
        # As system headers: warnings stay about our own code.
        return [*ours, "-isystem", sysconfig.get_path("include"), "-isystem", pybind11.get_include()]

    def write_build_info(self, compiler: str, cuda_status: str) -> None:
        version = self.distribution.get_version()
        values = {"VERSION": version, "COMPILER": compiler, "CUDA_STATUS": cuda_status, "SM90_STATUS": self.sm90_status}
        lines = [f'#define QWEN2VL_{name} R"info({value})info"\n' for name, value in values.items()]
        text = "#pragma once\n" + "".join(lines)
        header = self.temp / "build_info.h"
        if not header.exists() or header.read_text() != text:
            header.write_text(text)

    def run_ninja(
        self,
        extension: Extension,
        compile: dict[str, list[str]],
        jobs: list[str],
        link: list[str] | None = None,
        further: Sequence[Path] = (),
    ) -> list[Path]:
        """Compile sources, each by its command, and link the extension of these objects and ``further`` ones.

        Without ``link`` it ends with the objects, which are returned; what a compiler said is kept beside each.
        """
        import ninja

        short = extension.name.rpartition(".")[2]
        rules = {command: f"compile_{n}" for n, command in enumerate(dict.fromkeys(map(tuple, compile.values())))}
        lines = []
        for command, rule in rules.items():
            words = rule_command([*command, "-MMD", "-MF", "$out.d", "-c", "$in", "-o", "$out"])
            lines += [f"rule {rule}", f"  command = {words} > $out.txt 2>&1; code=$$?; cat $out.txt; exit $$code"]
            lines += ["  depfile = $out.d", "  deps = gcc", ""]
        objects = [self.temp / short / Path(source).with_suffix(".o") for source in compile]
        for file, (source, command) in zip(objects, compile.items(), strict=True):
            out = ninja_path(file)
            lines.append(f"build {out} | {out}.txt: {rules[tuple(command)]} {ninja_path(ROOT / source)}")
        if link is not None:
            output = Path(self.get_ext_fullpath(extension.name)).resolve()
            output.parent.mkdir(parents=True, exist_ok=True)
            lines += ["rule link", f"  command = {rule_command([*link, '$in', '-o', '$out'])}", ""]
            lines.append(f"build {ninja_path(output)}: link {' '.join(map(ninja_path, [*objects, *further]))}")
        file = self.temp / f"{short}{'' if link is not None else '_objects'}.ninja"
        file.write_text("\n".join([*lines, ""]))

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
        return objects


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
