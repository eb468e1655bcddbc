"""``python -m examples.small``: train the small model, sitting by sitting, measure it, write the file to be shipped."""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from qwen2vl import assets
from qwen2vl.errors import Qwen2VLError, install_hint

from .plan import SEED

#: How many held-out samples of each level measure the model, a thousand of a skill at least, and their seed.
_COUNT, _SEED = 250, 2026
stderr = Console(stderr=True, highlight=False, soft_wrap=True)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)


@app.command()
def train(
    output: Annotated[Path, typer.Option("--output", metavar="DIR", help="The sitting's own folder.")],
    begin: Annotated[
        str,
        typer.Option(
            "--from", metavar="DIR", help='Weights: a folder, "assets" (those that are embedded), or "random".'
        ),
    ] = "random",
    steps: Annotated[int, typer.Option("--steps", min=1, help="Steps of the sitting.")] = 5_000,
    tokens: Annotated[
        int, typer.Option("--tokens", min=0, help="Tokens of questions in a step of a process; 0 trains the tower.")
    ] = 4096,
    pictures: Annotated[
        int, typer.Option("--pictures", min=0, help="Tokens of pictures in it, of which the tower is told all.")
    ] = 0,
    lr: Annotated[float, typer.Option("--lr", min=0.0, help="The highest learning rate.")] = 1e-3,
    end: Annotated[
        float, typer.Option("--end", min=0.0, max=1.0, help="The share of it that the last step has.")
    ] = 0.05,
    every: Annotated[int, typer.Option("--every", min=1, help="Steps between two measurements.")] = 150,
    threads: Annotated[int, typer.Option("--threads", min=1, help="Cores that each process takes.")] = 2,
    dtype: Annotated[
        str, typer.Option("--dtype", help="Of the arithmetic: float32, or bfloat16 where that is faster.")
    ] = "float32",
) -> None:
    """Run a sitting, which learns from where the one before it ended, and write its model to DIR/model.

    The same command goes on with a sitting that was interrupted; torchrun runs it on several processes.
    """
    import torch

    from qwen2vl.samples.fonts import typefaces

    from .sitting import Sitting, sittings_of, train

    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    try:
        if len(typefaces()) == 1:
            raise Qwen2VLError(
                f"fonts: only Pillow's own is there; matplotlib's are wanted: {install_hint('matplotlib')}"
            )
        torch.set_num_threads(threads)
        source = {"random": None, "assets": assets.FOLDER}.get(begin, Path(begin))
        before = [] if source is None else sittings_of(source)
        named = begin if source in (None, assets.FOLDER) else "/".join(source.absolute().parts[-2:])
        sitting = Sitting(
            named,
            steps,
            tokens,
            pictures,
            lr=lr,
            end=end,
            every=every,
            seed=SEED + len(before),
            dtype=dtype,
            processes=world,
        )
        _begin(output / "begin", source, first=rank == 0)
        model = train(output, output / "begin", sitting, before=before, said=lambda line: print(line, file=sys.stderr))
    except (Qwen2VLError, OSError) as error:
        stderr.print(f"[bold red]error:[/] {escape(str(error))}")
        raise typer.Exit(1) from None
    if rank == 0:
        print(model)


def _begin(folder: Path, source: Path | None, *, first: bool) -> None:
    """Write what a sitting begins from; the first process does it, and the others wait until it is there."""
    from .shape import write_beginning
    from .sitting import HEADS

    whole = folder / "preprocessor_config.json"
    if first and not whole.is_file():
        if source is not None and (source / HEADS).is_file():
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / HEADS, folder)
        write_beginning(folder, seed=SEED, source=source)
    while not whole.is_file():
        time.sleep(0.1)


@app.command()
def ship(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A sitting's model.")],
    output: Annotated[Path, typer.Option("--output", metavar="DIR", help="The file that is shipped goes here.")],
    count: Annotated[int, typer.Option("--count", min=1, help="Held-out samples of each level.")] = _COUNT,
    processes: Annotated[int, typer.Option("--processes", min=1, help="Processes that measure it.")] = 2,
) -> None:
    """Measure a model on held-out samples, and write it in bfloat16 with its figures and how it was made."""
    from .results import facts, measure, table
    from .results import ship as write
    from .sitting import sittings_of

    try:
        results = measure(model, count=count, seed=_SEED, processes=processes)
        told = facts(sittings_of(model), results, count=count, measured_seed=_SEED)
        write(model, output, told)
    except (Qwen2VLError, OSError) as error:
        stderr.print(f"[bold red]error:[/] {escape(str(error))}")
        raise typer.Exit(1) from None
    print(table(told), file=sys.stderr)
    print(output)


if __name__ == "__main__":
    app()
