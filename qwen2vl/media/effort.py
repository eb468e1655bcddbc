"""What decoding a picture will cost, known before it is decoded, and what the pictures of a process share.

A file's size says little: a JPEG may come back to every pixel in each of thousands of scans, and a TIFF may name the
same tile a million times. Both are counted here from headers and marks, without a pixel being decoded.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import struct
import threading
from collections import deque
from collections.abc import Iterator
from typing import Any, BinaryIO

from PIL import Image

from qwen2vl.errors import MediaError
from qwen2vl.media.options import Limits

_LEAST = 4096  # pixels that a scan or a tile counts as at least: going to it costs time of its own
_SLOW = 64  # times a decoder of Pillow's that is written in Python takes what one in C takes
_MAX_SEGMENTS = 65_536  # of a JPEG; photos have some dozens
_CHUNK_BYTES = 1 << 20
# Fill bytes are taken in; a zero stands for a byte of data, and restart marks and 01 have no length.
_MARK = re.compile(rb"\xff+([^\x00\x01\xd0-\xd7\xff])")
_SCAN, _END = b"\xda", b"\xd9"
# The marks of frames whose scans hold whole numbers, and of those whose scans hold parts of them.
_FRAMES = (b"\xc0", b"\xc1", b"\xc3", b"\xc9", b"\xcb")
_PROGRESSIVE_FRAMES = (b"\xc2", b"\xc5", b"\xc6", b"\xc7", b"\xca", b"\xcd", b"\xce", b"\xcf")
_PROGRESSIVE = b"\xff\xc2"  # begins the header of a JPEG with scans of parts of the bits, which are as many as it likes
_TIFF = (b"II*\0", b"MM\0*", b"II\0*", b"MM*\0", b"II+\0", b"MM\0+")  # all that Pillow takes for one
_PPM = (b"P0", b"P1", b"P2", b"P3", b"P4", b"P5", b"P6", b"Pf", b"Py")
_PLAIN_PPM = (b"P1", b"P2", b"P3")  # numbers are written out
_MAX_HEADER = 1 << 16  # of a PPM: four numbers, and comments
_MAX_COMMENTS = 4096  # of a PPM whose numbers are written out
_COMMENT = re.compile(rb"#[^\r\n]*")
_MAX_TAGS = 1 << 18  # of all pages of a TIFF, which have some twenty each
_PLAIN_KINDS = (1, 2, 7)  # bytes and text, which are kept as they are
_SUBDIRECTORIES = (0x8769, 0x8825, 0xA005)  # of EXIF, GPS and interoperability
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
        scans = 1 if _has_one_scan(file, label) else count_scans(file, label, most // max(_LEAST, pixels))
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
            f"more than max_decoded_pixels = {most}: refused before decoding; raise limits.max_decoded_pixels"
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
    scans = 0
    for mark, _ in _segments(file, label):
        scans += mark == _SCAN
        if scans > most:
            break
    return max(1, scans)


def _has_one_scan(file: BinaryIO, label: str) -> bool:
    """Whether a JPEG's header says that its first scan holds all: it is not progressive, and that scan has all
    components. Decoders then look for no other, and none is counted, which takes a fifth of a small photo's time."""
    components = b""
    for mark, place in _segments(file, label):
        if mark in _FRAMES:
            file.seek(place + 7)  # behind the length, the precision and the sides
            components = file.read(1)
        elif mark in _PROGRESSIVE_FRAMES:
            return False
        elif mark == _SCAN:
            file.seek(place + 2)  # behind the length
            return components == file.read(1) != b""
    return False


def _segments(file: BinaryIO, label: str) -> Iterator[tuple[bytes, int]]:
    """The marks of a JPEG up to its end mark, without it, and where what follows each begins."""
    position, begin, window = 2, 0, b""
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
                    return
        if found[1] == _END:
            return
        position = begin + found.end()
        yield found[1], position
        file.seek(position)
        position += max(2, int.from_bytes(file.read(2), "big"))
    raise MediaError(f"{label} has more than {_MAX_SEGMENTS} segments, as no photo has")


def check_structure(file: BinaryIO, label: str, limits: Limits) -> None:
    """Refuse a file whose parts are so many that Pillow, which reads each in Python, takes a second for a megabyte, and
    a hundred bytes of memory for one of some. To be called before it is opened.

    Raises:
        MediaError: a JPEG has more than 65,536 segments, a GIF as many blocks beside its first two frames, a TIFF more
            than 262,144 tags, or one of these more values than tiles could be decoded, a PPM a header of more than
            64 KiB, or more than 4,096 comments among its numbers.
    """
    file.seek(0)
    head = file.read(16)
    if head.startswith(b"\xff\xd8"):
        count_scans(file, label, 0)  # up to the first: behind it, Pillow's parser does not go
    elif head[:4] in _TIFF:
        order, large = "<" if head[:2] == b"II" else ">", b"+" in head[:4]
        # Pillow 13 reads a large file of big-endian numbers in the form of small ones, others may not.
        for big in (False, True) if large and order == ">" else (large,):
            _check_directories(file, label, order, big, limits)
    elif head.startswith(b"GIF8"):
        _check_blocks(file, label)
    elif head[:2] in _PPM:
        _check_header(file, label, head)
    file.seek(0)


def _check_header(file: BinaryIO, label: str, head: bytes) -> None:
    """Look at the numbers in front of a PPM's pixels, which are read byte by byte, as are the comments between them."""
    file.seek(0)
    start = file.read(_MAX_HEADER + 1)
    wanted = 3 if head[:2] in (b"P1", b"P4") else 4  # the mark, the sides, and for others the brightest value
    if len(start) > _MAX_HEADER and len(_COMMENT.sub(b" ", start).split(None, wanted)) <= wanted:
        raise MediaError(f"{label} has a header of more than {_MAX_HEADER} bytes: refused before decoding")
    if head[:2] in _PLAIN_PPM:  # each comment among the numbers moves all of a block behind it
        comments = 0
        file.seek(0)
        while chunk := file.read(_CHUNK_BYTES):
            comments += chunk.count(b"#")
        if comments > _MAX_COMMENTS:
            raise MediaError(f"{label} has more than {_MAX_COMMENTS} comments: refused before decoding")


def _check_blocks(file: BinaryIO, label: str) -> None:
    """Count what stands before and between the first two frames of a GIF: extensions, their parts, stray bytes."""
    file.seek(0)
    head = file.read(13)
    if len(head) == 13 and head[10] & 0x80:
        file.seek(3 << (1 + (head[10] & 7)), os.SEEK_CUR)
    frames = blocks = 0
    while frames < 2 and (mark := file.read(1)) not in (b"", b";"):
        blocks += 1
        if mark == b",":
            frames += 1
            flags = file.read(9)[8:]
            file.seek((3 << (1 + (flags[0] & 7)) if flags and flags[0] & 0x80 else 0) + 1, os.SEEK_CUR)
            _skip_parts(file)
        elif mark == b"!":
            file.seek(1, os.SEEK_CUR)
            blocks += _skip_parts(file, _MAX_SEGMENTS)
        if blocks > _MAX_SEGMENTS:
            raise MediaError(f"{label} has more than {_MAX_SEGMENTS} blocks beside its frames: refused before decoding")


def _skip_parts(file: BinaryIO, most: float = math.inf) -> int:
    """Go behind the parts of a GIF's block, or behind ``most`` of them; returns how many they were."""
    count = 0
    while count <= most and (size := file.read(1)) not in (b"", b"\0"):
        file.seek(size[0], os.SEEK_CUR)
        count += 1
    return count


def _check_directories(file: BinaryIO, label: str, order: str, big: bool, limits: Limits) -> None:
    """Look at the tags of every page, and of the metadata beside it, without reading their values."""
    most = limits.max_decoded_pixels // _LEAST
    word = struct.Struct(order + ("Q" if big else "I"))
    length = struct.Struct(order + ("Q" if big else "H"))
    entry = struct.Struct(order + ("HHQQ" if big else "HHII"))
    end = file.seek(0, os.SEEK_END)
    file.seek(8 if big else 4)
    waiting, seen, total = [_number(file, word)], set(), 0
    while waiting and len(seen) <= 4 * limits.max_item_frames:  # more pages than that are not read
        offset = waiting.pop()
        if not offset or offset in seen or offset >= 1 << 63:
            continue
        seen.add(offset)
        file.seek(offset)
        count = _number(file, length)
        total += count
        if total > _MAX_TAGS:
            raise MediaError(f"{label} has more than {_MAX_TAGS} tags: refused before decoding")
        tags = file.read(entry.size * count)
        for tag, kind, values, value in entry.iter_unpack(tags[: len(tags) // entry.size * entry.size]):
            if kind not in _PLAIN_KINDS and most < values <= end:  # what the file cannot hold is skipped by Pillow
                raise MediaError(f"{label} has {values} values in tag {tag}, more than {most}: refused before decoding")
            if tag in _SUBDIRECTORIES:
                waiting.append(value)
        waiting.append(_number(file, word))


def _number(file: BinaryIO, form: struct.Struct) -> int:
    """The next number of a file, 0 at its end."""
    data = file.read(form.size)
    return form.unpack(data)[0] if len(data) == form.size else 0


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
