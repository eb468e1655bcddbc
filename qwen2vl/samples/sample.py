"""A generated sample, and the draws that one is made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from ..agents.grounding import Grounded
from .words import LANGUAGES, QUESTIONS

T = TypeVar("T")
UNIT = 28  # pixels: the side of the square that becomes one token
_NAMES = tuple(LANGUAGES)
_BOUNDS = np.cumsum(list(LANGUAGES.values()))


@dataclass(frozen=True)
class Sample:
    """What a model is asked, what it is to answer, and what was drawn.

    Attributes:
        record: as a WebDataset sample holds it as JSON, with `messages` and the names of its media.
        members: those media by name, as PPM.
        answer: all that the assistant is to write; of several turns of an agent, see `qwen2vl.samples.screen`.
        language: of question and answer, a key of `LANGUAGES`.
        size: (width, height) of the pictures in pixels.
        places: what there is to find, for the skill that points.
        scene: what was drawn, in numbers and names: objects with their colour, shape and box in pixels, texts, events.
        skill, difficulty, split, index: what it was made by.
    """

    record: dict[str, Any]
    members: dict[str, bytes]
    answer: str
    language: str
    size: tuple[int, int]
    places: tuple[Grounded, ...] = ()
    scene: dict[str, Any] = field(default_factory=dict)
    skill: str = ""
    difficulty: int = 0
    split: str = "train"
    index: int = 0


class Draws:
    """Everything that chance decides about one sample.

    Args:
        rng: where it comes from; nothing else is random.
        held_out: for evaluation: strings and picture sizes are those that training never shows.
    """

    def __init__(self, rng: np.random.Generator, *, held_out: bool = False):
        self.rng = rng
        self.held_out = held_out

    def between(self, low: int, high: int) -> int:
        """A whole number from low to high, both included."""
        return int(self.rng.integers(low, high + 1))

    def pick(self, options: Sequence[T]) -> T:
        return options[int(self.rng.integers(len(options)))]

    def some(self, options: Sequence[T], count: int) -> list[T]:
        """Different ones, in a random order."""
        return [options[i] for i in self.rng.permutation(len(options))[:count].tolist()]

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def language(self) -> str:
        """In the proportions of `LANGUAGES`."""
        return _NAMES[int(np.searchsorted(_BOUNDS, self.rng.integers(100), side="right"))]

    def question(self, name: str, language: str, about: str = "") -> str:
        """One of the wordings of a question of `QUESTIONS`."""
        return self.pick(QUESTIONS[name][language]).replace("{}", about)

    def size(self, rows: tuple[int, int], columns: tuple[int, int], *, loose: bool = False) -> tuple[int, int]:
        """(width, height) of a picture of so many units, least and most.

        Of the sizes that the ranges allow, those of :func:`is_held_out_size` are for evaluation alone; where the
        ranges allow none or nothing else, both sides draw the same.

        Args:
            loose: up to 13 pixels more than whole units, which the processor takes away again by resizing.
        """
        every = [(r, c) for r in range(rows[0], rows[1] + 1) for c in range(columns[0], columns[1] + 1)]
        own = [pair for pair in every if is_held_out_size(*pair) == self.held_out]
        high, wide = self.pick(own or every)
        extra = (self.between(0, 13), self.between(0, 13)) if loose else (0, 0)
        return UNIT * wide + extra[0], UNIT * high + extra[1]


def is_held_out_size(rows: int, columns: int) -> bool:
    """Whether pictures of so many units are kept from training: a fifth of all sizes, of every aspect ratio some."""
    return (rows + 2 * columns) % 5 == 0


def to_ppm(image: Image.Image) -> bytes:
    """The quickest format to write and read: a header and the pixels."""
    return b"P6\n%d %d\n255\n" % image.size + image.tobytes()


def from_ppm(data: bytes) -> np.ndarray:
    """(H, W, 3) uint8, read-only, of what :func:`to_ppm` wrote."""
    _, size, _, pixels = data.split(b"\n", 3)
    width, height = map(int, size.split())
    return np.frombuffer(pixels, np.uint8).reshape(height, width, 3)


def question(
    pictures: Sequence[Image.Image],
    prompt: str,
    answer: str,
    language: str,
    *,
    video: bool = False,
    places: Sequence[Grounded] = (),
    scene: dict[str, Any] | None = None,
) -> Sample:
    """A sample of one question about pictures, or about a video of them as frames."""
    members = {f"{n}.ppm": to_ppm(picture) for n, picture in enumerate(pictures)}
    kind = "video" if video else "image"
    turns = [
        {"role": "user", "content": f"<{kind}>" * (1 if video else len(pictures)) + prompt},
        {"role": "assistant", "content": answer},
    ]
    # Frames keep their own size: what is usual for videos would make each a hundred tokens.
    media = [{"video": list(members), "min_pixels": UNIT * UNIT}] if video else list(members)
    record = {"messages": turns, f"{kind}s": media}
    return Sample(record, members, answer, language, pictures[0].size, tuple(places), scene or {})
