"""Compile what real calls launch into Triton's cache, on all cores: no test and no measurement waits for it then."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence

import torch

from qwen2vl_kernels.core import launching

from .. import aot
from ..aot.compiler import TARGETS
from ..tune.worker import stand_in

_target: launching.Target


def warm(names: Sequence[str] | None, target: launching.Target, jobs: int) -> tuple[int, list[str]]:
    """Compile the calls of groups of :mod:`benchmarks.aot`, by default of all, for ``target`` in ``jobs`` processes.

    Returns how many launches are ready, and what went wrong. Raises ``ValueError`` for a name that is no group.
    """
    known = aot.groups()
    aot.check_names("group", names, known)
    work = [(group, place) for group in names or known for place in range(len(known[group]))]
    ready, failed = 0, []
    # Fresh processes: threads of PyTorch and LLVM that run here do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with context.Pool(min(jobs, len(work)), initializer=_begin, initargs=(target,)) as pool:
        for launches, error in pool.imap_unordered(_compile, work, chunksize=1):
            ready += launches
            failed += [] if error is None else [error]
    return ready, failed


def named(name: str) -> launching.Target:
    """The target of that name, or with an empty one that of this machine's GPU.

    Raises ``ValueError`` for a name that is none, and where there is no GPU.
    """
    if name:
        aot.check_names("target", [name], TARGETS)
        return TARGETS[name][0]
    if not torch.cuda.is_available():
        raise ValueError("PyTorch sees no CUDA device: name a target")
    return launching.target_of(torch.device("cuda", 0))


def _begin(target: launching.Target) -> None:
    global _target
    _target = target
    stand_in(target)


def _compile(work: tuple[str, int]) -> tuple[int, str | None]:
    group, place = work
    specimen = aot.groups()[group][place]
    try:
        with launching.record(_target) as launches, torch.no_grad():
            specimen.run()
        for launch in launches:
            launch.kernel.warmup(grid=launch.grid, **launch.arguments, **launch.options)
    except Exception as error:  # Triton has an exception of its own for every stage
        return 0, f"{specimen.name}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return len(launches), None
