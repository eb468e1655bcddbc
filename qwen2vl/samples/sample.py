"""One generated sample: its media, the question about them and the true answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from ..agents.grounding import Grounded
from .draws import UNIT


@dataclass(frozen=True)
class Sample:
    """What a model is asked, what it is to answer, and what was drawn.

    Attributes:
        record: what the JSON file of a WebDataset sample holds: `messages` and the names of the media.
        members: the media by name, as PPM files.
        answer: everything that the assistant is to write. For an episode of the screen game these are several turns in
            one text, see `qwen2vl.samples.playing`.
        language: of question and answer, a key of `LANGUAGES`.
        size: (width, height) of the pictures in pixels.
        places: what is to be found, for the skill "point".
        scene: what was drawn, in numbers and names: objects with their colour, shape and box in pixels, texts, events.
        skill, difficulty, split, index: the arguments that it was generated with.
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


def to_ppm(image: Image.Image) -> bytes:
    """An RGB image as a PPM file, a header and the pixels: the format that is quickest to write and to read."""
    return b"P6\n%d %d\n255\n" % image.size + image.tobytes()


def from_ppm(data: bytes) -> np.ndarray:
    """The `(H, W, 3)` uint8 pixels, read-only, of what :func:`to_ppm` wrote."""
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
    """A sample that asks one question about pictures or, with `video`, about a clip whose frames they are."""
    members = {f"{n}.ppm": to_ppm(picture) for n, picture in enumerate(pictures)}
    kind = "video" if video else "image"
    turns = [
        {"role": "user", "content": f"<{kind}>" * (1 if video else len(pictures)) + prompt},
        {"role": "assistant", "content": answer},
    ]
    # Frames keep their own size: the usual least area of a video frame would make each of them a hundred tokens.
    media = [{"video": list(members), "min_pixels": UNIT * UNIT}] if video else list(members)
    record = {"messages": turns, f"{kind}s": media}
    return Sample(record, members, answer, language, pictures[0].size, tuple(places), scene or {})
