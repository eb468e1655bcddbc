"""Features of pictures and videos that come again, as in every turn of a conversation: kept, and not computed twice.

    model.kept_features = KeptFeatures()    # from now on, for every call of this model that needs no gradients

An item is told by a hash of its patches and its grid. What was encoded under other weights, backends or dtypes is let
go. An item's features are those of the tower as it was encoded first: the products of a library may sum in another
order beside other items.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple

import torch

from .checks import Grid, Patches, digest
from .graphs import setting_of, unfit_for_keeping, versions_of

if TYPE_CHECKING:
    from .model import Qwen2VL

#: Bytes that features take by default: 64 pictures of 1,280 tokens of the 2B's.
MAX_BYTES = 256 << 20


class _Item(NamedTuple):
    """One image or video of a call; ``key`` tells it from every other."""

    key: bytes
    kind: str
    rows: torch.Tensor
    grid: Grid
    tokens: int


class KeptFeatures:
    """Features of the items encoded last, on the model's device.

    Args:
        max_bytes: of all features together; those used longest ago make room.

    A copy, and what is unpickled, begins empty. Raises ``ValueError`` for a negative ``max_bytes``.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        if not isinstance(max_bytes, int) or isinstance(max_bytes, bool) or max_bytes < 0:
            raise ValueError(f"KeptFeatures: max_bytes must be a non-negative int, got {max_bytes!r}")
        self.max_bytes = max_bytes
        self._kept: OrderedDict[bytes, torch.Tensor] = OrderedDict()
        self._state: tuple = ()
        self._lock = Lock()

    def __reduce__(self) -> tuple:
        return KeptFeatures, (self.max_bytes,)

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def bytes(self) -> int:
        """Of the features that are kept now."""
        return sum(features.nbytes for features in list(self._kept.values()))

    def clear(self) -> None:
        """Let go of all; for weights that were written to by a way that PyTorch does not count, as ``.data``."""
        with self._lock:
            self._kept.clear()

    def encode(
        self, model: Qwen2VL, media: Sequence[Patches], encode: Callable[[Sequence[Patches]], torch.Tensor]
    ) -> torch.Tensor:
        """``encode(media)``, where only those items are encoded that are not kept.

        All are, and none is kept, where gradients are wanted, for patches on a GPU, which the host would have to wait
        for, and for a model with an adapter or hooks, which may change without notice, or split over processes.
        """
        merge_size, state = model.config.vision.spatial_merge_size, _state(model, media)
        if state is None:
            return encode(media)
        items = list(_items(media, merge_size))
        with self._lock:
            if state != self._state:
                self._kept.clear()
                self._state = state
            found = {item.key: self._kept[item.key] for item in items if item.key in self._kept}
        missing = {item.key: item for item in items if item.key not in found}
        if missing:
            tokens = encode(_patches(list(missing.values())))
            parts = tokens.split([item.tokens for item in missing.values()])
            found |= {key: part.clone() for key, part in zip(missing, parts, strict=True)}
        with self._lock:
            if state == self._state:
                self._keep(found)
        return torch.cat([found[item.key] for item in items])  # a copy, whatever its owner does with it

    def _keep(self, found: dict[bytes, torch.Tensor]) -> None:
        for key, features in found.items():
            if features.nbytes <= self.max_bytes:  # else all others would make room in vain
                self._kept[key] = features
                self._kept.move_to_end(key)
        while self.bytes > self.max_bytes:
            self._kept.popitem(last=False)


def _state(model: Qwen2VL, media: Sequence[Patches]) -> tuple | None:
    """What features depend on beside their item; None where that cannot be told, or costs more than it saves."""
    parameters = list(model.visual.parameters())
    given = [one.rows for one in media]
    if model.parallel is not None:  # all ranks would have to keep the same
        return None
    if torch.compiler.is_compiling() or not all(rows is not None and rows.device.type == "cpu" for rows in given):
        return None
    tracked = torch.is_grad_enabled() and any(one.requires_grad for one in [*parameters, *given] if one is not None)
    if tracked or unfit_for_keeping(model, model.visual) or any(one.is_inference() for one in parameters):
        return None
    return versions_of(model.visual), setting_of(model.device)[1:]


def _items(media: Sequence[Patches], merge_size: int) -> Iterator[_Item]:
    for one in media:
        for grid, rows in one.each():
            yield _Item(digest(grid, rows), one.kind, rows, grid, len(rows) // merge_size**2)


def _patches(items: list[_Item]) -> list[Patches]:
    """Items in their order, those neighbours together whose rows are alike."""
    made: list[list[_Item]] = []
    for item in items:
        alike = made and (made[-1][0].rows.dtype, made[-1][0].rows.shape[1]) == (item.rows.dtype, item.rows.shape[1])
        if alike:
            made[-1].append(item)
        else:
            made.append([item])
    return [
        Patches(
            run[0].kind, torch.cat([item.rows for item in run]), [item.grid for item in run], sum(i.tokens for i in run)
        )
        for run in made
    ]
