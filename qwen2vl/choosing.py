"""From the last logits of every sequence to its next token: penalty, processors of the caller, shape, draw."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from qwen2vl_kernels import sample_tokens_

from .cache import KVCache
from .errors import Qwen2VLError
from .model import Qwen2VL

if TYPE_CHECKING:
    from .generation import GenerationConfig

#: Called before each choice with the ids of every answer so far (without its prompt; empty at first; only to be read)
#: and the scores ``(rows, vocabulary)``, float32 on the model's device, minus infinity at what may not be chosen. It
#: returns scores of that shape, and may write into those that it is given. A row that has ended keeps its place, and
#: its answer does not grow.
LogitsProcessor = Callable[[list[list[int]], torch.Tensor], torch.Tensor]

# From the seed of one answer to that of the next, far from those of other rows: 2**32 over the golden ratio, made odd.
# On a CPU a generator reads the lower 32 bits of its seed alone.
_STRIDE = 0x9E3779B1


class TokenLogprobs(NamedTuple):
    """Natural logarithms of probabilities at one token of an answer.

    ``logprob``: of the token by the model, from its logits alone. ``processed_logprob``: of the token in the
    distribution that it was taken from, after repetition penalty, logits processors, temperature, top_k and top_p.
    ``top``: id -> ``logprob`` of the likeliest by the model, the likeliest first.
    """

    logprob: float
    processed_logprob: float
    top: dict[int, float]


class Choice(NamedTuple):
    """What was chosen for B rows: ``tokens (B,)`` int64, and where log-probabilities are asked for ``logprobs (B, 2)``
    and ``top (B, k)`` float32 with ``top_ids (B, k)`` int64, as in :class:`TokenLogprobs`."""

    tokens: torch.Tensor
    logprobs: torch.Tensor | None = None
    top: torch.Tensor | None = None
    top_ids: torch.Tensor | None = None

    def told(self) -> list[TokenLogprobs]:
        """One for each row, on the host; none where they were not asked for."""
        if self.logprobs is None or self.top is None or self.top_ids is None:
            return []
        rows = zip(self.logprobs.tolist(), self.top_ids.tolist(), self.top.tolist(), strict=True)
        return [
            TokenLogprobs(logprob, processed, dict(zip(ids, top, strict=True)))
            for (logprob, processed), ids, top in rows
        ]


class Chooser:
    """Chooses for a batch. What it keeps between tokens are tensors on the model's device.

    On a CPU each row draws from a generator of its own. On a device that the host does not wait for, token n of a row
    falls by the n-th number of a counter-based generator (Philox 4x64, Salmon et al. 2011) with the row's seed as its
    key; they are made before the first, ``steps`` of them for each row (default ``max_new_tokens``). There a choice is
    one call of :func:`qwen2vl_kernels.sample_tokens_`, at most two launches by its kernels. Logits processors and
    log-probabilities add PyTorch's operators to it: the scores that they read, and the distribution.

    Raises :class:`Qwen2VLError` for a logits processor that cannot be called.
    """

    def __init__(
        self,
        model: Qwen2VL,
        inputs: Mapping[str, torch.Tensor],
        config: GenerationConfig,
        processors: Sequence[LogitsProcessor] = (),
        steps: int | None = None,
    ) -> None:
        if callable(processors) or not all(map(callable, processors)):
            raise Qwen2VLError(f"logits_processors: wants a sequence of callables, got {processors!r}")
        self.config, self.processors = config, tuple(processors)
        c = model.config
        # An answer cannot hold an image: a placeholder id would ask for features that do not exist.
        self.banned = torch.tensor([c.image_token_id, c.video_token_id, c.vision_token_id], device=model.device)
        answers = config.num_return_sequences
        ids = inputs["input_ids"].to(model.device)
        self.seen: torch.Tensor | None = None
        if config.repetition_penalty != 1.0:
            mask = inputs.get("attention_mask")
            real = torch.ones_like(ids) if mask is None else mask.to(model.device)
            counts = torch.zeros((ids.shape[0], c.text.vocab_size), dtype=torch.int64, device=model.device)
            self.seen = (counts.scatter_add_(1, ids.long(), real.long()) > 0).repeat_interleave(answers, 0)
        changed = config.samples or processors or config.repetition_penalty != 1.0
        self.plain = not changed and config.logprobs is None
        self.generators: list[torch.Generator] = []
        self.uniforms: torch.Tensor | None = None
        self.chosen = 0
        self.prompts, self.steps, self.device = ids.shape[0], steps or config.max_new_tokens, model.device
        self.ahead = KVCache.asynchronous(model.device)
        self.seeded: int | Sequence[int] | None = None  # what the draws come from
        if config.samples:
            # It is drawn from PyTorch's generator, so that torch.manual_seed repeats an answer and nothing is reseeded.
            self.seed(int(torch.randint(2**63 - 1, ())) if config.seed is None else config.seed)

    def seed(self, seed: int | Sequence[int]) -> None:
        """Draw from here on as ``GenerationConfig.seed`` says.

        Raises :class:`Qwen2VLError` for another number of seeds than of prompts.
        """
        self.seeded = seed
        rows = [seed + row for row in range(self.prompts)] if isinstance(seed, int) else list(seed)
        if len(rows) != self.prompts:
            raise Qwen2VLError(f"seed: wants one for each of {self.prompts} prompts, got {len(rows)}")
        seeds = [row + _STRIDE * answer for row in rows for answer in range(self.config.num_return_sequences)]
        if self.ahead:
            self.uniforms = uniforms(seeds, self.steps).to(self.device)
        else:
            self.generators = [torch.Generator(self.device).manual_seed(one % 2**63) for one in seeds]

    def __call__(self, logits: torch.Tensor, answers: list[list[int]], ended: Sequence[bool]) -> Choice:
        """Of ``(B, vocab)`` logits.

        ``answers``, ids so far, and ``ended``, of each row, are for logits processors; what is chosen for a row that
        has ended means nothing. Raises :class:`Qwen2VLError` for processors' scores from which nothing can be chosen.
        """
        if self.plain:  # nothing but the order of the logits counts
            return Choice(logits.index_fill(1, self.banned, float("-inf")).argmax(-1))
        if self.ahead and not self.processors and self.config.logprobs is None:
            return Choice(self.at_once(logits, self.seen, self.banned))
        scores = self.scores(logits)
        if self.processors:
            scores = self.processed(scores, answers, ended)
        chances = None
        if self.config.samples and (self.config.logprobs is not None or not self.ahead):
            chances = self.probabilities(scores)
        if self.ahead:
            tokens = self.at_once(scores)
        elif chances is not None:
            tokens = self.draw(chances)
        else:
            tokens = scores.argmax(-1)
        if self.seen is not None:
            self.seen.scatter_(1, tokens.unsqueeze(1), True)
        if self.config.logprobs is None:
            return Choice(tokens)
        by_model = logits.float().log_softmax(-1)
        processed = scores.log_softmax(-1) if chances is None else (chances / chances.sum(-1, keepdim=True)).log()
        both = torch.stack([of.gather(1, tokens.unsqueeze(1)).squeeze(1) for of in (by_model, processed)], 1)
        return Choice(tokens, both, *by_model.topk(min(self.config.logprobs, by_model.shape[1]), -1))

    def at_once(
        self, scores: torch.Tensor, seen: torch.Tensor | None = None, banned: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``(B,)`` tokens of ``(B, vocab)`` scores, by the numbers made before where they are drawn; ``seen`` and
        ``banned`` where the scores know nothing of them yet."""
        config, at = self.config, None
        if self.uniforms is not None:
            at, self.chosen = self.uniforms.select(1, self.chosen), self.chosen + 1
        return sample_tokens_(
            scores,
            at,
            seen,
            banned,
            temperature=1.0 if config.temperature is None else config.temperature,
            top_k=config.top_k or 0,
            top_p=1.0 if config.top_p is None else config.top_p,
            repetition_penalty=1.0 if seen is None else config.repetition_penalty,
        )

    def draw(self, chances: torch.Tensor) -> torch.Tensor:
        """``(B,)`` tokens that fall by the rows of ``chances (B, vocab)``, each by its row's generator."""
        rows = zip(chances, self.generators, strict=True)
        return torch.cat([torch.multinomial(p, 1, generator=g) for p, g in rows])

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        """``(B, vocab)`` float32 with the repetition penalty, minus infinity at what is never generated."""
        scores = logits.float()
        if self.seen is not None:
            p = self.config.repetition_penalty
            scores = torch.where(self.seen, torch.where(scores < 0, scores * p, scores / p), scores)
        return scores.index_fill(1, self.banned, float("-inf"))

    def processed(self, scores: torch.Tensor, answers: list[list[int]], ended: Sequence[bool]) -> torch.Tensor:
        """What the processors make of scores, one after another; rows that have ended stay as they were."""
        given, scores = scores, scores.clone()
        for n, process in enumerate(self.processors):
            scores = process(answers, scores)
            if not isinstance(scores, torch.Tensor) or scores.shape != given.shape or not scores.is_floating_point():
                got = type(scores).__name__
                if isinstance(scores, torch.Tensor):
                    got = f"{scores.dtype} {tuple(scores.shape)}"
                raise Qwen2VLError(
                    f"logits_processors[{n}] must return floats of shape {tuple(given.shape)}, got {got}"
                )
        scores = scores.to(given).index_fill(1, self.banned, float("-inf"))
        best = scores.amax(-1).tolist()
        if lost := [row for row, one in enumerate(best) if not ended[row] and not -math.inf < one < math.inf]:
            what = "no token to choose" if best[lost[0]] == -math.inf else f"{best[lost[0]]} among its scores"
            raise Qwen2VLError(f"logits_processors must leave finite scores, got {what} in row {lost[0]}")
        return torch.where(torch.tensor(ended, device=scores.device).unsqueeze(1), given, scores)

    def probabilities(self, scores: torch.Tensor) -> torch.Tensor:
        """``(B, vocab)``, what a draw falls by: temperature, top_k and top_p; ``torch.multinomial`` normalises."""
        config = self.config
        if config.temperature is not None:
            scores = scores / config.temperature
        if config.top_k:
            kth = scores.topk(min(config.top_k, scores.shape[-1]), -1).values.narrow(1, -1, 1)
            scores = scores.masked_fill(scores < kth, float("-inf"))
        probabilities = scores.softmax(-1)
        if config.top_p is not None and config.top_p < 1:
            # Where sample_tokens_ chooses, the lower of equal ids comes first, as it has it.
            ordered, order = probabilities.sort(dim=-1, descending=True, stable=self.ahead)
            # Keep the smallest set that reaches top_p: drop what begins after it is reached.
            beyond = ordered.cumsum(-1) - ordered >= config.top_p
            beyond.select(1, 0).fill_(False)
            probabilities = probabilities.masked_fill(beyond.gather(1, order.argsort(-1)), 0)
        return probabilities


def uniforms(seeds: Sequence[int], count: int) -> torch.Tensor:
    """``(seeds, count)`` float64 numbers in [0, 1): row b's n-th depends on ``seeds[b]`` and n alone."""
    rows = [np.random.Generator(np.random.Philox(key=seed % 2**63)).random(count) for seed in seeds]
    return torch.from_numpy(np.stack(rows))
