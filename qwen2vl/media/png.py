"""PNG files without the metadata that no pixel depends on.

Pillow refuses a file whose compressed texts or colour profile are large, or written in a way it does not know, whatever
its pixels are. Colour profiles are not applied here, and of the texts only those matter that may turn the picture.
"""

from __future__ import annotations

import io
import struct
from typing import BinaryIO

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_HEAD = struct.Struct(">I4s")  # length and kind; behind the data stand four bytes of checksum
_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_ORIENTING = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")  # the texts in which Pillow looks for an orientation
_MAX_CHUNKS = 65_536  # half a gigabyte in the pieces that most writers make
_LONGEST = max(map(len, _ORIENTING))


def without_metadata(file: BinaryIO) -> BinaryIO:
    """A PNG file without its colour profile and its texts, those of an orientation excepted; another file as it is.

    Args:
        file: seekable, read from its beginning.

    Returns:
        ``file`` itself where there is nothing to leave out, else a copy in memory; at position 0.

    Raises:
        ValueError: it has more than 65,536 chunks, each of which costs Pillow some microseconds.
    """
    kept: list[tuple[int, int]] = []  # from, to
    begin, position = 0, len(_SIGNATURE)
    file.seek(0)
    is_png = file.read(position) == _SIGNATURE
    count = 0
    while is_png and len(head := file.read(_HEAD.size)) == _HEAD.size:
        if (count := count + 1) > _MAX_CHUNKS:
            raise ValueError(f"it has more than {_MAX_CHUNKS} chunks")
        length, kind = _HEAD.unpack(head)
        end = position + _HEAD.size + length + 4
        if kind == b"iCCP" or (kind in _TEXTS and not file.read(min(length, _LONGEST)).startswith(_ORIENTING)):
            kept.append((begin, position))
            begin = end
        if kind == b"IEND":
            break
        file.seek(position := end)
    file.seek(0)
    if not kept:
        return file
    copy = io.BytesIO()
    for start, stop in kept:
        file.seek(start)
        copy.write(file.read(stop - start))
    file.seek(begin)
    copy.write(file.read())
    copy.seek(0)
    return copy
