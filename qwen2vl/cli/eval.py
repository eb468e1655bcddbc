"""``qwen2vl eval``: accuracy on held-out generated samples, or a published metric on a file of questions."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice, product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..errors import Qwen2VLError, install_hint
from ..files import open_regular
from ..media.options import MediaOptions
from .common import (
    BATCH_TOKENS,
    MANY_PROMPTS,
    AdapterOption,
    BatchTokensOption,
    DeviceOption,
    DTypeOption,
    FpsOption,
    MaxNewTokensOption,
    MaxPixelsOption,
    MinPixelsOption,
    ModelOption,
    QuietOption,
    SystemOption,
    load,
    longest_answer,
    notes,
    printable,
    progress_bar,
    tell_who_answers,
    video_options,
)
from .limits import LimitOption

if TYPE_CHECKING:
    from ..model import Qwen2VL
    from ..prompt.processor import Processor
    from ..samples.held_out import Scored

_PLOTS = (".png", ".svg")
_COUNT, _QUICK = 50, 4  # samples of a skill and difficulty
_BATCH_SIZE = 16


def evaluate(
    model: ModelOption = None,
    adapter: AdapterOption = None,
    skill: Annotated[
        list[str] | None, typer.Option("--skill", help="Only this one; may be repeated. Default: all.")
    ] = None,
    difficulty: Annotated[
        list[int] | None, typer.Option("--difficulty", help="Only this one, 0 to 4; may be repeated. Default: all.")
    ] = None,
    language: Annotated[
        list[str] | None,
        typer.Option("--language", help="Of questions: en, zh, ko, ar, vi; may be repeated. Default: all."),
    ] = None,
    count: Annotated[
        int | None, typer.Option("--count", min=1, help=f"Samples of each skill and difficulty. Default: {_COUNT}.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help=f"Only {_QUICK} of each.")] = False,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Which samples. Default: 0.")] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", min=1, help=f"Samples answered at once. Default: {_BATCH_SIZE}.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object in place of tables.")] = False,
    answers: Annotated[
        Path | None,
        typer.Option(
            "--answers",
            metavar="FILE",
            dir_okay=False,
            help="Write every answer as it comes, one JSON a line; a file that is there is gone on with.",
        ),
    ] = None,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Draw the accuracies (PNG, SVG).")] = None,
    task: Annotated[
        Path | None,
        typer.Option(
            "--task",
            metavar="FILE",
            exists=True,
            dir_okay=False,
            help="In place of samples: a question with its answer a line, as JSON; relative paths begin at its folder.",
            rich_help_panel=MANY_PROMPTS,
        ),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option("--metric", metavar="NAME", help="What --task is scored by.", rich_help_panel=MANY_PROMPTS),
    ] = None,
    system: SystemOption = None,
    max_new_tokens: MaxNewTokensOption = None,
    batch_tokens: BatchTokensOption = None,
    fps: FpsOption = MediaOptions.fps,
    min_pixels: MinPixelsOption = None,
    max_pixels: MaxPixelsOption = None,
    limit: LimitOption = None,
    device: DeviceOption = None,
    dtype: DTypeOption = None,
    quiet: QuietOption = False,
) -> None:
    """Measure a model on generated samples, or with --task on a file of questions by a published metric.

    The samples are simple pictures (reading, shapes, counts, boxes, clips, screens), made on the spot and held out, for
    small models trained on their like. Benchmarks of released checkpoints are files for --task, or run in lmms-eval
    (qwen2vl.evaluation.lmms_eval).
    """
    from ..evaluation.tasks import METRICS
    from ..samples import LEVELS, SKILLS, held_out
    from ..samples.words import LANGUAGES

    notes.quiet = quiet
    for_samples = {"--skill": skill, "--difficulty": difficulty, "--language": language, "--count": count,
                   "--quick": quick or None, "--seed": seed, "--batch-size": batch_size, "--plot": plot}  # fmt: skip
    for_tasks = {"--metric": metric, "--system": system, "--max-new-tokens": max_new_tokens,
                 "--batch-tokens": batch_tokens, "--fps": None if fps == MediaOptions.fps else fps}  # fmt: skip
    for name, given in (for_tasks if task is None else for_samples).items():
        if given is not None:
            raise typer.BadParameter("wants --task" if task is None else "does not go with --task", param_hint=name)
    if task is not None and metric not in METRICS:
        got = "" if metric is None else f", got {metric!r}"
        raise typer.BadParameter(f"wants one of {', '.join(METRICS)}{got}", param_hint="--metric")
    if task is not None and answers is not None and answers.exists() and answers.samefile(task):
        raise typer.BadParameter("is the file of the questions", param_hint="--answers")
    choices = (
        ("--skill", skill, tuple(SKILLS)),
        ("--difficulty", difficulty, LEVELS),
        ("--language", language, tuple(LANGUAGES)),
    )
    for name, given, known in choices:
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
    rows = [] if task is None or metric is None else _read_task(task, metric)
    loaded, processor = load(
        model,
        device=device,
        dtype=dtype,
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        allow_remote=False,
        max_vision_patches=None,
        limit=limit,
        adapter=adapter,
        base=None if task is None else task.absolute().parent,
    )
    if task is not None and metric is not None:
        from ..generation import GenerationConfig

        tell_who_answers(model)
        config = GenerationConfig.from_model(
            loaded, max_new_tokens=longest_answer(model, max_new_tokens), do_sample=False
        )
        asked = {"config": config, "batch_tokens": batch_tokens or BATCH_TOKENS, "system": system,
                 "options": video_options(min_pixels, max_pixels, fps)}  # fmt: skip
        with TemporaryDirectory() as folder:
            out = answers or Path(folder) / "answers.jsonl"
            found = _run_task(loaded, processor, task, out, metric, rows, asked)
        print(json.dumps(found, indent=2, ensure_ascii=False)) if as_json else _print_task(found)
        if found["errors"]:
            notes.print(f"{found['errors']} of {found['questions']} questions have an error and count as unanswered")
            raise typer.Exit(1)
        return
    which = _Which(
        tuple(dict.fromkeys(skill or SKILLS)),
        tuple(dict.fromkeys(difficulty or LEVELS)),
        tuple(dict.fromkeys(language or LANGUAGES)),
        _QUICK if quick else count or _COUNT,
        seed or 0,
    )
    scored = _run_samples(loaded, processor, which, batch_size or _BATCH_SIZE, answers)
    report = held_out.report(scored)
    if as_json:
        print(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        _print(report)
    if plot is not None:
        held_out.draw(scored, plot)


@dataclass(frozen=True)
class _Which:
    """The samples of a run, in their order."""

    skills: Sequence[str]
    difficulties: Sequence[int]
    languages: Sequence[str]
    count: int
    seed: int

    def places(self) -> Iterator[dict[str, Any]]:
        """What tells each sample from all others; it stands in its line of --answers."""
        for skill, difficulty, index in product(self.skills, self.difficulties, range(self.count)):
            yield {"skill": skill, "difficulty": difficulty, "seed": self.seed, "index": index, **self._drawn_from()}

    def _drawn_from(self) -> dict[str, Any]:
        """The languages, where they are not all: samples are then others."""
        from ..samples.words import LANGUAGES

        return {} if self.languages == tuple(LANGUAGES) else {"languages": list(self.languages)}

    def take_up(self, answers: Path) -> list[Scored]:
        """The samples that a file holds already; a line that was cut off is taken off it. Raises Qwen2VLError for one
        that holds anything but the first samples of this run."""
        from ..samples.held_out import Scored
        from .lines import MAX_LINE

        if not answers.exists():
            return []
        found, whole = [], 0
        places = self.places()
        with open_regular(answers, update=True) as file:
            while line := file.readline(MAX_LINE + 1):
                if not line.endswith(b"\n") and len(line) <= MAX_LINE:
                    break
                place = next(places, None)
                try:
                    held = json.loads(line)
                    where = {name: held[name] for name in ("skill", "difficulty", "seed", "index")}
                    del held["seed"], held["index"]
                    if "languages" in held:
                        where["languages"] = held.pop("languages")
                    one = Scored(**held | {"size": tuple(held["size"])})
                except (ValueError, TypeError, KeyError, RecursionError):
                    where, one = None, None
                if one is None or where != place:
                    raise Qwen2VLError(
                        f"{answers}: line {len(found) + 1} is no answer to that sample of this run: name another file, "
                        "or the options that it was begun with"
                    )
                found.append(one)
                whole = file.tell()
            file.truncate(whole)
        return found


def _run_samples(
    model: Qwen2VL, processor: Processor, which: _Which, batch_size: int, answers: Path | None
) -> list[Scored]:
    """Ask the samples that have no answer in a file yet, and write each there as it comes."""
    from ..samples import held_out

    known = [] if answers is None else which.take_up(answers)
    places = islice(which.places(), len(known), None)
    with ExitStack() as stack:
        progress = stack.enter_context(progress_bar("answering"))
        file = None if answers is None else stack.enter_context(answers.open("a", encoding="utf-8"))

        def write(one: Scored) -> None:
            if file is not None:
                file.write(json.dumps(next(places) | vars(one), ensure_ascii=False) + "\n")
                file.flush()  # so that a kill loses no answer

        return held_out.evaluate(
            model,
            processor,
            skills=which.skills,
            difficulties=which.difficulties,
            count=which.count,
            seed=which.seed,
            languages=which.languages,
            batch_size=batch_size,
            progress=progress,
            known=known,
            on_scored=write,
        )


def _read_task(task: Path, metric: str) -> list[dict[str, Any]]:
    """What each line has for the metric. Raises Qwen2VLError for what would make a line, or all together, no score."""
    from ..evaluation.tasks import check_row, metric_keys, score_answers
    from .lines import read_beside

    rows = []
    for n, row in enumerate(read_beside(task, metric_keys(metric)), 1):
        try:
            check_row(metric, row)
        except Qwen2VLError as error:
            raise Qwen2VLError(f"{task.name}:{n}: {error}") from error
        rows.append(row)
    if not rows:
        raise Qwen2VLError(f"{task.name}: wants at least one question")
    score_answers(metric, rows, [{"text": ""}] * len(rows))
    return rows


def _run_task(
    model: Qwen2VL,
    processor: Processor,
    task: Path,
    out: Path,
    metric: str,
    rows: Sequence[dict[str, Any]],
    asked: dict[str, Any],
) -> dict[str, Any]:
    """Ask what has no answer in ``out`` yet, and score all that is there."""
    from ..evaluation.tasks import metric_keys, score_answers
    from .lines import answer_file

    with progress_bar("answering") as progress:
        _, failed = answer_file(model, processor, task, out, progress=progress, keys=metric_keys(metric), **asked)
    with out.open(encoding="utf-8") as file:
        found = score_answers(metric, rows, [json.loads(line) for line in file])
    return {"task": str(task), "metric": metric, "questions": len(rows), "errors": failed, **found}


def _print_task(found: dict[str, Any]) -> None:
    table = Table(title=None)
    table.add_column(printable(found["metric"]))
    names = list(found["scores"])
    for name in ("questions", *names):
        table.add_column(name, justify="right")
    rows = {"all": {"questions": found["questions"], **found["scores"]}, **found.get("by_category", {})}
    for title, scores in rows.items():
        table.add_row(printable(title), str(scores["questions"]), *(f"{scores[name]:.4f}" for name in names))
    Console(highlight=False).print(table)


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
