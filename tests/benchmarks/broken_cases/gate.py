"""A case's own gate that ends its process."""

from __future__ import annotations

import os
from collections.abc import Iterator

from benchmarks.case import Case, Check, Context, Workload

from .workloads import workloads as all_of_them


def gate(context: Context) -> list[Check]:
    os.abort()


def workloads(context: Context) -> Iterator[Workload]:
    yield next(all_of_them(context))


CASE = Case("broken_gate", "A gate that aborts", workloads, gate)
