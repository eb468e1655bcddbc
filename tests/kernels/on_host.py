"""Builds the programs in host/, which run CUDA kernels on the CPU (host/cuda_on_host.h)."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CSRC = ROOT / "csrc"
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def build_on_host(name: str, *flags: str) -> Path:
    """The program of host/``name``.cpp; skips the test where there is no compiler, or none with these flags.

    It is kept in build/ under a name that changes with the sources, the compiler and the flags.
    """
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler to run the CUDA kernels on the CPU with")
    flags = ("-std=c++17", "-O1", "-g", "-ffp-contract=off", "-Wno-unknown-pragmas", *flags)
    sources = [path for folder in (CSRC, HERE / "host") for path in sorted(folder.rglob("*")) if path.is_file()]
    version = subprocess.run([*compiler.split(), "--version"], capture_output=True, text=True).stdout
    known = hashlib.sha256(repr((compiler, version, flags, [str(path) for path in sources])).encode())
    for path in sources:
        known.update(hashlib.sha256(path.read_bytes()).digest())
    program = ROOT / "build" / "on_host" / f"{name}-{known.hexdigest()[:16]}"
    if program.is_file():
        return program
    program.parent.mkdir(parents=True, exist_ok=True)
    # host/cuda/sm90.cuh stands in for csrc/cuda/sm90.cuh: its folder is searched first.
    folders = ("-I", str(HERE / "host"), "-I", str(CSRC))
    made = program.with_suffix(f".{os.getpid()}")
    built = subprocess.run(
        [*compiler.split(), *flags, *folders, str(HERE / "host" / f"{name}.cpp"), "-o", str(made)],
        capture_output=True,
        text=True,
    )
    if "-fsanitize" in " ".join(flags) and built.returncode != 0 and "san" in built.stderr:
        pytest.skip(f"the compiler has no sanitizers: {built.stderr.strip().splitlines()[-1]}")
    assert built.returncode == 0, built.stderr
    made.replace(program)  # whole at once: another worker may be waiting for it, or making it too
    return program
