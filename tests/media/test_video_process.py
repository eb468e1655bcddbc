"""The process that decodes videos: its crashes, hangs and lies reach the caller as MediaError, and nothing is left."""

import json
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from typing import Any

import av
import numpy as np
import psutil
import pytest
from PIL import Image

import qwen2vl.media.process
import qwen2vl.media.video
from qwen2vl.errors import MediaError
from qwen2vl.media.options import Access, Limits
from qwen2vl.media.patches import PatchBuffer
from qwen2vl.media.video import preprocess_video
from tests.media.media_fixtures import encode_image, noise, numbered, video_bytes


def children():
    return [child for child in psutil.Process().children() if "qwen2vl.media.process" in " ".join(child.cmdline())]


@pytest.fixture(scope="module")
def large():
    """60 frames of 0.9 MB: far more than the pipe and the queue hold."""
    return video_bytes([noise(480, 640, seed=n) for n in range(60)], options={"preset": "ultrafast"})


@pytest.fixture
def child_says(monkeypatch):
    """Replace the child's program."""
    return lambda program: monkeypatch.setattr(qwen2vl.media.process, "_CHILD", program)


@pytest.mark.parametrize(
    ("source", "options"),
    [
        (video_bytes(numbered(40)), {"num_frames": 8}),
        (video_bytes(numbered(40), format="avi", codec="mpeg4"), {"start": 0.5, "end": 1.0}),
        (encode_image(Image.fromarray(noise(40, 30)), "GIF"), {}),  # decoded with opacity
    ],
)
def test_the_same_video_as_without_the_process(source, options):
    apart, here = (preprocess_video(source, isolate=isolate, **options) for isolate in (True, False))
    np.testing.assert_array_equal(apart.patches, here.patches)
    assert (apart.frame_times, apart.duration, apart.native_fps) == (here.frame_times, here.duration, here.native_fps)


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL])
def test_a_crash_in_the_middle(large, number):
    def crash(done, total):
        if done == 3:
            (child,) = children()
            os.kill(child.pid, number)

    name = signal.Signals(number).name
    with pytest.raises(MediaError, match=rf"the decoder crashed \(signal {int(number)}, {name}\)"):
        preprocess_video(large, num_frames=60, progress=crash)
    assert not children()


def test_a_hang_ends_with_the_time(child_says, large):
    child_says("import time; time.sleep(100)  # qwen2vl.media.process")
    begin = time.monotonic()
    with pytest.raises(MediaError, match=r"was not decoded within video_timeout = 0.3 s"):
        preprocess_video(large, access=Access(limits=Limits(video_timeout=0.3)))
    assert time.monotonic() - begin < 30 and not children()
    wrong: Any
    for wrong in (0, -1, float("nan"), "1"):
        with pytest.raises(MediaError, match="video_timeout must be a finite number > 0"):
            Limits(video_timeout=wrong)


def test_an_early_end_is_told(child_says, large):
    child_says("raise SystemExit(3)")
    with pytest.raises(MediaError, match=r"the decoder ended early \(exit status 3\)"):
        preprocess_video(large)


def message(content, payload=b""):
    head = json.dumps(content).encode()
    return struct.pack("<I", len(head)) + head + payload


TIMELINE = {"origin": 0, "unit": 0.1, "declared_rate": 10.0, "numbered": False}
GOOD = message(TIMELINE | {"shape": [4]}, np.arange(4).tobytes())
LIES = [
    b"x" * 5000,
    struct.pack("<I", 2**31) + b"{}",
    message([1, 2]),
    message({}),
    message(TIMELINE | {"shape": [0]}),
    message(TIMELINE | {"shape": [3]}, np.array([2, 1, 0]).tobytes()),
    message(TIMELINE | {"unit": float("nan"), "shape": [2]}, np.arange(2).tobytes()),
    GOOD + message({"until": 1, "seconds": 0.0, "pixel_aspect": 1.0}),
    GOOD + message({"until": 99, "seconds": 0.0, "pixel_aspect": 1.0, "shape": [1, 1, 3]}, b"123"),
    GOOD + message({"until": 0, "seconds": 0.0, "pixel_aspect": 1.0, "shape": [1, 1, 3]}, b"123"),
    GOOD + message({"until": 1, "seconds": "x", "pixel_aspect": 1.0, "shape": [1, 1, 3]}, b"123"),
    GOOD + message({"until": 1, "seconds": 0.0, "pixel_aspect": 1.0, "shape": [2**20, 2**20, 3]}),
    GOOD + message({"until": 1, "seconds": 0.0, "pixel_aspect": 1.0, "shape": [-1, 1, 3]}),
    GOOD + message({"until": 1, "seconds": 0.0, "pixel_aspect": 1.0, "shape": [1, 1, 2]}, b"12"),
    GOOD + message({"until": 1, "seconds": 0.0, "pixel_aspect": 1.0, "shape": "abc"}),
    *(
        GOOD + message({"until": 1, "seconds": 0.0, "pixel_aspect": aspect, "shape": [1, 1, 3]}, b"123")
        for aspect in (None, "x", 0, -1.0, float("nan"), float("inf"))
    ),
]


@pytest.mark.parametrize("lie", LIES)
def test_what_is_no_frame_is_refused(child_says, large, lie):
    child_says(f"import sys; sys.stdout.buffer.write({lie!r}); sys.stdout.flush(); sys.stdin.read()")
    with pytest.raises(MediaError, match="the decoder sent something that is no frame"):
        preprocess_video(large, access=Access(limits=Limits(video_timeout=60)))
    assert not children()


def test_messages_are_one_printable_line(child_says, large):
    lie = message({"error": "a\nb\x1b[31m" + "c" * 2000})
    child_says(f"import sys; sys.stdout.buffer.write({lie!r}); sys.stdout.flush(); sys.stdin.read()")
    with pytest.raises(MediaError) as caught:
        preprocess_video(large)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 600


# Runs in the child's place: what it finds, and what it still can when its limits are set, goes out as an error.
PROBE = """
import json, sys; sys.path[:] = json.loads(sys.argv[1])
import ctypes, fcntl, os, resource, socket, struct
from qwen2vl.media import process
found = {"environment": sorted(os.environ), "leads a session": os.getsid(0) == os.getpid()}
names = os.listdir("/proc/self/fd")  # one of them was of this list
found["descriptors"] = sorted(int(name) for name in names if os.path.exists(f"/proc/self/fd/{name}"))
video = int(sys.argv[2])
found["video"] = fcntl.fcntl(video, fcntl.F_GETFL) & os.O_ACCMODE
def attempts():
    yield "open", lambda: open("/proc/self/environ")
    yield "socket", socket.socket
    yield "pipe", os.pipe
    yield "memory", lambda: bytearray(9 << 30)
    yield "more files", lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
def told(label):
    if os.getuid() == 0:  # root may do all this: what is tried is what users may
        libc = ctypes.CDLL(None)
        assert libc.setgid(65534) == 0 and libc.setuid(65534) == 0
    for name, attempt in attempts():
        try:
            attempt()
            found[name] = "done"
        except (OSError, MemoryError, ValueError) as error:
            found[name] = type(error).__name__
    found["processes"] = resource.getrlimit(resource.RLIMIT_NPROC)[0] < 2 ** 31
    found["file size"] = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    raise process.MediaError(json.dumps(found))
read = process.read_timeline
process.read_timeline = lambda file, label: read(file, label) if label == "a pixel" else told(label)
process.serve(video, int(sys.argv[3]))
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="reads what Linux tells of a process")
def test_the_child_has_little_and_may_little(child_says, large, monkeypatch, tmp_path):
    monkeypatch.setenv("A_TOKEN", "secret")
    path = tmp_path / "clip.mp4"
    path.write_bytes(large)
    secret = os.open(path, os.O_RDONLY)
    os.set_inheritable(secret, True)
    child_says(PROBE)
    monkeypatch.setattr(qwen2vl.media.process, "_sanitised", str)
    try:
        for source, access in ((path, os.O_RDONLY), (large, os.O_RDWR)):
            with pytest.raises(MediaError) as caught:
                preprocess_video(source)
            found = json.loads(str(caught.value))
            loader = set(qwen2vl.media.process._LOADER)
            own = {"OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MALLOC_ARENA_MAX", "LC_CTYPE"}
            assert set(found["environment"]) <= loader | own
            assert found["leads a session"] and found["processes"] and found["file size"] == 0
            assert found["descriptors"][:3] == [0, 1, 2] and len(found["descriptors"]) == 4
            assert found["video"] == access
            refused = {found[name] for name in ("open", "socket", "pipe", "more files")}
            assert refused <= {"OSError", "PermissionError", "ValueError"}, found
            assert found["memory"] == "MemoryError"
    finally:
        os.close(secret)


def test_a_file_that_could_be_written_is_copied(child_says, tmp_path):
    path, clip = tmp_path / "clip.mp4", video_bytes(numbered(4))
    path.write_bytes(clip)
    child_says("import os, sys; os.ftruncate(int(sys.argv[2]), 0)")
    with open(path, "r+b", buffering=0) as writable, pytest.raises(MediaError, match="the decoder ended early"):
        preprocess_video(writable)
    assert path.read_bytes() == clip


def test_what_the_child_starts_ends_with_it(child_says, large, tmp_path):
    """A taken-over decoder that has forked and then hangs."""
    child_says(
        f"import os, time; pid = os.fork(); open({str(tmp_path / 'pid')!r}, 'a').write(f'{{os.getpid()}} '); "
        "time.sleep(100)  # qwen2vl.media.process"
    )
    with pytest.raises(MediaError, match="was not decoded within"):
        preprocess_video(large, access=Access(limits=Limits(video_timeout=1.0)))
    numbers = (tmp_path / "pid").read_text().split()
    assert len(numbers) == 2
    end = time.monotonic() + 30
    while any(psutil.pid_exists(int(n)) and psutil.Process(int(n)).status() != "zombie" for n in numbers):
        assert time.monotonic() < end, "a process is left"
        time.sleep(0.01)


def test_a_caller_that_gives_up_leaves_nothing(large):
    def give_up(done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        preprocess_video(large, num_frames=60, progress=give_up)
    assert not children()


def test_nothing_is_left_after_many_videos(child_says, large):
    clip = video_bytes(numbered(4))
    preprocess_video(clip)
    process = psutil.Process()
    before = process.num_fds(), threading.active_count()
    for n in range(8):
        preprocess_video(clip)
        with pytest.raises(MediaError):
            preprocess_video(clip[: 300 + n])
    child_says("raise SystemExit(3)")
    for _ in range(8):
        with pytest.raises(MediaError):
            preprocess_video(large)
    assert (process.num_fds(), threading.active_count()) == before and not children()


def test_the_child_is_light():
    """Neither torch nor the kernels: starting it would take seconds."""
    code = "import sys, qwen2vl.media.process; print([m for m in ('torch', 'qwen2vl_kernels') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_decoding_goes_on_while_a_frame_is_resized(large, monkeypatch):
    """While the first frame is still being put, later ones arrive."""
    decoders, waiting = [], []

    class Watched(qwen2vl.media.video.Decoder):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            decoders.append(self)

    put = PatchBuffer.put

    def slow_put(self, index, frame):
        if index == 0:
            end = time.monotonic() + 30
            while not decoders[0]._messages.full() and time.monotonic() < end:
                time.sleep(0.01)
            waiting.append(decoders[0]._messages.qsize())
        put(self, index, frame)

    monkeypatch.setattr(qwen2vl.media.video, "Decoder", Watched)
    monkeypatch.setattr(PatchBuffer, "put", slow_put)
    preprocess_video(large, num_frames=10)
    assert waiting == [2]


# VmHWM, not ru_maxrss: that one survives exec, so that a new process begins with the peak of who started it.
MEASURE = """
import json, psutil, sys
from qwen2vl.media.video import preprocess_video
def peak(process):
    lines = open(f"/proc/{process.pid}/status").read().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
seen, decoder = [], 0
def progress(done, total):
    global decoder
    seen.append((done, total))
    for child in psutil.Process().children():  # VmHWM is gone with the process: the last frame's is kept
        decoder = max(decoder, peak(child))
video = preprocess_video(sys.argv[1], progress=progress)
peaks = [peak(psutil.Process()), decoder]
print(json.dumps([video.grid_thw, video.source_size, video.resized_size, len(video.frame_times), video.frame_times[-1],
                  video.num_tokens, peaks, seen[-1], len(seen)]))
"""


def test_twenty_minutes_of_full_hd_in_two_gigabytes(tmp_path):
    path = tmp_path / "long.mp4"
    pictures = np.full((2, 1080, 1920, 3), 90, np.uint8)
    pictures[1, 500:600, 900:1000] = 200
    frames = [av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p") for picture in pictures]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=2, options={"preset": "ultrafast", "g": "50"})
        stream.width, stream.height, stream.pix_fmt = 1920, 1080, "yuv420p"
        for n in range(2400):
            frames[n % 2].pts = n
            container.mux(stream.encode(frames[n % 2]))
        container.mux(stream.encode(None))
    result = subprocess.run([sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    grid, source, resized, frames, last, tokens, peaks, seen, calls = json.loads(result.stdout)
    assert grid[0] == 384 and source == [1080, 1920] and frames == 768 and last == 1199.5
    assert tokens <= 16384 and resized == [14 * grid[1], 14 * grid[2]]
    assert seen == [768, 768] and calls == 769
    assert all(peaks) and sum(peaks) < 2e9, f"{peaks} bytes at most in the parent and in the child"
