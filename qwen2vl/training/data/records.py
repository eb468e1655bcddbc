"""From a record, whatever its format, to a conversation or a document that the processor takes.

A conversation is a record with `conversations` (`from`, `value`) or `messages` (`role`, `content`); a document is one
with `text`, all of which is taught: an image with its caption, a page with its text, text and images in turn. Images
and videos stand where `<image>` and `<video>` are in the text, in the order of the record's `image`, `images`, `video`
or `videos`; or where Qwen-VL's `<img>path</img>` is, whose `<ref>`, `<box>` and `<quad>` in what is taught then become
Qwen2-VL's markers. Messages may also hold lists of items with media of their own.

Function calls are text in an assistant's turn (entry or record with `agent`), or turns of their own: `function_call`
with `{"name": ..., "arguments": {...}}` and `observation`, or OpenAI's messages with `tool_calls`, and those of role
`tool` with a `tool_call_id`. The record's `tools` become the system prompt.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

from ...agents.actions import Action, declare_actions
from ...agents.function_calls import Call, Result, Step, mark_results, render_turn
from ...agents.grounding import from_qwen_vl, parse_grounding
from ...errors import DataError, FunctionCallError
from ...prompt.chatml import DEFAULT_SYSTEM_PROMPT
from ...prompt.tokenizer import GROUNDING_TOKENS
from .entry import DataEntry
from .json_files import Raw, parse_object

Item = dict[str, Any]
Resolve = Callable[[str], Any]

_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "function_call": "call",
    "observation": "result",
    "tool": "result",
}
_TAG = re.compile(r"(<image>|<video>|<img>|</img>)")
_IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "avif")
_VIDEOS = ("mp4", "m4v", "mkv", "webm", "mov", "avi")
_SCHEME = re.compile(r"(?:data:|[A-Za-z][A-Za-z0-9+.-]+://)")


def read_record(
    raw: Raw, entry: DataEntry, system: str = DEFAULT_SYSTEM_PROMPT
) -> tuple[Literal["conversation", "document"], list[Item]]:
    """The kind of a sample, and its messages or its items.

    `system`: what stands before its `tools` where it has no system prompt of its own.

    Raises:
        DataError, PromptError, FunctionCallError, GroundingError: it is malformed; none names its position.
    """
    resolve: Resolve = _member_of(raw.members) if raw.folder is None else _path_in(raw.folder)
    if entry.format == "webdataset" and ("txt" in raw.members or not raw.text):
        record = _pair(raw)
    else:
        record = parse_object(raw.text)
    media = _Media(record, raw, resolve)
    wanted = {
        "conversations": ("conversations", "text"),
        "sharegpt": ("messages", "conversations", "text"),
        "webdataset": ("conversations", "messages", "text"),
        "generated": ("messages",),
    }[entry.format]
    held = [key for key in wanted if record.get(key) is not None]
    if len(held) != 1:
        raise DataError(f"wants one of {', '.join(map(repr, wanted))}, got {', '.join(map(repr, held)) or 'none'}")
    if held[0] == "text":
        items = media.items(_text(record["text"], "text"))
        if media.qwen_vl:
            items = [_with_markers(item) for item in items]
        _check_grounding(items, "text")
        media.check_all_used()
        return "document", items
    messages = _messages(record, held[0], media, entry, system)
    media.check_all_used()
    return "conversation", messages


# ---- media ----


class _Media:
    """The images and videos of a record, handed out as their tags come."""

    def __init__(self, record: Mapping[str, Any], raw: Raw, resolve: Resolve):
        self.resolve = resolve
        self.qwen_vl = False  # whether <img> was met
        self.own = False  # whether items or <img> named media
        self.queues: dict[str, Iterator[Any]] = {}
        self.counts: dict[str, int] = {}
        self.used: dict[str, int] = {"image": 0, "video": 0}
        # A sample of a shard that names no media uses its members in their order.
        self.named = any(record.get(key) is not None for key in ("image", "images", "video", "videos"))
        for kind, extensions in (("image", _IMAGES), ("video", _VIDEOS)):
            keys = [key for key in (kind, f"{kind}s") if record.get(key) is not None]
            if len(keys) > 1:
                raise DataError(f"wants {keys[0]!r} or {keys[1]!r}, got both")
            if keys:
                value = record[keys[0]]
                listed = value if isinstance(value, list) else [value]
                sources = [self._item(kind, source, f"{keys[0]}[{n}]") for n, source in enumerate(listed)]
            else:
                own = [] if self.named else [name for name in raw.members if name.rpartition(".")[2] in extensions]
                sources = [{"type": kind, kind: raw.members[name]} for name in own]
            self.queues[kind], self.counts[kind] = iter(sources), len(sources)

    def items(self, text: str) -> list[Item]:
        """Text and media in order; a text with none is one item."""
        found: list[Item] = []
        for is_tag, piece in _tagged(text):
            if not is_tag:
                found.append({"type": "text", "text": piece})
            elif piece in ("<image>", "<video>"):
                kind = piece[1:-1]
                self.used[kind] += 1
                item = next(self.queues[kind], None)
                if item is None:
                    raise DataError(
                        f"wants {self.used[kind]} or more {kind}s, one for each {piece}, got {self.counts[kind]}"
                    )
                found.append(item)
            else:
                self.qwen_vl = self.own = True
                found.append({"type": "image", "image": self.resolve(piece[len("<img>") : -len("</img>")].strip())})
        return found or [{"type": "text", "text": ""}]

    def own_items(self, items: Iterable[Any], where: str) -> list[Item]:
        """Items that name their media themselves; `render` checks the rest of them."""
        read: list[Item] = []
        for n, item in enumerate(items):
            if not isinstance(item, Mapping):
                raise DataError(f"{where}[{n}]: wants an object, got {type(item).__name__}")
            item = {key: value for key, value in item.items() if value is not None}
            kind = str(item.get("type", "")).removesuffix("_url")
            for key in ("image", "video", "image_url", "video_url", "url", "path"):
                if key not in item:
                    continue
                self.own = True
                if isinstance(item[key], Mapping) and isinstance(item[key].get("url"), str):
                    item[key] = {**item[key], "url": self.resolve(item[key]["url"])}
                elif not item[key] and kind in ("image", "video"):  # {"type": "image"} in place of a tag
                    continue
                else:
                    item[key] = self._source(item[key], f"{where}[{n}].{key}")
            if kind in ("image", "video") and set(item) <= {"type", "loss"}:
                (given,) = self.items(f"<{kind}>")
                item = {**given, **item}
            read.append(item)
        return read

    def check_all_used(self) -> None:
        for kind, count in self.counts.items():
            if count > self.used[kind] and (self.named or not self.own):
                raise DataError(f"has {count} {kind}s, but {self.used[kind]} <{kind}> in its text")

    def _item(self, kind: str, source: Any, where: str) -> Item:
        if not isinstance(source, Mapping):
            return {"type": kind, kind: self._source(source, where)}
        item = {key: value for key, value in source.items() if value is not None and key != "type"}
        keys = [key for key in (kind, "url", "path") if key in item]
        if len(keys) != 1:
            raise DataError(
                f"{where}: wants one of {kind!r}, 'url', 'path', got {', '.join(map(repr, source)) or 'none'}"
            )
        return {"type": kind, kind: self._source(item.pop(keys[0]), f"{where}.{keys[0]}"), **item}

    def _source(self, source: Any, where: str) -> Any:
        if isinstance(source, str) and source:
            return self.resolve(source)
        if isinstance(source, list) and source and all(isinstance(frame, str) and frame for frame in source):
            return [self.resolve(frame) for frame in source]
        raise DataError(f"{where}: wants a path, got {source!r}"[:200])


def _tagged(text: str) -> Iterator[tuple[bool, str]]:
    """The tags of a text, "<image>", "<video>" and whole "<img>path</img>", and the texts beside them, none empty."""
    pieces = _TAG.split(text)  # what looks like a part of a tag is at the odd places
    last_end = max((n for n in range(1, len(pieces), 2) if pieces[n] == "</img>"), default=0)
    pending, n = [pieces[0]], 1  # text; the place of the next part
    while n < len(pieces):
        begin = n
        if pieces[n] == "<img>" and last_end > n:
            while pieces[n] != "</img>":
                n += 2
        tag = "".join(pieces[begin : n + 1])
        if n > begin or tag in ("<image>", "<video>"):
            if any(pending):
                yield False, "".join(pending)
            pending.clear()
            yield True, tag
        else:
            pending.append(tag)
        pending.append(pieces[n + 1])
        n += 2
    if any(pending):
        yield False, "".join(pending)


def _path_in(folder: str) -> Resolve:
    return lambda name: name if _SCHEME.match(name) else os.path.join(folder, name)


def _member_of(members: Mapping[str, Any]) -> Resolve:
    def resolve(name: str) -> Any:
        if _SCHEME.match(name):
            return name
        extension = os.path.basename(name).lower()
        # By the extension that follows the sample's key, or by the whole name, key included.
        for candidate in (extension, extension.partition(".")[2]):
            if candidate in members:
                return members[candidate]
        raise DataError(f"{name!r} is no member of the sample; it has {', '.join(members) or 'none'}")

    return resolve


def _pair(raw: Raw) -> dict[str, Any]:
    """A sample without JSON of its own: text, with the images and videos before it where it does not place them."""
    if "txt" not in raw.members:
        raise DataError(f"wants a member json or txt, got {', '.join(raw.members) or 'none'}")
    try:
        text = raw.members["txt"].decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"member txt is no UTF-8 text: {error.reason} at byte {error.start}") from None
    if not any(is_tag for is_tag, _ in _tagged(text)):
        kinds = [(name.rpartition(".")[2] in _VIDEOS) for name in raw.members if _is_media(name)]
        text = "".join("<video>" if video else "<image>" for video in kinds) + text
    return {"text": text}


def _is_media(name: str) -> bool:
    return name.rpartition(".")[2] in (*_IMAGES, *_VIDEOS)


# ---- conversations ----


def _messages(record: Mapping[str, Any], key: str, media: _Media, entry: DataEntry, system: str) -> list[Item]:
    turns = record[key]
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{key}: wants a list of turns, got {turns!r}"[:200])
    names = ("from", "value") if key == "conversations" else ("role", "content")
    read = [part for n, turn in enumerate(turns) for part in _turn(turn, names, f"{key}[{n}]", media)]
    style = record.get("agent", entry.agent)
    messages: list[Item] = []
    if record.get("system") is not None:
        if read[0]["role"] == "system":
            raise DataError(f"system: {key}[0] is a system turn, too")
        messages.append({"role": "system", "content": _text(record["system"], "system")})
    for on_assistant, group in itertools.groupby(read, lambda turn: turn["role"] in ("assistant", "call", "result")):
        run = list(group)
        if on_assistant and any(turn["role"] != "assistant" for turn in run):
            messages.append({"role": "assistant", "content": _agent_turn(run, style or "qwen", media)})
            continue
        for turn in run:
            if on_assistant:
                content = turn["content"]
                if style is not None:
                    content = mark_results(content, style)
                turn = {**turn, "content": [_with_markers(item) for item in content] if media.qwen_vl else content}
            messages.append(turn)
    if record.get("tools") is not None:
        _declare(messages, record["tools"], style or "qwen", system)
    for n, message in enumerate(messages):
        if message["role"] == "assistant":
            _check_grounding(message["content"], f"messages[{n}].content")
    return messages


def _turn(turn: Any, names: tuple[str, str], where: str, media: _Media) -> list[Item]:
    """A turn, whose role and content stand under ``names``, with our name for the role and a list of items.

    One of an assistant that also holds calls is two: what it says, and its calls.
    """
    if not isinstance(turn, Mapping):
        raise DataError(f"{where}: wants an object, got {type(turn).__name__}")
    role = turn.get(names[0])
    if not isinstance(role, str) or role not in _ROLES:
        if unknown := [key for key in turn if key not in (*names, "loss")]:
            raise DataError(f"{where}: unknown key {unknown[0]!r}; a turn takes {names[0]!r}, {names[1]!r}, 'loss'")
        raise DataError(f"{where}.{names[0]}: wants one of {', '.join(map(repr, _ROLES))}, got {role!r}")
    more = {"assistant": ("tool_calls",), "result": ("tool_call_id", "name")}.get(_ROLES[role], ())
    known = (*names, "loss", *more)
    turn = {key: value for key, value in turn.items() if value is not None}  # tables fill what nobody said with null
    if unknown := [key for key in turn if key not in known]:
        raise DataError(f"{where}: unknown key {unknown[0]!r}; a turn of {role!r} takes {', '.join(map(repr, known))}")
    loss = {} if "loss" not in turn else {"loss": turn["loss"]}
    if calls := turn.get("tool_calls"):
        text, ids = _tool_calls(calls, f"{where}.tool_calls")
        made = {"role": "call", "content": [{"type": "text", "text": text}], "ids": ids, **loss}
        said = {key: value for key, value in turn.items() if key != "tool_calls"}
        return [*(_turn(said, names, where, media) if said.get(names[1]) else []), made]
    content = turn.get(names[1])
    if role == "function_call" and not isinstance(content, str):
        content = json.dumps(content)
    if isinstance(content, list):
        items = media.own_items(content, f"{where}.{names[1]}")
    elif role == "function_call":
        items = [{"type": "text", "text": content}]
    else:
        items = media.items(_text(content, f"{where}.{names[1]}"))
    answers = {} if "tool_call_id" not in turn else {"answers": turn["tool_call_id"]}
    return [{"role": _ROLES[role], "content": items, **answers, **loss}]


def _tool_calls(calls: Any, where: str) -> tuple[str, list[Any]]:
    """OpenAI's calls as the text that a turn of calls holds, and their ids, None where they have none."""
    if not isinstance(calls, list):
        raise DataError(f"{where}: wants a list, got {type(calls).__name__}")
    for n, call in enumerate(calls):
        if not isinstance(call, Mapping) or not isinstance(call.get("function"), Mapping):
            raise DataError(
                f"{where}[{n}]: wants {{'id': ..., 'function': {{'name': ..., 'arguments': ...}}}}, got {call!r}"[:300]
            )
    return json.dumps([call["function"] for call in calls]), [call.get("id") for call in calls]


def _in_order_of_calls(run: list[Item]) -> list[Item]:
    """The turns with results that name their calls in the order of these: that is how a turn tells them apart."""
    ordered: list[Item] = []
    ids: list[Any] = []
    for is_result, group in itertools.groupby(run, lambda turn: turn["role"] == "result"):
        turns = list(group)
        if not is_result:
            ids = [one for turn in turns for one in turn.get("ids", ())]
        elif named := [turn["answers"] for turn in turns if "answers" in turn]:
            if len(named) < len(turns) or sorted(map(str, named)) != sorted(map(str, ids)):
                raise FunctionCallError(f"tool_call_id: wants one result for each of the calls {ids}, got {named}")
            places = {str(one): n for n, one in reversed(list(enumerate(ids)))}
            turns.sort(key=lambda turn: places[str(turn["answers"])])
        ordered += turns
    return ordered


def _agent_turn(run: list[Item], style: Any, media: _Media) -> list[Item]:
    """Turns of calls, results and text as one turn of the assistant."""
    if any("loss" in turn for turn in run):
        raise DataError("loss: is not taken by turns that belong to function calls")
    steps: list[Step] = []
    for turn in _in_order_of_calls(run):
        items = turn["content"]
        if turn["role"] == "result":
            steps.append(Result(items))
        elif turn["role"] == "call":
            steps += _calls(items[0]["text"])
        elif any("text" not in item for item in items):
            raise DataError("an assistant's text between function calls wants no images or videos")
        else:
            text = "".join(item["text"] for item in items)
            steps.append(from_qwen_vl(text) if media.qwen_vl else text)
    if isinstance(steps[-1], Result):
        raise FunctionCallError("a turn of the assistant must not end with a result: what it did next is missing")
    return render_turn(steps, style)


def _calls(text: str) -> list[Step]:
    try:
        value = json.loads(text)
        calls = value if isinstance(value, list) else [value]
        read: list[Step] = []
        for call in calls:
            arguments = call["arguments"]
            read.append(Call(call["name"], json.loads(arguments) if isinstance(arguments, str) else arguments))
    except (ValueError, RecursionError) as error:
        raise FunctionCallError(f"function_call: is no JSON: {error}") from None
    except (KeyError, TypeError):
        raise FunctionCallError(
            f"function_call: wants {{'name': ..., 'arguments': {{...}}}} or a list of them, got {text!r}"[:300]
        ) from None
    return read


def _declare(messages: list[Item], tools: Any, style: Any, system: str) -> None:
    """Put the actions into the system prompt."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise DataError(f"tools: is no JSON: {error}") from None
    if not isinstance(tools, list):
        raise DataError(f"tools: wants a list, got {type(tools).__name__}")
    if not tools:  # tables say so of records without
        return
    if messages[0]["role"] == "system":
        content = messages.pop(0)["content"]
        system = content if isinstance(content, str) else "".join(item.get("text", "") for item in content)
    prompt = declare_actions([Action.from_dict(tool) for tool in tools], style, system=system)
    messages.insert(0, {"role": "system", "content": prompt})


# ---- text ----


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: wants a str, got {type(value).__name__}")
    return value


def _with_markers(item: Item) -> Item:
    written = isinstance(item.get("text"), str) and item.get("loss", True)
    return {**item, "text": from_qwen_vl(item["text"])} if written else item


def _check_grounding(items: Iterable[Item], where: str) -> None:
    """What a model is to write must be well-formed."""
    for n, item in enumerate(items):
        text = item.get("text")
        if isinstance(text, str) and item.get("loss", True) and any(marker in text for marker in GROUNDING_TOKENS):
            try:
                parse_grounding(text, strict=True)
            except ValueError as error:
                raise type(error)(f"{where}[{n}].text: {error}") from None
