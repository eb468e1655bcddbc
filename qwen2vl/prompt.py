"""From chat messages to the segments of a ChatML prompt: plain text, control tokens, and places for images
and videos.

The layout is that of the released instruct template. A turn is `<|im_start|>role NEWLINE content <|im_end|>
NEWLINE`, its content items stand side by side with no separator, an image is
`<|vision_start|><|image_pad|><|vision_end|>`, and a conversation that does not begin with a system turn gets
the default one.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Literal

import torch

from .errors import PromptError
from .tokenizer import (
    GROUNDING_TOKENS,
    IM_END,
    IM_START,
    IMAGE_PAD,
    VIDEO_PAD,
    VISION_END,
    VISION_START,
)

DEFAULT_SYSTEM_PROMPT = "You are a helpful assistant."
ROLES = ("system", "user", "assistant")
DETAILS = ("auto", "high", "low")
LOW_DETAIL_PIXELS = 256 * 28 * 28  # 256 tokens

# For other programs: `render` as a Jinja template, which is what checkpoints carry.
CHAT_TEMPLATE = (
    "{%- set seen = namespace(image=0, video=0) -%}"
    "{%- if messages[0].role != 'system' -%}"
    "{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message.role + '\\n' -}}"
    "{%- if message.content is string -%}{{- message.content -}}"
    "{%- else -%}"
    "{%- for item in message.content -%}"
    "{%- if item.type == 'image' or 'image' in item or 'image_url' in item -%}"
    "{%- set seen.image = seen.image + 1 -%}"
    "{%- if add_vision_id -%}{{- 'Picture ' ~ seen.image ~ ': ' -}}{%- endif -%}"
    "{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}"
    "{%- elif item.type == 'video' or 'video' in item or 'video_url' in item -%}"
    "{%- set seen.video = seen.video + 1 -%}"
    "{%- if add_vision_id -%}{{- 'Video ' ~ seen.video ~ ': ' -}}{%- endif -%}"
    "{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}"
    "{%- else -%}{{- item.text -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{{- '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)


@dataclass(frozen=True)
class Text:
    """Ordinary text, to be tokenised as such."""

    text: str


@dataclass(frozen=True)
class Control:
    """One control token, by name."""

    name: str


@dataclass(frozen=True)
class Media:
    """The place of one image or video: as many pad tokens as the media turns out to need.

    Attributes:
        source: what the item holds, as given (path, bytes, image, list of frames, ...).
        options: the item's own preprocessing options, under the names of `IMAGE_OPTIONS` or `VIDEO_OPTIONS`.
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


Segment = Text | Control | Media


def render(
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    add_vision_id: bool = False,
    where: str = "messages",
) -> list[Segment]:
    """Segments of one conversation.

    Args:
        messages: a non-empty list of `{"role": "system" | "user" | "assistant", "content": str or list of
            items}`. An item is text (`{"type": "text", "text": str}`), an image or a video; "type" may be left out
            where the key says it. An image is one of `{"type": "image", "image": source}`, the same with key "url"
            or "path", and `{"type": "image_url", "image_url": source or {"url": source, "detail": "auto", "high" or
            "low"}}`, where "low" allows at most `LOW_DETAIL_PIXELS`; a video is the same with "video". Images and
            videos take options beside their source, see `IMAGE_OPTIONS` and `VIDEO_OPTIONS`. A key whose value is
            None counts as left out.
        add_generation_prompt: end with the opening of an assistant turn.
        add_vision_id: put "Picture N: " or "Video N: " before every item, counted over the whole
            conversation.
        where: the name that errors give to `messages`.

    Returns:
        Segments in order. Neighbouring text is joined, so that it is tokenised as one. Text never stands for
        a control token; only in assistant turns do the grounding markers (`GROUNDING_TOKENS`), which the
        model itself writes, keep their meaning.

    Raises:
        PromptError: naming the place, what it holds and what it wants.
    """
    if isinstance(messages, str):
        raise PromptError(f'{where}: wants a list of messages, got a str; write [{{"role": "user", "content": ...}}]')
    if not isinstance(messages, (list, tuple)):
        raise PromptError(f"{where}: wants a list of messages, got {type(messages).__name__}")
    if not messages:
        raise PromptError(f"{where}: wants at least one message, got an empty list")

    segments: list[Segment] = []
    count = {"image": 0, "video": 0}
    turns = [_read_message(message, f"{where}[{n}]") for n, message in enumerate(messages)]
    if turns[0][0] != "system":
        turns.insert(0, ("system", [Text(DEFAULT_SYSTEM_PROMPT)]))
    for role, items in turns:
        segments += [Control(IM_START), Text(f"{role}\n")]
        for item in items:
            if isinstance(item, Media):
                count[item.kind] += 1
                if add_vision_id:
                    name = "Picture" if item.kind == "image" else "Video"
                    segments.append(Text(f"{name} {count[item.kind]}: "))
                segments += [Control(VISION_START), item, Control(VISION_END)]
            elif role == "assistant":
                segments += _split_grounding(item.text)
            else:
                segments.append(item)
        segments += [Control(IM_END), Text("\n")]
    if add_generation_prompt:
        segments += [Control(IM_START), Text("assistant\n")]
    return list(_join_text(segments))


def check_placeholders(
    input_ids: torch.Tensor,
    image_grid_thw: torch.Tensor | None = None,
    video_grid_thw: torch.Tensor | None = None,
    *,
    image_token_id: int,
    video_token_id: int,
    merge_size: int = 2,
) -> None:
    """Check that every grid has its run of t * h * w / merge_size**2 placeholders, in order over the whole
    batch.

    Truncating ids inside an image or video, or dropping one of a batch, is what this finds.

    Args:
        input_ids: (B, L) int64.
        image_grid_thw, video_grid_thw: (n, 3) int64 in patches, or None for none.

    Raises:
        PromptError: naming the first image or video that does not fit.
    """
    for kind, token_id, grids in (
        ("image", image_token_id, image_grid_thw),
        ("video", video_token_id, video_grid_thw),
    ):
        wanted = [] if grids is None else [tuple(grid) for grid in grids.tolist()]
        found = _run_lengths(input_ids == token_id)
        if len(found) != len(wanted):
            raise PromptError(
                f"{kind}_grid_thw: wants {len(found)}, one for each run of placeholders, got {len(wanted)}"
            )
        for n, ((t, h, w), length) in enumerate(zip(wanted, found, strict=True)):
            if h % merge_size or w % merge_size or t * h * w // merge_size**2 != length:
                raise PromptError(
                    f"{kind}_grid_thw[{n}]: ({t}, {h}, {w}) merged {merge_size} x {merge_size} does not give "
                    f"the {length} placeholders that input_ids has for it"
                )


def _run_lengths(mask: torch.Tensor) -> list[int]:
    """Lengths of the runs of True in (B, L), row by row."""
    edges = torch.nn.functional.pad(mask.to(torch.int8), (1, 1)).diff(dim=1)  # (B, L + 1)
    starts = (edges == 1).nonzero()[:, 1]
    ends = (edges == -1).nonzero()[:, 1]
    return (ends - starts).tolist()


def _join_text(segments: Sequence[Segment]) -> Iterator[Segment]:
    pending: list[str] = []
    for segment in segments:
        if isinstance(segment, Text):
            pending.append(segment.text)
            continue
        if any(pending):
            yield Text("".join(pending))
        pending.clear()
        yield segment
    if any(pending):
        yield Text("".join(pending))


_GROUNDING_PATTERN = re.compile("(" + "|".join(map(re.escape, GROUNDING_TOKENS)) + ")")


def _split_grounding(text: str) -> list[Segment]:
    # re.split with one group puts the markers at the odd places.
    pieces = _GROUNDING_PATTERN.split(text)
    return [Control(piece) if n % 2 else Text(piece) for n, piece in enumerate(pieces)]


def _read_message(message: object, where: str) -> tuple[str, list[Text | Media]]:
    if not isinstance(message, Mapping):
        raise PromptError(f'{where}: wants a dict with "role" and "content", got {type(message).__name__}')
    _refuse_unknown_keys(message, ("role", "content"), "a message", where)
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise PromptError(f"{where}.role: wants one of {_quoted(ROLES)}, got {role!r}")
    content = message.get("content")
    if isinstance(content, str):
        return role, [Text(content)]
    if not isinstance(content, (list, tuple)):
        raise PromptError(f"{where}.content: wants a str or a list of items, got {type(content).__name__}")
    if not content:
        raise PromptError(f"{where}.content: wants a str or at least one item, got an empty list")
    return role, [_read_item(item, f"{where}.content[{n}]") for n, item in enumerate(content)]


def _positive_int(value: object) -> int | None:
    if not isinstance(value, Integral) or isinstance(value, bool):
        return None
    number = int(value)
    return number if number > 0 else None


def _positive(value: object) -> float | None:
    number = _not_negative(value)
    return number if number else None


def _not_negative(value: object) -> float | None:
    if not isinstance(value, Real) or isinstance(value, bool):
        return None
    number = float(value)
    return number if math.isfinite(number) and number >= 0 else None


@dataclass(frozen=True)
class _Option:
    name: str  # what the preprocessing calls it
    read: Callable[[object], int | float | None]  # None: the value is refused
    wants: str


def _int_option(name: str) -> _Option:
    return _Option(name, _positive_int, "a positive int")


# Key of an item -> the option. The keys are those of qwen-vl-utils.
IMAGE_OPTIONS: dict[str, _Option] = {
    key: _int_option(key) for key in ("min_pixels", "max_pixels", "resized_height", "resized_width")
}
VIDEO_OPTIONS: dict[str, _Option] = {
    "fps": _Option("fps", _positive, "a positive number"),
    "nframes": _int_option("num_frames"),
    "num_frames": _int_option("num_frames"),
    "min_frames": _int_option("min_frames"),
    "max_frames": _int_option("max_frames"),
    "video_start": _Option("start", _not_negative, "seconds, a number not below 0"),
    "video_end": _Option("end", _positive, "seconds, a positive number"),
    "min_pixels": _int_option("min_pixels"),
    "max_pixels": _int_option("max_pixels"),
    "total_pixels": _int_option("total_pixels"),
    "resized_height": _int_option("resized_height"),
    "resized_width": _int_option("resized_width"),
}

# Payload key (and "type") -> kind.
_KINDS: dict[str, Literal["text", "image", "video"]] = {
    "text": "text",
    "image": "image",
    "image_url": "image",
    "video": "video",
    "video_url": "video",
}
# "type" -> keys under which an item may hold its source; the later ones do not say by themselves what it is.
_SOURCE_KEYS = {kind: (kind,) for kind in _KINDS} | {kind: (kind, "url", "path") for kind in ("image", "video")}


def _read_item(item: object, where: str) -> Text | Media:
    if not isinstance(item, Mapping):
        hint = '; write {"type": "text", "text": ...}' if isinstance(item, str) else ""
        raise PromptError(f"{where}: wants a dict, got {type(item).__name__}{hint}")
    given = {key: value for key, value in item.items() if value is not None}
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
    # Tables fill absent columns with None: harmless in any key that some kind of item has.
    others = {*_KINDS, "url", "path", *IMAGE_OPTIONS, *VIDEO_OPTIONS}
    checked = [key for key in item if key in given or key not in others]
    article = "an" if kind == "image" else "a"
    sources = _SOURCE_KEYS[payload]
    _refuse_unknown_keys(checked, ("type", *sources, *options), f"{article} {kind} item", where)
    held = [key for key in sources if key in given]
    if not held:
        raise PromptError(f"{where}.{payload}: is missing from this item of type {payload!r}")
    if len(held) > 1:
        raise PromptError(f"{where}: wants one of {_quoted(sources)}, got {_quoted(held)}")

    source, detail = given[held[0]], "auto"
    if kind == "text":
        if not isinstance(source, str):
            raise PromptError(f"{where}.text: wants a str, got {type(source).__name__}")
        return Text(source)
    if payload.endswith("_url"):
        source, detail = _read_url(source, f"{where}.{payload}")
    return Media(kind, source, _read_options(given, options, where), where, detail)


def _read_url(source: Any, where: str) -> tuple[Any, str]:
    if not isinstance(source, Mapping):
        return source, "auto"
    _refuse_unknown_keys(source, ("url", "detail"), "a URL", where)
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


def _refuse_unknown_keys(given: Any, known: Sequence[str], what: str, where: str) -> None:
    unknown = [key for key in given if key not in known]
    if unknown:
        raise PromptError(f"{where}: unknown key {_quoted(unknown)}; {what} takes {_quoted(known)}")


def _quoted(names: Any) -> str:
    return ", ".join(map(repr, names))
