"""Texts drawn in the fonts that surely are there: Pillow's own, and those that matplotlib brings.

Which strings are for evaluation alone is decided by :func:`is_held_out`: of all strings of two or more characters an
eighth, by their CRC-32. No training sample shows one of these as the text to read, compare, find or type. Single
characters are in both, or they could not be learned.
"""

from __future__ import annotations

import importlib.util
import logging
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from .sample import Draws
from .shapes import Colour

logger = logging.getLogger("qwen2vl.samples")

# Left out is what cannot be told apart where it stands alone: O and 0, I, l and 1, and small letters shaped like their
# capitals. Words have them all.
CLEAR = "0123456789ABCDEFGHJKLMNPQRSTUVWXYZ"
ALPHABET = CLEAR + "abdefghimnqrt"
# The word lists that follow are short common words; the held-out eighth of each is chosen by the rule above.
_ENGLISH = """
    air all and ant apple arm art ask ball bank bath bed bell bird blue boat book box boy bread bus cake call car cat
    chair city coat cold cow cup day desk dog door down duck ear east egg end eye face farm fire fish five food foot
    four fox game gate gift girl glass goat gold good green hand hat help home horse hot house ice ink jam key king kite
    lake lamp leaf left lemon light lion list lock long lost map milk mirror moon mouse music nail name nest net new
    night nine north note one open orange owl page paper park pen pig pink plan plate point pond queen rain red rice
    ring river road rock room rose run sail salt sand sea seed seven ship shoe shop six sky snow soap sock song soup
    south spoon star stop street sugar sun table tea ten three tiger time top town train tree two up van wall water
    way west white wind wolf wood yard year yes zoo
"""
_VIETNAMESE = """
    mẹ bố nhà cửa bàn ghế sách bút chó mèo gà vịt cá bò ngựa cây hoa quả nước lửa đất trời mưa nắng gió mây sông biển
    núi đường phố chợ trường lớp bạn thầy cơm phở bánh sữa trà muối đỏ xanh vàng trắng đen một hai ba bốn năm sáu bảy
    tám chín mười
"""
ENGLISH, VIETNAMESE = tuple(_ENGLISH.split()), tuple(_VIETNAMESE.split())

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
    """A font to draw with; without a path it is Pillow's own, Aileron. `vietnamese`: whether it has all its letters."""

    name: str
    path: str | None = None
    vietnamese: bool = False


@lru_cache(maxsize=1)
def typefaces() -> tuple[Typeface, ...]:
    """Those that are there, always in the same order."""
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
    font = ImageFont.truetype(path, 24, layout_engine=ImageFont.Layout.BASIC)
    missing = _pixels(font, "\uffff")
    return all(_pixels(font, letter) != missing for letter in set(text))


def _pixels(font: ImageFont.FreeTypeFont, text: str) -> bytes:
    image = Image.new("L", (40, 40))
    ImageDraw.Draw(image).text((4, 4), text, fill=255, font=font)
    return image.tobytes()


def faces_for(text: str) -> tuple[Typeface, ...]:
    """Those that have all its characters."""
    return typefaces() if text.isascii() else _vietnamese_faces()


@lru_cache(maxsize=1)
def _vietnamese_faces() -> tuple[Typeface, ...]:
    return tuple(face for face in typefaces() if face.vietnamese)


@lru_cache(maxsize=1024)
def font(face: Typeface, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    # The basic layout: the same glyphs in the same places whatever Pillow was built with.
    if face.path is None:
        return ImageFont.load_default(size)
    return ImageFont.truetype(face.path, size, layout_engine=ImageFont.Layout.BASIC)


def text_mask(face: Typeface, text: str, size: int) -> Image.Image:
    """Its ink, mode L, cropped to it."""
    used = font(face, size)
    left, top, right, bottom = used.getbbox(text)
    image = Image.new("L", (int(right - left) + 4, int(bottom - top) + 4))
    ImageDraw.Draw(image).text((2 - left, 2 - top), text, fill=255, font=used)
    return image.crop(image.getbbox())


def fitting_size(face: Typeface, text: str, wide: int, high: int) -> int:
    """The largest size of the font at which the text stays within so many pixels."""
    left, top, right, bottom = font(face, 40).getbbox(text)
    return int(40 * min(wide / (right - left), high / (bottom - top)))


def is_held_out(text: str) -> bool:
    """Whether training never shows it; see the module."""
    return len(text) > 1 and zlib.crc32(text.encode("utf-8")) % 8 == 0


def random_characters(draws: Draws, alphabet: str, count: int) -> str:
    """A string of one side: training, or evaluation where the draws are for that."""
    while True:
        text = "".join(draws.pick(alphabet) for _ in range(count))
        if count == 1 or is_held_out(text) == draws.held_out:
            return text


def random_word(draws: Draws, longest: int) -> str:
    """A word of one side: a third in Vietnamese where a font has it; English in small, capital or mixed letters."""
    vietnamese = bool(_vietnamese_faces()) and draws.chance(1 / 3)
    while True:
        word = draws.pick(VIETNAMESE if vietnamese else ENGLISH)
        word = (word, word.capitalize(), word.upper())[draws.between(0, 2)]
        if len(word) <= longest and is_held_out(word) == draws.held_out:
            return word


def random_text(draws: Draws, longest: int) -> str:
    """Characters or a word, at most so long, at least 3 for a word."""
    if longest >= 3 and draws.chance(0.5):
        return random_word(draws, longest)
    return random_characters(draws, ALPHABET, draws.between(1, longest))


def ink_and_ground(draws: Draws, *, dark_ink: bool = False) -> tuple[Colour, Colour]:
    """Two colours to read by, one dark and one light."""
    red, green, blue, *light = draws.rng.integers(0, 100, 6).tolist()
    dark, pale = (red, green, blue), (255 - light[0] // 2, 255 - light[1] // 2, 255 - light[2] // 2)
    return (dark, pale) if dark_ink or draws.chance(0.7) else (pale, dark)
