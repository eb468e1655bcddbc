"""Hooks for ``conftest.py``: a run of many files ends with a table of those whose tests take the most CPU time.

CPU time rather than time on the clock, as it is much the same on a machine that has other work. That of a process that
a test has started counts when the test has waited for its end, that of a fixture's process in the last test it serves.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Generator

import pytest

#: Files of a run that has the table, and rows of it.
MANY, ROWS = 12, 10
_begin = pytest.StashKey[float]()


def spent() -> float:
    """CPU seconds of this process and of those that it has started and waited for."""
    now = os.times()
    return now.user + now.system + now.children_user + now.children_system


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    item.stash[_begin] = spent()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, None, None]:
    try:
        yield
    finally:
        item.user_properties.append(("cpu_seconds", spent() - item.stash.get(_begin, spent())))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    seconds: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", None) == "teardown":
                seconds[report.nodeid.partition("::")[0]] += dict(report.user_properties).get("cpu_seconds", 0.0)
    if len(seconds) < MANY:
        return
    terminalreporter.section("CPU seconds")
    for name, value in seconds.most_common(ROWS):
        terminalreporter.write_line(f"{value:7.1f}  {name}")
    terminalreporter.write_line(f"{sum(seconds.values()):7.1f}  all {len(seconds)} files")
