"""Where the patches of frames are put, in the order in which the model reads them."""

from __future__ import annotations

import numpy as np
import torch

from qwen2vl.errors import MediaError
from qwen2vl.media.options import RELEASED_SHAPE, PatchShape, check_positive_int
from qwen2vl_kernels import image_to_patches

MAX_PATCH_BYTES = 4 << 30  # of one image or video; whoever asks for more made a slip or attacks


def check_patch_bytes(frames: int, height: int, width: int, size: int) -> None:
    """Raise MediaError where the patches of frames of that size in pixels would have more than MAX_PATCH_BYTES."""
    if size > MAX_PATCH_BYTES:
        raise MediaError(
            f"{frames} frames of {height} x {width} pixels make patches of {size} bytes, more than {MAX_PATCH_BYTES}; "
            "lower min_pixels, max_pixels or the size asked for"
        )


class PatchBuffer:
    """The uint8 patches of a clip, filled frame by frame, so that no frame needs to be kept.

    Rows run over (time step, block row, block column, row in block, column in block), each row over (channel,
    frame in step, patch row, patch column). Where the number of frames is no multiple of
    ``temporal_patch_size``, the last one is repeated.

    Args:
        num_frames: frames that will be put.
        height, width: what every frame is resized to, in pixels, multiples of ``shape.factor``.
        shape: of the patches.
    """

    def __init__(self, num_frames: int, height: int, width: int, shape: PatchShape = RELEASED_SHAPE):
        self.num_frames = check_positive_int("num_frames", num_frames)
        if height % shape.factor or width % shape.factor or height < 1 or width < 1:
            raise MediaError(f"frames must have sides that are multiples of {shape.factor}, got {height} x {width}")
        self.height, self.width, self.shape = height, width, shape
        steps, area = -(-num_frames // shape.temporal_patch_size), shape.patch_size**2
        self.grid_thw = (steps, height // shape.patch_size, width // shape.patch_size)
        check_patch_bytes(num_frames, height, width, steps * height * width * 3 * shape.temporal_patch_size)
        # (time step, patch, channel, frame in step, pixel)
        self._rows = torch.empty(
            (steps, height * width // area, 3, shape.temporal_patch_size, area), dtype=torch.uint8, device="cpu"
        )

    def put(self, index: int, frame: np.ndarray) -> None:
        """Resize frame ``index``, (H, W, 3) or (H, W, 4) uint8 of any size, and write its patches to their place."""
        step, slot = divmod(index, self._rows.shape[3])
        image_to_patches(
            _with_contiguous_pixels(frame),
            self.height,
            self.width,
            patch_size=self.shape.patch_size,
            merge_size=self.shape.merge_size,
            out=self._rows[step, :, :, slot],
        )
        if index == self.num_frames - 1:
            self._rows[step, :, :, slot + 1 :] = self._rows[step, :, :, slot : slot + 1]

    @property
    def patches(self) -> np.ndarray:
        """(t * gh * gw, 3 * temporal_patch_size * patch_size**2) uint8, a view of the buffer."""
        return self._rows.flatten(0, 1).flatten(1).numpy()


def _with_contiguous_pixels(array: np.ndarray) -> np.ndarray:
    """The array, copied only where its pixels do not lie side by side, as in a mirrored or rotated picture.

    Its rows may lie anywhere.
    """
    return array if array.strides[1:] == (array.shape[2], 1) else np.ascontiguousarray(array)
