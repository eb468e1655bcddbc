"""One workload that is quick and one that takes longer than anybody waits, for killing the run in the middle."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.case import Case, Context, Workload

from .workloads import workloads as all_of_them


def workloads(context: Context) -> Iterator[Workload]:
    found = {workload.name: workload for workload in all_of_them(context)}
    yield found["first"]
    yield found["hangs"]
    yield found["last"]


CASE = Case("slow", "A workload behind one that is slow", workloads, limit_s=600.0)
