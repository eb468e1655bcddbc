"""The search: candidates are compiled by all cores, then run, compared and timed by one process."""

from __future__ import annotations

import itertools
import json
import queue
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from qwen2vl_kernels import _triton

from .processes import Died, Worker
from .subjects import DTYPES, REHEARSED, Subject, configured, subjects

#: Of the whole limit, what compiling may take: what is compiled by then is timed.
_COMPILE_SHARE = 0.4
#: Seconds that one candidate may take: a compilation; a run with its comparison, a subject's first one and later ones.
_COMPILE_LIMIT, _START_LIMIT, _RUN_LIMIT = 120.0, 90.0, 20.0
#: Of a candidate, and of those that are compared in the end.
_SAMPLES, _FINAL_SAMPLES, _FINALISTS = 5, 15, 3

Fields = dict[str, int]


@dataclass
class Trial:
    """What became of a subject: every candidate's row, and the finalists' samples by their literal text."""

    subject: Subject
    shipped: Any
    candidates: list[Fields]
    rows: list[dict[str, Any]] = field(default_factory=list)
    finals: dict[str, list[float]] = field(default_factory=dict)

    @property
    def left(self) -> int:
        """Candidates that the limit kept from being looked at."""
        return len(self.candidates) - len(self.rows)


def literal(config: Any) -> str:
    """``ForwardConfig(128, 64, 8, 2)``: as configurations are written."""
    return f"{type(config).__name__}({', '.join(map(str, asdict(config).values()))})"


def candidates(subject: Subject, target: _triton.Target, dtype: torch.dtype) -> tuple[Any, list[Fields]]:
    """The configuration that ships, and the fields of all to try, its own first.

    Left out are tiles of fewer than 16 rows a warp where there are matrix products, which warps would then share.
    """
    with _triton.record(target), torch.no_grad(), configured(subject, None) as seen:
        subject.make(torch.device("meta"), dtype).run()
    shipped = seen[0]
    own = {name: getattr(shipped, name) for name in subject.grid}
    tried = [dict(zip(subject.grid, values, strict=True)) for values in itertools.product(*subject.grid.values())]
    if hasattr(shipped, "num_stages"):
        tried = [fields for fields in tried if fields["rows"] >= 16 * fields["num_warps"]]
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
        rows: where rows go as they are measured.
        log: gets a line a subject.
        worker: the module that compiles and times.
    """

    device: torch.device
    target: _triton.Target
    quick: bool = False
    limit: float | None = None
    jobs: int = 1
    rows: Rows = field(default_factory=lambda: Rows(None))
    log: Callable[[str], None] = lambda line: None
    worker: str = "benchmarks.tune.worker"

    def __post_init__(self) -> None:
        self._begin = time.monotonic()
        self.dtype = DTYPES[self.device.type]

    def run(self, names: Sequence[str] = (), done: Callable[[list[Trial]], None] = lambda trials: None) -> list[Trial]:
        """Compile and time every subject whose name holds one of ``names``, by default all, or a few with ``quick``.

        ``done`` gets all trials after each subject. Raises ``ValueError`` as :meth:`trials`.
        """
        trials = self.trials(names)
        compiled = self.compile(trials, _COMPILE_SHARE)
        interpret = {"TRITON_INTERPRET": "1" if self.device.type == "cpu" else None}
        with Worker((self.worker, "time", str(self.device), self._size), interpret) as worker:
            for trial in trials:
                if self._time_is_up():
                    break
                self._time(trial, compiled, worker)
                done(trials)
        return trials

    def trials(self, names: Sequence[str] = ()) -> list[Trial]:
        """Of subjects whose name holds one of ``names``, with nothing measured. Raises ``ValueError`` where none is."""
        names = names or (REHEARSED if self.quick else ())
        chosen = [s for s in subjects(self.quick) if not names or any(name in s.name for name in names)]
        if not chosen:
            raise ValueError(f"no subject's name has one of {', '.join(names)} in it")
        return [Trial(s, *candidates(s, self.target, self.dtype)) for s in chosen]

    def compile(self, trials: Iterable[Trial], share: float = 1.0) -> dict[tuple[str, str], dict[str, Any]]:
        """What became of every candidate, by what the subject is compiled as and the candidate's fields.

        Those that ``share`` of the limit leaves no time for are not among them.
        """
        tasks: queue.SimpleQueue[tuple[tuple[str, str], dict[str, Any]]] = queue.SimpleQueue()
        known: set[tuple[str, str]] = set()
        for trial in trials:
            for fields in trial.candidates:
                key = (trial.subject.compiled_as, str(fields))
                if key not in known:
                    known.add(key)
                    tasks.put((key, {"subject": trial.subject.name, "fields": fields}))
        compiled: dict[tuple[str, str], dict[str, Any]] = {}
        where = f"{self.target.backend}:{self.target.capability}:{str(self.dtype).removeprefix('torch.')}"

        def work() -> None:
            with Worker((self.worker, "compile", where, self._size), {"TRITON_INTERPRET": None}) as worker:
                while not self._time_is_up(share):
                    try:
                        key, request = tasks.get_nowait()
                    except queue.Empty:
                        return
                    try:
                        compiled[key] = worker.ask(request, self._within(_COMPILE_LIMIT, share))
                    except Died as death:
                        if not self._time_is_up(share):
                            compiled[key] = {"failed": "does not compile", "why": str(death)}

        threads = [threading.Thread(target=work) for _ in range(min(self.jobs, len(known)))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        failed = sum("failed" in reply for reply in compiled.values())
        took = time.monotonic() - self._begin
        self.log(f"compiled {len(compiled) - failed} of {len(known)} candidates in {took:.0f} s, {failed} fail")
        return compiled

    @property
    def _size(self) -> str:
        return "quick" if self.quick else "whole"

    def _time_is_up(self, share: float = 1.0) -> bool:
        return self.limit is not None and time.monotonic() - self._begin > share * self.limit

    def _within(self, limit: float, share: float = 1.0) -> float:
        """``limit``, or the seconds that ``share`` of the whole one leaves and a few, where that is less."""
        if self.limit is None:
            return limit
        return min(limit, 5 + max(0.0, self._begin + share * self.limit - time.monotonic()))

    def _time(self, trial: Trial, compiled: dict[tuple[str, str], dict[str, Any]], worker: Worker) -> None:
        subject, beat = trial.subject, None
        for fields in trial.candidates:
            if self._time_is_up():
                break
            reply = compiled.get((subject.compiled_as, str(fields)))
            if reply is None:
                continue  # the limit came before it
            if "failed" not in reply:
                request = {"subject": subject.name, "fields": fields, "beat": beat, "samples": _SAMPLES}
                reply = self._ask(worker, request, _RUN_LIMIT if worker.running and trial.rows else _START_LIMIT)
                if reply.get("failed") == "hangs" and self._time_is_up():
                    break  # it was the whole limit that ended it
            row = {"subject": subject.name, "group": subject.group, "shape": subject.shape, "fields": fields,
                   "literal": literal(type(trial.shipped)(**{**asdict(trial.shipped), **fields})), **reply}  # fmt: skip
            if "samples" in row:
                row["median"] = statistics.median(row["samples"])
                beat = min(beat or row["median"], row["median"])
            trial.rows.append(row)
            self.rows.add(row)
        timed = sorted((row for row in trial.rows if "median" in row), key=lambda row: row["median"])
        if not timed:
            return
        finalists = timed[:_FINALISTS]
        ships = literal(trial.shipped)
        finalists += [row for row in timed[_FINALISTS:] if row["literal"] == ships]
        request = {"subject": subject.name, "finalists": [row["fields"] for row in finalists],
                   "samples": 3 if self.quick else _FINAL_SAMPLES}  # fmt: skip
        reply = self._ask(worker, request, _START_LIMIT)
        if "failed" in reply:
            self.log(f"{subject.name}: those compared in the end: {reply['failed']}: {reply['why']}")
            return
        trial.finals = {row["literal"]: samples for row, samples in zip(finalists, reply["samples"], strict=True)}
        for name, samples in trial.finals.items():
            self.rows.add({"subject": subject.name, "final": name, "samples": samples})
        best = min(trial.finals, key=lambda name: statistics.median(trial.finals[name]))
        self.log(f"{subject.name}: {1e6 * statistics.median(trial.finals[best]):.1f} us with {best}")

    def _ask(self, worker: Worker, request: dict[str, Any], limit: float) -> dict[str, Any]:
        """The reply; a process that dies or hangs costs its candidate, and the next one gets another process."""
        try:
            return worker.ask(request, self._within(limit))
        except Died as death:
            return {"failed": "hangs" if "killed after" in str(death) else "dies", "why": str(death)}
