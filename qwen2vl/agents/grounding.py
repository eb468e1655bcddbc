"""Boxes and quadrilaterals in text, as Qwen2-VL reads and writes them.

A phrase and where it is (arXiv 2409.12191, section 2.2.1):

    <|object_ref_start|>the cat<|object_ref_end|><|box_start|>(120,88),(540,903)<|box_end|>

Coordinates are integers in [0, 1000): thousandths of the width and height of the original image, whatever it is
resized to. Several places of one phrase are several groups behind it, one place may stand without a phrase, and four
corners of text lines and signs stand between `<|quad_start|>` and `<|quad_end|>`. The markers are control tokens:
parse ``GenerationResult.raw_texts``, which hold them, or take ``GenerationResult.places``. Absolute pixels, which
Qwen2.5-VL has instead, are those of the *resized* image.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from ..config import MAX_PIXELS, MIN_PIXELS
from ..errors import GroundingError
from ..media.image import load_image, smart_resize
from ..prompt.tokenizer import GROUNDING_TOKENS

SCALE = 1000  # coordinates are in [0, SCALE)
REF_START, REF_END, BOX_START, BOX_END, QUAD_START, QUAD_END = GROUNDING_TOKENS

Point = tuple[int, int]


def to_thousandths(x: float, y: float, width: float, height: float) -> Point:
    """The point (x, y), in pixels of an image of width x height, in thousandths: rounded, half up, and held to
    [0, 1000). Raises GroundingError for a size that is not positive, or a coordinate that is no finite number."""
    _check_size(width, height)
    return _thousandth(x * SCALE / width, "x"), _thousandth(y * SCALE / height, "y")


def to_pixels(point: Point, width: float, height: float) -> tuple[float, float]:
    """A point in thousandths, in pixels of an image of width x height; `to_thousandths` gives the point back."""
    _check_size(width, height)
    return point[0] * width / SCALE, point[1] * height / SCALE


def render_point(point: Point) -> str:
    """`(x,y)`, as boxes, quadrilaterals and the points of an agent's actions are written."""
    return f"({_coordinate(point[0])},{_coordinate(point[1])})"


@dataclass(frozen=True)
class Box:
    """A rectangle: left, top, right, bottom in thousandths, integers in [0, 1000).

    Raises:
        GroundingError: a coordinate out of range or no int, or a right (lower) side left of (above) the other.
    """

    x1: int
    y1: int
    x2: int
    y2: int

    def __post_init__(self):
        for value in (self.x1, self.y1, self.x2, self.y2):
            _coordinate(value)
        if self.x2 < self.x1 or self.y2 < self.y1:
            raise GroundingError(f"box: wants x1 <= x2 and y1 <= y2, got {self.points}")

    @property
    def points(self) -> tuple[Point, ...]:
        """The upper left and the lower right corner."""
        return (self.x1, self.y1), (self.x2, self.y2)

    @classmethod
    def from_points(cls, points: Sequence[Point]) -> Box:
        """The box of any two opposite corners."""
        (ax, ay), (bx, by) = points
        return cls(min(ax, bx), min(ay, by), max(ax, bx), max(ay, by))

    @classmethod
    def from_pixels(cls, x1: float, y1: float, x2: float, y2: float, *, width: float, height: float) -> Box:
        """The box of two opposite corners in pixels; what lies outside of the image is drawn to its edge."""
        return cls.from_points([to_thousandths(x, y, width, height) for x, y in ((x1, y1), (x2, y2))])

    def to_pixels(self, *, width: float, height: float) -> tuple[float, float, float, float]:
        """(x1, y1, x2, y2) in pixels of an image of that size."""
        return (*to_pixels(self.points[0], width, height), *to_pixels(self.points[1], width, height))


@dataclass(frozen=True)
class Quad:
    """A quadrilateral: four corners (x, y) in thousandths, integers in [0, 1000), in the order they are written.

    Raises:
        GroundingError: not four corners, or a coordinate out of range or no int.
    """

    points: tuple[Point, ...]

    def __post_init__(self):
        if len(self.points) != 4:
            raise GroundingError(f"quad: wants 4 corners, got {len(self.points)}")
        for point in self.points:
            for value in point:
                _coordinate(value)

    @classmethod
    def from_pixels(cls, points: Sequence[tuple[float, float]], *, width: float, height: float) -> Quad:
        """The quadrilateral of four corners in pixels."""
        return cls(tuple(to_thousandths(x, y, width, height) for x, y in points))

    def to_pixels(self, *, width: float, height: float) -> tuple[tuple[float, float], ...]:
        """The four corners in pixels of an image of that size."""
        return tuple(to_pixels(point, width, height) for point in self.points)


@dataclass(frozen=True)
class Grounded:
    """A phrase and its places; `phrase` is None for places that stand alone, `places` empty for a mere mention."""

    phrase: str | None
    places: tuple[Box | Quad, ...] = ()


def render_grounding(items: Grounded | Iterable[Grounded]) -> str:
    """The exact markup, items side by side.

    Raises:
        GroundingError: an item without phrase and places, or a phrase that holds a marker.
    """
    return "".join(map(_render_item, [items] if isinstance(items, Grounded) else items))


def _render_item(item: Grounded) -> str:
    text = ""
    if item.phrase is not None:
        if found := [marker for marker in GROUNDING_TOKENS if marker in item.phrase]:
            raise GroundingError(f"phrase: must not hold the marker {found[0]}, got {item.phrase!r}")
        text = f"{REF_START}{item.phrase}{REF_END}"
    elif not item.places:
        raise GroundingError("grounded item: wants a phrase or a place, got neither")
    for place in item.places:
        start, end = (BOX_START, BOX_END) if isinstance(place, Box) else (QUAD_START, QUAD_END)
        text += start + ",".join(map(render_point, place.points)) + end
    return text


_MARKER = re.compile("(" + "|".join(map(re.escape, GROUNDING_TOKENS)) + ")")
_NUMBER = r"\s*([-+]?[0-9]+(?:\.[0-9]+)?)\s*"
_POINT = re.compile(rf"\({_NUMBER},{_NUMBER}\)")
_WHOLE_POINT = r"\s*\(\s*[0-9]{1,9}\s*,\s*[0-9]{1,9}\s*\)\s*"
_STRICT = {
    BOX_START: re.compile(rf"{_WHOLE_POINT},{_WHOLE_POINT}"),
    QUAD_START: re.compile(rf"{_WHOLE_POINT}(?:,{_WHOLE_POINT}){{3}}"),
}
_END = {REF_START: REF_END, BOX_START: BOX_END, QUAD_START: QUAD_END}


def parse_grounding(text: str, *, strict: bool = False) -> list[Grounded]:
    """Phrases and their places in an answer that was decoded with its special tokens.

    Places directly behind a phrase, or parted from it by spaces alone, are its places; others stand alone.

    Args:
        strict: refuse what is malformed, for checking what a model is to learn from. Spaces are allowed, a box wants
            two points with the upper left one first, a quadrilateral four, all coordinates integers in [0, 1000).
            Otherwise a model's slips are mended: corners are put in order, fractions rounded, coordinates held to the
            range, the points of one group taken in twos or fours; and what cannot be mended, such as a group that
            the end of the answer cuts, is left out.

    Raises:
        GroundingError: strict, and the markup is malformed; it says at which character.
    """
    pieces = _MARKER.split(text)  # markers are at the odd places
    found: list[tuple[str | None, list[Box | Quad]]] = []
    attached = False  # whether a place belongs to the last phrase
    position, n = len(pieces[0]), 1
    while n < len(pieces):
        marker, inside = pieces[n], pieces[n + 1]
        end = _END.get(marker)
        if end is None or n + 2 >= len(pieces) or pieces[n + 2] != end:
            if strict:
                wanted = f"a {end} next" if end else "its opening marker before it"
                raise GroundingError(f"grounding: {marker} at character {position} wants {wanted}")
            attached = False
            position, n = position + len(marker) + len(inside), n + 2
            continue
        if marker == REF_START:
            found.append((inside, []))
            attached = True
        else:
            places = _read_places(marker, inside, strict, position)
            if places and not attached:
                found.append((None, []))
                attached = True  # more groups beside it are its own places
            if places:
                found[-1][1].extend(places)
        between = pieces[n + 3]
        attached = attached and not between.strip()
        position, n = position + len(marker) + len(inside) + len(end) + len(between), n + 4
    return [Grounded(phrase, tuple(places)) for phrase, places in found]


def _read_places(marker: str, inside: str, strict: bool, position: int) -> list[Box | Quad]:
    points = [(float(x), float(y)) for x, y in _POINT.findall(inside)]
    size = 2 if marker == BOX_START else 4
    if strict:
        where = f"grounding: {marker} at character {position}"
        if not _STRICT[marker].fullmatch(inside):
            raise GroundingError(f"{where} wants {size} points (x,y) of integers, got {inside!r}")
        whole = [(int(x), int(y)) for x, y in points]
        try:
            return [Box(*whole[0], *whole[1]) if size == 2 else Quad(tuple(whole))]
        except GroundingError as error:
            raise GroundingError(f"{where}: {error}") from None
    held = [(_thousandth(x, "x"), _thousandth(y, "y")) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    groups = [held[i : i + size] for i in range(0, len(held) - size + 1, size)]
    return [Box.from_points(group) if size == 2 else Quad(tuple(group)) for group in groups]


def strip_grounding(text: str) -> str:
    """The answer as prose: phrases stay, places and markers go."""
    pieces = _MARKER.split(text)  # markers are at the odd places
    last = {marker: n for n, marker in enumerate(pieces) if n % 2}
    kept, n = [pieces[0]], 1
    while n < len(pieces):
        end = _END.get(pieces[n]) if pieces[n] != REF_START else None
        if end is not None and last.get(end, 0) > n:  # what no marker ends is no place
            while pieces[n] != end:
                n += 2
        kept.append(pieces[n + 1])
        n += 2
    return "".join(kept)


def parse_point(value: object) -> Point:
    """The point of an agent's action: "(x, y)", with or without markers and words around it, or a pair of numbers.

    Returns:
        (x, y) in thousandths, rounded and held to [0, 1000).

    Raises:
        GroundingError: no point, or more than one.
    """
    pair = _POINT.findall(value) if isinstance(value, str) else [value]
    point = pair[0] if len(pair) == 1 else None
    if not isinstance(point, (list, tuple)) or len(point) != 2:
        raise GroundingError(f"point: wants one (x, y), got {value!r}")
    x, y = map(float, point) if isinstance(value, str) else point
    if not (_is_number(x) and _is_number(y)):
        raise GroundingError(f"point: wants two numbers, got {value!r}")
    return _thousandth(x, "x"), _thousandth(y, "y")


def from_qwen_vl(text: str) -> str:
    """The markup of Qwen-VL, `<ref>phrase</ref><box>(x1,y1),(x2,y2)</box>` and `<quad>`, with Qwen2-VL's markers."""
    return _QWEN_VL.sub(lambda match: _QWEN_VL_MARKERS[match[0]], text)  # pyright: ignore[reportArgumentType]


_QWEN_VL_TAGS: tuple[str, ...] = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>")
_QWEN_VL_MARKERS = dict(zip(_QWEN_VL_TAGS, GROUNDING_TOKENS, strict=True))
_QWEN_VL = re.compile("|".join(_QWEN_VL_MARKERS))


def to_absolute(
    place: Box | Quad, height: int, width: int, *, min_pixels: int = MIN_PIXELS, max_pixels: int = MAX_PIXELS
) -> tuple[Point, ...]:
    """A place's points in Qwen2.5-VL's coordinates: integer pixels of the image as `smart_resize` makes it.

    Args:
        height, width: of the original image.
        min_pixels, max_pixels: the limits of the processor that resizes it.

    Raises:
        MediaError: `smart_resize` refuses the size.
    """
    high, wide = smart_resize(height, width, min_pixels=min_pixels, max_pixels=max_pixels)
    return tuple((_round(x * wide / SCALE), _round(y * high / SCALE)) for x, y in place.points)


def from_absolute(
    points: Sequence[tuple[float, float]],
    height: int,
    width: int,
    *,
    min_pixels: int = MIN_PIXELS,
    max_pixels: int = MAX_PIXELS,
) -> Box | Quad:
    """The inverse of `to_absolute`: a Box of two points, a Quad of four.

    Where the resized side has s pixels a coordinate comes back within 0.5 + 500 / s thousandths.

    Raises:
        GroundingError: neither two points nor four.
    """
    high, wide = smart_resize(height, width, min_pixels=min_pixels, max_pixels=max_pixels)
    held = tuple(to_thousandths(x, y, wide, high) for x, y in points)
    if len(held) not in (2, 4):
        raise GroundingError(f"points: wants 2 or 4, got {len(held)}")
    return Box.from_points(held) if len(held) == 2 else Quad(held)


def to_qwen25(items: Iterable[Grounded], height: int, width: int, **limits: int) -> list[dict[str, Any]]:
    """Qwen2.5-VL's JSON objects, one a box: `{"bbox_2d": [x1, y1, x2, y2], "label": phrase}`.

    Args:
        height, width, limits: see `to_absolute`.

    Raises:
        GroundingError: a quadrilateral, which that form has no word for.
    """
    entries = []
    for item in items:
        for place in item.places:
            if isinstance(place, Quad):
                raise GroundingError(f"quad {place.points}: Qwen2.5-VL's bbox_2d holds boxes only")
            corners = [value for point in to_absolute(place, height, width, **limits) for value in point]
            entries.append({"bbox_2d": corners} | ({} if item.phrase is None else {"label": item.phrase}))
    return entries


def from_qwen25(entries: Iterable[Mapping[str, Any]], height: int, width: int, **limits: int) -> list[Grounded]:
    """The inverse of `to_qwen25`; neighbours with the same label become one item.

    Raises:
        GroundingError: naming the entry that has no `bbox_2d` of four numbers or whose label is no str.
    """
    items: list[Grounded] = []
    for n, entry in enumerate(entries):
        corners = entry.get("bbox_2d")
        numbers = isinstance(corners, (list, tuple)) and len(corners) == 4 and all(map(_is_number, corners))
        if not numbers or corners is None:
            raise GroundingError(f"entries[{n}].bbox_2d: wants four numbers, got {corners!r}")
        label = entry.get("label")
        if label is not None and not isinstance(label, str):
            raise GroundingError(f"entries[{n}].label: wants a str, got {type(label).__name__}")
        box = from_absolute([(corners[0], corners[1]), (corners[2], corners[3])], height, width, **limits)
        if items and label is not None and items[-1].phrase == label:
            items[-1] = Grounded(label, (*items[-1].places, box))
        else:
            items.append(Grounded(label, (box,)))
    return items


_COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#808000")


def draw_grounding(image: object, items: Iterable[Grounded], *, width: int | None = None) -> Image.Image:
    """A copy of the image with every place outlined and its phrase beside it, a colour for each item.

    It is drawn on the pixels that the model sees before they are resized: upright, 8-bit RGB, transparency over white.

    Args:
        image: anything that `qwen2vl.media.image.load_image` takes: a PIL image, an array, a path, bytes.
        width: of the lines, in pixels; default: by the image's size.

    Raises:
        MediaError: the image cannot be read.
    """
    drawn = Image.fromarray(load_image(image))
    draw = ImageDraw.Draw(drawn)
    side = min(drawn.size)
    line, font = width or max(1, side // 200), ImageFont.load_default(max(10, side // 30))
    for n, item in enumerate(items):
        colour = _COLOURS[n % len(_COLOURS)]
        for place in item.places:
            points = [to_pixels(point, drawn.width, drawn.height) for point in place.points]
            if isinstance(place, Box):
                draw.rectangle([*points[0], *points[1]], outline=colour, width=line)
            else:
                draw.line([*points, points[0]], fill=colour, width=line, joint="curve")
            if item.phrase:
                _draw_label(draw, item.phrase, points, drawn.size, font, colour)
    return drawn


def _draw_label(draw: Any, phrase: str, points: Any, size: tuple[int, int], font: Any, colour: str) -> None:
    left, top = min(x for x, _ in points), min(y for _, y in points)
    _, _, wide, high = draw.textbbox((0, 0), phrase, font=font)
    # Above the place where there is room, else inside of it, and never beyond the right edge.
    at = (max(0, min(left, size[0] - wide - 4)), top - high - 4 if top >= high + 4 else top)
    draw.rectangle([at[0], at[1], at[0] + wide + 4, at[1] + high + 4], fill=colour)
    draw.text((at[0] + 2, at[1] + 2), phrase, font=font, fill="white")


def _round(value: float) -> int:
    return math.floor(value + 0.5)


def _thousandth(value: float, name: str) -> int:
    if isinstance(value, int):  # of any size: no float holds all that a model may write
        return max(0, min(SCALE - 1, value))
    if not math.isfinite(value):
        raise GroundingError(f"{name}: wants a finite number, got {value!r}")
    return max(0, min(SCALE - 1, _round(value)))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _coordinate(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < SCALE:
        raise GroundingError(f"coordinate: wants an int in [0, {SCALE}), got {value!r}")
    return value


def _check_size(width: float, height: float) -> None:
    if not (math.isfinite(width) and math.isfinite(height) and width > 0 and height > 0):
        raise GroundingError(f"size: wants a positive width and height, got {width!r} x {height!r}")
