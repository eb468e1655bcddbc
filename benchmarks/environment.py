"""What a result must say about where it was measured."""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from . import providers

ROOT = Path(__file__).resolve().parent.parent


def device_name(device: torch.device) -> str:
    """The GPU's or the CPU's marketing name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def slug(name: str) -> str:
    """A folder name: ``"NVIDIA H200"`` becomes ``"nvidia-h200"``."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "unknown"


def folder_name(device: torch.device) -> str:
    """The folder of this device's results.

    For a CPU it names instructions and threads too: virtual machines differ in both under one name of a processor.
    """
    name = slug(device_name(device))
    if device.type == "cuda":
        return name
    return f"{name}-{slug(torch.backends.cpu.get_cpu_capability())}-{torch.get_num_threads()}-threads"


@contextmanager
def full_float32() -> Iterator[None]:
    """Let products and convolutions of float32 be in float32: PyTorch's default for cuDNN is TF32, with 10 bits, which
    a gate against another implementation would find."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def describe(device: torch.device) -> dict[str, Any]:
    """Device, versions, threads, load and commit, as they go into the JSON."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device_name(device),
        "device_type": device.type,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "tf32": torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32,
        "load_average": [round(x, 2) for x in os.getloadavg()],
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": providers.versions(),
        "commit": commit(),
    }


#: Options that name a folder of this machine and change no number: the command that results quote is without them.
_PLACES = ("--checkpoint-dir", "--out")


def command(module: str) -> str:
    """The command line of this process, ``python -m <module> ...``, as results quote it."""
    words, given = [], iter(sys.argv[1:])
    for word in given:
        if word in _PLACES:
            next(given, None)
        elif not word.startswith(tuple(f"{option}=" for option in _PLACES)):
            words.append(word)
    return shlex.join(["python", "-m", module, *words])


def commit() -> str | None:
    """The commit measured, with ``+`` when tracked files differ from it; ``None`` outside of a checkout.

    ``QWEN2VL_COMMIT`` says it where the files came without their history.
    """
    if given := os.environ.get("QWEN2VL_COMMIT"):
        return given

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)

    try:
        head = git("rev-parse", "--short=12", "HEAD")
        if head.returncode:
            return None
        return head.stdout.strip() + ("+" if git("diff", "--quiet", "HEAD").returncode else "")
    except FileNotFoundError:  # no git
        return None
