"""``python -m qwen2vl.samples``: sheets of samples to look at, and how many one process makes a second."""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from ..agents.grounding import Grounded, draw_grounding
from ..errors import Qwen2VLError
from .sample import Sample
from .skills import LEVELS, SKILLS, generate

console = Console(highlight=False, soft_wrap=True)
_SCALE = 2  # pictures are shown this many times as large
_LINE = 14  # pixels: the height of a line of text below a picture


def sheets(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Sheets go here.")] = Path("samples_output"),
    count: Annotated[int, typer.Option("--count", min=1, help="Samples of each difficulty on a sheet.")] = 8,
    timed: Annotated[int, typer.Option("--timed", min=1, help="Samples of each that are timed.")] = 200,
    seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
    split: Annotated[str, typer.Option("--split", help="train or held-out")] = "train",
) -> None:
    """Write a PNG of samples and a text file of questions and answers for every skill; print the speed of one core."""
    columns = (Column(name, no_wrap=True) for name in ("difficulty", *map(str, LEVELS)))
    table = Table(*columns, title="samples/s, one process", box=None)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for skill in SKILLS:
            rows = [[generate(skill, n, seed=seed, index=i, split=split) for i in range(count)] for n in LEVELS]  # type: ignore[arg-type]
            _sheet(rows).save(out / f"{skill}.png")
            lines = [_said(sample) for row in rows for sample in row]
            (out / f"{skill}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
            table.add_row(skill, *(f"{_speed(skill, level, timed):,.0f}" for level in LEVELS))
    except (Qwen2VLError, OSError) as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"[bold red]error:[/] {escape(str(error))}")
        raise typer.Exit(1) from None
    console.print(table)
    console.print(f"sheets: {out}", markup=False)


def _said(sample: Sample) -> str:
    """A line with the sample's difficulty and index, its question and its answer."""
    asked = sample.record["messages"][0]["content"].replace("<image>", "").replace("<video>", "")
    return f"{sample.difficulty}.{sample.index}\t{asked}\t{sample.answer!r}"


def _speed(skill: str, level: int, count: int) -> float:
    """Samples a second of this process."""
    begin = time.process_time()
    for index in range(count):
        generate(skill, level, seed=1, index=index)
    return count / max(time.process_time() - begin, 1e-9)


def _sheet(rows: list[list[Sample]]) -> Image.Image:
    """All samples in one picture, each difficulty in rows of its own."""
    tiles = [[_tile(sample) for sample in row] for row in rows]
    wide = max(1400, *(tile.width for row in tiles for tile in row))
    placed, x, y, high = [], 0, 0, 0
    for row in tiles:
        for tile in row:
            if x + tile.width > wide:
                x, y, high = 0, y + high, 0
            placed.append((tile, x, y))
            x, high = x + tile.width, max(high, tile.height)
        x, y, high = 0, y + high + _LINE, 0
    sheet = Image.new("RGB", (wide, y), "white")
    for tile, left, top in placed:
        sheet.paste(tile, (left, top))
    return sheet


def _tile(sample: Sample) -> Image.Image:
    """A sample's pictures side by side with the true places drawn in, above question and answer if they are ASCII."""
    pictures = [Image.open(io.BytesIO(data)).convert("RGB") for data in sample.members.values()]
    pictures = [picture.resize((_SCALE * picture.width, _SCALE * picture.height), 0) for picture in pictures]
    if sample.places:
        # Without their phrases, which would cover small pictures.
        pictures[0] = draw_grounding(pictures[0], [Grounded(None, item.places) for item in sample.places])
    asked = _said(sample).split("\t")[1]
    answer = "" if sample.skill in ("point", "screen") else sample.answer
    lines = [f"{sample.difficulty}.{sample.index}", *(text for text in (asked, answer) if text.isascii())]
    wide = max(240, sum(picture.width + 4 for picture in pictures))
    high = max(picture.height for picture in pictures)
    tile = Image.new("RGB", (wide + 8, high + _LINE * (len(lines) + 2)), "white")
    x = 0
    for picture in pictures:
        tile.paste(picture, (x, 0))
        x += picture.width + 4
    ImageDraw.Draw(tile).multiline_text((0, high + 2), "\n".join(lines), fill="black", font=ImageFont.load_default(12))
    return tile


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(sheets)
    app()
