"""One training sample as the model takes it: what readers and formats make, and packing consumes."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Example:
    """A tokenised sample, its supervision and its media.

    Attributes:
        input_ids: ``(L,)`` int64, placeholders already expanded to as many ids as their media have tokens.
        labels: ``(L,)`` int64, not shifted: the id itself where the sample teaches it, -100 elsewhere.
        pixel_values, image_grid_thw: as :class:`qwen2vl.Processor` gives them, all images in order of appearance;
            ``None`` when there is none. pixel_values_videos, video_grid_thw: likewise.
        source: where it came from, ``"data.jsonl:17"``, for every message that is about it.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    pixel_values: torch.Tensor | None = None
    image_grid_thw: torch.Tensor | None = None
    pixel_values_videos: torch.Tensor | None = None
    video_grid_thw: torch.Tensor | None = None
    source: str = ""

    @property
    def tokens(self) -> int:
        return self.input_ids.shape[0]
