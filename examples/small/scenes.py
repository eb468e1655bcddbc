"""Pictures of which every mark is known: what the vision tower learns to see from, before it is asked anything.

A question has one short answer, and its gradient says little about a picture. Here everything that is drawn says what
it is, where it stands and which place it has in its text: a picture teaches as much as a dozen questions about it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

from PIL import Image, ImageDraw

from qwen2vl.samples.draws import UNIT, Draws, is_held_out_size
from qwen2vl.samples.fonts import LEAST_SIZE, Typeface, faces_for, fitting_size, font, text_mask, typefaces
from qwen2vl.samples.screen_game import LABELS, PAINTS, PALE, layout
from qwen2vl.samples.shapes import GROUNDS, Colour, Thing, draw_things, fitting_colours, scatter
from qwen2vl.samples.texts import ink_and_ground, random_characters, random_text
from qwen2vl.samples.vocabulary import ALPHABET
from qwen2vl.samples.words import SHAPES

from .shape import LIMITS

Box = tuple[float, float, float, float]
#: The most tokens of a picture.
MOST = LIMITS["max_pixels"] // UNIT**2
_WHITE: Colour = (255, 255, 255)


@dataclass(frozen=True)
class Mark:
    """A shape, or one character of a text.

    Attributes:
        names: what it is: (colour, shape), or (character,).
        box: (left, top, right, bottom) of its ink, in pixels.
        whole: that of the text that it belongs to; of a shape, its own.
        place: which character of the text it is, from 0; None for a shape.
    """

    names: tuple[str, ...]
    box: Box
    whole: Box
    place: int | None = None


def scene(draws: Draws) -> tuple[Image.Image, list[Mark]]:
    """A picture of at most `MOST` tokens and what is in it: a text, several, a page full of them, buttons, shapes, or
    shapes and texts.

    Its size and its texts are among those that training may show.
    """
    kind = draws.pick(
        ("text", "text", "text", "texts", "texts", "page", "page", "page", "buttons", "things", "things", "both")
    )
    if kind == "text":
        text = _some_text(draws, draws.pick((1, 1, 2, 3, 4, 5, 6, 6, 6, 8)))
        size = picture_size(draws, (2, 4), (2, 8)) if draws.chance(0.8) else (2 * UNIT, 2 * UNIT)
        ink, ground = ink_and_ground(draws)
        image = Image.new("RGB", size, ground)
        return image, write(draws, image, text, ink, (0, 0, size[0], size[1]))
    if kind == "texts":
        return _lines(draws)
    if kind == "page":
        return _page(draws)
    if kind == "buttons":
        return _buttons(draws)
    size = picture_size(draws, (2, 5), (2, 5))
    ground = draws.pick(GROUNDS)
    room = size
    if kind == "both" and size[1] >= 3 * UNIT:
        room = (size[0], size[1] - UNIT)
    image, marks = draw_some_things(draws, size, room, ground)
    if room != size:
        marks += write(draws, image, _some_text(draws, 6), ink_on(ground), (0, room[1], *size))
    return image, marks


def _some_text(draws: Draws, longest: int) -> str:
    if longest >= 3 and draws.chance(0.5):
        return random_text(draws, longest)
    return random_characters(draws, ALPHABET, longest)


def ink_on(ground: Colour) -> Colour:
    """Black or white, whichever stands out."""
    return (16, 16, 18) if sum(ground) > 450 else (250, 250, 250)


def picture_size(draws: Draws, rows: tuple[int, int], columns: tuple[int, int]) -> tuple[int, int]:
    """(width, height) in pixels of so many rows and columns of tokens, which training may show and the limits allow."""
    while True:
        high, wide = draws.between(*rows), draws.between(*columns)
        if high * wide <= MOST and (not is_held_out_size(high, wide) or (high, wide) == (2, 2)):
            return UNIT * wide, UNIT * high


def draw_some_things(
    draws: Draws, size: tuple[int, int], room: tuple[int, int], ground: Colour, count: int | None = None
) -> tuple[Image.Image, list[Mark]]:
    """A picture of `size` with `count` shapes, or none to eight, in its upper left part, `room`."""
    colours = fitting_colours(ground)
    count = draws.pick((0, 1, 1, 2, 3, 4, 5, 6, 7, 8)) if count is None else count
    largest = max(12, min(room) // (1 if count < 2 else 2 if count < 4 else 3))
    places = scatter(draws, room, [draws.between(12, min(largest, 50)) for _ in range(count)])
    same = draws.pick(colours) if draws.chance(0.2) else None
    things = [Thing(same or draws.pick(colours), draws.pick(SHAPES), *place) for place in places]
    return draw_things(size, ground, things), [Mark((t.colour, t.shape), t.box, t.box) for t in things]


def _lines(draws: Draws) -> tuple[Image.Image, list[Mark]]:
    """One to three texts below one another, as pictures that one of them is looked for in."""
    count = draws.between(1, 3)
    size = picture_size(draws, (max(2, count), 4), (3, 7))
    ink, ground = ink_and_ground(draws)
    image, high, marks = Image.new("RGB", size, ground), size[1] // count, []
    for n in range(count):
        marks += write(draws, image, random_text(draws, 6), ink, (0, n * high, size[0], (n + 1) * high), most=36)
    return image, marks


def _page(draws: Draws) -> tuple[Image.Image, list[Mark]]:
    """As many texts as there is room for, each line in a font and a size of its own."""
    size = picture_size(draws, (2, 5), (2, 7))
    ink, ground = ink_and_ground(draws)
    image, marks, y = Image.new("RGB", size, ground), [], draws.between(0, 6)
    usual = draws.between(LEAST_SIZE + 1, draws.pick((20, 32, 56, 90)))
    while True:
        points = max(LEAST_SIZE, usual + draws.between(-3, 3))
        x, high = draws.between(0, 10), 0
        while True:
            text = _some_text(draws, draws.between(1, 6))
            face = draws.pick(faces_for(text))
            mask = text_mask(face, text, points)
            if x + mask.width + 1 > size[0] or y + mask.height + 1 > size[1]:
                break
            image.paste(ink, (x, y), mask)
            marks += _characters(face, points, text, mask.size, (x, y))
            x, high = x + mask.width + draws.between(points // 2, 2 * points), max(high, mask.height)
        if not high:
            return image, marks
        y += high + draws.between(3, max(4, points // 2))


def _buttons(draws: Draws) -> tuple[Image.Image, list[Mark]]:
    """Two to four buttons; a button's whole is the button."""
    count = draws.between(2, 4)
    columns = 2 if count > 3 else draws.between(1, 2)
    size = (84, 84) if columns == 1 else (112, draws.pick((84, 112)))
    faces = [face for face in typefaces() if face.path is None or face.vietnamese]
    image, marks = Image.new("RGB", size, draws.pick((*PALE, _WHITE))), []
    paint, face, points = draws.pick(PAINTS), draws.pick(faces), draws.between(12, 13)
    pen = ImageDraw.Draw(image)
    labels = draws.some(LABELS, count) if draws.chance(0.6) else [random_text(draws, 5) for _ in range(count)]
    for control in layout(draws, labels, size, columns):
        label, (left, top, right, bottom) = control.label, control.box
        pen.rounded_rectangle((left, top, right - 1, bottom - 1), radius=4, fill=paint, outline=paint)
        own = face if label.isascii() else draws.pick(faces_for(label))
        mask = text_mask(own, label, points)
        at = (left + right - mask.width) // 2, (top + bottom - mask.height) // 2
        image.paste(_WHITE, at, mask)
        marks += _characters(own, points, label, mask.size, at, whole=control.box)
    return image, marks


def write(
    draws: Draws, image: Image.Image, text: str, ink: Colour, room: tuple[int, int, int, int], *, most: int = 96
) -> list[Mark]:
    """Write a text anywhere inside of `room`, in some font and size."""
    face = draws.pick(faces_for(text))
    wide, high = room[2] - room[0], room[3] - room[1]
    largest = max(LEAST_SIZE, min(fitting_size(face, text, wide - 6, high - 4), most))
    points = draws.between(max(LEAST_SIZE, int(draws.pick((0.3, 0.5, 0.8)) * largest)), largest)
    mask = text_mask(face, text, points)
    mask = mask.crop((0, 0, min(mask.width, wide - 2), min(mask.height, high - 2)))
    x = room[0] + draws.between(1, wide - mask.width - 1)
    y = room[1] + draws.between(1, high - mask.height - 1)
    image.paste(ink, (x, y), mask)
    return _characters(face, points, text, mask.size, (x, y))


def _characters(
    face: Typeface,
    points: int,
    text: str,
    size: Sequence[int],
    at: tuple[int, int],
    *,
    whole: Box | None = None,
) -> list[Mark]:
    """The characters of a text whose ink of so many pixels begins at `at`."""
    x, y = at
    box = (x, y, x + size[0], y + size[1])
    edges = [0.0, *accumulate(_advance(face, points, character) for character in text)]
    begin = font(face, points).getbbox(text[0])[0]
    edges = [min(max(edge - begin, 0), size[0]) for edge in edges]
    return [
        Mark((character,), (x + left, y, x + right, y + size[1]), whole or box, n)
        for n, (character, left, right) in enumerate(zip(text, edges, edges[1:], strict=False))
    ]


@lru_cache(maxsize=1 << 16)
def _advance(face: Typeface, points: int, character: str) -> float:
    """How far the next character stands from this one, without kerning, in pixels."""
    return font(face, points).getlength(character)
