"""Where a video file ends by its own account: what tells that its end is missing, or that another one is behind it.

Both pass through a decoder without a word: it shows what it finds, and of two files that were joined byte by byte it
often finds the first, or decodes the second with the settings of the first.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

from .kinds import transport_packet, video_container

_HEAD = 320  # bytes that tell how long a part of a file is: an Ogg page names the sizes of its 255 segments
_BOXES = b"ftyp moov mdat free skip wide moof mfra udta uuid sidx styp meta emsg prft ssix pdin".split()
_EBML, _SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"
_NO_END = "it has no end mark"
_GIF = (b"GIF87a", b"GIF89a")
_PNG = b"\x89PNG\r\n\x1a\n"
_ASF_OBJECTS = tuple(  # header, data and the three kinds of index
    bytes.fromhex(guid)
    for guid in (
        "3026b2758e66cf11a6d900aa0062ce6c",
        "3626b2758e66cf11a6d900aa0062ce6c",
        "90080033b1e5cf1189f400a0c90349cb",
        "d329e2d6da35d111903400a0c90349be",
        "f803b1fead12644c840f2a1d2f7ad48c",
    )
)
_MXF_HEADER = b"\x06\x0e\x2b\x34\x02\x05\x01\x01\x0d\x01\x02\x01\x01\x02"  # of its partition pack


@dataclass(frozen=True)
class Extent:
    """How far a file goes by its own account.

    Attributes:
        size: bytes that it has by its own account, None where it says nothing. What lies behind that is no part of it.
        missing: what tells that its end is missing, for a sentence; None where nothing does.
        second: where another file begins that is none of its parts, None for a file that stands alone.
    """

    size: int | None = None
    missing: str | None = None
    second: int | None = None


def extent(file: BinaryIO) -> Extent:
    """Look at every part of a video file, not into it. Containers that are not known here say nothing.

    A transport or program stream that ends between two packets cannot be told from a whole one.
    """
    file.seek(0)
    head = file.read(_HEAD)
    end = file.seek(0, os.SEEK_END)
    if head.startswith(_GIF):
        if _skip_gif(file, head):
            size = file.tell()
            return Extent(size, second=size if file.read(6).startswith(_GIF) else None)
        return Extent(missing=_NO_END)
    container = "PNG" if head.startswith(_PNG) else video_container(head)
    if packet := transport_packet(head):
        return Extent(missing="its last packet is cut off" if _packet_is_cut(file, end, *packet) else None)
    measure = _MEASURES.get(container or "")
    if measure is None:
        return Extent()
    position, starts, last = 0, 0, b""
    ftyp = second = None
    for position, size, name in _parts(file, end, measure):
        if last == b"IEND" and name != _PNG:
            break
        if size is None:  # what is of unknown length goes on until the file ends or another one begins
            return Extent(second=_find_ebml(file, position + 1))
        starts += name == _FIRST.get(container or "")
        if name == b"ftyp" and starts:
            ftyp = position
        if starts > 1:
            second = position if ftyp is None else ftyp
            break
        position, last = position + size, name
    stated = max(position, _flv_file_size(head) if container == "FLV" else 0) if second is None else second
    missing = f"it has {end} of the {stated} bytes that it names" if end < stated else None
    if container == "PNG" and last != b"IEND":
        missing = missing or _NO_END
    return Extent(stated or None, missing, second)


Measure = Callable[[bytes, int], "tuple[int | None, bytes] | None"]
"""From the first bytes of a part, and the bytes from there to the end of the file, to the part's size, None where it is
unknown, and its name; None for what is no part of such a file."""


def _parts(file: BinaryIO, end: int, measure: Measure) -> Iterator[tuple[int, int | None, bytes]]:
    """(position, size, name) of every part, of which the last may go beyond the end."""
    position = 0
    while position < end:
        file.seek(position)
        part = measure(file.read(_HEAD), end - position)
        if part is None:
            return
        yield position, *part
        position += part[0] or end


def _measure_box(head: bytes, left: int) -> tuple[int | None, bytes] | None:
    size, name = int.from_bytes(head[:4], "big"), head[4:8]
    if size == 1:
        size = int.from_bytes(head[8:16], "big")
    if size == 0:  # for a box that ends with the file
        size = left
    return (size, name) if name in _BOXES and size >= 8 else None


def _measure_riff(head: bytes, left: int) -> tuple[int | None, bytes] | None:
    name, size = struct.unpack("<4sI", head[:8].ljust(8, b"\0"))
    if name != b"RIFF" or size in (0, 0xFFFFFFFF):  # a writer that could not go back
        return None
    return 8 + size + size % 2, head[8:12]  # files above a gigabyte have several


def _measure_ebml(head: bytes, left: int) -> tuple[int | None, bytes] | None:
    name = next((name for name in (_EBML, _SEGMENT) if head.startswith(name)), None)
    if name is None or len(head) < 5:
        return None
    length = 9 - head[4].bit_length()  # of the number, whose first byte has as many leading zeros as bytes follow
    bits = 7 * length
    size = int.from_bytes(head[4 : 4 + length], "big") & ((1 << bits) - 1)
    if not 1 <= length <= 8 or len(head) < 4 + length:
        return None
    return (None if size == (1 << bits) - 1 else 4 + length + size), name  # all ones: unknown


def _measure_flv(head: bytes, left: int) -> tuple[int | None, bytes] | None:
    if head.startswith(b"FLV\x01"):
        return 9, b"FLV"
    if head[4:8] == b"FLV\x01":
        return 4, b""
    # The size of the tag before stands in front of a tag, which names its stream, always 0.
    if len(head) < 15 or head[4] & 0x1F not in (8, 9, 18) or head[12:15] != b"\0\0\0":
        return None
    return 15 + int.from_bytes(head[5:8], "big"), b""


def _flv_file_size(head: bytes) -> int:
    """What the data of the first tag say, 0 for nothing."""
    name, _, value = head.partition(b"filesize\0")
    if not name.startswith(b"FLV") or len(value) < 8:
        return 0
    (size,) = struct.unpack(">d", value[:8])
    return int(size) if 0 < size < 1 << 53 else 0


def _measure_asf(head: bytes, left: int) -> tuple[int | None, bytes] | None:
    size = int.from_bytes(head[16:24], "little")
    return (size, head[:16]) if head[:16] in _ASF_OBJECTS and size >= 24 else None


def _measure_mxf(head: bytes, left: int) -> tuple[int | None, bytes] | None:
    if head[:4] != b"\x06\x0e\x2b\x34" or len(head) < 17:
        return None
    length = head[16] & 0x7F if head[16] & 0x80 else 0
    size = int.from_bytes(head[17 : 17 + length], "big") if length else head[16]
    return 17 + length + size, head[:14]


def _measure_ogg(head: bytes, left: int) -> tuple[int | None, bytes] | None:
    if not head.startswith(b"OggS") or len(head) < 27:
        return None
    segments = head[26]
    return 27 + segments + sum(head[27 : 27 + segments]), b"OggS"


def _measure_ps(head: bytes, left: int) -> tuple[int | None, bytes] | None:
    if head[:3] != b"\0\0\x01" or len(head) < 4:
        return None
    code = head[3]
    if code == 0xBA:  # a pack, of MPEG-2 with stuffing behind it or of MPEG-1
        return (14 + (head[13] & 7) if head[4:5] >= b"\x40" and len(head) > 13 else 12), b""
    if code == 0xB9:  # the end
        return 4, b""
    return (6 + int.from_bytes(head[4:6], "big"), b"") if code > 0xBA else None


def _measure_png(head: bytes, left: int) -> tuple[int | None, bytes] | None:
    if head.startswith(_PNG):
        return 8, _PNG
    name = head[4:8]
    return (12 + int.from_bytes(head[:4], "big"), name) if len(name) == 4 and name.isalpha() else None


def _measure_ivf(head: bytes, left: int) -> tuple[int | None, bytes] | None:
    if head.startswith(b"DKIF"):
        return max(32, int.from_bytes(head[6:8], "little")), b"DKIF"
    # A frame has a size, and a time whose upper half stays 0 for years.
    return (12 + int.from_bytes(head[:4], "little"), b"") if head[8:12] == b"\0\0\0\0" else None


_MEASURES: dict[str, Measure] = {
    "MP4 or MOV": _measure_box,
    "AVI": _measure_riff,
    "Matroska or WebM": _measure_ebml,
    "FLV": _measure_flv,
    "ASF": _measure_asf,
    "MXF": _measure_mxf,
    "Ogg": _measure_ogg,
    "MPEG-PS": _measure_ps,
    "PNG": _measure_png,
    "IVF": _measure_ivf,
}
# The part that a file has once. AVI and MPEG's streams are missing, of which FFmpeg reads all that is joined, and Ogg,
# which it reads or refuses.
_FIRST = {
    "MP4 or MOV": b"moov",
    "Matroska or WebM": _EBML,
    "FLV": b"FLV",
    "ASF": _ASF_OBJECTS[0],
    "MXF": _MXF_HEADER,
    "PNG": _PNG,
    "IVF": b"DKIF",
}


def _find_ebml(file: BinaryIO, position: int) -> int | None:
    """Where the next Matroska file begins, by its mark and the name of its kind close behind."""
    file.seek(position)
    rest = b""
    while chunk := file.read(1 << 20):
        data = rest + chunk
        at = data.find(_EBML)
        while at >= 0:
            if any(kind in data[at : at + 64] for kind in (b"matroska", b"webm")):
                return position + at
            at = data.find(_EBML, at + 1)
        rest = data[-64:]
        position += len(data) - len(rest)
    return None


def _packet_is_cut(file: BinaryIO, end: int, size: int, offset: int) -> bool:
    """Whether the last packet of a transport stream lacks its end; what somebody put behind it is none."""
    tail = min(end, 16 * size)
    file.seek(end - tail)
    data = file.read(tail)
    # The place from which a packet's mark stands in every packet up to the end, or to the packet that is cut.
    for first in range(min(size, len(data))):
        marks = data[first::size]
        if len(marks) > 1 and marks == b"G" * len(marks):
            return (len(data) - first + offset) % size != 0
    return False


def _skip_gif(file: BinaryIO, head: bytes) -> bool:
    """Go behind the block that ends a GIF; whether there is one, or what a decoder would take for the end."""
    file.seek(13 + _colours(head[10:11]))
    while kind := file.read(1):
        if kind == b";":
            return True
        if kind == b",":  # a frame: its place, its colours, and the least size of a code
            file.seek(_colours(file.read(9)[8:]) + 1, os.SEEK_CUR)
        elif kind == b"!":
            file.read(1)
        else:
            return True  # no GIF from here on: a decoder may say so
        while size := file.read(1)[:1]:
            if size == b"\0":
                break
            file.seek(size[0], os.SEEK_CUR)
    return False


def _colours(packed: bytes) -> int:
    """Bytes of the table of colours that a packed byte announces."""
    return 3 << (packed[0] & 7) + 1 if packed and packed[0] & 0x80 else 0
