"""Workloads that end their process between two that are well."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Iterator

from benchmarks.case import Case, Check, Context, Provider, Workload


def work() -> int:
    return sum(range(100))


def crash() -> None:
    print("about to read address 0", flush=True)
    ctypes.string_at(0)


def fail() -> None:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def hang() -> None:
    time.sleep(600)


WAYS: dict[str, Callable[[], object]] = {
    "first": work,
    "aborts": os.abort,
    "crashes": crash,
    "leaves": lambda: os._exit(3),
    "fails": fail,
    "hangs": hang,
    "red": work,
    "last": work,
}


def workloads(context: Context) -> Iterator[Workload]:
    for name, call in WAYS.items():
        error = 1.0 if name == "red" else 0.0
        yield Workload(
            name,
            [Provider("ours", call), Provider("theirs", work, peer=True)],
            gate=lambda outputs, error=error: [Check(who, error, 0.0) for who in outputs],
        )


CASE = Case("broken", "Workloads that end their process", workloads)
