"""Animated WebP and TIFF files of several pages as videos: what FFmpeg does not read, by Pillow, a frame at a time."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import numpy as np
from PIL import Image

from qwen2vl.errors import MediaError
from qwen2vl.media.decoding import KeptFrame, Timeline
from qwen2vl.media.effort import PIXEL_BUDGET
from qwen2vl.media.image import check_source_size, decode_image, without_warnings
from qwen2vl.media.options import Limits
from qwen2vl.media.strictness import strict_pillow


class Animation:
    """The frames of an open picture file.

    Args:
        image: with more than one frame.
        label: its name in messages.
        limits: what it may cost; the time is looked at between two frames.

    Raises:
        MediaError: it is a TIFF of more pages than frames may be kept.
    """

    def __init__(self, image: Image.Image, label: str, limits: Limits):
        self._image, self._label, self._limits = image, label, limits
        self._timeout = limits.video_timeout
        self._deadline = math.inf if self._timeout is None else time.monotonic() + self._timeout
        self._count: int = self._count_pages() if image.format == "TIFF" else getattr(image, "n_frames", 1)

    def _count_pages(self) -> int:
        """The pages of a TIFF, which says nowhere how many they are: each names the next one."""
        for index in range(self._limits.max_item_frames + 1):
            self._check_time()
            try:
                with without_warnings(), strict_pillow():
                    self._image.seek(index)
            except EOFError:
                return index
            except Exception as error:
                raise MediaError(f"frame {index} of {self._label} is damaged: {error}") from error
        raise MediaError(
            f"{self._label} has more pages than max_item_frames = {self._limits.max_item_frames}; "
            "raise limits.max_item_frames"
        )

    def _check_time(self) -> None:
        if time.monotonic() > self._deadline:
            raise MediaError(
                f"{self._label} was not decoded within video_timeout = {self._timeout:g} s; raise limits.video_timeout"
            )

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> np.ndarray:
        """Frame ``index`` as (H, W, 3) uint8.

        Raises:
            MediaError: it is damaged or too large, or the time is up.
        """
        self._check_time()
        label = f"frame {index} of {self._label}"
        try:
            with without_warnings(), strict_pillow():  # seeking reads what stands before the frame
                self._image.seek(index)
        except Exception as error:  # decoders meet hostile bytes with many types of error
            raise MediaError(f"{label} is damaged: {error}") from error
        check_source_size(self._image, label, self._limits)  # pages may have a size each
        with PIXEL_BUDGET.hold(self._image.width * self._image.height, self._limits.max_source_pixels):
            return decode_image(self._image, label, self._limits)

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
