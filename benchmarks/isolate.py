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
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
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
    """Runs tasks one after the other, each in a process of its own; leaving it ends the one at work.

    Args:
        imports: modules to import before all else; those that are missing are left out.
    """

    def __init__(self, imports: tuple[str, ...] = ()) -> None:
        self.kind = "forkserver"
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__, "triton", *imports])
        with _environment(PYTHONPATH=os.pathsep.join(p for p in sys.path if p), PYTORCH_NVML_BASED_CUDA_CHECK="1"):
            forkserver.ensure_running()  # NVML tells whether there is a GPU, without a context

    def run(self, task: Task, limit: float) -> Line | Ended:
        """The line of ``task``, or how its process ended without one; it has ``limit`` seconds."""
        with tempfile.NamedTemporaryFile(prefix="qwen2vl-bench-", suffix=".log") as log:
            got = self._run(task, limit, log.name)
            if isinstance(got, _NoFork):
                self.kind = "spawn"
                got = self._run(task, limit, log.name)
            if isinstance(got, dict):
                return got
            text = Path(log.name).read_text(encoding="utf-8", errors="replace")
        noise = "Extension modules:"  # faulthandler's list of what is imported
        lines = [line.rstrip() for line in text.splitlines() if line.strip() and not line.startswith(noise)]
        return Ended(str(got), tuple(lines[-_TAIL:]))

    def _run(self, task: Task, limit: float, log: str) -> Line | _NoFork | str:
        context: Any = multiprocessing.get_context(self.kind)
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(task, sender, log))
        process.start()
        sender.close()
        try:
            if not connection.wait([receiver, process.sentinel], limit):
                _end(process, signal.SIGABRT)  # faulthandler tells where it was
                return f"hung: ended after {limit:g} s"
            with contextlib.suppress(EOFError):
                if receiver.poll():
                    return receiver.recv()
            process.join(_GRACE)
            return _status(process.exitcode)
        finally:
            _end(process, signal.SIGTERM)
            receiver.close()


class _NoFork:
    """CUDA was touched where it must not be: this process cannot use it."""


def _end(process: Any, first: signal.Signals) -> None:
    """End a process and those it started, after the seconds that it may take for it."""
    for number in (first, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        process.join(_GRACE)
    process.kill()  # one that had no group yet


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


def _work(task: Task, sender: Any, log: str) -> None:
    """In the process: do the task, send its line, and end without tearing anything down."""
    os.setsid()  # what it starts ends with it
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    faulthandler.enable(file=2, all_threads=False)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        if task.context.device.type == "cuda" and torch.cuda._is_in_bad_fork():
            sender.send(_NoFork())
        else:
            sender.send(_do(task))
    except BaseException as error:  # a line for it as well
        traceback.print_exc()
        sys.stderr.flush()
        sender.send(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
    sys.stdout.flush()
    os._exit(0)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os.killpg(0, signal.SIGKILL)


def _do(task: Task) -> Line:
    torch.set_num_threads(task.threads)
    case = run.load_case(task.case)
    try:
        if task.what == "plan":
            return run.plan(case, task.context, task.command) | {"folder": environment.folder_name(task.context.device)}
        if task.what == "gate":
            return run.gate(case, task.context)
        if task.what == "workload":
            return run.nth(case, task.index, task.context)
        assert task.plan is not None
        return run.again(task.plan, task.context)
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
        if self.case.gate is not None and self._step(replace(self.task, what="gate"), log)["line"] == "failed":
            return
        for index, name in enumerate(self.plan["workloads"]):
            self._step(replace(self.task, what="workload", index=index, workload=name), log)
        if self.plan["ceilings"]:
            got = self.processes.run(replace(self.task, what="again", plan=self.plan), self.limit)
            if not isinstance(got, Ended):
                append(got, self.path)

    def _step(self, task: Task, log: Callable[[str], None]) -> Line:
        got = self.processes.run(task, self.limit)
        line = got.line(self.case.name, task.workload) if isinstance(got, Ended) else got
        append(line, self.path)
        said = {"failed": lambda: [line["message"]], "workload": lambda: run.brief(line)}
        for text in said.get(line["line"], list)():
            log(text)
        return line


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
