"""The random decisions that one generated sample is made from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from .questions import QUESTIONS
from .words import LANGUAGES

T = TypeVar("T")
#: Pixels: the side of the square that becomes one token.
UNIT = 28


class Draws:
    """Everything that chance decides about one sample.

    Args:
        rng: the only source of randomness.
        held_out: whether the sample is for evaluation, so that its strings and picture sizes are those that training
            never shows.
        languages: the languages that questions are drawn from.
    """

    def __init__(
        self, rng: np.random.Generator, *, held_out: bool = False, languages: Sequence[str] = tuple(LANGUAGES)
    ):
        self.rng = rng
        self.held_out = held_out
        self.languages = tuple(languages)
        self._shares = np.cumsum([LANGUAGES[name] for name in self.languages])

    def between(self, low: int, high: int) -> int:
        """A whole number from low to high, both included."""
        return int(self.rng.integers(low, high + 1))

    def pick(self, options: Sequence[T]) -> T:
        """One of the options, each equally likely."""
        return options[int(self.rng.integers(len(options)))]

    def some(self, options: Sequence[T], count: int) -> list[T]:
        """`count` different options in a random order."""
        return [options[i] for i in self.rng.permutation(len(options))[:count].tolist()]

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return bool(self.rng.random() < probability)

    def language(self) -> str:
        """One of the languages, in the proportions of `LANGUAGES`."""
        drawn = self.rng.integers(int(self._shares[-1]))
        return self.languages[int(np.searchsorted(self._shares, drawn, side="right"))]

    def question(self, name: str, language: str, about: str = "") -> str:
        """One of the wordings of a question of `QUESTIONS`, with `about` in the place of its braces."""
        return self.pick(QUESTIONS[name][language]).replace("{}", about)

    def size(
        self,
        rows: tuple[int, int],
        columns: tuple[int, int],
        *,
        loose: bool = False,
        more: tuple[int, int] = (0, 0),
    ) -> tuple[int, int]:
        """(width, height) in pixels of a picture that has between so many rows and columns of units.

        Sizes that :func:`is_held_out_size` names are for evaluation alone. Where the ranges allow only such sizes, or
        none, training and evaluation draw from the same sizes.

        Args:
            loose: add up to 13 pixels to each side, which the processor removes again when it resizes.
            more: the rows and columns that training has in addition. Of one or two sizes a model learns by heart where
                things are, and is lost in every other one.
        """
        if not self.held_out:
            rows, columns = (rows[0], rows[1] + more[0]), (columns[0], columns[1] + more[1])
        every = [(r, c) for r in range(rows[0], rows[1] + 1) for c in range(columns[0], columns[1] + 1)]
        own = [pair for pair in every if is_held_out_size(*pair) == self.held_out]
        high, wide = self.pick(own or every)
        extra = (self.between(0, 13), self.between(0, 13)) if loose else (0, 0)
        return UNIT * wide + extra[0], UNIT * high + extra[1]


def is_held_out_size(rows: int, columns: int) -> bool:
    """Whether training never shows pictures of so many units: a fifth of all sizes, some of every aspect ratio."""
    return (rows + 2 * columns) % 5 == 0
