"""``python -m examples.small``: train the small model from nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from qwen2vl.errors import Qwen2VLError, install_hint

from .plan import PHASES, SEED, configuration

#: How many held-out samples of each skill and difficulty measure the model, a thousand of a skill, and their seed.
_COUNT, _SEED = 200, 2026
stderr = Console(stderr=True, highlight=False, soft_wrap=True)


def small(
    output: Annotated[Path, typer.Option("--output", metavar="DIR", help="Runs, checkpoints and the model go here.")],
    budget: Annotated[float, typer.Option("--budget", min=1e-4, help="Times the steps of every phase.")] = 1.0,
    processes: Annotated[
        int,
        typer.Option(
            "--processes",
            min=1,
            max=2,
            help="That share each step, two as shipped; the longest samples do not fit into a third of one.",
        ),
    ] = 2,
    count: Annotated[
        int, typer.Option("--count", min=1, help="Held-out samples of each skill and difficulty it is measured by.")
    ] = _COUNT,
) -> None:
    """Train the small model phase by phase, measure it, and write it into DIR/model in the form that is shipped.

    After an interruption the same command continues the run. At a budget of 1 it takes about two and a half hours on
    two cores.
    """
    from qwen2vl.files import write_json
    from qwen2vl.samples.fonts import typefaces

    from .results import facts, measure, ship, table
    from .shape import write_beginning

    try:
        if len(typefaces()) == 1:
            raise Qwen2VLError(
                f"fonts: only Pillow's own is there; matplotlib's are wanted: {install_hint('matplotlib')}"
            )
        last = output / "0-weights"
        if not (last / "preprocessor_config.json").is_file():
            write_beginning(last, seed=SEED)
        for number, phase in enumerate(PHASES, 1):
            folder, begins = output / phase.name, f"../{last.relative_to(output)}"
            _plan(folder, configuration(phase, number=number, checkpoint=begins, budget=budget, processes=processes))
            if not (folder / "done").is_file():
                _train(phase.stage, folder, processes)
            last = folder / "model"
        results = measure(last, count=count, seed=_SEED, processes=processes)
        write_json(output / "results.json", results)
        told = facts(PHASES, results, budget=budget, processes=processes, count=count, measured_seed=_SEED)
        ship(last, output / "model", told)
    except (Qwen2VLError, OSError) as error:
        stderr.print(f"[bold red]error:[/] {escape(str(error))}")
        raise typer.Exit(1) from None
    print(table(told), file=sys.stderr)
    print(output / "model")


def _plan(folder: Path, text: str) -> None:
    """Write the configuration of a phase; raise a Qwen2VLError where the phase was begun with another one."""
    config = folder / "run.toml"
    if config.is_file() and config.read_text() != text:
        raise Qwen2VLError(f"{config}: is of another plan, budget or number of processes; give another --output")
    folder.mkdir(parents=True, exist_ok=True)
    config.write_text(text)


def _train(stage: str, folder: Path, processes: int) -> None:
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    threads = max(1, (os.cpu_count() or 1) // processes)
    result = subprocess.run(
        [*launch, "-m", "qwen2vl", "train", "--stage", stage, "--config", str(folder / "run.toml"), "--resume"],
        env={"OMP_NUM_THREADS": str(threads), **os.environ},
    )
    if result.returncode:
        raise Qwen2VLError(f"{folder.name}: qwen2vl train stopped with exit status {result.returncode}")
    (folder / "done").touch()
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # the exported model is what the next phase begins from


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(small)
    app()
