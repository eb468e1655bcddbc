"""What a processor makes: the arguments of one call of the model, and what became of each image and video."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch


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

    def to(self, device: torch.device | str) -> "Inputs":
        """A copy whose tensors are on `device`."""
        return Inputs({name: tensor.to(device) for name, tensor in self.items()}, self.media)
