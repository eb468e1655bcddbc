"""Pillow before 13, made to resize in the order of 13: it is ours, and transformers, the oracle, calls Pillow."""

from __future__ import annotations

from PIL import Image


def repair() -> None:
    """Replace ``Image.resize``; harmless with Pillow 13. Pillow before it always resizes columns first."""
    resize = Image.Image.resize

    def in_order(self, size, resample=None, box=None, reducing_gap=None):
        down = self.height - size[1]
        rows_first = down > 0 and down > 2 * (self.width - size[0])
        if resample != Image.Resampling.BICUBIC or box is not None or self.mode in ("LA", "RGBA") or not rows_first:
            return resize(self, size, resample, box, reducing_gap)  # alpha comes back here, multiplied in
        return resize(resize(self, (self.width, size[1]), resample), size, resample)

    Image.Image.resize = in_order
