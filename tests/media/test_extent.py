"""Files that end early, and files that were joined byte by byte: all frames, or what is missing is told."""

import io
import re
import struct
import warnings

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2vl.errors import MediaError, MediaWarning
from qwen2vl.media.extent import extent
from qwen2vl.media.kinds import video_container
from qwen2vl.media.video import preprocess_video
from tests.media.media_fixtures import numbered, numbered_frame, numbers, video_bytes

CODECS = {
    "mp4": "libx264",
    "mov": "mpeg4",
    "matroska": "libx264",
    "webm": "libvpx-vp9",
    "avi": "mpeg4",
    "flv": "flv1",
    "asf": "mpeg4",
    "mxf": "mpeg2video",
    "ogg": "libvpx",
    "mpegts": "libx264",
    "mpeg": "mpeg2video",
    "gif": "gif",
    "apng": "apng",
    "ivf": "libvpx-vp9",
}
PIXELS = {"gif": "rgb8", "apng": "rgb24"}
NAMES_ITS_SIZE = {"mp4", "matroska", "webm", "avi", "flv", "asf"}  # others: as far as the last of its parts


def clip(form, frames, **options):
    if form == "mp4":
        return early_index(frames)
    return video_bytes(frames, format=form, codec=CODECS[form], pixel_format=PIXELS.get(form, "yuv420p"), **options)


def early_index(frames):
    """An MP4 whose index comes first, so that half of it can be opened."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4", options={"movflags": "frag_keyframe+empty_moov"}) as container:
        stream = container.add_stream("libx264", rate=30)
        stream.height, stream.width, stream.pix_fmt, stream.gop_size = *frames[0].shape[:2], "yuv420p", 12
        for number, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts = number
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return file.getvalue()


@pytest.mark.parametrize("cut", [0.6, 0.9])
@pytest.mark.parametrize("form", sorted(CODECS.keys() - {"mov", "apng"}))
@pytest.mark.parametrize("isolate", [False, True])
def test_a_file_that_ends_early_says_how_much_was_read(form, cut, isolate):
    whole = clip(form, numbered(90))
    with warnings.catch_warnings():
        warnings.simplefilter("error", MediaWarning)
        assert numbers(preprocess_video(whole, num_frames=90, isolate=isolate)) == list(range(90))
        if form != "ivf":  # whose frames have no mark
            preprocess_video(whole + b"what somebody put behind it", num_frames=90, isolate=isolate)
    if form in NAMES_ITS_SIZE:
        assert extent(io.BytesIO(whole)).size == len(whole)
    part = whole[: int(len(whole) * cut)]
    with pytest.warns(MediaWarning) as caught:
        video = preprocess_video(part, isolate=isolate)
    (message,) = [str(w.message) for w in caught if issubclass(w.category, MediaWarning)]
    found = re.search(r"ends early: (.*), and is seen up to ([\d.]+) s$", message)
    assert found, message
    assert float(found[2]) == pytest.approx(video.frame_times[-1], abs=1e-3)
    assert video.frame_times[-1] < 89 / 30 or (form, cut) in (("avi", 0.9), ("mpeg", 0.9))  # without index, filling
    sizes = re.fullmatch(r"it has (\d+) of the (\d+) bytes that it names", found[1])
    if sizes is None:
        assert (form, found[1]) in (("mpegts", "its last packet is cut off"), ("gif", "it has no end mark"))
        return
    assert int(sizes[1]) == len(part) < int(sizes[2])
    if form in NAMES_ITS_SIZE - {"mp4", "asf"}:  # of which what is missing altogether, such as an index, is not counted
        assert int(sizes[2]) == len(whole)


@pytest.mark.parametrize("form", ["mov", "apng"])
@pytest.mark.parametrize("cut", [0.3, 0.5, 0.7, 0.9, 0.99])
def test_where_a_decoder_may_refuse_the_rest_it_is_told_all_the_same(form, cut):
    whole = clip(form, numbered(20))
    with warnings.catch_warnings(), pytest.raises((MediaError, MediaWarning), match=r"ends early|is damaged|no video"):
        warnings.simplefilter("error", MediaWarning)
        preprocess_video(whole[: int(len(whole) * cut)], isolate=False)


@pytest.mark.parametrize("form", CODECS)
@pytest.mark.parametrize("other", ["alike", "larger"])
def test_of_joined_files_all_frames_are_seen_or_none(form, other):
    """The second may be of another size, so that what describes the first does not describe it."""
    size = {} if other == "alike" else {"height": 112, "width": 192}
    second = [numbered_frame(100 + number, **size) for number in range(20)]
    first, behind = clip(form, numbered(20)), clip(form, second)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", MediaWarning)
            if (form, other) == ("mpeg", "larger"):  # FFmpeg drops the frame before the new size
                with pytest.warns(MediaWarning, match="its last frame stands for those behind it"):
                    preprocess_video(first + behind, num_frames=40, isolate=False)
                return
            seen = numbers(preprocess_video(first + behind, num_frames=40, isolate=False))
    except MediaError as error:
        assert form in {"mp4", "mov", "matroska", "webm", "flv", "asf", "mxf", "apng", "ivf", "gif", "ogg"}
        if form == "ogg":
            assert "is damaged" in str(error)
            return
        assert f"is two files joined byte by byte, the second from byte {len(first)} on" in str(error)
        assert extent(io.BytesIO(first + behind)).second == len(first)
    else:
        assert form in {"avi", "mpegts", "mpeg"}
        assert seen == [*range(20), *range(100, 120)]
    assert numbers(preprocess_video(first, num_frames=20, isolate=False)) == list(range(20))


def live_webm(frames):
    """As a recorder writes it that cannot go back: of unknown length."""

    class Pipe(io.RawIOBase):
        def __init__(self):
            self.data = bytearray()

        def writable(self):
            return True

        def write(self, data):
            self.data += data
            return len(data)

    pipe = Pipe()
    with av.open(pipe, "w", format="webm", options={"live": "1"}) as container:
        stream = container.add_stream("libvpx-vp9", rate=30)
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return bytes(pipe.data)


def test_a_live_recording_says_no_length_and_is_read():
    data = live_webm(numbered(20))
    assert extent(io.BytesIO(data)).size is None
    with warnings.catch_warnings():
        warnings.simplefilter("error", MediaWarning)
        assert numbers(preprocess_video(data, num_frames=20, isolate=False)) == list(range(20))
    assert extent(io.BytesIO(data + data)).second == len(data)


@pytest.mark.parametrize(
    ("data", "size"),
    [
        (b"", None),
        (b"text", None),
        (b"\x1a\x45\xdf\xa3\x80\x18\x53\x80\x67\x01" + b"\xff" * 7, None),  # live: of unknown length
        (b"\x1a\x45\xdf\xa3\x80\x18\x53\x80\x67\x88" + b"\0" * 20, 18),
        (b"\0\0\0\x10ftypisom\0\0\0\0\0\0\0\0mdat" + b"x" * 10, 34),  # the box that ends with the file
        (b"\0\0\0\x10ftypisom\0\0\0\0\0\0\0\x01mdat" + (1 << 33).to_bytes(8, "big"), 16 + (1 << 33)),
        (b"RIFF\0\0\0\0AVI ", None),
        (b"RIFF\x05\0\0\0AVI \0\0RIFF\x10\0\0\0AVIX", 38),
        (b"FLV\x01\x05\0\0\0\x09\0\0\0\0\x12\0\0\x09" + b"\0" * 7 + b"123456789\0\0\0\x14", 33),
        (b"FLV\x01\x05\0\0\0\x09\0\0\0\0filesize\0" + struct.pack(">d", 77), 77),
        (b"FLV\x01\x05\0\0\0\x09\0\0\0\0filesize\0" + struct.pack(">d", float("nan")), 9),
    ],
)
def test_sizes_by_hand(data, size):
    assert extent(io.BytesIO(data)).size == size


@pytest.mark.parametrize(("packet", "mode"), [(188, "0"), (192, "1")])  # broadcast, and Blu-ray's .m2ts
def test_a_transport_stream_whose_packets_are_whole_says_nothing(packet, mode):
    file = io.BytesIO()
    with av.open(file, "w", format="mpegts", options={"mpegts_m2ts_mode": mode}) as container:
        stream = container.add_stream("libx264", rate=30)
        stream.height, stream.width, stream.pix_fmt = 56, 96, "yuv420p"
        for number in range(90):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(numbered_frame(number), format="rgb24")))
        container.mux(stream.encode())
    data = file.getvalue()
    assert len(data) % packet == 0 and video_container(data[:200]) == "MPEG-TS"
    for end in range(20 * packet, 22 * packet):
        missing = extent(io.BytesIO(data[:end])).missing
        assert (missing is None) == (end % packet == 0), end
    with pytest.warns(MediaWarning, match="ends early: its last packet is cut off, and is seen up to"):
        preprocess_video(data[: 21 * packet - 10], num_frames=4, isolate=False)
    assert extent(io.BytesIO(b"G" * 188 * 20)).missing is None


@settings(max_examples=60, deadline=None)
@given(form=st.sampled_from(sorted(CODECS.keys() - {"mp4", "mov"})), seed=st.integers(0, 2**32 - 1))
def test_damaged_parts_end_the_walk(form, seed):
    """No error, no endless walk, and no second file where none is."""
    random = np.random.default_rng(seed)
    data = bytearray(DAMAGED[form])
    for at in random.integers(0, len(data), 20):
        data[at] = random.integers(0, 256)
    assert extent(io.BytesIO(bytes(data))).second is None


DAMAGED = {form: clip(form, numbered(6)) for form in CODECS}
