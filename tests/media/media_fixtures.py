"""Images and videos made at test time, and plain-Python readings of what the package makes of them."""

import io
import struct
import zlib
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any

import av
import numpy as np
from PIL import Image

from qwen2vl.config import IMAGE_MEAN, IMAGE_STD
from qwen2vl.media.inspection import patches_to_frames
from qwen2vl.media.video import VideoPatches


def noise(height: int, width: int, *, channels: int = 3, seed: int = 0) -> np.ndarray:
    """(height, width, channels) uint8 with smooth structure and noise, so that resizing errors show."""
    rng = np.random.default_rng(seed)
    waves = np.sin(np.arange(height)[:, None] / 7.0) + np.cos(np.arange(width)[None] / 5.0)
    values = 127 + 50 * waves[..., None] + rng.normal(0, 30, (height, width, channels))
    return values.clip(0, 255).astype(np.uint8)


def encode_image(image: np.ndarray | Image.Image, format: str = "PNG", **options: Any) -> bytes:
    """The bytes of an image file."""
    file = io.BytesIO()
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    picture.save(file, format, **options)
    return file.getvalue()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_with_header(width: int, height: int, bits: int = 8, colour: int = 2) -> bytes:
    """A tiny PNG whose header may promise any size; its pixel data is next to nothing."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    chunks = [
        png_chunk(b"IHDR", header),
        png_chunk(b"IDAT", zlib.compress(b"\0" * 64)),
        png_chunk(b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


NUMBER_BITS = 12


def numbered_frame(number: int, height: int = 56, width: int = 96) -> np.ndarray:
    """(height, width, 3) uint8: ``number`` as black and white columns, which survive lossy coding."""
    bits = [(number >> bit) & 1 for bit in range(NUMBER_BITS)]
    edges = np.linspace(0, width, NUMBER_BITS + 1).round().astype(int)
    row = np.repeat(np.array(bits, np.uint8) * 255, np.diff(edges))
    return np.broadcast_to(row[None, :, None], (height, width, 3)).copy()


def read_number(frame: np.ndarray) -> int:
    """The number in a frame made by ``numbered_frame``, at any size."""
    centres = ((np.arange(NUMBER_BITS) + 0.5) * frame.shape[1] / NUMBER_BITS).astype(int)
    middle = frame[frame.shape[0] // 4 : frame.shape[0] // 2, centres].mean(axis=(0, 2))
    return sum(1 << bit for bit, value in enumerate(middle) if value > 127)


def write_video(
    file: Any,
    frames: Iterable[np.ndarray],
    *,
    rate: int | Fraction = 30,
    codec: str = "libx264",
    format: str | None = None,
    gop: int = 12,
    milliseconds: Sequence[int] | None = None,
    audio: bool = False,
    pixel_format: str = "yuv420p",
    options: dict[str, str] | None = None,
    pixel_aspect: Fraction | None = None,
) -> None:
    """Write a video; ``milliseconds`` gives every frame a time of its own."""
    with av.open(file, "w", format=format) as container:
        stream: Any = None
        for index, frame in enumerate(frames):
            if stream is None:
                stream = container.add_stream(codec, rate=rate, options=options or {})
                stream.height, stream.width = frame.shape[:2]
                stream.pix_fmt, stream.gop_size = pixel_format, gop
                if pixel_aspect is not None:
                    stream.codec_context.sample_aspect_ratio = pixel_aspect
                if milliseconds is not None:
                    stream.codec_context.time_base = Fraction(1, 1000)
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts = index if milliseconds is None else milliseconds[index]
            picture.time_base = Fraction(1, 1) / rate if milliseconds is None else Fraction(1, 1000)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def write_audio(file: Any, seconds: float = 0.5, format: str = "mp4") -> None:
    """A file with a sound stream and no video stream."""
    with av.open(file, "w", format=format) as container:
        stream: Any = container.add_stream("aac", rate=16000)
        for start in range(0, int(16000 * seconds), 1024):
            sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            sound.sample_rate, sound.pts, sound.time_base = 16000, start, Fraction(1, 16000)
            container.mux(stream.encode(sound))
        container.mux(stream.encode())


def video_bytes(frames: Iterable[np.ndarray], format: str = "mp4", **options: Any) -> bytes:
    file = io.BytesIO()
    write_video(file, frames, format=format, **options)
    return file.getvalue()


def with_display_matrix(mp4: bytes, a: int, b: int, c: int, d: int) -> bytes:
    """An MP4 whose track header asks players to show (x, y) at (a x + c y, b x + d y), up to a shift."""
    at = mp4.index(b"tkhd") + 4 + 40  # version 0: flags, times, ids and volume come before the matrix
    matrix = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    return mp4[:at] + matrix + mp4[at + 36 :]


def unnormalise(rows: np.ndarray) -> np.ndarray:
    """Normalised rows of (3, 2, 14, 14) back to the 0..255 scale, float64."""
    mean, std = np.array(IMAGE_MEAN)[:, None], np.array(IMAGE_STD)[:, None]
    values = rows.reshape(len(rows), 3, -1).astype(np.float64)
    return ((values * std + mean) * 255).reshape(len(rows), -1)


def numbered(count: int, **size: int) -> list[np.ndarray]:
    """Frames that carry 0, 1, ... count - 1."""
    return [numbered_frame(number, **size) for number in range(count)]


def numbers(video: VideoPatches) -> list[int]:
    """The numbers in the kept frames."""
    return [read_number(frame) for frame in patches_to_frames(video.patches, video.grid_thw)]


def resized(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Pillow's bicubic of an (H, W, 3) array, with the order of passes that Pillow 13 has."""
    image = Image.fromarray(np.ascontiguousarray(pixels))
    down = image.height - height
    rows_first = down > 0 and down > 2 * (image.width - width)
    first = (image.width, height) if rows_first else (width, image.height)
    bicubic = Image.Resampling.BICUBIC
    return np.asarray(image.resize(first, bicubic).resize((width, height), bicubic))
