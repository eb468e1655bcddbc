"""The inputs of one call of the model, held against one another once, before anything runs.

Ids, mask, grids, patches, features and positions can disagree in many ways, and each is refused here with a
:class:`PromptError` that names the argument. Ids, mask and grids are read on the host, where a prompt's are a few
kilobytes; what was read stays in the result, so that nobody reads a device again for it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .config import Qwen2VLConfig, VisionConfig
from .errors import PromptError

Grid = tuple[int, int, int]
Features = tuple[torch.Tensor | None, torch.Tensor | None]
_INTEGERS = (torch.int64, torch.int32)
_KINDS = (("image", "pixel_values", "image_grid_thw"), ("video", "pixel_values_videos", "video_grid_thw"))


@dataclass(frozen=True, eq=False)
class Patches:
    """The patches of all images or of all videos of a call, checked.

    Attributes:
        kind: "image" or "video".
        rows: ``(patches, values)``; None where features come in their place.
        grids: patches of each item in time, height and width.
        tokens: tokens that the items make together.
    """

    kind: str
    rows: torch.Tensor | None
    grids: list[Grid]
    tokens: int

    def each(self) -> Iterator[tuple[Grid, torch.Tensor]]:
        """The grid and the rows of every item; where there are rows."""
        assert self.rows is not None
        start = 0
        for grid in self.grids:
            stop = start + math.prod(grid)
            yield grid, self.rows[start:stop]
            start = stop


def digest(grid: Grid, rows: torch.Tensor) -> bytes:
    """What tells an item from others: SHA-256 of its grid and of its patches, whose dtype and width count, too."""
    content = hashlib.sha256(f"{grid} {rows.dtype} {tuple(rows.shape)}".encode())
    content.update(rows.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return content.digest()


@dataclass(frozen=True, eq=False)
class Call:
    """What one call of the model was given, checked.

    Attributes:
        ids: ``(B, L)`` input ids, on the host.
        mask: ``(B, L)`` bool on the host, False at padding; None where there is none.
        packed: ``(T,)`` ids without padding, on the host.
        kept: ``(T,)`` their places in the flat ``(B * L,)``, on the host; None where nothing is padding.
        counts: tokens of each sequence.
        media: images and videos, those of them that there are.
        position_ids: ``(3, B, L)`` as given, or None.
        features: as given, or None.
    """

    ids: torch.Tensor
    mask: torch.Tensor | None
    packed: torch.Tensor
    kept: torch.Tensor | None
    counts: list[int]
    media: tuple[Patches, ...]
    position_ids: torch.Tensor | None
    features: Features | None

    def grid_thw(self, kind: str) -> torch.Tensor | None:
        """``(items, 3)`` int64 on the host, None where there is no item of that kind."""
        return next((torch.tensor(one.grids) for one in self.media if one.kind == kind), None)


def check_call(
    config: Qwen2VLConfig,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    pixel_values: torch.Tensor | None = None,
    image_grid_thw: torch.Tensor | None = None,
    pixel_values_videos: torch.Tensor | None = None,
    video_grid_thw: torch.Tensor | None = None,
    *,
    position_ids: torch.Tensor | None = None,
    mm_token_type_ids: torch.Tensor | None = None,
    features: Features | None = None,
) -> Call:
    """Check the arguments of a call of the model, which are described there. Raises :class:`PromptError`."""
    if input_ids.ndim != 2 or input_ids.dtype not in _INTEGERS or not input_ids.numel():
        raise PromptError(
            f"input_ids must be integers of shape (B, L), not empty, got {input_ids.dtype} {tuple(input_ids.shape)}"
        )
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise PromptError(
            f"attention_mask must have input_ids' shape {tuple(input_ids.shape)}, got {tuple(attention_mask.shape)}"
        )
    if position_ids is not None and tuple(position_ids.shape) != (3, *input_ids.shape):
        raise PromptError(f"position_ids must have shape {(3, *input_ids.shape)}, got {tuple(position_ids.shape)}")
    given = (pixel_values, image_grid_thw, pixel_values_videos, video_grid_thw)
    media = check_media(config.vision, *given, encoded=features is not None)
    ids, mask = input_ids.cpu(), None if attention_mask is None else attention_mask.cpu().bool()
    smallest, largest = (int(end) for end in ids.aminmax())
    if smallest < 0 or largest >= config.text.vocab_size:
        wrong = smallest if smallest < 0 else largest
        raise PromptError(f"input_ids must be in [0, {config.text.vocab_size}), got {wrong}")
    if mask is None:
        packed, kept, counts = ids.flatten(), None, [ids.shape[1]] * ids.shape[0]
    else:
        kept, counts = mask.flatten().nonzero().squeeze(1), mask.sum(1).tolist()
        packed = ids.flatten()[kept]
        if min(counts) == 0:
            raise PromptError(f"attention_mask: every sequence needs at least one token, got lengths {counts}")
    places = placeholders(config, packed)
    for (kind, _, _), of_kind in zip(_KINDS, places, strict=True):
        one = next((one for one in media if one.kind == kind), None)
        # Features say how many tokens there are, and where positions are given, too, nobody needs the grids.
        if one is not None or features is None or position_ids is None:
            check_placeholders(kind, of_kind, counts, one, config.vision.spatial_merge_size)
    if features is not None:
        check_features(config, features, [int(of_kind.sum()) for of_kind in places])
    return Call(ids, mask, packed, kept, counts, media, position_ids, features)


def placeholders(config: Qwen2VLConfig, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where ``ids`` are placeholders of images and where of videos, bool of their shape."""
    return ids == config.image_token_id, ids == config.video_token_id


def check_media(
    config: VisionConfig,
    pixel_values: torch.Tensor | None,
    image_grid_thw: torch.Tensor | None,
    pixel_values_videos: torch.Tensor | None,
    video_grid_thw: torch.Tensor | None,
    *,
    encoded: bool = False,
) -> tuple[Patches, ...]:
    """The kinds of media that have an item; with ``encoded`` patches are not looked at, and their grids stand alone."""
    found: list[Patches] = []
    tensors: Any = ((pixel_values, image_grid_thw), (pixel_values_videos, video_grid_thw))
    for (kind, name, grid_name), (rows, grid) in zip(_KINDS, tensors, strict=True):
        if encoded:
            rows = None
        elif (rows is None) != (grid is None):
            raise PromptError(f"{name} and {grid_name} must be given together")
        if grid is None:
            continue
        if grid.ndim != 2 or grid.shape[1] != 3 or grid.dtype not in _INTEGERS:
            raise PromptError(f"{grid_name} must be integers of shape (n, 3), got {grid.dtype} {tuple(grid.shape)}")
        if rows is not None and rows.shape[0] and not grid.shape[0]:
            raise PromptError(f"{name} has {rows.shape[0]} rows, but {grid_name} has no item")
        if grid.shape[0]:
            found.append(check_patches(config, rows, grid, kind, name, grid_name))
    return tuple(found)


def check_patches(
    config: VisionConfig,
    rows: torch.Tensor | None,
    grid_thw: torch.Tensor,
    kind: str = "image",
    name: str = "pixel_values",
    grid_name: str = "grid_thw",
) -> Patches:
    """The patches of one kind against their grids. Raises :class:`PromptError` naming what does not fit."""
    if grid_thw.ndim != 2 or grid_thw.shape[1] != 3 or grid_thw.shape[0] == 0:
        raise PromptError(f"{grid_name} must have shape (items, 3) with items >= 1, got {tuple(grid_thw.shape)}")
    grids = [(t, h, w) for t, h, w in grid_thw.tolist()]
    merge = config.spatial_merge_size
    for n, grid in enumerate(grids):
        if min(grid) < 1 or grid[1] % merge or grid[2] % merge:
            raise PromptError(
                f"{grid_name}[{n}] must hold positive numbers, height and width divisible by {merge}, got {grid}"
            )
    patches, values = sum(t * h * w for t, h, w in grids), config.patch_values
    if rows is not None and tuple(rows.shape) != (patches, values):
        still = values // config.temporal_patch_size
        one_frame = tuple(rows.shape) == (patches, still) and rows.dtype == torch.uint8
        if not one_frame or any(t != 1 for t, _, _ in grids):
            raise PromptError(
                f"{name} must have shape {(patches, values)} for these grids, or {(patches, still)} as uint8 "
                f"pixels of still images, got {tuple(rows.shape)} {rows.dtype}"
            )
    return Patches(kind, rows, grids, patches // merge**2)


def check_placeholders(
    kind: str, places: torch.Tensor, counts: Sequence[int], media: Patches | None, merge_size: int
) -> None:
    """Check that every item has its run of ``t * h * w / merge_size**2`` placeholders, in order over the whole batch.

    Truncating ids inside an image or video, or dropping one of a batch, is what this finds.

    Args:
        kind: "image" or "video".
        places: ``(T,)`` bool, where the packed ids are placeholders of that kind.
        counts: tokens of each sequence; a run ends where its sequence does.
        media: the items of that kind, or None for none.

    Raises:
        PromptError: naming the first item that does not fit.
    """
    grids = [] if media is None else media.grids
    runs = _run_lengths(places, counts)
    if len(runs) != len(grids):
        tokens = 0 if media is None else media.tokens
        raise PromptError(
            f"{kind}_grid_thw: wants {len(runs)}, one for each run of placeholders, got {len(grids)}; "
            f"input_ids has {sum(runs)} {kind} placeholders, the {kind}s given make {tokens} tokens"
        )
    for n, ((t, h, w), length) in enumerate(zip(grids, runs, strict=True)):
        if t * h * w != length * merge_size**2:
            raise PromptError(
                f"{kind}_grid_thw[{n}]: ({t}, {h}, {w}) merged {merge_size} x {merge_size} does not give "
                f"the {length} placeholders that input_ids has for it"
            )


def check_features(config: Qwen2VLConfig, features: Features, tokens: Sequence[int]) -> None:
    """Check features of images and of videos against the numbers of their placeholders. Raises PromptError."""
    if len(features) != 2:
        raise PromptError(f"features must be a pair, those of images and those of videos, got {len(features)}")
    width = config.text.hidden_size
    for (kind, _, _), rows, count in zip(_KINDS, features, tokens, strict=True):
        if rows is not None and (rows.ndim != 2 or rows.shape[1] != width or not rows.is_floating_point()):
            raise PromptError(
                f"features of {kind}s must be floats of shape ({count}, {width}), got {rows.dtype} {tuple(rows.shape)}"
            )
        if (have := 0 if rows is None else rows.shape[0]) != count:
            raise PromptError(f"input_ids has {count} {kind} placeholders, the {kind}s given make {have} tokens")


def _run_lengths(places: torch.Tensor, counts: Sequence[int]) -> list[int]:
    """Lengths of the runs of True in ``(T,)``, none of which reaches over the bounds of sequences."""
    first = torch.zeros_like(places)
    first[torch.tensor([0, *counts[:-1]]).cumsum(0)] = True
    before = places.roll(1) & ~first
    starts = (places & ~before).nonzero().squeeze(1)
    after = places.roll(-1) & ~first.roll(-1)
    ends = (places & ~after).nonzero().squeeze(1)
    return (ends - starts + 1).tolist()
