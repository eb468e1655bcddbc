"""A case whose first workload is to come last."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from benchmarks.case import Case, Context, Workload

from .workloads import workloads as all_of_them


def workloads(context: Context) -> Iterator[Workload]:
    found = {workload.name: workload for workload in all_of_them(context)}
    yield replace(found["first"], late=True)
    yield found["last"]


CASE = Case("late", "A late workload before one that is not", workloads)
