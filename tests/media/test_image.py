"""Images to patches: against transformers' PIL processor, Pillow and hand-computed values; and refusals."""

import io
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as their_smart_resize

from qwen2vl.errors import MediaError, MediaWarning
from qwen2vl.media.image import load_image, preprocess_image, smart_resize
from qwen2vl.media.options import Access, Limits, PatchShape
from qwen2vl.media.patches import PatchBuffer
from tests.media.media_fixtures import (
    encode_image,
    noise,
    png_chunk,
    resized,
    unnormalise,
)

# ---------------------------------------------------------------------------------------------------- sizes


@settings(max_examples=400, deadline=None)
@given(
    height=st.integers(1, 6000),
    width=st.integers(1, 6000),
    low=st.integers(1, 2_000_000),
    span=st.integers(0, 13_000_000),
    factor=st.sampled_from([28, 32, 14]),
)
def test_smart_resize_equals_transformers(height, width, low, span, factor):
    if max(height, width) / min(height, width) > 200:
        with pytest.raises(MediaError, match="aspect ratio"):
            smart_resize(height, width, factor=factor, min_pixels=low, max_pixels=low + span)
        return
    ours = smart_resize(height, width, factor=factor, min_pixels=low, max_pixels=low + span)
    assert ours == their_smart_resize(height, width, factor, low, low + span)


@pytest.mark.parametrize(
    ("source", "want"),
    [
        ((28, 28), (56, 56)),
        ((1, 1), (56, 56)),
        ((224, 224), (224, 224)),
        ((70, 70), (56, 56)),  # 2.5 rounds to 2
        ((98, 98), (112, 112)),  # 3.5 rounds to 4
        ((14, 300), (28, 280)),
        ((13, 2000), (28, 700)),
        ((10, 2000), (28, 812)),  # exactly 200 to 1
    ],
)
def test_smart_resize_by_hand(source, want):
    assert smart_resize(*source) == want


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (10, 2001)])
def test_aspect_ratio_above_200_is_refused(size):
    with pytest.raises(MediaError, match="aspect ratio must be at most 200"):
        smart_resize(*size)
    with pytest.raises(MediaError, match=r"bytes of length \d+: aspect ratio"):
        preprocess_image(encode_image(np.zeros((*size, 3), np.uint8)))


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"height": 0}, "height"),
        ({"width": -3}, "width"),
        ({"width": 2.5}, "width"),
        ({"height": True}, "height"),
        ({"factor": 0}, "factor"),
        ({"min_pixels": 0}, "min_pixels"),
        ({"max_pixels": -1}, "max_pixels"),
        ({"max_pixels": None}, "max_pixels"),
        ({"min_pixels": 1000, "max_pixels": 999}, "min_pixels"),
    ],
)
def test_smart_resize_names_the_wrong_argument(arguments, name):
    with pytest.raises(MediaError, match=name):
        smart_resize(**{"height": 100, "width": 100, **arguments})


def test_token_counts():
    for size, grid, tokens in [
        ((224, 224), (1, 16, 16), 64),
        ((28, 28), (1, 4, 4), 4),
        ((1, 1), (1, 4, 4), 4),
    ]:
        item = preprocess_image(np.zeros((*size, 3), np.uint8))
        assert (item.grid_thw, item.num_tokens) == (grid, tokens)
        assert item.patches.shape == (grid[1] * grid[2], 588) and item.patches.dtype == np.uint8
        assert item.source_size == size and item.resized_size == (grid[1] * 14, grid[2] * 14)


def test_resized_height_and_width():
    pixels = noise(100, 150)
    item = preprocess_image(pixels, resized_height=200, resized_width=90)
    assert item.resized_size == (196, 84) and item.source_size == (100, 150)
    capped = preprocess_image(pixels, resized_height=2800, resized_width=2800, max_pixels=28 * 28 * 100)
    assert capped.resized_size == (280, 280)
    with pytest.raises(MediaError, match="resized_height and resized_width"):
        preprocess_image(pixels, resized_height=56)


# -------------------------------------------------------------------------------------------------- patches


def their_patches(image, **limits):
    processor = Qwen2VLImageProcessorPil(min_pixels=3136, max_pixels=12_845_056)
    out = processor(images=[image], return_tensors="np", **limits)
    return out["pixel_values"], tuple(out["image_grid_thw"][0].tolist())


@pytest.mark.parametrize("size", [(224, 224), (233, 517), (900, 61), (5, 40), (56, 84), (640, 480)])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "CMYK", "1"])
def test_patches_equal_transformers(size, mode):
    pixels = noise(*size, channels=4, seed=size[0])
    image = Image.fromarray(pixels) if mode == "RGBA" else Image.fromarray(pixels[..., :3].copy()).convert(mode)
    if mode == "LA":
        image.putalpha(Image.fromarray(pixels[..., 3].copy()))
    ours = preprocess_image(image)
    rows, grid = their_patches(image)
    assert ours.grid_thw == grid
    back = unnormalise(rows)
    assert np.abs(back - back.round()).max() < 0.01
    first, second = np.moveaxis(back.round().astype(np.uint8).reshape(-1, 3, 2, 196), 2, 0)
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(ours.patches, first.reshape(-1, 588))


def filled(frames, height, width, **sizes):
    buffer = PatchBuffer(len(frames), height, width, PatchShape(**sizes))
    for index, frame in enumerate(frames):
        buffer.put(index, frame)
    return buffer.patches, buffer.grid_thw


def test_patch_order_against_single_patches():
    frames = np.stack([noise(56, 84, seed=seed) for seed in range(4)])
    patches, grid = filled(frames, 56, 84)
    assert grid == (2, 4, 6) and patches.shape == (48, 1176)
    for n, row in enumerate(patches.reshape(48, 3, 2, 14, 14)):
        step, n = divmod(n, 24)
        block, n = divmod(n, 4)
        top, left = 28 * (block // 3) + 14 * (n // 2), 28 * (block % 3) + 14 * (n % 2)
        for slot in range(2):
            want = frames[2 * step + slot, top : top + 14, left : left + 14]
            np.testing.assert_array_equal(row[:, slot].transpose(1, 2, 0), want)


@pytest.mark.parametrize("count", [1, 3])
def test_odd_frames_repeat_the_last(count):
    frames = np.stack([noise(56, 56, seed=seed) for seed in range(count)])
    patches, grid = filled(frames, 56, 56)
    again, grid_again = filled(np.concatenate([frames, frames[-1:]]), 56, 56)
    assert grid == grid_again == ((count + 1) // 2, 4, 4)
    np.testing.assert_array_equal(patches, again)


def test_other_patch_sizes():
    frames = np.stack([noise(64, 96, seed=seed) for seed in range(3)])
    patches, grid = filled(frames, 64, 96, patch_size=16, temporal_patch_size=1, merge_size=1)
    assert grid == (3, 4, 6) and patches.shape == (72, 768)
    want = frames[2, 16:32, 32:48].transpose(2, 0, 1).reshape(-1)  # frame 2, row 1, column 2
    np.testing.assert_array_equal(patches[2 * 24 + 1 * 6 + 2], want)


def test_frames_are_resized_and_may_be_mirrored_or_turned():
    frames = [noise(70, 90, seed=1)[::-1], noise(70, 90, seed=2)[:, ::-1], noise(90, 70, seed=3).transpose(1, 0, 2)]
    patches, _ = filled(frames, 56, 84)
    plain, _ = filled([resized(frame, 56, 84) for frame in frames], 56, 84)
    np.testing.assert_array_equal(patches, plain)


@pytest.mark.parametrize(("height", "width"), [(57, 56), (56, 14), (0, 56)])
def test_patch_buffer_checks_its_size(height, width):
    with pytest.raises(MediaError, match="frames must have sides that are multiples of 28"):
        PatchBuffer(1, height, width)


@pytest.mark.parametrize("options", [{"min_pixels": 10**18}, {"min_pixels": 10**10}, {"resized_height": 10**6,
                                     "resized_width": 10**6, "max_pixels": 10**13}])  # fmt: skip
def test_a_size_that_no_memory_holds_is_refused_before_it_is_asked_for(options):
    options.setdefault("max_pixels", options.get("min_pixels"))
    with pytest.raises(MediaError, match=r"would be \d+ tokens, more than max_item_tokens = 32768; lower the pixels"):
        preprocess_image(Image.new("RGB", (56, 56)), **options)
    raised = Access(limits=Limits(max_item_tokens=10**18))
    with pytest.raises(MediaError, match=r"make patches of \d+ bytes, more than \d+; lower min_pixels"):
        preprocess_image(Image.new("RGB", (56, 56)), access=raised, **options)


# -------------------------------------------------------------------------------------------------- formats


@pytest.mark.parametrize("format", ["PNG", "WEBP", "BMP", "TIFF", "PPM", "GIF"])
def test_lossless_formats(format):
    pixels = noise(40, 52)
    if format == "GIF":  # 256 colours
        pixels = np.repeat(pixels[..., :1], 3, axis=2)
    options = {"lossless": True} if format == "WEBP" else {}
    image = Image.fromarray(pixels[..., 0]) if format == "GIF" else Image.fromarray(pixels)
    np.testing.assert_array_equal(load_image(encode_image(image, format, **options)), pixels)


def test_jpeg_and_cmyk_jpeg():
    image = Image.fromarray(noise(40, 52))
    for mode in ("RGB", "L", "CMYK"):
        data = encode_image(image.convert(mode), "JPEG", quality=95)
        np.testing.assert_array_equal(load_image(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(format, orientation):
    # Four flat quarters; orientation k says where the stored first row and column belong (EXIF tag 0x0112).
    upright = np.zeros((32, 64, 3), np.uint8)
    upright[:16, :32], upright[:16, 32:], upright[16:, :32] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],  # row 0 is the right side, column 0 the top
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: upright.transpose(1, 0, 2)[:, ::-1],  # row 0 is the left side, column 0 the bottom
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(format, {})
    data = encode_image(stored.copy(), format, exif=exif, **options)
    for source in (data, Image.open(io.BytesIO(data))):
        got = load_image(source).astype(int)
        assert got.shape == upright.shape
        assert np.abs(got - upright).max() <= 4


def png_with(*chunks, behind=False):
    """(pixels, PNG bytes) with further chunks before, or behind, the pixel data."""
    pixels = noise(40, 56)
    data = encode_image(pixels)
    at = data.index(b"IEND" if behind else b"IDAT") - 4
    return pixels, data[:at] + b"".join(chunks) + data[at:]


LARGE = zlib.compress(b"metadata" * (3 << 17))  # 3 MB
CHUNKS = {
    "profile": png_chunk(b"iCCP", b"sRGB\0\0" + LARGE),
    "profile in an unknown compression": png_chunk(b"iCCP", b"sRGB\0\1" + LARGE),
    "damaged profile": png_chunk(b"iCCP", b"sRGB\0"),
    "compressed text": png_chunk(b"zTXt", b"Comment\0\0" + LARGE),
    "text in an unknown compression": png_chunk(b"zTXt", b"Comment\0\1" + LARGE),
    "international text": png_chunk(b"iTXt", b"Comment\0\1\0en\0\0" + LARGE),
    "much plain text": png_chunk(b"tEXt", b"Comment\0" + b"x" * (9 << 20)) * 8,
    "EXIF that is none": png_chunk(b"tEXt", b"Raw profile type exif\0\nexif\n 4\nzzzz"),
}


@pytest.mark.parametrize("behind", [False, True], ids=["before the pixels", "behind them"])
@pytest.mark.parametrize("name", CHUNKS)
def test_metadata_does_not_stand_between_a_file_and_its_pixels(name, behind):
    pixels, data = png_with(CHUNKS[name], behind=behind)
    np.testing.assert_array_equal(load_image(data), pixels)


@pytest.mark.parametrize("behind", [False, True], ids=["before the pixels", "behind them"])
def test_an_orientation_in_a_text_is_kept(behind):
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = (b"Exif\0\0" + exif.tobytes().removeprefix(b"Exif\0\0")).hex().encode()
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    profile = b"\nexif\n%d\n%s" % (len(stored) // 2, stored)
    for chunk in (
        png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp),
        png_chunk(b"tEXt", b"Raw profile type exif\0" + profile),
        png_chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(profile)),
    ):
        pixels, data = png_with(CHUNKS["profile"], chunk, CHUNKS["compressed text"], behind=behind)
        np.testing.assert_array_equal(load_image(data), np.rot90(pixels, -1))


def test_first_frame_of_an_animation():
    first, second = (Image.new("RGB", (30, 20), colour) for colour in ("red", "blue"))
    for format in ("GIF", "WEBP", "TIFF"):
        options = {"lossless": True} if format == "WEBP" else {}
        with pytest.warns(MediaWarning, match="holds several frames or pages"):
            got = load_image(encode_image(first, format, save_all=True, append_images=[second], **options))
        np.testing.assert_array_equal(got, np.asarray(first))


def test_sixteen_bit_greyscale_is_scaled():
    values = np.linspace(0, 65535, 64 * 40).astype(np.uint16).reshape(40, 64)
    want = np.round(values / 257).astype(np.uint8)
    for source in (encode_image(values), encode_image(values, "TIFF"), Image.fromarray(values), values):
        got = load_image(source)
        assert got.shape == (40, 64, 3)
        np.testing.assert_array_equal(got, np.repeat(want[..., None], 3, axis=2))


def test_sixteen_bit_transparency_becomes_white():
    data = encode_image(np.array([[0, 5140]], np.uint16))
    end_of_header = data.index(b"IHDR") + 4 + 13 + 4
    data = data[:end_of_header] + png_chunk(b"tRNS", b"\0\0") + data[end_of_header:]
    np.testing.assert_array_equal(load_image(data)[..., 0], [[255, 20]])


def test_thirty_two_bit_values_are_refused():
    for values in (np.zeros((30, 30), np.int32), np.zeros((30, 30), np.float32)):
        with pytest.raises(MediaError, match="32-bit"):
            load_image(encode_image(values, "TIFF"))


def test_transparency_is_laid_over_white():
    rgba = np.zeros((2, 4, 4), np.uint8)
    rgba[..., :3] = (200, 100, 0)
    rgba[..., 3] = [0, 51, 255, 255]
    want = np.array([[255, 255, 255], [244, 224, 204], [200, 100, 0], [200, 100, 0]])
    for source in (rgba, encode_image(rgba), Image.fromarray(rgba).convert("RGBa")):
        got = load_image(source)
        assert got.shape == (2, 4, 3)
        assert np.abs(got[0].astype(int) - want).max() <= (2 if isinstance(source, Image.Image) else 0)


def test_palette_with_transparent_entries():
    image = Image.new("P", (4, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.putdata([0, 1, 2, 0])
    got = load_image(encode_image(image, "PNG", transparency=1))
    np.testing.assert_array_equal(got[0], [[255, 0, 0], [255, 255, 255], [0, 0, 255], [255, 0, 0]])
    half = load_image(encode_image(image, "PNG", transparency=bytes([255, 255, 0])))
    np.testing.assert_array_equal(half[0], [[255, 0, 0], [0, 255, 0], [255, 255, 255], [255, 0, 0]])


def test_unusual_modes():
    assert load_image(Image.new("1", (5, 4), 1)).tolist() == np.full((4, 5, 3), 255).tolist()
    assert load_image(Image.new("LA", (5, 4), (10, 0)).convert("La")).min() == 255
    assert load_image(Image.new("HSV", (5, 4), (0, 0, 255))).min() == 255
    np.testing.assert_array_equal(load_image(Image.new("YCbCr", (1, 1), (76, 85, 255)))[0, 0], [254, 0, 0])


# --------------------------------------------------------------------------------------------------- arrays


def test_arrays():
    grey = noise(30, 40)[..., 0]
    want = np.repeat(grey[..., None], 3, axis=2)
    np.testing.assert_array_equal(load_image(grey), want)
    np.testing.assert_array_equal(load_image(grey[..., None]), want)
    np.testing.assert_array_equal(load_image(want[::-1]), want[::-1])
    deep = np.repeat(want[..., :1], 4, axis=2).astype(np.uint16) * 257
    deep[..., 3] = 65535
    np.testing.assert_array_equal(load_image(deep), want)


@pytest.mark.parametrize(
    ("array", "match"),
    [
        (np.zeros((8, 8, 3), np.float32), "dtype uint8 or uint16, got float32"),
        (np.zeros((8, 8, 3), bool), "dtype"),
        (np.zeros((8, 8, 3), np.int64), "dtype"),
        (np.zeros((3, 8, 8), np.uint8), r"channels come last"),
        (np.zeros((8, 8, 2), np.uint8), "shape"),
        (np.zeros((8,), np.uint8), "shape"),
        (np.zeros((1, 8, 8, 3), np.uint8), "shape"),
        (np.zeros((0, 8, 3), np.uint8), "shape"),
    ],
)
def test_wrong_arrays(array, match):
    with pytest.raises(MediaError, match=f"image array must have .*{match}|{match}"):
        load_image(array)
