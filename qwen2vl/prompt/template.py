"""A checkpoint's own chat template, in Jinja, where it differs from the layout of `qwen2vl.prompt.chatml`.

Control tokens come from the template alone. Before it is compiled, every control token in its literals becomes a mark
that holds a random number, and only marks are read as control tokens in what it writes. A text of a message that spells
a control token stays text, whatever the template does with it. `qwen2vl.prompt.sandbox` is where the template runs.
"""

import itertools
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from jinja2 import TemplateError

from ..errors import CheckpointError, PromptError
from . import chatml, sandbox
from .chatml import Control, Media, Segment, Span, Text
from .messages import Message, Part, read_content, read_messages
from .tokenizer import CONTROL_TOKENS, GROUNDING_TOKENS, IMAGE_PAD, VIDEO_PAD, VISION_END, VISION_START, Tokenizer


class ChatTemplate:
    """A Jinja template that writes the prompts of one tokenizer, with the functions of `qwen2vl.prompt.chatml`.

    Attributes:
        source: its text.
        variables: name -> control token of what it may ask for beside the messages, such as "eos_token".
        standard: whether it writes what `chatml` writes, on conversations that try what templates tell apart. Then
            `chatml` is to be used, which also knows which items of a turn are taught.

    Raises:
        CheckpointError: the template is no Jinja, or puts control tokens together from pieces.
    """

    def __init__(self, source: str, tokenizer: Tokenizer, variables: Mapping[str, str] | None = None):
        self.source = source
        self._tokenizer = tokenizer
        self.variables = dict(variables or {})
        names = sorted({*CONTROL_TOKENS, *tokenizer.special_ids, *self.variables.values()}, key=len, reverse=True)
        number = secrets.token_hex(16)
        self._marks = {name: f"\ue000{number}{n}\ue001" for n, name in enumerate(names)}
        self._names = {mark: name for name, mark in self._marks.items()}
        self._open_end = f"\ue000{number}end\ue001"
        self._cut = f"\ue000{number}cut\ue001"  # on both sides of what an assistant's runtime inserted
        self._mark = re.compile(f"(\ue000{number}[0-9]+\ue001)")
        self._spelled = re.compile("|".join(map(re.escape, names)))
        self._marker = re.compile("|".join(map(re.escape, tokenizer.markers)) or "(?!)")
        self._grounding = re.compile("|".join(map(re.escape, GROUNDING_TOKENS)))
        try:
            self._template = sandbox.compile_template(source, self._marked)
        except (TemplateError, RecursionError, SyntaxError, ValueError, MemoryError) as error:
            raise CheckpointError(f"chat template: is no readable Jinja template ({error})") from error
        self.standard = self._is_standard(tokenizer.markers)

    def __reduce__(self):  # compiled templates do not travel to the workers of a DataLoader
        return type(self), (self.source, self._tokenizer, self.variables)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        add_vision_id: bool = False,
        where: str = "messages",
    ) -> list[Segment]:
        """As :func:`qwen2vl.prompt.chatml.render`, by this template.

        Args:
            messages: or, for the template of a base model, a list of items without turns, if the template takes it.

        Raises:
            PromptError: also where the template refuses the messages, writes nothing of them, or has other places for
                images and videos than they hold.
        """
        turns, parts, given = self._read(messages, where)
        if continue_final_message:
            if not turns or turns[-1].role != "assistant":
                raise PromptError(f"{where}: continue_final_message wants an assistant's last")
            last = given[-1]
            if isinstance(last["content"], str):
                last["content"] += self._open_end
            else:
                last["content"].append({"type": "text", "text": self._open_end})
        asked = (add_generation_prompt and not continue_final_message, add_vision_id)
        text = self._write(given, where, *asked)
        self._check_complete(text, parts, given, where, *asked)
        marked = self._marked_insertions(turns, given, text, where, *asked)
        text = text if marked is None else marked
        if continue_final_message:
            text, found, _ = text.partition(self._open_end)
            if not found:
                raise PromptError(f"{where}: the checkpoint's chat template cannot leave a message open")
        return list(self._segments(text, _media(parts), where))

    def render_spans(
        self, messages: Sequence[Mapping[str, Any]], *, add_vision_id: bool = False, where: str = "messages"
    ) -> list[Span]:
        """As :func:`qwen2vl.prompt.chatml.render_spans`, by this template.

        Taught is what the template writes of an assistant's turn behind the opening that it gives to a model, up to the
        last control token of the turn; images, videos and their marks are not, nor are items with `"loss": False`.

        Raises:
            PromptError: also where that cannot be told: the template writes a turn differently when others follow, or
                changes texts by what stands beside them (trims them, say) where items have `"loss": False`.
        """
        turns, parts, given = self._read(messages, where)
        whole = self._write(given, where, add_vision_id=add_vision_id)
        self._check_complete(whole, parts, given, where, False, add_vision_id)
        inserted = self._insertions(turns, given, whole, where, False, add_vision_id)
        pieces: list[tuple[str, bool]] = []
        begin = 0
        for n, turn in enumerate(turns):
            if turn.role != "assistant" or not turn.loss:
                continue
            opened = self._write(given[:n], where, True, add_vision_id=add_vision_id)
            closed = self._write(given[: n + 1], where, add_vision_id=add_vision_id)
            if not (whole.startswith(closed) and closed.startswith(opened) and len(opened) >= begin):
                raise PromptError(
                    f"{where}[{n}]: the checkpoint's chat template writes this turn differently when a model is to "
                    "write it, or when others follow, so that it cannot be taught"
                )
            ends = [mark.end() for mark in self._mark.finditer(closed, len(opened))]
            # Behind the token that ends a turn stands white space at most; other text is of a turn without such an end.
            end = ends[-1] if ends and not closed[ends[-1] :].strip() else len(closed)
            pieces += [(whole[begin : len(opened)], False), (whole[len(opened) : end], True)]
            begin = end
        pieces.append((whole[begin:], False))
        left = _media(parts)
        pieces = list(_without(pieces, inserted))
        return [span for text, taught in pieces for span in _spans(self._segments(text, left, where), taught)]

    @cached_property
    def default_system_prompt(self) -> str:
        """The system prompt that it writes where the messages hold none; "" where it writes none, or none as text."""
        user = {"role": "user", "content": "x"}
        try:
            with_one = self._write([{"role": "system", "content": self._cut}, user], "messages")
            without = self._write([user], "messages")
        except PromptError:  # it takes no system turn, or no plain text: nothing can be put into its place
            return ""
        before, _, after = with_one.partition(self._cut)
        inside = without[len(before) : len(without) - len(after)]
        whole = with_one.count(self._cut) == 1 and before + inside + after == without
        return inside if whole and not self._mark.search(inside) else ""

    def _read(self, messages: Any, where: str) -> tuple[list[Message], list[Part], list[dict[str, Any]]]:
        """The turns, none where there are items alone; all items; and what the template is given of them."""
        listed = isinstance(messages, (list, tuple)) and messages
        if listed and all(isinstance(one, Mapping) and "role" not in one and "content" not in one for one in messages):
            parts = read_content(messages, where)
            return [], parts, [self._item(part, False) for part in parts]
        turns = read_messages(messages, where)
        given: list[dict[str, Any]] = []
        for turn, message in zip(turns, messages, strict=True):
            items = [self._item(part, turn.role == "assistant") for part in turn.parts]
            content = items[0]["text"] if isinstance(message["content"], str) else items
            given.append({"role": turn.role, "content": content})
        return turns, [part for turn in turns for part in turn.parts], given

    def _marked_insertions(
        self, turns: Sequence[Message], given: Sequence[Mapping[str, Any]], text: str, where: str, *asked: bool
    ) -> str | None:
        """What is written with cuts around the items of assistants' turns that have `"loss": False`.

        Their texts are tokenised by themselves, as where they were inserted while a model wrote. None where there are
        no such items, or the template writes something else than `text` around the cuts.
        """
        cut = [dict(message) for message in given]
        found = False
        for turn, message in zip(turns, cut, strict=False):
            if turn.role != "assistant" or all(part.loss for part in turn.parts):
                continue
            items = [dict(item) for item in message["content"]]
            for part, item in zip(turn.parts, items, strict=False):
                if not part.loss and item.get("text"):
                    item["text"] = f"{self._cut}{item['text']}{self._cut}"
                    found = True
            message["content"] = items
        marked = self._write(cut, where, *asked) if found else None
        if marked is None or marked.replace(self._cut, "") != text:
            return None
        return marked.replace(self._cut * 2, "")  # what was inserted side by side is one text

    def _insertions(
        self, turns: Sequence[Message], given: Sequence[Mapping[str, Any]], text: str, where: str, *asked: bool
    ) -> list[tuple[int, int]]:
        """Begin and end in `text` of the texts in assistants' turns that have `"loss": False`."""
        inserting = [
            n
            for n, turn in enumerate(turns)
            if turn.role == "assistant"
            and turn.loss
            and any(not p.loss and isinstance(p.item, Text) and p.item.text for p in turn.parts)
        ]
        marked = self._marked_insertions(turns, given, text, where, *asked)
        pieces = [] if marked is None else marked.split(self._cut)
        if inserting and len(pieces) % 2 == 0:
            raise PromptError(
                f"{where}[{inserting[0]}]: items with 'loss': False cannot be told apart in what the checkpoint's own "
                "chat template writes, as it changes texts by what stands beside them"
            )
        bounds = [0, *itertools.accumulate(map(len, pieces))]
        return [(bounds[n], bounds[n + 1]) for n in range(1, len(pieces), 2)]

    def _item(self, part: Part, written: bool) -> dict[str, str]:
        if isinstance(part.item, Media):
            return {"type": part.item.kind, part.item.kind: ""}
        text = part.item.text
        # What an assistant wrote holds its markers as control tokens, text that asks for it those of grounding, and the
        # template's literals have the same marks.
        marker = self._marker if written and part.loss else self._grounding if part.grounding else None
        return {"type": "text", "text": marker.sub(lambda m: self._marks[m[0]], text) if marker else text}

    def _write(
        self,
        given: Sequence[Mapping[str, Any]],
        where: str,
        add_generation_prompt: bool = False,
        add_vision_id: bool = False,
    ) -> str:
        own = {name: self._marks[token] for name, token in self.variables.items()}
        try:
            return sandbox.render(
                self._template,
                given,
                **own,
                add_generation_prompt=add_generation_prompt,
                add_vision_id=add_vision_id,
            )
        except Exception as error:  # whatever an expression of the template raises, of Python's own types too
            told = self._mark.sub(lambda mark: self._names[mark[0]], str(error))
            raise PromptError(f"{where}: the checkpoint's chat template refuses them: {told}") from error

    def _check_complete(
        self, text: str, parts: Sequence[Part], given: Sequence[Mapping[str, Any]], where: str, *asked: bool
    ) -> None:
        """Raise PromptError where what was written leaves out an image or a video, or whatever the texts say."""
        media = sum(1 for _ in _media(parts))
        places = sum(self._names[mark] in (IMAGE_PAD, VIDEO_PAD) for mark in self._mark.findall(text))
        if places < media:
            what = f"has places for {places} of {media} images and videos"
        elif media < len(parts) and self._write([_longer(one) for one in given], where, *asked) == text:
            what = "writes no text"
        else:
            return
        hint = "that of a base model takes a list of items without turns" if "role" in given[0] else "it wants turns"
        raise PromptError(f"{where}: the checkpoint's chat template {what} of these messages; {hint}")

    def _segments(self, text: str, media: Iterator[Media], where: str) -> Iterator[Segment]:
        for n, piece in enumerate(self._mark.split(text)):
            if n % 2 == 0:
                yield from (Text(text) for text in piece.split(self._cut) if text)
            elif (name := self._names[piece]) in (IMAGE_PAD, VIDEO_PAD):
                item = next(media, None)
                if item is None or item.pad != name:
                    got = "no more" if item is None else f"{item.kind} {item.where} there"
                    raise PromptError(f"{where}: the checkpoint's chat template wants another {name}, got {got}")
                yield item
            else:
                yield Control(name)

    def _marked(self, literal: str) -> str:
        return self._spelled.sub(lambda token: self._marks[token[0]], literal)

    def _is_standard(self, markers: Sequence[str]) -> bool:
        same = True
        for messages in _TRIED:
            for opened in (False, True):
                for numbered in (False, True):
                    options: dict[str, Any] = {"add_generation_prompt": opened, "add_vision_id": numbered}
                    try:
                        segments = self.render(messages, **options)
                    except PromptError as error:
                        if isinstance(error.__cause__, sandbox.Exhausted):  # which it would be every time
                            return False
                        same = False
                        continue
                    if any(isinstance(one, Text) and "<|im_" in one.text for one in segments):
                        raise CheckpointError("chat template: puts control tokens together from pieces")
                    same = same and segments == chatml.render(messages, markers=markers, **options)
        return same


def _longer(given: Mapping[str, Any]) -> dict[str, Any]:
    """A message, or an item, with other texts."""
    if "role" not in given:
        return {key: value + "x" if key == "text" else value for key, value in given.items()}
    content = given["content"]
    return {**given, "content": content + "x" if isinstance(content, str) else [_longer(item) for item in content]}


def _media(parts: Sequence[Part]) -> Iterator[Media]:
    return (part.item for part in parts if isinstance(part.item, Media))


def _without(pieces: Sequence[tuple[str, bool]], inserted: Sequence[tuple[int, int]]) -> Iterator[tuple[str, bool]]:
    """The pieces of a text, taught or not, cut at the bounds of what was inserted, none of which is taught."""
    start = behind = 0  # where the piece starts; how many insertions ended before
    for text, taught in pieces:
        end, at = start + len(text), start
        while behind < len(inserted) and inserted[behind][1] <= start:
            behind += 1
        for first, last in itertools.islice(inserted, behind, None):
            if first >= end:
                break
            first, last = max(first, start), min(last, end)
            yield text[at - start : first - start], taught
            yield text[first - start : last - start], False
            at = last
        yield text[at - start :], taught
        start = end


def _spans(segments: Iterator[Segment], taught: bool) -> Iterator[Span]:
    """Those segments, with media and their marks apart from what is taught."""
    run: list[Segment] = []
    kind = False
    for segment in segments:
        of_media = isinstance(segment, Media) or segment in (Control(VISION_START), Control(VISION_END))
        if run and (taught and not of_media) != kind:
            yield Span(tuple(run), kind)
            run = []
        kind = taught and not of_media
        run.append(segment)
    if run:
        yield Span(tuple(run), kind)


#: Conversations on which a template that writes what `chatml` writes has to show it.
_TRIED: tuple[list[dict[str, Any]], ...] = (
    [{"role": "user", "content": "a"}],
    [{"role": "system", "content": " s\n"}, {"role": "user", "content": "\n a<think>b</think> \n"}],
    [{"role": "system", "content": [{"type": "text", "text": "s"}]}, {"role": "user", "content": ""}],
    [
        {"role": "user", "content": [{"type": "image", "image": "a"}, {"type": "text", "text": " a\n"}]},
        {"role": "assistant", "content": " <think>b</think>\n\n<|box_start|>c<|box_end|> \n"},
        {"role": "user", "content": [{"type": "video", "video": "a"}, {"type": "image", "image": "a"}]},
        {"role": "user", "content": [{"type": "text", "text": "d"}, {"type": "text", "text": " "}]},
        {"role": "assistant", "content": [{"type": "text", "text": "<think>e</think>f"}]},
        {"role": "system", "content": "g"},
        {"role": "user", "content": [{"type": "video", "video": "a"}]},
    ],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>\nb\n</think>\n\nc"}],
)
