"""A case that cannot even name its workloads."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.case import Case, Context, Workload


def workloads(context: Context) -> Iterator[Workload]:
    raise OSError("no such device")
    yield


CASE = Case("broken_plan", "No workload has a name", workloads)
