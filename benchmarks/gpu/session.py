"""Phases under one budget: parts that are started, stopped and noted, and what they leave, packed after each."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .. import lines
from ..environment import ROOT, slug

#: Seconds that a process may take to end after it was asked to, then it is killed.
_GRACE = 6.0
#: A part with less than this before it is not started.
_LEAST = 8.0
#: Seconds that a GPU is there for, some to spare.
BUDGET = 480.0
#: A word of a command that stands for the whole seconds it has, but for those that it takes to end.
SECONDS = "{seconds}"
_TO_END = 4
#: Bytes of each log that are packed, its end.
_LOG_BYTES = 2 << 20


@dataclass(frozen=True)
class Part:
    """A command of a phase.

    Attributes:
        command: :data:`SECONDS` in it stands for the seconds that it has, when it starts.
        cases: those of the benchmark it runs, of which the unfinished ones are named.
        tests: the file of pytest's ``--test-lines``, which tells what did not run.
        measures: being stopped is no failure, as what it had measured is kept.
        peers: whether it sees what the peers' wheels hold.
        missing: why it cannot run here; a command given all the same is named in the end.
    """

    name: str
    command: tuple[str, ...] = ()
    cases: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    tests: Path | None = None
    measures: bool = False
    peers: bool = True
    missing: str | None = None


@dataclass(frozen=True)
class Phase:
    """Parts that share ``limit`` seconds, one after the other or all at once.

    Of a budget of :data:`BUDGET` seconds those before it leave it at least ``floor``, of a smaller one as much less.
    """

    name: str
    limit: float
    parts: tuple[Part, ...]
    together: bool = False
    floor: float = 0.0


@dataclass
class Outcome:
    """What became of a part. ``state``: ``done``, ``failed``, ``stopped``, ``did not fit`` or ``cannot run``."""

    phase: str
    part: str
    state: str
    seconds: float
    last: str
    command: str
    rest: str | None = None  # what is left, in words

    def text(self) -> str:
        return f"{self.phase}, {self.part}: {self.state} after {self.seconds:.0f} s: {self.last}"


class Session:
    """Runs phases within ``budget`` seconds and keeps what they bring.

    Args:
        out: gets ``logs.tgz``, ``summary.txt`` and ``summary.json``, and nothing else.
        work: logs and results as they grow.
        say: prints a line.
        environment: of all parts, beside this process's.
        again: the command that runs phases of these names.
    """

    def __init__(
        self,
        budget: float,
        out: Path,
        work: Path,
        say: Callable[[str], None],
        environment: Mapping[str, str],
        again: Callable[[Sequence[str]], str] = lambda names: f'make gpu PHASES="{" ".join(names)}"',
    ) -> None:
        self.budget, self.out, self.work, self.say, self.again = budget, out, work, say, again
        self.card = ""
        self.begin = time.monotonic()
        self.outcomes: list[Outcome] = []
        self.started: list[_Running] = []
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.without_peers = {"PYTHONPATH": os.pathsep.join(paths)}
        self.environment: dict[str, str] = {
            **os.environ,
            "PATH": f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin",
            "PYTHONPATH": os.pathsep.join([str(work / "site"), *paths]),
            "PYTHONUNBUFFERED": "1",
            "HF_HUB_OFFLINE": "1",
            **environment,
        }
        self.environment.pop("TRITON_INTERPRET", None)  # what rehearses a kernel sets it for itself
        for folder in (out, work / "logs", work / "results"):
            folder.mkdir(parents=True, exist_ok=True)

    @property
    def left(self) -> float:
        return self.budget - (time.monotonic() - self.begin)

    def run(self, phases: Sequence[Phase]) -> None:
        """Run all phases; being ended by a signal or an exception still leaves a summary of what was done."""
        try:
            for place, phase in enumerate(phases):
                floors = sum(later.floor for later in phases[place + 1 :])
                self._phase(phase, floors * min(1.0, self.budget / BUDGET))
        finally:
            at_work = {running.part.name: running for running in self.started}
            for running in self.started:
                running.stop()
                running.close()
            noted = {(outcome.phase, outcome.part) for outcome in self.outcomes}
            for phase in phases:  # what a signal left
                for part in phase.parts:
                    if (phase.name, part.name) in noted:
                        continue
                    if (running := at_work.get(part.name)) is not None:
                        self._note(phase, part, "stopped", running.seconds, running.last())
                    else:
                        self._note(phase, part, "did not fit", 0.0, "the run was ended before it")
            self._keep()

    def failed(self) -> bool:
        return any(outcome.state == "failed" for outcome in self.outcomes)

    def _phase(self, phase: Phase, reserve: float) -> None:
        end = time.monotonic() + min(phase.limit, self.left - reserve)
        waiting: list[_Running] = []
        for part in phase.parts:
            if part.missing is not None:
                self._note(phase, part, "cannot run", 0.0, part.missing)
            elif end - time.monotonic() < _LEAST and not (phase.together and waiting):
                self._note(phase, part, "did not fit", 0.0, f"{max(end - time.monotonic(), 0):.0f} s were left")
            else:
                environment = {**self.environment, **({} if part.peers else self.without_peers)}
                try:
                    running = _Running(part, self.work / "logs" / f"{slug(part.name)}.log", environment, end)
                except OSError as error:
                    self._note(phase, part, "failed", 0.0, f"it does not start: {error}")
                    continue
                self.started.append(running)
                waiting.append(running)
                if not phase.together:
                    self._finish(phase, waiting, end)
        self._finish(phase, waiting, end)

    def _finish(self, phase: Phase, waiting: list[_Running], end: float) -> None:
        """Note each as it ends, and stop those that are still running at ``end``."""
        while waiting:
            late = time.monotonic() >= end
            for running in list(waiting):
                if late:
                    running.stop()
                if (status := running.process.poll()) is None:
                    continue
                waiting.remove(running)
                self.started.remove(running)
                running.close()
                state = "done" if status == 0 else "failed"
                if late and running.stopped:
                    state = "stopped" if running.part.measures else "failed"
                self._note(phase, running.part, state, running.seconds, running.last())
            time.sleep(0.05)

    def _note(self, phase: Phase, part: Part, state: str, seconds: float, last: str) -> None:
        rest = None
        if part.tests is not None and state in ("done", "failed", "stopped"):
            last, rest = _of_tests(part.tests, last)
        elif state in ("stopped", "did not fit") or (state == "cannot run" and part.command):
            left = [name for name in part.cases if state == "cannot run" or not self._complete(name)]
            rest = ", ".join(left) if left else None if part.cases else "all of it"
        command = _shown(part.command, part.environment)
        self.outcomes.append(Outcome(phase.name, part.name, state, round(seconds, 1), last, command, rest))
        self.say(f"[{time.monotonic() - self.begin:.0f} s] {self.outcomes[-1].text()}")
        self._keep()

    def _complete(self, case: str) -> bool:
        """Whether the lines of ``case`` lack nothing; also makes its results file of what they hold."""
        path = self.work / "results" / f"{case}.jsonl"
        if not path.is_file():
            return False
        try:
            result = lines.assemble(lines.read(path))
            if result["rows"]:
                lines.write(result, path.parent)
            return not result["missing"]
        except Exception as error:  # whatever the file holds, the phases behind it go on
            self.say(f"{path.name} makes no results: {type(error).__name__}: {error}")
        return False

    def summary(self) -> list[str]:
        """What the device is, a line for every part, what did not fit, and the command that runs it."""
        text = [*([self.card] if self.card else []), *(outcome.text() for outcome in self.outcomes)]
        rest = [outcome for outcome in self.outcomes if outcome.rest is not None]
        if rest:
            text += ["", f"Left out, or did not fit into {self.budget:.0f} s:"]
            text += [f"  {outcome.phase}, {outcome.part}: {outcome.rest}" for outcome in rest]
            text += ["To run those phases:", f"  {self.again(list(dict.fromkeys(o.phase for o in rest)))}"]
        return text

    def _keep(self) -> None:
        """Pack logs and results, and write the summary; each file is replaced in whole."""
        text = "\n".join(self.summary()) + "\n"
        _replace(self.out / "summary.txt", text.encode())
        told = {"budget_s": self.budget, "parts": [vars(outcome) for outcome in self.outcomes]}
        _replace(self.out / "summary.json", (json.dumps(told, indent=1) + "\n").encode())
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w:gz", compresslevel=6) as archive:
            for path in sorted([*self.work.glob("logs/*"), *self.work.glob("results/*")]):
                if path.is_file():
                    content = path.read_bytes()
                    if path.suffix == ".log":
                        content = content[-_LOG_BYTES:]
                    entry = tarfile.TarInfo(str(path.relative_to(self.work)))
                    entry.size, entry.mtime = len(content), int(path.stat().st_mtime)
                    archive.addfile(entry, io.BytesIO(content))
        _replace(self.out / "logs.tgz", packed.getvalue())


@contextlib.contextmanager
def _heeding_interrupts() -> Iterator[None]:
    """What is started inside heeds SIGINT. A shell's background jobs ignore it, and so would all that they start."""
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    if ignored and threading.current_thread() is threading.main_thread():  # no other may set it
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
    else:
        yield


class _Running:
    """A part at work, in a session of its own, so that all it started ends with it."""

    def __init__(self, part: Part, log: Path, environment: Mapping[str, str], end: float) -> None:
        self.part, self.path, self.stopped = part, log, False
        seconds = str(max(int(end - time.monotonic()) - _TO_END, 1))
        self.begin = time.monotonic()
        with log.open("wb") as file, _heeding_interrupts():
            self.process = subprocess.Popen(
                [seconds if word == SECONDS else word for word in part.command],
                cwd=ROOT,
                env={**environment, **part.environment},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.begin

    def stop(self) -> None:
        """Ask it to end, and kill it where it does not. Of tests the first process is asked alone, to tell failures."""
        self.stopped = self.stopped or self.process.poll() is None
        if self.part.tests is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(_GRACE)
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(_GRACE)

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)  # what it left behind

    def last(self) -> str:
        """The last line that it printed."""
        text = self.path.read_bytes()[-4000:].decode(errors="replace").strip().splitlines()
        return text[-1].strip()[:200] if text else "it said nothing"


def _of_tests(path: Path, last: str) -> tuple[str, str | None]:
    """What became of the tests whose lines are in ``path``, and what did not run; ``last`` where there are none."""
    try:
        found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    except (OSError, ValueError):
        return last, None
    ran = {line["test"]: line["outcome"] for line in found if "test" in line}
    for line in found:
        if line.get("outcome") == "failed":
            ran[line["test"]] = "failed"
    left = [test for line in found for test in line.get("collected", ()) if test not in ran]
    counts = Counter(ran.values())
    told = ", ".join(f"{counts[outcome]} {outcome}" for outcome in ("failed", "passed", "skipped") if counts[outcome])
    if not left:
        return f"{told or 'no test'}", None
    by_file = Counter(test.partition("::")[0] for test in left)
    files = ", ".join(f"{count} of {file}" for file, count in by_file.items())
    return f"{told or 'no test ran'}, {len(left)} did not run", f"{len(left)} tests: {files}"


def _shown(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """A command as one types it; checkpoints of this run are gone by then."""
    given = iter(command)
    words = []
    for word in given:
        if word == "--checkpoint-dir":
            next(given)
        elif word == SECONDS:
            words.pop()  # its option
        else:
            words.append("python" if word == sys.executable else word)
    return " ".join([*(f"{name}={shlex.quote(value)}" for name, value in environment.items()), shlex.join(words)])


def _replace(path: Path, content: bytes) -> None:
    scratch = path.with_name(f".{path.name}")
    scratch.write_bytes(content)
    scratch.replace(path)
