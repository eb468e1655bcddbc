"""The skills by name, and the functions that make a sample, or a game, of any of them.

A sample depends on its skill, difficulty, seed, index and split alone, and on which fonts are installed (see
`qwen2vl.samples.fonts`). The random streams of the two splits never meet, whatever the seeds and indices: the split is
the first number that a stream begins with. Some strings and some picture sizes are for evaluation alone
(`vocabulary.is_held_out`, `draws.is_held_out_size`), so that training never shows them.
"""

from __future__ import annotations

import operator
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from ..errors import DataError
from .clips import video
from .comparing import compare
from .counting import count
from .draws import Draws
from .naming import colour_shape
from .playing import screen
from .pointing import point
from .reading import read
from .sample import Sample
from .screen_game import ScreenGame, make_game
from .words import LANGUAGES

Split = Literal["train", "held-out"]
SPLITS: tuple[Split, ...] = ("train", "held-out")
#: The difficulties of every skill, the easiest first; the skills' docstrings say what each of them asks for.
LEVELS = (0, 1, 2, 3, 4)
#: The version of the data: it changes whenever equal arguments no longer give equal samples.
DATA_VERSION = 3

#: Name -> the function that makes a sample of it from draws and a difficulty.
SKILLS: dict[str, Callable[..., Sample]] = {
    "read": read,
    "colour_shape": colour_shape,
    "count": count,
    "compare": compare,
    "point": point,
    "video": video,
    "screen": screen,
}


def generate(
    skill: str,
    difficulty: int,
    *,
    seed: int | Sequence[int] = 0,
    index: int = 0,
    split: Split = "train",
    languages: Sequence[str] = tuple(LANGUAGES),
    **options: Any,
) -> Sample:
    """Sample number `index` of a skill and difficulty.

    Args:
        skill: a key of `SKILLS`.
        difficulty: one of `LEVELS`.
        seed: a whole number not below 0, or several in a list or tuple.
        index: a whole number not below 0.
        split: "train" or "held-out".
        languages: keys of `LANGUAGES` that questions are drawn from. Without Vietnamese no picture has its words.
        options: further arguments of one skill: `frames` of "video".

    Raises:
        DataError: naming the argument that is none of these.
    """
    draws = _draws(skill, difficulty, seed, index, split, languages)
    sample = SKILLS[skill](draws, difficulty, **options)
    return replace(sample, skill=skill, difficulty=difficulty, split=split, index=index)


def play(
    difficulty: int,
    *,
    seed: int | Sequence[int] = 0,
    index: int = 0,
    split: Split = "held-out",
    languages: Sequence[str] = tuple(LANGUAGES),
) -> ScreenGame:
    """The game of sample `index` of the skill "screen", at its beginning, for another player; see :func:`generate`."""
    draws = _draws("screen", difficulty, seed, index, split, languages)
    return make_game(draws, difficulty, draws.language())


def _draws(
    skill: str, difficulty: int, seed: int | Sequence[int], index: int, split: str, languages: Sequence[str]
) -> Draws:
    check_choice(skill, tuple(SKILLS), "skill")
    check_choice(difficulty, LEVELS, "difficulty")
    check_choice(split, SPLITS, "split")
    check_languages(languages, "languages")
    try:
        several: Sequence[Any] = seed if isinstance(seed, (list, tuple)) else [seed]
        seeds = [operator.index(one) for one in several]
        # A CRC-32 and not hash(), which differs from process to process.
        entropy = [SPLITS.index(split), zlib.crc32(skill.encode()), difficulty, operator.index(index), *seeds]
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy)))
    except (TypeError, ValueError) as error:
        raise DataError(f"seed, index: want whole numbers not below 0, got {seed!r} and {index!r} ({error})") from None
    return Draws(rng, held_out=split == "held-out", languages=languages)


def check_choice(value: object, allowed: Sequence[object], where: str) -> None:
    """Raise a DataError that names `where` unless the value is one of the allowed ones; True is not 1 here."""
    if isinstance(value, (bool, float)) or value not in allowed:
        raise DataError(f"{where}: wants one of {', '.join(map(repr, allowed))}, got {value!r}")


def check_languages(value: object, where: str) -> None:
    """Raise a DataError that names `where` unless the value is a list or tuple of different keys of `LANGUAGES`."""
    known = isinstance(value, (list, tuple)) and all(isinstance(one, str) and one in LANGUAGES for one in value)
    if not known or not value or len(set(value)) < len(value):  # type: ignore[arg-type]
        raise DataError(f"{where}: wants a list of some of {', '.join(map(repr, LANGUAGES))}, got {value!r:.200}")
