"""What a chat message may hold: roles, text, images and videos with their options, read and checked."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from ..errors import PromptError
from ..media.options import finite_number, positive_int
from .tokenizer import IMAGE_PAD, VIDEO_PAD

ROLES = ("system", "user", "assistant")
DETAILS = ("auto", "high", "low")
LOW_DETAIL_PIXELS = 256 * 28 * 28  # 256 tokens


@dataclass(frozen=True)
class Text:
    """Ordinary text, to be tokenised as such."""

    text: str


@dataclass(frozen=True)
class Media:
    """The place of one image or video: as many pad tokens as the media turns out to need.

    Attributes:
        source: what the item holds, as given (path, bytes, image, list of frames, ...).
        options: the item's own preprocessing options, under the names that `IMAGE_OPTIONS` or `VIDEO_OPTIONS` give
            them: those of `MediaOptions`, and those that only an item has.
        where: the item's place in the messages, e.g. "messages[0].content[1]".
        detail: "low" holds the image, or each frame, to `LOW_DETAIL_PIXELS` after resizing; "auto" and "high" change
            nothing.
    """

    kind: Literal["image", "video"]
    source: Any
    options: dict[str, Any] = field(default_factory=dict)
    where: str = ""
    detail: str = "auto"

    @property
    def pad(self) -> str:
        """Name of the placeholder token."""
        return IMAGE_PAD if self.kind == "image" else VIDEO_PAD


@dataclass(frozen=True)
class Part:
    """One item of a message.

    Attributes:
        loss: False where the item says `"loss": False`: in an assistant's turn, what its runtime put there.
        grounding: True where a text says `"grounding": True`: its grounding markers are control tokens.
    """

    item: Text | Media
    loss: bool = True
    grounding: bool = False


@dataclass(frozen=True)
class Message:
    """One turn; `loss` is False where the message says `"loss": False`."""

    role: str
    parts: tuple[Part, ...]
    loss: bool = True


def read_messages(messages: object, where: str = "messages") -> list[Message]:
    """The turns of a conversation, as `qwen2vl.prompt.chatml.render` describes them. Raises PromptError."""
    if isinstance(messages, str):
        raise PromptError(f'{where}: wants a list of messages, got a str; write [{{"role": "user", "content": ...}}]')
    if not isinstance(messages, (list, tuple)):
        raise PromptError(f"{where}: wants a list of messages, got {type(messages).__name__}")
    if not messages:
        raise PromptError(f"{where}: wants at least one message, got an empty list")
    return [_read_message(message, f"{where}[{n}]") for n, message in enumerate(messages)]


def read_content(content: object, where: str = "content") -> list[Part]:
    """A list of items outside of any turn. Raises PromptError."""
    if isinstance(content, str):
        return [Part(Text(content))]
    if not isinstance(content, (list, tuple)):
        raise PromptError(f"{where}: wants a str or a list of items, got {type(content).__name__}")
    if not content:
        raise PromptError(f"{where}: wants a str or at least one item, got an empty list")
    return [_read_item(item, f"{where}[{n}]") for n, item in enumerate(content)]


def _read_message(message: object, where: str) -> Message:
    if not isinstance(message, Mapping):
        raise PromptError(f'{where}: wants a dict with "role" and "content", got {type(message).__name__}')
    _refuse_unknown_keys(_given(message), ("role", "content", "loss"), "a message", where)
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise PromptError(f"{where}.role: wants one of {_quoted(ROLES)}, got {role!r}")
    loss = _read_flag(message, "loss", True, where)
    return Message(role, tuple(read_content(message.get("content"), f"{where}.content")), loss)


def _read_flag(given: Mapping[str, Any], key: str, default: bool, where: str) -> bool:
    flag = given.get(key)
    if flag is None:
        return default
    if not isinstance(flag, bool):
        raise PromptError(f"{where}.{key}: wants True or False, got {flag!r}")
    return flag


@dataclass(frozen=True)
class _Option:
    name: str  # what the preprocessing calls it
    read: Callable[[object], int | float | None]  # None: the value is refused
    wants: str


def _int_option(name: str) -> _Option:
    return _Option(name, positive_int, "a positive int")


# The key in an item and the option that it stands for. The keys are those of qwen-vl-utils.
IMAGE_OPTIONS: dict[str, _Option] = {
    key: _int_option(key) for key in ("min_pixels", "max_pixels", "resized_height", "resized_width")
}
VIDEO_OPTIONS: dict[str, _Option] = {
    "fps": _Option("fps", finite_number, "a positive number"),
    "nframes": _int_option("num_frames"),
    "num_frames": _int_option("num_frames"),
    "min_frames": _int_option("min_frames"),
    "max_frames": _int_option("max_frames"),
    "video_start": _Option("start", partial(finite_number, zero=True), "seconds, a number not below 0"),
    "video_end": _Option("end", finite_number, "seconds, a positive number"),
    "min_pixels": _int_option("video_min_pixels"),
    "max_pixels": _int_option("video_max_pixels"),
    "total_pixels": _int_option("total_pixels"),
    "resized_height": _int_option("resized_height"),
    "resized_width": _int_option("resized_width"),
}

# The key of an item's source, which is also its "type", and the kind of item that it makes.
_KINDS: dict[str, Literal["text", "image", "video"]] = {
    "text": "text",
    "image": "image",
    "image_url": "image",
    "video": "video",
    "video_url": "video",
}
# For each "type" the keys under which an item may hold its source; the later ones do not say by themselves what it is.
_SOURCE_KEYS = {kind: (kind,) for kind in _KINDS} | {kind: (kind, "url", "path") for kind in ("image", "video")}


def _read_item(item: object, where: str) -> Part:
    if not isinstance(item, Mapping):
        hint = '; write {"type": "text", "text": ...}' if isinstance(item, str) else ""
        raise PromptError(f"{where}: wants a dict, got {type(item).__name__}{hint}")
    given = _given(item)
    payload = given.get("type")
    if payload is None:
        present = [key for key in _KINDS if key in given]
        if len(present) != 1:
            found = _quoted(present) if present else f"keys {_quoted(item)}"
            raise PromptError(f"{where}: wants a 'type' or exactly one of {_quoted(_KINDS)}, got {found}")
        payload = present[0]
    if not isinstance(payload, str) or payload not in _KINDS:
        raise PromptError(f"{where}.type: wants one of {_quoted(_KINDS)}, got {payload!r}")

    kind = _KINDS[payload]
    options = IMAGE_OPTIONS if kind == "image" else VIDEO_OPTIONS if kind == "video" else {}
    flags = ("grounding", "loss") if kind == "text" else ("loss",)
    article = "an" if kind == "image" else "a"
    sources = _SOURCE_KEYS[payload]
    _refuse_unknown_keys(given, ("type", *sources, *options, *flags), f"{article} {kind} item", where)
    held = [key for key in sources if key in given]
    if not held:
        raise PromptError(f"{where}.{payload}: is missing from this item of type {payload!r}")
    if len(held) > 1:
        raise PromptError(f"{where}: wants one of {_quoted(sources)}, got {_quoted(held)}")

    source, detail, loss = given[held[0]], "auto", _read_flag(given, "loss", True, where)
    if kind == "text":
        if not isinstance(source, str):
            raise PromptError(f"{where}.text: wants a str, got {type(source).__name__}")
        return Part(Text(source), loss, _read_flag(given, "grounding", False, where))
    if payload.endswith("_url"):
        source, detail = _read_url(source, f"{where}.{payload}")
    return Part(Media(kind, source, _read_options(given, options, where), where, detail), loss)


def _read_url(source: Any, where: str) -> tuple[Any, str]:
    if not isinstance(source, Mapping):
        return source, "auto"
    _refuse_unknown_keys(_given(source), ("url", "detail"), "a URL", where)
    if source.get("url") is None:
        raise PromptError(f"{where}.url: is missing")
    detail = "auto" if source.get("detail") is None else source["detail"]
    if not isinstance(detail, str) or detail not in DETAILS:
        raise PromptError(f"{where}.detail: wants one of {_quoted(DETAILS)}, got {detail!r}")
    return source["url"], detail


def _read_options(given: Mapping[str, Any], options: Mapping[str, _Option], where: str) -> dict[str, Any]:
    read: dict[str, Any] = {}
    for key, option in options.items():
        if key not in given:
            continue
        value = option.read(given[key])
        if value is None:
            raise PromptError(f"{where}.{key}: wants {option.wants}, got {given[key]!r}")
        if option.name in read:
            raise PromptError(
                f"{where}: {_quoted(k for k, o in options.items() if o.name == option.name)} mean the same"
            )
        read[option.name] = value
    if "fps" in read and "num_frames" in read:
        raise PromptError(f"{where}: wants fps or num_frames, got both")
    if ("resized_height" in read) != ("resized_width" in read):
        raise PromptError(f"{where}: wants resized_height and resized_width together, got one of them")
    return read


def _given(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """What is said: tables and typed clients fill the fields that nobody set with None."""
    return {key: value for key, value in mapping.items() if value is not None}


def _refuse_unknown_keys(given: Any, known: Sequence[str], what: str, where: str) -> None:
    unknown = [key for key in given if key not in known]
    if unknown:
        raise PromptError(f"{where}: unknown key {_quoted(unknown)}; {what} takes {_quoted(known)}")


def _quoted(names: Any) -> str:
    return ", ".join(map(repr, names))
