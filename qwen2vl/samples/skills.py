"""The skills, and the one function that makes a sample of any.

A sample depends on its skill, difficulty, seed, index and split alone, and on which fonts are there (see
`qwen2vl.samples.lettering`). Training and held-out samples are drawn from random streams that begin with another
number each, whatever seed and index; what a held-out sample shows as text training never does, and of the picture sizes
some are for evaluation alone (`is_held_out`, `is_held_out_size`).
"""

from __future__ import annotations

import operator
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from ..errors import DataError
from .comparing import compare
from .look import colour_shape, count
from .moving import video
from .pointing import point
from .reading import read
from .sample import Draws, Sample
from .screen import ScreenGame, make_game, screen

Split = Literal["train", "held-out"]
SPLITS: tuple[Split, ...] = ("train", "held-out")
#: Difficulties of every skill, the easiest first; the skills' docstrings say what each holds.
LEVELS = (0, 1, 2, 3, 4)
#: Version of what the numbers lead to: it changes whenever equal numbers no longer give equal samples.
DATA_VERSION = 1

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
    **options: Any,
) -> Sample:
    """Sample number `index`.

    Args:
        skill: a key of `SKILLS`. difficulty: one of `LEVELS`.
        seed: any whole number not below 0, or several in a list or tuple.
        split: "train" or "held-out".
        options: of the skill alone: `frames` of "video".

    Raises:
        DataError: naming the argument that is none of these.
    """
    draws = _draws(skill, difficulty, seed, index, split)
    sample = SKILLS[skill](draws, difficulty, **options)
    return replace(sample, skill=skill, difficulty=difficulty, split=split, index=index)


def play(difficulty: int, *, seed: int | Sequence[int] = 0, index: int = 0, split: Split = "held-out") -> ScreenGame:
    """The game that sample `index` of the skill "screen" plays, to be played by someone else."""
    draws = _draws("screen", difficulty, seed, index, split)
    return make_game(draws, difficulty, draws.language())


def _draws(skill: str, difficulty: int, seed: int | Sequence[int], index: int, split: str) -> Draws:
    check_choice(skill, tuple(SKILLS), "skill")
    check_choice(difficulty, LEVELS, "difficulty")
    check_choice(split, SPLITS, "split")
    try:
        several: Sequence[Any] = seed if isinstance(seed, (list, tuple)) else [seed]
        seeds = [operator.index(one) for one in several]
        # zlib's sum rather than hash(), which differs from process to process.
        entropy = [SPLITS.index(split), zlib.crc32(skill.encode()), difficulty, operator.index(index), *seeds]
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy)))
    except (TypeError, ValueError) as error:
        raise DataError(f"seed, index: want whole numbers not below 0, got {seed!r} and {index!r} ({error})") from None
    return Draws(rng, held_out=split == "held-out")


def check_choice(value: object, allowed: Sequence[object], where: str) -> None:
    """Raise DataError for what is none of them, or only equal to one."""
    if isinstance(value, (bool, float)) or value not in allowed:
        raise DataError(f"{where}: wants one of {', '.join(map(repr, allowed))}, got {value!r}")
