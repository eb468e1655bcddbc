"""Function calls of agents: how actions are declared, called, answered and read back, in both forms Qwen2-VL knows.

- "paper" (arXiv 2409.12191, section 2.2.1): `*FUNCTION*: Tap *ARGS*: {"point": (348,291)}`, then what the action did,
  a screenshot as a rule, between `*RESULT*: ` and `*RETURN*: `.
- "qwen" (Qwen-Agent): `✿FUNCTION✿`, `✿ARGS✿`, `✿RESULT✿`, `✿RETURN✿`, each on a line of its own, arguments in JSON.

One turn of the assistant holds thoughts, calls and results alike. The model writes up to the first RESULT, where
generation stops (:func:`stop_words`); its runtime inserts the result and RETURN; the model goes on from there, with the
colon. `render_turn` marks what the runtime inserts with ``"loss": False``, which keeps it out of the loss and its text
free of control tokens. Nothing is ever evaluated: arguments are JSON, and in the paper's form also points `(x,y)`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from ..errors import FunctionCallError
from .actions import Action, Style, check_name, declare_actions, keywords, stop_words, to_json

__all__ = [
    "Action",
    "Call",
    "Result",
    "Step",
    "Style",
    "check_call",
    "declare_actions",
    "defuse",
    "mark_results",
    "parse_turn",
    "render_call",
    "render_turn",
    "stop_words",
]


@dataclass(frozen=True)
class Call:
    """A model's wish to act.

    Attributes:
        arguments: by name, values that JSON can hold; in the paper's form a point is a tuple (x, y).
    """

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """What came of a call: text, or a list of items as messages hold them (`{"type": "image", "image": ...}`)."""

    content: str | Sequence[Mapping[str, Any]] = ""


Step = str | Call | Result


def render_call(call: Call, style: Style = "qwen") -> str:
    """The exact text of one call.

    A keyword inside an argument is written with a JSON escape, so that it is read back as what it is.

    Raises:
        FunctionCallError: an impossible name, arguments that are no dict with str keys, hold what JSON cannot, or are
            nested deeper than 32 levels.
    """
    words = keywords(style)
    check_name(call.name)
    if not isinstance(call.arguments, dict):
        raise FunctionCallError(f"arguments: wants a dict, got {type(call.arguments).__name__}")
    text = _write(call.arguments, style == "paper")
    # Both marks: the last one of a keyword may be the first one of the next.
    escape = f"\\u{ord(words.result[0]):04x}"
    escaped = words.pattern.sub(lambda match: f"{escape}{match[0][1:-1]}{escape}", text)
    return f"{words.function}: {call.name}{words.before_args}{words.args}: {escaped}"


def render_turn(steps: Iterable[Step], style: Style = "qwen") -> list[dict[str, Any]]:
    """The content of an assistant's turn: a list of items for a message.

    Args:
        steps: thoughts and answers (str), calls, and results, in order. Calls in a row are parallel; their results
            follow in the same order.

    Returns:
        Items; those with ``"loss": False`` are what the runtime inserts, from behind the first RESULT up to RETURN.
        Where the steps end with a result the model goes on from RETURN. A result's keywords lose their marks
        (:func:`defuse`): what a page says must not pass for the model's next call.

    Raises:
        FunctionCallError: a result without a call before it, a thought with a keyword in it, a malformed call.
    """
    words = keywords(style)
    items: list[dict[str, Any]] = []
    pieces: list[str] = []  # of the text that is the last item, joined when another follows
    pending, answered = 0, False  # calls without a result; whether the last step was a result

    def close() -> None:
        if pieces:
            items[-1]["text"] = "".join(pieces)
            pieces.clear()

    def put(text: str, loss: bool = True) -> None:
        if not pieces or items[-1].get("loss", True) != loss:
            close()
            items.append({"type": "text"} | ({} if loss else {"loss": False}))
        pieces.append(text)

    def go_on() -> None:
        put(f"\n{words.back}", False)
        put(": ")

    for n, step in enumerate(steps):
        if isinstance(step, Result):
            if not pending:
                raise FunctionCallError(f"steps[{n}]: a result wants a call before it")
            if not answered:
                put(f"\n{words.result}")
            put(f"\n{words.result}: " if answered else ": ", False)
            shown = [{"type": "text", "text": step.content}] if isinstance(step.content, str) else step.content
            for is_text, run in groupby(shown, key=lambda item: isinstance(item.get("text"), str)):
                if is_text:  # all at once: a keyword may be spread over items
                    put(defuse("".join(item["text"] for item in run), style), False)
                else:
                    close()
                    items += [{**item, "loss": False} for item in run]
            pending, answered = pending - 1, True
            continue
        if answered:
            go_on()
        if isinstance(step, Call):
            put(("\n" if items else "") + render_call(step, style))
            pending = pending + 1 if not answered else 1
        elif isinstance(step, str):
            if found := words.pattern.search(step):
                raise FunctionCallError(f"steps[{n}]: text must not hold the keyword {found[0]}, got {step!r}")
            put(step)
            pending = 0
        else:
            raise FunctionCallError(f"steps[{n}]: wants a str, Call or Result, got {type(step).__name__}")
        answered = False
    if answered:
        put(f"\n{words.back}", False)
    close()
    return [item for item in items if item.get("text") != ""]


def parse_turn(text: str, style: Style = "qwen", actions: Sequence[Action] | None = None) -> list[Step]:
    """Thoughts, calls and results of a turn, or of the piece of one that a model has just written.

    Spaces and line ends around keywords, and a colon at the beginning (after RETURN), do not matter. A RESULT at the
    end, where generation stopped, is no result yet.

    Args:
        actions: what calls are checked against, see :func:`check_call`.

    Raises:
        FunctionCallError: FUNCTION without name or ARGS, ARGS without FUNCTION, arguments that are no object or name
            one thing twice, RETURN without RESULT inside the text; or `check_call` refuses.
    """
    words = keywords(style)
    first, *rest = words.pattern.split(text)
    steps: list[Step] = _thought(first)
    pairs = list(zip(rest[::2], rest[1::2], strict=True))
    n = 0
    while n < len(pairs):
        word, after = pairs[n]
        value = _after_colon(after)
        if word == words.function:
            if not value:
                raise FunctionCallError(f"{word}: wants the name of an action, got nothing")
            if n + 1 == len(pairs) or pairs[n + 1][0] != words.args:
                raise FunctionCallError(f"{word} {value!r}: wants {words.args} next")
            call = Call(value, _arguments(_after_colon(pairs[n + 1][1]), value, style))
            if actions is not None:
                check_call(call, actions)
            steps.append(call)
            n += 1
        elif word == words.args:
            raise FunctionCallError(f"{word}: wants {words.function} before it")
        elif word == words.result:
            if n + 1 < len(pairs) or value:
                steps.append(Result(value))
        elif n == 0 or pairs[n - 1][0] != words.result:
            raise FunctionCallError(f"{word}: wants {words.result} before it")
        else:
            steps += _thought(after)
        n += 1
    return steps


def check_call(call: Call, actions: Sequence[Action]) -> None:
    """Raise FunctionCallError for an action that is not among them, a required parameter that is missing, or one that
    is not declared."""
    action = next((action for action in actions if action.name == call.name), None)
    if action is None:
        raise FunctionCallError(f"no action {call.name!r}; wants one of {[a.name for a in actions]}")
    known, required = _parameters(action)
    if missing := [name for name in required if name not in call.arguments]:
        raise FunctionCallError(f"{call.name}: lacks the arguments {missing}, got {list(call.arguments)}")
    if known is not None and (unknown := [name for name in call.arguments if name not in known]):
        raise FunctionCallError(f"{call.name}: has no arguments {unknown}, wants {known}")


def mark_results(items: Iterable[Mapping[str, Any]], style: Style) -> list[dict[str, Any]]:
    """The items of an assistant's turn whose text holds calls and results, with what its runtime inserted marked
    ``"loss": False`` as :func:`render_turn` does.

    Raises:
        FunctionCallError: a result that no RETURN ends, RETURN without a result, or a malformed call.
    """
    words = keywords(style)
    marked: list[dict[str, Any]] = []
    written: list[str] = []  # what the model wrote, results left empty
    inside = False
    for item in items:
        if not isinstance(item.get("text"), str):
            marked.append({**item, "loss": False} if inside else dict(item))
            continue
        text: str = item["text"]
        at = 0
        while at < len(text):
            word = words.back if inside else words.result
            end = text.find(word, at)
            cut = len(text) if end < 0 else end + len(word)
            marked.append({"type": "text", "text": text[at:cut]} | ({"loss": False} if inside else {}))
            if not inside:
                written.append(text[at:cut])
            if end >= 0:
                written += [word] if inside else []
                inside = not inside
            at = cut
    if inside:
        raise FunctionCallError(f"{words.result}: wants {words.back} before the turn ends")
    parse_turn("".join(written), style)
    return marked


def defuse(text: str, style: Style) -> str:
    """Text of others with every keyword robbed of its marks, `✿RESULT✿` becomes `RESULT`."""
    words = keywords(style)
    mark, bare = words.function[0], {word[1:-1] for word in words.all}
    longest = max(map(len, bare))
    first, *rest = text.split(mark)
    # Texts between marks that stay, each as its pieces and its length. Where a mark closes a keyword, what stands
    # before, the bare word and what follows become one such text, which another mark may make a keyword again.
    kept: list[list[str]] = [[first]]
    lengths = [len(first)]
    for piece in rest:
        if len(kept) > 1 and lengths[-1] <= longest and "".join(kept[-1]) in bare:
            word = "".join(kept.pop())
            kept[-1] += [word, piece] if piece else [word]
            lengths[-2:] = [lengths[-2] + len(word) + len(piece)]
        else:
            kept.append([piece])
            lengths.append(len(piece))
    return mark.join(map("".join, kept))


def _after_colon(text: str) -> str:
    text = text.strip()
    return text[1:].strip() if text.startswith(":") else text


def _thought(text: str) -> list[Step]:
    thought = _after_colon(text)
    return [thought] if thought else []


def _parameters(action: Action) -> tuple[list[str] | None, list[str]]:
    """Declared names, None where the action does not say, and the required ones."""
    parameters = action.parameters
    if isinstance(parameters, Mapping):
        properties, required = parameters.get("properties"), parameters.get("required") or []
        return (list(properties) if isinstance(properties, Mapping) else None), list(required)
    if isinstance(parameters, (list, tuple)) and all(isinstance(p, Mapping) and "name" in p for p in parameters):
        return [p["name"] for p in parameters], [p["name"] for p in parameters if p.get("required")]
    return None, []


def _write(value: Any, points: bool, depth: int = 0) -> str:
    """JSON, and where `points` a pair of numbers in a tuple as (x,y)."""
    if depth > _DEEPEST:
        raise FunctionCallError(f"arguments: want at most {_DEEPEST} levels, got more")
    if points and isinstance(value, tuple):
        if len(value) != 2 or not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in value):
            raise FunctionCallError(f"a tuple stands for a point (x, y), got {value!r}")
        return f"({to_json(value[0])},{to_json(value[1])})"
    if isinstance(value, dict):
        if bad := [key for key in value if not isinstance(key, str)]:
            raise FunctionCallError(f"arguments: wants str keys, got {bad[0]!r}")
        return (
            "{" + ", ".join(f"{to_json(key)}: {_write(item, points, depth + 1)}" for key, item in value.items()) + "}"
        )
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_write(item, points, depth + 1) for item in value) + "]"
    return to_json(value)


# A string, to be passed over, or a point outside of strings; a string that nothing ends is passed over, too, or each of
# its quotes would be tried to the end. JSON has no word for a point: it is read as an object with this one key.
_NUMBER = r"\s*(-?[0-9]+(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?)\s*"
_POINT = re.compile(rf'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)|\({_NUMBER},{_NUMBER}\)', re.DOTALL)
_POINT_KEY = "\x00point"
_DEEPEST = 32  # levels of arguments: models write ever more brackets, and JSON's own limit is Python's stack


def _arguments(text: str, name: str, style: Style) -> dict[str, Any]:
    def hook(pairs: list[tuple[str, Any]]) -> Any:
        if style == "paper" and [key for key, _ in pairs] == [_POINT_KEY]:
            return tuple(pairs[0][1])
        if len(found := dict(pairs)) < len(pairs):
            raise ValueError(f"a name comes twice among {[key for key, _ in pairs]}")
        return found

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is no JSON")

    plain = text
    if style == "paper":
        key = json.dumps(_POINT_KEY)
        plain = _POINT.sub(lambda m: m[0] if m[1] is None else f"{{{key}: [{m[1]}, {m[2]}]}}", text)
    try:
        arguments = json.loads(plain, object_pairs_hook=hook, parse_constant=refuse)
    except (ValueError, RecursionError, TypeError) as error:
        raise FunctionCallError(f"{name}: arguments are no JSON object ({error}), got {text!r}") from None
    if not isinstance(arguments, dict):
        raise FunctionCallError(f"{name}: wants a JSON object of arguments, got {text!r}")
    return arguments
