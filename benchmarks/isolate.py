"""A process for every workload: one that crashes or hangs costs itself only.

The processes are forked from one that has imported PyTorch, Triton and the cases' ``imports``, so that none pays for
them, and that has neither touched a GPU nor run a parallel loop, which a fork would not survive. multiprocessing calls
it the fork server. Whatever ends a process, the lines that others wrote stay (``lines``).
"""

from __future__ import annotations

import contextlib
import faulthandler
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
from functools import partial
from itertools import islice, zip_longest
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import Any

import torch

from . import environment, run
from .case import Case, Context
from .lines import Line, append

#: A CPU takes longer: times a case's limit.
_CPU_LIMIT = 60
#: The last lines of what a process said that ended early.
_TAIL = 30
#: Seconds to end after a request, before a process is killed.
_GRACE = 2.0
#: Seconds that one which times waits for the next to stand by.
_SETTLE = 10.0


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
    """A process that brought no line: why, and the end of what it said."""

    reason: str
    stderr: tuple[str, ...]

    def line(self, case: str, workload: str | None) -> Line:
        where = case if workload is None else f"{case}, {workload}"
        message = "\n".join([f"{where}: {self.reason}", *(f"  {text}" for text in self.stderr)])
        told = {"reason": self.reason, "stderr": list(self.stderr), "message": message}
        return {"line": "failed", "kind": "ended", "workload": workload, **told}


class Processes:
    """Runs tasks one after the other, each in a process of its own; closing it ends those at work.

    While one is at work the next is started, finds its device and makes its inputs, which takes a second on a GPU, and
    waits. Nobody times anything before that is done and the one before has left.

    Args:
        imports: modules to import before all else; those that are missing are left out.
    """

    def __init__(self, imports: tuple[str, ...] = ()) -> None:
        self.kind = "forkserver"
        self.next: _Process | None = None
        self.last: _Process | None = None
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__, "triton", *imports])
        with _environment(PYTHONPATH=os.pathsep.join(p for p in sys.path if p), PYTORCH_NVML_BASED_CUDA_CHECK="1"):
            forkserver.ensure_running()  # NVML tells whether there is a GPU, without a context

    def run(self, task: Task, limit: float, following: Task | None = None) -> Line | Ended:
        """The line of ``task``, or how its process ended without one; it has ``limit`` seconds.

        ``following``: the task that comes next, to be given to the next call.
        """
        if self.next is not None and self.next.task is task:
            current, self.next = self.next, None
        else:
            current = _Process(self.kind, task)
        self._leave(self.next)
        self.next = None
        end = time.monotonic() + limit
        try:
            while True:
                word, value = current.hear(end - time.monotonic())
                if word == "ready":
                    current.tell()
                    if following is not None:
                        self.next = _Process(self.kind, following)
                elif word == "quiet":
                    begin = time.monotonic()
                    self._leave(self.last)
                    if self.next is not None:
                        self.next.settle(_SETTLE)
                    end += time.monotonic() - begin
                    current.tell()
                elif word == "no fork":  # CUDA was touched where it must not be
                    self.kind = "spawn"
                    self._leave(current)
                    current = _Process(self.kind, task)
                elif word == "line":
                    return value
                else:
                    if word == "hung":
                        value = f"hung: ended after {limit:g} s"
                        current.end(signal.SIGABRT)  # faulthandler tells where it was
                    return Ended(value, current.said())
        finally:
            self._leave(self.last)
            self.last = current  # it may take its time to give back a GPU

    def close(self) -> None:
        for process in (self.last, self.next):
            self._leave(process)

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _leave(self, process: _Process | None) -> None:
        if process is not None:
            process.end(signal.SIGTERM)


class _Process:
    """A process for one task: it says that it is ready, is told to begin, asks for quiet, and brings its line."""

    def __init__(self, kind: str, task: Task) -> None:
        context: Any = multiprocessing.get_context(kind)
        self.task, self.heard = task, []
        self.log = tempfile.NamedTemporaryFile(prefix="qwen2vl-bench-", suffix=".log")  # noqa: SIM115
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(task, theirs, self.log.name))
        self.process.start()
        theirs.close()

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

    def settle(self, seconds: float) -> None:
        """Wait until it stands by, or is gone."""
        if not self.heard and (message := self.hear(seconds))[0] != "hung":
            self.heard.append(message)

    def tell(self) -> None:
        """Let it go on."""
        with contextlib.suppress(OSError):  # it has ended, which its turn will tell
            self.pipe.send(True)

    def end(self, first: signal.Signals) -> None:
        """End it and those it started, after the seconds that it may take for it."""
        if self.log.closed:
            return
        for number in (first, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, number)
            self.process.join(_GRACE)
        self.process.kill()  # one that had no group yet
        self.text = Path(self.log.name).read_text(encoding="utf-8", errors="replace")
        self.log.close()
        self.pipe.close()

    def said(self) -> tuple[str, ...]:
        """The end of what it printed; ends it."""
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


def _work(task: Task, pipe: Any, log: str) -> None:
    """In the process: get ready, wait for its turn, do the task, and end without tearing anything down."""
    os.setsid()  # what it starts ends with it
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    faulthandler.enable(file=2, all_threads=False)
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def wait(word: str) -> None:
        pipe.send((word, None))
        pipe.recv()

    try:
        if task.context.device.type == "cuda" and torch.cuda._is_in_bad_fork():
            pipe.send(("no fork", None))
        else:
            pipe.send(("line", _do(replace(task, context=replace(task.context, quiet=partial(wait, "quiet"))), wait)))
    except BaseException as error:  # a line for it as well
        traceback.print_exc()
        sys.stderr.flush()
        pipe.send(("failed", f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"))
    sys.stdout.flush()
    os._exit(0)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os.killpg(0, signal.SIGKILL)


def _do(task: Task, wait: Callable[[str], None]) -> Line:
    torch.set_num_threads(task.threads)
    case, context = run.load_case(task.case), task.context
    if context.device.type == "cuda":
        ones = torch.ones(16, 16, device=context.device)
        (ones @ ones).sum().item()  # its context, and the library of products
    try:
        if task.what == "workload":
            workloads = case.workloads(context)  # kept until the end, when it puts right what it changed
            with torch.inference_mode():
                workload = next(islice(workloads, task.index, None))
                wait("ready")
                return run.measured(case, workload, context)
        wait("ready")
        if task.what == "plan":
            return run.plan(case, context, task.command) | {"folder": environment.folder_name(context.device)}
        if task.what == "gate":
            return run.gate(case, context)
        assert task.plan is not None
        context.quiet()
        return run.again(task.plan, context)
    except run.GateError as error:
        return run.red(task.workload, error)


@dataclass(frozen=True)
class Run:
    """A case of which the workloads are known and the first line is written; ``path`` is the file of its lines."""

    processes: Processes
    case: Case
    task: Task
    limit: float
    path: Path
    plan: Line

    def finish(self, log: Callable[[str], None] = lambda text: None) -> None:
        """Measure the case, each step in a process of its own, and append a line after each.

        ``log`` gets a line a provider, and why a process ended early.
        """
        tasks = [replace(self.task, what="gate")] if self.case.gate is not None else []
        for index, name in enumerate(self.plan["workloads"]):
            tasks.append(replace(self.task, what="workload", index=index, workload=name))
        if self.plan["ceilings"]:
            tasks.append(replace(self.task, what="again", plan=self.plan))
        for task, following in zip_longest(tasks, tasks[1:]):
            got = self.processes.run(task, self.limit, following)
            if isinstance(got, Ended) and task.what == "again":
                return  # those of the plan count
            line = got.line(self.case.name, task.workload) if isinstance(got, Ended) else got
            append(line, self.path)
            said = {"failed": lambda line=line: [line["message"]], "workload": lambda line=line: run.brief(line)}
            for text in said.get(line["line"], list)():
                log(text)
            if task.what == "gate" and line["line"] == "failed":
                return


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
