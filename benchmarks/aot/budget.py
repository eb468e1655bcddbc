"""What a step of attention on Hopper costs each unit of a multiprocessor, counted in its machine code, and the time
that follows: a prediction, for the first GPU to be held against.

The model. Each of a multiprocessor's four schedulers has one warp of every consumer, which runs its instructions in
phases: issue of products; scores to maxima (with two shuffles, one after the other); exponentials; what was summed,
rescaled, and weights rounded. A phase lasts as long as its most loaded pipe of one scheduler: a cycle an instruction,
8 an exponential, 2 an operation on integers, of maximum or of conversion. Phases of several consumers at a time share
these pipes. Consumers issue products in turns, and the tensor cores take them in that order, each for as long as its
multiply-adds (2048 a cycle) or the bytes that it reads from shared memory (128 a cycle, of which TMA and weights that
are written there take their part). A wait ends ``LATENCY`` cycles behind what it is for, and a tile's q comes ``FETCH``
cycles after all consumers have done with the last one; keys and values are always there in time.

What it leaves out: banks of registers, latencies inside a phase, power. ``CLOCK`` is what an H200 was seen to hold
under such kernels, and ``HELD`` what FlashAttention 3 reached there (128 columns) of what such a model gives for it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table

from qwen2vl_kernels.core import attention_sm90
from qwen2vl_kernels.core.attention_sm90 import Kernel

from .hopper import Assembled, depth_of, name

MULTIPROCESSORS, CLOCK, HELD = 132, 1.5e9, 0.83
LATENCY, FETCH = 30, 800
#: Rows of one segment and how many there are, with 16 heads.
PACKS = ((256, 64), (1024, 16), (4096, 4), (16384, 1))
HEADS = 16

_CLASSES = {
    "HGMMA": r"HGMMA",
    "MUFU": r"MUFU",
    "FMA": r"F(?:FMA|ADD|MUL)\b",
    "FMNMX": r"FMNMX",
    "F2FP": r"F2FP",
    "SHFL": r"SHFL",
    "uniform": r"U|R2UR|S2UR|VOTEU",
}
_HALF_RATE = r"FMNMX|F2FP|LOP3|I|SEL|FSEL|FSETP|VIADD|PRMT|PLOP3|SHF|LEA"


@dataclass(frozen=True)
class Phase:
    """Work of one warp: cycles of its scheduler's pipes, and those that nothing shortens."""

    issue: float
    special: float
    integer: float
    fixed: float = 0.0

    @property
    def alone(self) -> float:
        return max(self.issue, self.special, self.integer) + self.fixed

    @staticmethod
    def of(instructions: Sequence[str]) -> Phase:
        names = [name(text) for text in instructions]
        special = sum(word.startswith("MUFU") for word in names)
        integer = sum(re.match(_HALF_RATE, word) is not None for word in names)
        shuffles = 2 * LATENCY if any(word.startswith("SHFL") for word in names) else 0
        return Phase(len(names), 8 * special, 2 * integer, shuffles)


@dataclass(frozen=True)
class Budget:
    """Of one kernel: instructions a warp and step, and cycles of a multiprocessor a step."""

    kernel: Kernel
    classes: dict[str, int]
    tensor: float
    special: float
    fma: float
    issue: float
    shared: float
    period: float  # predicted, between two steps of a long segment

    @property
    def bound(self) -> str:
        pipes = {"tensor": self.tensor, "MUFU": self.special, "issue": self.issue, "shared": self.shared}
        return max(pipes, key=lambda pipe: pipes[pipe])


@dataclass
class _Costs:
    """What the programs of a kernel's consumers are made of."""

    scores: float  # cycles of the tensor cores for q k^T of one consumer
    values: float  # and for p v
    issue: Phase  # of both products
    maxima: Phase
    exponentials: Phase
    sums: Phase
    head: Phase  # of a tile, to its first product's issue
    first: tuple[Phase, Phase]  # its first softmax
    last: Phase  # issue of the last p v
    tail: Phase  # results
    classes: dict[str, int] = field(default_factory=dict)


def budget(found: Assembled) -> Budget:
    """The budget of a kernel without a mask. Raises ``ValueError`` for one that fails its gates."""
    if found.failures or found.kernel.causal:
        raise ValueError(f"{found.kernel.label} has no budget: {'; '.join(found.failures) or 'it is causal'}")
    config, costs = found.kernel.config, _costs(found)
    warps = 4 * config.consumers
    counts = costs.classes
    total = len(found.loops[-1].instructions)
    return Budget(
        found.kernel,
        counts,
        tensor=config.rows * config.keys * _multiplied(found.kernel) / 2048,
        special=warps * counts["MUFU"] * 32 / 16,
        fma=warps * counts["FMA"] * 32 / 128,
        issue=warps * total / 4,
        shared=sum(_shared(found.kernel)),
        period=_cycles(costs, config.consumers, 64) - _cycles(costs, config.consumers, 63),
    )


def _shared(kernel: Kernel) -> tuple[float, float, float]:
    """Cycles of shared memory a step: reads of q k^T, reads of p v, writes."""
    config, width = kernel.config, -(-kernel.columns // kernel.block) * kernel.block
    scores = config.consumers * depth_of(kernel.columns) * (16 + config.keys / 4)
    values = config.consumers * config.keys / 16 * ((16 if config.p_shared else 0) + kernel.across / 4)
    weights = config.rows * config.keys * 2 / 128 if config.p_shared else 0
    return scores, values, 2 * config.keys * width * 2 / 128 + weights


def _multiplied(kernel: Kernel) -> int:
    """Multiply-adds of a query and a key, in both products."""
    return 16 * depth_of(kernel.columns) + kernel.across


def _costs(found: Assembled) -> _Costs:
    config = found.kernel.config
    step, tile = found.loops[-1].instructions, found.tile.instructions
    waits = [n for n, text in enumerate(step) if "WARPGROUP.DEPBAR" in text]
    shuffled = max(n for n, text in enumerate(step) if name(text).startswith("SHFL")) + 1
    products = max(n for n, text in enumerate(step) if name(text).startswith("HGMMA")) + 1
    outside = [n for n, text in enumerate(tile) if "WARPGROUP.DEPBAR" in text]
    again = max(n for n, text in enumerate(tile[: outside[1]]) if name(text).startswith("SHFL")) + 1
    arrive = max(n for n, text in enumerate(tile[: outside[1]]) if "WARPGROUP.ARRIVE" in text)
    scores, values, writes = _shared(found.kernel)
    crowded = 1 + writes / (scores + values)  # what else takes shared memory's cycles
    per_consumer = config.consumers
    return _Costs(
        scores=max(64 * config.keys * 16 * depth_of(found.kernel.columns) / 2048, crowded * scores / per_consumer),
        values=max(64 * config.keys * found.kernel.across / 2048, crowded * values / per_consumer),
        issue=Phase.of(step[:products]),
        maxima=Phase.of(step[waits[0] : shuffled]),
        exponentials=Phase.of(step[shuffled : waits[1]]),
        sums=Phase.of(step[waits[1] :]),
        head=Phase.of(tile[: outside[0]]),
        first=(Phase.of(tile[outside[0] : again]), Phase.of(tile[again:arrive])),
        last=Phase.of(tile[arrive : outside[1]]),
        tail=Phase.of(tile[outside[1] :]),
        classes=_classes(step),
    )


def _classes(step: Sequence[str]) -> dict[str, int]:
    found = Counter(
        next((kind for kind, pattern in _CLASSES.items() if re.match(pattern, name(text))), "other") for text in step
    )
    return {kind: found[kind] for kind in (*_CLASSES, "other")}


def _program(costs: _Costs, steps: int) -> Iterator[tuple[str, object]]:
    """What a consumer does for a tile: work, products that it issues by their cycles, and what it waits for."""
    yield from (("q", None), ("work", costs.head), ("turn", None), ("issue", ("s", costs.scores)), ("pass", None))
    yield from (("wait", "s"), ("work", costs.first[0]), ("work", costs.first[1]))
    for _ in range(steps - 1):
        yield from (("turn", None), ("work", costs.issue), ("issue", ("s", costs.scores)))
        yield from (("issue", ("o", costs.values)), ("pass", None), ("wait", "s"), ("work", costs.maxima))
        yield from (("work", costs.exponentials), ("wait", "o"), ("work", costs.sums))
    yield from (("release", None), ("work", costs.last), ("issue", ("o", costs.values)), ("wait", "o"))
    yield ("work", costs.tail)


def _cycles(costs: _Costs, consumers: int, steps: int, tiles: int = 6) -> float:
    """Cycles from one tile of so many steps to the next, when a multiprocessor works on several."""
    programs = [[one for _ in range(tiles) for one in _program(costs, steps)] for _ in range(consumers)]
    at, until, left = [0] * consumers, [0.0] * consumers, [0.0] * consumers
    ends: list[dict[str, float]] = [{} for _ in range(consumers)]
    released: list[list[float]] = [[] for _ in range(consumers)]
    asked, turn, now, tensor = [0] * consumers, 0, 0.0, 0.0
    marks: list[float] = []

    def proceed(who: int) -> bool:
        """Whether a consumer that does not work has taken a step of its program."""
        nonlocal turn, tensor
        if at[who] == len(programs[who]) or left[who] > 0 or until[who] > now:
            return False
        what, of = programs[who][at[who]]
        if what == "turn" and turn != who:
            return False
        if what == "q" and asked[who]:
            if any(len(one) < asked[who] for one in released):
                return False
            until[who] = max(now, max(one[asked[who] - 1] for one in released) + FETCH)
        if what == "q":
            asked[who] += 1
            if who == 0:
                marks.append(now)
        elif what == "work":
            assert isinstance(of, Phase)
            left[who] = of.alone
        elif what == "issue":
            assert isinstance(of, tuple)
            tensor = max(tensor, now) + of[1]
            ends[who][of[0]] = tensor
        elif what == "wait":
            until[who] = max(now, ends[who][str(of)]) + LATENCY
        elif what == "pass":
            turn = (who + 1) % consumers
        elif what == "release":
            released[who].append(now)
        at[who] += 1
        return True

    while any(at[who] < len(programs[who]) or left[who] > 0 for who in range(consumers)):
        if any([proceed(who) for who in range(consumers)]):
            continue
        busy = {who: programs[who][at[who] - 1][1] for who in range(consumers) if left[who] > 0}
        phases = [phase for phase in busy.values() if isinstance(phase, Phase)]
        pipes = ("issue", "special", "integer")
        loads = [sum(getattr(phase, pipe) / phase.alone for phase in phases) for pipe in pipes]
        slower = max(1.0, *loads)
        steps_ahead = [left[who] * slower for who in busy] + [one - now for one in until if one > now]
        ahead = min(steps_ahead)
        now += ahead
        for who in busy:
            left[who] = left[who] - ahead / slower if left[who] * slower > ahead + 1e-6 else 0.0
    return (marks[-1] - marks[1]) / (len(marks) - 2)


@dataclass(frozen=True)
class Prediction:
    """Of a kernel on a pack of segments of equal length."""

    kernel: Kernel
    rows: int  # of a segment
    chosen: bool  # whether these segments get this configuration
    executed: float  # multiply-adds that are done for each that is useful
    tflops: float  # useful


def predict(found: Assembled) -> list[Prediction]:
    """For each of ``PACKS``."""
    columns, config, costs = found.kernel.columns, found.kernel.config, _costs(found)
    limit, short, long = attention_sm90.configs(columns)
    predictions = []
    for rows, segments in PACKS:
        tiles, steps = -(-rows // config.rows), -(-rows // config.keys)
        rounds = -(-tiles * segments * HEADS // MULTIPROCESSORS)
        seconds = rounds * _cycles(costs, config.consumers, steps) / CLOCK
        useful = 4 * columns * rows * rows * segments * HEADS
        multiplied = tiles * config.rows * steps * config.keys * _multiplied(found.kernel)
        executed = multiplied / (2 * rows * rows * columns)
        chosen = config == (short if rows <= limit else long)
        predictions.append(Prediction(found.kernel, rows, chosen, executed, HELD * useful / seconds / 1e12))
    return predictions


def show(found: Sequence[Assembled], console: Console) -> None:
    """The budgets and the predictions, as two tables."""
    table = Table(title="A step: instructions a warp, and cycles of a multiprocessor")
    table.add_column("kernel")
    for heading in (*_CLASSES, "other", "tensor", "exp2", "float", "issue", "shared", "period"):
        table.add_column(heading, justify="right")
    table.add_column("bound")
    for one in map(budget, found):
        pipes = (one.tensor, one.special, one.fma, one.issue, one.shared, one.period)
        table.add_row(one.kernel.label, *map(str, one.classes.values()), *(f"{pipe:.0f}" for pipe in pipes), one.bound)
    console.print(table)
    clock = f"{MULTIPROCESSORS} multiprocessors at {CLOCK / 1e9:g} GHz, times {HELD:g}"
    table = Table(title=f"Predicted TFLOP/s and executed / useful, {HEADS} heads, no mask: {clock}; * is taken there")
    table.add_column("kernel")
    for rows, segments in PACKS:
        table.add_column(f"{segments} x {rows}", justify="right")
    for one in found:
        cells = (f"{'* ' if p.chosen else ''}{p.tflops:.0f}  {p.executed:.2f}" for p in predict(one))
        table.add_row(one.kernel.label, *cells)
    console.print(table)
