"""Fonts that are certainly there: Pillow's own, and those that matplotlib brings where it is installed."""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from .vocabulary import VIETNAMESE

#: The smallest size of a font in pixels; people find smaller ones hard to read, too.
LEAST_SIZE = 11
logger = logging.getLogger("qwen2vl.samples")

_FILES = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSansMono",
    "STIXGeneral",
    "STIXGeneralBol",
    "cmss10",
)


@dataclass(frozen=True)
class Typeface:
    """A font to draw with.

    Attributes:
        path: of the font's file; None for Pillow's own font, Aileron.
        vietnamese: whether the font has all letters of Vietnamese.
    """

    name: str
    path: str | None = None
    vietnamese: bool = False


@lru_cache(maxsize=1)
def typefaces() -> tuple[Typeface, ...]:
    """The fonts that are installed, always in the same order. Says in a warning where only Pillow's own is."""
    found = [Typeface("Aileron")]
    spec = importlib.util.find_spec("matplotlib")  # without importing it
    if spec is not None and spec.origin is not None:
        folder = Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf"
        for name in _FILES:
            path = folder / f"{name}.ttf"
            if path.is_file():
                found.append(Typeface(name, str(path), _has_letters(str(path), "".join(VIETNAMESE))))
    if len(found) == 1:
        logger.warning("matplotlib's fonts are not there: texts are drawn in Pillow's font alone, none in Vietnamese")
    return tuple(found)


def _has_letters(path: str, text: str) -> bool:
    """Whether no letter of the text is drawn as the box that stands for a missing one."""
    font = ImageFont.truetype(path, 24, layout_engine=ImageFont.Layout.BASIC)
    missing = _pixels(font, "\uffff")
    return all(_pixels(font, letter) != missing for letter in set(text))


def _pixels(font: ImageFont.FreeTypeFont, text: str) -> bytes:
    image = Image.new("L", (40, 40))
    ImageDraw.Draw(image).text((4, 4), text, fill=255, font=font)
    return image.tobytes()


def faces_for(text: str) -> tuple[Typeface, ...]:
    """The fonts that have all characters of an English or Vietnamese text."""
    return typefaces() if text.isascii() else vietnamese_faces()


@lru_cache(maxsize=1)
def vietnamese_faces() -> tuple[Typeface, ...]:
    """The fonts that have all letters of Vietnamese; none where only Pillow's own is installed."""
    return tuple(face for face in typefaces() if face.vietnamese)


@lru_cache(maxsize=1024)
def font(face: Typeface, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font at a size in pixels, with the basic layout: Pillow may be built with another, which moves glyphs."""
    if face.path is None:
        return ImageFont.load_default(size)
    return ImageFont.truetype(face.path, size, layout_engine=ImageFont.Layout.BASIC)


def text_mask(face: Typeface, text: str, size: int) -> Image.Image:
    """The text's ink as an image of mode L, cropped to the ink."""
    used = font(face, size)
    left, top, right, bottom = used.getbbox(text)
    image = Image.new("L", (int(right - left) + 4, int(bottom - top) + 4))
    ImageDraw.Draw(image).text((2 - left, 2 - top), text, fill=255, font=used)
    return image.crop(image.getbbox())


def fitting_size(face: Typeface, text: str, wide: int, high: int) -> int:
    """The largest size of the font at which the text stays within `wide` x `high` pixels."""
    left, top, right, bottom = font(face, 40).getbbox(text)
    return int(40 * min(wide / (right - left), high / (bottom - top)))
