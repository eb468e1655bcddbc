"""The parts that several commands share: options, loading, progress, and text that is safe to print."""

from __future__ import annotations

import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from importlib import metadata
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from typer.core import TyperCommand

from ..errors import CheckpointError, MediaWarning, Qwen2VLError

if TYPE_CHECKING:
    from ..generation import GenerationConfig
    from ..model import Qwen2VL
    from ..prompt.processor import Processor

stderr = Console(stderr=True, highlight=False, soft_wrap=True)

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
SystemOption = Annotated[str | None, typer.Option("--system", metavar="TEXT", help="System prompt.")]
_SAMPLING = "Answer (what is not given, the checkpoint's generation_config.json decides)"
MaxNewTokensOption = Annotated[
    int, typer.Option("--max-new-tokens", "-n", min=1, help="Longest answer.", rich_help_panel=_SAMPLING)
]
TemperatureOption = Annotated[
    float | None,
    typer.Option("--temperature", min=0, help="0 takes the likeliest token.", rich_help_panel=_SAMPLING),
]
TopPOption = Annotated[
    float | None,
    typer.Option("--top-p", min=1e-6, max=1, help="Keep this share of probability.", rich_help_panel=_SAMPLING),
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


class MediaOrderCommand(TyperCommand):
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


def explain(error: Exception) -> str | None:
    """The message for an error that comes from what the user gave or from the machine; None for any other."""
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return "out of memory: lower --max-pixels, give fewer images, or take --dtype bfloat16"
    if isinstance(error, Qwen2VLError):
        # In the words of the command line: the file is named anyway, and nobody wrote messages.
        return _PLACE.sub("", str(error)).replace("pass allow_remote=True", "give --allow-remote")
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
    bar = Progress(*columns, console=stderr, transient=True)
    begin = time.monotonic()

    def report(done: int, total: int) -> None:
        if bar.task_ids:
            bar.update(bar.task_ids[0], completed=done, total=total)
        elif stderr.is_terminal and done < total and time.monotonic() - begin > _SLOW_SECONDS:
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


def load(
    model: str | None,
    *,
    device: str | None,
    dtype: DType | None,
    min_pixels: int | None,
    max_pixels: int | None,
    allow_remote: bool,
    max_vision_patches: int | None,
) -> tuple[Qwen2VL, Processor]:
    """Model and processor of --model, or for None of the small model that comes with the package."""
    check_pixels(min_pixels, max_pixels)
    import torch

    from .. import assets
    from ..hub import Checkpoint
    from ..model import Qwen2VL
    from ..prompt.processor import Processor

    if device is not None:
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:  # torch's ways of saying that it has no such device
            raise Qwen2VLError(f"--device {device}: {str(error).splitlines()[0]}") from error
    checkpoint = Checkpoint.find(assets.folder() if model is None else model)
    processor = Processor.from_pretrained(
        checkpoint, min_pixels=min_pixels, max_pixels=max_pixels, allow_remote=allow_remote
    )
    with progress_bar("loading tensors") as report:
        loaded = Qwen2VL.from_pretrained(
            checkpoint, device=device, dtype=None if dtype is None else dtype.value, progress=report
        )
    loaded.max_vision_patches = max_vision_patches
    return loaded, processor


def tell_who_answers(model: str | None) -> None:
    """One line on stderr where nobody named a --model, as the answers of a toy look like those of a model."""
    if model is None:
        from ..assets import NOTICE

        stderr.print(f"[dim]{NOTICE}[/]")


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
) -> GenerationConfig:
    """The checkpoint's generation_config.json under the options given, see `GenerationConfig.from_model`.

    A temperature of 0 takes the likeliest token, of which there is one whatever top_p and top_k keep.
    """
    from ..generation import GenerationConfig

    given: dict[str, Any] = {"max_new_tokens": max_new_tokens, "seed": seed, "stop": tuple(stop or ())}
    if not all(given["stop"]):
        raise typer.BadParameter("must not be empty", param_hint="--stop")
    given["repetition_penalty"] = repetition_penalty
    if temperature == 0:
        given["do_sample"] = False
    else:
        given |= {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    try:
        return GenerationConfig.from_model(model, **given)
    except (ValueError, TypeError) as error:  # every option is in range by now
        raise CheckpointError(f"generation_config.json: {error}") from error


def video_options(min_pixels: int | None, max_pixels: int | None, fps: float) -> dict[str, Any]:
    """How the options for media apply to videos, as keywords of the processor's call."""
    return {"video_min_pixels": min_pixels, "video_max_pixels": max_pixels, "fps": fps}
