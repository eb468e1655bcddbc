"""How many threads the ``qwen2vl`` command computes with on a CPU, and how they wait.

A small model's operations are shorter than it takes to share them out, and threads of OpenMP that spin while they wait
take the cores away from those that compute, from others' programs, too. So threads are as many as the model has work
for, and sleep. Only the command does so: in a Python program both belong to who wrote it.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..model import Qwen2VL

#: Where a second thread began to pay, on two cores: 4M parameters took 107 ms with one and 228 ms with two (40 tokens,
#: float32), 36M took 734 and 728 ms, 168M 2.03 and 1.49 s.
PARAMETERS_PER_THREAD = 20_000_000

_NUMBERS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_process_is_ours = False


def take_process() -> None:
    """Say that this process is the command's, and that its threads are to sleep while they wait.

    Has no effect where PyTorch is loaded: its threads have read by then how to wait, and somebody else is at work.
    """
    global _process_is_ours
    if "torch" not in sys.modules:
        _process_is_ours = True
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def suitable(parameters: int, most: int) -> int:
    """Threads for a model of so many parameters where there may be ``most``; at least one."""
    return max(1, min(most, parameters // PARAMETERS_PER_THREAD))


def choose(model: Qwen2VL) -> None:
    """Let PyTorch compute with as many threads as suit a model on a CPU, in the command's process and where no variable
    of the environment says how many."""
    if not _process_is_ours or model.device.type != "cpu" or any(os.environ.get(name) for name in _NUMBERS):
        return
    import torch

    from ..quantization import parameter_count

    torch.set_num_threads(suitable(parameter_count(model), torch.get_num_threads()))
