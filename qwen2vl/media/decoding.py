"""Reading video files with PyAV: the time of every frame, then the wanted frames, upright and in RGB or RGBA.

PyAV is imported inside functions, because it is an optional dependency; torch and what needs it is not imported at
all, because the decoding process must start quickly.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from qwen2vl.errors import MediaError, install_hint

MAX_SOURCE_FRAME_PIXELS = 8192 * 8192
MAX_SOURCE_FRAMES = 5_000_000  # 46 hours at 30 frames per second

# Containers that hold everything in one file. Playlists (HLS, DASH, concat) are left out on purpose: they
# would make FFmpeg open other files and addresses that the caller never named.
_CONTAINERS = "mov,matroska,avi,gif,apng,mpegts,mpeg,flv,ogg,asf,mxf,ivf,wav,mp3,flac,aac"
_TIME_SLACK = 1e-3  # seconds: Matroska and FLV round timestamps to milliseconds


def import_av() -> Any:
    """PyAV. Raises MediaError where it is not installed."""
    try:
        import av
    except ImportError as error:
        raise MediaError(f"video files need PyAV: {install_hint('av')}") from error
    return av


@dataclass(frozen=True)
class Timeline:
    """When each frame of a video is shown.

    Attributes:
        ticks: (frames,) int64, increasing: presentation timestamps, or frame numbers where the file has none, or has
            some that begin anew.
        origin: tick of the file's first frame.
        unit: seconds per tick.
        declared_rate: frames per second that the file claims, 0.0 if none.
        numbered: ticks are frame numbers, counted while decoding.
    """

    ticks: np.ndarray
    origin: int
    unit: float
    declared_rate: float
    numbered: bool

    def seconds(self, ticks: Any) -> Any:
        """Seconds since the first frame of the file."""
        return (ticks - self.origin) * self.unit

    @property
    def rate(self) -> float:
        """Frames per second: as declared where the timestamps agree within 1 %, else as measured."""
        if len(self.ticks) == 1:
            return self.declared_rate
        measured = (len(self.ticks) - 1) / (float(self.ticks[-1] - self.ticks[0]) * self.unit)
        # Timestamps are rounded, and a count that falls just below an even number would lose two frames.
        return self.declared_rate if abs(measured - self.declared_rate) <= 0.01 * measured else measured

    @property
    def duration(self) -> float:
        """Seconds, the last frame's own time on screen included."""
        return len(self.ticks) / self.rate if self.rate else 0.0

    def between(self, start: float, end: float, label: str) -> Timeline:
        """The frames from ``start`` to ``end`` in seconds, both included."""
        seconds = self.seconds(self.ticks)
        if start > seconds[-1] + _TIME_SLACK:
            raise MediaError(f"start is {start:g} s, but the last frame of {label} is at {seconds[-1]:.3f} s")
        inside = (seconds >= start - _TIME_SLACK) & (seconds <= end + _TIME_SLACK)
        if not inside.any():
            raise MediaError(f"{label} has no frame between start {start:g} s and end {end:g} s")
        return replace(self, ticks=self.ticks[inside])

    def choose(self, indices: np.ndarray) -> np.ndarray:
        """The ticks to keep, given the frame numbers that would be right at a constant rate.

        At a varying rate these are the frames on screen at len(indices) evenly spaced times.
        """
        even = np.linspace(self.ticks[0], self.ticks[-1], len(self.ticks))
        if np.abs(self.ticks - even).max() * self.unit * self.rate <= 0.5:
            return self.ticks[indices]
        times = np.linspace(self.ticks[0], self.ticks[-1], len(indices))
        return self.ticks[np.searchsorted(self.ticks, times, side="right") - 1]


class KeptFrame(NamedTuple):
    """A decoded frame.

    ``slots``: the places in the clip that it fills. ``pixels``: (H, W, 3) uint8 RGB or (H, W, 4) RGBA, upright.
    ``seconds``: its time. ``pixel_aspect``: the width of a pixel over its height, as it is shown.
    """

    slots: range
    pixels: np.ndarray
    seconds: float
    pixel_aspect: float = 1.0


@contextmanager
def _open_video(file: BinaryIO, label: str) -> Iterator[tuple[Any, Any]]:
    """Open the container from its beginning; yields it and its first video stream. ``file`` stays open."""
    av = import_av()
    file.seek(0)
    try:
        container = av.open(
            file,
            mode="r",  # would otherwise be taken from file.mode
            container_options={"format_whitelist": _CONTAINERS, "protocol_whitelist": "file"},
            metadata_errors="replace",
            buffer_size=1 << 20,
        )
    except Exception as error:  # as in _reading
        raise MediaError(f"{label} is not a video in a supported container, or is damaged: {_reason(error)}") from error
    with container:
        cover = av.stream.Disposition.attached_pic
        streams = [stream for stream in container.streams.video if not stream.disposition & cover]
        if not streams:
            raise MediaError(f"{label} has no video stream")
        context = streams[0].codec_context
        if context is None:
            raise MediaError(f"{label}: no decoder for its video stream")
        _check_frame_size(context.width, context.height, label)
        streams[0].thread_type = "AUTO"
        yield container, streams[0]


def _check_frame_size(width: int, height: int, label: str) -> None:
    if width * height > MAX_SOURCE_FRAME_PIXELS:
        raise MediaError(
            f"{label} has frames of {width} x {height} pixels, more than the limit of {MAX_SOURCE_FRAME_PIXELS}"
        )


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _reading(items: Iterable[Any], label: str) -> Iterator[Any]:
    """``items`` with errors of reading as MediaError; errors of whoever consumes the items pass untouched."""
    iterator = iter(items)
    while True:
        try:
            item = next(iterator)
        except StopIteration:
            return
        except Exception as error:  # over hostile bytes PyAV also stumbles in ways of its own
            raise MediaError(f"{label} is damaged: {_reason(error)}") from error
        yield item


def read_timeline(file: BinaryIO, label: str) -> Timeline:
    """Read all packets without decoding them: containers often report a wrong number of frames, or none.

    Where timestamps begin anew, as in files that were joined byte by byte, frames count in the order of decoding.

    Raises:
        MediaError: not a supported video, no video stream, damaged, no frames, or more than
            MAX_SOURCE_FRAMES.
    """
    with _open_video(file, label) as (container, stream):
        stamps, count, last, restarts = array("q"), 0, -math.inf, False
        for packet in _reading(container.demux(stream), label):
            if packet.size == 0 or packet.is_discard:
                continue
            count += 1
            if count > MAX_SOURCE_FRAMES:
                raise MediaError(f"{label} has more than the limit of {MAX_SOURCE_FRAMES} frames")
            if packet.pts is not None:
                stamps.append(packet.pts)
            if packet.dts is not None:
                restarts, last = restarts or packet.dts < last, packet.dts
        if count == 0:
            raise MediaError(f"{label} holds no video frames")
        rate = float(stream.average_rate or stream.guessed_rate or 0)
        # AVI stores a rate and no times; FFmpeg numbers its packets in coded order, wrong with B-frames.
        if len(stamps) == count and not restarts and container.format.name != "avi":
            ticks = np.unique(np.frombuffer(stamps, np.int64))
            return Timeline(ticks, int(ticks[0]), float(stream.time_base), rate, numbered=False)
        if rate == 0:
            missing = "timestamps that begin anew, and no" if restarts else "neither timestamps nor a"
            raise MediaError(f"{label} reports {missing} frame rate")
        return Timeline(np.arange(count), 0, 1 / rate, rate, numbered=True)


def kept_frames(file: BinaryIO, label: str, timeline: Timeline, wanted: np.ndarray) -> Iterator[KeptFrame]:
    """Decode the frames at the ticks ``wanted`` (increasing, repeats allowed), whose places are the slots.

    A frame that the file lacks is replaced by the next one, or at the end by the last.
    """
    slot, last = 0, None
    for shown in _presented_frames(file, label, timeline, int(wanted[0])):
        last = shown
        until = int(np.searchsorted(wanted, shown[0], side="right"))
        if until > slot:
            yield _kept(range(slot, until), *shown, label, timeline)
            slot = until
        if slot == len(wanted):
            return
    if last is None:
        raise MediaError(f"{label} is damaged: no frame could be decoded")
    yield _kept(range(slot, len(wanted)), *last, label, timeline)


def _presented_frames(file: BinaryIO, label: str, timeline: Timeline, first: int) -> Iterator[tuple[int, Any, float]]:
    """(tick, frame, pixel aspect as coded) in order of presentation, beginning at or before tick ``first``."""
    av = import_av()
    if first > timeline.origin and not timeline.numbered:
        with _open_video(file, label) as (container, stream):
            frames = _ticked_frames(container, stream, label, timeline)
            try:
                container.seek(first, stream=stream)
                head = next(frames, None)
            except (av.FFmpegError, MediaError):
                head = None  # seeking only saves time: without a usable index the file is read from its start
            if head is not None and head[0] <= first:
                yield head
                yield from frames
                return
    with _open_video(file, label) as (container, stream):
        yield from _ticked_frames(container, stream, label, timeline)


def _ticked_frames(container: Any, stream: Any, label: str, timeline: Timeline) -> Iterator[tuple[int, Any, float]]:
    tick = -1
    for frame in _reading(container.decode(stream), label):
        stamp = frame.pts if frame.pts is not None else frame.dts
        tick = tick + 1 if timeline.numbered or stamp is None else stamp
        # The container's word counts before that of the coded frames; 0 stands for none.
        yield tick, frame, float(stream.sample_aspect_ratio or 0) or 1.0


def _kept(slots: range, tick: int, frame: Any, aspect: float, label: str, timeline: Timeline) -> KeptFrame:
    av = import_av()
    _check_frame_size(frame.width, frame.height, label)
    has_alpha = any(component.is_alpha for component in frame.format.components)
    try:
        pixels = frame.to_ndarray(format="rgba" if has_alpha else "rgb24")
    except Exception as error:  # as in _reading
        raise MediaError(f"{label}: frames of format {frame.format.name} fail: {_reason(error)}") from error
    matrix = frame.side_data.get(av.sidedata.sidedata.Type.DISPLAYMATRIX)
    pixels, aspect = _upright(pixels, aspect, matrix)
    return KeptFrame(slots, pixels, float(timeline.seconds(tick)), aspect)


def _upright(pixels: np.ndarray, aspect: float, matrix: Any) -> tuple[np.ndarray, float]:
    """Rotate or mirror a frame as the container asks, by the nearest multiple of a right angle; with its pixel aspect.

    ``matrix`` is 3 x 3 int32 in row-major order: (x, y) goes to (a x + c y, b x + d y) with its first rows
    (a, b, 0) and (c, d, 0). None leaves the frame as it is.
    """
    if matrix is None:
        return pixels, aspect
    a, b, _, c, d = (int(value) for value in np.frombuffer(matrix, np.int32)[:5])
    if abs(b) > abs(a):
        pixels, aspect, a, d = pixels.transpose(1, 0, 2), 1 / aspect, c, b
    return pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1], aspect
