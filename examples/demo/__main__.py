"""``python -m examples.demo``: the small trained model reads, names, counts, compares, points, follows clips and plays.

Each answer is printed beside the truth. ``--random`` shows the path from media files to an answer step by step instead,
with a checkpoint of random weights, and ``--check`` compares such a checkpoint's logits and tokens with transformers'.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from qwen2vl.errors import Qwen2VLError

from .steps import console

#: The day on which the embedded model was made: a seed that nobody chose among others.
RELEASED = 20261201


def demo(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Media and pictures go here.")] = Path(
        "demo_output"
    ),
    language: Annotated[
        str, typer.Option("--language", help="Of the questions: en or zh.", rich_help_panel="Samples")
    ] = "en",
    seed: Annotated[
        int, typer.Option("--seed", min=0, help="Which samples; none was trained on.", rich_help_panel="Samples")
    ] = RELEASED,
    random: Annotated[
        bool,
        typer.Option("--random", help="Instead: a photo, several images and a video, step by step, random weights."),
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Instead: logits and greedy tokens of random weights, and transformers'.")
    ] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the random checkpoint, as DIR/checkpoint.")] = False,
) -> None:
    """Let the small model that comes with qwen2vl answer, and print each answer beside the truth."""
    if keep and not (random or check):
        raise typer.BadParameter("wants --random or --check", param_hint="--keep")
    try:
        out.mkdir(parents=True, exist_ok=True)
        if random or check:
            from .random_weights import walk

            with tempfile.TemporaryDirectory() as temporary:
                walk(out / "checkpoint" if keep else Path(temporary), out, check=check)
        else:
            from .trained import show

            show(out, language=language, seed=seed)
    except (Qwen2VLError, OSError) as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"[bold red]error:[/] {escape(str(error))}")
        raise typer.Exit(1) from None
    if keep:
        console.print(f"\nThe checkpoint is kept: qwen2vl chat --model {escape(str(out / 'checkpoint'))}")


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(demo)
    app()
