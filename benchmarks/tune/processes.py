"""A process of its own for work that may crash or hang: requests and replies are lines of JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from typing import IO, Any


class Died(RuntimeError):
    """The process ended, or was ended, without a reply; the message says how, and what it wrote last."""


class Worker:
    """``python -m <module> <arguments>``, started at the first request, and anew at the first one after it died.

    Args:
        arguments: module and its arguments. The module answers every line on its standard input by a line on its
            standard output; what it writes to its standard error is quoted when it dies.
        environment: variables to set, ``None`` for those to leave out.
    """

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str | None] | None = None) -> None:
        self.command = [sys.executable, "-m", *arguments]
        self.environment = {**os.environ}
        for name, value in (environment or {}).items():
            self.environment.pop(name, None)
            if value is not None:
                self.environment[name] = value
        self._process: subprocess.Popen[str] | None = None
        self._errors: IO[str] | None = None

    def start(self) -> None:
        """Let the process begin with its imports, before there is something to ask."""
        self._started()

    def ask(self, request: Mapping[str, Any], limit: float) -> dict[str, Any]:
        """The reply, within ``limit`` seconds. Raises :class:`Died`."""
        process = self._started()
        assert process.stdin is not None and process.stdout is not None
        late = threading.Event()

        def kill() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(limit, kill)
        timer.start()
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        if line.endswith("\n"):
            reply = json.loads(line)
            if reply.get("last"):
                self.close()
            return reply
        status = process.wait()
        last = self._last_words()
        self.close()
        how = f"killed after {limit:.0f} s" if late.is_set() else f"ended with status {status}"
        raise Died(f"{how}: {last}" if last else how)

    def close(self) -> None:
        """End the process; a request after it starts another one."""
        if self._process is not None:
            assert self._process.stdin is not None and self._process.stdout is not None
            self._process.kill()
            self._process.wait()
            self._process.stdin.close()
            self._process.stdout.close()
        if self._errors is not None:
            self._errors.close()
        self._process = self._errors = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None or not self.running:
            self.close()
            self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - as long as the process
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env=self.environment,
                text=True,
            )
        return self._process

    def _last_words(self) -> str:
        assert self._errors is not None
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors.read()[-4000:].splitlines() if line.strip()]
        return lines[-1] if lines else ""


def serve(answer: Any) -> None:
    """In the worker: ``answer(request)`` for every request, until there are no more or it returns ``"last": True``.

    Whatever else writes to the standard output is sent to the standard error.
    """
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        reply = answer(json.loads(line))
        replies.write(json.dumps(reply) + "\n")
        replies.flush()
        if reply.get("last"):
            return
