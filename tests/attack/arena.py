"""The process that cases run in, told off by the clock and by its memory, and the count of what became of them."""

from __future__ import annotations

import logging
import multiprocessing
import resource
import time
from collections import Counter
from pathlib import Path

OUTCOMES = ("ok", "typed", "untyped", "crash", "hang", "memory")
BAD = OUTCOMES[2:]
SECONDS = 20.0  # of one case
CHARACTERS = 4_000  # of an error's message
BYTES = 512 << 20  # that one case may add to the process's memory
_ROOM = 4 << 30  # of addresses, behind which an allocation fails instead of taking the machine's memory
#: How often a kind has its turn; a clip is decoded in a process that has to start.
TURNS = ("picture", "message", "archive") * 5 + ("clip",)


def _status(name: str) -> int:
    """Bytes of VmRSS, VmHWM (its peak) or VmSize, by Linux; 0 elsewhere."""
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(name)), 0)


def _worker(connection) -> None:
    """Answers (kind, seed, number) with (outcome, words) until nothing comes."""
    from qwen2vl.errors import Qwen2VLError
    from tests.attack import cases

    logging.disable()
    peak = Path("/proc/self/clear_refs")
    cases.processor()
    if size := _status("VmSize"):
        resource.setrlimit(resource.RLIMIT_AS, (size + _ROOM, resource.RLIM_INFINITY))
    connection.send(("ready", ""))
    while (asked := connection.recv()) is not None:
        if peak.exists():
            peak.write_text("5")  # the peak begins anew
        before = _status("VmRSS")
        try:
            cases.run(*asked)
            outcome, words = "ok", ""
        except Qwen2VLError as error:
            outcome, words = "typed", str(error)
            if len(words) > CHARACTERS:
                outcome, words = "untyped", f"a message of {len(words)} characters"
        except MemoryError as error:
            outcome, words = "memory", repr(error)
        except BaseException as error:
            outcome, words = "untyped", f"{type(error).__name__}: {error}"
        if (grown := _status("VmHWM") - before) > BYTES:
            outcome, words = "memory", f"{grown >> 20} MiB"
        connection.send((outcome, words[:300]))


class Arena:
    """The process that cases run in, a new one after each that ended or hung."""

    def __init__(self) -> None:
        self._process = None
        self._connection = None

    def run(self, kind: str, seed: int, number: int, seconds: float = SECONDS) -> tuple[str, str]:
        """The outcome of a case, and the words of its error."""
        if self._process is None:
            self._start()
        self._connection.send((kind, seed, number))
        try:
            if self._connection.poll(seconds):
                return self._connection.recv()
            outcome = "hang", f"more than {seconds:g} s"
        except (EOFError, ConnectionError):
            self._process.join()
            outcome = "crash", f"exit status {self._process.exitcode}"
        self.close()
        return outcome

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_worker, args=(theirs,))
        self._process.start()
        theirs.close()
        self._connection.recv()

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._connection.close()
            self._process = None


def attack(
    seed: int, *, cases: int | None = None, seconds: float = float("inf"), first: int = 0
) -> tuple[Counter, list[str]]:
    """How many cases had each (kind, outcome), and a line for each that is bad."""
    found, lines, arena = Counter(), [], Arena()
    end = time.monotonic() + seconds
    number = 0
    try:
        while (cases is None or number < cases) and time.monotonic() < end:
            kind = TURNS[number % len(TURNS)]
            outcome, words = arena.run(kind, seed, number)
            found[kind, outcome] += 1
            if outcome in BAD:
                lines.append(f"{outcome}: --seed {seed} --case {number} ({kind}): {words}")
            number += 1
    finally:
        arena.close()
    return found, lines
