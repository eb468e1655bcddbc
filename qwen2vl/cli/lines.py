"""Files of one JSON value a line: prompts that are asked in batches, and answers that are written as they come.

A run that was stopped goes on behind the last answer that was written; nothing is asked twice.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from ..batching import Answer, generate_all
from ..errors import PromptError, Qwen2VLError
from ..files import open_regular
from ..generation import GenerationConfig
from ..model import Qwen2VL
from ..prompt.processor import Processor
from .common import describe_places

MAX_LINE = 64 << 20  # bytes; pictures stand in a line as base64
_KEYS = ("messages", "prompt", "image", "images", "video", "videos", "system", "id")
_ENDS = ("text", "error")


def answer_file(
    model: Qwen2VL,
    processor: Processor,
    source: Path,
    out: Path,
    *,
    config: GenerationConfig,
    batch_tokens: int,
    progress: Callable[[int, int], None],
    system: str | None = None,
    options: Mapping[str, Any] | None = None,
    keys: Collection[str] = (),
) -> tuple[int, int]:
    """Answer every line of ``source`` into ``out``, a line for a line, in order; see :func:`read_line` for their form.

    A line of ``out`` is ``{"index", "id", "text", "finish_reason", "tokens": {"prompt", "generated"}, "boxes"}``, or
    ``{"index", "id", "error"}``; "id" where the line of ``source`` has one, "boxes" where the answer has some. What
    ``out`` holds already is not asked again; a line that was cut off is taken off it.

    Args:
        progress: called with (lines answered, lines).
        system: for conversations that begin with no system message.
        options: of media, as in a call of the processor.
        keys: what lines have beside a prompt, as in :func:`read_line`.

    Returns:
        How many lines there are, and how many of them have an error.

    Raises:
        Qwen2VLError: ``out`` holds anything but answers to the first lines of ``source``.
    """
    with open_regular(source) as lines:
        total = sum(1 for _ in _lines(lines))
    with open_regular(source) as lines:
        given = _lines(lines)
        done, failed = _take_up(out, given)
        progress(done, total)
        ids: dict[int, Any] = {}

        def conversations() -> Iterator[Any]:
            for n, line in enumerate(given, done):
                ids[n] = _identity(line)
                try:
                    yield read_line(line, f"{source.name}:{n + 1}", system, keys)
                except PromptError as error:
                    yield error

        answers = generate_all(
            model, processor, conversations(), config=config, batch_tokens=batch_tokens, on_error="skip", first=done,
            **options or {},
        )  # fmt: skip
        with out.open("ab") as file:
            for answer in answers:
                failed += answer.error is not None
                file.write(
                    json.dumps(_written(answer, ids.pop(answer.index, None)), ensure_ascii=False).encode() + b"\n"
                )
                file.flush()  # so that a kill loses no answer
                progress(answer.index + 1, total)
    return total, failed


def read_beside(source: Path, keys: Collection[str]) -> Iterator[dict[str, Any]]:
    """What each line of a file has under ``keys``, of which no prompt consists. Raises PromptError where a line is no
    prompt with these beside it."""
    with open_regular(source) as lines:
        for n, line in enumerate(_lines(lines), 1):
            read_line(line, f"{source.name}:{n}", None, keys)
            value = json.loads(line)
            yield {key: value[key] for key in keys if key in value} if isinstance(value, dict) else {}


def read_line(line: bytes, where: str, system: str | None = None, keys: Collection[str] = ()) -> list[Any]:
    """The messages of a line: a list of messages, or an object with "messages", or one with "prompt" and
    the pictures and videos before it ("image", "images", "video", "videos": one or a list), "system" and "id".

    Args:
        keys: further keys that an object may have, and that are passed over.

    Raises:
        PromptError: the line is none of these.
    """
    if len(line) > MAX_LINE:
        raise PromptError(f"{where}: wants a line of at most {MAX_LINE >> 20} MB")
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise PromptError(f"{where}: is no JSON: {error}") from None
    if isinstance(value, list):
        value = {"messages": value}
    if not isinstance(value, dict):
        raise PromptError(f"{where}: wants a list of messages or an object, got {type(value).__name__}")
    value = {name: given for name, given in value.items() if given is not None and name not in keys}
    if unknown := [name for name in value if name not in _KEYS]:
        raise PromptError(f"{where}: wants {', '.join((*_KEYS, *keys))}, got {', '.join(map(repr, unknown[:5]))}")
    instruction = value.pop("system", system)
    value.pop("id", None)
    if "messages" in value:
        if len(value) > 1:
            raise PromptError(
                f"{where}: has messages, and {', '.join(n for n in value if n != 'messages')} beside them"
            )
        messages = value["messages"]
        if not isinstance(messages, list):
            raise PromptError(f"{where}: messages: wants a list, got {type(messages).__name__}")
    else:
        content: list[Any] = []
        for kind in ("image", "video"):
            for name in (kind, f"{kind}s"):
                sources = value.get(name, [])
                content += [{"type": kind, kind: one} for one in (sources if isinstance(sources, list) else [sources])]
        if "prompt" in value:
            content.append({"type": "text", "text": value["prompt"]})
        if not content:
            raise PromptError(f"{where}: wants messages or a prompt")
        messages = [{"role": "user", "content": content}]
    begins = messages and isinstance(messages[0], dict) and messages[0].get("role") == "system"
    if instruction is not None and not begins:
        messages = [{"role": "system", "content": instruction}, *messages]
    return messages


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Lines that hold more than blanks. One that is too long comes as a part that is too long, and the rest of it is
    passed over without being held."""
    while line := file.readline(MAX_LINE + 1):
        rest = line
        while len(rest) > MAX_LINE and not rest.endswith(b"\n"):
            rest = file.readline(MAX_LINE + 1)
        if line.strip():
            yield line


def _take_up(out: Path, given: Iterator[bytes]) -> tuple[int, int]:
    """How many answers ``out`` holds and how many of them are errors; as many lines are taken from ``given``."""
    if not out.exists():
        return 0, 0
    done = failed = whole = 0
    with open_regular(out, update=True) as file:
        while line := file.readline(MAX_LINE + 1):
            if not line.endswith(b"\n") and len(line) <= MAX_LINE:
                break
            try:
                answer = json.loads(line)
                held = (
                    isinstance(answer, dict) and answer.get("index") == done and ("text" in answer or "error" in answer)
                )
            except (ValueError, RecursionError):
                held = False
            asked = next(given, None)
            if not held or asked is None or answer.get("id") != _identity(asked):
                raise Qwen2VLError(
                    f"{out}: line {done + 1} is no answer to that line of the questions: name another file, or the "
                    "questions that it was begun with"
                )
            failed += "error" in answer
            done, whole = done + 1, file.tell()
        file.truncate(whole)
    return done, failed


def _identity(line: bytes) -> Any:
    try:
        value = json.loads(line) if len(line) <= MAX_LINE else None
    except (ValueError, RecursionError):
        return None
    return value.get("id") if isinstance(value, dict) else None


def _written(answer: Answer, identity: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"index": answer.index} | ({} if identity is None else {"id": identity})
    if answer.error is not None:
        return found | {"error": str(answer.error)}
    tokens = {"prompt": answer.prompt_tokens, "generated": len(answer.token_ids)}
    boxes = {"boxes": describe_places(answer.places)} if answer.places else {}
    return found | {"text": answer.text, "finish_reason": answer.finish_reason, "tokens": tokens} | boxes
