"""The skill of playing the screen game: episodes played without a mistake, as samples to learn from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from ..agents.function_calls import Result, Step, render_turn
from .draws import Draws
from .questions import SCREEN
from .sample import Sample, to_ppm
from .screen_game import SYSTEM, make_game


def screen(draws: Draws, level: int) -> Sample:
    """A game played to its end without a mistake, with a screenshot after every action. The levels:

    0   two buttons, one of them to be tapped, on a screen of 84 x 84 pixels
    1   three or four buttons, one of them to be tapped
    2   three to five buttons, two of them to be tapped in the order of the instruction
    3   a menu, and then a button of the screen that it opens
    4   a text to be typed into a field, and then a button

    The assistant's one turn holds thoughts, calls and results in the paper's form; `answer` is all of it, with
    `<image>` in the place of each screenshot. `make_game` with the same draws gives the same game to another player.
    """
    language = draws.language()
    game = make_game(draws, level, language)
    start, _ = game.reset()
    pictures = [start["image"]]
    steps: list[Step] = []
    while not game.done:
        call = game.next_call()
        steps += [game.tasks[game.step].words(language), call]
        steps.append(result := game.execute(call))
        pictures += _images(result)
    steps.append(SCREEN[language]["done"])
    names = [f"{n}.ppm" for n in range(len(pictures))]
    turn = "".join(item.get("text", "<image>") for item in render_turn(steps, "paper"))
    record = {
        "messages": [
            {"role": "user", "content": f"<image>{game.instruction}"},
            {"role": "assistant", "content": turn},
        ],
        "system": SYSTEM,
        "agent": "paper",
        "images": names,
    }
    scene = {
        "controls": [[{"label": c.label, "kind": c.kind, "box": list(c.box)} for c in one] for one in game.screens],
        "tasks": [[task.kind, task.text] for task in game.tasks],
    }
    members = dict(zip(names, map(to_ppm, pictures), strict=True))
    return Sample(record, members, turn, language, game.size, scene=scene)


def _images(result: Result) -> list[Image.Image]:
    """The screenshots in what a call led to."""
    items: Sequence[Mapping[str, Any]] = () if isinstance(result.content, str) else result.content
    return [item["image"] for item in items if "image" in item]
