"""Clocks, interleaved rounds, spread, and the ceilings of the machine."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from qwen2vl_kernels.core import launching
from qwen2vl_kernels.core.matmul import slow_on_cpu

from .case import Provider, Workload

#: Larger than the last-level cache of any GPU in use, so that a sample finds its inputs in memory.
_FLUSH_BYTES = 256 * 2**20
#: About a millisecond.
_LAUNCH_CYCLES = 2_000_000
#: A CPU sample shorter than this repeats the call, or the clock and the loop would be part of the result.
_SHORTEST_SAMPLE_S = 1e-3


class Clock:
    """Seconds of one call: CUDA events on a GPU, ``perf_counter`` on a CPU.

    On a GPU the cache is flushed first, and the device then waits while the call is being launched, so that a short
    kernel is timed and not the launch of it, which takes autograd some 0.2 ms.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flush: torch.Tensor | None = None
        if device.type == "cuda":
            self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)

    def time(self, call: Callable[[], Any], repeat: int = 1) -> float:
        """Seconds of one of ``repeat`` calls in a row (on the CPU; a GPU sample is always one call)."""
        if self._flush is not None:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._flush.zero_()
            torch.cuda._sleep(_LAUNCH_CYCLES)
            start.record()
            call()
            end.record()
            self._synchronize()
            return start.elapsed_time(end) * 1e-3
        begin = time.perf_counter()
        for _ in range(repeat):
            call()
        return (time.perf_counter() - begin) / repeat

    def first(self, call: Callable[[], Any]) -> tuple[float, Any]:
        """Seconds of the host until a call and all its work on the device are done, and what it returned."""
        self._synchronize()
        begin = time.perf_counter()
        result = call()
        self._synchronize()
        return time.perf_counter() - begin, result

    def lost(self, error: Exception) -> bool:
        """Whether after ``error`` no call to CUDA can succeed in this process."""
        if "CUDA error" in str(error):
            return True
        try:
            self._synchronize()
        except RuntimeError:
            return True
        return False

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def repeats(self, seconds: float) -> int:
        """How many calls of ``seconds`` make a sample long enough."""
        if self._flush is not None or seconds >= _SHORTEST_SAMPLE_S:
            return 1
        return math.ceil(_SHORTEST_SAMPLE_S / max(seconds, 1e-9))


@contextmanager
def compilations() -> Iterator[list[bool]]:
    """A list that gets, for every kernel that Triton makes ready in here, whether it had to be compiled: with Triton's
    cache, seconds of a first call depend on what ran before."""
    compiled: list[bool] = []
    if "triton" not in sys.modules or launching.INTERPRETED:
        yield compiled
        return
    from triton import knobs

    before = knobs.compilation.listener

    def listen(*given: Any, **named: Any) -> None:
        compiled.append(not named["cache_hit"])
        if before is not None:
            before(*given, **named)

    knobs.compilation.listener = listen
    try:
        yield compiled
    finally:
        knobs.compilation.listener = before


def words(error: Exception) -> str:
    """The first line of an exception's message, or its type where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


Samples = dict[str, dict[str, list[float]]]  # provider -> metric -> one value a round


def measure(
    workload: Workload,
    clock: Clock,
    rounds: int | None = None,
    first_s: Mapping[str, float] | None = None,
    turn: Callable[[str | None], None] = lambda peer: None,
) -> tuple[Samples, dict[str, str]]:
    """Run all providers in turn, round after round, each round starting with the next provider.

    Whatever slows the machine down for a while hits all of them, and none always follows the same neighbour.
    ``first_s``: seconds of the first call of those that were called already. ``turn`` is told of peers that warm up or
    lose the device, and of ``None`` after them.

    Returns the samples, and why of the peers that failed, which have none.
    """
    active = [provider for provider in workload.providers if provider.skipped is None]
    samples: Samples = {provider.name: {} for provider in active}
    repeats: dict[str, int] = {}
    dropped: dict[str, str] = {}

    def drop(provider: Provider, error: Exception) -> None:
        """Go on without a peer that failed; the exception of one of ours, and what loses the device, is raised."""
        if not provider.apart or clock.lost(error):
            turn(provider.name if provider.apart else None)
            raise error
        dropped[provider.name] = words(error)
        active.remove(provider)
        del samples[provider.name]

    for provider in list(active):
        first = (first_s or {}).get(provider.name)
        turn(provider.name if provider.apart else None)
        try:
            repeats[provider.name] = 1 if workload.units is not None else _warm_up(provider, clock, first)
        except Exception as error:
            drop(provider, error)
    turn(None)
    done, begin, limit = 0, time.perf_counter(), min(rounds or workload.max_rounds, workload.max_rounds)
    while active and done < limit:
        if rounds is None and done >= workload.min_rounds and time.perf_counter() - begin > workload.budget_s:
            break
        shift = done % len(active)
        for provider in active[shift:] + active[:shift]:
            try:
                values = _sample(workload, provider, clock, repeats[provider.name])
            except Exception as error:
                drop(provider, error)
                continue
            for metric, value in values.items():
                samples[provider.name].setdefault(metric, []).append(value)
        done += 1
    return samples, dropped


def _sample(workload: Workload, provider: Provider, clock: Clock, repeat: int) -> dict[str, float]:
    assert provider.call is not None
    if provider.before is not None:
        provider.before()
    if workload.units is None:
        return {"time": clock.time(provider.call, repeat) / workload.per_call}
    returned = provider.call()
    return {metric: float(returned[metric]) for metric in workload.units}


def _warm_up(provider: Provider, clock: Clock, first: float | None) -> int:
    """Call until caches, code generation and allocators have settled; returns the calls of a sample."""
    assert provider.call is not None
    if first is not None and first > 0.5 and clock.device.type == "cpu":  # nothing was compiled in it
        return 1
    call = provider.warm or provider.call
    for _ in range(2):
        if provider.before is not None:
            provider.before()
        seconds = clock.time(call)
        if seconds > 0.5:  # long enough to have settled within the call
            return 1
    # Only a call that needs no rewinding may be repeated.
    return clock.repeats(seconds) if provider.before is None and provider.warm is None else 1


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, minimum, maximum and the samples themselves."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "samples": list(values),
    }


#: A middle half of the samples that is wider than this share of their median says that the machine was not ours alone.
WIDE = 0.2


def is_wide(values: Sequence[float]) -> bool:
    """Whether the middle half of the samples, of four or more, is wider than :data:`WIDE` of the median."""
    if len(values) < 4:
        return False
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return high - low > WIDE * abs(median)


def ratio(peer: Sequence[float], ours: Sequence[float]) -> dict[str, float]:
    """How many times ours is faster (or smaller).

    ``median``, ``min`` and ``max`` are taken over the rounds, whose samples saw the same machine; ``best`` compares
    the two minima, which a noisy neighbour disturbs least.
    """
    paired = [p / max(o, 1e-12) for p, o in zip(peer, ours, strict=True)]
    best = min(peer) / max(min(ours), 1e-12)
    return {"median": statistics.median(paired), "min": min(paired), "max": max(paired), "best": best}


class Ceilings:
    """What this machine reaches now: a copy (bytes read plus written a second), a matrix product of each dtype.

    Each is taken before and after the workloads; the better one counts, for a ceiling is what can be reached.
    """

    def __init__(self, clock: Clock, quick: bool = False) -> None:
        self.clock, self.quick = clock, quick
        self.copy = 0.0
        self.matmul: dict[torch.dtype, float] = {}

    def update(self, dtypes: Sequence[torch.dtype]) -> None:
        """Measure the copy and the products of ``dtypes``, keeping the best so far."""
        gpu = self.clock.device.type == "cuda"
        size = 2**22 if self.quick else 2**30 if gpu else 2**28
        source = torch.ones(size, dtype=torch.uint8, device=self.clock.device)
        target = torch.empty_like(source)
        self.copy = max(self.copy, 2 * size / self._typical(lambda: target.copy_(source)))
        side = 256 if self.quick else 8192 if gpu else 2048
        for dtype in dtypes:
            # What a CPU without products of the dtype can reach is what it reaches in float32.
            product_dtype = torch.float32 if not gpu and slow_on_cpu(dtype) else dtype
            a = torch.randn(side, side, device=self.clock.device).to(product_dtype)
            b = torch.randn(side, side, device=self.clock.device).to(product_dtype)
            rate = 2 * side**3 / self._typical(lambda a=a, b=b: a @ b)
            self.matmul[dtype] = max(self.matmul.get(dtype, 0.0), rate)

    def _typical(self, call: Callable[[], Any]) -> float:
        """The median of seven after two calls to warm up."""
        for _ in range(2):
            self.clock.time(call)
        return statistics.median(self.clock.time(call) for _ in range(7))

    def as_json(self) -> dict[str, Any]:
        return {
            "copy_bytes_per_s": self.copy,
            "matmul_flops_per_s": {dtype_name(dtype): rate for dtype, rate in self.matmul.items()},
        }


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def floor_s(
    ceilings: Mapping[str, Any], flops: float | None, bytes_: float | None, dtype: str
) -> tuple[float, str] | None:
    """The least time the declared work can take under ``ceilings``, as :meth:`Ceilings.as_json` gives them, and which
    one says so (the roofline)."""
    bounds = []
    if flops and (rate := ceilings.get("matmul_flops_per_s", {}).get(dtype)):
        bounds.append((flops / rate, "matmul"))
    if bytes_ and (rate := ceilings.get("copy_bytes_per_s")):
        bounds.append((bytes_ / rate, "copy"))
    return max(bounds) if bounds else None
