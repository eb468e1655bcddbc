"""Text generation: greedy or sampled, batched, streaming, with stop strings, inside the context of the model."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, TypeGuard, cast

import torch

from .cache import KVCache
from .checks import Call, check_call
from .choosing import Chooser, LogitsProcessor, TokenLogprobs
from .conversation import Conversation
from .decoding import Mark, Steps, Underway, begin_steps, wants_graphs
from .errors import CheckpointError, ContextLengthError, PromptError, Qwen2VLError
from .media.options import shown
from .model import Qwen2VL
from .progress import Row, end_ids, stop_ids

if TYPE_CHECKING:
    from .agents.answers import Located
    from .prompt.inputs import MediaInfo
    from .prompt.tokenizer import Tokenizer


MAX_SEQUENCES = 65_536  # answers to one prompt


@dataclass(frozen=True)
class GenerationConfig:
    """How to choose tokens and when to stop.

    Attributes:
        max_new_tokens: at most this many per sequence, and no more than its own prompt leaves room for in the context.
        do_sample: draw from the distribution instead of taking its maximum; ``None`` draws where one of temperature,
            top_k and top_p is given.
        temperature, top_k, top_p: shape the distribution in this order; ``None`` leaves it as it is, as do
            ``temperature=1``, ``top_k=0`` and ``top_p=1``. The likeliest token is always kept, so that ``top_p=0``
            draws no other.
        repetition_penalty: divides positive and multiplies negative scores of every id seen in prompt or answer
            (Keskar et al. 2019, section 4.1).
        seed: row b of a batch draws with ``seed + b``, or with ``seed[b]``; ``None`` takes a fresh one. A row's draws
            do not depend on the rest of its batch, nor an answer's on how many are asked for; a GPU's are not a CPU's
            (see :class:`qwen2vl.choosing.Chooser`). It does not ask for draws by itself.
        stop: texts at which a sequence ends; they are not part of the result. One may be a control token, such as
            ``"<|object_ref_end|>"``, which a text leaves out and an answer may hold.
        eos_token_ids: ids at which a sequence ends; empty takes the checkpoint's.
        num_return_sequences: as many answers to every prompt, which is read once; more than one wants draws.
        logprobs: give log-probabilities of every token of an answer, and of as many of the likeliest in its place;
            ``None`` gives none.

    Raises:
        Qwen2VLError: a value is out of range or of a wrong type, or ``do_sample=False`` stands beside a setting that
            shapes draws.
    """

    max_new_tokens: int = 128
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | Sequence[int] | None = None
    stop: tuple[str, ...] = ()
    eos_token_ids: tuple[int, ...] = ()
    num_return_sequences: int = 1
    logprobs: int | None = None

    def __post_init__(self) -> None:
        checks = (
            ("max_new_tokens", _integer(self.max_new_tokens) and self.max_new_tokens >= 1, "an integer >= 1"),
            ("do_sample", self.do_sample is None or isinstance(self.do_sample, bool), "True, False or None"),
            (
                "temperature",
                self.temperature is None or (_number(self.temperature) and self.temperature > 0),
                "> 0 (do_sample=False is greedy)",
            ),
            ("top_k", self.top_k is None or (_integer(self.top_k) and self.top_k >= 0), "an integer >= 0"),
            ("top_p", self.top_p is None or (_number(self.top_p) and 0 <= self.top_p <= 1), "in [0, 1]"),
            ("repetition_penalty", _number(self.repetition_penalty) and self.repetition_penalty > 0, "> 0"),
            ("seed", self.seed is None or _integer(self.seed) or _integers(self.seed), "an integer, several or None"),
            ("stop", _non_empty_strings(self.stop), "a sequence of non-empty strings"),
            (
                "num_return_sequences",
                _integer(self.num_return_sequences) and 1 <= self.num_return_sequences <= MAX_SEQUENCES,
                f"an integer in [1, {MAX_SEQUENCES}]",
            ),
            ("logprobs", self.logprobs is None or (_integer(self.logprobs) and self.logprobs >= 0), "an integer >= 0"),
            ("eos_token_ids", _token_ids(self.eos_token_ids), "a sequence of integers >= 0"),
        )
        for name, ok, want in checks:
            if not ok:
                raise Qwen2VLError(f"{name} must be {want}, got {shown(getattr(self, name))}")
        if self.do_sample is False:
            for name, neutral in _SHAPING.items():
                if getattr(self, name) not in (None, neutral):
                    raise Qwen2VLError(
                        f"{name} must be left out with do_sample=False, which takes the likeliest token, "
                        f"got {getattr(self, name)!r}"
                    )

        if self.num_return_sequences > 1 and not self.samples:
            raise Qwen2VLError(
                f"num_return_sequences must be 1 where the likeliest token is taken, got {self.num_return_sequences}; "
                "give a temperature, top_k or top_p, or do_sample=True"
            )

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn."""
        if self.do_sample is None:
            return any(getattr(self, name) is not None for name in _SHAPING)
        return self.do_sample

    @classmethod
    def from_model(cls, model: Qwen2VL, **overrides: Any) -> GenerationConfig:
        """The checkpoint's generation_config.json with ``overrides`` on top, of which those that are None count as left
        out.

        Any one of temperature, top_k and top_p replaces all three of the checkpoint's and draws: released checkpoints
        come with ``top_k=1``, under which a temperature would change nothing. What the file holds beside
        ``"do_sample": false`` waits for an override ``do_sample=True``.

        Raises :class:`CheckpointError` when the file holds values that mean nothing.
        """
        known = {f.name for f in fields(cls)} - {"stop", "seed", "eos_token_ids", "num_return_sequences", "logprobs"}
        stated = {k: v for k, v in model.generation_defaults.items() if k in known and v is not None}
        if stated.get("temperature") == 0:  # some writers' way of saying greedy
            del stated["temperature"]
            stated["do_sample"] = False
        stated.setdefault("do_sample", False)
        try:
            cls(**{name: value for name, value in stated.items() if name != "do_sample"})
            cls(do_sample=stated["do_sample"])
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"generation_config.json: {error}") from error
        given = {name: value for name, value in overrides.items() if value is not None}
        shaped = not _SHAPING.keys().isdisjoint(given)
        if shaped:
            del stated["do_sample"]
        if shaped or not given.get("do_sample", stated["do_sample"]):
            stated = {name: value for name, value in stated.items() if name not in _SHAPING}
        return cls(**stated | given)


# What shapes a draw, each with the value that leaves the distribution as it is.
_SHAPING = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}


def _number(value: object) -> TypeGuard[float]:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an int that no float holds
        return False


def _integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and -(1 << 63) <= value < 1 << 63


def _non_empty_strings(values: object) -> bool:
    return (
        isinstance(values, Sequence) and not isinstance(values, str) and all(isinstance(v, str) and v for v in values)
    )


def _integers(values: object) -> bool:
    return isinstance(values, Sequence) and all(map(_integer, values))


def _token_ids(values: object) -> bool:
    return isinstance(values, Sequence) and all(_integer(value) and value >= 0 for value in values)


@dataclass(frozen=True)
class GenerationResult:
    """What :func:`generate` made, a list entry per sequence: all answers to the first prompt, then those to the second.

    ``sequences``: new ids, without the id that ended them. ``texts``: decoded, empty without a tokenizer.
    ``finish_reasons``: ``"stop"`` (an end id), ``"stop_string"`` (its text, or its control token), ``"length"``
    (``max_new_tokens``) or ``"context"`` (prompt and answer fill the model's context). ``timings`` in seconds:
    ``vision``, ``prefill``, ``decode`` (the model's steps, without choosing; on a GPU by its own clock), and
    ``decode_steps``, the number of steps after the first token.
    ``raw_texts``: all that was generated, with the control tokens that ``texts`` leave out and with what ended it;
    empty without a tokenizer. ``media``: the images and videos of each prompt, empty where the inputs came from no
    processor. ``logprobs``: for each id of ``sequences``, empty unless the configuration asks for them.
    ``cached_tokens``: of each prompt's tokens, those that a conversation held already.
    """

    sequences: list[list[int]]
    texts: list[str]
    finish_reasons: list[str]
    prompt_tokens: list[int]
    timings: dict[str, float]
    raw_texts: list[str] = field(default_factory=list)
    media: list[list[MediaInfo]] = field(default_factory=list)
    logprobs: list[list[TokenLogprobs]] = field(default_factory=list)
    cached_tokens: list[int] = field(default_factory=list)

    def places(self, row: int = 0, *, media: int | None = None) -> list[Located]:
        """The boxes and quadrilaterals of one answer with their labels, in thousandths and in pixels of the source.

        Args:
            row: which answer of the batch.
            media: the index of the image or video that the answer is about, where its prompt has several; without it
                ``pixels`` are None there.

        Raises:
            PromptError: there is no such row, or ``generate`` had no tokenizer.
            GroundingError: there is no such image or video.
        """
        from .agents.answers import locate  # which loads what reads media

        if not self.raw_texts:
            raise PromptError("places are read off an answer's text: give generate a tokenizer")
        if not 0 <= row < len(self.raw_texts):
            raise PromptError(f"row: wants the index of one of {len(self.raw_texts)} answers, got {row!r}")
        return locate(self.raw_texts[row], self.media[row], media)


class _Run:
    """A batch in progress; iterating gives ``(row, token id, new text)`` for every token chosen."""

    def __init__(
        self,
        model: Qwen2VL,
        inputs: Mapping[str, torch.Tensor],
        tokenizer: Tokenizer | None,
        config: GenerationConfig,
        logits_processors: Sequence[LogitsProcessor],
        graphs: bool | None,
        conversation: Conversation | None,
    ) -> None:
        if tokenizer is not None and not hasattr(tokenizer, "stream_decoder"):
            raise TypeError(f"tokenizer must be a processor's tokenizer, got {type(tokenizer).__name__}")
        if config.stop and tokenizer is None:
            raise PromptError("stop strings need a tokenizer")
        self.model, self.config, self.inputs = model, config, inputs
        call = check_call(model.config, **cast("dict[str, Any]", inputs))
        self.call: Call | None = call
        self.conversation = conversation
        if conversation is not None and (len(call.counts), config.num_return_sequences) != (1, 1):
            got = f"{len(call.counts)} prompts with {config.num_return_sequences} answers each"
            raise PromptError(f"conversation: wants one prompt with one answer, got {got}")
        self.prompt_tokens = [count for count in call.counts for _ in range(config.num_return_sequences)]
        budgets = _budgets(model, call.counts, config.max_new_tokens)
        self.cached_tokens = [0] * len(self.prompt_tokens)
        self.budgets = [budget for budget in budgets for _ in range(config.num_return_sequences)]
        self.rows = [Row(tokenizer and tokenizer.stream_decoder(), config.stop) for _ in self.prompt_tokens]
        self.timings: dict[str, float] = {"vision": 0.0, "prefill": 0.0, "decode": 0.0, "decode_steps": 0}
        self.ends = end_ids(model, config.eos_token_ids)
        if tokenizer is not None:
            self.ends = stop_ids(tokenizer, config.stop) | self.ends
        self.choose = Chooser(model, inputs, config, logits_processors, steps=max(budgets))
        self.graphs = wants_graphs(model, graphs)
        # Where the host need not wait it reads a token while the next step runs. Logits processors want every answer so
        # far before the next choice.
        self.ahead = KVCache.asynchronous(model.device) and not logits_processors and model.parallel is None

    # inference_mode is entered around each forward and not around a yield: it is a state of the thread, and must not
    # reach the consumer between two tokens.
    def __iter__(self) -> Generator[tuple[int, int, str], None, None]:
        with ExitStack() as ending:
            with torch.inference_mode():
                steps, logits = self._prefill(ending)
                underway = self._chosen(logits)
            while True:
                following = self._step(steps, underway) if self.ahead and not self._last(1) else None
                choice = underway.wait()
                told = choice.told()
                try:
                    for index, (row, token) in enumerate(zip(self.rows, choice.tokens.tolist(), strict=True)):
                        if not row.reason:
                            piece = row.push(token, self.ends, self.budgets[index])
                            if told and token not in self.ends:
                                row.logprobs.append(told[index])
                            yield index, token, piece
                except BaseException:  # whoever reads wants no more
                    self._over(True)
                    raise
                if self._over(self._last(0)):
                    return  # the step that follows, where one does, went too far: nobody reads it
                # Rows that have ended keep their place, with a token nobody reads.
                with torch.inference_mode():
                    steps.cache.hold(index for index, row in enumerate(self.rows) if row.reason)
                following = following or self._step(steps, underway)
                underway, took = following
                self.timings["decode"] += took()
                self.timings["decode_steps"] += 1

    def _over(self, over: bool) -> bool:
        """Whether no more tokens are wanted; where the model is split, by rank 0's word."""
        return over if self.model.parallel is None else self.model.parallel.end_of_step(over, self.rows)

    def _last(self, unread: int) -> bool:
        """Whether all rows have ended, or will have by their budgets with ``unread`` more tokens."""
        rows = zip(self.rows, self.budgets, strict=True)
        return all(row.reason or len(row.ids) + unread >= budget for row, budget in rows)

    def _step(self, steps: Steps, underway: Underway) -> tuple[Underway, Callable[[], float]]:
        """What follows the tokens underway, and what tells the seconds that the step took."""
        device = self.model.device
        with torch.inference_mode():
            begin = Mark.now(device)
            logits = steps(underway.tokens)
            end = Mark.now(device)
            return self._chosen(logits), lambda: end.since(begin)

    def _chosen(self, logits: torch.Tensor) -> Underway:
        answers, ended = [row.ids for row in self.rows], [bool(row.reason) for row in self.rows]
        return Underway(self.choose(logits, answers, ended), self.model.parallel)

    @property
    def finish_reasons(self) -> list[str]:
        most = self.config.max_new_tokens
        return ["context" if row.reason == "length" and len(row.ids) < most else row.reason for row in self.rows]

    def _prefill(self, ending: ExitStack) -> tuple[Steps, torch.Tensor]:
        """Steps behind the prompts, which ``ending`` closes, and the logits ``(rows, vocab)`` at their ends."""
        if self.call is None:
            raise RuntimeError("a run can be iterated once")
        model, call, inputs = self.model, self.call, self.inputs
        self.call, self.inputs = None, {}  # pixels are large
        if model.parallel is not None:
            model.parallel.begin(inputs, self.config, self.choose, self.conversation is not None)
        answers = self.config.num_return_sequences
        capacity = max(map(sum, zip(self.prompt_tokens, self.budgets, strict=True)))
        steps = None
        if self.conversation is not None:
            turn = self.conversation.turn(model, call, capacity, self.graphs, self.rows[0])
            steps, call, kept = ending.enter_context(turn)
            self.cached_tokens, cache = [kept], steps.cache
        else:
            first = capacity if answers == 1 and not self.graphs else max(call.counts)
            cache = KVCache(model.model.cache_config, len(call.counts), first, device=model.device, dtype=model.dtype)
        features = call.features
        if features is None:
            features = self._timed("vision", model.encode_patches, call.media, None if self.graphs else False)
        logits = self._timed("prefill", model.prefill, call, features, cache, last_only=True)
        if steps is None:
            steps = begin_steps(model, cache, answers, capacity, self.graphs)
            ending.callback(steps.close)
        return steps, logits[:, 0].repeat_interleave(answers, 0)

    def _timed(self, name: str, call: Callable, *args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        result = call(*args, **kwargs)
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        self.timings[name] += time.perf_counter() - begin
        return result


def generate(
    model: Qwen2VL,
    inputs: Mapping[str, torch.Tensor],
    *,
    tokenizer: Tokenizer | None = None,
    config: GenerationConfig | None = None,
    logits_processors: Sequence[LogitsProcessor] = (),
    on_token: Callable[[int, int, str], None] | None = None,
    graphs: bool | None = None,
    conversation: Conversation | None = None,
) -> GenerationResult:
    """Continue every sequence of a batch.

    Args:
        inputs: what :class:`qwen2vl.Processor` returns, or the same names as the model's call.
        tokenizer: for texts and stop strings.
        config: default :meth:`GenerationConfig.from_model`.
        logits_processors: called in turn as ``processor(answers, scores)`` before each choice, see
            :data:`qwen2vl.choosing.LogitsProcessor`; after the repetition penalty, before temperature, top_k and top_p.
        on_token: called with (index of the sequence, token id, new text) as tokens are chosen; on a GPU, where no
            logits processor is given, while the next step runs.
        graphs: capture a step of decoding as a CUDA graph at the first use of a number of rows, and replay it (see
            :mod:`qwen2vl.decoding`), and the vision tower likewise (:mod:`qwen2vl.tower_graph`); default where the
            model is on CUDA and ``QWEN2VL_GRAPHS=1`` is set, as no GPU has run them yet.
        conversation: keeps the cache of one prompt and its answer; the next prompt with it is read from where it
            departs from them.

    No sequence depends on the others of its batch, the room for its answer included.

    Raises :class:`ContextLengthError` before anything runs when a prompt leaves no room for an answer, and
    :class:`Qwen2VLError` for logits processors that leave a row nothing to choose from, and for graphs of a model that
    is on no CUDA device, or has an adapter or hooks.
    """
    config = config or GenerationConfig.from_model(model)
    run = _Run(model, inputs, tokenizer, config, logits_processors, graphs, conversation)
    with closing(iter(run)) as chosen:
        for row, token, piece in chosen:
            if on_token is not None:
                on_token(row, token, piece)
    return GenerationResult(
        sequences=[row.ids for row in run.rows],
        texts=[row.text for row in run.rows] if tokenizer is not None else [],
        finish_reasons=run.finish_reasons,
        prompt_tokens=run.prompt_tokens,
        timings=run.timings,
        raw_texts=[tokenizer.decode(row.ids + row.end, skip_special_tokens=False) for row in run.rows if tokenizer],
        media=[
            [item for item in getattr(inputs, "media", ()) if item.row == n // run.config.num_return_sequences]
            for n in range(len(run.rows))
        ],
        logprobs=[row.logprobs for row in run.rows] if run.config.logprobs is not None else [],
        cached_tokens=run.cached_tokens,
    )


def stream(
    model: Qwen2VL,
    inputs: Mapping[str, torch.Tensor],
    *,
    tokenizer: Tokenizer,
    config: GenerationConfig | None = None,
    logits_processors: Sequence[LogitsProcessor] = (),
    graphs: bool | None = None,
    conversation: Conversation | None = None,
) -> Iterator[str]:
    """Text of one sequence in pieces as they become certain; joined they are :func:`generate`'s text.

    What :func:`generate` refuses is refused at the call, before the first piece is asked for.
    """
    if inputs["input_ids"].shape[0] != 1:
        raise PromptError(f"input_ids: stream takes a batch of one, got {inputs['input_ids'].shape[0]}")
    config = config or GenerationConfig.from_model(model)
    if config.num_return_sequences != 1:
        raise PromptError(f"config: stream gives one answer, got num_return_sequences={config.num_return_sequences}")
    run = _Run(model, inputs, tokenizer, config, logits_processors, graphs, conversation)
    return (piece for _, _, piece in run if piece)


def _budgets(model: Qwen2VL, prompt_tokens: Sequence[int], max_new_tokens: int) -> list[int]:
    """How many new tokens each sequence may have: as asked for, as far as the context has room behind its prompt.

    Raises :class:`ContextLengthError` naming the prompts that leave none.
    """
    limit = model.config.text.max_position_embeddings
    if full := [f"{count} in row {row}" for row, count in enumerate(prompt_tokens) if count >= limit]:
        raise ContextLengthError(
            f"input_ids: wants prompts that leave room for an answer in the model's context of {limit} tokens, got "
            f"{', '.join(full)}; shorten the prompt, or lower max_pixels or a video's tokens"
        )
    return [min(max_new_tokens, limit - count) for count in prompt_tokens]
