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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, features

import qwen2vl_kernels
from qwen2vl.config import MAX_PIXELS, MIN_PIXELS
from qwen2vl.errors import MediaError, MediaWarning, install_hint
from qwen2vl.media.effort import PIXEL_BUDGET, check_effort, check_structure
from qwen2vl.media.kinds import picture_format, video_container
from qwen2vl.media.options import (
    ANYWHERE,
    DEFAULTS,
    RELEASED_SHAPE,
    Access,
    Limits,
    MediaOptions,
    PatchShape,
    shown,
)
from qwen2vl.media.patches import check_patch_bytes
from qwen2vl.media.png import without_metadata
from qwen2vl.media.sources import describe_source, open_source, unwrap_source
from qwen2vl.media.strictness import strict_pillow
from qwen2vl_kernels import image_to_patches

MAX_IMAGE_BYTES = 1 << 30  # some decoders read the whole file before they look at it
MAX_EXIF_BYTES = 4 << 20  # those of a camera fit into 65,533, and each may become an object in memory

# Only formats that Pillow or pillow-heif decodes by itself: EPS, for one, would run an interpreter on the file.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF", "HEIF")
_STRIP_PIXELS = 1 << 19  # converted at a time, so that no second copy of a picture is made
_ORIENTATION_TAG = 0x0112
_TRANSPOSED = (5, 6, 7, 8)  # orientations whose rows are the upright picture's columns
_MIRRORED = {2: (1, -1), 3: (-1, -1), 4: (-1, 1), 6: (-1, 1), 7: (-1, -1), 8: (1, -1)}  # steps along rows and columns
_DEPTH = 5  # calls from where a file is read up to who called `load_image` or `preprocess_image`
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
    except OverflowError:
        raise MediaError(f"sides of {shown(height)} and {shown(width)} pixels are beyond any picture") from None


_ALSO = ", a PIL image or a numpy array (uint8 or uint16)"


def load_image(source: object, *, access: Access = ANYWHERE) -> np.ndarray:
    """Read an image as upright 8-bit RGB.

    Args:
        source: path, ``file://`` URL, http(s) URL, base64 ``data:`` URI, bytes, binary file object, PIL image, or an
            array of shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) and dtype uint8 or uint16; or a dict
            ``{"bytes": ..., "path": ...}`` of one of them, as datasets hold. Files may be PNG, JPEG, WebP, GIF, BMP,
            TIFF, PPM, AVIF or, where pillow-heif is installed, HEIC and HEIF; the first of several frames or pages, a
            HEIF file's main picture, is taken, with a MediaWarning. Pixels are squares, whatever a file says of its
            resolution: Pillow, browsers and the released processor take them as that, too.
        access: which files and URLs may be opened, and ``access.limits``: larger pictures, and those that take more
            work, are refused from their headers, before any pixel is decoded.

    Returns:
        (H, W, 3) uint8. EXIF orientation is applied, transparency composited over white, 16-bit values scaled
        so that 65535 becomes 255.

    Raises:
        MediaError: the source is forbidden, cannot be read or decoded, is too large, or has an unsupported type, shape
            or dtype.
    """
    with _pixels(source, access) as pixels:
        return pixels


@contextlib.contextmanager
def _pixels(
    source: object, access: Access, expect: Callable[[int, int], object] = lambda height, width: None
) -> Iterator[np.ndarray]:
    """What ``load_image`` returns, for a block in which its pixels count among those held. ``expect`` is called with
    the sides before anything is decoded, turned or not, and may refuse."""
    source = unwrap_source(source)
    if isinstance(source, np.ndarray):
        _check_array(source)
        expect(*source.shape[:2])
        yield _array_to_rgb(source)
        return
    with contextlib.ExitStack() as held:
        label = describe_source(source)
        if isinstance(source, Image.Image):
            _admit(source, label, access.limits, expect, held)
            pixels = decode_image(source, label, access.limits)
        else:
            pixels = _read_file(source, label, access, expect, held)
        yield pixels


def _read_file(
    source: object, label: str, access: Access, expect: Callable[[int, int], object], held: contextlib.ExitStack
) -> np.ndarray:
    with (
        open_source(source, max_bytes=MAX_IMAGE_BYTES, access=access, also=_ALSO) as stream,
        open_image(stream, label, access.limits) as image,
    ):
        _admit(image, label, access.limits, expect, held)
        pixels = decode_image(image, label, access.limits)
        count = count_frames(image)
        if count > 1 and image.format == "HEIF":
            warn(f"{label} holds {count} pictures, of which the main one is read", _DEPTH)
        elif count > 1:
            warn(
                f"{label} holds several frames or pages, of which the first is read: give it as a video for all of "
                "them",
                _DEPTH,
            )
        return pixels


def _admit(
    image: Image.Image,
    label: str,
    limits: Limits,
    expect: Callable[[int, int], object],
    held: contextlib.ExitStack,
) -> None:
    """What is asked of a picture before it is decoded; then its pixels are held."""
    check_source_size(image, label, limits)
    expect(image.height, image.width)
    held.enter_context(PIXEL_BUDGET.hold(image.width * image.height, limits.max_source_pixels))


def warn(message: str, depth: int = 2) -> None:
    """Give a MediaWarning, which no other thread silences meanwhile, of a place that many calls above this one."""
    with _warnings_lock:
        warnings.warn(message, MediaWarning, stacklevel=1 + depth)


def count_frames(image: Image.Image) -> int:
    """The frames or pages of an open file; 1 for a photo, whatever previews a camera put beside it.

    A GIF or TIFF of several counts 2: it would have to be read to its end to tell how many there are.
    """
    if image.format == "MPO":
        return 1
    try:
        with without_warnings(), strict_pillow():
            if image.format in ("GIF", "TIFF"):
                return 1 + bool(getattr(image, "is_animated", False))
            return getattr(image, "n_frames", 1)
    except Exception:  # what lies behind the first frame may be damaged in many ways, and is not read
        return 1


@contextlib.contextmanager
def without_warnings() -> Iterator[list[warnings.WarningMessage]]:
    """Keep warnings, in a list, while a header or metadata is read.

    Filters of warnings belong to the whole process, so one thread at a time may change them; headers take no time.
    """
    with _warnings_lock, warnings.catch_warnings(record=True) as kept:
        warnings.simplefilter("always")
        yield kept


def open_image(stream: BinaryIO, label: str, limits: Limits) -> Image.Image:
    """An image file whose header is read. Raises MediaError."""
    size = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    if size > MAX_IMAGE_BYTES:
        raise MediaError(f"{label} has {size} bytes, more than the limit of {MAX_IMAGE_BYTES}")
    Image.init()
    formats = [name for name in _FORMATS if name in Image.OPEN]
    try:
        check_structure(stream, label, limits)
        file = without_metadata(stream)
        with without_warnings(), strict_pillow():
            return Image.open(file, formats=formats)
    except MediaError:
        raise
    except Image.DecompressionBombError as error:
        raise MediaError(
            f"{label} was refused from its header, max_source_pixels is {limits.max_source_pixels}: {error}; "
            "raise limits.max_source_pixels"
        ) from error
    except Image.UnidentifiedImageError as error:
        stream.seek(0)
        head = stream.read(200)
        container, format = video_container(head), picture_format(head[:64])
        if container is not None:
            raise MediaError(f"{label} is a video ({container}), not an image: give it as a video") from error
        if format == "HEIF" and format not in Image.OPEN:
            _register_heif(label)
            return open_image(stream, label, limits)
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
    with without_warnings():
        return features.check("avif") is True  # Pillow before 11.3 warns of a name that it does not know


def check_source_size(image: Image.Image, label: str, limits: Limits) -> None:
    """Refuse a picture without pixels or with too many, by its header. Raises MediaError."""
    width, height = image.size
    if width < 1 or height < 1:
        raise MediaError(f"{label} has no pixels: height {height}, width {width}")
    if width * height > limits.max_source_pixels:
        raise MediaError(
            f"{label} says it is {width} x {height} pixels, more than max_source_pixels = {limits.max_source_pixels}: "
            "refused before decoding; make it smaller, or raise limits.max_source_pixels"
        )


def decode_image(image: Image.Image, label: str, limits: Limits) -> np.ndarray:
    """The current frame of an open file as ``load_image`` returns it. Raises MediaError."""
    try:
        check_effort(image, label, limits.max_decoded_pixels)
        if image.format == "TIFF":  # whose decoder reads its tags once more, and warns aloud
            _orientation(image, label)
        with strict_pillow():
            image.load()
        if len(image.info.get("exif") or b"") > MAX_EXIF_BYTES:
            raise MediaError(f"{label} has EXIF metadata of more than {MAX_EXIF_BYTES} bytes")
        orientation = _orientation(image, label)  # after load: PNG may carry EXIF behind its pixels
        width, height = image.size
        turned = orientation in _TRANSPOSED
        upright = np.empty((width, height, 3) if turned else (height, width, 3), np.uint8)
        steps = _MIRRORED.get(orientation, (1, 1))
        # The same memory, in the order of the file's rows.
        rows = (upright.transpose(1, 0, 2) if turned else upright)[:: steps[0], :: steps[1]]
        for top, bottom in _strips(height, width):
            strip = image.crop((0, top, width, bottom)) if bottom - top < height else image
            rows[top:bottom] = np.asarray(_to_rgb(strip, image.format, label))
        return upright
    except MediaError:
        raise
    except Exception as error:  # decoders meet hostile bytes with many types of error
        raise MediaError(f"{label} is a damaged image: {error or type(error).__name__}") from error


def _strips(height: int, width: int) -> Iterator[tuple[int, int]]:
    """(from, to) of rows that are few enough to be converted at a time."""
    step = max(1, _STRIP_PIXELS // width)
    return ((top, min(height, top + step)) for top in range(0, height, step))


def _orientation(image: Image.Image, label: str) -> int:
    """EXIF's orientation, 1 where there is none or its metadata is no EXIF. Damage that is passed over, which may be
    in the very place that says it, gives a MediaWarning."""
    found = 1
    # Pillow reads it in many ways, and meets damage with as many types of error.
    with without_warnings() as kept, contextlib.suppress(Exception):
        found = image.getexif().get(_ORIENTATION_TAG, 1)
        if image.format in ("JPEG", "MPO"):  # read when the file was opened, for its resolution: once more, to be told
            Image.Exif().load(image.info.get("exif") or b"")
    if kept:
        said = " ".join(str(kept[0].message).split())
        warn(f"{label} has damaged metadata, which is passed over: {said}", _DEPTH + 2)
    return found


def _to_rgb(image: Image.Image, format: str | None, label: str) -> Image.Image:
    transparent = image.info.get("transparency")
    if image.mode.startswith("I;16") or (image.mode == "I" and format in ("PNG", "PPM")):
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


def _check_array(array: np.ndarray) -> None:
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


def _array_to_rgb(array: np.ndarray) -> np.ndarray:
    array = array[..., None] if array.ndim == 2 else array
    height, width, channels = array.shape
    if channels == 3 and array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    pixels = np.empty((height, width, 3), np.uint8)
    for top, bottom in _strips(height, width):
        strip = array[top:bottom]
        if strip.dtype == np.uint16:
            strip = _scale_16_bit(strip)
        if channels == 4:
            strip = np.asarray(composite_over_white(Image.fromarray(np.ascontiguousarray(strip))))
        pixels[top:bottom] = strip  # one channel becomes three
    return pixels


def preprocess_image(
    source: object,
    options: MediaOptions = DEFAULTS,
    *,
    resized_height: int | None = None,
    resized_width: int | None = None,
    access: Access = ANYWHERE,
    shape: PatchShape = RELEASED_SHAPE,
    num_threads: int | None = None,
    reserve: Callable[[int], object] | None = None,
    **given: Any,
) -> ImagePatches:
    """Read an image, resize it by ``smart_resize`` and cut it into patches.

    Args:
        source: anything that ``load_image`` takes.
        options: ``min_pixels`` and ``max_pixels`` bound the resized image's area.
        resized_height, resized_width: ask for this size instead of the source's own (give both); it is rounded and
            held to the range like any other.
        access: which files and URLs may be opened, and what a picture may cost.
        shape: of the patches.
        num_threads: at most this many for the resize; see ``image_to_patches``.
        reserve: called with the number of tokens before the image is decoded; what it raises is passed on.
        given: options by name, over ``options``.

    Raises:
        MediaError: what ``load_image`` and ``smart_resize`` refuse, or only one of the two resized sides is given.
        TypeError: ``given`` holds an unknown name.
    """
    if given:
        options = options.updated(given)
    if (resized_height is None) != (resized_width is None):
        raise MediaError(f"resized_height and resized_width go together, got {resized_height!r} and {resized_width!r}")
    asked = None if resized_height is None or resized_width is None else (resized_height, resized_width)
    patch = shape.patch_size

    def resized(*size: int) -> tuple[int, int]:
        limits = {"min_pixels": options.min_pixels, "max_pixels": options.max_pixels}
        return smart_resize(*(asked or size), factor=shape.factor, **limits)

    def expect(*size: int) -> None:
        """Refuse what would become too much, before there is any of it; a turned picture becomes as much."""
        try:
            height, width = resized(*size)
            tokens = (height // shape.factor) * (width // shape.factor)
            access.limits.check_item(tokens)
            check_patch_bytes(1, height, width, 3 * height * width)
        except MediaError as error:
            label = "image array" if isinstance(source, np.ndarray) else describe_source(source)
            raise MediaError(f"{label}: {error}") from None
        if reserve is not None:
            reserve(tokens)

    with _pixels(source, access, expect) as pixels:
        source_size = (pixels.shape[0], pixels.shape[1])
        height, width = resized(*source_size)
        patches = image_to_patches(
            pixels, height, width, patch_size=patch, merge_size=shape.merge_size, num_threads=num_threads
        )
    grid_thw = (1, height // patch, width // patch)
    return ImagePatches(patches.numpy(), grid_thw, source_size, (height, width), shape.merge_size)
