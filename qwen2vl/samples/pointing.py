"""The skill of pointing: boxes of shapes and of texts, and corners of slanted texts, in the grounding markup."""

from __future__ import annotations

import math

from PIL import Image

from ..agents.grounding import Box, Grounded, Quad, render_grounding
from .counting import another_kind
from .draws import Draws
from .fonts import LEAST_SIZE, faces_for, fitting_size, text_mask
from .sample import Sample, question
from .shapes import GROUNDS, Thing, add_noise, draw_things, fitting_colours, random_thing, scatter
from .texts import ink_and_ground, random_text
from .words import SHAPES, kind_name, thing_name


def point(draws: Draws, level: int) -> Sample:
    """Asks for the boxes of things or texts, or for the corners of a slanted text. The levels:

    0   one thing, in a picture of 56 x 56 pixels
    1   one thing, in pictures of several sizes
    2   one of two or three things
    3   one of one to three texts, which are at most six characters long
    4   every thing of a colour or of a shape from top to bottom, one to three of up to five, or a slanted text, in
        noisy pictures of many sizes
    """
    if level == 3:
        return _point_at_line(draws)
    if level == 4 and draws.chance(0.4):
        return _point_at_text(draws)
    language = draws.language()
    ground = draws.pick(GROUNDS)
    colours = fitting_colours(ground)
    if level < 2:
        size = (56, 56) if level == 0 else draws.size((2, 4), (2, 4))
        things = found = [random_thing(draws, size, colours, (16, min(40, min(size) - 8)))]
    elif level == 2:
        size = draws.size((2, 4), (2, 4))
        number = draws.between(2, 3)
        chosen, shapes = draws.some(colours, number), draws.some(SHAPES, number)
        places = scatter(draws, size, [draws.between(16, 36) for _ in range(number)])
        things = [Thing(chosen[n], shapes[n], *place) for n, place in enumerate(places)]
        found = things[:1]
    else:
        size = draws.size((3, 7), (3, 8), loose=True)
        by_colour = draws.chance(0.5)
        colour, shape = (draws.pick(colours), None) if by_colour else (None, draws.pick(SHAPES))
        number = draws.between(1, 3)
        kinds = [(colour or draws.pick(colours), shape or draws.pick(SHAPES)) for _ in range(number)]
        kinds += [another_kind(draws, colours, colour, shape) for _ in range(draws.between(0, 2))]
        places = scatter(draws, size, [draws.between(16, 36) for _ in kinds])
        things = [Thing(*kind, *place) for kind, place in zip(kinds, places, strict=True)]
        found = sorted(things[:number], key=lambda thing: (thing.box[1], thing.box[0]))
        phrase = kind_name(colour, shape, language)
        prompt = draws.question("find all", language, phrase)
    if level < 3:
        phrase = thing_name(found[0].colour, found[0].shape, language)
        prompt = draws.question("find", language, phrase)
    image = draw_things(size, ground, things)
    if level == 4:
        image = add_noise(draws, image)
    place = Grounded(phrase, tuple(thing.grounding_box(size) for thing in found))
    scene = {"things": [thing.to_dict() for thing in things], "found": [thing.to_dict() for thing in found]}
    return question([image], prompt, render_grounding(place), language, places=[place], scene=scene)


def _point_at_line(draws: Draws) -> Sample:
    """Asks for the box of one of several texts, each in a line of its own."""
    language = draws.language()
    lines = draws.between(1, 3)
    size = draws.size((max(2, lines), 4), (3, 5))
    texts: list[str] = []
    while len(texts) < lines:
        text = random_text(draws, 6)
        if text.lower() not in [other.lower() for other in texts]:
            texts.append(text)
    at = draws.between(0, lines - 1)
    ink, ground = ink_and_ground(draws)
    image, boxes, high = Image.new("RGB", size, ground), [], size[1] // lines
    for n, text in enumerate(texts):
        face = draws.pick(faces_for(text))
        largest = min(fitting_size(face, text, size[0] - 6, high - 4), 36)
        mask = text_mask(face, text, draws.between(max(LEAST_SIZE, largest // 2), max(LEAST_SIZE, largest)))
        mask = mask.crop((0, 0, min(mask.width, size[0] - 2), min(mask.height, high - 2)))
        x, y = draws.between(1, size[0] - mask.width - 1), n * high + draws.between(1, high - mask.height - 1)
        image.paste(ink, (x, y), mask)
        boxes.append((x, y, x + mask.width, y + mask.height))
    place = Grounded(texts[at], (Box.from_pixels(*boxes[at], width=size[0], height=size[1]),))
    return question(
        [image],
        draws.question("find text", language, texts[at]),
        render_grounding(place),
        language,
        places=[place],
        scene={"texts": texts, "boxes": [list(box) for box in boxes], "text": texts[at]},
    )


def _point_at_text(draws: Draws) -> Sample:
    """Asks for the corners of a slanted text's ink, clockwise from the one that is its upper left as one reads it."""
    language = draws.language()
    size = draws.size((4, 7), (4, 8), loose=True)
    text = random_text(draws, 5)
    mask = text_mask(draws.pick(faces_for(text)), text, draws.between(16, 24))
    if mask.width > size[0] - 16:
        mask = mask.crop((0, 0, size[0] - 16, mask.height))
    degrees = draws.between(-25, 25)
    rotated = mask.rotate(degrees, Image.Resampling.BICUBIC, expand=True)
    x, y = draws.between(1, size[0] - rotated.width - 1), draws.between(1, size[1] - rotated.height - 1)
    ink, ground = ink_and_ground(draws)
    image = Image.new("RGB", size, ground)
    image.paste(ink, (x, y), rotated)
    angle = math.radians(degrees)
    corners = []
    for across, down in ((-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5)):
        dx, dy = across * mask.width, down * mask.height
        corners.append(
            (
                x + rotated.width / 2 + dx * math.cos(angle) + dy * math.sin(angle),
                y + rotated.height / 2 - dx * math.sin(angle) + dy * math.cos(angle),
            )
        )
    place = Grounded(text, (Quad.from_pixels(corners, width=size[0], height=size[1]),))
    return question(
        [add_noise(draws, image)],
        draws.question("find text", language, text),
        render_grounding(place),
        language,
        places=[place],
        scene={"text": text, "corners": [list(corner) for corner in corners]},
    )
