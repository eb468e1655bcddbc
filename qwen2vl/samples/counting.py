"""The skill of counting things in one picture."""

from __future__ import annotations

from .draws import Draws
from .sample import Sample, question
from .shapes import GROUNDS, Thing, add_noise, draw_things, fitting_colours, scatter
from .words import SHAPES, kind_name


def count(draws: Draws, level: int) -> Sample:
    """Asks how many things there are; the answer is in digits. The levels:

    0   one to three equal shapes, in a picture of 56 x 56 pixels
    1   none to five equal shapes, in pictures of a few sizes
    2   none to five shapes of any kind, in larger pictures
    3   none to five of one colour or one shape, among others
    4   none to six of a colour, a shape or both, among others, in noisy pictures of many sizes
    """
    language = draws.language()
    ground = draws.pick(GROUNDS)
    colours = fitting_colours(ground)
    number = draws.between(1, 3) if level == 0 else draws.between(0, 5 if level < 4 else 6)
    if level < 2:
        size = (56, 56) if level == 0 else draws.size((2, 3), (2, 3))
        kinds = [(draws.pick(colours), draws.pick(SHAPES))] * number
        prompt = draws.question("count all", language)
    elif level == 2:
        size = draws.size((2, 4), (2, 4))
        kinds = [(draws.pick(colours), draws.pick(SHAPES)) for _ in range(number)]
        prompt = draws.question("count all", language)
    else:
        size = draws.size((3, 4), (3, 4)) if level == 3 else draws.size((3, 7), (3, 8), loose=True)
        by = draws.pick(("colour", "shape")) if level == 3 else draws.pick(("colour", "shape", "both"))
        colour = draws.pick(colours) if by != "shape" else None
        shape = draws.pick(SHAPES) if by != "colour" else None
        kinds = [(colour or draws.pick(colours), shape or draws.pick(SHAPES)) for _ in range(number)]
        kinds += [another_kind(draws, colours, colour, shape) for _ in range(draws.between(0, 3))]
        prompt = draws.question("count", language, kind_name(colour, shape, language))
    largest = max(12, min(size) // (2 if len(kinds) < 4 else 3))
    places = scatter(draws, size, [draws.between(12, min(largest, 40)) for _ in kinds])
    things = [Thing(*kind, *place) for kind, place in zip(kinds, places, strict=True)]
    image = draw_things(size, ground, things)
    if level == 4:
        image = add_noise(draws, image)
    scene = {"things": [thing.to_dict() for thing in things], "number": number}
    return question([image], prompt, str(number), language, scene=scene)


def another_kind(draws: Draws, colours: list[str], colour: str | None, shape: str | None) -> tuple[str, str]:
    """A (colour, shape) that a question does not ask about: it differs in the colour or the shape that is asked for."""
    while True:
        kind = draws.pick(colours), draws.pick(SHAPES)
        if (colour is not None and kind[0] != colour) or (shape is not None and kind[1] != shape):
            return kind
