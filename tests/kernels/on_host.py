"""Builds the programs in host/, which run CUDA kernels on the CPU (host/cuda_on_host.h)."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def build_on_host(name: str, folder: Path, *flags: str) -> Path:
    """The program of host/``name``.cpp; skips the test where there is no compiler, or none with these flags."""
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler to run the CUDA kernels on the CPU with")
    program = folder / name
    common = [
        "-std=c++17",
        "-O1",
        "-g",
        "-ffp-contract=off",
        "-Wno-unknown-pragmas",
        "-I",
        str(HERE.parent.parent / "csrc"),
    ]
    built = subprocess.run(
        [*compiler.split(), *common, *flags, str(HERE / "host" / f"{name}.cpp"), "-o", str(program)],
        capture_output=True,
        text=True,
    )
    if flags and built.returncode != 0 and "san" in built.stderr:
        pytest.skip(f"the compiler has no sanitizers: {built.stderr.strip().splitlines()[-1]}")
    assert built.returncode == 0, built.stderr
    return program
