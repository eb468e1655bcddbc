"""Several questions about one picture, each in a turn of its own: the picture is encoded once, and learned from often.

Most of them ask about one of several things, which is found by its colour, its shape or what is written on it. One such
question a picture teaches little about looking things up: the answer is often right by chance, and all that the model
saw of the rest goes unused. So every one of several texts is looked for, every button of a screen is tapped, every kind
is counted, and two pictures are compared in all ways. What an answer is about is known, so that a model can be taught
where to look for it, too (see :mod:`examples.small.looking`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image

from qwen2vl.agents.function_calls import Result, Step, render_turn
from qwen2vl.agents.grounding import Box, Grounded, render_grounding
from qwen2vl.samples.comparing import compare, difference, which_has_more
from qwen2vl.samples.counting import count
from qwen2vl.samples.draws import UNIT, Draws
from qwen2vl.samples.pointing import point
from qwen2vl.samples.questions import SCREEN
from qwen2vl.samples.sample import Sample, from_ppm
from qwen2vl.samples.screen_game import SYSTEM, Task, make_game
from qwen2vl.samples.shapes import GROUNDS
from qwen2vl.samples.texts import ink_and_ground, random_text
from qwen2vl.samples.words import (
    COLOURS,
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
            is their number; "spelled": each of its characters is at a place of its own; "compared": it says which of
            two pictures has more of them.
        name: what the answer calls them, where it does.
    """

    places: tuple[tuple[int, Box], ...] = ()
    how: Literal["one", "counted", "spelled", "compared"] = "one"
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
    return draws.pick((_things, _things, _kinds, _kinds, _texts, _texts, _screen, _pair, _more, _text))(draws)


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
    turns = list(_Things(draws, language, things, size).questions())
    for text, marks in written.items():
        turns.append(_find_text(draws, language, text, _box(marks[0].whole, size)))
        if texts == 1:
            turns.append(_read(draws, language, text, marks, size))
    return _messages([image], draws.some(turns, TURNS))


def _kinds(draws: Draws) -> tuple[list[dict[str, Any]], list[Look]]:
    """How many there are of each kind, in a picture that has several of one."""
    sample = count(draws, 3)
    marks = [Mark((one["colour"], one["shape"]), one["box"], one["box"]) for one in sample.scene["things"]]
    turns = list(_Things(draws, sample.language, marks, sample.size).counts())
    return _messages(_pictures(sample), draws.some(turns, TURNS))


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
    controls = draws.some(game.screens[0], TURNS)
    game.tasks = tuple(Task("tap", control.label) for control in controls)
    user = {"role": "user", "content": game.reset()}
    steps: list[Step] = []
    for task in game.tasks:
        steps += [task.words(language), call := game.next_call(), Result()]
        game.execute(call)
    steps.append(SCREEN[language]["done"])
    looks = [Look(((0, _box(control.box, game.size)),), name=control.label) for control in controls]
    answer = {"role": "assistant", "content": render_turn(steps, "paper")}
    return [{"role": "system", "content": SYSTEM}, user, answer], [*looks, Look()]


def _pair(draws: Draws) -> tuple[list[dict[str, Any]], list[Look]]:
    """In what two pictures are alike."""
    sample = compare(draws, 2)
    first, second = sample.scene["things"]
    unlike = [first[name] != second[name] for name in ("colour", "shape")]
    answers = {
        "same colour": YES_NO[sample.language][unlike[0]],
        "same shape": YES_NO[sample.language][unlike[1]],
        "difference": difference(sample.language, *unlike),
    }
    look = Look(((0, _box(first["box"], sample.size)), (1, _box(second["box"], sample.size))))
    turns = [Turn(draws.question(name, sample.language), answer, look) for name, answer in answers.items()]
    return _messages(_pictures(sample), draws.some(turns, TURNS))


def _more(draws: Draws) -> tuple[list[dict[str, Any]], list[Look]]:
    """Which of two pictures has more shapes, in one of the ways to ask it."""
    language, numbers = draws.language(), [draws.between(0, 4) for _ in range(2)]
    if draws.chance(0.2):
        numbers[1] = numbers[0]
    pictures, places = [], []
    for n, number in enumerate(numbers):
        size = picture_size(draws, (2, 3), (2, 3))
        image, marks = draw_some_things(draws, size, size, draws.pick(GROUNDS), number)
        pictures.append(image)
        places += [(n, _box(mark.box, size)) for mark in marks]
    answer = which_has_more(language, *numbers)
    return _messages(
        pictures, [Turn(draws.question("which has more", language), answer, Look(tuple(places), "compared"))]
    )


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


@dataclass(frozen=True)
class _Things:
    """What there is to ask about the things in a picture of `size`."""

    draws: Draws
    language: str
    things: Sequence[Mark]
    size: tuple[int, int]

    @property
    def kinds(self) -> list[tuple[str, str]]:
        return [(mark.names[0], mark.names[1]) for mark in self.things]

    def turn(self, name: str, about: str, answer: str, which: Sequence[bool], *, counted: bool = False) -> Turn:
        """The question of that name about those things."""
        places = tuple((0, _box(mark.box, self.size)) for mark, one in zip(self.things, which, strict=True) if one)
        look = Look(places, "counted" if counted else "one", about if name == "find" else "")
        return Turn(self.draws.question(name, self.language, about), answer, look)

    def number(self, colour: str | None, shape: str | None) -> Turn:
        """How many there are of a colour, or of a shape."""
        which = [colour in (None, one) and shape in (None, other) for one, other in self.kinds]
        return self.turn("count", kind_name(colour, shape, self.language), str(sum(which)), which, counted=True)

    def counts(self) -> Iterator[Turn]:
        """How many there are of each colour and each shape, of one that may not be there, and of all."""
        colours, shapes = ({kind[n] for kind in self.kinds} for n in (0, 1))
        for colour in sorted({*colours, self.draws.pick(list(COLOURS))}):
            yield self.number(colour, None)
        for shape in sorted({*shapes, self.draws.pick(SHAPES)}):
            yield self.number(None, shape)
        yield self.turn("count all", "", str(len(self.things)), [True] * len(self.things), counted=True)

    def questions(self) -> Iterator[Turn]:
        """Everything that has one answer; counts are asked a few times only."""
        draws, language, kinds = self.draws, self.language, self.kinds
        yield from draws.some(list(self.counts()), 3)
        colours, shapes = [colour for colour, _ in kinds], [shape for _, shape in kinds]
        for n, (colour, shape) in enumerate(kinds):
            this = [n == other for other in range(len(kinds))]
            if shapes.count(shape) == 1:
                yield self.turn("colour of", shape_name(shape, language), colour_name(colour, language), this)
            if colours.count(colour) == 1:
                yield self.turn("shape of", colour_name(colour, language), shape_name(shape, language), this)
            if kinds.count((colour, shape)) == 1:
                name, box = thing_name(colour, shape, language), _box(self.things[n].box, self.size)
                yield self.turn("find", name, render_grounding(Grounded(name, (box,))), this)
