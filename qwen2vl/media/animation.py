"""Animated WebP and TIFF files of several pages as videos: what FFmpeg does not read, by Pillow, a frame at a time."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import numpy as np
from PIL import Image

from qwen2vl.errors import MediaError
from qwen2vl.media.decoding import KeptFrame, Timeline
from qwen2vl.media.image import check_source_size, decode_image
from qwen2vl.media.strictness import strict_pillow


class Animation:
    """The frames of an open picture file.

    Args:
        image: with more than one frame.
        label: its name in messages.
        timeout: seconds for all of its frames, looked at between two of them; ``None`` for no limit.
    """

    def __init__(self, image: Image.Image, label: str, timeout: float | None = None):
        self._image, self._label, self._timeout = image, label, timeout
        self._deadline = math.inf if timeout is None else time.monotonic() + timeout
        self._count: int = getattr(image, "n_frames", 1)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> np.ndarray:
        """Frame ``index`` as (H, W, 3) uint8.

        Raises:
            MediaError: it is damaged or too large, or the time is up.
        """
        if time.monotonic() > self._deadline:
            raise MediaError(f"{self._label} was not decoded within timeout = {self._timeout:g} s")
        label = f"frame {index} of {self._label}"
        try:
            with strict_pillow():  # seeking reads what stands before the frame
                self._image.seek(index)
        except Exception as error:  # decoders meet hostile bytes with many types of error
            raise MediaError(f"{label} is damaged: {error}") from error
        check_source_size(self._image, label)  # pages may have a size each
        return decode_image(self._image, label)

    def timeline(self) -> Timeline:
        """When each frame is shown, in milliseconds; a frame without a duration has one of a millisecond."""
        durations = []
        for index in range(self._count):
            self[index]
            durations.append(max(1, round(self._image.info.get("duration", 0))))
        return Timeline(np.cumsum([0, *durations[:-1]]), 0, 1e-3, 1000 * self._count / sum(durations), numbered=False)

    def kept_frames(self, wanted: np.ndarray) -> Iterator[KeptFrame]:
        """What ``qwen2vl.media.decoding.kept_frames`` yields; ``wanted`` are ticks of ``timeline``."""
        timeline = self.timeline()
        for tick in np.unique(wanted):
            first, end = np.searchsorted(wanted, [tick, tick + 1])
            index = int(np.searchsorted(timeline.ticks, tick))
            yield KeptFrame(range(first, end), self[index], float(timeline.seconds(tick)))
