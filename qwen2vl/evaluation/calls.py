"""What agents are measured by: the calls of a turn, and the actions of AITZ on a phone's screen.

function calls      type match and exact match (Qwen2-VL, arXiv 2409.12191, section 3.2.7): the right functions, and the
                    right arguments, too. The paper's script and its questions are not published.
AITZ                type match and exact match (Zhang et al. 2024, arXiv 2403.02713; the script is CoAT's evaluate.py)
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..agents.actions import Style, stop_words
from ..agents.function_calls import Call, parse_turn
from ..agents.grounding import parse_point
from ..errors import FunctionCallError, GroundingError, Qwen2VLError
from .checks import check_number, check_text

_KINDS = ("click", "scroll", "type", "press", "stop")
_BUTTONS = ("enter", "back", "home")
#: AITZ's boxes grow by this about their middle, AitW's elements by that to each side; so far off may AitW's touches be.
_AITZ_SCALE, _AITW_SIDE, _AITW_DISTANCE = 1.2, 0.7, 0.14


@dataclass(frozen=True)
class Matched:
    """1.0 or 0.0 each: whether the kinds of actions are right, and whether all of them is."""

    type_match: float
    exact_match: float


def read_calls(answer: str, style: Style = "qwen") -> list[Call]:
    """The calls of an answer, in order, up to the first RESULT, which is not the model's to write; none where they are
    malformed, as nothing could be run then."""
    written = check_text("answer", answer).split(stop_words(style)[0])[0]
    try:
        return [step for step in parse_turn(written, style) if isinstance(step, Call)]
    except FunctionCallError:
        return []


def match_calls(found: Sequence[Call], wanted: Sequence[Call]) -> Matched:
    """Type match: the same functions in the same order, and as many. Exact match: with equal arguments, too: the same
    names, and values that are the same in JSON, where 1 is 1.0 and a point is the list of its two numbers."""
    for name, calls in (("found", found), ("wanted", wanted)):
        if not all(isinstance(call, Call) for call in calls):
            raise Qwen2VLError(f"{name}: wants calls, got {calls!r}")
    kinds = [call.name for call in found] == [call.name for call in wanted]
    exact = kinds and all(_same(f.arguments, w.arguments) for f, w in zip(found, wanted, strict=True))
    return Matched(float(kinds), float(exact))


def match_aitz(found: Call | None, step: Mapping[str, Any], *, width: float, height: float) -> Matched:
    """Type match and exact match of one step of AITZ.

    - click: the box, grown by 1.2, holds the touch, or has an IoU above 0.5 with an element, grown likewise, that does.
      The published script sets the touch for "scroll" alone, which it does not use there, and would compare
      clicks with the corner (0, 0); that cannot be meant, and here a click is compared with its touch.
    - A click at a point has no rule there, and is judged by Android in the Wild's (Rawles et al. 2023): within 0.14 of
      the screen of the touch, or both in one element, grown by 0.7 of its sizes to each side.
    - scroll: the same direction. press: the same button. stop: always.
    - type: one text holds the other (an empty one is held by all), or they are alike by more than 0.8: twice the length
      of their longest common subsequence by the sum of their lengths.

    Args:
        found: an action, None for none. Its kind is the one of click, scroll, type, press and stop that its name holds,
            in any case; "input" is type and "tap" is click. Arguments: "bbox" (x1, y1, x2, y2) or "point" (x, y) in
            thousandths, "direction", "text"; a button stands in the name ("press_back") or as "button".
        step: the data set's own record; read are "coat_action_desc", "result_action_text", "result_touch_yx" and
            "ui_positions", the latter two as lists or as JSON.
        width, height: of the screenshot, in pixels.

    Raises:
        Qwen2VLError: the step lacks what its action needs.
    """
    check_number("width", width, low=1)
    check_number("height", height, low=1)
    words = check_text("coat_action_desc", step.get("coat_action_desc")).split(" ")
    kind = _published_kind(words[0])
    if kind is None:
        raise Qwen2VLError(f"coat_action_desc: wants a first word with one of {', '.join(_KINDS)}, got {words[0]!r}")
    judge = {"click": _clicks, "scroll": _scrolls, "type": _types, "press": _presses, "stop": lambda *_: True}[kind]
    # Judged in any case, so that what is wrong with a step is told whatever was answered.
    same = judge(found or Call(kind), step, width, height)
    if found is None or _kind(found.name) != kind:
        return Matched(0.0, 0.0)
    return Matched(1.0, float(same))


def _published_kind(name: str) -> str | None:
    name = name.lower()
    return "type" if name == "input" else next((kind for kind in _KINDS if kind in name), None)


def _kind(name: str) -> str | None:
    return _published_kind(name) or ("click" if "tap" in name.lower() else None)


def _clicks(found: Call, step: Mapping[str, Any], width: float, height: float) -> bool:
    touch = _numbers("result_touch_yx", step.get("result_touch_yx"))
    elements = [
        _numbers(f"ui_positions[{n}]", one, 4)
        for n, one in enumerate(_listed("ui_positions", step.get("ui_positions")))
    ]
    box = found.arguments.get("bbox")
    if box is not None:
        return _box_clicks(box, touch, elements, width, height)
    try:
        x, y = parse_point(found.arguments.get("point"))
    except GroundingError:
        return False
    point = y / 1000, x / 1000
    if math.dist(point, touch) <= _AITW_DISTANCE:
        return True
    for top, left, tall, wide in elements:
        top, left, tall, wide = top / height, left / width, tall / height, wide / width
        upper, outer = max(0.0, top - _AITW_SIDE * tall), max(0.0, left - _AITW_SIDE * wide)
        lower = upper + min(1.0, tall * (1 + 2 * _AITW_SIDE))
        right = outer + min(1.0, wide * (1 + 2 * _AITW_SIDE))
        if all(upper <= y <= lower and outer <= x <= right for y, x in (point, touch)):
            return True
    return False


def _box_clicks(
    box: object, touch: Sequence[float], elements: Sequence[Sequence[float]], width: float, height: float
) -> bool:
    try:
        x1, y1, x2, y2 = _numbers("bbox", box, 4)
    except Qwen2VLError:
        return False
    mine = _grown(
        round(x1 / 1000 * width), round(y1 / 1000 * height), round(x2 / 1000 * width), round(y2 / 1000 * height)
    )
    x, y = int(touch[1] * width), int(touch[0] * height)
    if _holds(mine, x, y):
        return True
    for top, left, tall, wide in elements:
        element = _grown(left, top, left + wide, top + tall)
        if _holds(element, x, y) and _overlap(mine, element) > 0.5:
            return True
    return False


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """IoU, in which a box has an area of at least one pixel."""
    both = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = [max(1.0, (box[2] - box[0]) * (box[3] - box[1])) for box in (a, b)]
    return both / (sum(areas) - both)


def _grown(x1: float, y1: float, x2: float, y2: float) -> tuple[float, ...]:
    x, y, w, h = (x1 + x2) / 2, (y1 + y2) / 2, (x2 - x1) * _AITZ_SCALE, (y2 - y1) * _AITZ_SCALE
    return x - w / 2, y - h / 2, x + w / 2, y + h / 2


def _holds(box: Sequence[float], x: float, y: float) -> bool:
    return box[0] <= x <= box[2] and box[1] <= y <= box[3]


def _scrolls(found: Call, step: Mapping[str, Any], *_: float) -> bool:
    words = step["coat_action_desc"].split(" ")
    if len(words) < 2 or not words[1].strip():
        raise Qwen2VLError(f"coat_action_desc: wants a direction behind scroll, got {step['coat_action_desc']!r}")
    return found.arguments.get("direction") == words[1].strip()


def _types(found: Call, step: Mapping[str, Any], *_: float) -> bool:
    wanted, text = check_text("result_action_text", step.get("result_action_text")), found.arguments.get("text", "")
    return isinstance(text, str) and (text in wanted or wanted in text or _alike(text, wanted) > 0.8)


def _presses(found: Call, step: Mapping[str, Any], *_: float) -> bool:
    wanted = next((button for button in _BUTTONS if button in step["coat_action_desc"]), None)
    if wanted is None:
        raise Qwen2VLError(f"coat_action_desc: wants enter, back or home, got {step['coat_action_desc']!r}")
    named = found.name.split("_")
    button = named[1] if len(named) > 1 else found.arguments.get("button")
    return isinstance(button, str) and button.lower() == wanted


def _alike(a: str, b: str) -> float:
    """Twice the longest common subsequence by both lengths, 1 for two empty texts (Levenshtein.ratio)."""
    row = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], diagonal + 1 if x == y else max(row[j], row[j - 1])
    return 2 * row[-1] / (len(a) + len(b)) if a or b else 1.0


def _listed(name: str, value: object) -> list[Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = None
    if not isinstance(value, list):
        raise Qwen2VLError(f"{name}: wants a list, or one in JSON, got {value!r}")
    return value


def _numbers(name: str, value: object, count: int = 2) -> list[float]:
    values = list(value) if isinstance(value, tuple) else _listed(name, value)
    if len(values) != count:
        raise Qwen2VLError(f"{name}: wants {count} numbers, got {value!r}")
    return [check_number(f"{name}[{n}]", one, low=-math.inf) for n, one in enumerate(values)]


def _same(a: Any, b: Any) -> bool:
    """Whether JSON has one value for both."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return a == b
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return type(a) is type(b) and a == b
