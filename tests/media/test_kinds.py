"""What is told about a file that is mistaken for another kind, or has more frames than are read."""

import io

import numpy as np
import pytest
from PIL import Image

from qwen2vl.errors import MediaError, MediaWarning
from qwen2vl.media.image import load_image, preprocess_image
from qwen2vl.media.kinds import picture_format, video_container
from qwen2vl.media.options import Access, Limits
from qwen2vl.media.video import preprocess_video
from tests.media.media_fixtures import encode_image, noise, numbered, numbers, video_bytes

VIDEOS = {
    ("mp4", "libx264"): "MP4 or MOV",
    ("mov", "mpeg4"): "MP4 or MOV",
    ("matroska", "libx264"): "Matroska or WebM",
    ("webm", "libvpx-vp9"): "Matroska or WebM",
    ("avi", "mpeg4"): "AVI",
    ("mpegts", "libx264"): "MPEG-TS",
    ("mpeg", "mpeg2video"): "MPEG-PS",
    ("flv", "flv1"): "FLV",
    ("asf", "mpeg4"): "ASF",
    ("mxf", "mpeg2video"): "MXF",
    ("ivf", "libvpx-vp9"): "IVF",
}
LOSSLESS = {"WEBP": {"lossless": True}}


def animated(format, count, durations=40):
    """A file of ``count`` numbered frames or pages."""
    first, *others = map(Image.fromarray, numbered(count))
    timed = {} if format == "TIFF" else {"duration": durations}
    return encode_image(first, format, save_all=True, append_images=others, **timed, **LOSSLESS.get(format, {}))


@pytest.mark.parametrize("form", VIDEOS, ids="-".join)
def test_a_video_given_as_a_picture_is_told(form):
    data = video_bytes(numbered(30), format=form[0], codec=form[1])
    with pytest.raises(MediaError, match=rf"is a video \({VIDEOS[form]}\), not an image: give it as a video"):
        load_image(data)
    assert video_container(data[:200]) == VIDEOS[form] and picture_format(data[:16]) is None


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "TIFF"])
@pytest.mark.parametrize("isolate", [False, True])
def test_a_picture_given_as_a_video_is_told(format, isolate):
    data = encode_image(noise(56, 84), format)
    with pytest.raises(MediaError, match=rf"is a picture \({format}\), not a video: give it as an image"):
        preprocess_video(data, isolate=isolate)
    assert picture_format(data[:16]) == format and video_container(data[:200]) is None


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_an_animation_given_as_a_picture_says_that_one_frame_is_read(format, tmp_path, recwarn):
    path = tmp_path / "moving"
    path.write_bytes(animated(format, 5))
    match = r"moving' holds several frames or pages, of which the first is read.* as a video"
    with pytest.warns(MediaWarning, match=match) as told:
        got = load_image(path)
        preprocess_image(path)
    assert {warning.filename for warning in told} == {__file__}
    assert np.abs(got.astype(int) - numbered(1)[0]).max() <= 1
    recwarn.clear()
    load_image(encode_image(numbered(1)[0], format))
    # A camera's file with a preview beside the photo is a photo.
    load_image(encode_image(noise(56, 84), "MPO", save_all=True, append_images=[Image.fromarray(noise(28, 28))]))
    assert not [warning for warning in recwarn if issubclass(warning.category, MediaWarning)]


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_an_animation_given_as_a_video_is_read_as_one(format):
    video = preprocess_video(animated(format, 12, 50), fps=20.0, isolate=False)
    assert numbers(video) == list(range(12))
    assert video.frame_times == pytest.approx([number / 20 for number in range(12)], abs=1e-3)
    assert video.native_fps == pytest.approx(20, rel=0.01) and video.duration == pytest.approx(0.6, rel=0.01)
    part = preprocess_video(animated(format, 12, 50), start=0.25, end=0.4, num_frames=4, isolate=False)
    assert numbers(part) == [5, 6, 7, 8]


def test_an_animations_frames_have_times_of_their_own():
    """Four frames of 100 ms, then four of 400 ms: half of the time belongs to the last two and a half."""
    durations = [100] * 4 + [400] * 4
    video = preprocess_video(animated("WEBP", 8, durations), num_frames=4)
    assert numbers(video) == [0, 4, 5, 7]
    assert video.frame_times == pytest.approx([0, 0.4, 0.8, 1.6])


@pytest.mark.parametrize("count", [2, 5])
def test_pages_given_as_a_video_are_its_frames(count):
    pages = animated("TIFF", count)
    got, want = preprocess_video(pages, fps=4.0), preprocess_video(numbered(count), fps=4.0)
    np.testing.assert_array_equal(got.patches, want.patches)
    assert (got.grid_thw, got.frame_times) == (want.grid_thw, want.frame_times)
    with pytest.raises(MediaError, match="start and end apply to what has times, not to the pages"):
        preprocess_video(pages, start=1.0)


@pytest.mark.parametrize("format", ["WEBP", "TIFF"])
def test_animations_are_held_to_the_limits_of_pictures_and_videos(format):
    data = animated(format, 4)
    with pytest.raises(MediaError, match="was not decoded within video_timeout = 1e-09 s"):
        preprocess_video(data, access=Access(limits=Limits(video_timeout=1e-9)))
    for share in (0.5, 0.8):
        with pytest.raises(MediaError, match=r"damaged|is a picture"):
            preprocess_video(data[: int(len(data) * share)])


def test_every_page_is_held_to_the_limit_of_pictures():
    large = io.BytesIO()
    Image.new("1", (56, 56)).save(large, "TIFF", save_all=True, append_images=[Image.new("1", (20000, 9000))])
    with pytest.raises(MediaError, match=r"frame 1 of .* 20000 x 9000 pixels, more than max_source_pixels"):
        preprocess_video(large.getvalue())
