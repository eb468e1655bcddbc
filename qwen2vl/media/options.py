"""How images and videos are preprocessed, which sources may be opened, and what they may cost: each option with its
default and its check.

Users give options as keywords (`processor(messages, fps=1.0)`), in messages and in tables of training data. They are
gathered into one :class:`MediaOptions`, which travels from the prompt to the frames of a video. This module imports
neither PyTorch nor Pillow, so that the command line can show the defaults without waiting for them.
"""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from qwen2vl.config import MAX_FRAME_PIXELS, MAX_PIXELS, MAX_VIDEO_TOKENS, MIN_FRAME_PIXELS, MIN_PIXELS
from qwen2vl.errors import MediaError

# A limit given alone moves the inherited other one of its pair out of its way.
_PAIRS = (("min_pixels", "max_pixels"), ("video_min_pixels", "video_max_pixels"))


def positive_int(value: object) -> int | None:
    """``value`` as an int if it is a positive whole number (of Python or NumPy) below 2**63, else None."""
    try:
        number = -1 if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None
    return number if 0 < number < 1 << 63 else None


def shown(value: object) -> str:
    """``value`` for a message, in at most 100 characters."""
    if isinstance(value, int) and value >= 1 << 63:  # Python writes no int of thousands of digits
        return "one of 2**63 or more"
    try:
        text = repr(value)
    except ValueError:  # nor one in a list, nor one below zero
        text = f"one of type {type(value).__name__} with a number of thousands of digits"
    return text if len(text) <= 100 else text[:97] + "..."


def finite_number(value: object, *, zero: bool = False) -> float | None:
    """``value`` as a float if it is a finite number above 0, or with ``zero`` not below it, else None."""
    try:
        number = math.nan if isinstance(value, (bool, str, bytes)) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) and (number > 0 or (zero and number == 0)) else None


def check_positive_int(name: str, value: object) -> int:
    """``value`` as an int if it is a positive whole number, else MediaError naming ``name``."""
    if (number := positive_int(value)) is None:
        raise MediaError(f"{name} must be a positive integer, got {shown(value)}")
    return number


def check_number(name: str, value: object, *, zero: bool = False) -> float:
    """``value`` as a float if it is what :func:`finite_number` takes, else MediaError naming ``name``."""
    if (number := finite_number(value, zero=zero)) is None:
        raise MediaError(f"{name} must be a finite number {'>= 0' if zero else '> 0'}, got {shown(value)}")
    return number


def read_option(name: str, value: object) -> int | float | None:
    """The value of an option of :class:`MediaOptions`: a positive number for a rate, else a positive int; None for what
    is neither."""
    return finite_number(value) if name == "fps" else positive_int(value)


@dataclass(frozen=True)
class MediaOptions:
    """The options of images and videos.

    Attributes:
        min_pixels, max_pixels: bounds of the area of an image after resizing, in pixels.
        fps: video frames taken per second of the video; ignored where ``num_frames`` is given.
        num_frames: video frames taken.
        min_frames, max_frames: bounds of the number of frames that ``fps`` leads to.
        video_min_pixels, video_max_pixels: bounds of the area of a video frame after resizing, in pixels.
        max_video_tokens: the most tokens of one video; its frames shrink to fit.

    Raises:
        MediaError: a value is no positive number, or no positive integer where one is wanted. Whether a lower bound
            exceeds its upper bound is checked where the pair is used, so that the message can name the item.
    """

    min_pixels: int = MIN_PIXELS
    max_pixels: int = MAX_PIXELS
    fps: float = 2.0
    num_frames: int | None = None
    min_frames: int = 4
    max_frames: int = 768
    video_min_pixels: int = MIN_FRAME_PIXELS
    video_max_pixels: int = MAX_FRAME_PIXELS
    max_video_tokens: int = MAX_VIDEO_TOKENS

    def __post_init__(self) -> None:
        for name in OPTION_NAMES:
            value = getattr(self, name)
            if name == "num_frames" and value is None:
                continue
            if (number := read_option(name, value)) is None:
                kind = "finite number > 0" if name == "fps" else "positive integer"
                raise MediaError(f"{name} must be a {kind}, got {shown(value)}")
            object.__setattr__(self, name, number)

    def updated(self, given: Mapping[str, Any]) -> MediaOptions:
        """These options under those of a narrower scope, where None counts as left out.

        A limit of pixels that is given alone moves the inherited other one out of its way, and a rate of frames that
        is given alone wins over an inherited number of frames.

        Raises:
            TypeError: a name is unknown; the message lists those that there are.
            MediaError: a value is out of range.
        """
        if unknown := [name for name in given if name not in OPTION_NAMES]:
            names = ", ".join(map(repr, unknown))
            raise TypeError(f"unexpected keyword argument {names}; the options of media are {', '.join(OPTION_NAMES)}")
        changes = {name: value for name, value in given.items() if value is not None}
        if not changes:
            return self
        replace(self, **changes)  # checks the values, before they are compared
        for low, high in _PAIRS:
            if low in changes and high not in changes:
                changes[high] = max(getattr(self, high), changes[low])
            elif high in changes and low not in changes:
                changes[low] = min(getattr(self, low), changes[high])
        if "fps" in changes and "num_frames" not in changes:
            changes["num_frames"] = None
        return replace(self, **changes)

    def capped(self, pixels: int) -> MediaOptions:
        """These options with no limit of an area above ``pixels``."""
        return replace(self, **{name: min(getattr(self, name), pixels) for pair in _PAIRS for name in pair})


OPTION_NAMES = tuple(field.name for field in fields(MediaOptions))
DEFAULTS = MediaOptions()


@dataclass(frozen=True)
class PatchShape:
    """How a vision tower cuts frames: patches of ``patch_size`` x ``patch_size`` pixels and ``temporal_patch_size``
    frames, of which ``merge_size`` x ``merge_size`` become one token. Raises MediaError for what is no positive int."""

    patch_size: int = 14
    merge_size: int = 2
    temporal_patch_size: int = 2

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, check_positive_int(field.name, getattr(self, field.name)))

    @property
    def factor(self) -> int:
        """Pixels along the side of what becomes one token; sides of frames are multiples of it."""
        return self.patch_size * self.merge_size


RELEASED_SHAPE = PatchShape()


@dataclass(frozen=True)
class Limits:
    """What pictures and videos may cost. No option of a call, a message or a sample goes beyond them.

    Attributes:
        max_source_pixels: pixels of a picture, a page or a frame of an animation before resizing, by its header; and of
            all that are held at one time, in this process: threads whose pictures do not fit wait.
        max_decoded_pixels: pixels that decoding one picture may write, each as often as its file comes back to it: the
            scans of a JPEG, the tiles of a TIFF.
        max_item_tokens: tokens of one image or video.
        max_item_frames: frames kept of one video.
        max_prompt_tokens: tokens of all images and videos of one conversation.
        max_call_tokens: tokens of all images and videos of one call of a processor.
        video_timeout: seconds that decoding one video file may take; None for no limit.

    Raises:
        MediaError: a value is no positive integer, or no positive number for the timeout.
    """

    max_source_pixels: int = 8192 * 8192
    max_decoded_pixels: int = 16 * 8192 * 8192
    max_item_tokens: int = 32_768
    max_item_frames: int = 4096
    max_prompt_tokens: int = 131_072
    max_call_tokens: int = 1 << 20
    video_timeout: float | None = 600.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "video_timeout":
                object.__setattr__(self, field.name, check_positive_int(field.name, value))
            elif value is not None:
                object.__setattr__(self, field.name, check_number(field.name, value))

    def check_item(self, tokens: int) -> None:
        """Raise MediaError where one image or video would become that many tokens."""
        if tokens > self.max_item_tokens:
            raise MediaError(
                f"would be {tokens} tokens, more than max_item_tokens = {self.max_item_tokens}; lower the pixels or "
                "frames asked for, or raise limits.max_item_tokens"
            )

    def check_frames(self, frames: int) -> None:
        """Raise MediaError where that many frames of one video would be kept."""
        if frames > self.max_item_frames:
            raise MediaError(
                f"{frames} frames would be kept, more than max_item_frames = {self.max_item_frames}; ask for fewer, or "
                "raise limits.max_item_frames"
            )


@dataclass(frozen=True)
class Access:
    """Which named sources may be opened, and what any may cost. Bytes, arrays, images and open files that the program
    holds may be opened always.

    Attributes:
        local_files: whether paths and ``file://`` URLs may be opened.
        remote: whether ``http://`` and ``https://`` URLs may be fetched. The host is not restricted: allow this for
            trusted callers.
        roots: folders below which local files must lie, after all symbolic links of both are followed; None means
            anywhere. They are resolved once, when this is made.
        base: the folder that relative paths of local files begin at; None means the process's working folder.
        limits: what a picture or a video may cost.

    Raises:
        MediaError: a root, or the base, is no path, or no folder is there.
    """

    local_files: bool = True
    remote: bool = False
    roots: tuple[Path, ...] | None = None
    base: Path | None = None
    limits: Limits = Limits()

    def __post_init__(self) -> None:
        if self.base is not None:
            object.__setattr__(self, "base", _folder(self.base, "base"))
        if self.roots is None:
            return
        given: Any = self.roots
        listed = (given,) if isinstance(given, (str, os.PathLike)) else given
        if not isinstance(listed, Iterable):
            raise MediaError(f"roots must be folders, got {given!r}")
        object.__setattr__(self, "roots", tuple(_folder(root, "roots") for root in listed))


ANYWHERE = Access()


def _folder(root: object, name: str) -> Path:
    if not isinstance(root, (str, os.PathLike)):
        raise MediaError(f"{name} must be {'a folder' if name == 'base' else 'folders'}, got {root!r}")
    try:
        folder = Path(root).expanduser().resolve()
        found = folder.is_dir()
    except (OSError, ValueError, RuntimeError) as error:
        raise MediaError(f"{name}: {root!r} cannot be resolved: {error}") from error
    if not found:
        raise MediaError(f"{name}: {str(root)!r} is no folder")
    return folder
