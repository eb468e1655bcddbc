"""Sheets of what a model was shown, with question, answer and truth below."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw

from qwen2vl.samples.fonts import faces_for, font, typefaces

ANSWER, TRUTH = "#e6194b", "#3cb44b"  # the first two colours of draw_grounding
_WIDE = 1080  # pixels: the width of a sheet
_LEAST = 240  # pixels: the least width of a tile
_GAP = 16  # pixels between tiles
_POINTS = 15  # pixels: the size of the letters
_GREY, _RIGHT, _WRONG = "#777777", "#11772d", "#b3261e"


@dataclass(frozen=True)
class Answered:
    """One question, what the model answered, and what was right.

    Attributes:
        pictures: to look at, in the order they were shown, enlarged and marked.
        name: where in the demo's folder the media are, or which game it was.
        note: what else is to be said of the answer; "" for nothing.
        boxes: whether answer and truth are drawn into the picture, in `ANSWER` and `TRUTH`.
        seconds: for each answer that the model gave, from messages to text; a game takes several.
    """

    pictures: Sequence[Image.Image]
    name: str
    asked: str
    answer: str
    truth: str
    right: bool
    seconds: Sequence[float]
    note: str = ""
    boxes: bool = False


def enlarge(picture: Image.Image, scale: int) -> Image.Image:
    """Every pixel as a square of that side."""
    return picture.resize((scale * picture.width, scale * picture.height), Image.Resampling.NEAREST)


def fitting_scale(pictures: Sequence[Image.Image], *, lines: int, most: int) -> int:
    """The largest scale, up to `most`, at which the pictures side by side fill no more than so many lines."""
    return max(1, min(most, lines * (_WIDE - 100) // sum(picture.width for picture in pictures)))


def draw_sheet(answers: Sequence[Answered]) -> Image.Image:
    """All of them, side by side as far as there is room; RGB."""
    placed, x, y, high = [], _GAP, _GAP, 0
    for tile in map(_tile, answers):
        if x > _GAP and x + tile.width + _GAP > _WIDE:
            x, y, high = _GAP, y + high + _GAP, 0
        placed.append((tile, (x, y)))
        x, high = x + tile.width + _GAP, max(high, tile.height)
    sheet = Image.new("RGB", (_WIDE, y + high + _GAP), "white")
    for tile, place in placed:
        sheet.paste(tile, place)
    return sheet


def _tile(one: Answered) -> Image.Image:
    # Pictures in lines, as text is set.
    placed, x, y, high = [], 0, 0, 0
    for picture in one.pictures:
        if x and x + picture.width > _WIDE - 2 * _GAP:
            x, y, high = 0, y + high + 4, 0
        placed.append((picture, (x, y)))
        x, high = x + picture.width + 4, max(high, picture.height)
    wide = max(_LEAST, *(place[0] + picture.width for picture, place in placed))
    said = [(one.name, _GREY), (one.asked, "black"), (f"answer: {one.answer}", ANSWER if one.boxes else "black")]
    said += [(f"truth: {one.truth}", TRUTH if one.boxes else "black")]
    said += [(verdict(one), _RIGHT if one.right else _WRONG)]
    letters = font((*faces_for("ế"), *typefaces())[0], _POINTS)  # what the font lacks becomes a box
    lines = [(line, ink) for text, ink in said for line in _wrap(text, letters, wide)]
    step = _POINTS + 5
    tile = Image.new("RGB", (wide, y + high + 6 + step * len(lines)), "white")
    for picture, place in placed:
        tile.paste(picture, place)
    draw = ImageDraw.Draw(tile)
    for n, (line, ink) in enumerate(lines):
        draw.text((0, y + high + 6 + n * step), line, fill=ink, font=letters)
    return tile


def _wrap(text: str, letters: Any, wide: int) -> list[str]:
    length = letters.getlength(text)
    # By the width of its characters in the mean, with some room for lines that are wider.
    return textwrap.wrap(text, max(8, int(0.92 * wide * len(text) / length))) if length else [""]


def verdict(one: Answered) -> str:
    """ "right" or "wrong", and the note."""
    return ("right" if one.right else "wrong") + (f" ({one.note})" if one.note else "")
