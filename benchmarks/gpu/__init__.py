"""``python -m benchmarks gpu``: all that a GPU is needed for, within the minutes that one is there.

Phases run in the order of what they tell, each under its own limit and all under one budget. What runs out of its
limit is stopped and keeps the rows that it had; what does not fit is named in the end with the command that runs it.
After every part the logs, the results and a summary are packed anew, so that whatever ends this leaves what it learnt.

``--device cpu`` rehearses the same phases at small sizes: everything here but the GPU is at work then.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from ..environment import ROOT
from .phases import phases
from .session import BUDGET, Phase, Session


def chosen(every: Sequence[Phase], names: Sequence[str] | None) -> list[Phase]:
    """The phases called ``names`` and ``build``, which all need; by default all.

    One without a limit of its own, which is left out by default, runs where it is named. Raises ``ValueError`` for a
    name that is none.
    """
    known = [phase.name for phase in every]
    for name in names or ():
        if name not in known:
            raise ValueError(f"no phase is called {name!r}; there are {', '.join(known)}")
    if not names:
        return list(every)
    return [_whole(phase) for phase in every if phase.name in (*names, "build")]


def _whole(phase: Phase) -> Phase:
    if phase.limit:
        return phase
    return replace(phase, limit=float("inf"), parts=tuple(replace(part, missing=None) for part in phase.parts))


def _command(device: str, budget: float, wheels: Path, names: Sequence[str]) -> str:
    """What runs these phases."""
    words = ["make", "gpu", f'PHASES="{" ".join(names)}"']
    words += ["DEVICE=cpu"] if device == "cpu" else []
    words += [] if budget == BUDGET else [f"BUDGET={budget:g}"]
    if wheels.is_dir():
        place = wheels.resolve()
        words.append(f"WHEELS={shlex.quote(str(place.relative_to(ROOT) if place.is_relative_to(ROOT) else place))}")
    return " ".join(words)


def _card() -> str:
    """Name, driver, clocks and power of the GPU now, as its own tool tells them, or why it does not."""
    fields = "name,driver_version,clocks.sm,clocks.mem,power.draw"
    try:
        told = subprocess.run(
            ["nvidia-smi", f"--query-gpu={fields}", "--format=csv"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi: {error}"
    return "; ".join((told.stdout or told.stderr).strip().splitlines())


def run(
    device: str,
    budget: float,
    out: Path,
    work: Path,
    wheels: Path,
    names: Sequence[str] | None = None,
    say: Callable[[str], None] = print,
) -> Session:
    """Run the phases called ``names``, all by default, on ``device``; returns what became of them.

    Raises ``ValueError`` for a name that is no phase.
    """
    import torch

    from ..case import Context

    # A rehearsal shares its machine: threads of several processes would spin against each other.
    environment = {"OMP_NUM_THREADS": "1"} if device == "cpu" else {}
    session = Session(budget, out, work, say, environment, lambda left: _command(device, budget, wheels, left))
    session.card = "a rehearsal without a GPU" if device == "cpu" else _card()
    say(session.card)
    for folder in ("logs", "results", "site"):  # of an earlier run
        shutil.rmtree(work / folder, ignore_errors=True)
        (work / folder).mkdir(parents=True)
    with Context(torch.device(device)) as context:
        every = phases(device, work, context.checkpoints(), wheels, os.cpu_count() or 1)
        session.run(chosen(every, names))
    return session
