"""What a processor makes of conversations: the tensors of one call of the model, and what became of the media."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

_MEDIA_KEYS = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")


@dataclass(frozen=True)
class MediaInfo:
    """What became of one image or video; sizes are (height, width) in pixels, times in seconds, and `row` is its
    conversation's place in the batch."""

    kind: Literal["image", "video"]
    where: str
    source_size: tuple[int, int]
    resized_size: tuple[int, int]
    grid_thw: tuple[int, int, int]
    num_tokens: int
    duration: float | None = None
    native_fps: float | None = None
    frame_times: tuple[float, ...] = ()
    row: int = 0


class Inputs(dict[str, torch.Tensor]):
    """The keyword arguments of one call of the model.

    Keys: `input_ids` and `attention_mask` (B, L) int64; where there are images `pixel_values` (patches, 588) uint8, one
    of their two equal frames, and `image_grid_thw` (images, 3) int64; where there are videos `pixel_values_videos`
    (patches, 1176) uint8 and `video_grid_thw` likewise. Images are concatenated in order of appearance over the whole
    batch; videos are too, apart from them. `Processor.supervised` adds `labels` (B, L) int64.

    Attributes:
        media: one `MediaInfo` per image or video, in order of appearance.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], media: Iterable[MediaInfo] = ()):
        super().__init__(tensors)
        self.media = list(media)

    def to(self, device: torch.device | str) -> Inputs:
        """A copy whose tensors are on `device`."""
        return Inputs({name: tensor.to(device) for name, tensor in self.items()}, self.media)


def pad_rows(rows: Sequence[Sequence[int]], value: int, side: str) -> torch.Tensor:
    """(B, L) int64, shorter rows filled with `value` on that side."""
    length = max(map(len, rows))
    padded = torch.full((len(rows), length), value, dtype=torch.int64)
    for n, row in enumerate(rows):
        place = slice(length - len(row), length) if side == "left" else slice(0, len(row))
        padded[n, place] = torch.tensor(row, dtype=torch.int64)
    return padded


def joined(inputs: Sequence[Inputs], pad_id: int, side: str) -> Inputs:
    """Inputs without padding and without labels as one batch."""
    rows = [row for one in inputs for row in one["input_ids"].tolist()]
    tensors = {
        "input_ids": pad_rows(rows, pad_id, side),
        "attention_mask": pad_rows([[1] * len(row) for row in rows], 0, side),
    }
    for name in _MEDIA_KEYS:
        if parts := [one[name] for one in inputs if name in one]:
            tensors[name] = torch.cat(parts) if len(parts) > 1 else parts[0]
    media, row = [], 0
    for one in inputs:
        media += [replace(item, row=row + item.row) for item in one.media]
        row += len(one["input_ids"])
    return Inputs(tensors, media)
