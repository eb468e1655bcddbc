"""What scores are given, checked: a None or a number in the place of a text is named, and not scored."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from ..agents.grounding import Box
from ..errors import Qwen2VLError

Corners = tuple[float, float, float, float]


def check_text(name: str, value: object) -> str:
    """``value`` if it is a text."""
    if not isinstance(value, str):
        raise Qwen2VLError(f"{name}: wants a text, got {value!r}")
    return value


def check_texts(name: str, values: object, *, least: int = 1) -> list[str]:
    """``values`` as a list if they are a collection of at least so many texts, and not one text."""
    if isinstance(values, (str, bytes)) or not isinstance(values, Collection) or len(values) < least:
        raise Qwen2VLError(f"{name}: wants a list of at least {_count(least)}, got {values!r}")
    return [check_text(f"{name}[{n}]", value) for n, value in enumerate(values)]


def check_number(name: str, value: object, *, low: float = 0.0) -> float:
    """``value`` if it is a finite number, at least ``low``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < low:
        raise Qwen2VLError(f"{name}: wants a finite number of at least {low:g}, got {value!r}")
    return value


def check_box(name: str, value: object) -> Corners:
    """The corners (x1, y1, x2, y2) of a `Box` or of four finite numbers, x1 <= x2 and y1 <= y2."""
    if isinstance(value, Box):
        return value.x1, value.y1, value.x2, value.y2
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)) and len(value) == 4:
        x1, y1, x2, y2 = (check_number(f"{name}[{n}]", one, low=-math.inf) for n, one in enumerate(value))
        if x1 <= x2 and y1 <= y2:
            return x1, y1, x2, y2
    raise Qwen2VLError(f"{name}: wants a Box or (x1, y1, x2, y2) with x1 <= x2 and y1 <= y2, got {value!r}")


def check_boxes(name: str, values: object) -> list[Corners]:
    """The corners of each of several boxes."""
    if not isinstance(values, Sequence) or isinstance(values, (str, bytes)):
        raise Qwen2VLError(f"{name}: wants a list of boxes, got {values!r}")
    return [check_box(f"{name}[{n}]", value) for n, value in enumerate(values)]


def _count(least: int) -> str:
    return "one text" if least == 1 else f"{least} texts"
