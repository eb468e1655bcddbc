"""``python -m benchmarks.tune.worker compile <target> <size> [<cubins>]`` or ``time <device> <size> [<cubins>]``: what
may crash, out of the search's way.

A request names a subject and a candidate's fields; the reply says what became of it. See :mod:`.search`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from qwen2vl_kernels.core import launching

from ..timing import Clock
from .processes import serve
from .subject import DTYPES, Fields, Subject, Tensors, Work, configured
from .subjects import subjects


def gpu_target(target: launching.Target) -> Any:
    """As Triton's driver names it on such a GPU."""
    from triton.backends.compiler import GPUTarget

    if target.backend == "cuda":
        return GPUTarget("cuda", target.capability, 32)
    properties = torch.cuda.get_device_properties(0)
    return GPUTarget("hip", properties.gcnArchName.split(":")[0], properties.warp_size)


def stand_in(target: launching.Target) -> None:
    """Put a driver into Triton's place for one that names the target and has no GPU: its compiler wants no more."""
    from triton.runtime import driver

    described = gpu_target(target)
    named = SimpleNamespace(
        get_current_device=lambda: 0, get_current_stream=lambda device: 0, get_current_target=lambda: described
    )
    driver.set_active(named)  # type: ignore[arg-type]


class Compiler:
    """Compiles into Triton's cache on disk what a call would launch, without a GPU and without a context on one.

    Triton's own just-in-time compiler does it: only its driver is replaced, by one that names the target. So all that
    identifies a kernel is the same as in a process that launches it, which then finds it there.
    """

    def __init__(self, target: launching.Target, quick: bool, dtype: torch.dtype, cubins: Path | None = None) -> None:
        self.target, self.dtype, self.cubins = target, dtype, cubins
        self.subjects = {subject.name: subject for subject in subjects(quick)}
        stand_in(target)

    def __call__(self, request: dict[str, Any]) -> dict[str, Any]:
        subject = self.subjects[request["subject"]]
        begin = time.perf_counter()
        try:
            if subject.ready is not None:
                subject.ready(request["fields"], self.dtype, self.cubins, False)
                return {"seconds": time.perf_counter() - begin}
            with launching.record(self.target) as launches, torch.no_grad(), configured(subject, request["fields"]):
                subject.make(torch.device("meta"), self.dtype).run()
            for launch in launches:
                launch.kernel.warmup(grid=launch.grid, **launch.arguments, **launch.options)
        except Exception as error:  # every pass and ptxas have their own
            return {"failed": "does not compile", "why": words(error)}
        return {"seconds": time.perf_counter() - begin}


class Timer:
    """Runs candidates, compares their results and times the subject's kernel. Keeps the inputs of one subject."""

    def __init__(self, device: torch.device, quick: bool, cubins: Path | None = None) -> None:
        self.device, self.dtype, self.cubins = device, DTYPES[device.type], cubins
        self.subjects = {subject.name: subject for subject in subjects(quick)}
        self.clock = Clock(device)
        self.of: str | None = None
        self.work: Work | None = None
        self.compiled = 0
        if not launching.INTERPRETED:
            from triton import knobs

            knobs.compilation.listener = self._compiled

    def _compiled(self, *, cache_hit: bool, **_: Any) -> None:
        self.compiled += not cache_hit

    def __call__(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            with torch.no_grad():
                return self._answer(self.subjects[request["subject"]], request)
        except Exception as error:
            if self._lost():
                return {"failed": "CUDA error", "why": words(error), "last": True}
            fits = "out of resource" not in str(error) and type(error).__name__ != "OutOfResources"
            return {"failed": "raises" if fits else "does not fit", "why": words(error)}

    def _answer(self, subject: Subject, request: dict[str, Any]) -> dict[str, Any]:
        if subject.name != self.of:
            self.of = self.work = None  # freed before the next ones are made
            self.work = subject.make(self.device, self.dtype)
            self.of = subject.name
            self._wait()
        assert self.work is not None
        if (candidates := request.get("finalists")) is not None:
            calls = [self._prepared(subject, self.work, fields)[1] for fields in candidates]
            return {"samples": rounds(calls, self.clock.time, request["samples"])}
        begin, known = time.perf_counter(), self.compiled
        results, call = self._prepared(subject, self.work, request["fields"])
        self._wait()
        # Where kernels were compiled ahead, as all are, the first call loads them and compiles none.
        reply: dict[str, Any] = {"first_call_s": time.perf_counter() - begin, "compiled": self.compiled - known}
        checks = self.work.check(results)
        wrong = [f"{c.name}: error {c.error:.3g}, allowed {c.allowed:.3g}" for c in checks if not c.passed]
        if wrong:
            return reply | {"failed": "wrong result", "why": "; ".join(wrong)}
        worst = max(checks, key=lambda check: check.error / max(check.allowed, 1e-30))
        reply |= {"check": {"name": worst.name, "error": worst.error, "allowed": worst.allowed}}
        samples = [self.clock.time(call)]
        while len(samples) < request["samples"]:
            if len(samples) > 1 and min(samples) > 2 * (request["beat"] or float("inf")):
                break  # it will not be the fastest
            samples.append(self.clock.time(call))
        return reply | {"bits": bits(results), "samples": samples}

    def _prepared(self, subject: Subject, work: Work, fields: Fields) -> tuple[Tensors, Callable[[], object]]:
        """The results of one run, and the launch of the subject's kernel in it, to repeat."""
        seen: list[Callable[[], object]] = []
        launch = subject.module.launch
        if subject.ready is not None:
            subject.ready(fields, self.dtype, self.cubins, True)

        def watched(kernel: Any, *given: Any, **named: Any) -> None:
            launch(kernel, *given, **named)
            if subject.kernel is None or kernel.fn.__name__ == subject.kernel:
                seen.append(lambda: launch(kernel, *given, **named))

        with configured(subject, fields), mock.patch.object(subject.module, "launch", watched), unwritten_is_nan():
            results = work.run()
        (call,) = seen
        return results, call

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _lost(self) -> bool:
        """Whether every later call to CUDA would fail."""
        try:
            self._wait()
        except RuntimeError:
            return True
        return False


@contextmanager
def unwritten_is_nan() -> Iterator[None]:
    """New tensors are full of NaN: memory that an earlier candidate left must not pass for this one's result."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # which fills what torch.empty returns
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def rounds(calls: Sequence[Callable[[], object]], clock: Callable[[Callable], float], n: int) -> list[list[float]]:
    """``n`` samples of each, taken in turn: what slows the machine down for a while hits all of them."""
    samples: list[list[float]] = [[] for _ in calls]
    for turn in range(n):
        for place in range(len(calls)):
            which = (turn + place) % len(calls)
            samples[which].append(clock(calls[which]))
    return samples


def bits(results: Tensors) -> str:
    """What tells results apart that differ in any bit, worked out where they are: copies to the host take longer."""
    digest = 0
    for result in results:
        words = result.contiguous().flatten().view({2: torch.int16, 4: torch.int32}[result.element_size()]).long()
        # Each by its place, mixed as hashes of integers are (splitmix64), in the wrapping arithmetic of int64.
        mixed = words * -7046029254386353131 + torch.arange(len(words), device=words.device)
        for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
            mixed = (mixed ^ (mixed >> shift)) * factor
        digest = (digest * 31 + int((mixed ^ (mixed >> 31)).sum())) % 2**64
    return f"{digest:016x}"


def words(error: Exception) -> str:
    """An exception in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:300]}" if lines else type(error).__name__


if __name__ == "__main__":
    does, where, size, *folder = sys.argv[1:]
    cubins = Path(folder[0]) if folder else None
    if does == "compile":
        backend, capability, dtype = where.split(":")
        target = launching.Target(backend, int(capability))
        serve(Compiler(target, size == "quick", getattr(torch, dtype), cubins))
    else:
        serve(Timer(torch.device(where), size == "quick", cubins))
