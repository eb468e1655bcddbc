"""``python -m examples.ablation``: train the models of both ablations, score them, and write JSON and figures."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from benchmarks import environment, plot
from benchmarks.lines import write
from benchmarks.page import PAGE
from benchmarks.run import RESULTS, GateError

from .run import measure, show


def ablation(
    budget: Annotated[float, typer.Option(min=0.001, help="Times the steps of training.")] = 1.0,
    processes: Annotated[int, typer.Option(min=1, help="Models trained at a time, each by one thread.")] = 2,
    seeds: Annotated[int, typer.Option(min=1, help="Models of each kind; medians and spread are over them.")] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="A few steps, to see that it works.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the JSON and its figures; default those of this device's results.")
    ] = None,
) -> None:
    """Train tiny models from nothing: M-RoPE against 1-D RoPE on longer clips, dynamic against fixed resolution.

    At a budget of 1 on two cores it takes about 20 minutes. Figures want matplotlib.
    """
    if out is None and quick:
        raise typer.BadParameter("--quick needs --out: its numbers do not belong among the results", param_hint="out")
    torch.set_num_threads(processes)  # results name the number of threads, which is that of the processes at work
    console = Console(width=None if sys.stdout.isatty() else 200)
    device = environment.folder_name(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        result = measure(
            budget=budget,
            processes=processes,
            seeds=seeds,
            quick=quick,
            command=environment.command("examples.ablation"),
            log=lambda line: console.print(line, style="dim", markup=False),
        )
    except GateError as error:
        console.print(str(error), style="bold red", markup=False)
        raise typer.Exit(1) from None
    show(result, console)
    console.print(f"written to {write(result, out or RESULTS / device)}", soft_wrap=True)
    if importlib.util.find_spec("matplotlib") is None:
        console.print("no figures: matplotlib is not installed", style="yellow")
        return
    for path in plot.draw(result, out or PAGE.parent / "plots" / device):
        console.print(f"written to {path}", soft_wrap=True)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(ablation)

if __name__ == "__main__":
    app()
