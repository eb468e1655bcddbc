"""The C++ of the CPU on random input under sanitizers, and its memory over many images."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
#: Random inputs of a target, for which it takes a second or two.
RUNS = {"decoder_step": 200, "image_to_patches": 60, "mrope_positions": 2000, "quant_linear": 500}
#: Where ``make`` keeps the programs until their sources change.
FOLDER = ROOT / "build" / f"fuzz-in-tests-{Path(os.environ.get('FUZZ_CXX', 'c++')).name}"


@pytest.fixture
def sanitizers(tmp_path_factory) -> None:
    """Skips where the compiler cannot make, or the machine not run, a program with sanitizers."""
    compiler = os.environ.get("FUZZ_CXX", "c++")
    for tool in ("make", compiler):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    folder = tmp_path_factory.mktemp("sanitizers")
    (folder / "empty.cpp").write_text("int main() {}\n")
    command = [compiler, "-fsanitize=address,undefined", "empty.cpp", "-o", "empty"]
    made = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if made.returncode != 0:
        pytest.skip(f"{compiler} has no -fsanitize=address,undefined: {made.stderr.strip()[-200:]}")
    ran = subprocess.run([str(folder / "empty")], capture_output=True, text=True)
    if ran.returncode != 0:
        pytest.skip(f"programs with sanitizers do not run here: {ran.stderr.strip()[-200:]}")


def test_random_input_finds_nothing(sanitizers, tmp_path):
    """As many inputs as ``make fuzz`` makes in a few seconds; then files are replayed, as done with one that failed."""
    command = ["make", "-j2", "fuzz", "FUZZ_SECONDS=0", f"FUZZ_DIR={FOLDER}", "FUZZER="]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    assert result.stdout.count("Done 0 runs") == len(RUNS), result.stdout

    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "ones").write_bytes(b"\1" * 64)
    for target, runs in RUNS.items():
        command = [str(FOLDER / target), f"-runs={runs}", f"-artifact_prefix={tmp_path}/"]
        fuzzed = subprocess.run(command, capture_output=True, text=True)
        assert fuzzed.returncode == 0 and f"Done {runs} runs" in fuzzed.stdout, (fuzzed.stdout + fuzzed.stderr)[-4000:]
        command = [str(FOLDER / target), str(tmp_path / "empty"), str(tmp_path / "ones")]
        replayed = subprocess.run(command, capture_output=True, text=True)
        assert replayed.returncode == 0 and "Done 2 runs" in replayed.stdout, replayed.stdout + replayed.stderr
        missing = subprocess.run([str(FOLDER / target), str(tmp_path / "none")], capture_output=True, text=True)
        assert missing.returncode == 2 and "cannot read" in missing.stderr


_GROWTH = """
import sys
import numpy, psutil, torch
import qwen2vl.media.image

torch.set_num_threads(1)
keep = sys.argv[1] == "keep"
random = numpy.random.default_rng(0)
noise = random.integers(0, 256, (200, 200, 4), dtype=numpy.uint8)
kept = []

def images(count):
    for _ in range(count):
        height, width = random.integers(8, 200, 2)
        made = qwen2vl.media.image.preprocess_image(noise[:height, :width, : random.choice([3, 4])])
        if keep:
            kept.append(made)

process = psutil.Process()
images(200)
before = process.memory_info().rss
images(1000)
print(process.memory_info().rss - before)
"""


@pytest.mark.parametrize("keep", [False, True], ids=["dropped", "kept"])
def test_memory_over_1000_images(keep):
    """1,000 images leave less than 8 MB behind; kept ones (about 40 KB each) are seen to stay."""
    pytest.importorskip("psutil")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _GROWTH, "keep" if keep else "drop"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    growth = int(result.stdout)
    if keep:
        assert growth > 24 << 20, growth
    else:
        assert growth < 8 << 20, growth
