"""Images to patches: reading, orientation and colour, dynamic resolution, and the order of patch rows.

The rules are those of the released processor: sizes are multiples of 28 within a range of pixels, resizing is
Pillow's bicubic on 8-bit RGB, transparency is composited over white. Pixels stay uint8, and one of a still image's two
equal frames is kept; normalisation with ``IMAGE_MEAN`` and ``IMAGE_STD`` is folded into the patch embedding.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, features

import qwen2vl_kernels
from qwen2vl.config import MAX_PIXELS, MIN_PIXELS
from qwen2vl.errors import MediaError, MediaWarning, install_hint
from qwen2vl.media.kinds import picture_format, video_container
from qwen2vl.media.options import (
    ANYWHERE,
    DEFAULTS,
    RELEASED_SHAPE,
    Access,
    MediaOptions,
    PatchShape,
    check_positive_int,
)
from qwen2vl.media.png import without_metadata
from qwen2vl.media.sources import describe_source, open_source, unwrap_source
from qwen2vl.media.strictness import strict_pillow
from qwen2vl_kernels import image_to_patches

MAX_SOURCE_PIXELS = 178_956_970  # where Pillow, too, calls an image a decompression bomb
MAX_PATCH_BYTES = 4 << 30  # of one image or video; whoever asks for more made a slip or attacks
MAX_IMAGE_BYTES = 1 << 30  # some decoders read the whole file before they look at it

# Only formats that Pillow or pillow-heif decodes by itself: EPS, for one, would run an interpreter on the file.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF", "HEIF")
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_warnings_lock = threading.RLock()
# Pillow has errors of its own about damaged files: its log lines go where a program sends them, or nowhere.
logging.getLogger("PIL").addHandler(logging.NullHandler())


@dataclass(frozen=True, eq=False)
class ImagePatches:
    """What an image becomes.

    Attributes:
        patches: (gh * gw, 3 * patch_size**2) uint8, rows in merge-block order; one of a still image's equal frames.
        grid_thw: (1, gh, gw), in patches.
        source_size: (height, width) in pixels, upright, before resizing.
        resized_size: (height, width) in pixels that the patches cover.
        merge_size: side of the square of patches that becomes one token.
    """

    patches: np.ndarray
    grid_thw: tuple[int, int, int]
    source_size: tuple[int, int]
    resized_size: tuple[int, int]
    merge_size: int = 2

    @property
    def num_tokens(self) -> int:
        """Tokens in the prompt, without the two vision marks."""
        return math.prod(self.grid_thw) // self.merge_size**2


def smart_resize(
    height: int, width: int, *, factor: int = 28, min_pixels: int = MIN_PIXELS, max_pixels: int = MAX_PIXELS
) -> tuple[int, int]:
    """``qwen2vl_kernels.smart_resize``, whose refusals become MediaError."""
    try:
        return qwen2vl_kernels.smart_resize(height, width, factor=factor, min_pixels=min_pixels, max_pixels=max_pixels)
    except ValueError as error:
        raise MediaError(str(error)) from None


_ALSO = ", a PIL image or a numpy array (uint8 or uint16)"


def load_image(source: object, *, access: Access = ANYWHERE, max_source_pixels: int = MAX_SOURCE_PIXELS) -> np.ndarray:
    """Read an image as upright 8-bit RGB.

    Args:
        source: path, ``file://`` URL, http(s) URL, base64 ``data:`` URI, bytes, binary file object, PIL image, or an
            array of shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) and dtype uint8 or uint16; or a dict
            ``{"bytes": ..., "path": ...}`` of one of them, as datasets hold. Files may be PNG, JPEG, WebP, GIF, BMP,
            TIFF, PPM, AVIF or, where pillow-heif is installed, HEIC and HEIF; the first of several frames or pages, a
            HEIF file's main picture, is taken, with a MediaWarning. Pixels are squares, whatever a file says of its
            resolution: Pillow, browsers and the released processor take them as that, too.
        access: which files and URLs may be opened.
        max_source_pixels: larger images are refused from their header, before any pixel is decoded.

    Returns:
        (H, W, 3) uint8. EXIF orientation is applied, transparency composited over white, 16-bit values scaled
        so that 65535 becomes 255.

    Raises:
        MediaError: the source is forbidden, cannot be read or decoded, is too large, or has an unsupported type, shape
            or dtype.
    """
    source = unwrap_source(source)
    if isinstance(source, np.ndarray):
        return _array_to_rgb(source)
    label = describe_source(source)
    if isinstance(source, Image.Image):
        check_source_size(source, label, max_source_pixels)
        return decode_image(source, label)
    with (
        open_source(source, max_bytes=MAX_IMAGE_BYTES, access=access, also=_ALSO) as stream,
        open_image(stream, label, max_source_pixels) as image,
    ):
        check_source_size(image, label, max_source_pixels)
        pixels = decode_image(image, label)
        count = count_frames(image)
        if count > 1 and image.format == "HEIF":
            warn(f"{label} holds {count} pictures, of which the main one is read")
        elif count > 1:
            warn(
                f"{label} holds {count} frames or pages, of which the first is read: give it as a video for all of them"
            )
        return pixels


def warn(message: str) -> None:
    """Give a MediaWarning, which no other thread silences meanwhile."""
    with _warnings_lock:
        warnings.warn(message, MediaWarning, stacklevel=3)


def count_frames(image: Image.Image) -> int:
    """The frames or pages of an open file; 1 for a photo, whatever previews a camera put beside it."""
    if image.format == "MPO":
        return 1
    try:
        with _without_warnings(), strict_pillow():
            return getattr(image, "n_frames", 1)
    except Exception:  # what lies behind the first frame may be damaged in many ways, and is not read
        return 1


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Silence warnings while a header or metadata is read.

    Filters of warnings belong to the whole process, so one thread at a time may change them; headers take no time.
    """
    with _warnings_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def open_image(stream: BinaryIO, label: str, max_source_pixels: int = MAX_SOURCE_PIXELS) -> Image.Image:
    """An image file whose header is read. Raises MediaError."""
    size = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    if size > MAX_IMAGE_BYTES:
        raise MediaError(f"{label} has {size} bytes, more than the limit of {MAX_IMAGE_BYTES}")
    Image.init()
    format = picture_format(stream.read(64))
    if format == "HEIF":
        _register_heif(label)
    formats = [name for name in _FORMATS if name in Image.OPEN]
    try:
        file = without_metadata(stream)
        with _without_warnings(), strict_pillow():
            return Image.open(file, formats=formats)
    except Image.DecompressionBombError as error:
        raise MediaError(
            f"{label} was refused from its header, max_source_pixels is {max_source_pixels}: {error}"
        ) from error
    except Image.UnidentifiedImageError as error:
        stream.seek(0)
        head = stream.read(200)
        container, format = video_container(head), picture_format(head[:64])
        if container is not None:
            raise MediaError(f"{label} is a video ({container}), not an image: give it as a video") from error
        if format == "HEIF" and format not in Image.OPEN:
            _register_heif(label)
            return open_image(stream, label, max_source_pixels)
        if format == "AVIF" and not _reads_avif():
            raise MediaError(f'{label} is an AVIF picture, for a newer Pillow: pip install "pillow>=11.3"') from error
        if format is not None:
            raise MediaError(f"{label} is a damaged image: its {format} header cannot be read") from error
        raise MediaError(f"{label} is not an image in a supported format ({', '.join(_FORMATS)})") from error
    except Exception as error:  # decoders meet hostile bytes with many types of error
        raise MediaError(f"{label} is a damaged image: {error or type(error).__name__}") from error


def _register_heif(label: str) -> None:
    """Let Pillow read HEIC and HEIF. Raises MediaError where what does that is not installed."""
    try:
        import pillow_heif  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MediaError(f"{label} is a HEIC or HEIF picture: {install_hint('pillow-heif')}") from error
    pillow_heif.register_heif_opener()


def _reads_avif() -> bool:
    with _without_warnings():
        return features.check("avif") is True  # Pillow before 11.3 warns of a name that it does not know


def check_source_size(image: Image.Image, label: str, max_source_pixels: int = MAX_SOURCE_PIXELS) -> None:
    """Refuse a picture without pixels or with too many, by its header. Raises MediaError."""
    width, height = image.size
    if width < 1 or height < 1:
        raise MediaError(f"{label} has no pixels: height {height}, width {width}")
    if width * height > max_source_pixels:
        raise MediaError(
            f"{label} says it is {width} x {height} pixels, "
            f"more than max_source_pixels = {max_source_pixels}: refused before decoding"
        )


def decode_image(image: Image.Image, label: str) -> np.ndarray:
    """The current frame of an open file as ``load_image`` returns it. Raises MediaError."""
    try:
        with strict_pillow():
            image.load()
        orientation = _orientation(image)  # after load: PNG may carry EXIF behind its pixels
        upright = _to_rgb(image, label)
        if orientation in _UPRIGHT:
            upright = upright.transpose(_UPRIGHT[orientation])
        return np.array(upright)
    except MediaError:
        raise
    except Exception as error:  # decoders meet hostile bytes with many types of error
        raise MediaError(f"{label} is a damaged image: {error or type(error).__name__}") from error


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1 where there is none or its metadata is no EXIF."""
    try:
        with _without_warnings():
            return image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # Pillow reads it in many ways, and meets damage with as many types of error
        return 1


def _to_rgb(image: Image.Image, label: str) -> Image.Image:
    transparent = image.info.get("transparency")
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        values = np.asarray(image).astype(np.uint16)  # Pillow before 12 opens some 16-bit files as 32-bit "I"
        grey = _scale_16_bit(values)
        if isinstance(transparent, int):
            grey[values == transparent] = 255
        return Image.fromarray(grey).convert("RGB")
    if image.mode in ("I", "F"):
        raise MediaError(
            f"{label}: the range of 32-bit values (mode {image.mode}) is unknown, convert them to 8 bits first"
        )
    if transparent is not None or {"A", "a"} & set(image.getbands()):
        if image.mode == "La":
            image = image.convert("LA")
        return composite_over_white(image.convert("RGBA"))
    return image.convert("RGB")


def composite_over_white(image: Image.Image) -> Image.Image:
    """RGBA over a white background, as RGB."""
    background = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(background, image).convert("RGB")


def _scale_16_bit(values: np.ndarray) -> np.ndarray:
    """uint16 to uint8 with rounding: 65535 = 257 * 255."""
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _array_to_rgb(array: np.ndarray) -> np.ndarray:
    if array.dtype not in (np.uint8, np.uint16):
        raise MediaError(
            f"image array must have dtype uint8 or uint16, got {array.dtype} "
            "(for floats in [0, 1]: (255 * array).round().astype(numpy.uint8))"
        )
    if array.ndim not in (2, 3) or 0 in array.shape or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise MediaError(
            f"image array must have shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), got {array.shape} "
            "(channels come last)"
        )
    if array.dtype == np.uint16:
        array = _scale_16_bit(array)
    if array.ndim == 2:
        array = array[..., None]
    if array.shape[2] == 1:
        array = np.broadcast_to(array, (*array.shape[:2], 3))
    if array.shape[2] == 4:
        return np.array(composite_over_white(Image.fromarray(np.ascontiguousarray(array))))
    return np.ascontiguousarray(array)


def _check_patch_bytes(frames: int, height: int, width: int, size: int) -> None:
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
        _check_patch_bytes(num_frames, height, width, steps * height * width * 3 * shape.temporal_patch_size)
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


def preprocess_image(
    source: object,
    options: MediaOptions = DEFAULTS,
    *,
    resized_height: int | None = None,
    resized_width: int | None = None,
    access: Access = ANYWHERE,
    shape: PatchShape = RELEASED_SHAPE,
    num_threads: int | None = None,
    **given: Any,
) -> ImagePatches:
    """Read an image, resize it by ``smart_resize`` and cut it into patches.

    Args:
        source: anything that ``load_image`` takes.
        options: ``min_pixels`` and ``max_pixels`` bound the resized image's area.
        resized_height, resized_width: ask for this size instead of the source's own (give both); it is rounded and
            held to the range like any other.
        access: which files and URLs may be opened.
        shape: of the patches.
        num_threads: at most this many for the resize; see ``image_to_patches``.
        given: options by name, over ``options``.

    Raises:
        MediaError: what ``load_image`` and ``smart_resize`` refuse, or only one of the two resized sides is given.
        TypeError: ``given`` holds an unknown name.
    """
    if given:
        options = options.updated(given)
    if (resized_height is None) != (resized_width is None):
        raise MediaError(f"resized_height and resized_width go together, got {resized_height!r} and {resized_width!r}")
    pixels = load_image(source, access=access)
    source_size = (pixels.shape[0], pixels.shape[1])
    wanted = source_size if resized_height is None or resized_width is None else (resized_height, resized_width)
    patch = shape.patch_size
    limits = {"min_pixels": options.min_pixels, "max_pixels": options.max_pixels}
    try:
        height, width = smart_resize(*wanted, factor=patch * shape.merge_size, **limits)
        _check_patch_bytes(1, height, width, 3 * height * width)
    except MediaError as error:
        label = "image array" if isinstance(source, np.ndarray) else describe_source(source)
        raise MediaError(f"{label}: {error}") from None
    patches = image_to_patches(
        _with_contiguous_pixels(pixels),
        height,
        width,
        patch_size=patch,
        merge_size=shape.merge_size,
        num_threads=num_threads,
    )
    grid_thw = (1, height // patch, width // patch)
    return ImagePatches(patches.numpy(), grid_thw, source_size, (height, width), shape.merge_size)
