"""What a conversation's next prompt need not read again: keys and values of the tokens that it shares with the last.

Turn n + 1 repeats turn n and its answer, up to where a template, a tokenizer or a caller changed something. The longest
prefix of equal ids and equal pictures stays in the cache, and only what follows it is read. A picture is the same where
its grid and its pixels are, by their SHA-256.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch

from qwen2vl_kernels import mrope_positions

from .cache import KVCache
from .checks import Call, Patches, digest, placeholders
from .config import Qwen2VLConfig
from .decoding import CapturedSteps, Steps, graph_capacity
from .errors import PromptError
from .graphs import unfit_for_keeping, versions_of
from .model import Qwen2VL
from .progress import Row


class _Item(NamedTuple):
    """An image or video in a prompt: the places of its placeholders, and what tells it from others."""

    kind: str
    start: int
    stop: int
    digest: bytes


@dataclass
class _Held:
    """A cache and the ids that it holds, made by the weights of ``model``."""

    model: weakref.ref[Qwen2VL]
    weights: tuple
    steps: Steps
    ids: torch.Tensor
    items: list[_Item]


class Turn(NamedTuple):
    """``steps`` behind a cache that holds ``kept`` tokens of a prompt, and the ``rest`` of it, still to be read."""

    steps: Steps
    rest: Call
    kept: int


class Conversation:
    """The cache of one conversation between its answers, for ``generate(..., conversation=)`` and ``stream``.

    Every call gives the whole prompt, as without it; logits are equal within rounding. It may be any prompt: one that
    shares nothing with the last is read whole. A cache is kept for one model, until its weights change (through
    ``Tensor.data`` nobody sees them change: :meth:`forget` then), and not at all while the model has an adapter that is
    not merged, or hooks. It takes the memory of a cache with room for the longest prompt and answer so far, a power of
    two or one and a half times one, until :meth:`forget` or its end. Answers that are asked for at the same time are
    right; one of them finds the cache.
    """

    def __init__(self) -> None:
        self._held: _Held | None = None

    def forget(self) -> None:
        """Let go of the cache, and of its captured step for others to use."""
        held, self._held = self._held, None
        if held is not None:
            held.steps.close()

    @property
    def tokens(self) -> int:
        """How many tokens are kept."""
        return 0 if self._held is None else len(self._held.ids)

    @contextmanager
    def turn(self, model: Qwen2VL, call: Call, capacity: int, graphs: bool, answer: Row) -> Iterator[Turn]:
        """For the one sequence of ``call``: steps with room for ``capacity`` tokens. In the end what the cache then
        holds of the prompt and of ``answer`` is kept, whatever ended it.

        Raises :class:`PromptError` for features in the place of pixels, and for positions of the caller's.
        """
        if call.features is not None or call.position_ids is not None:
            got = "position_ids" if call.features is None else "features"
            raise PromptError(f"conversation: wants ids and pixels, which tell what was read before, got {got}")
        held, self._held = self._held, None
        fit, weights = not unfit_for_keeping(model, model), versions_of(model)
        if held is not None and not (fit and held.model() is model and held.weights == weights):
            held = None
        items = _items(model.config, call)
        kept = 0 if held is None else _shared(held, call.packed, items)
        if model.parallel is not None:
            kept = model.parallel.least(kept)
        steps = _steps(model, None if held is None else held.steps, kept, capacity, graphs)
        steps.cache.rewind(kept)
        try:
            yield Turn(steps, _rest(model.config, call, kept, items), kept)
        finally:
            ids = torch.cat([call.packed.long(), torch.tensor([*answer.ids, *answer.end], dtype=torch.int64)])
            ids = ids[: steps.cache.lengths[0]]
            self.forget()  # of an answer at the same time
            if fit:
                items = [item for item in items if item.stop <= len(ids)]
                self._held = _Held(weakref.ref(model), weights, steps, ids, items)
            else:
                steps.close()


def _steps(model: Qwen2VL, held: Steps | None, kept: int, capacity: int, graphs: bool) -> Steps:
    """Those that are held, where they serve, or others with their first ``kept`` tokens."""
    if held is not None and isinstance(held, CapturedSteps) == graphs and held.serves(capacity):
        return held
    if held is not None and kept:
        source = held.cache
        source.rewind(kept)
    else:
        source = KVCache(model.model.cache_config, 1, 1, device=model.device, dtype=model.dtype)
    if graphs:
        return CapturedSteps(model, source, 1, capacity)
    return Steps(model, source.repeated(1, graph_capacity(capacity)))


def _shared(held: _Held, ids: torch.Tensor, items: list[_Item]) -> int:
    """The tokens that ``held`` and a prompt both begin with; one of the prompt's at least is left, no item is cut."""
    most = min(len(held.ids), len(ids) - 1)
    differ = (held.ids[:most] != ids[:most]).nonzero()
    kept = int(differ[0]) if len(differ) else most
    for n, item in enumerate(items):
        if item.start < kept and (item.stop > kept or held.items[n : n + 1] != [item]):
            return item.start
    return kept


def _items(config: Qwen2VLConfig, call: Call) -> list[_Item]:
    """In order of appearance. That each item has its run of placeholders has been checked."""
    found: list[_Item] = []
    for one in call.media:
        places = placeholders(config, call.packed)[0 if one.kind == "image" else 1].nonzero().flatten().tolist()
        at = 0
        for grid, rows in one.each():  # features are refused before
            tokens = len(rows) // config.vision.spatial_merge_size**2
            found.append(_Item(one.kind, places[at], places[at] + tokens, digest(grid, rows)))
            at += tokens
    return sorted(found, key=lambda item: item.start)


def _rest(config: Qwen2VLConfig, call: Call, kept: int, items: list[_Item]) -> Call:
    """The call without its first ``kept`` tokens, at the positions that the whole conversation gives it."""
    positions, _ = mrope_positions(  # on the host
        call.packed[None],
        call.grid_thw("image"),
        call.grid_thw("video"),
        image_token_id=config.image_token_id,
        video_token_id=config.video_token_id,
        spatial_merge_size=config.vision.spatial_merge_size,
    )
    media = []
    for one in call.media:
        past = sum(item.kind == one.kind and item.start < kept for item in items)
        if grids := one.grids[past:]:
            patches, before = (sum(t * h * w for t, h, w in some) for some in (grids, one.grids[:past]))
            rows = None if one.rows is None else one.rows[before:]
            media.append(Patches(one.kind, rows, grids, patches // config.vision.spatial_merge_size**2))
    ids = call.packed[kept:]
    return Call(ids[None], None, ids, None, [len(ids)], tuple(media), positions[:, :, kept:], None)
