"""Images to patches: against transformers' PIL processor, Pillow and hand-computed values; and refusals."""

import base64
import http.server
import io
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as their_smart_resize

from qwen2vl.errors import MediaError
from qwen2vl.image import frames_to_patches, load_image, preprocess_image, resize_image, smart_resize
from tests.model.media_fixtures import (
    encode_image,
    noise,
    patches_to_frames,
    png_chunk,
    png_with_header,
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
        assert item.patches.shape == (grid[1] * grid[2], 1176) and item.patches.dtype == np.uint8
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
    image = (
        Image.fromarray(pixels) if mode == "RGBA" else Image.fromarray(pixels[..., :3].copy()).convert(mode)
    )
    if mode == "LA":
        image.putalpha(Image.fromarray(pixels[..., 3].copy()))
    ours = preprocess_image(image)
    rows, grid = their_patches(image)
    assert ours.grid_thw == grid
    back = unnormalise(rows)
    assert np.abs(back - back.round()).max() < 0.01
    np.testing.assert_array_equal(ours.patches, back.round().astype(np.uint8))


def test_patch_order_against_single_patches():
    frames = np.stack([noise(56, 84, seed=seed) for seed in range(4)])
    patches, grid = frames_to_patches(frames)
    assert grid == (2, 4, 6) and patches.shape == (48, 1176)
    np.testing.assert_array_equal(patches_to_frames(patches, grid), frames)


@pytest.mark.parametrize("count", [1, 3])
def test_odd_frames_repeat_the_last(count):
    frames = np.stack([noise(56, 56, seed=seed) for seed in range(count)])
    patches, grid = frames_to_patches(frames)
    again, grid_again = frames_to_patches(np.concatenate([frames, frames[-1:]]))
    assert grid == grid_again == ((count + 1) // 2, 4, 4)
    np.testing.assert_array_equal(patches, again)


def test_other_patch_sizes():
    frames = np.stack([noise(64, 96, seed=seed) for seed in range(3)])
    patches, grid = frames_to_patches(frames, patch_size=16, temporal_patch_size=1, merge_size=1)
    assert grid == (3, 4, 6) and patches.shape == (72, 768)
    want = frames[2, 16:32, 32:48].transpose(2, 0, 1).reshape(-1)  # frame 2, row 1, column 2
    np.testing.assert_array_equal(patches[2 * 24 + 1 * 6 + 2], want)


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((56, 56, 3), np.uint8),
        np.zeros((1, 56, 56, 4), np.uint8),
        np.zeros((0, 56, 56, 3), np.uint8),
        np.zeros((1, 56, 56, 3), np.float32),
        np.zeros((1, 57, 56, 3), np.uint8),
        np.zeros((1, 56, 14, 3), np.uint8),
    ],
)
def test_frames_to_patches_checks_its_input(frames):
    with pytest.raises(MediaError, match="frames must"):
        frames_to_patches(frames)


def test_resize_image_is_pillow_bicubic_and_checks_its_input():
    pixels = noise(50, 60)
    want = np.asarray(Image.fromarray(pixels).resize((84, 28), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(resize_image(pixels, 28, 84), want)
    np.testing.assert_array_equal(resize_image(pixels[:, ::2], 50, 30), pixels[:, ::2])
    with pytest.raises(MediaError, match="array must be"):
        resize_image(pixels[..., 0], 28, 28)
    with pytest.raises(MediaError, match="height must be"):
        resize_image(pixels, 0, 28)


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
        np.testing.assert_array_equal(
            load_image(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        )


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


def test_first_frame_of_an_animation():
    first, second = (Image.new("RGB", (30, 20), colour) for colour in ("red", "blue"))
    for format in ("GIF", "WEBP", "TIFF"):
        options = {"lossless": True} if format == "WEBP" else {}
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


# -------------------------------------------------------------------------------------------------- sources


def test_every_kind_of_source(tmp_path, monkeypatch):
    pixels = noise(30, 44)
    data = encode_image(pixels)
    path = tmp_path / "a picture #1 ä.png"
    path.write_bytes(data)
    text = base64.b64encode(data).decode()
    shifted = io.BytesIO(b"junk" + data)
    shifted.seek(4)

    class Pipe:
        def __init__(self):
            self.file = io.BytesIO(data)

        def read(self, size=-1):
            return self.file.read(size)

    monkeypatch.chdir(tmp_path)
    sources = [
        str(path),
        path,
        path.name,
        path.as_uri(),
        path.as_uri().replace("file://", "file://localhost"),
    ]
    sources += [data, bytearray(data), memoryview(data), io.BytesIO(data), shifted, Pipe(), Image.open(path)]
    sources += [f"data:image/png;base64,{text}", f"DATA:;base64,{text[:50]}\n{text[50:]}"]
    sources += [f"data:image/png;name=x;base64,{text.replace('+', '%2B').replace('=', '%3D')}"]
    for source in sources:
        np.testing.assert_array_equal(load_image(source), pixels)
    file = io.BytesIO(data)
    load_image(file)
    assert not file.closed


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ("no/such/file.png", "no such file: 'no/such/file.png'"),
        ("", "no such file: ''"),
        ("a\0b", r"no such file|cannot be read"),
        ("A" * 5000, r"5000 characters"),
        ("/", "not a regular file"),
        ("/dev/zero", "not a regular file"),
        (b"", r"bytes of length 0 is empty"),
        (io.BytesIO(), "is empty"),
        (io.StringIO("text"), "text mode"),
        ("data:image/png;base64", "comma"),
        ("data:image/png,abc", "not base64"),
        ("data:image/png;base64,@@@@", "malformed base64"),
        ("data:image/png;base64,QUJ", "malformed base64"),
        ("data:;base64,", "is empty"),
        ("ftp://host/a.png", "scheme 'ftp'"),
        ("file://elsewhere/a.png", "elsewhere"),
        ("http://127.0.0.1:9/a.png", "allow_remote=True"),
        ("HTTPS://127.0.0.1:9/a.png", "allow_remote=True"),
        (None, "source must be .* NoneType"),
        (7, "source must be"),
        ([1], "source must be"),
        (b"hello, I am a text", "not an image in a supported format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image in a supported format"),
    ],
)
def test_wrong_sources(source, match):
    with pytest.raises(MediaError, match=match) as caught:
        load_image(source)
    assert len(str(caught.value)) < 500


def test_closed_file_object(tmp_path):
    file = io.BytesIO(b"x")
    file.close()
    with pytest.raises(MediaError, match="cannot be read"):
        load_image(file)
    with open(tmp_path / "w", "wb") as write_only, pytest.raises(MediaError, match="cannot be read"):
        load_image(write_only)


def test_text_file_named_png_and_empty_file(tmp_path):
    (tmp_path / "text.png").write_text("this is not a picture\n" * 50)
    (tmp_path / "empty.png").touch()
    with pytest.raises(MediaError, match=r"text\.png' is not an image"):
        preprocess_image(tmp_path / "text.png")
    with pytest.raises(MediaError, match=r"empty\.png' is empty"):
        preprocess_image(str(tmp_path / "empty.png"))


# ------------------------------------------------------------------------------------------- hostile content


@pytest.mark.parametrize("size", [(60000, 60000), (13378, 13378), (178_956_971, 1)])
def test_decompression_bomb_is_refused_from_its_header(size):
    data = png_with_header(*size)
    assert len(data) < 200
    with pytest.raises(MediaError, match=r"bytes of length \d+ .*max_source_pixels.*178956970"):
        load_image(data)


def test_source_limit_is_the_callers(recwarn):
    pixels = np.zeros((100, 100, 3), np.uint8)
    for source in (encode_image(pixels), Image.fromarray(pixels)):
        with pytest.raises(MediaError, match="100 x 100 pixels, more than max_source_pixels = 9999"):
            load_image(source, max_source_pixels=9999)
        assert load_image(source, max_source_pixels=10000).shape == (100, 100, 3)
    with pytest.raises(MediaError, match="damaged"):  # between Pillow's warning and its error
        load_image(png_with_header(12000, 12000))
    assert not [
        warning for warning in recwarn if issubclass(warning.category, Image.DecompressionBombWarning)
    ]


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
def test_truncated_files(format, share):
    data = encode_image(noise(120, 160), format)
    with pytest.raises(MediaError, match=r"bytes of length \d+ is (a damaged image|not an image)"):
        load_image(data[: int(len(data) * share)])


@settings(max_examples=150, deadline=None)
@given(
    format=st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]),
    changes=st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 255)), min_size=1, max_size=20),
)
def test_damaged_bytes_give_an_image_or_a_media_error(format, changes):
    data = bytearray(encode_image(noise(40, 40), format))
    for position, value in changes:
        data[position % min(len(data), 400)] = value
    try:
        item = preprocess_image(bytes(data))
    except MediaError as error:
        assert "bytes of length" in str(error)
    else:
        assert item.patches.shape == (item.grid_thw[1] * item.grid_thw[2], 1176)


# ---------------------------------------------------------------------------------------------------- remote


@pytest.fixture
def server(monkeypatch):
    """An HTTP server on this machine; yields its address and the number of requests seen."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    data = encode_image(noise(30, 44))
    seen = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append(self.path)
            target = {
                "/redirect": "/ok",
                "/loop": "/loop",
                "/file": Path(__file__).as_uri(),
                "/ftp": "ftp://h/a",
            }
            if self.path in target:
                self.send_response(302)
                self.send_header("Location", target[self.path])
                self.end_headers()
                return
            self.send_response(404 if self.path == "/missing" else 200)
            if self.path == "/large":
                self.send_header("Content-Length", str(1 << 40))
            self.end_headers()
            if self.path in ("/ok", "/missing"):
                self.wfile.write(data)

        def log_message(self, format, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_address[1]}", seen
        httpd.shutdown()
        thread.join()


def test_remote_images(server):
    address, seen = server
    with pytest.raises(MediaError, match="allow_remote"):
        load_image(f"{address}/ok")
    assert not seen
    for path in ("/ok", "/redirect"):
        np.testing.assert_array_equal(load_image(address + path, allow_remote=True), noise(30, 44))


@pytest.mark.parametrize(
    ("path", "match"),
    [
        ("/missing", "could not be fetched: .*404"),
        ("/file", "could not be fetched: .*file:.* is not allowed"),
        ("/ftp", "redirects to scheme 'ftp'"),
        ("/loop", "could not be fetched"),
        ("/large", "declares 1099511627776 bytes, more than the limit"),
        ("/empty", "is empty"),
        ("/a b", "could not be fetched"),
    ],
)
def test_remote_failures(server, path, match):
    with pytest.raises(MediaError, match=match):
        load_image(server[0] + path, allow_remote=True)


def test_remote_size_limit_holds_without_a_declared_length(server, monkeypatch):
    monkeypatch.setattr("qwen2vl.image.MAX_IMAGE_BYTES", 100)
    with pytest.raises(MediaError, match="more than the limit of 100 bytes"):
        load_image(server[0] + "/ok", allow_remote=True)


def test_unreachable_host():
    with pytest.raises(MediaError, match="could not be fetched"):
        load_image("http://127.0.0.1:9/a.png", allow_remote=True)
