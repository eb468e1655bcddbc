"""``qwen2vl inspect``: what images and videos become, in numbers and in pictures."""

from __future__ import annotations

import json
import mimetypes
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..errors import install_hint
from ..media.options import MediaOptions
from .common import (
    AllowRemoteOption,
    FpsOption,
    MaxPixelsOption,
    MinPixelsOption,
    ModelOption,
    QuietOption,
    describe_media,
    explain,
    load_processor,
    notes,
    print_error,
    printable,
    progress_bar,
    video_options,
)
from .limits import LimitOption
from .stdin import check_stdin, read_stdin

if TYPE_CHECKING:
    import numpy as np

    from ..media.options import PatchShape
    from ..prompt.inputs import Inputs
    from ..prompt.processor import Processor

# Containers that not every system's table of media types knows.
_VIDEO_SUFFIXES = (
    ".mkv",
    ".webm",
    ".ts",
    ".m2ts",
    ".mts",
    ".m4v",
    ".flv",
    ".ogv",
    ".3gp",
    ".wmv",
    ".avi",
    ".mp4",
)


class Kind(StrEnum):
    """Choices of --as."""

    image = "image"
    video = "video"


def inspect(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="Images and videos; - is stdin.")],
    model: ModelOption = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="DIR", help="Save pictures and plots here.")
    ] = None,
    kind: Annotated[Kind | None, typer.Option("--as", help="Read files so; default by their names' endings.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a JSON list, one object per file; sizes are (height, width).")
    ] = False,
    min_pixels: MinPixelsOption = None,
    max_pixels: MaxPixelsOption = None,
    fps: FpsOption = MediaOptions.fps,
    allow_remote: AllowRemoteOption = False,
    limit: LimitOption = None,
    quiet: QuietOption = False,
) -> None:
    """Show what a media file becomes for a model: sizes, grid of patches, tokens.

    The numbers are those of generate with the same options. A file that cannot be read is reported, the others are
    shown, and the exit status is 1.

    With --out: for an image NAME-grid.png, its patches (thin lines) and tokens (thick lines); for a video
    NAME-frames.png, the frames kept; for both NAME-positions.png, the position ids of text, media, text.
    """
    from ..hub import Checkpoint

    notes.quiet = quiet
    check_stdin(files)
    checkpoint = None if model is None else Checkpoint.find(model, with_weights=False)
    processor = load_processor(
        checkpoint, min_pixels=min_pixels, max_pixels=max_pixels, allow_remote=allow_remote, limit=limit
    )
    how = None if checkpoint is None else checkpoint.config.quantization
    if how is not None:
        notes.print(f"[dim]{escape(f'{model} is quantised: {how.label}')}[/]")
    if model is None:
        notes.print(
            "[dim]sizes are those of the toy that answers where no --model is named; for a released checkpoint's: "
            "--model Qwen/Qwen2-VL-2B-Instruct[/]"
        )
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    options = video_options(min_pixels, max_pixels, fps)
    reports, failed = [], False
    for file, name in zip(files, _names(files), strict=True):
        what = kind or _kind(file)
        facts: dict[str, Any] = {"file": file, "kind": what.value, "quantization": how and how.label}
        try:
            inputs = _read(processor, file, what, options)
        except Exception as error:
            message = explain(error)
            if message is None:
                raise
            print_error(message if file in message and file != "-" else f"{file[:300]}: {message}")
            failed = True
            reports.append(facts | {"error": message})
            continue
        facts |= _describe(file, inputs)
        if out is not None:
            facts["pictures"] = [str(path) for path in save_pictures(out, name, inputs, processor.shape)]
        if not as_json:
            _print(facts)
        reports.append(facts)
    if as_json:
        print(json.dumps(reports, ensure_ascii=False))
    if failed:
        raise typer.Exit(1)


def _read(processor: Processor, file: str, kind: Kind, options: dict[str, Any]) -> Inputs:
    """The file read as generate reads it."""
    source = read_stdin() if file == "-" else file
    messages = [{"role": "user", "content": [{"type": kind.value, kind.value: source}]}]
    with progress_bar("reading video frames") as report:
        return processor(messages, progress=report, **options)


def _patches(inputs: Inputs) -> np.ndarray:
    """Those of the only image or video: (patches, values) uint8."""
    return inputs["pixel_values" if inputs.media[0].kind == "image" else "pixel_values_videos"].numpy()


def save_pictures(out: Path, name: str, inputs: Inputs, shape: PatchShape) -> list[Path]:
    """Write the pictures of inputs with one image or video into ``out``; returns their paths.

    Without matplotlib the plot of the position ids is left out, and said so on stderr.
    """
    from ..media import inspection

    info = inputs.media[0]
    sides = {"patch_size": shape.patch_size, "merge_size": shape.merge_size}
    frames = inspection.patches_to_frames(_patches(inputs), info.grid_thw, **sides)
    if info.kind == "image":
        first = out / f"{name}-grid.png"
        inspection.draw_patch_grid(frames[0], **sides).save(first)
    else:
        first = out / f"{name}-frames.png"
        times = info.frame_times
        times += times[-1:] * (len(frames) - len(times))  # an odd last frame stands twice
        tokens = info.num_tokens // info.grid_thw[0]
        inspection.draw_contact_sheet(
            frames, times, tokens_per_step=tokens, temporal_patch_size=shape.temporal_patch_size
        ).save(first)
    if find_spec("matplotlib") is None:
        notes.print(escape(f"no plot of position ids: it needs matplotlib; {install_hint('matplotlib')}"))
        return [first]
    plot = out / f"{name}-positions.png"
    inspection.plot_positions(
        plot,
        info.kind,
        info.grid_thw,
        title=f"M-RoPE position ids of an example: text, {name}, text",
        merge_size=shape.merge_size,
    )
    return [first, plot]


def _names(files: list[str]) -> list[str]:
    """A name for the pictures of each file: its stem, numbered where two files share one. No name comes twice."""
    files = ["stdin" if file == "-" else file for file in files]
    stems = [Path(file.rpartition("/")[2] or file).stem[:100] or "media" for file in files]
    # Compared without case: so do the file systems of some machines.
    keys = [stem.casefold() for stem in stems]
    taken = {key for key in keys if keys.count(key) == 1}
    names = []
    for stem, key in zip(stems, keys, strict=True):
        name, number = stem, 0
        while keys.count(key) > 1 and (number == 0 or name.casefold() in taken):
            number += 1
            name = f"{stem}-{number}"
        taken.add(name.casefold())
        names.append(name)
    return names


def _kind(file: str) -> Kind:
    guess = mimetypes.guess_type(file)[0] or ""
    video = guess.startswith("video/") or file.lower().endswith(_VIDEO_SUFFIXES) or file.startswith("data:video/")
    return Kind.video if video else Kind.image


def _describe(file: str, inputs: Inputs) -> dict[str, Any]:
    path, patches = Path(file), _patches(inputs)
    return {
        "file_bytes": path.stat().st_size if len(file) < 4096 and path.is_file() else None,
        **describe_media(inputs.media[0]),
        "patches": patches.shape[0],
        "patch_bytes": patches.nbytes,
    }


def _print(facts: dict[str, Any]) -> None:
    t, gh, gw = facts["grid_thw"]
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"[bold]{escape(printable(facts['file'][:300]))}[/]")
    table = Table(show_header=False, box=None, pad_edge=False, padding=(0, 3, 0, 2))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column()
    size = f"{facts['source_size'][1]} × {facts['source_size'][0]} pixels (width × height)"
    if facts["file_bytes"] is not None:
        size += f", {_bytes(facts['file_bytes'])}"
    table.add_row(facts["kind"], size)
    if facts["kind"] == "video":
        times = facts["frame_times"]
        table.add_row("duration", f"{facts['duration']:.2f} s at {facts['fps']:.2f} frames per second")
        shown = [f"{s:.2f}" for s in times]
        shown = shown if len(shown) <= 12 else [*shown[:6], "...", *shown[-3:]]
        table.add_row("frames kept", f"{len(times)}, at {', '.join(shown)} s")
    table.add_row("resized to", f"{facts['resized_size'][1]} × {facts['resized_size'][0]} (width × height)")
    table.add_row("grid", f"{t} × {gh} × {gw} (time × rows × columns) = {facts['patches']} patches")
    table.add_row("tokens", f"{facts['tokens']}, and 2 marks")
    table.add_row("patch data", f"{_bytes(facts['patch_bytes'])} (8-bit)")
    for picture in facts.get("pictures", ()):
        table.add_row("saved", escape(printable(picture)))
    console.print(table)


def _bytes(count: float) -> str:
    if count < 1000:
        return f"{count:.0f} bytes"
    power = min(3, (len(f"{count:.0f}") - 1) // 3)
    return f"{count / 1000**power:.1f} {('kB', 'MB', 'GB')[power - 1]}"
