"""From chat messages to the segments of a ChatML prompt: plain text, control tokens, and places for images
and videos.

The layout is that of the released instruct template. A turn is `<|im_start|>role NEWLINE content <|im_end|>
NEWLINE`, its content items stand side by side with no separator, an image is
`<|vision_start|><|image_pad|><|vision_end|>`, and a conversation that does not begin with a system turn gets
the default one.
"""

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from tokenizers import AddedToken

from ..errors import PromptError
from .messages import LOW_DETAIL_PIXELS, Media, Part, Text, read_content, read_messages
from .tokenizer import END_OF_TEXT, GROUNDING_TOKENS, IM_END, IM_START, VISION_END, VISION_START

__all__ = [
    "CHAT_TEMPLATE",
    "DEFAULT_SYSTEM_PROMPT",
    "LOW_DETAIL_PIXELS",
    "Control",
    "Media",
    "Segment",
    "Span",
    "Text",
    "as_flagged",
    "render",
    "render_document",
    "render_spans",
]

DEFAULT_SYSTEM_PROMPT = "You are a helpful assistant."

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
class Control:
    """One control token, by name."""

    name: str


Segment = Text | Control | Media


@dataclass(frozen=True)
class Span:
    """Segments that are all taught or all not. A span is tokenised apart from its neighbours, so that no token
    crosses the border of what is taught."""

    segments: tuple[Segment, ...]
    taught: bool


def render(
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    add_vision_id: bool = False,
    markers: Sequence[str] = GROUNDING_TOKENS,
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
            None counts as left out. An item, and a whole message, takes `"loss": False`, see `render_spans`. A text
            takes `"grounding": True`, with which its grounding markers are control tokens whoever's turn it is in:
            `{"type": "text", "text": "Find <|object_ref_start|>the cat<|object_ref_end|>.", "grounding": True}`.
        add_generation_prompt: end with the opening of an assistant turn.
        continue_final_message: leave the last message, which must be an assistant's, open for the model to go on with;
            nothing is opened behind it, whatever add_generation_prompt says.
        add_vision_id: put "Picture N: " or "Video N: " before every item, counted over the whole
            conversation.
        markers: the control tokens that an assistant's text may hold, the longest first; see `Tokenizer.markers`.
        where: the name that errors give to `messages`.

    Returns:
        Segments in order. Neighbouring text is joined, so that it is tokenised as one, but for items with
        `"loss": False`. Text never stands for a control token; only in what an assistant wrote do the `markers`,
        which the model itself writes, keep their meaning, and in text that asks for it the grounding markers
        (`GROUNDING_TOKENS`).

    Raises:
        PromptError: naming the place, what it holds and what it wants.
    """
    pieces = list(_pieces(messages, add_vision_id, markers, where))
    if continue_final_message:
        if messages[-1]["role"] != "assistant":
            raise PromptError(
                f"{where}: continue_final_message wants an assistant's last, got {messages[-1]['role']!r}"
            )
        pieces = pieces[:-2]  # <|im_end|> and the newline
    elif add_generation_prompt:
        pieces += [_Piece(Control(IM_START)), _Piece(Text("assistant\n"))]
    runs = groupby(pieces, lambda piece: piece.inserted)
    return [segment for _, run in runs for segment in _join_text([piece.segment for piece in run])]


def render_spans(
    messages: Sequence[Mapping[str, Any]],
    *,
    add_vision_id: bool = False,
    markers: Sequence[str] = GROUNDING_TOKENS,
    where: str = "messages",
) -> list[Span]:
    """Spans of one conversation to learn from.

    Taught is what a model has to write by itself: in every turn of the assistant its text, with `markers` as control
    tokens, and the closing `<|im_end|>`. Not taught are the other turns, the marks and role that open a turn,
    the newline behind it, images and videos with their marks wherever they stand, and

    - messages with `"loss": False` of any role;
    - items with `"loss": False` of an assistant's turn: what its runtime inserted, such as the result of a function
      call. Their text comes from elsewhere and is ordinary text all through, markers included, but for the grounding
      markers where it says `"grounding": True`.

    An assistant's text is tokenised apart from the `assistant NEWLINE` before it, as it is where a model generates.

    Args, raises: as :func:`render`.
    """
    runs = groupby(_pieces(messages, add_vision_id, markers, where), lambda piece: (piece.taught, piece.inserted))
    return [Span(tuple(_join_text([piece.segment for piece in run])), taught) for (taught, _), run in runs]


def render_document(
    content: str | Sequence[Mapping[str, Any]], *, markers: Sequence[str] = GROUNDING_TOKENS, where: str = "content"
) -> list[Span]:
    """Spans of a document to learn from: an image with its caption, a page with its text, text and images in turn.

    There are no turns. All text is taught, with `markers` as control tokens, and the `<|endoftext|>` that ends
    it; images, videos and their marks are not, nor are items with `"loss": False`, whose text is ordinary.

    Args:
        content: text, or a list of items as messages hold them.
        markers: as :func:`render`.

    Raises:
        PromptError: naming the place, what it holds and what it wants.
    """
    pieces = [piece for part in read_content(content, where) for piece in _part_pieces(part, True, True, markers)]
    pieces.append(_Piece(Control(END_OF_TEXT), True))
    runs = groupby(pieces, lambda piece: piece.taught)
    return [Span(tuple(_join_text([piece.segment for piece in run])), taught) for taught, run in runs]


def as_flagged(spans: Sequence[Span], flagged: Mapping[str, AddedToken]) -> Sequence[Span]:
    """The spans of one prompt as the flags of its tokens have it, by which transformers' tokenizer reads its text.

    The white space before a token with `lstrip`, and behind one with `rstrip`, belongs to the token and is dropped,
    wherever it comes from. A token with `single_word` beside a letter, a digit or the like is ordinary text.
    """
    if not flagged:
        return spans
    pieces = [(n, segment) for n, span in enumerate(spans) for segment in span.segments]
    spelled = [segment.text if isinstance(segment, Text) else _last_name(segment) for _, segment in pieces]
    words = set()  # that became text
    before = ""  # the last character
    for at, (n, segment) in enumerate(pieces):
        if isinstance(segment, Control) and segment.name in flagged and flagged[segment.name].single_word:
            after = "".join(spelled[at + 1 : at + 2])[:1]
            if _in_word(before) or _in_word(after):
                pieces[at] = (n, Text(segment.name))
                words.add(at)
        before = spelled[at][-1:] or before
    for at, (_, segment) in enumerate(pieces):
        if not isinstance(segment, Control) or segment.name not in flagged:
            continue
        if flagged[segment.name].lstrip:
            _strip(pieces, range(at - 1, -1, -1), str.rstrip)
        if flagged[segment.name].rstrip:
            _strip(pieces, range(at + 1, len(pieces)), str.lstrip)
    kept: list[list[Control | Media | list[str]]] = [[] for _ in spans]  # a list is one text
    for at, (n, segment) in enumerate(pieces):
        last = kept[n][-1] if kept[n] else None
        if not isinstance(segment, Text):
            kept[n].append(segment)
        elif isinstance(last, list) and words & {at - 1, at}:
            last.append(segment.text)
        elif segment.text:
            kept[n].append([segment.text])
    joined = (tuple(Text("".join(one)) if isinstance(one, list) else one for one in run) for run in kept)
    return [Span(segments, span.taught) for segments, span in zip(joined, spans, strict=True) if segments]


#: Unicode's property of that name, which Python's own idea of white space is a little wider than.
_WHITE_SPACE = "".join(
    map(chr, (*range(9, 14), 0x20, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000))
)


def _strip(pieces: list[tuple[int, Segment]], order: Iterable[int], strip: Callable[[str, str], str]) -> None:
    """Take white space off the texts in that order, up to the first that has other characters."""
    for at in order:
        n, segment = pieces[at]
        if not isinstance(segment, Text):
            return
        left = strip(segment.text, _WHITE_SPACE)
        pieces[at] = (n, Text(left))
        if left:
            return


def _last_name(segment: Control | Media) -> str:
    return segment.pad if isinstance(segment, Media) else segment.name


def _in_word(character: str) -> bool:
    """Whether a character is what regular expressions write as \\w."""
    if not character:
        return False
    category = unicodedata.category(character)
    return category[0] in "LM" or category in ("Nd", "Nl", "Pc") or character in "\u200c\u200d"


@dataclass(frozen=True)
class _Piece:
    segment: Segment
    taught: bool = False
    inserted: bool = False  # by the runtime of an assistant


def _pieces(
    messages: Sequence[Mapping[str, Any]], add_vision_id: bool, markers: Sequence[str], where: str
) -> Iterator[_Piece]:
    count = {"image": 0, "video": 0}
    turns = read_messages(messages, where)
    if turns[0].role != "system":
        yield from (_Piece(Control(IM_START)), _Piece(Text(f"system\n{DEFAULT_SYSTEM_PROMPT}")))
        yield from (_Piece(Control(IM_END)), _Piece(Text("\n")))
    for turn in turns:
        yield from (_Piece(Control(IM_START)), _Piece(Text(f"{turn.role}\n")))
        written = turn.role == "assistant"
        taught = written and turn.loss
        for part in turn.parts:
            if add_vision_id and isinstance(part.item, Media):
                count[part.item.kind] += 1
                name = "Picture" if part.item.kind == "image" else "Video"
                yield _Piece(Text(f"{name} {count[part.item.kind]}: "), inserted=written and not part.loss)
            yield from _part_pieces(part, written, taught, markers)
        yield from (_Piece(Control(IM_END), taught), _Piece(Text("\n")))


def _part_pieces(part: Part, written: bool, taught: bool, markers: Sequence[str]) -> Iterator[_Piece]:
    """`written`: by the model, or as it should write, so that markers are control tokens."""
    inserted = written and not part.loss
    if isinstance(part.item, Media):
        segments: list[Segment] = [Control(VISION_START), part.item, Control(VISION_END)]
        taught = False
    else:
        # Text that asks for it, in any turn, has the grounding markers alone.
        own = markers if written and part.loss else GROUNDING_TOKENS if part.grounding else ()
        segments = _split_markers(part.item.text, own)
        taught = taught and part.loss
    for segment in segments:
        yield _Piece(segment, taught, inserted)


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


def _split_markers(text: str, markers: Sequence[str]) -> list[Segment]:
    """Text and markers in order. An empty text is none, so that what stands around it is neighbours."""
    if not markers:
        return [Text(text)] if text else []
    # re.split with one group puts the markers at the odd places; re compiles a pattern once.
    pieces = re.split("(" + "|".join(map(re.escape, markers)) + ")", text)
    return [Control(piece) if n % 2 else Text(piece) for n, piece in enumerate(pieces) if piece]
