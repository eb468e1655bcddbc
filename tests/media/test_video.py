"""Videos to patches: which frames, their size, what is decoded, memory, and what is refused."""

import base64
import io
import math
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import qwen2vl.media.decoding
from qwen2vl.errors import MediaError
from qwen2vl.media.inspection import patches_to_frames
from qwen2vl.media.options import MediaOptions, PatchShape
from qwen2vl.media.video import frame_count, frame_indices, frame_size, preprocess_video
from tests.media.media_fixtures import (
    encode_image,
    noise,
    numbered,
    numbered_frame,
    numbers,
    resized,
    video_bytes,
    with_display_matrix,
    write_video,
)

FORMATS = [("mp4", "libx264"), ("matroska", "libx264"), ("avi", "mpeg4"), ("webm", "libvpx-vp9")]
FORMATS += [("mpegts", "libx264"), ("mov", "mpeg4")]


@pytest.fixture(scope="module")
def clip():
    """90 numbered frames, 3 s, 30 a second, H.264 in MP4."""
    return video_bytes(numbered(90))


# ------------------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize(
    ("total", "native", "options", "want"),
    [
        (300, 30.0, {}, 20),  # 10 s at 2 a second
        (150, 30.0, {}, 10),
        (160, 30.0, {}, 10),  # 10.67 -> 10
        (179, 30.0, {}, 10),  # 11.93 -> 10: down to even
        (30, 30.0, {}, 4),  # 1 s: min_frames
        (3, 30.0, {}, 2),  # not more than there are, down to even
        (2, 30.0, {}, 2),
        (1, 30.0, {}, 2),  # the frame twice
        (100_000, 25.0, {}, 768),
        (100_000, 25.0, {"max_frames": 65}, 64),
        (30, 30.0, {"min_frames": 5}, 6),
        (300, 30.0, {"fps": 0.5}, 4),  # 5 -> 4
        (300, 30.0, {"fps": 60}, 300),
        (301, 30.0, {"fps": 60}, 300),
        (300, 30.0, {"num_frames": 8}, 8),
        (300, 30.0, {"num_frames": 5}, 4),  # 2.5 pairs -> 2
        (300, 30.0, {"num_frames": 7}, 8),  # 3.5 pairs -> 4
        (300, 30.0, {"num_frames": 300, "max_frames": 8}, 300),
        (1, 30.0, {"num_frames": 8}, 2),
    ],
)
def test_frame_count_by_hand(total, native, options, want):
    assert frame_count(total, native, MediaOptions(**options)) == want


@settings(max_examples=300, deadline=None)
@given(
    total=st.integers(1, 10_000),
    native=st.floats(0.1, 240),
    fps=st.floats(0.01, 120),
    fewest=st.integers(1, 20),
    most=st.integers(20, 800),
)
def test_frame_count_holds_its_bounds(total, native, fps, fewest, most):
    count = frame_count(total, native, MediaOptions(fps=fps, min_frames=fewest, max_frames=most))
    indices = frame_indices(total, count)
    assert count % 2 == 0 and 2 <= count <= max(2, min(total, most))
    assert len(indices) == count and indices[0] == 0 and indices[-1] == total - 1
    assert (np.diff(indices) >= 0).all() and (total == 1 or (np.diff(indices) > 0).all())
    if total >= fewest + 1:
        assert count >= min(fewest, most // 2 * 2)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"total_frames": 0}, "total_frames"),
        ({"native_fps": 0}, "native_fps"),
        ({"native_fps": math.nan}, "native_fps"),
        ({"fps": -1}, "fps"),
        ({"fps": math.inf}, "fps"),
        ({"fps": "2"}, "fps"),
        ({"fps": True}, "fps"),
        ({"num_frames": 0}, "num_frames"),
        ({"num_frames": 1}, r"num_frames must round to an even number in \[2, 100\], got 1"),
        ({"num_frames": 102}, "num_frames"),
        ({"num_frames": 4.0}, "num_frames"),
        ({"min_frames": 0}, "min_frames"),
        ({"min_frames": 10, "max_frames": 8}, "min_frames 10 and max_frames 8"),
        ({"min_frames": 3, "max_frames": 3}, "leave no even number"),
        ({"max_frames": 1}, "max_frames"),
    ],
)
def test_frame_count_names_the_wrong_argument(arguments, match):
    with pytest.raises(MediaError, match=match):
        numbers = {"total_frames": 100, "native_fps": 30.0}
        options = MediaOptions(**{name: value for name, value in arguments.items() if name not in numbers})
        frame_count(**{name: arguments.get(name, value) for name, value in numbers.items()}, options=options)


def test_frame_indices_by_hand():
    assert frame_indices(100, 4).tolist() == [0, 33, 66, 99]
    assert frame_indices(6, 4).tolist() == [0, 2, 3, 5]
    assert frame_indices(1, 2).tolist() == [0, 0]
    assert frame_indices(4, 4).tolist() == [0, 1, 2, 3]


# ----------------------------------------------------------------------------------------------------- size


def test_frame_size_by_hand():
    assert frame_size(224, 224, 4) == (336, 336)  # up to 128 tokens a frame
    assert frame_size(1080, 1920, 4) == (560, 1008)  # down to 768 tokens a frame: 20.8 x 36.9
    assert frame_size(1080, 1920, 768) == (112, 224)  # 42 tokens for each of 384 steps: 4.9 x 8.6
    assert frame_size(100, 100, 2, MediaOptions(video_min_pixels=1, max_video_tokens=1)) == (28, 28)
    assert frame_size(28, 2800, 2, MediaOptions(video_min_pixels=1, max_video_tokens=7)) == (28, 196)
    tight = MediaOptions(video_min_pixels=318_281, video_max_pixels=318_281, max_video_tokens=406)
    assert frame_size(57, 150, 2, tight) == (336, 896)
    shape = PatchShape(patch_size=16, merge_size=1, temporal_patch_size=1)
    assert frame_size(480, 640, 4, shape=shape) == (480, 640)


@settings(max_examples=300, deadline=None)
@given(
    height=st.integers(1, 4000),
    width=st.integers(1, 4000),
    count=st.integers(1, 900),
    low=st.integers(1, 700_000),
    span=st.integers(0, 700_000),
    tokens=st.integers(450, 40_000),
)
def test_token_cap_always_holds(height, width, count, low, span, tokens):
    if max(height, width) / min(height, width) > 200:
        return
    limits = MediaOptions(video_min_pixels=low, video_max_pixels=low + span, max_video_tokens=tokens)
    new_height, new_width = frame_size(height, width, count, limits)
    assert new_height % 28 == new_width % 28 == 0 and new_height >= 28 and new_width >= 28
    steps = -(-count // 2)
    assert steps * new_height * new_width // 784 <= tokens
    cap = min(low + span, tokens // steps * 784)
    if 200 < max(height, width) < 4 * min(height, width) and cap > 200 * 784:  # used, not just respected
        assert new_height * new_width >= 0.5 * min(cap, max(low, height * width))


def test_frame_size_errors():
    with pytest.raises(MediaError, match=r"900 frames are 450 time steps .* max_video_tokens = 449"):
        frame_size(100, 100, 900, MediaOptions(max_video_tokens=449))
    for name in ("video_min_pixels", "video_max_pixels", "max_video_tokens"):
        with pytest.raises(MediaError, match=f"^{name} must be a positive integer, got 0"):
            frame_size(100, 100, 4, MediaOptions(**{name: 0}))
    for name in ("patch_size", "merge_size", "temporal_patch_size"):
        with pytest.raises(MediaError, match=f"^{name} must be a positive integer, got 0"):
            frame_size(100, 100, 4, shape=PatchShape(**{name: 0}))
    with pytest.raises(MediaError, match="min_pixels must not exceed max_pixels"):
        frame_size(100, 100, 4, MediaOptions(video_min_pixels=2000, video_max_pixels=1000))
    with pytest.raises(MediaError, match="aspect ratio"):
        frame_size(10, 4000, 4)


# ---------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(("format", "codec"), FORMATS)
def test_kept_frames_of_every_container(format, codec):
    data = video_bytes(numbered(75), format=format, codec=codec)
    video = preprocess_video(data)
    assert numbers(video) == [0, 25, 49, 74]  # 2.5 s at 2 a second: 5 -> 4
    assert video.native_fps == 30 and video.duration == pytest.approx(2.5)
    np.testing.assert_allclose(video.frame_times, [0, 25 / 30, 49 / 30, 74 / 30], atol=1e-3)
    assert video.source_size == (56, 96) and video.resized_size == (252, 420)
    assert video.grid_thw == (2, 18, 30) and video.num_tokens == 270
    assert video.patches.shape == (1080, 1176) and video.patches.dtype == np.uint8
    assert numbers(preprocess_video(data, num_frames=6)) == [0, 15, 30, 44, 59, 74]


@pytest.mark.parametrize(("format", "codec"), FORMATS)
def test_start_and_end(format, codec):
    data = video_bytes(numbered(75), format=format, codec=codec)
    video = preprocess_video(data, start=1, end=2, num_frames=4)
    assert numbers(video) == [30, 40, 50, 60]
    np.testing.assert_allclose(video.frame_times, [1, 4 / 3, 5 / 3, 2], atol=1e-3)
    assert video.duration == pytest.approx(31 / 30, rel=1e-2)
    assert numbers(preprocess_video(data, start=2.4, num_frames=2)) == [72, 74]
    assert numbers(preprocess_video(data, end=0.1, num_frames=4)) == [0, 1, 2, 3]
    assert numbers(preprocess_video(data, end=100, num_frames=2)) == [0, 74]
    assert numbers(preprocess_video(data, start=1.5, end=1.51)) == [45, 45]  # one frame, twice


def test_seeking_reads_less_and_gives_the_same(tmp_path):
    path = tmp_path / "clip.mp4"
    write_video(str(path), numbered(400), gop=20, options={"bf": "3"})
    decoded = []
    original = qwen2vl.media.decoding._ticked_frames

    def counting(*arguments):
        for item in original(*arguments):
            decoded.append(item[0])
            yield item

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qwen2vl.media.decoding, "_ticked_frames", counting)
        video = preprocess_video(path, start=12, num_frames=2, isolate=False)
    assert numbers(video) == [360, 399]
    assert len(decoded) < 100


@pytest.mark.parametrize("start", [0.1, 0.33, 0.5, 0.77, 1.3, 2.2])
@pytest.mark.parametrize(("format", "codec"), FORMATS[:5])
def test_seeking_hits_the_right_frame(format, codec, start):
    data = video_bytes(numbered(75), format=format, codec=codec, gop=9)
    want = math.ceil(start * 30 - 0.05)
    assert numbers(preprocess_video(data, start=start, num_frames=2)) == [want, 74]


def test_rate_that_is_not_whole():
    data = video_bytes(numbered(120), rate=Fraction(30000, 1001))
    video = preprocess_video(data)
    assert video.native_fps == pytest.approx(30000 / 1001) and video.grid_thw[0] == 4  # 8.008 -> 8
    assert numbers(video) == [0, 17, 34, 51, 68, 85, 102, 119]


def test_variable_frame_rate_is_sampled_by_time():
    # 20 frames in the first second, then one every second: numbers would put nearly all kept frames up front.
    times = [index * 50 for index in range(20)] + [1000 * second for second in range(1, 10)]
    data = video_bytes(numbered(29), format="matroska", milliseconds=times)
    video = preprocess_video(data, num_frames=10)
    assert numbers(video) == [0, *range(20, 29)]
    assert video.frame_times == pytest.approx([0, *range(1, 10)])
    assert video.native_fps == pytest.approx(28 / 9)
    paused = video_bytes(numbered(4), format="matroska", milliseconds=[0, 100, 200, 10_000])
    assert numbers(preprocess_video(paused, num_frames=4)) == [0, 2, 2, 3]  # what is on screen


def test_one_frame_is_repeated():
    video = preprocess_video(video_bytes(numbered(1)))
    assert video.grid_thw[0] == 1 and numbers(video) == [0, 0] and video.frame_times == (0.0, 0.0)


def test_animations():
    frames = [Image.fromarray(numbered_frame(number)) for number in range(8)]
    for format in ("GIF", "PNG"):
        data = encode_image(frames[0], format, save_all=True, append_images=frames[1:], duration=250)
        video = preprocess_video(data)
        assert numbers(video) == [0, 2, 5, 7] and video.native_fps == 4


def test_transparent_frames_are_laid_over_white():
    picture = Image.new("RGBA", (96, 56), (255, 0, 0, 0))
    picture.paste((0, 0, 255, 255), (0, 0, 48, 56))
    other = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    data = encode_image(picture, "PNG", save_all=True, append_images=[other], duration=100)
    frames = patches_to_frames(*(lambda video: (video.patches, video.grid_thw))(preprocess_video(data)))
    assert frames[0, 5, 5].tolist() == [0, 0, 255] and frames[0, 5, -5].tolist() == [255, 255, 255]


@pytest.mark.parametrize(
    ("matrix", "turn"),
    [
        ((1, 0, 0, 1), lambda frame: frame),
        (
            (0, 1, -1, 0),
            lambda frame: np.rot90(frame, -1),
        ),  # a phone held upright: shown a quarter turn clockwise
        ((-1, 0, 0, -1), lambda frame: np.rot90(frame, 2)),
        ((0, -1, 1, 0), lambda frame: np.rot90(frame, 1)),
        ((-1, 0, 0, 1), lambda frame: frame[:, ::-1]),
        ((1, 0, 0, -1), lambda frame: frame[::-1]),
        ((0, 1, 1, 0), lambda frame: frame.transpose(1, 0, 2)),
    ],
)
def test_rotation_metadata(matrix, turn):
    stored = np.zeros((56, 112, 3), np.uint8)
    stored[:28, :56], stored[:28, 56:] = 255, 128
    data = with_display_matrix(video_bytes([stored] * 4), *matrix)
    video = preprocess_video(data, video_min_pixels=784)
    want = turn(stored)
    assert video.source_size == want.shape[:2] == video.resized_size
    frame = patches_to_frames(video.patches, video.grid_thw)[0]
    assert np.abs(frame[::14, ::14].astype(int) - want[::14, ::14]).max() < 12


@pytest.mark.parametrize(
    "aspect", [Fraction(16, 15), Fraction(64, 45), Fraction(8, 9), Fraction(2), Fraction(1, 2)], ids=str
)
@pytest.mark.parametrize(
    ("format", "codec"), [("mp4", "libx264"), ("matroska", "libx264"), ("avi", "mpeg4"), ("mpeg", "mpeg2video")]
)
@pytest.mark.parametrize("isolate", [False, True])
def test_frames_have_the_shape_that_players_show(format, codec, aspect, isolate):
    """DVDs and camcorders: 720 x 576 pixels that are shown as 4:3 or 16:9."""
    if codec == "mpeg2video":  # which holds the picture's aspect, one of three
        aspect = Fraction(16, 9) * 144 / 180 if aspect > 1 else Fraction(4, 3) * 144 / 180
    data = video_bytes(numbered(4, height=144, width=180), format=format, codec=codec, pixel_aspect=aspect)
    shown = round(180 * aspect)
    video = preprocess_video(data, video_min_pixels=784, isolate=isolate)
    assert video.source_size == (144, shown)
    assert video.resized_size == frame_size(144, shown, 4, MediaOptions(video_min_pixels=784))
    assert numbers(video) == list(range(4))
    # The same pixels, resized once.
    squares = preprocess_video(data, resized_height=144, resized_width=shown, video_min_pixels=784, isolate=False)
    np.testing.assert_array_equal(video.patches, squares.patches)


def test_a_turned_frame_is_stretched_along_its_own_width():
    data = video_bytes(numbered(4, height=144, width=180), pixel_aspect=Fraction(2))
    turned = preprocess_video(with_display_matrix(data, 0, 1, -1, 0), video_min_pixels=784)
    assert turned.source_size == (180, 72)  # as 360 x 144 is, standing
    mirrored = preprocess_video(with_display_matrix(data, -1, 0, 0, 1), video_min_pixels=784)
    assert mirrored.source_size == (144, 360)


def test_pixel_aspects_that_nobody_meant():
    """Where the container says nothing the coded frames count; a strip is refused as one of a picture is."""
    data = video_bytes(numbered(2), codec="mpeg4", pixel_aspect=Fraction(40))
    at = data.index(b"pasp") + 4

    def size(across, down):
        stated = data[:at] + struct.pack(">II", across, down) + data[at + 8 :]
        return preprocess_video(stated, isolate=False).source_size

    assert size(0, 1) == size(1, 0) == size(40, 1) == (56, 3840) and size(3, 2) == (56, 144)
    with pytest.raises(MediaError, match=r"aspect ratio must be at most 200, .*height 56, width 96000"):
        size(1000, 1)


def test_pixels_are_the_decoded_frame_resized():
    frames = [noise(120, 200, seed=seed) for seed in range(4)]
    data = video_bytes(frames)
    with av.open(io.BytesIO(data)) as container:
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    video = preprocess_video(data)
    got = patches_to_frames(video.patches, video.grid_thw)
    for frame, want in zip(got, decoded, strict=True):
        np.testing.assert_array_equal(frame, resized(want, *video.resized_size))


def test_token_cap_on_a_file(clip):
    video = preprocess_video(clip, num_frames=40, max_video_tokens=100)
    assert video.num_tokens <= 100 and video.grid_thw == (20, 2, 4)
    assert preprocess_video(clip, resized_height=60, resized_width=84, video_min_pixels=784).resized_size == (
        56,
        84,
    )
    with pytest.raises(MediaError, match="40 frames are 20 time steps"):
        preprocess_video(clip, num_frames=40, max_video_tokens=19)


def test_progress_and_its_exceptions(clip):
    calls = []
    preprocess_video(clip, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(done, 6) for done in range(7)]

    def cancel(done, total):
        raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        preprocess_video(clip, progress=cancel)


def test_every_kind_of_source(clip, tmp_path):
    path = tmp_path / "clip.bin"
    path.write_bytes(clip)
    moved = io.BytesIO(b"junk" + clip)
    moved.seek(4)
    uri = "data:video/mp4;base64," + base64.b64encode(clip).decode()
    want = preprocess_video(path).patches
    with open(path, "rb") as file:
        for source in (str(path), path.as_uri(), clip, memoryview(clip), io.BytesIO(clip), moved, uri, file):
            np.testing.assert_array_equal(preprocess_video(source).patches, want)
        assert not file.closed


# ----------------------------------------------------------------------------------------- lists of frames


def test_list_of_frames():
    frames = numbered(5)
    mixed = [frames[0], Image.fromarray(frames[1]), encode_image(frames[2]), frames[3], frames[4]]
    for source in (mixed, tuple(mixed), np.stack(frames)):
        video = preprocess_video(source, fps=2.0)
        assert video.grid_thw[0] == 3 and numbers(video) == [0, 1, 2, 3, 4, 4]
        assert video.frame_times == (0.0, 0.5, 1.0, 1.5, 2.0)
        assert (video.native_fps, video.duration, video.source_size) == (2.0, 2.5, (56, 96))
    assert numbers(preprocess_video(frames, num_frames=4)) == [0, 1, 3, 4]


def test_list_of_one_and_of_different_sizes():
    video = preprocess_video([numbered_frame(7)])
    assert video.grid_thw[0] == 1 and numbers(video) == [7, 7]
    video = preprocess_video([numbered_frame(1), numbered_frame(2, height=112, width=80)])
    assert numbers(video) == [1, 2] and video.source_size == (56, 96)
    np.testing.assert_array_equal(
        patches_to_frames(video.patches, video.grid_thw)[1],
        resized(numbered_frame(2, height=112, width=80), *video.resized_size),
    )


def test_list_errors():
    with pytest.raises(MediaError, match="must not be empty"):
        preprocess_video([])
    with pytest.raises(MediaError, match=r"frame 1 of the list: no such file: 'b\.png'"):
        preprocess_video([numbered_frame(0), "b.png"])
    with pytest.raises(MediaError, match="start and end apply to video files"):
        preprocess_video(numbered(4), start=1)
    with pytest.raises(MediaError, match="is one image"):
        preprocess_video(Image.new("RGB", (56, 56)))
    with pytest.raises(MediaError, match="is one image"):
        preprocess_video(numbered_frame(0))
    with pytest.raises(MediaError, match="list of frames: aspect ratio"):
        preprocess_video([np.zeros((1, 400, 3), np.uint8)])
    with pytest.raises(MediaError, match="list of frames: 10 frames are 5 time steps"):
        preprocess_video(numbered(10), max_video_tokens=4)
