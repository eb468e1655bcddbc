"""Packing: samples of any length laid end to end up to a token budget, with no padding between them.

Attention, positions and the loss stop at the bounds that ``cu_seqlens`` gives, so that a sample's loss and gradients
are what they would be alone. A pack without any image or video gets a placeholder image of one token that nothing
attends to and no loss is taken from: every pack then runs the vision tower once, and the collectives of ranks that
shard it match whatever each of them drew.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch

from qwen2vl_kernels import mrope_positions

from ..config import Qwen2VLConfig
from ..errors import DataError
from .example import Example

#: The label of a token that nothing is learned from.
IGNORE = -100
_ROWS = ("pixel_values", "pixel_values_videos")
_GRIDS = ("image_grid_thw", "video_grid_thw")


class Dataset(Protocol):
    """What packing draws from. ``state_dict`` says where the samples given so far end; what it returned stays as it is
    when more are given."""

    def __iter__(self) -> Iterator[Example]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Batch:
    """One pack, on the host until :meth:`to`.

    Attributes:
        input_ids: ``(T,)`` int64.
        targets: ``(T,)`` int64, the id that each token should be followed by; -100 where no loss is taken. Labels
            shifted by one inside each sample: the last token of a sample predicts nothing.
        positions: ``(3, T)`` int64 M-RoPE positions, from zero in every sample.
        cu_seqlens: ``(S + 1,)`` int32 bounds of the samples; stays on the host, where attention reads it.
        pixel_values, image_grid_thw, pixel_values_videos, video_grid_thw: those of all samples in order.
        sources: where each sample came from; None for the placeholder image, which is no sample.
    """

    input_ids: torch.Tensor
    targets: torch.Tensor
    positions: torch.Tensor
    cu_seqlens: torch.Tensor
    pixel_values: torch.Tensor | None
    image_grid_thw: torch.Tensor | None
    pixel_values_videos: torch.Tensor | None
    video_grid_thw: torch.Tensor | None
    sources: tuple[str | None, ...]

    @property
    def tokens(self) -> int:
        return self.input_ids.shape[0]

    @property
    def supervised(self) -> int:
        """Tokens that loss is taken from; waits for the device if the batch lies on one."""
        return int((self.targets != IGNORE).sum())

    def to(self, device: torch.device | str) -> Batch:
        """The batch with everything but ``cu_seqlens`` and the grids, which the model reads on the host, there."""
        moved = {
            f.name: getattr(self, f.name).to(device, non_blocking=True)
            for f in fields(self)
            if isinstance(getattr(self, f.name), torch.Tensor) and f.name not in ("cu_seqlens", *_GRIDS)
        }
        return replace(self, **moved)


def collate(examples: Sequence[Example], config: Qwen2VLConfig) -> Batch:
    """Lay ``examples`` end to end.

    Raises :class:`DataError` naming the sample whose fields do not fit each other or the model.
    """
    if not examples:
        raise DataError("examples: a pack needs at least one sample, got none")
    for example in examples:
        _check(example, config)
    sources: list[str | None] = [e.source for e in examples]
    if all(e.pixel_values is None and e.pixel_values_videos is None for e in examples):
        examples = [*examples, _placeholder(config)]
        sources.append(None)
    media = {name: _joined(examples, name) for name in (*_ROWS, *_GRIDS)}
    input_ids = torch.cat([e.input_ids for e in examples])
    targets = torch.cat([torch.cat((e.labels[1:], e.labels.new_full((1,), IGNORE))) for e in examples])
    cu_seqlens = torch.tensor([0, *(e.tokens for e in examples)]).cumsum(0, dtype=torch.int32)
    positions, _ = mrope_positions(
        input_ids.unsqueeze(0),
        media["image_grid_thw"],
        media["video_grid_thw"],
        cu_seqlens=cu_seqlens,
        image_token_id=config.image_token_id,
        video_token_id=config.video_token_id,
        spatial_merge_size=config.vision.spatial_merge_size,
    )
    return Batch(input_ids, targets, positions[:, 0], cu_seqlens, sources=tuple(sources), **media)


def _placeholder(config: Qwen2VLConfig) -> Example:
    side = config.vision.spatial_merge_size
    values = config.vision.patch_values // config.vision.temporal_patch_size
    return Example(
        input_ids=torch.tensor([config.image_token_id]),
        labels=torch.tensor([IGNORE]),
        pixel_values=torch.zeros(side * side, values, dtype=torch.uint8),
        image_grid_thw=torch.tensor([[1, side, side]]),
    )


def _joined(examples: Sequence[Example], name: str) -> torch.Tensor | None:
    found = [e for e in examples if getattr(e, name) is not None]
    if not found:
        return None
    first, tensors = getattr(found[0], name), [getattr(e, name) for e in found]
    for e, tensor in zip(found, tensors, strict=True):
        if tensor.shape[1:] != first.shape[1:] or tensor.dtype != first.dtype:
            raise DataError(
                f"{name} has rows of {tuple(tensor.shape[1:])} {tensor.dtype}, those of "
                f"{found[0].source or 'the first'} in the same pack are {tuple(first.shape[1:])} {first.dtype}",
                e.source,
            )
    return torch.cat(tensors)


def _check(example: Example, config: Qwen2VLConfig) -> None:
    """Everything that the model would refuse without being able to name the sample."""
    where = example.source
    ids, labels = example.input_ids, example.labels
    if ids.ndim != 1 or not ids.numel() or ids.dtype != torch.int64:
        raise DataError(f"input_ids must be int64 of shape (L,), L > 0, got {ids.dtype} {tuple(ids.shape)}", where)
    if labels.shape != ids.shape or labels.dtype != torch.int64:
        raise DataError(f"labels must be int64 {tuple(ids.shape)}, got {labels.dtype} {tuple(labels.shape)}", where)
    vocabulary = config.text.vocab_size
    if int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
        raise DataError(f"input_ids must be in [0, {vocabulary}), got {int(ids.min())} to {int(ids.max())}", where)
    taught = labels[labels != IGNORE]
    if taught.numel() and not 0 <= int(taught.min()) <= int(taught.max()) < vocabulary:
        raise DataError(
            f"labels must be {IGNORE} or in [0, {vocabulary}), got {int(taught.min())} to {int(taught.max())}",
            where,
        )
    merge = config.vision.spatial_merge_size**2
    for rows_name, grid_name, token in zip(_ROWS, _GRIDS, (config.image_token_id, config.video_token_id), strict=True):
        rows, grid = getattr(example, rows_name), getattr(example, grid_name)
        if (rows is None) != (grid is None):
            raise DataError(f"{rows_name} and {grid_name} must be given together", where)
        patches = 0 if grid is None else int(grid.prod(-1).sum())
        if rows is not None and (rows.shape[0] != patches or not patches):
            raise DataError(f"{grid_name} stands for {patches} patches, {rows_name} has {rows.shape[0]}", where)
        if (count := int((ids == token).sum())) != patches // merge:
            raise DataError(
                f"input_ids has {count} placeholders {token}, {grid_name} makes {patches // merge} tokens",
                where,
            )


class Packer:
    """Endless packs of at most ``max_tokens`` tokens from a dataset, by first fit over a buffer.

    Up to ``lookahead`` samples wait in the order in which they came. A pack begins with the one that has waited
    longest and takes each later one that still fits, so nothing waits for ever and the order depends on nothing but the
    data. Inside of a pack the shortest leads. When the dataset ends it is begun again. (The placeholder image of a pack
    of text is one token on top.)

    ``state_dict`` holds no sample, only where the dataset stood when the oldest one waiting was drawn and which of
    those drawn since have been packed: resuming draws those again.

    Raises :class:`DataError` for a sample longer than ``max_tokens``, and for a dataset that ends without giving any.
    """

    def __init__(self, dataset: Dataset, config: Qwen2VLConfig, *, max_tokens: int, lookahead: int = 64) -> None:
        if max_tokens < 1 or lookahead < 1:
            raise DataError(f"max_tokens and lookahead must be positive, got {max_tokens} and {lookahead}")
        self.dataset, self.config = dataset, config
        self.max_tokens, self.lookahead = max_tokens, lookahead
        self._samples: Iterator[Example] | None = None
        #: (the dataset's state before the sample was drawn, its number, the sample)
        self._waiting: list[tuple[dict[str, Any], int, Example]] = []
        self._drawn = 0

    def __iter__(self) -> Packer:
        return self

    def __next__(self) -> Batch:
        while len(self._waiting) < self.lookahead:
            self._draw()
        room, taken, left = self.max_tokens, [], []
        for entry in self._waiting:
            fits = entry[2].tokens <= room
            (taken if fits else left).append(entry)
            room -= entry[2].tokens if fits else 0
        self._waiting = left
        # Neighbours of one length are one call of attention where that has no kernel for ragged ones.
        return collate(sorted((example for _, _, example in taken), key=lambda e: e.tokens), self.config)

    def _draw(self) -> None:
        """One more sample into the buffer."""
        for _ in range(2):  # a dataset that ended begins anew, once
            if self._samples is None:
                self._samples = iter(self.dataset)
            before = self.dataset.state_dict()
            example = next(self._samples, None)
            if example is not None:
                self._keep(before, example)
                return
            self._samples = None
        raise DataError("dataset: it ended without giving a single sample; see its report for what was dropped")

    def _keep(self, before: dict[str, Any], example: Example) -> None:
        if example.tokens > self.max_tokens:
            raise DataError(f"has {example.tokens} tokens, more than max_tokens {self.max_tokens}", example.source)
        self._waiting.append((before, self._drawn, example))
        self._drawn += 1

    def epoch(self) -> float | None:
        """Passes over the data that have been packed: what is drawn behind the sample that has waited longest is not
        counted. None where the dataset counts none."""
        count = getattr(self.dataset, "epoch", None)
        return None if count is None else count(self._waiting[0][0] if self._waiting else None)

    def state_dict(self) -> dict[str, Any]:
        if not self._waiting:
            return {"dataset": self.dataset.state_dict(), "waiting": [], "drawn": self._drawn}
        return {
            "dataset": self._waiting[0][0],
            "waiting": [number for _, number, _ in self._waiting],
            "drawn": self._drawn,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.dataset.load_state_dict(copy.deepcopy(state["dataset"]))
        self._samples, self._waiting = None, []
        waiting, drawn = set(state["waiting"]), state["drawn"]
        self._drawn = min(waiting, default=drawn)
        while self._drawn < drawn:
            self._draw()
            if self._waiting[-1][1] not in waiting:
                self._waiting.pop()
