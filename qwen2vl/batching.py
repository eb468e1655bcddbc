"""Answers to any number of conversations: batches formed by tokens, one bad conversation apart from the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, Literal

from .agents.answers import Located
from .errors import ContextLengthError, Qwen2VLError
from .generation import GenerationConfig, generate
from .model import Qwen2VL
from .prompt.inputs import Inputs
from .prompt.processor import Processor

#: Conversations are read this many at a time, so that among them those of like length stand in one batch.
_WINDOW = 64


@dataclass(frozen=True)
class Answer:
    """What became of one conversation.

    Attributes:
        index: its number, from 0.
        text, token_ids, finish_reason, prompt_tokens, places: as in :class:`qwen2vl.generation.GenerationResult`.
        error: why there is no answer; the rest is then empty.
    """

    index: int
    text: str = ""
    token_ids: tuple[int, ...] = ()
    finish_reason: str = ""
    prompt_tokens: int = 0
    places: tuple[Located, ...] = ()
    error: Qwen2VLError | None = None


def generate_all(
    model: Qwen2VL,
    processor: Processor,
    conversations: Iterable[Any],
    *,
    config: GenerationConfig | None = None,
    batch_tokens: int = 8192,
    on_error: Literal["raise", "skip"] = "raise",
    first: int = 0,
    **options: Any,
) -> Iterator[Answer]:
    """Answer each conversation; the answers come in the order of the conversations.

    Conversations are read while those before them are answered, and of those that are read the ones of like length
    share a batch. An answer does not depend on its batch, a drawn one neither: conversation n draws with
    ``config.seed + n``.

    Args:
        conversations: what the processor takes as one conversation, or an error to give in its place. Read as they are
            needed.
        config: default :meth:`GenerationConfig.from_model`.
        batch_tokens: the most tokens of a batch, prompts and answers with the padding of shorter ones; a conversation
            that is longer by itself is answered alone.
        on_error: "skip" gives an :class:`Answer` that holds the error, and the rest goes on.
        first: the number of the first conversation.
        options: how images and videos are preprocessed, as in a call of the processor.

    Raises:
        Qwen2VLError: an argument is out of range; with ``on_error="raise"``, what is wrong with a conversation, once
            the answers before it have been given.
    """
    if on_error not in ("raise", "skip"):
        raise Qwen2VLError(f"on_error: wants 'raise' or 'skip', got {on_error!r}")
    for name, value, least in (("batch_tokens", batch_tokens, 1), ("first", first, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise Qwen2VLError(f"{name}: wants an integer of at least {least}, got {value!r}")
    config = config or GenerationConfig.from_model(model)
    if config.num_return_sequences != 1:
        raise Qwen2VLError(f"config: wants one answer to a prompt, got {config.num_return_sequences}")
    if config.seed is not None and not isinstance(config.seed, int):
        raise Qwen2VLError(f"config: seed wants one integer, got {config.seed!r}")
    processor.options.updated(options)  # refuses what is no option, or out of range, before the first answer
    read = partial(processor, **options)
    return _answers(model, processor, read, iter(conversations), config, batch_tokens, on_error, first)


def _answers(
    model: Qwen2VL,
    processor: Processor,
    prepare: Callable[[Any], Inputs],
    conversations: Iterator[Any],
    config: GenerationConfig,
    batch_tokens: int,
    on_error: str,
    first: int,
) -> Iterator[Answer]:
    limit = model.config.text.max_position_embeddings

    def read() -> list[Inputs | Qwen2VLError]:
        """The next conversations: some sixty, or what fills four batches, as pictures are large."""
        window: list[Inputs | Qwen2VLError] = []
        tokens = 0
        for conversation in islice(conversations, _WINDOW):
            window.append(_prepared(prepare, conversation, limit))
            tokens += 0 if isinstance(window[-1], Qwen2VLError) else window[-1]["input_ids"].shape[1]
            if tokens >= 4 * batch_tokens:
                break
        return window

    with ThreadPoolExecutor(1, thread_name_prefix="qwen2vl-batching") as reader:
        waiting = reader.submit(read)
        while window := waiting.result():
            waiting = reader.submit(read)
            found: dict[int, Answer] = {
                n: Answer(first + n, error=one) for n, one in enumerate(window) if isinstance(one, Qwen2VLError)
            }
            bad = min(found, default=len(window)) if on_error == "raise" else len(window)
            good = {n: one for n, one in enumerate(window[:bad]) if not isinstance(one, Qwen2VLError)}
            due = 0  # the first whose answer has not been given
            for batch in _batches(good, config.max_new_tokens, batch_tokens, limit):
                joined = processor.join([good[n] for n in batch])
                seed = config.seed
                chosen = replace(config, seed=[seed + first + n for n in batch]) if isinstance(seed, int) else config
                result = generate(model, joined, tokenizer=processor.tokenizer, config=chosen)
                for row, n in enumerate(batch):
                    ids = tuple(result.sequences[row])
                    reason, count = result.finish_reasons[row], result.prompt_tokens[row]
                    places = tuple(result.places(row))
                    found[n] = Answer(first + n, result.texts[row], ids, reason, count, places)
                while due < bad and due in found:
                    yield found.pop(due)
                    due += 1
            while due < bad:
                yield found.pop(due)
                due += 1
            if bad < len(window):
                error = found[bad].error
                assert error is not None
                raise error
            first += len(window)


def _prepared(prepare: Callable[[Any], Inputs], conversation: Any, limit: int) -> Inputs | Qwen2VLError:
    """The inputs of one conversation, or what is wrong with it."""
    if isinstance(conversation, Qwen2VLError):
        return conversation
    try:
        inputs = prepare(conversation)
    except Qwen2VLError as error:
        return error
    count = inputs["input_ids"].shape[1]
    if count >= limit:
        return ContextLengthError(
            f"the prompt has {count} tokens and the model's context {limit}: wants room for an answer; shorten it, or "
            "lower max_pixels or a video's tokens"
        )
    return inputs


def _batches(rows: dict[int, Inputs], new: int, most: int, limit: int) -> Iterator[Sequence[int]]:
    """Rows of like length together, those with the first row first, so that answers come in order as far as may be."""
    order = sorted(rows, key=lambda n: rows[n]["input_ids"].shape[1])
    batches: list[list[int]] = []
    for n in order:
        length = min(rows[n]["input_ids"].shape[1] + new, limit)  # the longest so far
        if batches and (len(batches[-1]) + 1) * length <= most:
            batches[-1].append(n)
        else:
            batches.append([n])
    return iter(sorted(batches, key=min))
