"""Videos and arguments that are refused, damaged files, memory bound, and silence."""

import io
import math
import subprocess
import sys

import av
import numpy as np
import pytest
from av.stream import Disposition
from hypothesis import given, settings
from hypothesis import strategies as st

import qwen2vl.media.decoding
from qwen2vl.errors import MediaError, MediaWarning
from qwen2vl.media.options import PatchShape
from qwen2vl.media.video import preprocess_video
from tests.media.media_fixtures import (
    encode_image,
    noise,
    numbered,
    numbers,
    video_bytes,
    write_audio,
    write_video,
)

FORMATS = [("mp4", "libx264"), ("matroska", "libx264"), ("avi", "mpeg4"), ("webm", "libvpx-vp9")]


@pytest.fixture(scope="module")
def clip():
    """90 numbered frames, 3 s, 30 a second, H.264 in MP4."""
    return video_bytes(numbered(90))


# -------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"start": -1}, "start must be a finite number >= 0"),
        ({"start": math.nan}, "start"),
        ({"start": "1"}, "start"),
        ({"end": 0}, "end must be a finite number > 0"),
        ({"end": math.inf}, "end"),
        ({"start": 2, "end": 2}, "end must be after start"),
        ({"start": 3.2}, r"start is 3.2 s, but the last frame of .* is at 2.967 s"),
        ({"start": 1.01, "end": 1.02}, "no frame between start 1.01 s and end 1.02 s"),
        ({"num_frames": 92}, "num_frames must round"),
        ({"fps": 0}, "fps"),
        ({"fps": 0, "num_frames": 4}, "fps"),
        ({"min_frames": 8, "max_frames": 4}, "min_frames"),
        ({"video_min_pixels": 10, "video_max_pixels": 5}, "min_pixels"),
        ({"max_video_tokens": 0}, "max_video_tokens"),
        ({"resized_width": 56}, "resized_height and resized_width"),
    ],
)
def test_wrong_arguments(clip, arguments, match):
    with pytest.raises(MediaError, match=match):
        preprocess_video(clip, **arguments)


def test_a_wrong_shape_of_patches():
    with pytest.raises(MediaError, match="patch_size must be a positive integer, got 0"):
        PatchShape(patch_size=0)


def test_wrong_arguments_are_found_before_the_source_is_opened():
    with pytest.raises(MediaError, match="fps"):
        preprocess_video("no/such/file.mp4", fps=-1)


def test_not_a_video(tmp_path):
    (tmp_path / "text.mp4").write_text("this is not a video\n" * 50)
    (tmp_path / "empty.mp4").touch()
    write_audio(str(tmp_path / "sound.mp4"))
    (tmp_path / "photo.png").write_bytes(encode_image(noise(30, 30), "JPEG"))
    (tmp_path / "list.m3u8").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nsound.mp4\n#EXT-X-ENDLIST\n")
    (tmp_path / "list.ffconcat").write_text("ffconcat version 1.0\nfile sound.mp4\n")
    for name, match in [
        ("text.mp4", "is not a video in a supported container"),
        ("empty.mp4", "is empty"),
        ("sound.mp4", "has no video stream"),
        ("photo.png", r"is a picture \(JPEG\), not a video: give it as an image"),
        ("list.m3u8", "is not a video in a supported container"),
        ("list.ffconcat", "is not a video in a supported container"),
        ("missing.mp4", "no such file"),
    ]:
        with pytest.raises(MediaError, match=f"{name}.*{match}|{match}.*{name}"):
            preprocess_video(tmp_path / name)
    with pytest.raises(MediaError, match="source must be"):
        preprocess_video(None)
    with pytest.raises(MediaError, match="allow_remote"):
        preprocess_video("http://127.0.0.1:9/a.mp4")


def test_cover_art_is_not_a_video(tmp_path):
    path = str(tmp_path / "song.mp4")
    with av.open(path, "w") as container:
        cover = container.add_stream("png", rate=1)
        cover.width, cover.height, cover.pix_fmt = 64, 64, "rgb24"
        cover.disposition = Disposition.attached_pic.value
        container.mux(cover.encode(av.VideoFrame.from_ndarray(noise(64, 64), format="rgb24")))
        container.mux(cover.encode())
    with pytest.raises(MediaError, match="has no video stream"):
        preprocess_video(path)


@pytest.mark.parametrize("share", [0.05, 0.5, 0.95])
def test_truncated_file(clip, share):
    with pytest.raises(MediaError, match=r"bytes of length \d+ .*damaged"):  # the index at the end is gone
        preprocess_video(clip[: int(len(clip) * share)])


def test_truncated_behind_its_index_gives_what_is_there():
    data = video_bytes(numbered(75), format="matroska", gop=12)
    with pytest.warns(MediaWarning, match="ends early"):
        video = preprocess_video(data[: len(data) // 2], num_frames=4)
    kept = numbers(video)
    assert kept[0] == 0 and 10 < kept[-1] < 74 and kept == sorted(kept)
    np.testing.assert_allclose(video.frame_times, np.array(kept) / 30, atol=2e-3)


def test_fewer_frames_than_promised(clip, monkeypatch):
    original = qwen2vl.media.decoding._ticked_frames

    def short(*arguments):
        for index, item in enumerate(original(*arguments)):
            if index == 50:
                return
            yield item

    monkeypatch.setattr(qwen2vl.media.decoding, "_ticked_frames", short)
    with pytest.warns(MediaWarning, match=r"decodes up to 1\.633 s only, of 2\.967 s: its last frame stands for"):
        video = preprocess_video(clip, num_frames=4, isolate=False)
    assert numbers(video) == [0, 30, 49, 49]
    np.testing.assert_allclose(video.frame_times, [0, 1, 49 / 30, 49 / 30])
    monkeypatch.setattr(qwen2vl.media.decoding, "_ticked_frames", lambda *arguments: iter(()))
    with pytest.raises(MediaError, match="no frame could be decoded"):
        preprocess_video(clip, isolate=False)


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_files_without_timestamps(codec):
    data = video_bytes(numbered(60), format="avi", codec=codec, options={"bf": "2"})
    video = preprocess_video(data, start=1, num_frames=4)
    assert numbers(video) == [30, 40, 49, 59]
    assert video.frame_times == pytest.approx([1, 4 / 3, 49 / 30, 59 / 30])


@pytest.mark.parametrize(
    ("format", "codec"),
    [("mpegts", "libx264"), ("mpegts", "mpeg2video"), ("mpeg", "mpeg2video"), ("vob", "mpeg2video")],
)
@pytest.mark.parametrize("lengths", [(30, 30), (20, 40), (12, 24, 24)], ids=str)
def test_joined_files_are_seen_to_their_end(format, codec, lengths):
    """As `cat a.ts b.ts > c.ts` makes them: times begin anew, and every part is seen in its place."""
    ends = np.cumsum(lengths)
    frames = numbered(60)
    parts = [frames[end - length : end] for end, length in zip(ends, lengths, strict=True)]
    data = b"".join(video_bytes(part, format=format, codec=codec) for part in parts)
    for isolate in (False, True) if lengths == (30, 30) else (False,):
        video = preprocess_video(data, num_frames=60, isolate=isolate)
        assert numbers(video) == list(range(60))
        assert video.duration == pytest.approx(2) and video.native_fps == pytest.approx(30)
        assert video.frame_times == pytest.approx([number / 30 for number in range(60)])
    part = preprocess_video(data, start=1.5, num_frames=4, isolate=False)
    assert numbers(part) == [45, 50, 54, 59] and part.frame_times[-1] == pytest.approx(59 / 30)


def test_a_joined_file_whose_second_part_has_earlier_times():
    """No time stands twice, and in the order of time the parts would be exchanged."""
    late = video_bytes(numbered(60)[:30], format="mpegts", milliseconds=[10_000 + 40 * n for n in range(30)], rate=25)
    early = video_bytes(numbered(60)[30:], format="mpegts", rate=25)
    video = preprocess_video(late + early, num_frames=60, isolate=False)
    assert numbers(video) == list(range(60)) and video.duration == pytest.approx(60 / video.native_fps)


def test_errors_other_than_ffmpegs_are_typed_too(clip):
    class Unreliable(io.BytesIO):
        most = 1000

        def read(self, size=-1):
            if size > self.most:
                raise RuntimeError("the disk is gone")
            return super().read(size)

    for Unreliable.most in (1000, 300):  # what the decoder asks for, and a look at the parts of the file
        with pytest.raises(MediaError, match=r"file object of type Unreliable .*the disk is gone"):
            preprocess_video(Unreliable(clip))


def test_huge_frames_are_refused(clip, monkeypatch):
    monkeypatch.setattr(qwen2vl.media.decoding, "MAX_SOURCE_FRAME_PIXELS", 5000)
    with pytest.raises(MediaError, match="frames of 96 x 56 pixels, more than the limit of 5000"):
        preprocess_video(clip, isolate=False)
    monkeypatch.setattr(qwen2vl.media.decoding, "MAX_SOURCE_FRAME_PIXELS", 6000)
    monkeypatch.setattr(qwen2vl.media.decoding, "MAX_SOURCE_FRAMES", 89)
    with pytest.raises(MediaError, match="more than the limit of 89 frames"):
        preprocess_video(clip, isolate=False)


@settings(max_examples=60, deadline=None)
@given(
    format=st.sampled_from(["mp4", "matroska", "avi"]),
    changes=st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 255)), min_size=1, max_size=30),
)
def test_damaged_bytes_give_a_video_or_a_media_error(format, changes):
    data = bytearray(DAMAGE_BASE[format])
    for position, value in changes:
        data[position % len(data)] = value
    try:
        video = preprocess_video(bytes(data), isolate=False)
    except MediaError as error:
        assert "bytes of length" in str(error)
    else:
        assert len(video.patches) == math.prod(video.grid_thw) and video.num_tokens <= 16384


DAMAGE_BASE = {
    format: video_bytes(numbered(12, height=32, width=48), format=format, codec=codec) for format, codec in FORMATS[:3]
}


def test_missing_pyav_says_what_to_install(clip, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MediaError, match=r'pip install "av>=15"'):
        preprocess_video(clip)
    with pytest.raises(MediaError, match=r'pip install "av>=15"'):
        preprocess_video(clip, isolate=False)
    assert preprocess_video(numbered(2)).grid_thw[0] == 1  # frames need no decoder


# ----------------------------------------------------------------------------------------- memory and noise

MEMORY_SCRIPT = """
import sys
from qwen2vl.media.video import preprocess_video
def peak():  # not ru_maxrss, which survives exec and would begin with the peak of who started this process
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
preprocess_video(sys.argv[1], max_video_tokens=4)  # decoder, codecs and imports are in memory now
before = peak()
video = preprocess_video(sys.argv[2])
print(peak() - before, video.patches.nbytes, len(video.frame_times))
"""


def test_memory_is_bounded_by_the_result(tmp_path):
    frame = noise(360, 640)
    frames = (np.roll(frame, 3 * index, axis=1) for index in range(1500))
    write_video(str(tmp_path / "long.mp4"), frames, gop=50, options={"preset": "ultrafast"})
    write_video(str(tmp_path / "short.mp4"), [frame] * 8)
    command = [sys.executable, "-c", MEMORY_SCRIPT, str(tmp_path / "short.mp4"), str(tmp_path / "long.mp4")]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    grown, result, kept = map(int, run.stdout.split())
    assert kept == 100 and result > 50e6
    # 1500 decoded frames are 1 GB; of what is kept, only the result may remain.
    assert grown < result + 40e6, f"grew by {grown / 1e6:.0f} MB for a result of {result / 1e6:.0f} MB"


NOISE_SCRIPT = """
import sys
from qwen2vl.errors import MediaError
from qwen2vl.media.video import preprocess_video
for path in sys.argv[1:]:
    try:
        preprocess_video(path)
    except MediaError:
        pass
"""


def test_nothing_is_printed(clip, tmp_path):
    damaged = bytearray(clip)
    start = clip.index(b"mdat") + 8
    damaged[start + 1000 : start + 1300] = b"\xff" * 300
    files = {
        "good.mp4": clip,
        "half.mp4": clip[: len(clip) // 2],
        "damaged.mp4": bytes(damaged),
        "x.mp4": b"x" * 99,
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    command = [sys.executable, "-c", NOISE_SCRIPT, *(str(tmp_path / name) for name in files)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (run.stdout, run.stderr) == ("", "")
