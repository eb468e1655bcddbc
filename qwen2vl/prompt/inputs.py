"""What a processor gives: the model's tensors, and what became of each image and video."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from ..media.image import ImagePatches
from ..media.video import VideoPatches
from .messages import Media

IGNORED = -100  # the label of what is not taught, cross_entropy's default


@dataclass(frozen=True)
class MediaInfo:
    """What became of one image or video; sizes are (height, width) in pixels, times in seconds."""

    kind: Literal["image", "video"]
    where: str
    source_size: tuple[int, int]
    resized_size: tuple[int, int]
    grid_thw: tuple[int, int, int]
    num_tokens: int
    duration: float | None = None
    native_fps: float | None = None
    frame_times: tuple[float, ...] = ()


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

    def to(self, device: torch.device | str) -> "Inputs":
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


def describe_media(item: Media, patches: ImagePatches | VideoPatches) -> MediaInfo:
    """What is told about an item that has been read."""
    info = MediaInfo(
        item.kind, item.where, patches.source_size, patches.resized_size, patches.grid_thw, patches.num_tokens
    )
    if isinstance(patches, ImagePatches):
        return info
    times = tuple(float(time) for time in patches.frame_times)
    return replace(info, duration=patches.duration, native_fps=patches.native_fps, frame_times=times)
