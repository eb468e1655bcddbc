"""What is compared: the arms of each ablation, the samples of training, and those that each model is asked about."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from qwen2vl.samples import Sample
from qwen2vl.samples.draws import UNIT
from qwen2vl.samples.skills import Split


@dataclass(frozen=True)
class Arm:
    """One of the models that are compared.

    Attributes:
        one_dimensional: whether positions are 0, 1, 2, ... over all tokens instead of M-RoPE's.
        size: (height, width) in pixels that every picture is resized to, or None for pictures in their own sizes.
        peer: whether it is the alternative to the paper's choice.
    """

    name: str
    one_dimensional: bool = False
    size: tuple[int, int] | None = None
    peer: bool = False


@dataclass(frozen=True)
class Part:
    """A part of the training: samples of one skill, each of the levels equally often, for a share of the steps."""

    skill: str
    levels: tuple[int, ...]
    share: float


@dataclass(frozen=True)
class Question:
    """Samples of evaluation that are drawn in the same way.

    Attributes:
        level, split, options: arguments of :func:`qwen2vl.samples.generate`.
        change: a function that changes every sample.
    """

    level: int
    split: Split = "held-out"
    options: Mapping[str, Any] = field(default_factory=dict)
    change: Callable[[Sample], Sample] = lambda sample: sample


@dataclass(frozen=True)
class Ablation:
    """What is trained and what is asked.

    Attributes:
        course: the parts of the training, in order.
        steps: how many steps the training has at a budget of 1.
        questions: what is asked in evaluation, `count` samples of each, all of the course's last skill.
        group: gives the name of the class that a sample is scored in, and what a row of the result says of the class.
        every: the name of the class of all held-out samples, or None where they are not scored together.
    """

    title: str
    course: tuple[Part, ...]
    arms: tuple[Arm, ...]
    steps: int
    questions: tuple[Question, ...]
    group: Callable[[Sample], tuple[str, dict[str, Any]]]
    every: str | None = None
    count: int = 400


#: Every course begins with single letters, because the tower collapses otherwise; see :mod:`examples.small.plan`.
_LETTERS = Part("read", (0,), 0.3)

# ------------------------------------------------------------------------------------------------------- positions


_TRAINED_FRAMES = (4, 6)
_LONGER_FRAMES = (8, 12, 16, 24, 32)


def repeated(sample: Sample, frames: int) -> Sample:
    """The clip with `frames` frames: after its last frame it begins again."""
    shown = list(sample.members.values())
    return replace(
        sample,
        members={f"{n}.ppm": shown[n % len(shown)] for n in range(frames)},
        record={
            **sample.record,
            "videos": [{**sample.record["videos"][0], "video": [f"{n}.ppm" for n in range(frames)]}],
        },
    )


def _frames(sample: Sample) -> tuple[str, dict[str, Any]]:
    frames = len(sample.members)
    if frames in _TRAINED_FRAMES:
        return f"direction, {frames} frames", {"frames": frames, "movement": "as trained"}
    movement = "slower" if len(set(sample.members.values())) > 4 else "repeated"
    return f"direction, {frames} frames, {movement}", {"frames": frames, "movement": movement}


POSITIONS = Ablation(
    # Both arms have the small model's rope_theta, which was chosen for the horizontal axis of M-RoPE
    # (examples/small/shape.py). A token rotates 1-D RoPE by the angles by which a time step rotates M-RoPE.
    title="M-RoPE against 1-D RoPE",
    course=(_LETTERS, Part("video", (0, 1), 0.7)),
    arms=(Arm("M-RoPE"), Arm("1-D RoPE", one_dimensional=True, peer=True)),
    steps=850,
    # There are two kinds of longer clips. In the slower ones a thing moves as far as before in smaller steps, so that
    # the steps are new, too; in the repeated ones every time step is one of a trained clip, and only the number is new.
    questions=(
        *(Question(1, options={"frames": n}) for n in (*_TRAINED_FRAMES, *_LONGER_FRAMES)),
        *(Question(1, options={"frames": 4}, change=partial(repeated, frames=n)) for n in _LONGER_FRAMES),
    ),
    group=_frames,
)

# ------------------------------------------------------------------------------------------------------ resolution


def _pixels(sample: Sample) -> tuple[str, dict[str, Any]]:
    width, height = sample.size
    return f"counting, {width}x{height} pixels", {"pixels": [width, height]}


RESOLUTION = Ablation(
    title="dynamic against fixed resolution",
    course=(_LETTERS, Part("count", (0, 1, 2), 0.7)),
    # Things are equally large in pictures of all sizes. The pictures of training have 6.3 tokens on average, and 6 is
    # the nearest number that a nearly square picture has. Setting min_pixels = max_pixels would not give every picture
    # 6 tokens: rounding to units of 28 pixels makes 2 to 9 tokens of pictures that have one area and are so small. The
    # held-out pictures are larger (see below), so that the dynamic arm pays more for them; tables and figures say how
    # much.
    arms=(
        Arm("dynamic"),
        Arm("fixed, 4 tokens", size=(2 * UNIT, 2 * UNIT), peer=True),
        Arm("fixed, 6 tokens", size=(2 * UNIT, 3 * UNIT), peer=True),
    ),
    steps=1100,
    # The held-out pictures of level 2 are 112 x 56 and 84 x 112 pixels, sizes that are never trained on. The last
    # question asks level 2 in sizes that are trained on, with samples that are not.
    questions=(*(Question(n) for n in (0, 1, 2)), Question(2, split="train")),
    group=_pixels,
    every="counting, all sizes",
)
ABLATIONS = (POSITIONS, RESOLUTION)
