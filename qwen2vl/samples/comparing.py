"""The skill of comparing two pictures."""

from __future__ import annotations

from PIL import Image

from .draws import Draws
from .reading import draw_text
from .sample import Sample, question
from .shapes import Colour, Thing, draw_things, fitting_colours, pick_ground, random_thing, scatter
from .texts import random_text
from .vocabulary import ALPHABET, is_held_out
from .words import COLOURS, DIFFERENCES, SHAPES, WHICH_PICTURE, YES_NO

_ALL = tuple(COLOURS)


def compare(draws: Draws, level: int) -> Sample:
    """Asks how two pictures differ. Each is drawn for itself: equal things differ in place and size. The levels:

    0   whether the colour is the same, in pictures of 56 x 56 pixels
    1   whether the colour, or whether the shape, is the same
    2   whether the colour, the shape, both or nothing differs
    3   which picture has more shapes, with none to four in each
    4   any of these in pictures of many sizes, or whether two texts are the same, which may differ in one character
    """
    if level == 3 or (level == 4 and draws.chance(0.3)):
        return _which_has_more(draws, level)
    if level == 4 and draws.chance(0.4):
        return _same_text(draws)
    language = draws.language()
    sizes = [(56, 56)] * 2
    if level == 4:
        sizes = [draws.size((2, 4), (2, 5), loose=True) for _ in range(2)]
    # Half of the answers to a yes-or-no question are yes, and each of the four differences is as frequent.
    other_colour, other_shape = draws.chance(0.5), draws.chance(0.5)
    colours, shapes = draws.some(_ALL, 2), draws.some(SHAPES, 2)
    if not other_colour:
        colours[1] = colours[0]
    if not other_shape:
        shapes[1] = shapes[0]
    things, pictures = [], []
    for n, size in enumerate(sizes):
        thing = random_thing(draws, size, [colours[n]], (18 if level else 26, min(50, min(size) - 6)))
        thing = Thing(colours[n], shapes[n], thing.x, thing.y, thing.diameter)
        things.append(thing)
        pictures.append(draw_things(size, pick_ground(draws, [thing.colour]), [thing]))
    asked = "colour" if level == 0 else draws.pick(("colour", "shape")) if level == 1 else "difference"
    if asked == "difference":
        prompt = draws.question("difference", language)
        answer = difference(language, other_colour, other_shape)
    else:
        prompt = draws.question(f"same {asked}", language)
        answer = YES_NO[language][int(other_colour if asked == "colour" else other_shape)]
    scene = {"things": [thing.to_dict() for thing in things], "asked": asked}
    return question(pictures, prompt, answer, language, scene=scene)


def difference(language: str, other_colour: bool, other_shape: bool) -> str:
    """The word for what differs."""
    differs = {(True, False): 0, (False, True): 1, (True, True): 2, (False, False): 3}
    return DIFFERENCES[language][differs[other_colour, other_shape]]


def which_has_more(language: str, first: int, second: int) -> str:
    """The words for the picture that has more."""
    return WHICH_PICTURE[language][0 if first > second else 1 if second > first else 2]


def _which_has_more(draws: Draws, level: int) -> Sample:
    language = draws.language()
    first = draws.between(0, 4)
    second = first if draws.chance(1 / 3) else draws.pick([n for n in range(5) if n != first])
    pictures, numbers = [], (first, second)
    for number in numbers:
        size = (56, 56) if level == 3 else draws.size((2, 4), (2, 5), loose=True)
        ground: Colour = pick_ground(draws, [])
        colours = fitting_colours(ground)
        places = scatter(draws, size, [draws.between(12, min(22, min(size) // 2)) for _ in range(number)])
        things = [Thing(draws.pick(colours), draws.pick(SHAPES), *place) for place in places]
        pictures.append(draw_things(size, ground, things))
    answer = which_has_more(language, first, second)
    prompt = draws.question("which has more", language)
    return question(pictures, prompt, answer, language, scene={"numbers": list(numbers), "asked": "more"})


def _same_text(draws: Draws) -> Sample:
    language = draws.language()
    texts = [random_text(draws, 5)] * 2
    if draws.chance(0.5):
        texts[1] = _one_otherwise(draws, texts[0])
    pictures: list[Image.Image] = [draw_text(draws, text, draws.size((2, 3), (3, 5)), 3)[0] for text in texts]
    answer = YES_NO[language][int(texts[0] != texts[1])]
    prompt = draws.question("same text", language)
    return question(pictures, prompt, answer, language, scene={"texts": texts, "asked": "text"})


def _one_otherwise(draws: Draws, text: str) -> str:
    """The text with one character replaced by another, in the same split as the draws."""
    while True:
        at = draws.between(0, len(text) - 1)
        letter = draws.pick([c for c in ALPHABET if c not in "01" and c.lower() != text[at].lower()])
        changed = text[:at] + letter + text[at + 1 :]
        if len(text) == 1 or is_held_out(changed) == draws.held_out:
            return changed
