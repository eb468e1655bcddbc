"""The search, subject by subject: candidates are compiled by all cores, then run, compared and timed by one process.

Nothing is compiled while something is timed. A group is decided anew after each of its shapes, so that a search that
ends early leaves whole verdicts on the first ones.
"""

from __future__ import annotations

import itertools
import json
import math
import queue
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from qwen2vl_kernels.core import launching

from .processes import Died, Worker
from .subject import DTYPES, Fields, Subject, configured
from .subjects import REHEARSED, subjects
from .verdict import Trial, by_group, finalists, literal, ranking, whole

#: Share of the time that is left when a subject begins that compiling may take: what is compiled by then is timed.
_COMPILE_SHARE = 0.7
#: What the first pass leaves of the limit to the comparison in the end: a share, and at most some seconds.
_FINALS_SHARE, _FINALS_SECONDS = 0.15, 10.0
#: Seconds that one candidate may take: a compilation; a run with its comparison, a subject's first one and later ones.
_COMPILE_LIMIT, _START_LIMIT, _RUN_LIMIT = 120.0, 90.0, 20.0
#: Samples of a candidate, and of those that are compared in the end.
_SAMPLES, _FINAL_SAMPLES = 5, 15


def candidates(subject: Subject, target: launching.Target, dtype: torch.dtype) -> tuple[Any, list[Fields]]:
    """The configuration that ships, and the fields of all to try, its own first.

    Left out are tiles of fewer than 16 rows a warp where there are matrix products, which warps would then share. The
    first field of a grid is the height of the tile that a program owns.
    """
    with launching.record(target), torch.no_grad(), configured(subject, None) as seen:
        subject.make(torch.device("meta"), dtype).run()
    shipped = seen[0]
    own = {name: getattr(shipped, name) for name in subject.grid}
    tried = [dict(zip(subject.grid, values, strict=True)) for values in itertools.product(*subject.grid.values())]
    tried = [fields for fields in tried if subject.tried is None or fields in subject.tried]
    if hasattr(shipped, "num_stages"):
        height = next(iter(subject.grid))
        tried = [fields for fields in tried if fields[height] >= 16 * fields["num_warps"]]
    return shipped, [own, *(fields for fields in tried if fields != own)]


class Rows:
    """A file with a line of JSON a row, written as they come; ``None`` keeps none."""

    def __init__(self, path: Path | None) -> None:
        self._file = None
        self._lock = threading.Lock()
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("w", encoding="utf-8")

    def add(self, row: dict[str, Any]) -> None:
        if self._file is not None:
            with self._lock:
                self._file.write(json.dumps(row) + "\n")
                self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


@dataclass
class Search:
    """One search on one device.

    Attributes:
        device: "cuda", or "cpu" for a rehearsal, where Triton interprets and kernels are compiled for capability 9.0.
        target: what configurations are chosen for.
        quick: tiny shapes and few candidates.
        limit: seconds for all of it, or ``None``.
        jobs: processes that compile.
        cubins: a folder of kernels in CUDA C++ that are not linked.
        rows: where rows go as they are measured.
        log: gets a line a subject.
        worker: the module that compiles and times.
    """

    device: torch.device
    target: launching.Target
    quick: bool = False
    limit: float | None = None
    jobs: int = 1
    cubins: Path | None = None
    rows: Rows = field(default_factory=lambda: Rows(None))
    log: Callable[[str], None] = lambda line: None
    worker: str = "benchmarks.tune.worker"

    def __post_init__(self) -> None:
        self._begin = time.monotonic()
        self._end = math.inf if self.limit is None else self._begin + self.limit
        self._kept = 0.0 if self.limit is None else min(_FINALS_SECONDS, _FINALS_SHARE * self.limit)
        self.dtype = DTYPES[self.device.type]
        self._compiled: dict[tuple[str, str], dict[str, Any]] = {}

    def run(self, names: Sequence[str] = (), done: Callable[[list[Trial]], None] = lambda trials: None) -> list[Trial]:
        """Compile and time every subject whose name holds one of ``names``, by default all, or a few with ``quick``.

        ``done`` gets all trials after each subject. Raises ``ValueError`` as :meth:`trials`.
        """
        trials = self.trials(names)
        interpret = {"TRITON_INTERPRET": "1" if self.device.type == "cpu" else None}
        with ExitStack() as stack:
            command = (self.worker, "time", str(self.device), self._size, *self._cubins)
            worker = stack.enter_context(Worker(command, interpret))
            worker.start()
            compilers = self._compilers(stack)
            for trial in trials:
                if self._left() <= self._kept:
                    break
                self._compile([trial], compilers, time.monotonic() + _COMPILE_SHARE * (self._left() - self._kept))
                self._time(trial, worker)
                self._compare(by_group(trials)[trial.subject.group], worker)
                done(trials)
        return trials

    def trials(self, names: Sequence[str] = ()) -> list[Trial]:
        """Trials of subjects whose name holds one of ``names``, none measured yet. Raises ``ValueError`` for none."""
        names = names or (REHEARSED if self.quick else ())
        known = [s for s in subjects(self.quick) if s.capability in (None, self.target.capability)]
        chosen = [s for s in known if not names or any(name in s.name for name in names)]
        if not chosen:
            raise ValueError(f"no subject's name has one of {', '.join(names)} in it")
        groups = [s.group for s in known]
        return [Trial(s, *candidates(s, self.target, self.dtype), groups.count(s.group)) for s in chosen]

    def compile(self, trials: Iterable[Trial]) -> None:
        """Compile the candidates of all and time none."""
        with ExitStack() as stack:
            self._compile(trials, self._compilers(stack), self._end)

    def _compilers(self, stack: ExitStack) -> list[Worker]:
        """They wait while something is timed, as starting one takes longer than most compilations."""
        where = f"{self.target.backend}:{self.target.capability}:{str(self.dtype).removeprefix('torch.')}"
        command = (self.worker, "compile", where, self._size, *self._cubins)
        return [stack.enter_context(Worker(command, {"TRITON_INTERPRET": None})) for _ in range(self.jobs)]

    def _compile(self, trials: Iterable[Trial], compilers: Sequence[Worker], until: float) -> None:
        """Find out what becomes of every candidate that was not compiled yet, until a point of the monotonic clock."""
        tasks: queue.SimpleQueue[tuple[tuple[str, str], dict[str, Any]]] = queue.SimpleQueue()
        new: set[tuple[str, str]] = set()
        for trial in trials:
            for fields in trial.candidates:
                key = (trial.subject.compiled_as, str(fields))
                if key not in self._compiled and key not in new:
                    new.add(key)
                    tasks.put((key, {"subject": trial.subject.name, "fields": fields}))
        if not new:
            return
        begin = time.monotonic()

        def work(compiler: Worker) -> None:
            while time.monotonic() < until:
                try:
                    key, request = tasks.get_nowait()
                except queue.Empty:
                    return
                try:
                    reply = compiler.ask(request, min(_COMPILE_LIMIT, max(0.1, until - time.monotonic())))
                except Died as death:
                    if time.monotonic() >= until:
                        return
                    reply = {"failed": "does not compile", "why": str(death)}
                self._compiled[key] = reply

        threads = [threading.Thread(target=work, args=(one,)) for one in compilers[: len(new)]]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        replies = [self._compiled[key] for key in new if key in self._compiled]
        failed = sum("failed" in reply for reply in replies)
        took = time.monotonic() - begin
        self.log(f"compiled {len(replies) - failed} of {len(new)} candidates in {took:.0f} s, {failed} fail")

    @property
    def _size(self) -> str:
        return "quick" if self.quick else "whole"

    @property
    def _cubins(self) -> tuple[str, ...]:
        return () if self.cubins is None else (str(self.cubins),)

    def _left(self) -> float:
        """Seconds of the limit."""
        return self._end - time.monotonic()

    def _time(self, trial: Trial, worker: Worker) -> None:
        """The first pass: every candidate once, and what ships once more, as a machine may slow down meanwhile."""
        subject, beat = trial.subject, None
        for fields in trial.candidates:
            if self._left() <= self._kept:
                break
            reply = self._compiled.get((subject.compiled_as, str(fields)))
            if reply is None:
                continue  # the limit came before it
            if "failed" not in reply:
                limit = _RUN_LIMIT if worker.running and trial.rows else _START_LIMIT
                reply = self._ask(worker, self._sample(trial, fields, beat), limit)
                if reply.get("failed") == "hangs" and self._left() <= 0:
                    break  # it was the whole limit that ended it
            row = {"subject": subject.name, "group": subject.group, "shape": subject.shape, "fields": fields,
                   "literal": literal(type(trial.shipped)(**{**asdict(trial.shipped), **fields})), **reply}  # fmt: skip
            if "samples" in row:
                row["median"] = statistics.median(row["samples"])
                beat = min(beat or row["median"], row["median"])
            trial.rows.append(row)
            self.rows.add(row)
        if trial.left:
            looked = f"{len(trial.rows)} of {len(trial.candidates)}"
            self.log(f"{subject.name}: the limit came after {looked} candidates: no verdict")
        elif trial.ships in trial.medians:
            trial.again = self._ask(worker, self._sample(trial, trial.candidates[0], None), _RUN_LIMIT).get(
                "samples", []
            )
            self.rows.add({"subject": subject.name, "again": trial.ships, "samples": trial.again})

    @staticmethod
    def _sample(trial: Trial, fields: Fields, beat: float | None) -> dict[str, Any]:
        return {"subject": trial.subject.name, "fields": fields, "beat": beat, "samples": _SAMPLES}

    def _compare(self, members: Sequence[Trial], worker: Worker) -> None:
        """The best of a group by its whole shapes, and what ships, in turn at every one, where they were not yet."""
        ready = whole(members)
        ranked = ranking(ready)[1] if ready else []
        for trial in ready:
            wanted = finalists(trial, ranked)
            if set(wanted) <= set(trial.finals) or self._left() <= 0:
                continue
            fields = {row["literal"]: row["fields"] for row in trial.rows}
            request = {"subject": trial.subject.name, "finalists": [fields[text] for text in wanted],
                       "samples": 3 if self.quick else _FINAL_SAMPLES}  # fmt: skip
            reply = self._ask(worker, request, _START_LIMIT)
            if "failed" in reply:
                trial.broken = f"those compared in the end: {reply['failed']}: {reply['why']}"
                self.log(f"{trial.subject.name}: {trial.broken}")
                continue
            trial.finals = dict(zip(wanted, reply["samples"], strict=True))
            for name, samples in trial.finals.items():
                self.rows.add({"subject": trial.subject.name, "final": name, "samples": samples})
            best = min(trial.finals, key=lambda name: statistics.median(trial.finals[name]))
            self.log(f"{trial.subject.name}: {1e6 * statistics.median(trial.finals[best]):.1f} us with {best}")

    def _ask(self, worker: Worker, request: dict[str, Any], limit: float) -> dict[str, Any]:
        """The reply; a process that dies or hangs costs its candidate, and the next one gets another process."""
        try:
            return worker.ask(request, min(limit, 5 + max(0.0, self._left())))
        except Died as death:
            return {"failed": "hangs" if "killed after" in str(death) else "dies", "why": str(death)}
