"""The commands put together, and what becomes of errors: one message on stderr and exit code 1."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .. import interrupts
from . import ranks
from .chat import chat
from .common import (
    Command,
    MediaOrderCommand,
    PlainFlags,
    explain,
    installed_version,
    media_warnings_as_lines,
    print_error,
)
from .convert import convert
from .eval import evaluate
from .generate import generate
from .info import info
from .inspect import inspect
from .merge import merge
from .threads import take_process
from .train import train
from .web import web


class _Commands(PlainFlags, TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            with media_warnings_as_lines():
                return super().invoke(ctx)
        except KeyboardInterrupt:
            interrupts.say()
            raise typer.Exit(interrupts.EXIT_CODE) from None
        except Exception as error:
            message = explain(error, flags=ctx.invoked_subcommand != "train")
            if message is None:  # a usage error, which typer reports, or a bug
                raise
            told = ctx.invoked_subcommand == "train" or not ranks.follows()
            print_error(message if told else f"rank {ranks.rank()}: {message}")
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=_Commands,
    help="Qwen2-VL: ask about images and videos, and train.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"qwen2vl {installed_version('qwen2vl') or '(not installed)'}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version.")
    ] = False,
) -> None:
    pass


app.command(cls=MediaOrderCommand)(generate)
app.command(cls=Command)(chat)
app.command(cls=Command)(web)
app.command(cls=Command)(info)
app.command(cls=Command)(inspect)
app.command("eval", cls=Command)(evaluate)
app.command(cls=Command)(train)
app.command(cls=Command)(merge)
app.command(cls=Command)(convert)


def main() -> None:
    """Entry point of the console script."""
    take_process()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # not a text stream of Python's own
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        app(prog_name="qwen2vl")
    except SystemExit as end:
        if "RANK" in os.environ:
            # One of torchrun's: a thread of gloo drops the tensors of a collective some time after the collective is
            # done, and needs the interpreter for it. Where the interpreter is being taken down by then, C++ ends the
            # process with SIGABRT, and torchrun calls the finished run failed.
            ranks.release()
            interrupts.leave(end.code if isinstance(end.code, int) else int(end.code is not None))
        raise
