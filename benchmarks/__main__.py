"""``python -m benchmarks``: list, run, report, what training takes, and two ablations of the paper."""

from __future__ import annotations

import importlib.util
import shlex
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from . import environment, isolate, lines, page, report
from .case import Context
from .lines import write
from .page import PAGE
from .run import RESULTS, GateError, case_names, load_case
from .timing import Clock

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)


@app.command("list")
def list_() -> None:
    """Name every case and say what it measures."""
    for name in case_names():
        print(f"{name:16s} {load_case(name).summary}")


@app.command()
def run(
    names: Annotated[list[str], typer.Argument(metavar="CASE...", help="Cases to run, or 'all'.")],
    quick: Annotated[bool, typer.Option("--quick", help="Small shapes and two rounds, to see that it works.")] = False,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds, instead of as many as fit.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the JSON; default benchmarks/results/<device>.")] = None,
    device: Annotated[str | None, typer.Option(help="Default: cuda where there is one, else cpu.")] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads on the CPU; fewer than its cores stand a busy machine better.")
    ] = None,
    checkpoint_dir: Annotated[
        Path | None,
        typer.Option(help="Keep the random checkpoints here (4.4 GB for the 2B) and use those that are there."),
    ] = None,
    limit: Annotated[
        float | None, typer.Option(min=0.1, help="Seconds for a workload, instead of what its case gives.")
    ] = None,
) -> None:
    """Measure cases, each workload in a process of its own, and write a line for each as it ends.

    What has a red parity gate, fails, crashes or hangs is not among the rows, costs no other, and makes the exit
    status 1.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    console = Console(width=None if sys.stdout.isatty() else 200)
    if out is None and quick:
        raise typer.BadParameter("--quick needs --out: its numbers do not belong among the results", param_hint="out")
    chosen = case_names() if names == ["all"] else names
    try:
        cases = [load_case(name) for name in chosen]
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="case") from error
    red = False
    processes = isolate.Processes(tuple(dict.fromkeys(module for case in cases for module in case.imports)))
    with isolate.stopped_by_sigterm(), Context(where, quick, rounds, checkpoint_dir) as context:
        for name in chosen:
            try:
                begun = isolate.begin(processes, name, context, out, _command(), limit)
            except RuntimeError as error:
                console.print(str(error), style="bold red", markup=False, soft_wrap=True)
                red = True
                continue
            try:
                begun.finish(log=lambda text: console.print(text, style="dim", markup=False, soft_wrap=True))
            finally:  # of a run that is being ended, what there is
                red = not _collect(begun.path, console) or red
    if red:
        raise typer.Exit(1)


@app.command()
def collect(
    paths: Annotated[list[Path], typer.Argument(metavar="LINES...", help="Files <case>.jsonl.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the JSON; default beside the lines.")] = None,
) -> None:
    """Make results files of the lines that runs have left, also of those that were killed; says what is missing."""
    console = Console(width=None if sys.stdout.isatty() else 200)
    try:
        complete = [_collect(path, console, out) for path in paths]
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint="lines") from error
    if not all(complete):
        raise typer.Exit(1)


def _collect(path: Path, console: Console, out: Path | None = None) -> bool:
    """Show and write what the lines in ``path`` hold; whether nothing in them is red or missing."""
    result = lines.assemble(lines.read(path))
    report.show(result, console)
    for message in result["red"]:
        console.print(message, style="bold red", markup=False, soft_wrap=True)
    if result["rows"]:
        console.print(f"written to {lines.write(result, out or path.parent)}", soft_wrap=True)
    return not result["red"] and not result["missing"]


@app.command("report")
def report_(
    results: Annotated[Path, typer.Argument(help="Folder with a folder of results a device.")] = RESULTS,
    out: Annotated[Path, typer.Option(help="The page; its figures go to plots/ beside it.")] = PAGE,
) -> None:
    """Make the page of all results: tables, and figures as SVG (needs matplotlib)."""
    try:
        written = page.write(results, out)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="results") from error
    print(f"written to {out}, {len(written) - 1} figures beside it")


@app.command("aot")
def aot(
    names: Annotated[list[str] | None, typer.Argument(metavar="[GROUP]...", help="Default: every group.")] = None,
    targets: Annotated[list[str] | None, typer.Option("--target", help="Default: every target.")] = None,
    failures_only: Annotated[bool, typer.Option("--failures", help="Print only what fails a gate.")] = False,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes that compile; default one a core.")] = None,
) -> None:
    """Compile every Triton kernel without a GPU and check spills, shared memory, vector width and matrix units.

    A gate that fails makes the exit status 1.
    """
    from . import aot as ahead

    try:
        reports = ahead.compile_all(names, targets, jobs)
    except (ValueError, RuntimeError) as error:
        raise typer.BadParameter(str(error)) from error
    failed = [r for r in reports if r.failures]
    ahead.show(failed if failures_only else reports, Console(width=None if sys.stdout.isatty() else 200))
    print(f"{len(reports)} kernels compiled, {len(failed)} fail a gate")
    if failed:
        raise typer.Exit(1)


@app.command("work")
def work() -> None:
    """Count, without a GPU, what attention kernels execute for the useful work of every pack."""
    from . import packs

    Console(width=None if sys.stdout.isatty() else 200).print(packs.table(packs.packs()))


@app.command("plan")
def plan_(
    mfu: Annotated[float, typer.Option(min=0.01, max=1.0, help="Assumed: none of ours was measured on a GPU.")] = 0.4,
    peak_tflops: Annotated[float, typer.Option(min=1.0, help="Of one GPU, dense bf16.")] = 989.0,
    memory: Annotated[
        list[float] | None, typer.Option(min=1.0, help="GB of one GPU; several are compared. Default: 80 and 141.")
    ] = None,
    reserve: Annotated[float, typer.Option(min=0.0, help="GB of it for CUDA, NCCL and fragmentation.")] = 6.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of one pack.")] = 8192,
    vision_share: Annotated[float, typer.Option(min=0.0, max=1.0, help="Of all tokens, in the mix.")] = 0.5,
    image_tokens: Annotated[int, typer.Option(min=1, help="Of one image.")] = 512,
    sample_tokens: Annotated[int, typer.Option(min=1, help="Of one sample.")] = 1024,
    instruct_tokens: Annotated[
        float | None, typer.Option(min=1.0, help="Of the instruct stage, for which the paper gives none.")
    ] = None,
) -> None:
    """Calculate memory and time of the three training stages for 2B, 7B and 72B on 8, 64 and 512 GPUs."""
    from . import plan

    recipe = plan.Recipe(
        mfu=mfu,
        peak_tflops=peak_tflops,
        memories=tuple(memory or plan.Recipe.memories),
        reserve=reserve,
        max_tokens=max_tokens,
        vision_share=vision_share,
        image_tokens=image_tokens,
        sample_tokens=sample_tokens,
        instruct_tokens=instruct_tokens,
    )
    print(plan.report(recipe), end="")


@app.command("ablation")
def ablation_(
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
    from . import ablation, plot

    if out is None and quick:
        raise typer.BadParameter("--quick needs --out: its numbers do not belong among the results", param_hint="out")
    torch.set_num_threads(processes)  # what results say: as many threads as there are at work
    console = Console(width=None if sys.stdout.isatty() else 200)
    device = environment.folder_name(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        result = ablation.measure(
            budget=budget,
            processes=processes,
            seeds=seeds,
            quick=quick,
            command=_command(),
            log=lambda line: console.print(line, style="dim", markup=False),
        )
    except GateError as error:
        console.print(str(error), style="bold red", markup=False)
        raise typer.Exit(1) from None
    ablation.show(result, console)
    console.print(f"written to {write(result, out or RESULTS / device)}", soft_wrap=True)
    if importlib.util.find_spec("matplotlib") is None:
        console.print("no figures: matplotlib is not installed", style="yellow")
        return
    for path in plot.draw(result, out or PAGE.parent / "plots" / device):
        console.print(f"written to {path}", soft_wrap=True)


@app.command("tune")
def tune_(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[PART]...", help="Only subjects whose name has one.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=64, help="Rows of the inputs.")] = 8192,
) -> None:
    """Time candidate launch configurations on this GPU beside those that ship."""
    from . import tune

    if (missing := tune.why_not()) is not None:
        raise typer.BadParameter(missing, param_hint="device")
    clock = Clock(torch.device("cuda"))
    for subject in tune.subjects(tokens):
        if not names or any(name in subject.name for name in names):
            trial = tune.tune(subject, clock)
            gain = trial.chosen_s / trial.best_s
            print(f"{trial.subject}: {1e6 * trial.chosen_s:.1f} us with {trial.chosen}", flush=True)
            print(
                f"  best {1e6 * trial.best_s:.1f} us ({gain:.2f}x) with {trial.best}; {trial.failed} do not fit",
                flush=True,
            )


#: Options that name a folder of this machine and change no number: left out of the command that results quote.
_PLACES = ("--checkpoint-dir", "--out")


def _command() -> str:
    words, given = [], iter(sys.argv[1:])
    for word in given:
        if word in _PLACES:
            next(given, None)
        elif not word.startswith(tuple(f"{option}=" for option in _PLACES)):
            words.append(word)
    return shlex.join(["python", "-m", "benchmarks", *words])


if __name__ == "__main__":
    app()
