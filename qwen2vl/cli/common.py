"""The parts that several commands share: options, loading, progress, and text that is safe to print."""

from __future__ import annotations

import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from importlib import metadata
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from typer.core import TyperCommand

from .. import assets
from ..errors import MediaWarning, Qwen2VLError
from . import ranks, threads
from .limits import in_flags, read_limits

if TYPE_CHECKING:
    from pathlib import Path

    from ..agents.answers import Located
    from ..generation import GenerationConfig
    from ..hub import Checkpoint
    from ..model import Qwen2VL
    from ..prompt.inputs import MediaInfo
    from ..prompt.processor import Processor

stderr = Console(stderr=True, highlight=False, soft_wrap=True)
#: What is said on stderr beside the answer; --quiet makes it silent, and leaves errors and warnings.
notes = Console(stderr=True, highlight=False, soft_wrap=True)

_PLACE = re.compile(r"^messages\[\d+\]\.content\[\d+\]: ")
_SLOW_SECONDS = 0.5
_CONTROL = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
_CONTROL |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


class DType(StrEnum):
    """Choices of --dtype."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="FOLDER|ID",
        help="Checkpoint folder, or hub id (Qwen/Qwen2-VL-2B-Instruct). Default: the small model that comes with "
        "qwen2vl.",
    ),
]
AdapterOption = Annotated[
    str | None,
    typer.Option("--adapter", metavar="FOLDER|ID", help="LoRA adapter in peft's layout, put beside the checkpoint."),
]
SystemOption = Annotated[str | None, typer.Option("--system", metavar="TEXT", help="System prompt.")]
#: The longest answer where neither --max-new-tokens nor the toy says otherwise.
MAX_NEW_TOKENS = 512
_SAMPLING = "Answer (what is not given, the checkpoint's generation_config.json decides)"
MaxNewTokensOption = Annotated[
    int | None,
    typer.Option(
        "--max-new-tokens",
        "-n",
        min=1,
        help=f"Longest answer. Default: {MAX_NEW_TOKENS}; {assets.MAX_NEW_TOKENS} without --model.",
        rich_help_panel=_SAMPLING,
    ),
]
TemperatureOption = Annotated[
    float | None,
    typer.Option("--temperature", min=0, help="0 takes the likeliest token.", rich_help_panel=_SAMPLING),
]
TopPOption = Annotated[
    float | None,
    typer.Option("--top-p", min=0, max=1, help="Keep this share of probability.", rich_help_panel=_SAMPLING),
]
TopKOption = Annotated[
    int | None,
    typer.Option("--top-k", min=0, help="Keep the k likeliest; 0 keeps all.", rich_help_panel=_SAMPLING),
]
SeedOption = Annotated[
    int | None, typer.Option("--seed", min=0, help="Makes sampling repeatable.", rich_help_panel=_SAMPLING)
]
RepetitionPenaltyOption = Annotated[
    float | None,
    typer.Option("--repetition-penalty", min=0.01, help="Above 1 avoids words used.", rich_help_panel=_SAMPLING),
]
StopOption = Annotated[
    list[str] | None,
    typer.Option("--stop", metavar="TEXT", help="End before this text; may be repeated.", rich_help_panel=_SAMPLING),
]
NumReturnSequencesOption = Annotated[
    int,
    typer.Option(
        "--num-return-sequences",
        metavar="N",
        min=1,
        help="As many answers to the prompt; more than one wants sampling.",
        rich_help_panel=_SAMPLING,
    ),
]
LogprobsOption = Annotated[
    int | None,
    typer.Option(
        "--logprobs",
        metavar="K",
        min=0,
        help="With --json: the log-probability of every token, and of the K likeliest in its place.",
        rich_help_panel=_SAMPLING,
    ),
]
#: The panel of what files of prompts are answered by.
MANY_PROMPTS = "Many prompts"
BATCH_TOKENS = 8192
BatchTokensOption = Annotated[
    int | None,
    typer.Option(
        "--batch-tokens",
        metavar="N",
        min=1,
        help=f"Most tokens that are answered at once. Default: {BATCH_TOKENS}.",
        rich_help_panel=MANY_PROMPTS,
    ),
]
_MEDIA = "Media"
MinPixelsOption = Annotated[
    int | None,
    typer.Option("--min-pixels", min=1, help="Least area of an image or video frame.", rich_help_panel=_MEDIA),
]
MaxPixelsOption = Annotated[
    int | None,
    typer.Option(
        "--max-pixels",
        min=1,
        help="Largest area of an image or video frame; 784 pixels are one token.",
        rich_help_panel=_MEDIA,
    ),
]
FpsOption = Annotated[
    float, typer.Option("--fps", min=1e-3, help="Video frames taken per second.", rich_help_panel=_MEDIA)
]
AllowRemoteOption = Annotated[
    bool, typer.Option("--allow-remote", help="Fetch media from http(s) URLs.", rich_help_panel=_MEDIA)
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Only errors and warnings on stderr.")]
_MACHINE = "Machine"
DeviceOption = Annotated[
    str | None,
    typer.Option("--device", help="cpu, cuda, cuda:1, ... Default: a GPU if there is one.", rich_help_panel=_MACHINE),
]
MaxVisionPatchesOption = Annotated[
    int | None,
    typer.Option(
        "--max-vision-patches",
        metavar="N",
        min=1,
        help="Patches that go through the vision tower at once, at least one image or video; default: all. "
        "Lower takes less memory.",
        rich_help_panel=_MACHINE,
    ),
]
DTypeOption = Annotated[
    DType | None, typer.Option("--dtype", help="Default: the checkpoint's.", rich_help_panel=_MACHINE)
]


class PlainFlags:
    """Beside a class of commands: flags take no value, and so no type of one stands behind them in the help."""

    def get_params(self, ctx: Any) -> Any:
        params = super().get_params(ctx)  # type: ignore[misc]
        for param in params:
            if getattr(param, "is_flag", False) and param.metavar is None:
                param.metavar = ""
        return params


class Command(PlainFlags, TyperCommand):
    """A command of ``qwen2vl``."""


class MediaOrderCommand(Command):
    """Remembers in which order --image and --video stood among each other, in ``ctx.meta["media_order"]``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not ctx.resilient_parsing:
            _, _, order = self.make_parser(ctx).parse_args(args=list(args))
            ctx.meta["media_order"] = [p.name for p in order if p.name in ("image", "video")]
        return super().parse_args(ctx, args)


def installed_version(package: str) -> str | None:
    """Version of an installed distribution, None where there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def explain(error: Exception, *, flags: bool = True) -> str | None:
    """The message for an error that comes from what the user gave or from the machine; None for any other.

    ``flags``: whether what it says about keywords is to be said of this command's flags.
    """
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return "out of memory: lower --max-pixels, give fewer images, or take --dtype bfloat16"
    if ranks.tells_of_another(error):
        return f"another process stopped ({str(error).splitlines()[0]})"
    if isinstance(error, Qwen2VLError):
        # In the words of the command line: the file is named anyway, and nobody wrote messages.
        said = _PLACE.sub("", str(error))
        return in_flags(said) if flags else said
    if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
        where = f"{error.filename}: " if error.filename is not None else ""
        return f"{where}{error.strerror or error}"
    if isinstance(error, (ValueError, TypeError)) and _raised_in(error) == "qwen2vl_kernels":
        return str(error)  # the kernels check what they are given, with errors of Python's own types
    return None


def _raised_in(error: Exception) -> str:
    """Name of the package whose code raised the error; "" where none did."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    return "" if place is None else place.tb_frame.f_globals.get("__name__", "").partition(".")[0]


def print_error(message: str) -> None:
    """``error: ...`` on stderr."""
    line = " ".join(message.split("\n"))
    stderr.print(f"[bold red]error:[/] {escape(printable(line, stderr.is_terminal))}")


@contextmanager
def media_warnings_as_lines() -> Iterator[None]:
    """Show every MediaWarning as ``warning: ...`` on stderr, without the place in the code that gave it."""
    with warnings.catch_warnings():
        show = warnings.showwarning

        def show_line(message: Any, category: Any, *where: Any, **more: Any) -> None:
            if not issubclass(category, MediaWarning):
                return show(message, category, *where, **more)
            line = " ".join(str(message).split("\n"))
            stderr.print(f"[bold yellow]warning:[/] {escape(printable(line, stderr.is_terminal))}")

        warnings.showwarning = show_line
        yield


def printable(text: str, terminal: bool | None = None) -> str:
    """Text as a terminal may see it: control characters, which a model may well write, made visible.

    ``terminal`` says whether one reads along; by default, whether stdout is one. Others get it as is.
    """
    return text.translate(_CONTROL) if (sys.stdout.isatty() if terminal is None else terminal) else text


@contextmanager
def progress_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """A callback (done, total) that draws a bar on stderr: on a terminal, and only of what takes a while."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=notes, transient=True)
    begin = time.monotonic()

    def report(done: int, total: int) -> None:
        if bar.task_ids:
            bar.update(bar.task_ids[0], completed=done, total=total)
        elif notes.is_terminal and not notes.quiet and done < total and time.monotonic() - begin > _SLOW_SECONDS:
            bar.start()
            bar.add_task(label, completed=done, total=total)

    try:
        yield report
    finally:
        if bar.task_ids:
            bar.stop()


def check_pixels(min_pixels: int | None, max_pixels: int | None) -> None:
    """A usage error where --min-pixels exceeds --max-pixels."""
    if min_pixels is not None and max_pixels is not None and min_pixels > max_pixels:
        raise typer.BadParameter(f"{min_pixels} is more than --max-pixels {max_pixels}", param_hint="--min-pixels")


def describe_places(found: Sequence[Located]) -> list[dict[str, Any]]:
    """The boxes of an answer as they stand in JSON."""
    return [
        {
            "label": one.label,
            "points": one.place.points,
            "pixels": one.pixels and corners(one.pixels),
            "media": one.media,
        }
        for one in found
    ]


def corners(pixels: Any) -> list[tuple[float, float]]:
    """A place's corners, of which a box has two."""
    points = pixels if isinstance(pixels[0], tuple) else (pixels[:2], pixels[2:])
    return [(round(x, 2), round(y, 2)) for x, y in points]


def load_processor(
    model: str | Checkpoint | None,
    *,
    min_pixels: int | None,
    max_pixels: int | None,
    allow_remote: bool,
    limit: Sequence[str] | None,
    base: Path | None = None,
) -> Processor:
    """The processor of --model, or for None of the small model that comes with the package."""
    check_pixels(min_pixels, max_pixels)
    from ..prompt.processor import Processor

    return Processor.from_pretrained(
        assets.folder() if model is None else model,
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        allow_remote=allow_remote,
        base=base,
        **read_limits(limit),
    )


def load(
    model: str | None,
    *,
    device: str | None,
    dtype: DType | None,
    min_pixels: int | None,
    max_pixels: int | None,
    allow_remote: bool,
    max_vision_patches: int | None,
    limit: Sequence[str] | None = None,
    adapter: str | None = None,
    base: Path | None = None,
) -> tuple[Qwen2VL, Processor]:
    """Model, with the adapter if one is given, and processor of --model; for None those of the small model that comes
    with the package. Of torchrun's processes only the first returns; see :mod:`qwen2vl.cli.ranks`."""
    from ..hub import Checkpoint
    from ..model import Qwen2VL

    check_pixels(min_pixels, max_pixels)
    parallel = ranks.join(device)

    def load_model() -> Qwen2VL:
        with progress_bar("loading tensors") as report:
            loaded = Qwen2VL.from_pretrained(
                checkpoint,
                device=device if parallel is None else None,
                dtype=None if dtype is None else dtype.value,
                progress=report,
                adapter=adapter,
                parallel=parallel,
            )
        loaded.max_vision_patches = max_vision_patches
        if loaded.device.type == "cpu":
            threads.choose(sum(parameter.numel() for parameter in loaded.parameters()))
        return loaded

    checkpoint = Checkpoint.find(assets.folder() if model is None else model)
    if parallel is not None and parallel.rank:
        notes.quiet = True
        ranks.follow(parallel, load_model)
    processor = load_processor(
        checkpoint, min_pixels=min_pixels, max_pixels=max_pixels, allow_remote=allow_remote, limit=limit, base=base
    )
    loaded = load_model()
    if parallel is not None:
        ranks.lead(parallel)
    return loaded, processor


def tell_who_answers(model: str | None) -> None:
    """One line on stderr where nobody named a --model, as the answers of a toy look like those of a model."""
    if model is None:
        notes.print(f"[dim]{assets.NOTICE}[/]")


def longest_answer(model: str | None, max_new_tokens: int | None) -> int:
    """The tokens of --max-new-tokens, or the default of what --model names."""
    if max_new_tokens is not None:
        return max_new_tokens
    return assets.MAX_NEW_TOKENS if model is None else MAX_NEW_TOKENS


def generation_config(
    model: Qwen2VL,
    *,
    max_new_tokens: int,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    seed: int | None,
    repetition_penalty: float | None,
    stop: list[str] | None,
    num_return_sequences: int | None = None,
    logprobs: int | None = None,
) -> GenerationConfig:
    """The checkpoint's generation_config.json under the options given, see `GenerationConfig.from_model`.

    A temperature of 0 takes the likeliest token, of which there is one whatever top_p and top_k keep.
    """
    from ..generation import GenerationConfig

    given: dict[str, Any] = {"max_new_tokens": max_new_tokens, "seed": seed, "stop": tuple(stop or ())}
    if not all(given["stop"]):
        raise typer.BadParameter("must not be empty", param_hint="--stop")
    given |= {"repetition_penalty": repetition_penalty, "num_return_sequences": num_return_sequences}
    given["logprobs"] = logprobs
    if temperature == 0:
        given["do_sample"] = False
    else:
        given |= {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    return GenerationConfig.from_model(model, **given)


def video_options(min_pixels: int | None, max_pixels: int | None, fps: float) -> dict[str, Any]:
    """How the options for media apply to videos, as keywords of the processor's call."""
    return {"video_min_pixels": min_pixels, "video_max_pixels": max_pixels, "fps": fps}


def describe_media(info: MediaInfo) -> dict[str, Any]:
    """What became of one image or video, as --json prints it: sizes are (height, width) in pixels, times in seconds."""
    facts: dict[str, Any] = {
        "source_size": list(info.source_size),
        "resized_size": list(info.resized_size),
        "grid_thw": list(info.grid_thw),
        "tokens": info.num_tokens,
    }
    if info.kind == "video":
        facts |= {"duration": info.duration, "fps": info.native_fps, "frame_times": list(info.frame_times)}
    return facts
