"""A test that loses CUDA's context, dies or hangs fails alone: hooks for ``conftest.py``.

After an illegal access every later call to CUDA in the process fails, and with it every later test. Under pytest-xdist
the worker therefore ends itself, in the middle of the test that did it: xdist counts that test as failed, gives those
behind it to others and starts another worker. Why a worker ended is in a file that the controller reads into the
report: the test's traceback, or the stack that ``faulthandler`` writes for a signal and for ``--test-limit``. Without
xdist nothing can be restarted: the run then ends with a message.

``--test-lines`` names a file that gets a JSON line for what was collected and for every test as it ends: of a run that
is killed it tells the failures, and what did not run.
"""

from __future__ import annotations

import faulthandler
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

_file = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--test-limit",
        type=float,
        metavar="SECONDS",
        help="end the process of a test that takes longer; under pytest-xdist that test fails and the others run",
    )
    parser.addoption(
        "--test-lines", type=Path, metavar="FILE", help="write a JSON line for every test there as it ends"
    )


def pytest_configure(config: pytest.Config) -> None:
    worker = getattr(config, "workerinput", None)
    if worker is None:
        lines = config.getoption("--test-lines")
        if lines is not None:
            lines.unlink(missing_ok=True)
            config.pluginmanager.register(_Lines(lines))
        config.stash[_file] = os.dup(2)  # tests have theirs captured, this one is the terminal's
    else:
        config.stash[_file] = os.open(_reason(worker), os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND, 0o600)


class _Lines:
    """In the controller, or in the only process: the lines of ``--test-lines``."""

    def __init__(self, path: Path) -> None:
        self.path, self.collected = path, False

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        if not self.collected and session.items:
            self._collected([item.nodeid for item in session.items])

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: Any, ids: list[str]) -> None:
        if not self.collected:  # all workers find the same
            self._collected(ids)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Also of a test whose worker has ended, with the reason in it."""
        if report.when == "call" or not report.passed:
            why = {} if report.passed else {"why": report.longreprtext}
            self._add({"test": report.nodeid, "when": report.when, "outcome": report.outcome, **why})

    def _collected(self, ids: list[str]) -> None:
        self.collected = True
        self._add({"collected": ids})

    def _add(self, line: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def pytest_sessionstart(session: pytest.Session) -> None:
    if hasattr(session.config, "workerinput"):  # later than pytest's own, which writes to the terminal
        faulthandler.enable(file=session.config.stash[_file])


def pytest_sessionfinish(session: pytest.Session) -> None:
    worker = getattr(session.config, "workerinput", None)
    if worker is not None:
        _reason(worker).unlink(missing_ok=True)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    limit = item.config.getoption("--test-limit")
    if limit is not None:
        faulthandler.dump_traceback_later(limit, exit=True, file=item.config.stash[_file])
    try:
        return (yield)
    finally:
        if limit is not None:
            faulthandler.cancel_dump_traceback_later()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    result = yield
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()  # what the test launched fails now, in it, and not in the next one
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    report: Any = yield
    if call.excinfo is not None and context_is_lost():  # a failure, and what is expected to fail as well
        if hasattr(item.config, "workerinput"):
            os.write(item.config.stash[_file], f"{report.longreprtext}\n".encode())
            os._exit(1)  # before xdist hears of the report: it then fails this test, and only this one
        item.session.shouldfail = (
            f"{item.nodeid} lost CUDA's context, without which no test can go on in this process; with pytest-xdist "
            "(-n 1 or more) the others would run"
        )
    return report


@pytest.hookimpl(optionalhook=True)
def pytest_handlecrashitem(report: pytest.TestReport) -> None:
    """In the controller: why the worker ended goes into the report of its test."""
    path = _reason(report.node.workerinput)  # type: ignore[attr-defined]
    if path.is_file():
        reason = path.read_text(encoding="utf-8", errors="replace")
        path.unlink()
        report.longrepr = f"{reason}\n{report.longrepr}"


def context_is_lost() -> bool:
    """Whether CUDA was in use here and no call to it can succeed any more."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def _reason(worker: Mapping[str, Any]) -> Path:
    return Path(tempfile.gettempdir()) / f"qwen2vl-tests-{worker['testrunuid']}-{worker['workerid']}"
