"""The commands put together, and what becomes of errors: one message on stderr and exit code 1."""

from __future__ import annotations

import contextlib
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .chat import chat
from .common import MediaOrderCommand, explain, installed_version, media_warnings_as_lines, print_error
from .eval import evaluate
from .generate import generate
from .info import info
from .inspect import inspect
from .train import train


class _Commands(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            with media_warnings_as_lines():
                return super().invoke(ctx)
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except Exception as error:
            message = explain(error)
            if message is None:  # a usage error, which typer reports, or a bug
                raise
            print_error(message)
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=_Commands,
    help="Qwen2-VL: ask about images and videos, and train.",
    no_args_is_help=True,
    add_completion=False,
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
app.command()(chat)
app.command()(info)
app.command()(inspect)
app.command("eval")(evaluate)
app.command()(train)


def main() -> None:
    """Entry point of the console script."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # not a text stream of Python's own
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    app(prog_name="qwen2vl")
