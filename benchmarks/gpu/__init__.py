"""``python -m benchmarks gpu``: all that a GPU is needed for, within the minutes that one is there.

Phases run in the order of what they tell, each under its own limit and all under one budget. What runs out of its
limit is stopped and keeps the rows that it had; what does not fit is named in the end with the command that runs it.
After every part the logs, the results and a summary are packed anew, so that whatever ends this leaves what it learnt.

``--device cpu`` rehearses the same phases at small sizes: everything here but the GPU is at work then.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from .phases import phases
from .session import Phase, Session


def chosen(every: Sequence[Phase], names: Sequence[str] | None) -> list[Phase]:
    """The phases called ``names``, all by default. Raises ``ValueError`` for a name that is none."""
    known = [phase.name for phase in every]
    for name in names or ():
        if name not in known:
            raise ValueError(f"no phase is called {name!r}; there are {', '.join(known)}")
    return [phase for phase in every if not names or phase.name in names]


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
    session = Session(budget, out, work, say, {"OMP_NUM_THREADS": "1"} if device == "cpu" else {})
    for folder in ("logs", "results", "site"):  # of an earlier run
        shutil.rmtree(work / folder, ignore_errors=True)
        (work / folder).mkdir(parents=True)
    with Context(torch.device(device)) as context:
        every = phases(device, work, context.checkpoints(), wheels, os.cpu_count() or 1)
        session.run(chosen(every, names))
    return session
