"""What decoding a picture will cost, known before it is decoded, and what the pictures of a process share.

A file's size says little: a JPEG may come back to every pixel in each of thousands of scans, and a TIFF may name the
same tile a million times. Both are counted here from headers and marks, without a pixel being decoded.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections import deque
from collections.abc import Iterator
from typing import Any, BinaryIO

from PIL import Image

from qwen2vl.errors import MediaError

_LEAST = 4096  # pixels that a scan or a tile counts as at least: going to it costs time of its own
_SLOW = 64  # times a decoder of Pillow's that is written in Python takes what one in C takes
_MAX_SEGMENTS = 65_536  # of a JPEG; photos have some dozens
_CHUNK_BYTES = 1 << 20
# Fill bytes are taken in; a zero stands for a byte of data, and restart marks and 01 have no length.
_MARK = re.compile(rb"\xff+([^\x00\x01\xd0-\xd7\xff])")
_SCAN, _END = b"\xda", b"\xd9"
_PROGRESSIVE = b"\xff\xc2"  # begins the header of a JPEG with scans of parts of the bits, which are as many as it likes
_TIFF_SCANS = 100  # of each JPEG inside of a TIFF, after which libtiff gives up


def check_effort(image: Image.Image, label: str, most: int) -> None:
    """Refuse an open file whose decoding would write more than ``most`` pixels, repetitions counted.

    Raises:
        MediaError: it would; or a JPEG has more than 65,536 segments.
    """
    tiles: Any = getattr(image, "tile", None)
    file: Any = getattr(image, "fp", None)
    if not tiles or file is None:  # decoded already, or by a decoder that has no tiles and goes over its pixels once
        return
    areas = [(right - left) * (bottom - top) for left, top, right, bottom in (tile[1] for tile in tiles)]
    pixels, what = sum(max(_LEAST, area) for area in areas), f"{len(areas)} tiles"
    position = file.tell()
    if image.format in ("JPEG", "MPO"):
        scans = count_scans(file, label, most // max(_LEAST, pixels))
        pixels, what = pixels * scans, f"{scans} scans or more"
    elif image.format == "TIFF" and "jpeg" in str(image.info.get("compression")) and _holds(file, _PROGRESSIVE):
        pixels, what = pixels * _TIFF_SCANS, f"up to {_TIFF_SCANS} scans"
    elif any(tile[0] in Image.DECODERS for tile in tiles):
        size = file.seek(0, os.SEEK_END)
        pixels, what = _SLOW * max(pixels, size), f"{size} bytes in a form that decodes slowly"
    file.seek(position)
    if pixels > most:
        raise MediaError(
            f"{label} has {what} of {image.width} x {image.height} pixels, together {pixels} to decode, "
            f"more than max_decoded_pixels = {most}: refused before decoding"
        )


def _holds(file: BinaryIO, mark: bytes) -> bool:
    """Whether the two bytes of a mark stand anywhere in a file."""
    file.seek(0)
    last = b""
    while chunk := file.read(_CHUNK_BYTES):
        if mark in last + chunk:
            return True
        last = chunk[-1:]
    return False


def count_scans(file: BinaryIO, label: str, most: int) -> int:
    """The scans of a JPEG file up to its end mark, or ``most`` + 1 where there are more. At least 1.

    Raises:
        MediaError: it has more than 65,536 segments.
    """
    scans, position, begin, window = 0, 2, 0, b""
    for _ in range(_MAX_SEGMENTS):
        found = None
        while found is None:
            found = _MARK.search(window, position - begin) if begin <= position < begin + len(window) else None
            if found is None:
                # The last byte may be the first of a mark.
                position = max(position, begin + len(window) - 1)
                file.seek(begin := position)
                window = file.read(_CHUNK_BYTES)
                if len(window) < 2:
                    return max(1, scans)
        if found[1] == _END:
            break
        scans += found[1] == _SCAN
        if scans > most:
            break
        position = begin + found.end()
        file.seek(position)
        position += max(2, int.from_bytes(file.read(2), "big"))
    else:
        raise MediaError(f"{label} has more than {_MAX_SEGMENTS} segments, as no photo has")
    return max(1, scans)


class PixelBudget:
    """Pixels that may be held at one time by all threads: who would go beyond waits, in the order of coming.

    A picture that is larger than the budget is let in when it is alone.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[object] = deque()
        self._held = 0

    @contextlib.contextmanager
    def hold(self, pixels: int, most: int) -> Iterator[None]:
        """A block that holds ``pixels``, begun when with those of others they are no more than ``most``."""
        me = object()
        with self._changed:
            self._waiting.append(me)
            try:
                self._changed.wait_for(
                    lambda: self._waiting[0] is me and (not self._held or self._held + pixels <= most)
                )
                self._held += pixels
            finally:  # whoever is interrupted while waiting leaves the queue, too
                self._waiting.remove(me)
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._held -= pixels
                self._changed.notify_all()


PIXEL_BUDGET = PixelBudget()
if hasattr(os, "register_at_fork"):  # threads that held pixels are not there in a child
    os.register_at_fork(after_in_child=PIXEL_BUDGET.__init__)
