"""The skill of naming the colours and shapes of things in one picture."""

from __future__ import annotations

from .draws import Draws
from .sample import Sample, question
from .shapes import GROUNDS, Thing, add_noise, draw_things, fitting_colours, pick_ground, random_thing, scatter
from .words import COLOURS, SEPARATOR, SHAPES, colour_name, shape_name, thing_name

_ALL = tuple(COLOURS)


def colour_shape(draws: Draws, level: int) -> Sample:
    """Asks for colours and shapes. The levels:

    0   the colour of one large shape, in a picture of 56 x 56 pixels
    1   its shape
    2   both, of a shape of any size
    3   both, of two or three shapes from left to right
    4   what colour one of two or three shapes has, or which shape has a colour, in noisy pictures of many sizes
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
        size = draws.size((2, 2), (count + 1, 5), more=(1, 1))
        room = size[0] // count
        things = []
        for n in range(count):
            diameter = draws.between(18, min(room - 4, 40))
            x = draws.between(n * room + 1, (n + 1) * room - diameter - 2)
            y = draws.between(1, size[1] - 1 - diameter)
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
