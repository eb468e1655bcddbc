"""Processes that measure: a workload that crashes or hangs costs itself only.

One process does all that there is to do for a case, and another goes on behind what ended it. They are forked from one
that has imported PyTorch, Triton and the cases' ``imports``, so that none pays for them, and that has neither touched a
GPU nor run a parallel loop, which a fork would not survive. multiprocessing calls it the fork server. Whatever ends a
process, the lines that others wrote stay (``lines``); where a peer did, the workload is measured without it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import Any

import torch

from . import environment, run
from .case import Case, Context, Workload
from .lines import Line, append

#: A CPU takes longer: times a case's limit.
_CPU_LIMIT = 60
#: The last lines of what a process said that ended early.
_TAIL = 30
#: Seconds to end after a request, before a process is killed.
_GRACE = 2.0


@dataclass(frozen=True)
class Task:
    """What a process is to do: ``what`` is ``plan``, ``gate``, ``workload`` (that at ``index``) or ``again``."""

    what: str
    case: str
    context: Context
    threads: int
    command: str = ""
    index: int = 0
    workload: str | None = None
    plan: Line | None = None


@dataclass(frozen=True)
class Ended:
    """A process that brought no line: why, the end of what it said, and the peer that was at work."""

    reason: str
    stderr: tuple[str, ...]
    peer: str | None = None

    def line(self, case: str, workload: str | None) -> Line:
        where = case if workload is None else f"{case}, {workload}"
        message = "\n".join([f"{where}: {self.reason}", *(f"  {text}" for text in self.stderr)])
        told = {"reason": self.reason, "stderr": list(self.stderr), "message": message}
        return {"line": "failed", "kind": "ended", "workload": workload, **told}


class Processes:
    """Runs tasks one after the other, those of a case in one process as long as it lives, and never two at a time:
    nobody else uses the device while something is timed. Closing it ends the process.

    Args:
        imports: modules to import before all else; those that are missing are left out.
    """

    def __init__(self, imports: tuple[str, ...] = ()) -> None:
        self.kind = "forkserver"
        self.current: _Process | None = None
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__, "triton", *imports])
        with _environment(PYTHONPATH=os.pathsep.join(p for p in sys.path if p), PYTORCH_NVML_BASED_CUDA_CHECK="1"):
            forkserver.ensure_running()  # NVML tells whether there is a GPU, without a context

    def run(self, task: Task, limit: float) -> Line | Ended:
        """The line of ``task``, or how its process ended without one; it has ``limit`` seconds."""
        end, peer = time.monotonic() + limit, None
        current = self._given(task)
        while True:
            word, value = current.hear(end - time.monotonic())
            if word == "turn":
                peer = value
            elif word == "no fork":  # CUDA was touched where it must not be
                self.kind = "spawn"
                self.close()
                current = self._given(task)
            elif word == "line":
                return value
            elif word == "last line":
                self.close()
                return value
            else:
                if word == "hung":
                    value = f"hung: ended after {limit:g} s"
                    current.end(signal.SIGABRT)  # faulthandler tells where it was
                self.current = None
                return Ended(value, current.said(), peer)

    def close(self) -> None:
        if self.current is not None:
            self.current.end(signal.SIGTERM)
        self.current = None

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _given(self, task: Task) -> _Process:
        """The process that got ``task``: the one at hand, or another where that worked for another case or is gone."""
        if self.current is not None and (self.current.case != task.case or not self.current.process.is_alive()):
            self.close()
        if self.current is None:
            self.current = _Process(self.kind, task.case)
        self.current.give(task)
        return self.current


class _Process:
    """A process for the tasks of a case: it is given one, says which peer's turn it is, and brings the line."""

    def __init__(self, kind: str, case: str) -> None:
        context: Any = multiprocessing.get_context(kind)
        self.case, self.heard, self.before = case, [], 0
        self.log = tempfile.NamedTemporaryFile(prefix="qwen2vl-bench-", suffix=".log")  # noqa: SIM115
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, self.log.name))
        self.process.start()
        theirs.close()

    def give(self, task: Task) -> None:
        self.before = Path(self.log.name).stat().st_size
        with contextlib.suppress(OSError):  # it has ended, which it is heard to have
            self.pipe.send(task)

    def hear(self, seconds: float) -> tuple[str, Any]:
        """What it says within ``seconds``: a word and what belongs to it; ``hung`` where it says nothing, ``ended``
        with the reason where it is gone."""
        if self.heard:
            return self.heard.pop(0)
        if not connection.wait([self.pipe, self.process.sentinel], max(seconds, 0)):
            return "hung", None
        with contextlib.suppress(EOFError, ConnectionError):
            if self.pipe.poll():
                return self.pipe.recv()
        self.process.join(_GRACE)
        return "ended", _status(self.process.exitcode)

    def end(self, first: signal.Signals) -> None:
        """End it and those it started, after the seconds that it may take for it, so that a GPU is free again."""
        if self.log.closed:
            return
        for number in (first, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, number)
            self.process.join(_GRACE)
        self.process.kill()  # one that had no group yet
        with Path(self.log.name).open("rb") as file:
            file.seek(self.before)
            self.text = file.read().decode(errors="replace")
        self.log.close()
        self.pipe.close()

    def said(self) -> tuple[str, ...]:
        """The end of what it printed since it has its task; ends it."""
        self.end(signal.SIGTERM)
        noise = "Extension modules:"  # faulthandler's list of what is imported
        lines = (line.rstrip() for line in self.text.splitlines() if not line.startswith(noise))
        return tuple([line for line in lines if line][-_TAIL:])


def _status(code: int | None) -> str:
    if code is not None and code < 0:
        return f"ended by {signal.Signals(-code).name}"
    return f"ended with status {code} before it was done"


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def _work(pipe: Any, log: str) -> None:
    """In the process: do the tasks that it is given, and end without tearing anything down."""
    os.setsid()  # what it starts ends with it
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    faulthandler.enable(file=2, all_threads=False)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    bench = _Bench(lambda peer: pipe.send(("turn", peer)))
    while True:
        task = pipe.recv()
        try:
            if task.context.device.type == "cuda" and torch.cuda._is_in_bad_fork():
                pipe.send(("no fork", None))
                break
            line = bench.do(task)
            lost = bool(line.get("failures")) or _context_is_lost(task.context.device)
            pipe.send(("last line" if lost else "line", line))
        except BaseException as error:  # a line for it as well
            traceback.print_exc()
            sys.stderr.flush()
            pipe.send(("failed", f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"))
            break
    sys.stdout.flush()
    os._exit(0)


def _context_is_lost(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os.killpg(0, signal.SIGKILL)


class _Bench:
    """In the process: does one task after the other, and keeps the case's generator where they go on with it."""

    def __init__(self, turn: Callable[[str | None], None]) -> None:
        self.turn = turn
        self.workloads: Iterator[Workload] = iter(())
        self.next: int | None = None  # the index of the workload that the generator yields next

    def do(self, task: Task) -> Line:
        with environment.full_float32():
            return self._do(task)

    def _do(self, task: Task) -> Line:
        torch.set_num_threads(task.threads)
        case, context = run.load_case(task.case), replace(task.context, turn=self.turn)
        if context.device.type == "cuda":
            ones = torch.ones(16, 16, device=context.device)
            (ones @ ones).sum().item()  # its context, and the library of products
        try:
            if task.what == "workload":
                return self._measured(task.index, case, context)
            if task.what == "plan":
                return run.plan(case, context, task.command) | {"folder": environment.folder_name(context.device)}
            if task.what == "gate":
                return run.gate(case, context)
            assert task.plan is not None
            return run.again(task.plan, context)
        except run.GateError as error:
            return run.red(task.workload, error)
        finally:
            self._tidy(context.device)

    def _measured(self, index: int, case: Case, context: Context) -> Line:
        if self.next is None or index < self.next:
            self.workloads, self.next = case.workloads(context), 0
        skip, self.next = index - self.next, index + 1
        with torch.inference_mode():
            return run.measured(case, next(islice(self.workloads, skip, None)), context)

    def _tidy(self, device: torch.device) -> None:
        """Leave to the next what this one held: memory, and the compilations that torch.compile counts."""
        gc.collect()
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()
        if device.type == "cuda" and not _context_is_lost(device):
            torch.cuda.empty_cache()


@dataclass(frozen=True)
class Run:
    """A case of which the workloads are known and the first line is written; ``path`` is the file of its lines."""

    processes: Processes
    case: Case
    task: Task
    limit: float
    path: Path
    plan: Line

    def finish(self, log: Callable[[str], None] = lambda text: None, late: bool = False) -> bool:
        """Measure the case but for its late workloads, or with ``late`` those, and append a line after each step;
        whether the case's own gate is green.

        ``log`` gets a line a provider, and why a process ended early. A workload that a peer ended is measured again
        without it.
        """
        tasks = [replace(self.task, what="gate")] if self.case.gate is not None and not late else []
        for index, name in enumerate(self.plan["workloads"]):
            if (name in self.plan["late"]) == late:
                tasks.append(replace(self.task, what="workload", index=index, workload=name))
        if self.plan["ceilings"] and not late:
            tasks.append(replace(self.task, what="again", plan=self.plan))
        for task in tasks:
            got = self.processes.run(task, self.limit)
            while isinstance(got, Ended) and got.peer is not None and got.peer not in task.context.ended:
                log(got.line(self.case.name, f"{task.workload}, {got.peer}")["message"])
                ended = {**task.context.ended, got.peer: got.reason}
                task = replace(task, context=replace(task.context, ended=ended))
                got = self.processes.run(task, self.limit)
            if isinstance(got, Ended) and task.what == "again":
                break  # those of the plan count
            line = got.line(self.case.name, task.workload) if isinstance(got, Ended) else got
            append(line, self.path)
            said = {"failed": lambda line=line: [line["message"]], "workload": lambda line=line: run.brief(line)}
            for text in said.get(line["line"], list)():
                log(text)
            if task.what == "gate" and line["line"] == "failed":
                return False
        return True


def begin(
    processes: Processes, name: str, context: Context, out: Path | None, command: str = "", limit: float | None = None
) -> Run:
    """Ask for the workloads of the case called ``name``, and write that as the first line of ``out/<case>.jsonl``.

    Args:
        out: default the folder of this device's results.
        limit: seconds for a gate or a workload, instead of the case's own.

    Raises ``RuntimeError`` where that process ends early.
    """
    case = run.load_case(name)
    limit = limit or case.limit_s * (1 if context.device.type == "cuda" else _CPU_LIMIT)
    context.checkpoints()  # the same for all, and removed by this process
    task = Task("plan", name, context.elsewhere(), torch.get_num_threads(), command)
    plan = processes.run(task, limit)
    if isinstance(plan, Ended):
        raise RuntimeError(plan.line(case.name, "naming the workloads")["message"])
    device = plan.pop("folder")
    path = (run.RESULTS / device if out is None else out) / f"{case.name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    append(plan, path)
    return Run(processes, case, task, limit, path, plan)


@contextlib.contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """SIGTERM ends what is inside as ``sys.exit`` does, so that what was measured is still put away."""

    def stop(number: int, frame: object) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
