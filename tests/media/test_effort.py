"""What pictures may cost: their work is counted from their headers, and threads share a budget of pixels."""

import io
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from qwen2vl.errors import MediaError
from qwen2vl.media import effort
from qwen2vl.media.effort import PIXEL_BUDGET, PixelBudget, count_scans
from qwen2vl.media.image import load_image, preprocess_image
from qwen2vl.media.options import Access, Limits
from qwen2vl.media.strictness import strict_pillow
from qwen2vl.media.video import preprocess_video
from tests.media.media_fixtures import encode_image, noise, numbered, png_chunk, png_with_header, video_bytes

# ----------------------------------------------------------------------------------------------------- time


class Decoded(BaseException):
    """Pixels are decoded."""


@pytest.fixture
def undecoded(monkeypatch):
    """Fail where a pixel would be decoded."""

    def load(image):
        raise Decoded

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)


def progressive(height, width, repeats=0):
    """A progressive JPEG, ten scans and its last one again."""
    data = encode_image(Image.new("RGB", (width, height)), "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + repeats * last + data[-2:]


def test_scans_are_counted_as_the_decoder_meets_them():
    still = encode_image(noise(64, 64), "JPEG")
    segment = b"\xff\xe1\0\x06\xff\xda\xff\xda"  # marks inside of a segment are data
    for data, scans in (
        (still, 1),
        (progressive(64, 64), 10),
        (progressive(64, 64, 30), 40),
        (still[:2] + 20 * segment + still[2:], 1),
        (still + progressive(64, 64), 1),  # what stands behind the end is not decoded
        (still[:-2] + b"\xff" * 9 + b"\xda\0\x02" + still[-2:], 2),  # fill bytes
        (still[:-2] + b"\xff\0\xff\xd0\xff\xda\0\x02" + still[-2:], 2),
        (still[:2], 1),
    ):
        assert count_scans(io.BytesIO(data), "it", 1000) == scans
    for gap in range(6):  # marks that lie over the border between two reads
        filled = still[:2] + b"\xff\xe1" + (60_002).to_bytes(2, "big") + bytes(60_000)
        filled = still[:2] + 17 * filled[2:] + still[2:-2] + bytes((1 << 20) - len(filled[2:]) * 17 - len(still) + gap)
        assert count_scans(io.BytesIO(filled + b"\xff\xda\0\x02\xff\xd9"), "it", 1000) == 2
    assert count_scans(io.BytesIO(progressive(64, 64, 5000)), "it", 7) == 8


def test_a_photo_whose_first_scan_holds_all_is_not_searched_for_others():
    """As decoders do, which call a second scan broken data without looking at it."""
    still = encode_image(noise(64, 64), "JPEG")
    scan = still.rindex(b"\xff\xda")
    apart = still[: scan + 4] + b"\x01" + still[scan + 5 :]  # its first scan is said to have one component
    for data, one in ((still, True), (apart, False), (progressive(64, 64), False), (still[:2], False)):
        assert effort._has_one_scan(io.BytesIO(data), "it") is one
    repeated = still[:-2] + 5000 * still[scan:-2] + still[-2:]
    with Image.open(io.BytesIO(repeated)) as image:
        effort.check_effort(image, "it", 64 * 64)
        with strict_pillow(), pytest.raises(OSError, match="broken data stream"):
            image.load()


def test_a_scan_that_is_repeated_is_refused_before_decoding(undecoded):
    data = progressive(800, 1000, 5000)
    with pytest.raises(MediaError, match=r"\d+ scans or more of 1000 x 800 pixels, .*max_decoded_pixels = 1073741824"):
        load_image(data)
    with (
        Image.open(io.BytesIO(data)) as image,
        pytest.raises(MediaError, match="max_decoded_pixels"),
    ):
        load_image(image)
    with pytest.raises(MediaError, match="more than 65536 segments"):
        load_image(progressive(64, 64)[:-2] + 70_000 * b"\xff\xfe\0\x02" + data[-2:])


def test_usual_photos_pass():
    for data in (progressive(3000, 4000), encode_image(noise(300, 400), "JPEG", comment=b"\xff\xda" * 100)):
        assert load_image(data).ndim == 3


def tiff(tiles, *, order: Any = "little", big=False, side=256):
    """A TIFF of two tiles in a row, named again and again in turn, so that no two neighbours are alike."""
    word, size = (8, 8) if big else (4, 2)
    start = 16 if big else 8
    data = {"little": b"II", "big": b"MM"}[order] + (43 if big else 42).to_bytes(2, order)
    data += (b"\x08\0\0\0" if order == "little" else b"\0\x08\0\0") if big else b""
    data += (start + side * side).to_bytes(word, order) + bytes(side * side)
    entries = [(256, 4, 1, 2 * side), (257, 4, 1, side), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)]
    entries += [(277, 3, 1, 1), (322, 3, 1, side), (323, 3, 1, side)]
    behind = len(data) + size + (20 if big else 12) * (len(entries) + 2) + word
    entries += [(324, 4, tiles, behind), (325, 4, tiles, behind)]
    data += len(entries).to_bytes(size, order)
    for tag, kind, number, value in entries:
        data += tag.to_bytes(2, order) + kind.to_bytes(2, order) + number.to_bytes(word, order)
        value = value.to_bytes(2 if kind == 3 else 4, order)
        data += value + bytes(word - len(value))
    return data + bytes(word) + start.to_bytes(4, order) * tiles


def test_a_tile_that_a_tiff_names_again_and_again(undecoded):
    with pytest.raises(MediaError, match=r"40000 tiles of 512 x 256 pixels, together 2621440000 to decode"):
        load_image(tiff(40_000))


@pytest.mark.parametrize(("order", "big"), [("little", False), ("big", False), ("little", True)])
def test_parts_that_pillow_would_keep_in_python_are_counted_before(monkeypatch, order, big):
    """A million tiles took 290 MB and four seconds."""
    assert load_image(tiff(4, order=order, big=big)).shape == (256, 512, 3)
    exif = Image.Exif()
    exif[0x010E] = "text" * 200_000  # which is one value
    assert load_image(encode_image(noise(40, 40), "TIFF", exif=exif)).shape == (40, 40, 3)

    def refuse(*given, **named):
        raise AssertionError("Pillow parses it")

    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(MediaError, match="has 300000 values in tag 324, more than 262144"):
        load_image(tiff(300_000, order=order, big=big))


def test_the_tags_of_all_pages_are_counted():
    """Pages that name one another may lie in one another, so that a small file has any number of tags."""
    size = 2 + 12 * 60_000 + 4
    data = b"II*\0\x08\0\0\0"
    for _ in range(5):
        data += (60_000).to_bytes(2, "little") + bytes(size - 6) + (len(data) + size).to_bytes(4, "little")
    with pytest.raises(MediaError, match="has more than 262144 tags: refused before decoding"):
        load_image(data)


def _gif(frames: int = 1) -> tuple[bytes, int]:
    """A file and where its first frame's descriptor, with what belongs to it, begins."""
    file = io.BytesIO()
    images = [Image.new("RGB", (4, 4), (90 * n, 0, 0)) for n in range(frames)]
    images[0].save(file, "GIF", save_all=True, append_images=images[1:])
    data = file.getvalue()
    return data, data.index(b",", 13 + (3 << (1 + (data[10] & 7)) if data[10] & 0x80 else 0))


@pytest.mark.parametrize(
    "parts", [b"!\xfe\1c\0" * 66_000, b"!\xff" + b"\1c" * 66_000 + b"\0", b"\0" * 66_000, b"\5" * 66_000]
)
def test_blocks_of_a_gif_are_counted(parts):
    """Before the first frame and behind it, where Pillow looks for a second one."""
    data, at = _gif()
    for damaged in (data[:at] + parts + data[at:], data[:-1] + parts + data[-1:]):
        with pytest.raises(MediaError, match="more than 65536 blocks beside its frames: refused before decoding"):
            load_image(damaged)
    assert load_image(data[:at] + parts[: 5 * 50] + (b"\0" if parts[1] == 0xFF else b"") + data[at:]).shape == (4, 4, 3)


def test_frames_of_a_gif_are_no_blocks():
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (4200, 4200), np.uint8)
    Image.fromarray(noise).save(file, "GIF")
    assert len(file.getvalue()) > 255 * 66_000 and load_image(file.getvalue()).shape == (4200, 4200, 3)


@pytest.mark.parametrize("mark", ["P1", "P2", "P3", "P4", "P5", "P6", "Pf"])
@pytest.mark.parametrize("filling", ["#" + "x" * 66_000 + "\n", "#\n" * 33_000, " " * 66_000])
def test_the_header_of_a_ppm_is_bounded(mark, filling):
    """Pillow reads it byte by byte: a megabyte takes a second."""
    sides = "4 4" if mark in ("P1", "P4") else "4 4 255"
    for header in (f"{mark}\n{filling}{sides}\n", f"{mark} 4 {filling}{sides[2:]}\n"):
        with pytest.raises(MediaError, match="has a header of more than 65536 bytes: refused before decoding"):
            load_image(header.encode() + b"1 " * 48)


def test_comments_among_the_numbers_of_a_ppm_are_counted():
    """Each moves all of a block that is behind it: 42 s for a megabyte."""
    pixels = np.full((4, 4, 3), 7, np.uint8)
    told = b"P3 4 4 255\n" + b"7 # c\n" * 48
    assert (load_image(told) == pixels).all()
    with pytest.raises(MediaError, match="more than 4096 comments: refused before decoding"):
        load_image(told + b"#\n" * 4100)
    assert (load_image(b"P6 4 4 255\n" + pixels.tobytes() + b"#" * 5000) == pixels).all()  # a byte there


def test_chunks_and_segments_are_counted_before(monkeypatch):
    png, jpeg = png_with_header(8, 8), encode_image(noise(40, 40), "JPEG")
    data = png[:33] + 70_000 * png_chunk(b"abCd", b"") + png[33:]
    with pytest.raises(MediaError, match="more than 65536 chunks"):
        load_image(data)
    monkeypatch.setattr(Image, "open", None)
    with pytest.raises(MediaError, match="more than 65536 segments"):
        load_image(jpeg[:2] + 70_000 * b"\xff\xfe\0\x02" + jpeg[2:])


def test_metadata_is_not_taken_at_any_size():
    data = encode_image(noise(40, 40))
    exif = png_chunk(b"eXIf", b"MM\0*" + bytes(5 << 20))
    with pytest.raises(MediaError, match="has EXIF metadata of more than 4194304 bytes"):
        load_image(data[:33] + exif + data[33:])


def test_scans_inside_of_a_tiff_count(undecoded):
    """libtiff takes up to a hundred of each strip, wherever those strips are in the file."""
    usual = encode_image(Image.new("RGB", (4000, 3000)), "TIFF", compression="jpeg")
    with pytest.raises(Decoded):
        load_image(usual)
    assert usual.count(b"\xff\xc0")
    with pytest.raises(MediaError, match="scans of 4000 x 3000 pixels, together 1200000000 to decode"):
        load_image(usual.replace(b"\xff\xc0", b"\xff\xc2"))


@pytest.mark.parametrize("head", [b"P3 5000 4000 255\n", b"P6 5000 4000 254\n"])
def test_forms_that_decode_slowly_have_less_room(undecoded, head):
    with pytest.raises(MediaError, match=r"in a form that decodes slowly .*more than max_decoded_pixels"):
        load_image(head + bytes(100))


def test_frames_and_pages_are_not_counted_to_the_end(monkeypatch):
    """A file of a gigabyte holds a hundred million frames, and Pillow reads each to count them."""
    frames = [Image.fromarray(noise(20, 20, seed=n)) for n in range(40)]
    for format in ("GIF", "TIFF"):
        data = encode_image(frames[0], format, save_all=True, append_images=frames[1:])
        plugin: Any = type(Image.open(io.BytesIO(data)))
        seeks, seek = [], plugin._seek
        monkeypatch.setattr(plugin, "_seek", lambda *given, seek=seek, seeks=seeks: (seeks.append(given), seek(*given)))
        with pytest.warns(match="holds several frames or pages"):
            load_image(data)
        assert len(seeks) < 4
    with pytest.raises(MediaError, match="more pages than max_item_frames = 16"):
        preprocess_video(data, access=Access(limits=Limits(max_item_frames=16)))
    assert len(seeks) < 30


# --------------------------------------------------------------------------------------------------- memory

PEAK = """
import sys
from pathlib import Path
from qwen2vl.media.image import load_image
def resident(what):
    return 1024 * int(next(l for l in open("/proc/self/status") if l.startswith(what)).split()[1])
load_image(sys.argv[1])
for path in sys.argv[2:]:
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    load_image(path)
    print(resident("VmHWM") - before)
"""


def test_conversions_hold_no_second_copy(tmp_path):
    """The file's pixels as Pillow keeps them, three bytes of each in the end, and a strip at a time between."""
    height, width = 2000, 3000
    grey = np.zeros((height, width), np.uint8)
    palette = Image.fromarray(grey).convert("P")
    rgb = Image.fromarray(np.zeros((height, width, 3), np.uint8))
    turned = Image.Exif()
    turned[0x0112] = 6
    cases = {  # bytes of a pixel in Pillow
        "palette.png": (encode_image(palette, transparency=bytes([9, 8])), 1),
        "alpha.png": (encode_image(rgb.convert("RGBA")), 4),
        "deep.png": (encode_image(grey.astype(np.uint16)), 2),
        "cmyk.jpg": (encode_image(rgb.convert("CMYK"), "JPEG"), 4),
        "turned.jpg": (encode_image(rgb, "JPEG", exif=turned), 4),
    }
    for name, (data, _) in cases.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "small.png").write_bytes(encode_image(noise(50, 50)))
    names = [str(tmp_path / name) for name in ("small.png", *cases)]
    result = subprocess.run([sys.executable, "-c", PEAK, *names], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for name, peak in zip(cases, map(int, result.stdout.split()), strict=True):
        most = (cases[name][1] + 3) * height * width + 30e6
        assert peak < most, f"{name}: {peak} bytes, more than {most}"


def test_every_mode_is_converted_as_in_one_piece(monkeypatch):
    rgba = Image.fromarray(noise(50, 40, channels=4))
    palette = rgba.convert("RGB").quantize(30)
    see_through = palette.copy()
    see_through.info["transparency"] = bytes(range(0, 240, 8))
    key = rgba.convert("RGB")
    key.info["transparency"] = key.getpixel((3, 3))
    deep = Image.fromarray(noise(50, 40)[..., 0].astype(np.uint16) * 200)
    pictures = [rgba, palette, see_through, key, deep, rgba.convert("RGB").convert("CMYK"), rgba.convert("LA")]
    pictures += [rgba.convert("1"), rgba.convert("RGBa"), rgba.convert("RGB").convert("HSV")]
    for orientation in range(1, 9):
        for image in pictures:
            image.getexif()[0x0112] = orientation
        whole = [load_image(image) for image in pictures]
        with monkeypatch.context() as patch:
            patch.setattr("qwen2vl.media.image._STRIP_PIXELS", 280)
            for image, wanted in zip(pictures, whole, strict=True):
                np.testing.assert_array_equal(load_image(image), wanted)
    arrays = [noise(50, 40, channels=4), noise(50, 40).astype(np.uint16) * 256, noise(50, 40)[..., 0]]
    whole = [load_image(array) for array in arrays]
    monkeypatch.setattr("qwen2vl.media.image._STRIP_PIXELS", 280)
    for array, wanted in zip(arrays, whole, strict=True):
        np.testing.assert_array_equal(load_image(array), wanted)


def test_pictures_side_by_side_share_a_budget(monkeypatch):
    """Eight threads, and never more than three pictures at one time."""
    inside, most, lock = 0, 0, threading.Lock()
    load = ImageFile.ImageFile.load
    meet = threading.Barrier(3, timeout=30)  # three are let in together

    def watched(image):
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        meet.wait()
        with lock:
            inside -= 1
        return load(image)

    monkeypatch.setattr("qwen2vl.media.image.check_effort", lambda image, label, limit: watched(image))
    data = encode_image(noise(50, 40))
    access = Access(limits=Limits(max_source_pixels=6500))
    with ThreadPoolExecutor(9) as pool:
        sizes = list(pool.map(lambda _: preprocess_image(data, access=access).source_size, range(9)))
    assert sizes == [(50, 40)] * 9 and most == 3


def test_a_large_picture_is_not_passed_by_small_ones_for_ever():
    budget, order = PixelBudget(), []

    def enter(pixels):
        with budget.hold(pixels, 10):
            order.append(pixels)

    with budget.hold(6, 10):
        threads = []
        for pixels in (9, 1, 2):
            threads.append(threading.Thread(target=enter, args=(pixels,)))
            threads[-1].start()
            while len(budget._waiting) < len(threads):
                threading.Event().wait(0.001)
        assert order == []
    for thread in threads:
        thread.join(30)
    assert order[0] == 9 and sorted(order) == [1, 2, 9]
    enter(50)  # alone, whatever the budget says


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_of_a_fork_waits_for_no_thread_of_its_parent(monkeypatch):
    """The parent holds all pixels, and Pillow's flag, while it forks."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    data, free = encode_image(noise(50, 40)), ImageFile.LOAD_TRUNCATED_IMAGES
    with PIXEL_BUDGET.hold(10**9, 10**9), strict_pillow(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Python 3.12, about forks beside threads
        child = os.fork()
        if not child:
            try:
                load_image(data)
                os._exit(7 if ImageFile.LOAD_TRUNCATED_IMAGES is free else 1)
            finally:
                os._exit(2)
        end = time.monotonic() + 30
        ended = (0, 0)
        while not ended[0] and time.monotonic() < end:
            ended = os.waitpid(child, os.WNOHANG)
            time.sleep(0.01)
    if not ended[0]:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert ended[0] and os.waitstatus_to_exitcode(ended[1]) == 7


# -------------------------------------------------------------------------------------------------- options


def test_a_photo_passes_and_a_panorama_by_a_setting(undecoded):
    with pytest.raises(Decoded):
        load_image(png_with_header(4000, 3000))
    with pytest.raises(
        MediaError, match=r"5000 pixels, more than max_source_pixels = 67108864.* raise limits.max_source_pixels"
    ):
        load_image(png_with_header(20_000, 5_000))
    with pytest.raises(Decoded):
        load_image(png_with_header(20_000, 5_000), access=Access(limits=Limits(max_source_pixels=100_000_000)))


def test_no_option_goes_beyond_the_limits_of_an_item(undecoded):
    clip, access = video_bytes(numbered(12)), Access(limits=Limits(max_item_frames=8))
    tiny = png_with_header(56, 56)
    asked: list[dict[str, Any]] = [
        {"min_pixels": 1_400_000_000},
        {"resized_height": 28_000, "resized_width": 28_000, "max_pixels": 10**9},
    ]
    for options in asked:
        with pytest.raises(MediaError, match=r"would be \d+ tokens, more than max_item_tokens = 32768"):
            preprocess_image(tiny, **options)
    with pytest.raises(MediaError, match=r"min_pixels must be a positive integer, got one of 2\*\*63 or more"):
        preprocess_image(tiny, min_pixels=10**5000)
    with pytest.raises(MediaError, match="pixels are beyond any picture"):
        preprocess_image(tiny, resized_height=10**5000, resized_width=56)
    with pytest.raises(MediaError, match="12 frames would be kept, more than max_item_frames = 8"):
        preprocess_video(clip, num_frames=12, access=access)
    with pytest.raises(MediaError, match="9 frames would be kept, more than max_item_frames = 8"):
        preprocess_video([tiny] * 9, access=access)
    with pytest.raises(MediaError, match=r"would be \d+ tokens, more than max_item_tokens = 32768"):
        preprocess_video(clip, max_video_tokens=10**9, video_min_pixels=10**9)
    with pytest.raises(MediaError, match=r"max_item_tokens must be a positive integer, got 0"):
        Limits(max_item_tokens=0)


def test_what_reserves_room_is_asked_before_there_is_any(undecoded):
    class Enough(Exception):
        pass

    def refuse(tokens):
        assert tokens == 4
        raise Enough

    with pytest.raises(Enough):
        preprocess_image(png_with_header(56, 56), reserve=refuse)
    with pytest.raises(Enough):
        preprocess_image(np.zeros((56, 56, 3), np.uint8), reserve=refuse)
    with pytest.raises(Enough):
        preprocess_video([np.zeros((56, 56, 3), np.uint8)] * 2, reserve=refuse, video_max_pixels=56 * 56)
