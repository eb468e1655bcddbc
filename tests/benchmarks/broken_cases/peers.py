"""Peers that go wrong, one way each, beside ours and one that is well."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from typing import Any

from benchmarks.case import Case, Check, Context, Provider, Workload

from .workloads import fail, hang, work

calls, more_calls = count(), count()


class CompilationError(Exception):
    """As Triton's, which is no RuntimeError."""


def refuse() -> None:
    raise CompilationError


def tire() -> int:
    """The first call, which the gate looks at, is well."""
    if next(calls):
        raise TypeError("out of resource: shared memory")
    return work()


def lose_later() -> int:
    """The same, and then the device is lost to the process."""
    if next(more_calls) > 3:
        fail()
    return work()


PEERS: dict[str, Callable[[], object]] = {
    "aborts": os.abort,
    "loses CUDA": fail,
    "hangs": hang,
    "does not compile": refuse,
    "is wrong": lambda: 5,
    "is no number": lambda: "a result",
    "tires": tire,
    "loses CUDA later": lose_later,
    "well": work,
}


def gate(outputs: Mapping[str, Any]) -> list[Check]:
    for output in outputs.values():
        if isinstance(output, str):
            raise AttributeError(output)
    return [Check(who, float(output != work()), 0.0, who) for who, output in outputs.items()]


def workloads(context: Context) -> Iterator[Workload]:
    peers = [Provider(name, call, peer=True) for name, call in PEERS.items()]
    yield Workload("all of them", [Provider("ours", work), *peers], gate=gate)
    yield Workload("behind them", [Provider("ours", work), peers[-1]], gate=gate)


CASE = Case("broken_peers", "Peers that fail, beside ours", workloads)
