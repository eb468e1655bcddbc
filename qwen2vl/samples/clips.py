"""The skill of following a clip: what moves, which way, and what else happens."""

from __future__ import annotations

from ..errors import DataError
from .draws import Draws
from .sample import Sample, question
from .shapes import GROUNDS, Thing, add_noise, draw_things, fitting_colours, scatter
from .words import DIRECTION_NAMES, DIRECTIONS, EVENTS, SHAPES, event_sentence


def video(draws: Draws, level: int, *, frames: int | None = None) -> Sample:
    """Asks what happens in a clip of an even number of frames. The levels:

    0   whether a thing moves left or right, in 4 frames of 56 x 56 pixels
    1   in which of four directions it moves, in 4 to 6 frames
    2   what moves, and in which direction
    3   what happens: a thing moves, stands still, appears, disappears, grows or shrinks
    4   the same in 6 to 12 noisy frames of many sizes; unless the thing stands still, up to two others do

    Args:
        frames: how many frames to make instead, even and at least 4. A thing that moves covers the same distance in
            them, so that with many frames a step is less than a pixel.

    Raises:
        DataError: `frames` is odd, less than 4, or no int.
    """
    if frames is not None and (not isinstance(frames, int) or frames < 4 or frames % 2):
        raise DataError(f"frames: wants an even number of at least 4, got {frames!r}")
    language = draws.language()
    drawn = (4, 2 * draws.between(2, 3), 2 * draws.between(2, 3), 2 * draws.between(2, 4), 2 * draws.between(3, 6))
    frames = drawn[level] if frames is None else frames
    size = (56, 56) if level < 3 else draws.size((2, 3), (2, 3)) if level == 3 else draws.size((3, 5), (3, 5))
    ground = draws.pick(GROUNDS)
    colours = fitting_colours(ground)
    event = draws.pick(("left", "right")) if level == 0 else draws.pick(EVENTS[:4] if level < 3 else EVENTS)
    colour, shape = draws.pick(colours), draws.pick(SHAPES)
    diameter = draws.between(16, 24 if level < 4 else 30)
    path = _path(draws, event, size, diameter, frames)
    others = _others(draws, size, path, colours, colour) if level == 4 and event != "still" else []
    things = [Thing(colour, shape, x, y, d) if d else None for x, y, d in path]
    pictures = [draw_things(size, ground, [*others, *([thing] if thing else [])]) for thing in things]
    if level == 4:
        pictures = [add_noise(draws, picture, 6) for picture in pictures]
    if level < 2:
        prompt, answer = draws.question("direction", language), DIRECTION_NAMES[language][event]
    else:
        prompt = draws.question("what moves" if level == 2 else "what happens", language)
        answer = event_sentence(event, colour, shape, language)
    scene = {
        "event": event,
        "things": [thing and thing.to_dict() for thing in things],
        "others": [other.to_dict() for other in others],
    }
    return question(pictures, prompt, answer, language, video=True, scene=scene)


def _path(draws: Draws, event: str, size: tuple[int, int], diameter: int, frames: int) -> list[tuple[int, int, int]]:
    """(x, y, diameter) in every frame, in pixels; a diameter of 0 means that the thing is not there."""
    room = (size[0] - diameter - 2, size[1] - diameter - 2)
    x, y = draws.between(1, room[0]), draws.between(1, room[1])
    if event in DIRECTIONS:
        # Over at least half of the free space, which is two pixels a frame or more at every level.
        dx, dy = DIRECTIONS[event]
        axis = 0 if dx else 1
        way = draws.between(room[axis] // 2, room[axis] - 1)
        start = draws.between(1, max(1, room[axis] - way))
        along = [start + round(way * n / (frames - 1)) for n in range(frames)]
        if dx + dy < 0:
            along.reverse()
        return [(place, y, diameter) if axis == 0 else (x, place, diameter) for place in along]
    if event in ("appear", "disappear"):
        # A time step of the model is two frames, and the change falls between two time steps.
        change = draws.between(1, frames // 2 - 1) * 2
        there = [(n >= change) == (event == "appear") for n in range(frames)]
        return [(x, y, diameter if present else 0) for present in there]
    if event in ("grow", "shrink"):
        least, most = 10, min(size) - 8
        most = draws.between(max(24, most // 2 + 4), most)
        diameters = [least + round((most - least) * n / (frames - 1)) for n in range(frames)]
        if event == "shrink":
            diameters.reverse()
        centre = (
            draws.between(most // 2 + 1, size[0] - most // 2 - 2),
            draws.between(most // 2 + 1, size[1] - most // 2 - 2),
        )
        return [(centre[0] - d // 2, centre[1] - d // 2, d) for d in diameters]
    return [(x, y, diameter)] * frames


def _others(
    draws: Draws, size: tuple[int, int], path: list[tuple[int, int, int]], colours: list[str], colour: str
) -> list[Thing]:
    """At most two things of other colours that stand still, where the moving one does not pass."""
    left, top = min(x for x, _, _ in path) - 3, min(y for _, y, _ in path) - 3
    right, bottom = max(x + d for x, _, d in path) + 3, max(y + d for _, y, d in path) + 3
    found: list[Thing] = []
    for x, y, d in scatter(draws, size, [draws.between(12, 22) for _ in range(draws.between(1, 2))]):
        if x >= right or x + d <= left or y >= bottom or y + d <= top:
            found.append(Thing(draws.pick([c for c in colours if c != colour]), draws.pick(SHAPES), x, y, d))
    return found
