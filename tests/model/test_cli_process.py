"""The command as a process of its own: its threads, and what a shell asks it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qwen2vl.cli import threads

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.parametrize(
    ("parameters", "most", "wanted"), [(4_000_000, 64, 1), (0, 1, 1), (100_000_000, 64, 5), (2_000_000_000, 8, 8)]
)
def test_threads_suit_the_work(parameters, most, wanted):
    assert threads.suitable(parameters, most) == wanted


_AS_COMMAND = """
import sys
from qwen2vl.cli import main
try:
    main()
finally:
    import torch
    print("threads:", torch.get_num_threads(), file=sys.stderr)
"""


@pytest.mark.parametrize(("given", "wanted"), [({}, 1), ({"OMP_NUM_THREADS": "2"}, 2)])
def test_the_command_has_few_threads_and_none_spins(place, given, wanted):
    """OpenMP itself says how its threads wait."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "MKL_", "GOMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", _AS_COMMAND, "generate", "--model", "model", "-p", "hi", "-n", "1"],
        cwd=place,
        env={**environment, "PYTHONPATH": str(ROOT), "OMP_DISPLAY_ENV": "TRUE", **given},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and f"threads: {wanted}\n" in done.stderr, done.stderr
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in done.stderr


def test_a_programs_own_threads_are_left_alone(run, monkeypatch):
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        threads.take_process()
        assert run("generate", "--model", "model", "--prompt", "hi", "-n", 1).exit_code == 0
        assert torch.get_num_threads() == 2 and "OMP_WAIT_POLICY" not in os.environ
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("words", "found"), [("insp", "inspect"), ("generate --im", "--image"), ("", "generate")])
def test_a_shell_completes_commands_and_options(words, found):
    """Asked as bash asks, without PyTorch, which would take a second."""
    line = f"qwen2vl {words}"
    code = "import sys\nfrom qwen2vl.cli import main\ntry:\n main()\nfinally:\n assert 'torch' not in sys.modules"
    asked = {"_QWEN2VL_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT), **asked},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0 and found in done.stdout.split(), done.stderr
