"""Ctrl-C: the ``qwen2vl`` command ends within a second, whatever it computes; what is being saved is finished first.

Python raises KeyboardInterrupt between two instructions of the main thread. One product of large matrices takes longer
than that, a pool waits for its threads, and what is called from C may swallow the exception, as an import of an
extension does. So in a command a thread hears of the signal as well, and ends the process where that has not ended by
itself a moment later. In other programs Ctrl-C is Python's.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

logger = logging.getLogger("qwen2vl.interrupts")

EXIT_CODE = 128 + signal.SIGINT
GRACE = 0.6  # seconds to end in good order
_LOOK = 0.02  # seconds between two looks of the thread at what it waits for
_LATE = 0.25  # seconds that the thread may hear of a signal after Python has raised it

_saving = False  # what is being saved is finished first
_caught = False  # Ctrl-C stops what runs, and the process goes on
_raised = 0.0  # when Python raised the last Ctrl-C
_said = threading.Lock()  # taken for good when it is told that the process was interrupted
_scratch: set[Path] = set()


def _one_word() -> str:
    return "interrupted"


_words: Callable[[], str] = _one_word


@contextmanager
def command() -> Iterator[None]:
    """Run a command: Ctrl-C tells so in one line and ends the process with 130. For the main thread."""
    global _words
    _words = _one_word  # what another command of this process said counts no more
    signal.signal(signal.SIGINT, _raise)
    heard, told = os.pipe()
    os.set_blocking(told, False)
    signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(heard,), name="qwen2vl Ctrl-C", daemon=True).start()
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as end:
        if isinstance(end, SystemExit) and end.code != EXIT_CODE:
            raise
        say()
        leave(EXIT_CODE)  # where a string was being executed, Python would end itself by a signal in place of the code
    finally:
        signal.signal(signal.SIGINT, lambda *_: leave(EXIT_CODE))  # all that is left is Python's own end


def leave(code: int) -> NoReturn:
    """End this process without taking the interpreter down around its threads: no call waits for those of a library,
    and what an ending interpreter must do is done here."""
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # a reader that is gone, a stream that is closed
            stream.flush()
    os._exit(code)


def say() -> None:
    """One line on stderr: that the process was interrupted; nothing where it was said before."""
    if _said.acquire(blocking=False):
        with contextlib.suppress(OSError, ValueError):
            print(_words(), file=sys.stderr, flush=True)


def leave_word_to_another() -> None:
    """This process, one of several that Ctrl-C ends, does not say that it was interrupted."""
    _said.acquire(blocking=False)


def describe_end(words: Callable[[], str]) -> None:
    """What the command says when it is interrupted, in place of the one word. Any thread may call ``words``."""
    global _words
    _words = words


@contextmanager
def caught_by_caller() -> Iterator[None]:
    """Inside, Ctrl-C stops what runs and not the process, as the caller catches it, however long one operation lasts.
    One more before Python could raise the first ends the process."""
    global _caught
    _caught = True
    try:
        yield
    finally:
        _caught = False


@contextmanager
def finish_first(what: str) -> Iterator[None]:
    """Ctrl-C is told and counts when this is over: in the middle it would leave half of ``what``."""
    global _saving
    if threading.current_thread() is not threading.main_thread() or _saving:
        yield
        return
    came: list[int] = []

    def keep(number: int, frame: Any) -> None:
        if not came:
            logger.warning("interrupted: %s that is being written is finished first", what)
        came.append(number)

    before = signal.signal(signal.SIGINT, keep)
    _saving = True
    try:
        yield
    finally:
        _saving = False
        signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt


@contextmanager
def scratch(*paths: Path) -> Iterator[None]:
    """Inside, ``paths`` are files that go when Ctrl-C ends the process."""
    _scratch.update(paths)
    try:
        yield
    finally:
        _scratch.difference_update(paths)


def _raise(number: int, frame: Any) -> NoReturn:
    global _raised
    _raised = time.monotonic()
    raise KeyboardInterrupt


def _watch(heard: int) -> None:
    """Run by the thread: end the process where it goes on after Ctrl-C."""
    waiting = math.inf  # since when Ctrl-C waits for the caller that catches it
    while True:
        if os.read(heard, 1)[0] != signal.SIGINT:
            continue
        now = time.monotonic()
        if _caught:
            if waiting < now and _raised < waiting - _LATE:  # the one before has not been raised yet
                _end()
            waiting = now
            continue
        end = now + GRACE
        while time.monotonic() < end:
            time.sleep(_LOOK)
            if _saving:
                end = time.monotonic() + GRACE
        _end()


def _end() -> NoReturn:
    """End this process from the thread: its main thread may not come back to Python for long."""
    for path in tuple(_scratch):
        with contextlib.suppress(OSError):
            path.unlink()
    with contextlib.suppress(OSError):
        if os.isatty(2):
            os.write(2, b"\r\x1b[K\x1b[?25h")  # a bar hides the cursor
        if _said.acquire(blocking=False):
            os.write(2, f"{_words()}\n".encode())
    os._exit(EXIT_CODE)
