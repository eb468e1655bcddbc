"""Several questions about one picture, each in a turn of its own: the picture is encoded once, and learned from often.

Most of them ask about one of several things, which is found by its colour, its shape or what is written on it. One such
question a picture teaches little about looking things up: the answer is often right by chance, and all that the model
saw of the rest goes unused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from qwen2vl.agents.grounding import Box, Grounded, render_grounding
from qwen2vl.samples.draws import UNIT, Draws
from qwen2vl.samples.shapes import GROUNDS
from qwen2vl.samples.texts import random_text
from qwen2vl.samples.words import COLOURS, SHAPES, colour_name, kind_name, shape_name, thing_name

from .scenes import Mark, draw_some_things, ink_on, picture_size, write

#: The most questions about one picture.
TURNS = 5


def dialogue(draws: Draws) -> list[dict[str, Any]]:
    """Messages about a new picture, in one language, as :meth:`qwen2vl.Processor.supervised` takes them."""
    language = draws.language()
    size = picture_size(draws, (2, 5), (2, 5))
    ground = draws.pick(GROUNDS)
    texts = draws.pick((0, 0, 1, 2)) if size[1] >= 4 * UNIT else draws.pick((0, 0, 1)) if size[1] >= 3 * UNIT else 0
    room = (size[0], size[1] - texts * UNIT)
    image, things = draw_some_things(draws, size, room, ground)
    written: dict[str, Box] = {}
    for n in range(texts):
        text = random_text(draws, 6)
        top = room[1] + n * UNIT
        marks = write(draws, image, text, ink_on(ground), (0, top, size[0], top + UNIT))
        if text.lower() not in map(str.lower, written):
            written[text] = Box.from_pixels(*marks[0].whole, width=size[0], height=size[1])
    turns = draws.some(list(_questions(draws, language, things, written, size, texts)), TURNS)
    messages: list[dict[str, Any]] = []
    for asked, answer in turns:
        content: list[dict[str, Any]] = [{"type": "text", "text": asked}]
        if not messages:
            content.insert(0, {"type": "image", "image": np.asarray(image)})
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return messages


def _questions(
    draws: Draws, language: str, things: list[Mark], written: dict[str, Box], size: tuple[int, int], texts: int
) -> Iterator[tuple[str, str]]:
    """(question, answer) for everything that has one answer in this picture; counts are asked a few times only."""
    kinds: list[tuple[str, str]] = [(mark.names[0], mark.names[1]) for mark in things]
    colours, shapes = [colour for colour, _ in kinds], [shape for _, shape in kinds]
    yield draws.question("count all", language), str(len(things))
    for _ in range(2):
        by = draws.pick(("colour", "shape"))
        seen = draws.chance(0.7) and kinds
        colour, shape = draws.pick(kinds) if seen else (draws.pick(list(COLOURS)), draws.pick(SHAPES))
        number = colours.count(colour) if by == "colour" else shapes.count(shape)
        name = kind_name(colour if by == "colour" else None, shape if by == "shape" else None, language)
        yield draws.question("count", language, name), str(number)
    for mark, (colour, shape) in zip(things, kinds, strict=True):
        if shapes.count(shape) == 1:
            yield draws.question("colour of", language, shape_name(shape, language)), colour_name(colour, language)
        if colours.count(colour) == 1:
            yield draws.question("shape of", language, colour_name(colour, language)), shape_name(shape, language)
        if kinds.count((colour, shape)) == 1:
            name = thing_name(colour, shape, language)
            box = Box.from_pixels(*mark.box, width=size[0], height=size[1])
            yield draws.question("find", language, name), render_grounding(Grounded(name, (box,)))
    for text, box in written.items():
        yield draws.question("find text", language, text), render_grounding(Grounded(text, (box,)))
        if texts == 1:
            yield draws.question("read", language), text
