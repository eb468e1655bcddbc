"""The places that an answer names, with the image or video that they lie in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import GroundingError
from .grounding import Box, Quad, parse_grounding

if TYPE_CHECKING:
    from ..prompt.inputs import MediaInfo


@dataclass(frozen=True)
class Located:
    """One place of an answer.

    Attributes:
        label: the phrase that it belongs to, None for a place that stands alone.
        place: where it is, in thousandths of the width and height.
        media: which image or video it lies in: the index among those of its conversation. None where there are none or
            several, as an answer does not say which of them it means.
        pixels: what `place.to_pixels` gives for that image's source, upright and before resizing, or for any frame of
            that video, whose answer names no frame. None where `media` is.
    """

    label: str | None
    place: Box | Quad
    media: int | None
    pixels: tuple[float, float, float, float] | tuple[tuple[float, float], ...] | None


def locate(text: str, media: Sequence[MediaInfo], index: int | None = None) -> list[Located]:
    """The places in an answer that was decoded with its control tokens, in order; slips are mended as
    `parse_grounding` does.

    Args:
        media: the images and videos of the conversation, in order of appearance.
        index: the one that the answer is about, where there are several.

    Raises:
        GroundingError: there is no image or video of that index.
    """
    if index is not None and not 0 <= index < len(media):
        raise GroundingError(f"media: wants the index of one of {len(media)} images and videos, got {index!r}")
    if index is None and len(media) == 1:
        index = 0
    found = []
    for item in parse_grounding(text):
        for place in item.places:
            pixels = None
            if index is not None:
                height, width = media[index].source_size
                pixels = place.to_pixels(width=width, height=height)
            found.append(Located(item.phrase, place, index, pixels))
    return found
