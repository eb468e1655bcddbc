"""Coloured shapes on plain or noisy grounds, with the exact box of what was drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ..agents.grounding import Box
from .draws import Draws
from .words import COLOURS, SHAPES

Colour = tuple[int, int, int]

#: Background colours from light to dark; no thing has one of them.
GROUNDS: tuple[Colour, ...] = ((236, 236, 232), (214, 222, 232), (190, 196, 190), (128, 132, 138), (58, 62, 74))
#: The least distance in RGB of a thing's colour from its ground.
_APART = 90
#: Shapes are drawn this many times as large and then reduced, which smooths their edges.
_OVERSAMPLED = 4


@dataclass(frozen=True)
class Thing:
    """A shape that is drawn.

    Attributes:
        colour, shape: names among `COLOURS` and `SHAPES`.
        x, y, diameter: the upper left corner and the side of the square that it is drawn into, in pixels.
    """

    colour: str
    shape: str
    x: int
    y: int
    diameter: int

    @property
    def box(self) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) around the pixels that it covers by half; right and bottom lie behind the last."""
        left, top, right, bottom = _mask(self.shape, self.diameter)[1]
        return self.x + left, self.y + top, self.x + right, self.y + bottom

    def grounding_box(self, size: tuple[int, int]) -> Box:
        """The box in thousandths of a picture of `size`, its (width, height) in pixels."""
        return Box.from_pixels(*self.box, width=size[0], height=size[1])

    def to_dict(self) -> dict[str, Any]:
        """The attributes and the box, for a sample's `scene`."""
        return {**asdict(self), "box": list(self.box)}


@lru_cache(maxsize=4096)
def _mask(shape: str, diameter: int) -> tuple[Image.Image, tuple[int, int, int, int]]:
    """The share of every pixel that the shape covers (mode L), and the box around those that it covers by half."""
    side = _OVERSAMPLED * diameter
    image = Image.new("L", (side, side))
    draw = ImageDraw.Draw(image)
    if shape == "circle":
        draw.ellipse((0, 0, side - 1, side - 1), fill=255)
    elif shape == "square":
        margin = side // 16
        draw.rectangle((margin, margin, side - 1 - margin, side - 1 - margin), fill=255)
    elif shape == "cross":
        arm = side // 3
        draw.rectangle((arm, 0, side - 1 - arm, side - 1), fill=255)
        draw.rectangle((0, arm, side - 1, side - 1 - arm), fill=255)
    else:
        draw.polygon([(x * (side - 1), y * (side - 1)) for x, y in _OUTLINES[shape]], fill=255)
    image = image.reduce(_OVERSAMPLED)
    box = image.point([255 if value >= 128 else 0 for value in range(256)]).getbbox()
    assert box is not None, (shape, diameter)
    return image, box


def _star() -> list[tuple[float, float]]:
    points = []
    for n in range(10):
        radius = 0.5 if n % 2 == 0 else 0.21
        angle = math.pi * (n / 5 - 0.5)
        points.append((0.5 + radius * math.cos(angle), 0.53 + radius * math.sin(angle)))
    return points


def _heart() -> list[tuple[float, float]]:
    points = []
    for n in range(40):
        t = 2 * math.pi * n / 40
        x = math.sin(t) ** 3
        y = (13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 17
        points.append((0.5 + x / 2, 0.46 - y / 2))
    return points


_OUTLINES = {
    "triangle": [(0.5, 0.03), (1.0, 0.95), (0.0, 0.95)],
    "diamond": [(0.5, 0.0), (0.85, 0.5), (0.5, 1.0), (0.15, 0.5)],
    "star": _star(),
    "heart": _heart(),
}


def pick_ground(draws: Draws, colours: Sequence[str]) -> Colour:
    """A background that all of these colours stand out from."""
    good = [ground for ground in GROUNDS if all(_distance(ground, COLOURS[c]) >= _APART for c in colours)]
    return draws.pick(good)


def fitting_colours(ground: Colour) -> list[str]:
    """The names of the colours that stand out from a background."""
    return [name for name, colour in COLOURS.items() if _distance(ground, colour) >= _APART]


def _distance(a: Colour, b: Colour) -> float:
    return math.dist(a, b)


def draw_things(size: tuple[int, int], ground: Colour, things: Sequence[Thing]) -> Image.Image:
    """An RGB picture of `size`, (width, height) in pixels, with the things in it."""
    image = Image.new("RGB", size, ground)
    for thing in things:
        mask, _ = _mask(thing.shape, thing.diameter)
        image.paste(COLOURS[thing.colour], (thing.x, thing.y), mask)
    return image


def add_noise(draws: Draws, image: Image.Image, most: int = 10) -> Image.Image:
    """The picture with every value of every channel changed by at most `most`."""
    pixels = np.asarray(image).astype(np.int16)
    noise = draws.rng.integers(-most, most + 1, pixels.shape, dtype=np.int16)
    return Image.fromarray((pixels + noise).clip(0, 255).astype(np.uint8))


def scatter(
    draws: Draws, size: tuple[int, int], diameters: Sequence[int], *, gap: int = 2
) -> list[tuple[int, int, int]]:
    """(x, y, diameter) of squares inside the picture, at least `gap` pixels apart, made smaller until all fit."""
    wanted = [min(diameter, *(side - 2 for side in size)) for diameter in diameters]
    while True:
        placed: list[tuple[int, int, int]] = []
        for diameter in sorted(wanted, reverse=True):
            for _ in range(20):
                x, y = draws.between(1, size[0] - diameter - 1), draws.between(1, size[1] - diameter - 1)
                if all(
                    x + diameter + gap <= px or px + pd + gap <= x or y + diameter + gap <= py or py + pd + gap <= y
                    for px, py, pd in placed
                ):
                    placed.append((x, y, diameter))
                    break
            else:
                break
        if len(placed) == len(wanted):
            return [placed[i] for i in draws.rng.permutation(len(placed)).tolist()]
        wanted = [max(10, int(0.88 * diameter)) for diameter in wanted]


def random_thing(draws: Draws, size: tuple[int, int], colours: Sequence[str], diameters: tuple[int, int]) -> Thing:
    """A thing of one of the colours anywhere in the picture, its diameter between the two."""
    ((x, y, diameter),) = scatter(draws, size, [draws.between(*diameters)])
    return Thing(draws.pick(colours), draws.pick(SHAPES), x, y, diameter)
