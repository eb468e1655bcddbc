"""The size at which the model sees an image (Qwen2-VL, arXiv 2409.12191, section 2.1: naive dynamic resolution)."""

from __future__ import annotations

import math
import operator

MAX_ASPECT_RATIO = 200


def smart_resize(
    height: int, width: int, *, factor: int = 28, min_pixels: int = 56 * 56, max_pixels: int = 12_845_056
) -> tuple[int, int]:
    """The size at which the model sees an image: multiples of ``factor``, within a range of pixels.

    Sides are rounded to the nearest multiple (half to even); a product outside [min_pixels, max_pixels] is scaled by
    one ratio, down with floor (at least ``factor`` a side) or up with ceil. As in the released processor, the upward
    ceil may pass ``max_pixels`` and is not corrected.

    Args:
        height, width: source size in pixels.
        factor: patch_size * merge_size.
        min_pixels, max_pixels: range of height * width after resizing; the defaults are the released checkpoints'.

    Returns:
        (height, width) in pixels.

    Raises:
        ValueError: a value is not a positive integer, min_pixels > max_pixels, or one side is more than 200 times the
            other.
    """
    given = {"height": height, "width": width, "factor": factor, "min_pixels": min_pixels, "max_pixels": max_pixels}
    height, width, factor, min_pixels, max_pixels = (_positive(name, value) for name, value in given.items())
    if min_pixels > max_pixels:
        raise ValueError(f"min_pixels must not exceed max_pixels, got {min_pixels} > {max_pixels}")
    if (ratio := max(height, width) / min(height, width)) > MAX_ASPECT_RATIO:
        raise ValueError(
            f"aspect ratio must be at most {MAX_ASPECT_RATIO}, got {ratio:g} (height {height}, width {width})"
        )
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    if new_height * new_width > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height, new_width


def _positive(name: str, value: object) -> int:
    try:
        number = -1 if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = -1
    if number < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return number
