"""Videos to patches: which frames, at which size, decoded as a stream.

A file is read twice: once without decoding, for the time of every frame, because containers often report a
wrong number of frames or none; then decoded, where only the frames that are kept are converted, resized and
written straight into the result. Memory is bounded by the result, not by the length of the video.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from qwen2vl.errors import MediaError
from qwen2vl.media.animation import Animation
from qwen2vl.media.decoding import KeptFrame, kept_frames, read_timeline
from qwen2vl.media.extent import extent
from qwen2vl.media.image import count_frames, load_image, open_image, smart_resize, warn
from qwen2vl.media.kinds import picture_format
from qwen2vl.media.options import (
    ANYWHERE,
    DEFAULTS,
    RELEASED_SHAPE,
    Access,
    Limits,
    MediaOptions,
    PatchShape,
    check_number,
    check_positive_int,
)
from qwen2vl.media.patches import PatchBuffer
from qwen2vl.media.process import Decoder
from qwen2vl.media.sources import data_uri_frames, describe_source, open_source, unwrap_source

MAX_VIDEO_BYTES = 4 << 30  # for what has to be downloaded or copied; a file on disk may be larger
_ALSO = ", a list of frames or a numpy array of frames (n, height, width, 3)"
_LATE = 1e-3  # seconds that a frame's time may differ from the one that was asked for, by rounding
Progress = Callable[[int, int], object]
Reserve = Callable[[int], object]


@dataclass(frozen=True, eq=False)
class VideoPatches:
    """What a video becomes.

    Attributes:
        patches: (t * gh * gw, 3 * temporal_patch_size * patch_size**2) uint8, rows in merge-block order.
        grid_thw: (t, gh, gw): time steps of temporal_patch_size frames, then patches.
        source_size: (height, width) of the first kept frame in pixels, upright, before resizing; where they are not
            squares, the width is what it has when it is shown.
        resized_size: (height, width) in pixels that the patches of a frame cover.
        duration: seconds of the part that was sampled; 0.0 where a single frame has no duration.
        native_fps: frames per second of that part in the source; 0.0 where a single frame has no rate.
        frame_times: seconds from the start of the video of every kept frame.
        merge_size: side of the square of patches that becomes one token.
    """

    patches: np.ndarray
    grid_thw: tuple[int, int, int]
    source_size: tuple[int, int]
    resized_size: tuple[int, int]
    duration: float
    native_fps: float
    frame_times: tuple[float, ...]
    merge_size: int = 2

    @property
    def num_tokens(self) -> int:
        """Tokens in the prompt, without the two vision marks."""
        return math.prod(self.grid_thw) // self.merge_size**2


def frame_count(total_frames: int, native_fps: float, options: MediaOptions = DEFAULTS) -> int:
    """How many frames of a video to keep; always even.

    With ``num_frames``: that number, rounded to even (ties as in ``round``). Otherwise ``fps`` frames for every
    second, at least ``min_frames`` (rounded up to even), at most ``max_frames`` and ``total_frames`` (each rounded
    down to even). A video of one frame gives 2: the frame twice.

    Raises:
        MediaError: an argument is out of range, or ``num_frames`` lies outside of [2, total_frames].
    """
    total_frames = check_positive_int("total_frames", total_frames)
    if options.num_frames is not None:
        count = round(options.num_frames / 2) * 2
        if total_frames == 1:
            return 2
        if not 2 <= count <= total_frames:
            raise MediaError(
                f"num_frames must round to an even number in [2, {total_frames}], got {options.num_frames}"
            )
        return count
    fewest, most = -(-options.min_frames // 2) * 2, options.max_frames // 2 * 2
    if fewest > most:
        raise MediaError(
            f"min_frames {options.min_frames} and max_frames {options.max_frames} leave no even number of frames"
        )
    if total_frames == 1:
        return 2
    most = min(most, total_frames // 2 * 2)
    wanted = total_frames / check_number("native_fps", native_fps) * options.fps
    return math.floor(min(max(wanted, fewest), most, total_frames) / 2) * 2


def frame_indices(total_frames: int, count: int) -> np.ndarray:
    """(count,) int64: frames spread evenly from the first to the last, both included."""
    check_positive_int("total_frames", total_frames)
    return np.linspace(0, total_frames - 1, check_positive_int("count", count)).round().astype(np.int64)


def frame_size(
    height: int, width: int, num_frames: int, options: MediaOptions = DEFAULTS, shape: PatchShape = RELEASED_SHAPE
) -> tuple[int, int]:
    """The (height, width) in pixels at which the model sees every frame of a clip.

    ``smart_resize`` within [video_min_pixels, video_max_pixels], where both shrink as far as needed for the whole clip
    to stay within ``max_video_tokens``. That cap always holds; every side is at least ``shape.factor``.

    Raises:
        MediaError: arguments that ``smart_resize`` refuses, or more time steps than ``max_video_tokens``.
    """
    low, high, factor = options.video_min_pixels, options.video_max_pixels, shape.factor
    steps = -(-check_positive_int("num_frames", num_frames) // shape.temporal_patch_size)
    budget = options.max_video_tokens // steps  # tokens for one time step
    if budget < 1:
        raise MediaError(
            f"{num_frames} frames are {steps} time steps of at least one token each, more than max_video_tokens = "
            f"{options.max_video_tokens}: keep fewer frames"
        )
    smart_resize(height, width, factor=factor, min_pixels=low, max_pixels=high)  # checks all arguments
    cap = min(high, budget * factor**2)
    size = smart_resize(height, width, factor=factor, min_pixels=min(low, cap), max_pixels=cap)
    rows, cols = size[0] // factor, size[1] // factor
    if rows * cols > budget:  # rounding upwards to reach the lower limit went past the cap
        scale = math.sqrt(budget / (height * width))
        rows, cols = max(1, math.floor(height * scale)), max(1, math.floor(width * scale))
        # A thin frame has one side held at 1, which leaves the other above the budget.
        rows, cols = min(rows, budget // cols or 1), min(cols, budget // rows or 1)
    return rows * factor, cols * factor


class _ClipWriter:
    """Resizes kept frames to the size that the first one fixes, and writes their patches."""

    def __init__(
        self,
        label: str,
        count: int,
        options: MediaOptions,
        shape: PatchShape,
        resized: tuple[int, int] | None,
        progress: Progress | None,
        limits: Limits,
        reserve: Reserve | None,
    ):
        self.label, self.count, self.options, self.shape = label, count, options, shape
        self.resized, self.progress, self.limits, self.reserve = resized, progress, limits, reserve
        self.times: list[float] = []
        self.buffer: PatchBuffer | None = None
        self.source_size = (0, 0)
        try:
            limits.check_frames(count)
        except MediaError as error:
            raise MediaError(f"{label}: {error}") from None
        if progress is not None:
            progress(0, count)

    def put(self, kept: KeptFrame) -> None:
        buffer = self.buffer or self._allocate(kept)
        for slot in kept.slots:
            buffer.put(slot, kept.pixels)
            self.times.append(kept.seconds)
        if self.progress is not None:
            self.progress(len(self.times), self.count)

    def _allocate(self, kept: KeptFrame) -> PatchBuffer:
        height, width = kept.pixels.shape[:2]
        self.source_size = (height, max(1, round(width * kept.pixel_aspect)))
        try:
            height, width = frame_size(*(self.resized or self.source_size), self.count, self.options, self.shape)
            steps = -(-self.count // self.shape.temporal_patch_size)
            tokens = steps * (height // self.shape.factor) * (width // self.shape.factor)
            self.limits.check_item(tokens)
        except MediaError as error:
            raise MediaError(f"{self.label}: {error}") from None
        if self.reserve is not None:
            self.reserve(tokens)
        self.buffer = PatchBuffer(self.count, height, width, self.shape)
        return self.buffer

    def finish(self, duration: float, native_fps: float) -> VideoPatches:
        assert self.buffer is not None and len(self.times) == self.count
        return VideoPatches(
            patches=self.buffer.patches,
            grid_thw=self.buffer.grid_thw,
            source_size=self.source_size,
            resized_size=(self.buffer.height, self.buffer.width),
            duration=duration,
            native_fps=native_fps,
            frame_times=tuple(self.times),
            merge_size=self.shape.merge_size,
        )


def preprocess_video(
    source: object,
    options: MediaOptions = DEFAULTS,
    *,
    start: float | None = None,
    end: float | None = None,
    resized_height: int | None = None,
    resized_width: int | None = None,
    access: Access = ANYWHERE,
    shape: PatchShape = RELEASED_SHAPE,
    progress: Progress | None = None,
    reserve: Reserve | None = None,
    isolate: bool = True,
    **given: Any,
) -> VideoPatches:
    """Sample a video, resize its frames and cut them into patches.

    Args:
        source: path, ``file://`` URL, http(s) URL, base64 ``data:`` URI, bytes or binary file object of a video (MP4,
            MOV, Matroska, WebM, AVI, GIF, MPEG-TS and others that FFmpeg reads; animated WebP), or a dict ``{"bytes":
            ..., "path": ...}`` of one of them; or the frames: a list or tuple of anything that ``load_image`` takes, an
            array (T, H, W, C), a TIFF of several pages, or ``data:video/jpeg;base64,F1,F2`` of JPEG pictures joined by
            commas. Given frames are all kept, unless ``num_frames`` asks for fewer, and are taken to be ``fps`` a
            second.
        options: which frames are kept, see ``frame_count``, and at which size, see ``frame_size``.
        start, end: seconds from the first frame of a file; frames within, ends included, are sampled.
        resized_height, resized_width: ask for this frame size instead of the source's own (give both).
        access: which files and URLs may be opened, those of frames included, and what a video may cost; without
            ``isolate`` the time that decoding takes is watched of animations only.
        shape: of the patches.
        progress: called as ``progress(kept frames done, kept frames in all)``, first with 0.
        reserve: called with the number of tokens before there is room for them; what it raises is passed on.
        isolate: decode files in a process of their own, which costs a third of a second to start and lets decoding
            and resizing overlap; a file that crashes or hangs the decoder is then refused like any damaged one.
        given: options by name, over ``options``.

    Where a file says that its pixels are no squares (``sample_aspect_ratio``: DVDs, camcorders, anamorphic film), its
    frames have the shape that players show.

    Frames of a file with even timestamps are chosen by number (``frame_indices``); where the rate varies, the
    frames on screen at evenly spaced times are. Should a file decode to fewer frames than it holds, its last
    frame stands for the missing ones, and ``frame_times`` and a MediaWarning say so; a file that is shorter than it
    says gives a MediaWarning, too.

    Raises:
        MediaError: the source is forbidden, unreadable, damaged, without video or too large; an argument is out of
            range; PyAV is missing.
        TypeError: ``given`` holds an unknown name.
    """
    if given:
        options = options.updated(given)
    if (resized_height is None) != (resized_width is None):
        raise MediaError(f"resized_height and resized_width go together, got {resized_height!r} and {resized_width!r}")
    resized = None if resized_height is None or resized_width is None else (resized_height, resized_width)
    # Wrong arguments are found before anything is opened or downloaded: the smallest clip has to pass.
    frame_count(1, 1.0, options)
    frame_size(100, 100, 2, options, shape)
    begin = 0.0 if start is None else check_number("start", start, zero=True)
    stop = math.inf if end is None else check_number("end", end)
    limits = access.limits
    if stop <= begin:
        raise MediaError(f"end must be after start, got start {begin:g} s and end {stop:g} s")

    source = unwrap_source(source)
    source = data_uri_frames(source) or source
    if isinstance(source, (list, tuple)) or (isinstance(source, np.ndarray) and source.ndim == 4):
        if start is not None or end is not None:
            raise MediaError("start and end apply to video files, not to a list of frames")
        return _from_frames(source, options, shape, resized, progress, access, reserve)
    if isinstance(source, (np.ndarray, Image.Image)):
        raise MediaError(f"{describe_source(source)} is one image: give a video or a list of frames")
    label = describe_source(source)
    with ExitStack() as stack:
        file = stack.enter_context(open_source(source, max_bytes=MAX_VIDEO_BYTES, access=access, also=_ALSO))
        animation = _open_animation(file, label, limits, stack)
        if animation is not None and picture_format(_head(file)) == "TIFF":
            if start is not None or end is not None:
                raise MediaError(f"start and end apply to what has times, not to the pages of {label}")
            return _from_frames(animation, options, shape, resized, progress, access, reserve)
        try:
            reach = extent(file)  # before a decoding process shares the file's position
        except Exception as error:  # a file object of the caller's may fail in its own ways
            raise MediaError(f"{label} is damaged: {error}") from error
        if reach.second is not None:
            raise MediaError(
                f"{label} is two files joined byte by byte, the second from byte {reach.second} on, and would be seen "
                "in part or wrongly: give them one by one, or join them with FFmpeg's concat"
            )
        decoder = animation or (stack.enter_context(Decoder(file, label, limits.video_timeout)) if isolate else None)
        timeline = decoder.timeline() if decoder else read_timeline(file, label)
        timeline = timeline.between(begin, stop, label)
        count = frame_count(len(timeline.ticks), timeline.rate or 1.0, options)
        wanted = timeline.choose(frame_indices(len(timeline.ticks), count))
        writer = _ClipWriter(label, count, options, shape, resized, progress, limits, reserve)
        frames = decoder.kept_frames(wanted) if decoder else kept_frames(file, label, timeline, wanted)
        for kept in frames:
            writer.put(kept)
    seen, last = writer.times[-1], float(timeline.seconds(wanted[-1]))
    if reach.missing is not None:
        warn(f"{label} ends early: {reach.missing}, and is seen up to {seen:.3f} s")
    elif seen < last - _LATE:
        warn(f"{label} decodes up to {seen:.3f} s only, of {last:.3f} s: its last frame stands for those behind it")
    return writer.finish(timeline.duration, timeline.rate)


def _head(file: BinaryIO) -> bytes:
    file.seek(0)
    return file.read(64)


def _open_animation(file: BinaryIO, label: str, limits: Limits, stack: ExitStack) -> Animation | None:
    """An animated WebP or a TIFF of several pages; None for what FFmpeg is to read. Refuses single pictures."""
    format = picture_format(_head(file))
    if format is None:
        return None
    image = stack.enter_context(open_image(file, label, limits))
    if count_frames(image) < 2 or format == "HEIF":  # of which FFmpeg would show the tiles
        raise MediaError(f"{label} is a picture ({format}), not a video: give it as an image, or several in a list")
    return Animation(image, label, limits) if format in ("WEBP", "TIFF") else None


def _from_frames(
    frames: Sequence[object] | np.ndarray | Animation,
    options: MediaOptions,
    shape: PatchShape,
    resized: tuple[int, int] | None,
    progress: Progress | None,
    access: Access,
    reserve: Reserve | None,
) -> VideoPatches:
    total, fps = len(frames), options.fps
    if total == 0:
        raise MediaError("a video given as a list of frames must not be empty")
    kept = range(total)
    if options.num_frames is not None:
        kept = frame_indices(total, frame_count(total, fps, options)).tolist()
    writer = _ClipWriter("list of frames", len(kept), options, shape, resized, progress, access.limits, reserve)
    for slot, index in enumerate(kept):
        try:
            frame = load_image(frames[index], access=access)
        except MediaError as error:
            raise MediaError(f"frame {index} of the list: {error}") from error
        writer.put(KeptFrame(range(slot, slot + 1), frame, index / fps))
    return writer.finish(total / fps, fps)
