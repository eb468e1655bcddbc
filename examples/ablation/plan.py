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
        size: (height, width) in pixels that every picture is resized to; None: pictures are taken as they are.
        peer: whether it is what the paper's choice is held against.
    """

    name: str
    one_dimensional: bool = False
    size: tuple[int, int] | None = None
    peer: bool = False


@dataclass(frozen=True)
class Part:
    """A part of training: samples of one skill, of these levels equally often, for `share` of the steps."""

    skill: str
    levels: tuple[int, ...]
    share: float


@dataclass(frozen=True)
class Question:
    """Samples of evaluation that are drawn alike.

    Attributes:
        level, split, options: see :func:`qwen2vl.samples.generate`.
        change: what is done to every sample.
    """

    level: int
    split: Split = "held-out"
    options: Mapping[str, Any] = field(default_factory=dict)
    change: Callable[[Sample], Sample] = lambda sample: sample


@dataclass(frozen=True)
class Ablation:
    """What is trained and what is asked.

    Attributes:
        course: the parts of training, in order.
        steps: at a budget of 1.
        questions: of evaluation, `count` samples each of the course's last skill.
        group: (sample) -> the class of samples that it is scored in, as a row names it, and what the row says of it.
        every: name of the class of all held-out samples; None: they are none together.
    """

    title: str
    course: tuple[Part, ...]
    arms: tuple[Arm, ...]
    steps: int
    questions: tuple[Question, ...]
    group: Callable[[Sample], tuple[str, dict[str, Any]]]
    every: str | None = None
    count: int = 400


#: What every course begins with: else the tower collapses, see :mod:`examples.small.plan`.
_LETTERS = Part("read", (0,), 0.3)

# ------------------------------------------------------------------------------------------------------- positions


_TRAINED_FRAMES = (4, 6)
_LONGER_FRAMES = (8, 12, 16, 24, 32)


def repeated(sample: Sample, frames: int) -> Sample:
    """The clip from the beginning again and again, up to so many frames."""
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
    # Both at the small model's rope_theta, which was chosen for M-RoPE's width (examples/small/shape.py); 1-D RoPE
    # turns by the same angles a token as M-RoPE does a time step.
    title="M-RoPE against 1-D RoPE",
    course=(_LETTERS, Part("video", (0, 1), 0.7)),
    arms=(Arm("M-RoPE"), Arm("1-D RoPE", one_dimensional=True, peer=True)),
    steps=850,
    # Two kinds of longer clips. In the slower ones what moves goes as far as ever, by ever smaller steps, which is more
    # than a longer clip; in the repeated ones every time step is one of a trained length, and only their number is new.
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
    # Things have the same sizes in pictures of all sizes. Those of training have 6.3 tokens on average; 6 is the next
    # number with nearly square pictures. min_pixels = max_pixels would not keep it: of pictures as small as these,
    # rounding to units of 28 pixels makes 2 to 9 tokens for one and the same area. Held-out ones are larger (see
    # below), so that the arm that takes them as they are pays more for them; tables and figures say how much.
    arms=(
        Arm("dynamic"),
        Arm("fixed, 4 tokens", size=(2 * UNIT, 2 * UNIT), peer=True),
        Arm("fixed, 6 tokens", size=(2 * UNIT, 3 * UNIT), peer=True),
    ),
    steps=1100,
    # Held-out pictures of the upper level are 112 x 56 and 84 x 112, sizes that are never trained on; the others of it
    # are fresh samples of the training's kind.
    questions=(*(Question(n) for n in (0, 1, 2)), Question(2, split="train")),
    group=_pixels,
    every="counting, all sizes",
)
ABLATIONS = (POSITIONS, RESOLUTION)
