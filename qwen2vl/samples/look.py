"""Skills of one picture of shapes: naming colour and shape, and counting."""

from __future__ import annotations

from .sample import Draws, Sample, question
from .shapes import GROUNDS, Thing, add_noise, draw_things, fitting_colours, pick_ground, random_thing, scatter
from .words import COLOURS, SEPARATOR, SHAPES, colour_name, kind_name, shape_name, thing_name

_ALL = tuple(COLOURS)


def colour_shape(draws: Draws, level: int) -> Sample:
    """Colours and shapes.

    0 the colour of one large shape, 56 x 56; 1 its shape; 2 both, at any size in the picture; 3 both of two or three
    from left to right; 4 what colour one of them is, or which shape has a colour, in noisy pictures of many sizes.
    """
    language = draws.language()
    if level <= 2:
        colour = draws.pick(_ALL)
        size = (56, 56) if level < 2 else draws.size((2, 3), (2, 3))
        thing = random_thing(draws, size, [colour], (30, 50) if level < 2 else (16, min(size) - 6))
        image = draw_things(size, pick_ground(draws, [colour]), [thing])
        name = ("colour", "shape", "describe")[level]
        answer = (colour_name(colour, language), shape_name(thing.shape, language), "")[level] or thing_name(
            colour, thing.shape, language
        )
        return question([image], draws.question(name, language), answer, language, scene={"things": [thing.to_dict()]})

    ground = draws.pick(GROUNDS)
    count = draws.between(2, 3)
    colours = draws.some(fitting_colours(ground), count)
    shapes = draws.some(SHAPES, count)
    if level == 3:
        size = draws.size((2, 2), (count + 1, 5))
        room = size[0] // count
        things = []
        for n in range(count):
            diameter = draws.between(18, min(room - 4, 40))
            x, y = draws.between(n * room + 1, (n + 1) * room - diameter - 2), draws.between(1, 55 - diameter)
            things.append(Thing(colours[n], shapes[n], x, y, diameter))
        prompt = draws.question("describe in order", language)
        answer = SEPARATOR[language].join(thing_name(thing.colour, thing.shape, language) for thing in things)
        image = draw_things(size, ground, things)
    else:
        size = draws.size((2, 6), (3, 8), loose=True)
        places = scatter(draws, size, [draws.between(18, 48) for _ in range(count)])
        things = [Thing(colours[n], shapes[n], *place) for n, place in enumerate(places)]
        asked = things[0]
        if draws.chance(0.5):
            prompt = draws.question("colour of", language, shape_name(asked.shape, language))
            answer = colour_name(asked.colour, language)
        else:
            prompt = draws.question("shape of", language, colour_name(asked.colour, language))
            answer = shape_name(asked.shape, language)
        image = add_noise(draws, draw_things(size, ground, things))
    return question([image], prompt, answer, language, scene={"things": [thing.to_dict() for thing in things]})


def count(draws: Draws, level: int) -> Sample:
    """How many there are, in digits.

    0 one to three equal shapes, 56 x 56; 1 none to four; 2 none to four of any kind, in larger pictures; 3 none to four
    of one colour or shape among others; 4 none to six of a colour, a shape or both, noisy, in pictures of many sizes.
    """
    language = draws.language()
    ground = draws.pick(GROUNDS)
    colours = fitting_colours(ground)
    number = draws.between(1, 3) if level == 0 else draws.between(0, 4 if level < 4 else 6)
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
    """A kind that is not meant: of what is asked for, at least one is otherwise."""
    while True:
        kind = draws.pick(colours), draws.pick(SHAPES)
        if (colour is not None and kind[0] != colour) or (shape is not None and kind[1] != shape):
            return kind
