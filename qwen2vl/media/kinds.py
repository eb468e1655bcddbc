"""What a file is by its first bytes, for telling what was mistaken for something else."""

from __future__ import annotations

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
    (b"\x06\x0e\x2b\x34\x02\x05\x01\x01\x0d\x01\x02", "MXF"),
    (b"DKIF", "IVF"),
)
_AVIF_BRANDS = (b"avif", b"avis")  # of ISO files, as those that follow
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs")
_STILL_BRANDS = (*_AVIF_BRANDS, *_HEIF_BRANDS, b"mif1", b"msf1")  # the last two say nothing of the coding
_TS_LAYOUTS = ((188, 0), (192, 4))  # bytes of a packet, and of the time before its mark, which Blu-rays have


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
    if transport_packet(head) is not None:
        return "MPEG-TS"
    return next((name for magic, name in _VIDEOS if head.startswith(magic)), None)


def transport_packet(head: bytes) -> tuple[int, int] | None:
    """(size of a packet, offset of its mark) of an MPEG transport stream of these first 200 bytes, None for no such."""
    for size, offset in _TS_LAYOUTS:
        if head[offset::size][:2] == b"GG":
            return size, offset
    return None
