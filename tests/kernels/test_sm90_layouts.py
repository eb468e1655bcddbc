"""Tiles of attention for Hopper in shared memory, and wgmma's descriptors of them, beside those of CuTe's headers.

No layout of CuTe's has heads of 72: their last block of 16 columns is 8 columns and 8 zeros.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.kernels.on_host import ROOT, build_on_host

CUTLASS = ROOT / "build" / "cutlass" / "4.2.0.0"


def _toolkit() -> Path | None:
    """The headers of a CUDA toolkit that has the C++ standard library which CuTe's headers take."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), nvcc and Path(nvcc).resolve().parent.parent]
    folders = [Path(home, "include") for home in (*homes, "/usr/local/cuda") if home]
    return next((folder for folder in folders if (folder / "cccl").is_dir()), None)


def layouts_of(program: Path) -> dict[str, list[int]]:
    """Numbers by what they are: "depth 16 96 80 offsets", or "... descriptor 3"."""
    said = subprocess.run([str(program), "0"], capture_output=True, text=True, check=True).stdout
    found = {}
    for line in said.splitlines():
        words = line.split()
        if words and words[0] in ("depth", "across"):
            named = 5 if words[4] == "offsets" else 6
            found[" ".join(words[:named])] = [int(word) for word in words[named:]]
    return found


def test_layouts_and_descriptors_are_those_of_cute() -> None:
    headers = CUTLASS / "cutlass_library" / "source" / "include"
    if not headers.is_dir():
        pytest.skip(f"CuTe's headers are not installed: make {CUTLASS.relative_to(ROOT)}")
    toolkit = _toolkit()
    if toolkit is None:
        pytest.skip("CuTe's headers take those of a CUDA toolkit with include/cccl, and none is here")
    folders = [f"-I{folder}" for folder in (headers, toolkit, toolkit / "cccl")]
    cute = layouts_of(build_on_host("layouts_of_cute", "-w", "-O0", *folders))
    ours = layouts_of(build_on_host("attention_layouts"))
    assert len(ours) == len(cute) == 2 * 5 + (5 + 6) + (5 + 8) + (6 + 6) + (4 + 8) + (8 + 8)
    for name, numbers in cute.items():
        if name.startswith("across 64 128 64 descriptor"):  # one block alone is never stepped over
            assert ours[name][0::2] == numbers[0::2] and ours[name][3] == numbers[3], name
            continue
        assert ours[name] == numbers, name


def test_maps_that_differ_are_kept_apart() -> None:
    """A map of blocks of 64 columns in the place of one of 16 brings other bytes than the kernel waits for."""
    program = build_on_host("attention_map_keys")
    keys = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(keys) == 11 == len(set(keys)) and all(len(key.split()) == 15 for key in keys)
