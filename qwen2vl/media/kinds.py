"""What a file is by its first bytes, and how long it says that it is: for telling what was mistaken or is missing."""

from __future__ import annotations

import os
import struct
from typing import BinaryIO

_PICTURES = (  # GIF is both and therefore not here
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"BM", "BMP"),
)
_VIDEOS = (
    (b"\x1a\x45\xdf\xa3", "Matroska or WebM"),
    (b"FLV\x01", "FLV"),
    (b"OggS", "Ogg"),
    (b"\0\0\x01\xba", "MPEG-PS"),
    (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "ASF"),
)
_AVIF_BRANDS = (b"avif", b"avis")  # of ISO files, as those that follow
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs")
_STILL_BRANDS = (*_AVIF_BRANDS, *_HEIF_BRANDS, b"mif1", b"msf1")  # the last two say nothing of the coding
_BOXES = b"ftyp moov mdat free skip wide moof mfra udta uuid sidx styp meta emsg prft ssix pdin".split()
_TS_PACKET = 188
_SEGMENT = b"\x18\x53\x80\x67"


def picture_format(head: bytes) -> str | None:
    """The name of the picture format that a file of these first 64 bytes is in, None for no picture and for GIF."""
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[4:8] == b"ftyp" and head[8:12] in _STILL_BRANDS:
        brands = head[8 : min(int.from_bytes(head[:4], "big"), 64)]
        return "AVIF" if any(brand in brands for brand in _AVIF_BRANDS) else "HEIF"
    return next((name for magic, name in _PICTURES if head.startswith(magic)), None)


def video_container(head: bytes) -> str | None:
    """The name of the video container that a file of these first 200 bytes is in, None for no video."""
    if head[4:8] == b"ftyp":
        return None if head[8:12] in _STILL_BRANDS else "MP4 or MOV"
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return "AVI"
    if head[:1] == b"G" and head[_TS_PACKET : _TS_PACKET + 1] == b"G":
        return "MPEG-TS"
    return next((name for magic, name in _VIDEOS if head.startswith(magic)), None)


def stated_size(file: BinaryIO) -> int | None:
    """The bytes that a video file has by its own account (MP4 and MOV, Matroska and WebM, AVI), None where it says
    nothing. What lies behind that is no part of it."""
    file.seek(0)
    head = file.read(64)
    end = file.seek(0, os.SEEK_END)
    container = video_container(head)
    if container == "MP4 or MOV":
        return _size_of_boxes(file, end)
    if container == "AVI":
        return _size_of_riff(file, end)
    if container == "Matroska or WebM":
        return _size_of_segment(head)
    return None


def _size_of_boxes(file: BinaryIO, end: int) -> int:
    position = 0
    while position < end:
        file.seek(position)
        head = file.read(16)
        size = int.from_bytes(head[:4], "big")
        if size == 1:
            size = int.from_bytes(head[8:16], "big")
        if head[4:8] not in _BOXES or size < 8:  # a size of 0 is for a box that ends with the file
            return end
        position += size
    return position


def _size_of_riff(file: BinaryIO, end: int) -> int | None:
    position = 0
    while position < end:  # files above a gigabyte have several parts
        file.seek(position)
        name, size = struct.unpack("<4sI", file.read(8).ljust(8, b"\0"))
        if name != b"RIFF":
            return end
        if size in (0, 0xFFFFFFFF):  # a writer that could not go back
            return None
        position += 8 + size + size % 2
    return position


def _size_of_segment(head: bytes) -> int | None:
    at = head.find(_SEGMENT)
    if at < 0 or at + 12 > len(head):
        return None
    first = head[at + 4]
    length = 9 - first.bit_length()  # of the number, whose first byte has as many leading zeros as bytes follow
    if not 1 <= length <= 8:
        return None
    bits = 7 * length
    size = int.from_bytes(head[at + 4 : at + 4 + length], "big") & ((1 << bits) - 1)
    return None if size == (1 << bits) - 1 else at + 4 + length + size  # all ones: unknown
