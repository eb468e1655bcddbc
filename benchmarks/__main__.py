"""``python -m benchmarks``: list cases, run them, report results, and calculate what training takes."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from . import environment, isolate, lines, page, readme, report
from .case import Context
from .lines import write
from .page import PAGE
from .run import RESULTS, case_names, load_case, run_case

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
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds at most, instead of as many as fit.")] = None,
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
    without: Annotated[list[str] | None, typer.Option(help="A contender to leave out; can be given again.")] = None,
) -> None:
    """Measure cases in processes of their own, and write a line for each workload as it ends.

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
    imports = tuple(dict.fromkeys(module for case in cases for module in case.imports))
    with (
        isolate.stopped_by_sigterm(),
        Context(where, quick, rounds, checkpoint_dir, tuple(without or ())) as context,
        isolate.Processes(imports) as processes,
    ):
        begun: list[isolate.Run] = []
        log = lambda text: console.print(text, style="dim", markup=False, soft_wrap=True)  # noqa: E731
        try:
            for name in chosen:
                try:
                    begun.append(isolate.begin(processes, name, context, out, _command(), limit))
                except RuntimeError as error:
                    console.print(str(error), style="bold red", markup=False, soft_wrap=True)
                    red = True
                    continue
                if not begun[-1].finish(log) or not begun[-1].plan["late"]:
                    red = not _collect(begun.pop().path, console) or red
            while begun:
                begun[0].finish(log, late=True)
                red = not _collect(begun.pop(0).path, console) or red
        finally:  # of a run that is being ended, what there is
            for each in begun:
                red = not _collect(each.path, console) or red
    if red:
        raise typer.Exit(1)


@app.command()
def checkpoints(
    folder: Annotated[Path, typer.Argument(help="Where run takes them from, as --checkpoint-dir.")],
    names: Annotated[list[str] | None, typer.Argument(metavar="[CASE]...", help="Default: those of models.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Those of small models.")] = False,
    device: Annotated[str | None, typer.Option(help="Makes the weights; default: cuda where there is one.")] = None,
) -> None:
    """Write the random checkpoints of the workloads of cases, so that no measurement waits for them."""
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    folder.mkdir(parents=True, exist_ok=True)
    with Context(where, quick, checkpoint_dir=folder) as context, torch.inference_mode():
        for name in names or ("model", "tower", "e2e", "load", "train"):
            for _ in load_case(name).workloads(context):
                pass  # naming a workload is what asks for its checkpoint
    written = sorted(path.name for path in folder.iterdir() if path.is_dir())
    print(f"{len(written)} checkpoints in {folder}: {', '.join(written)}")


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
    """Make the page of all results: tables, and figures as SVG (needs matplotlib); without options, README's too."""
    try:
        written = page.write(results, out)
        if (results, out) == (RESULTS, PAGE):
            written += readme.draw(results)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="results") from error
    print(f"written to {out}, and {len(written) - 1} figures")


@app.command("aot")
def aot(
    names: Annotated[list[str] | None, typer.Argument(metavar="[GROUP]...", help="Default: every group.")] = None,
    targets: Annotated[list[str] | None, typer.Option("--target", help="Default: every target.")] = None,
    tritons: Annotated[
        list[str] | None,
        typer.Option("--triton", help="Version installed in build/triton; default: the one that Python imports."),
    ] = None,
    failures_only: Annotated[bool, typer.Option("--failures", help="Print only what fails a gate.")] = False,
    further: Annotated[bool, typer.Option(help="Further forms of kernels that others show, too.")] = True,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes that compile; default one a core.")] = None,
    out: Annotated[Path | None, typer.Option("--json", help="Write what was found there, too.")] = None,
) -> None:
    """Compile every Triton kernel without a GPU and check what it became.

    Nothing may be spilled, no register read that some path has not written, shared memory must fit, global memory be
    accessed in wide words and the matrix units used. A gate that fails makes the exit status 1.
    """
    from . import aot as ahead

    try:
        if tritons:
            reports = [r for version in tritons for r in ahead.compile_with(version, names, targets, jobs, further)]
        else:
            reports = ahead.compile_all(names, targets, jobs, further)
    except (ValueError, RuntimeError) as error:
        raise typer.BadParameter(str(error)) from error
    if out is not None:
        ahead.write(reports, out)
    failed = [r for r in reports if r.failures]
    ahead.show(failed if failures_only else reports, Console(width=None if sys.stdout.isatty() else 200))
    print(f"{len(reports)} kernels compiled, {len(failed)} fail a gate")
    if failed:
        raise typer.Exit(1)


@app.command("sm90")
def sm90(
    heads: Annotated[list[int] | None, typer.Argument(metavar="[HEAD_DIM]...", help="Default: every width.")] = None,
    versions: Annotated[
        list[str] | None,
        typer.Option(
            "--ptxas", help="12.8, 12.9 or nvcc, for its own; can be given again. Default: all that are here."
        ),
    ] = None,
    tried: Annotated[bool, typer.Option("--tried", help="All that the tuner tries, not only what is built.")] = False,
    failures_only: Annotated[bool, typer.Option("--failures", help="Print only what fails a gate.")] = False,
    budget: Annotated[
        bool, typer.Option("--budget", help="Instead: cycles of a step, and the time that follows, of nvcc's code.")
    ] = False,
    cubins: Annotated[
        Path | None, typer.Option(help="Keep nvcc's machine code there, for a GPU elsewhere to load.")
    ] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes that compile; default one a core.")] = None,
) -> None:
    """Compile attention for Hopper without a GPU, by each ptxas that users have, and check what it became.

    Nothing may be spilled, no product wait for another; products and exponentials must be as many as the formula says
    and lie where they overlap. A gate that fails makes the exit status 1.
    """
    from .aot import budget as counted
    from .aot import hopper

    console = Console(width=None if sys.stdout.isatty() else 200)
    try:
        kernels = hopper.kernels(heads, tried)
        if budget:
            kernels = [one for one in kernels if not one.causal and one.dtype == torch.bfloat16]
        found = hopper.compile_all(kernels, [hopper.NVCC] if budget else versions, jobs, cubins)
    except (ValueError, RuntimeError) as error:
        raise typer.BadParameter(str(error)) from error
    failed = [one for one in found if one.failures]
    if budget:
        counted.show([one for one in found if not one.failures], console)
    if shown := failed if failures_only or budget else found:
        hopper.show(shown, console)
    print(f"{len(found)} kernels compiled, {len(failed)} fail a gate")
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


@app.command("tune")
def tune_(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[PART]...", help="Only subjects whose name has one.")
    ] = None,
    out: Annotated[
        Path, typer.Option(help="The JSON; each candidate's row goes to a .jsonl beside it at once.")
    ] = environment.ROOT / "build" / "tune.json",
    limit: Annotated[float | None, typer.Option(min=1.0, help="Seconds, after which what is measured counts.")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes that compile; default one a core.")] = None,
    compile_: Annotated[
        bool, typer.Option("--compile", help="Only compile the candidates, which a later call finds on disk.")
    ] = False,
    cubins: Annotated[
        Path | None, typer.Option(help="Folder of attention's kernels for Hopper that are not linked.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Tiny shapes and few candidates, to see that it works.")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu, with --quick, rehearses: Triton interprets there.")] = "cuda",
) -> None:
    """Time candidate launch configurations on this GPU beside those that ship."""
    from qwen2vl_kernels.core.launching import Target, reason, target_of

    from . import tune

    where = torch.device(device)
    if where.type == "cpu" and not quick:
        raise typer.BadParameter(
            "without --quick it takes a GPU: the interpreter's times say nothing", param_hint="device"
        )
    if (missing := reason("cuda")) is not None:
        raise typer.BadParameter(missing, param_hint="device")
    if where.type == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("PyTorch sees no CUDA device", param_hint="device")
    target = target_of(where) if where.type == "cuda" else Target("cuda", 90)
    console = Console(width=None if sys.stdout.isatty() else 200)
    rows = tune.Rows(None if compile_ else out.with_suffix(".jsonl"))
    search = tune.Search(
        where,
        target,
        quick=quick,
        limit=limit,
        jobs=jobs or os.cpu_count() or 1,
        cubins=cubins,
        rows=rows,
        log=lambda line: console.print(line, style="dim", markup=False),
    )

    def save(trials: list[tune.Trial]) -> None:
        tune.write(tune.result(trials, target, where, quick, _command()), out)

    try:
        if compile_:
            search.compile(search.trials(names or ()))
            return
        trials = search.run(names or (), save)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="part") from error
    finally:
        rows.close()
    save(trials)
    tune.show(tune.result(trials, target, where, quick, _command()), console)
    console.print(f"written to {out}", soft_wrap=True)
    if not any(trial.finals for trial in trials):
        raise typer.Exit(1)


@app.command("warm")
def warm_(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[GROUP]...", help="Default: every group of aot.")
    ] = None,
    target: Annotated[str, typer.Option(help="A target of aot; default: this machine's GPU.")] = "",
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes that compile; default one a core.")] = None,
) -> None:
    """Compile every kernel into Triton's cache, as calls at the released models' shapes launch it."""
    from .gpu import warm

    try:
        ready, failed = warm.warm(names, warm.named(target), jobs or os.cpu_count() or 1)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    for message in failed:
        print(message)
    print(f"{ready} launches compiled into Triton's cache, {len(failed)} calls failed")
    if failed:
        raise typer.Exit(1)


@app.command("gpu")
def gpu_(
    device: Annotated[str, typer.Option(help="cpu rehearses the same phases at small sizes.")] = "cuda",
    budget: Annotated[float, typer.Option(min=1.0, help="Seconds for all phases.")] = 480.0,
    out: Annotated[
        Path, typer.Option(help="Gets logs.tgz, with the results, summary.txt and summary.json.")
    ] = environment.ROOT / "build" / "gpu",
    work: Annotated[Path, typer.Option(help="Logs and results while they grow.")] = environment.ROOT
    / "build"
    / "gpu-work",
    wheels: Annotated[Path, typer.Option(help="Folder of peers' wheels.")] = environment.ROOT / "build" / "wheels",
    only: Annotated[list[str] | None, typer.Option(help="A phase; can be given again.")] = None,
) -> None:
    """Build, test, measure and tune on a GPU within minutes, the most telling first; names what did not fit.

    A part that fails makes the exit status 1.
    """
    from . import gpu

    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("PyTorch sees no CUDA device", param_hint="device")
    print(f"{environment.device_name(torch.device(device))}, torch {torch.__version__}, {budget:g} s", flush=True)
    with isolate.stopped_by_sigterm():
        try:
            session = gpu.run(device, budget, out, work, wheels, only, say=lambda text: print(text, flush=True))
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="only") from error
    print("\n".join(["", *session.summary(), f"packed into {out / 'logs.tgz'}"]))
    if session.failed():
        raise typer.Exit(1)


@app.command("wgmma")
def wgmma_(
    build: Annotated[bool, typer.Option("--build", help="Only compile it, which takes nvcc and no GPU.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Two rounds of three widths, to see that it works.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder of the JSON; default benchmarks/results/<device>.")] = None,
) -> None:
    """Measure warpgroup matrix products by width on a Hopper card; says why it does not where there is none."""
    from . import wgmma

    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not build and (missing := wgmma.why_not(where)) is not None:
        print(f"not measured: {missing}")
        return
    if out is None and quick:
        raise typer.BadParameter("--quick needs --out: its numbers do not belong among the results", param_hint="out")
    console = Console(width=None if sys.stdout.isatty() else 200)
    widths = wgmma.QUICK_WIDTHS if quick else wgmma.WIDTHS
    try:
        library = wgmma.build(environment.ROOT / "build" / "wgmma", widths)
        if build:
            print(f"built {library}")
            return
        with Context(device=where, quick=quick) as context:
            result = run_case(wgmma.case(wgmma.Library(library), widths), context, _command())
    except wgmma.BuildError as error:
        console.print(str(error), style="bold red", markup=False)
        raise typer.Exit(1) from None
    console.print(wgmma.table(result))
    for message in result["red"]:
        console.print(message, style="bold red", markup=False)
    console.print(f"written to {write(result, out or RESULTS / environment.folder_name(where))}", soft_wrap=True)
    if result["red"]:
        raise typer.Exit(1)


def _command() -> str:
    return environment.command("benchmarks")


if __name__ == "__main__":
    app()
