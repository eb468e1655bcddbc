"""``qwen2vl eval``: accuracy on held-out generated samples."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..errors import install_hint
from .common import (
    AdapterOption,
    DeviceOption,
    DTypeOption,
    MaxPixelsOption,
    MinPixelsOption,
    ModelOption,
    QuietOption,
    load,
    notes,
    printable,
    progress_bar,
)

_PLOTS = (".png", ".svg")
_COUNT, _QUICK = 50, 4  # samples of a skill and difficulty


def evaluate(
    model: ModelOption = None,
    adapter: AdapterOption = None,
    skill: Annotated[
        list[str] | None, typer.Option("--skill", help="Only this one; may be repeated. Default: all.")
    ] = None,
    difficulty: Annotated[
        list[int] | None, typer.Option("--difficulty", help="Only this one, 0 to 4; may be repeated. Default: all.")
    ] = None,
    count: Annotated[
        int | None, typer.Option("--count", min=1, help=f"Samples of each skill and difficulty. Default: {_COUNT}.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help=f"Only {_QUICK} of each.")] = False,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Which samples.")] = 0,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Samples answered at once.")] = 16,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object in place of tables.")] = False,
    answers: Annotated[
        Path | None, typer.Option("--answers", metavar="FILE", help="Save every question and answer, one JSON a line.")
    ] = None,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Draw the accuracies (PNG, SVG).")] = None,
    min_pixels: MinPixelsOption = None,
    max_pixels: MaxPixelsOption = None,
    device: DeviceOption = None,
    dtype: DTypeOption = None,
    quiet: QuietOption = False,
) -> None:
    """Measure what a model makes of held-out generated samples: reading, shapes, counts, boxes, clips, screens.

    They are simple pictures, made on the spot, for small models trained on their like; for public benchmarks of
    released checkpoints see qwen2vl.evaluation.lmms_eval.
    """
    from ..samples import LEVELS, SKILLS, held_out

    notes.quiet = quiet
    for name, given, known in (("--skill", skill, tuple(SKILLS)), ("--difficulty", difficulty, LEVELS)):
        if wrong := [one for one in given or () if one not in known]:
            raise typer.BadParameter(f"{wrong[0]!r} is none of {', '.join(map(str, known))}", param_hint=name)
    if quick and count is not None:
        raise typer.BadParameter(f"is {_QUICK} of each; give one of the two", param_hint="--quick, --count")
    if plot is not None and find_spec("matplotlib") is None:
        raise typer.BadParameter(f"needs matplotlib; {install_hint('matplotlib')}", param_hint="--plot")
    # Wrong paths are refused before minutes of answering and not behind them.
    if plot is not None and plot.suffix not in _PLOTS:
        raise typer.BadParameter(f"wants {' or '.join(_PLOTS)}, got {plot.name!r}", param_hint="--plot")
    for name, path in (("--answers", answers), ("--plot", plot)):
        if path is not None and not path.absolute().parent.is_dir():
            raise typer.BadParameter(f"no folder {path.parent}", param_hint=name)
    loaded, processor = load(
        model,
        device=device,
        dtype=dtype,
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        allow_remote=False,
        max_vision_patches=None,
        adapter=adapter,
    )
    with progress_bar("answering") as progress:
        scored = held_out.evaluate(
            loaded,
            processor,
            skills=tuple(dict.fromkeys(skill or SKILLS)),
            difficulties=tuple(dict.fromkeys(difficulty or LEVELS)),
            count=_QUICK if quick else count or _COUNT,
            seed=seed,
            batch_size=batch_size,
            progress=progress,
        )
    report = held_out.report(scored)
    if as_json:
        print(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        _print(report)
    if answers is not None:
        answers.write_text("".join(json.dumps(vars(one), ensure_ascii=False) + "\n" for one in scored), "utf-8")
    if plot is not None:
        held_out.draw(scored, plot)


def _print(report: dict[str, Any]) -> None:
    console = Console(highlight=False)
    tables = (
        ("skill", "by_skill"),
        ("skill and difficulty", "by_difficulty"),
        ("skill and size of a picture", "by_size"),
        ("language", "by_language"),
    )
    for title, key in tables:
        table = Table(title=None)
        table.add_column(title)
        for name in ("samples", "accuracy", "other scores"):
            table.add_column(name, justify="right")
        for name, scores in report[key].items():
            others = {k: v for k, v in scores.items() if k not in ("samples", "accuracy")}
            more = "" if key == "by_language" else ", ".join(f"{k} {v:.2f}" for k, v in others.items())
            table.add_row(printable(name), str(scores["samples"]), f"{scores['accuracy']:.1%}", more)
        console.print(table)
