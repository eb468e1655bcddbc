"""Decoding in a process of its own, which a broken file may crash, hang or fill, but never the caller's.

The child imports neither PyTorch nor our kernels and is up in a third of a second. It inherits the open file, reads its
timeline, is told which frames are wanted, and sends them through a pipe while the parent resizes the one before. The
child sends numbers, which are checked, and pixels.

Against a decoder that its input has taken over: the child has none of the parent's environment, and no descriptors but
its pipes and the video, read-only or a copy. Before it reads the video it gives up, for good, the opening of files and
sockets, the writing of files, and more memory, time and processes than a video takes; its processes end with it. It
runs as the same user and may make system calls that need no descriptor, such as signals to that user's processes. So it
holds off accidents and simple attacks, and is no sandbox that filters system calls: no binding to libseccomp is kept
up. Whoever decodes what enemies send runs the whole program in a container.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import math
import os
import pkgutil
import queue
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any, BinaryIO

import numpy as np

from qwen2vl.errors import MediaError, install_hint
from qwen2vl.media.decoding import (
    MAX_SOURCE_FRAME_PIXELS,
    MAX_SOURCE_FRAMES,
    KeptFrame,
    Timeline,
    import_av,
    kept_frames,
    read_timeline,
)

_LENGTH = struct.Struct("<I")  # of the JSON that begins a message; pixels and ticks follow it
_MAX_JSON = 1 << 20
_MEMORY = 8 << 30  # bytes of address space that the child may take
_PROCESSES = 1024  # threads of the user that may be added while a child runs: other children's are among them
_AHEAD = 2  # frames that wait in the parent, so that decoding goes on while one is resized
#: What the loader of an executable reads to find libraries; nothing else of the parent's environment is passed on.
_LOADER = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "DYLD_FALLBACK_LIBRARY_PATH", "SYSTEMROOT")
_PIXEL = b"GIF89a\1\0\1\0\x80\0\0\0\0\0\xff\xff\xff,\0\0\0\0\1\0\1\0\0\2\2D\1\0;"  # a video of one
_NO_FRAME = "the decoder sent something that is no frame"
_CHILD = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from qwen2vl.media.process import serve; serve(int(sys.argv[2]), int(sys.argv[3]))"
)


def _sanitised(text: object) -> str:
    """One line of printable characters, of bounded length."""
    line = "".join(c if c.isprintable() else " " for c in str(text))
    return line if len(line) <= 500 else line[:500] + "..."


# ----------------------------------------------------------------------------------------------------------- parent


class Decoder:
    """One video being decoded by a child process. Use it as a context manager; leaving it ends the child.

    Args:
        file: the video, open for reading.
        label: its name in messages.
        timeout: seconds for the whole video, reading and waiting for the caller included; ``None`` for no limit.

    Raises:
        MediaError: as ``read_timeline`` and ``kept_frames`` do; the time is up; the child crashed.
    """

    def __init__(self, file: BinaryIO, label: str, timeout: float | None):
        if find_spec("av") is None:
            raise MediaError(f"video files need PyAV: {install_hint('av')}")
        if not sys.executable:
            raise MediaError(f"{label}: no Python executable is known to decode it in; pass isolate=False")
        self._label, self._timeout = label, timeout
        self._deadline = math.inf if timeout is None else time.monotonic() + timeout
        self._stop = threading.Event()
        self._messages: queue.Queue[tuple[dict[str, Any], np.ndarray | None] | None] = queue.Queue(_AHEAD)
        paths = json.dumps([os.path.abspath(path) for path in sys.path])
        # One thread and one heap arena: more of either would reserve address space for every core, which is limited.
        environment = {name: os.environ[name] for name in _LOADER if name in os.environ}
        environment |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
        seconds = 0 if timeout is None else math.ceil(timeout * (os.cpu_count() or 1)) + 60
        with _as_real_file(file, label) as real:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-c", _CHILD, paths, str(real.fileno()), str(seconds)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                pass_fds=[real.fileno()],
                env=environment,
                start_new_session=True,  # so that all that it may start ends with it
            )
        self._reader = threading.Thread(target=self._read, name="qwen2vl video frames", daemon=True)
        self._reader.start()

    def __enter__(self) -> Decoder:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        if self._process.returncode is None:  # else its number may be another's by now
            with contextlib.suppress(OSError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.wait()
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()

    def timeline(self) -> Timeline:
        """When each frame is shown."""
        self._tell({"label": self._label})
        message, ticks = self._next()
        with self._checked():
            origin, unit, rate, numbered = (message[k] for k in ("origin", "unit", "declared_rate", "numbered"))
            if ticks is None or not len(ticks) or not (np.diff(ticks) > 0).all() or not 0 < float(unit) < math.inf:
                raise ValueError
            return Timeline(ticks, int(origin), float(unit), float(rate), bool(numbered))

    def kept_frames(self, wanted: np.ndarray) -> Iterator[KeptFrame]:
        """What ``qwen2vl.media.decoding.kept_frames`` yields in the child."""
        self._tell({"wanted": wanted.tolist()})
        done = 0
        while done < len(wanted):
            message, frame = self._next()
            with self._checked():
                slots = range(done, int(message["until"]))
                if frame is None or frame.ndim != 3 or not slots or slots.stop > len(wanted):
                    raise ValueError
                seconds, aspect = float(message["seconds"]), float(message["pixel_aspect"])
                if not 0 < aspect < math.inf:
                    raise ValueError
            done = slots.stop
            yield KeptFrame(slots, frame, seconds, aspect)

    def _tell(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # a child that is gone is reported by what it did not send
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()

    def _next(self) -> tuple[dict[str, Any], np.ndarray | None]:
        left = self._deadline - time.monotonic()
        try:
            received = self._messages.get(timeout=None if math.isinf(left) else max(left, 0.0))
        except queue.Empty:
            raise MediaError(
                f"{self._label} was not decoded within video_timeout = {self._timeout:g} s; raise limits.video_timeout"
            ) from None
        if received is None:
            raise MediaError(f"{self._label}: {self._ending()}")
        if "error" in received[0]:
            raise MediaError(_sanitised(received[0]["error"]))
        return received

    def _ending(self) -> str:
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "the decoder closed its pipe"
        if code < 0:
            name = next((s.name for s in signal.Signals if s == -code), "unknown")
            return f"the decoder crashed (signal {-code}, {name})"
        return f"the decoder ended early (exit status {code})"

    @contextlib.contextmanager
    def _checked(self) -> Iterator[None]:
        try:
            yield
        except (KeyError, TypeError, ValueError, OverflowError):
            raise MediaError(f"{self._label}: {_NO_FRAME}") from None

    def _read(self) -> None:
        """Run by the reading thread: put messages into the queue until the child is done or gone."""
        assert self._process.stdout is not None
        received: tuple[dict[str, Any], np.ndarray | None] | None = None
        try:
            while not self._stop.is_set():
                received = _receive(self._process.stdout)  # type: ignore[arg-type]
                self._put(received)
        except (EOFError, OSError):
            self._put(None)
        except Exception:  # whatever a child's bytes can lead to
            self._put(({"error": f"{self._label}: {_NO_FRAME}"}, None))

    def _put(self, message: tuple[dict[str, Any], np.ndarray | None] | None) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(queue.Full):
                return self._messages.put(message, timeout=0.1)


@contextlib.contextmanager
def _as_real_file(file: BinaryIO, label: str) -> Iterator[BinaryIO]:
    """``file`` itself where it is one of the operating system's and cannot be written to, else a temporary copy."""
    raw = file.raw if isinstance(file, io.BufferedReader) else file
    if isinstance(raw, io.FileIO) and not raw.writable():
        yield file
        return
    with tempfile.TemporaryFile() as copy:
        try:
            file.seek(0)
            shutil.copyfileobj(file, copy, 1 << 20)
        except Exception as error:  # a file object of the caller's may fail in its own ways
            raise MediaError(f"{label} is damaged: {_sanitised(error)}") from error
        copy.flush()
        yield copy  # type: ignore[misc]


def _receive(pipe: BinaryIO) -> tuple[dict[str, Any], np.ndarray | None]:
    size = _LENGTH.unpack(_exactly(pipe, _LENGTH.size))[0]
    if size > _MAX_JSON:
        raise ValueError
    message = json.loads(bytes(_exactly(pipe, size)))
    if not isinstance(message, dict):
        raise ValueError
    shape = message.get("shape")
    if shape is None:
        return message, None
    if len(shape) == 1:
        ticks = min(int(shape[0]), MAX_SOURCE_FRAMES)
        return message, np.frombuffer(_exactly(pipe, 8 * ticks), np.int64)
    height, width, channels = (int(side) for side in shape)
    if min(height, width) < 1 or height * width > MAX_SOURCE_FRAME_PIXELS or channels not in (3, 4):
        raise ValueError
    return message, np.frombuffer(_exactly(pipe, height * width * channels), np.uint8).reshape(height, width, channels)


def _exactly(pipe: BinaryIO, size: int) -> memoryview:
    buffer: memoryview = np.empty(size, np.uint8).data
    done = 0
    while done < size:
        count = pipe.readinto(buffer[done:])  # type: ignore[attr-defined]
        if not count:
            raise EOFError
        done += count
    return buffer


# ------------------------------------------------------------------------------------------------------------ child


def serve(descriptor: int, seconds: int) -> None:
    """Run by the child: serve one video, with requests on stdin and messages on what was stdout.

    Args:
        descriptor: of the video.
        seconds: of all cores together that it may take, 0 for no limit.
    """
    pipe = os.fdopen(os.dup(1), "wb", buffering=0)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)  # whatever a library prints must not mix with frames
    _import_all(import_av())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; it ends the child
    asked: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(asked,), daemon=True).start()
    _limit_resources(seconds)

    def send(message: dict[str, Any], payload: Any = b"") -> None:
        head = json.dumps(message).encode()
        for part in (_LENGTH.pack(len(head)) + head, payload):
            view = memoryview(part).cast("B")
            while len(view):
                view = view[pipe.write(view) :]

    label = json.loads(asked.get())["label"]
    try:
        with os.fdopen(descriptor, "rb") as file:
            timeline = read_timeline(file, label)
            facts = {k: getattr(timeline, k) for k in ("origin", "unit", "declared_rate", "numbered")}
            send(facts | {"shape": [len(timeline.ticks)]}, np.ascontiguousarray(timeline.ticks, np.int64))
            wanted = np.array(json.loads(asked.get())["wanted"], np.int64)
            for kept in kept_frames(file, label, timeline, wanted):
                facts = {"until": kept.slots.stop, "seconds": kept.seconds, "pixel_aspect": kept.pixel_aspect}
                send(facts | {"shape": kept.pixels.shape}, np.ascontiguousarray(kept.pixels))
    except MediaError as error:
        send({"error": str(error)})
    except MemoryError:
        send({"error": f"{label} needs more memory than a video may take to decode"})
    except BrokenPipeError:
        pass  # the parent has seen enough


def _listen(asked: queue.SimpleQueue[bytes]) -> None:
    """Run by a thread of the child: take requests, a line each, and end the child at once when the parent is gone."""
    rest = b""
    while data := os.read(0, 1 << 16):
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            asked.put(line)
    os._exit(1)


def _import_all(package: Any) -> None:
    """Import what decoding may need: later, no file can be opened.

    PyAV and NumPy import parts of theirs when they are first called, PyAV some by the kinds of streams in a file.
    """
    for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if not found.name.endswith(".__main__"):
            with contextlib.suppress(ImportError):
                importlib.import_module(found.name)
    clip = io.BytesIO(_PIXEL)
    timeline = read_timeline(clip, "a pixel")
    for _ in kept_frames(clip, "a pixel", timeline, timeline.ticks):
        pass


def _limit_resources(seconds: int) -> None:
    """Give up what a decoder needs no more, for good: the hard limits fall, too."""
    try:
        import resource
    except ImportError:
        return
    limits = {"RLIMIT_AS": _MEMORY, "RLIMIT_CORE": 0, "RLIMIT_FSIZE": 0, "RLIMIT_NOFILE": 0}
    if seconds:
        limits["RLIMIT_CPU"] = seconds
    if (running := _threads_of_user()) is not None:
        limits["RLIMIT_NPROC"] = running + _PROCESSES
    for name, most in limits.items():
        with contextlib.suppress(OSError, ValueError, AttributeError):
            kind = getattr(resource, name)
            hard = resource.getrlimit(kind)[1]
            most = most if hard == resource.RLIM_INFINITY else min(most, hard)
            resource.setrlimit(kind, (most, most))


def _threads_of_user() -> int | None:
    """How many threads this user runs, which is what a limit of processes counts; None where nothing tells."""
    count, me = 0, os.getuid()
    try:
        for name in filter(str.isdecimal, os.listdir("/proc")):
            with contextlib.suppress(OSError):  # it has ended meanwhile
                if os.stat(f"/proc/{name}").st_uid == me:
                    count += len(os.listdir(f"/proc/{name}/task"))
    except OSError:
        return None
    return count
