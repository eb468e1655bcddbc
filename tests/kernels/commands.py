"""Commands of ``python -m benchmarks`` in a process that stays, since each new one would import PyTorch again.

The process is one of its own as the kernels of the tests' may be interpreted, and as another Triton may be wanted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from traceback import format_exception
from types import NoneType
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Done(NamedTuple):
    """What a command came to."""

    code: int
    output: str


class Commands:
    """``run`` works while the block lasts. ``path``: a folder whose packages come before others'."""

    def __init__(self, path: str = "") -> None:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        if path:
            environment["PYTHONPATH"] = path
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen([sys.executable, "-m", __name__], cwd=ROOT, env=environment, **pipes)

    def __enter__(self) -> Commands:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()  # the end of its input is the end of its work

    def run(self, *arguments: str) -> Done:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(arguments) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, f"the process of {' '.join(arguments)} ended with {self._process.wait()}"
        return Done(*json.loads(answer))


def _serve() -> None:
    from typer.testing import CliRunner

    from benchmarks.__main__ import app

    for line in sys.stdin:
        result = CliRunner().invoke(app, json.loads(line))
        failed = [] if isinstance(result.exception, (SystemExit, NoneType)) else format_exception(result.exception)
        print(json.dumps([result.exit_code, result.output + "".join(failed)]), flush=True)


if __name__ == "__main__":
    _serve()
