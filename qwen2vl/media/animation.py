"""Animated WebP and TIFF files of several pages as videos: what FFmpeg does not read, by Pillow, a frame at a time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from PIL import Image

from qwen2vl.errors import MediaError
from qwen2vl.media.decoding import Timeline
from qwen2vl.media.image import decode_image


class Animation:
    """The frames of an open picture file.

    Args:
        image: with more than one frame.
        label: its name in messages.
    """

    def __init__(self, image: Image.Image, label: str):
        self._image, self._label = image, label
        self._count: int = getattr(image, "n_frames", 1)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> np.ndarray:
        """Frame ``index`` as (H, W, 3) uint8. Raises MediaError."""
        try:
            self._image.seek(index)
        except Exception as error:  # decoders meet hostile bytes with many types of error
            raise MediaError(f"frame {index} of {self._label} is damaged: {error}") from error
        return decode_image(self._image, f"frame {index} of {self._label}")

    def timeline(self) -> Timeline:
        """When each frame is shown, in milliseconds; a frame without a duration has one of a millisecond."""
        durations = []
        for index in range(self._count):
            self[index]
            durations.append(max(1, round(self._image.info.get("duration", 0))))
        return Timeline(np.cumsum([0, *durations[:-1]]), 0, 1e-3, 1000 * self._count / sum(durations), numbered=False)

    def kept_frames(self, wanted: np.ndarray) -> Iterator[tuple[range, np.ndarray, float]]:
        """What ``qwen2vl.media.decoding.kept_frames`` yields; ``wanted`` are ticks of ``timeline``."""
        timeline = self.timeline()
        for tick in np.unique(wanted):
            first, end = np.searchsorted(wanted, [tick, tick + 1])
            index = int(np.searchsorted(timeline.ticks, tick))
            yield range(first, end), self[index], float(timeline.seconds(tick))
