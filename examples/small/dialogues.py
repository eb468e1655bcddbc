"""Several questions about one picture, each in a turn of its own: the picture is encoded once, and learned from often.

Most of them ask about one of several things, which is found by its colour, its shape or what is written on it. One such
question a picture teaches little about looking things up: the answer is often right by chance, and all that the model
saw of the rest goes unused. So every one of several texts is looked for, every button of a screen is tapped, and two
pictures are compared in all ways. What an answer is about is known, so that a model can be taught where to look for it,
too (see :mod:`examples.small.looking`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image

from qwen2vl.agents.function_calls import Call, Result, Step, render_turn
from qwen2vl.agents.grounding import Box, Grounded, render_grounding, to_thousandths
from qwen2vl.samples.comparing import compare
from qwen2vl.samples.draws import UNIT, Draws
from qwen2vl.samples.pointing import point
from qwen2vl.samples.questions import SCREEN
from qwen2vl.samples.sample import Sample, from_ppm
from qwen2vl.samples.screen_game import SYSTEM, TAP, make_game
from qwen2vl.samples.shapes import GROUNDS
from qwen2vl.samples.texts import ink_and_ground, random_text
from qwen2vl.samples.words import (
    COLOURS,
    DIFFERENCES,
    SHAPES,
    YES_NO,
    colour_name,
    kind_name,
    shape_name,
    thing_name,
)

from .scenes import Mark, draw_some_things, ink_on, picture_size, write

#: The most questions about one picture.
TURNS = 5


@dataclass(frozen=True)
class Look:
    """Where the answer is to be found.

    Attributes:
        places: (number of the picture, box) of each thing that it is about.
        how: "one": all of the answer, or its coordinates where it has some, is about all of the places; "counted": it
            is their number; "spelled": each of its characters is at a place of its own.
        name: what the answer calls them, where it does.
    """

    places: tuple[tuple[int, Box], ...] = ()
    how: Literal["one", "counted", "spelled"] = "one"
    name: str = ""


@dataclass(frozen=True)
class Turn:
    """A question, its answer, and where that is to be found."""

    asked: str
    answer: str
    look: Look


def dialogue(draws: Draws) -> tuple[list[dict[str, Any]], list[Look]]:
    """A dialogue about a new picture, or two, in one language.

    Returns:
        Messages, as :meth:`qwen2vl.Processor.supervised` takes them, and a look for each stretch of what they teach.
    """
    return draws.pick((_things, _things, _things, _texts, _texts, _screen, _screen, _pair, _text))(draws)


def _things(draws: Draws) -> tuple[list[dict[str, Any]], list[Look]]:
    """About things of all kinds, and what is written below them."""
    language = draws.language()
    size = picture_size(draws, (2, 5), (2, 5))
    ground = draws.pick(GROUNDS)
    texts = draws.pick((0, 0, 1, 2)) if size[1] >= 4 * UNIT else draws.pick((0, 0, 1)) if size[1] >= 3 * UNIT else 0
    room = (size[0], size[1] - texts * UNIT)
    image, things = draw_some_things(draws, size, room, ground)
    written: dict[str, list[Mark]] = {}
    for n in range(texts):
        text = random_text(draws, 6)
        top = room[1] + n * UNIT
        marks = write(draws, image, text, ink_on(ground), (0, top, size[0], top + UNIT))
        if text.lower() not in map(str.lower, written):
            written[text] = marks
    turns = list(_questions(draws, language, things, size))
    for text, marks in written.items():
        turns.append(_find_text(draws, language, text, _box(marks[0].whole, size)))
        if texts == 1:
            turns.append(_read(draws, language, text, marks, size))
    return _messages([image], draws.some(turns, TURNS))


def _text(draws: Draws) -> tuple[list[dict[str, Any]], list[Look]]:
    """A text is read and found."""
    language, text = draws.language(), random_text(draws, draws.pick((1, 2, 3, 4, 5, 6, 6)))
    size = picture_size(draws, (2, 4), (2, 8))
    ink, ground = ink_and_ground(draws)
    image = Image.new("RGB", size, ground)
    marks = write(draws, image, text, ink, (0, 0, *size))
    turns = [_read(draws, language, text, marks, size), _find_text(draws, language, text, _box(marks[0].whole, size))]
    return _messages([image], draws.some(turns, TURNS))


def _texts(draws: Draws) -> tuple[list[dict[str, Any]], list[Look]]:
    """Where each of up to three texts is."""
    sample = point(draws, 3)
    turns = [
        _find_text(draws, sample.language, text, _box(box, sample.size))
        for text, box in zip(sample.scene["texts"], sample.scene["boxes"], strict=True)
    ]
    return _messages(_pictures(sample), draws.some(turns, TURNS))


def _screen(draws: Draws) -> tuple[list[dict[str, Any]], list[Look]]:
    """All buttons of a screen are to be tapped, of which the player sees one picture only."""
    language = draws.language()
    game = make_game(draws, draws.between(0, 1), language)
    steps: list[Step] = []
    said, looks = [], []
    for control in draws.some(game.screens[0], TURNS):
        said.append(SCREEN[language]["tap"].replace("{}", control.label))
        looks.append(Look(((0, _box(control.box, game.size)),), name=control.label))
        steps += [said[-1], Call(TAP.name, {"point": to_thousandths(*control.centre, *game.size)}), Result()]
    steps.append(SCREEN[language]["done"])
    asked = ("" if language == "zh" else " ").join(said)
    user = {"role": "user", "content": [*_items([game.draw()]), {"type": "text", "text": asked}]}
    answer = {"role": "assistant", "content": render_turn(steps, "paper")}
    return [{"role": "system", "content": SYSTEM}, user, answer], [*looks, Look()]


def _pair(draws: Draws) -> tuple[list[dict[str, Any]], list[Look]]:
    """In what two pictures are alike."""
    sample = compare(draws, 2)
    first, second = sample.scene["things"]
    unlike = [first[name] != second[name] for name in ("colour", "shape")]
    which = {(True, False): 0, (False, True): 1, (True, True): 2, (False, False): 3}[unlike[0], unlike[1]]
    answers = {
        "same colour": YES_NO[sample.language][unlike[0]],
        "same shape": YES_NO[sample.language][unlike[1]],
        "difference": DIFFERENCES[sample.language][which],
    }
    look = Look(((0, _box(first["box"], sample.size)), (1, _box(second["box"], sample.size))))
    turns = [Turn(draws.question(name, sample.language), answer, look) for name, answer in answers.items()]
    return _messages(_pictures(sample), draws.some(turns, TURNS))


def _pictures(sample: Sample) -> list[np.ndarray]:
    return [from_ppm(sample.members[name]) for name in sample.record["images"]]


def _items(pictures: Sequence[Image.Image | np.ndarray]) -> list[dict[str, Any]]:
    return [{"type": "image", "image": np.asarray(image)} for image in pictures]


def _messages(
    pictures: Sequence[Image.Image | np.ndarray], turns: Sequence[Turn]
) -> tuple[list[dict[str, Any]], list[Look]]:
    """Questions and answers in turn, the pictures before the first question."""
    messages: list[dict[str, Any]] = []
    for turn in turns:
        items = [] if messages else _items(pictures)
        messages.append({"role": "user", "content": [*items, {"type": "text", "text": turn.asked}]})
        messages.append({"role": "assistant", "content": turn.answer})
    return messages, [turn.look for turn in turns]


def _box(pixels: Sequence[float], size: tuple[int, int]) -> Box:
    left, top, right, bottom = pixels
    return Box.from_pixels(left, top, right, bottom, width=size[0], height=size[1])


def _find_text(draws: Draws, language: str, text: str, box: Box) -> Turn:
    answer = render_grounding(Grounded(text, (box,)))
    return Turn(draws.question("find text", language, text), answer, Look(((0, box),), name=text))


def _read(draws: Draws, language: str, text: str, marks: Sequence[Mark], size: tuple[int, int]) -> Turn:
    look = Look(tuple((0, _box(mark.box, size)) for mark in marks), "spelled")
    return Turn(draws.question("read", language), text, look)


def _questions(draws: Draws, language: str, things: Sequence[Mark], size: tuple[int, int]) -> Iterator[Turn]:
    """Everything about things that has one answer in this picture; counts are asked a few times only."""
    kinds = [(mark.names[0], mark.names[1]) for mark in things]
    boxes = [(0, _box(mark.box, size)) for mark in things]
    colours, shapes = [colour for colour, _ in kinds], [shape for _, shape in kinds]

    def turn(name: str, about: str, answer: str, which: Sequence[bool], *, counted: bool = False) -> Turn:
        places = tuple(box for box, asked in zip(boxes, which, strict=True) if asked)
        look = Look(places, "counted" if counted else "one", about if name == "find" else "")
        return Turn(draws.question(name, language, about), answer, look)

    yield turn("count all", "", str(len(things)), [True] * len(things), counted=True)
    for _ in range(2):
        by_colour = draws.chance(0.5)
        seen = draws.chance(0.7) and kinds
        colour, shape = draws.pick(kinds) if seen else (draws.pick(list(COLOURS)), draws.pick(SHAPES))
        which = [one == colour for one in colours] if by_colour else [one == shape for one in shapes]
        name = kind_name(colour if by_colour else None, None if by_colour else shape, language)
        yield turn("count", name, str(sum(which)), which, counted=True)
    for n, (colour, shape) in enumerate(kinds):
        this = [n == other for other in range(len(kinds))]
        if shapes.count(shape) == 1:
            yield turn("colour of", shape_name(shape, language), colour_name(colour, language), this)
        if colours.count(colour) == 1:
            yield turn("shape of", colour_name(colour, language), shape_name(shape, language), this)
        if kinds.count((colour, shape)) == 1:
            name = thing_name(colour, shape, language)
            yield turn("find", name, render_grounding(Grounded(name, (boxes[n][1],))), this)
