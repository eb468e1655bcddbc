"""Reading of images from every kind of source, hostile content and remote addresses."""

import base64
import contextlib
import http.server
import io
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from qwen2vl.errors import MediaError
from qwen2vl.media.image import load_image, preprocess_image
from qwen2vl.media.options import Access, Limits
from qwen2vl.media.video import preprocess_video
from tests.media.media_fixtures import (
    encode_image,
    noise,
    numbered,
    numbers,
    png_chunk,
    png_with_header,
    video_bytes,
)

# -------------------------------------------------------------------------------------------------- sources


def data_uri(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


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


def test_a_wrong_type_is_told_every_type_that_is_taken():
    """Each of those that are named is then taken."""
    image = Image.new("RGB", (30, 30), "red")
    file = io.BytesIO()
    image.save(file, "PNG")
    taken = {
        "bytes": file.getvalue(),
        "data URI": "data:image/png;base64," + base64.b64encode(file.getvalue()).decode(),
        "binary file object": io.BytesIO(file.getvalue()),
        "dict with 'bytes' or 'path'": {"bytes": file.getvalue()},
        "PIL image": image,
        "numpy array (uint8 or uint16)": np.asarray(image),
    }
    with pytest.raises(MediaError, match="got an object of type float") as caught:
        load_image(1.5)
    for name, source in taken.items():
        assert name in str(caught.value)
        assert load_image(source).shape == (30, 30, 3)


def test_datasets_own_form_of_a_file(tmp_path):
    """{"bytes": ..., "path": ...}, of which either may be None; bytes come first, as in datasets."""
    picture, other = noise(56, 84), noise(28, 28, seed=1)
    data, path = encode_image(picture), tmp_path / "other.png"
    path.write_bytes(encode_image(other))
    for source, want in (
        ({"bytes": data, "path": None}, picture),
        ({"bytes": data, "path": "it came from here.png"}, picture),
        ({"bytes": data}, picture),
        ({"bytes": None, "path": str(path)}, other),
        ({"path": path}, other),
        ({"path": path.as_uri()}, other),
    ):
        np.testing.assert_array_equal(load_image(source), want)
        video = preprocess_video([source, source])
        still = preprocess_video([want, want])
        np.testing.assert_array_equal(video.patches, still.patches)
    clip = video_bytes(numbered(4))
    assert preprocess_video({"bytes": clip, "path": "clip.mp4"}).frame_times == preprocess_video(clip).frame_times
    with pytest.raises(MediaError, match="allow_local_files is False"):
        load_image({"bytes": None, "path": str(path)}, access=Access(local_files=False))


def test_frames_joined_by_commas_in_a_data_uri():
    """data:video/jpeg;base64,F1,F2 are the pictures of a clip, one after another."""
    files = [encode_image(noise(56, 84, seed=n), "JPEG") for n in range(4)]
    encoded = [base64.b64encode(file).decode() for file in files]
    for count, joint in ((4, ","), (4, "%2C"), (4, ",\n"), (1, ",")):
        uri = "data:video/jpeg;base64," + joint.join(encoded[:count])
        got, want = preprocess_video(uri, fps=4.0), preprocess_video(files[:count], fps=4.0)
        np.testing.assert_array_equal(got.patches, want.patches)
        assert (got.grid_thw, got.frame_times) == (want.grid_thw, want.frame_times)
    two = ",".join(encoded[:2])
    for uri, match in (
        (f"data:video/jpeg;base64,{two},", "frame 2 of the list: bytes of length 0 is empty"),
        (f"data:video/jpeg;base64,{two},=", r"frame 2 of data URI \(video/jpeg.* malformed base64"),
        (f"data:video/jpeg,{two}", "not base64"),
        (f"data:video/mp4;base64,{two}", "malformed base64.* joined by commas are taken as data:video/jpeg"),
    ):
        with pytest.raises(MediaError, match=match) as caught:
            preprocess_video(uri)
        assert len(str(caught.value)) < 300
    with pytest.raises(MediaError, match="start and end apply to video files"):
        preprocess_video(f"data:video/jpeg;base64,{two}", start=1.0)


@pytest.mark.parametrize("mark", ["#", "?", "\t", "\n", ";", "%23", " "])
@pytest.mark.parametrize("read", [load_image, preprocess_video])
def test_a_file_url_never_opens_a_file_of_another_name(mark, read, tmp_path):
    """Beside the named file lie those that urllib would make of its name: cut at the mark, and without it."""
    named, others = tmp_path / f"a{mark}1.png", [tmp_path / name for name in ("a", "a1.png")]
    for other in others:
        other.write_bytes(encode_image(noise(28, 28)))
    url = f"file://{tmp_path}/a{mark}1.png"
    if mark in "#?":
        with pytest.raises(MediaError, match=r"in the name of a file is written %(23|3F) in a URL"):
            read(url)
    elif mark != "%23":
        with pytest.raises(MediaError, match="no such file"):
            read(url)
    named.write_bytes(encode_image(noise(56, 84)))
    assert load_image(named.as_uri()).shape == (56, 84, 3), "an escaped name is that file's"
    if mark not in ("#", "?", "%23"):
        assert load_image(url).shape == (56, 84, 3)


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ({}, "dict with no keys: wants 'bytes', 'path' or both"),
        ({"bytes": None, "path": None}, "dict with 'bytes', 'path': wants 'bytes', 'path' or both"),
        ({"bytes": b"x", "url": "y"}, "dict with 'bytes', 'url': wants"),
        ({"bytes": "text"}, "'bytes' holds a str"),
        ({"path": b"x"}, "'path' holds a bytes"),
    ],
)
def test_other_dicts_are_no_files(source, match):
    for read in (load_image, preprocess_video):
        with pytest.raises(MediaError, match=match):
            read(source)


def test_local_files_can_be_forbidden(tmp_path):
    """Paths and file URLs are refused, whether or not the file exists; what the program holds is taken."""
    pixels = noise(56, 56)
    data = encode_image(pixels)
    path = tmp_path / "a.png"
    path.write_bytes(data)
    named = [str(path), path, path.as_uri(), path.as_uri().replace("file", "FILE"), str(tmp_path / "none.png"), "C:\\x"]
    for source in named:
        for read in (load_image, preprocess_image, preprocess_video, lambda s, **k: preprocess_video([pixels, s], **k)):
            with pytest.raises(MediaError, match="names a file of this machine, and allow_local_files is False"):
                read(source, access=Access(local_files=False))
    for source in (data, io.BytesIO(data), pixels, Image.open(io.BytesIO(data)), data_uri(data)):
        np.testing.assert_array_equal(load_image(source, access=Access(local_files=False)), pixels)
    frames = preprocess_video([pixels, data, data_uri(data)], access=Access(local_files=False))
    assert frames.grid_thw[0] == 2


def test_roots_hold_local_files(tmp_path):
    """Resolved paths count, links of files, of folders and of the roots included; what is outside is not looked for."""
    data = encode_image(noise(56, 56))
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "inside").mkdir()
    for name in ("in/a.png", "in/deep/b.png", "outside.png", "inside/c.png"):
        (tmp_path / name).write_bytes(data)
    (tmp_path / "in" / "leads_out.png").symlink_to(tmp_path / "outside.png")
    (tmp_path / "in" / "door").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "leads_in.png").symlink_to(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "circle").symlink_to(tmp_path / "in" / "circle")
    (tmp_path / "alias").symlink_to(tmp_path / "in", target_is_directory=True)
    wanted = load_image(data)
    for roots in (tmp_path / "in", str(tmp_path / "alias"), [tmp_path / "in"], (tmp_path / "inside", tmp_path / "in")):
        access = Access(roots=roots)
        for name in ("in/a.png", "in/deep/b.png", "in/deep/../a.png", "leads_in.png", "alias/a.png"):
            for source in (str(tmp_path / name), tmp_path / name, f"file://{tmp_path / name}"):
                np.testing.assert_array_equal(load_image(source, access=access), wanted)
    root = str(tmp_path / "in")
    access = Access(roots=(tmp_path / "in",))
    by_link = ("in/leads_out.png", "in/door/outside.png", "in/../outside.png")
    for name in ("outside.png", *by_link, "inside/c.png", "none.png"):
        for source in (str(tmp_path / name), tmp_path / name, f"file://{tmp_path / name}"):
            for read in (load_image, preprocess_image, preprocess_video):
                with pytest.raises(MediaError, match=r"lies outside of the roots that files .*: ") as caught:
                    read(source, access=access)
                assert name in str(caught.value) and root in str(caught.value)
    with pytest.raises(MediaError, match=r"no such file: .*none\.png"):
        load_image(tmp_path / "in" / "none.png", access=access)
    with pytest.raises(MediaError, match=r"cannot be read|no such file"):
        load_image(tmp_path / "in" / "circle", access=access)
    with pytest.raises(MediaError, match=r"lies outside of the roots .*: none$"):
        load_image(tmp_path / "in" / "a.png", access=Access(roots=()))
    np.testing.assert_array_equal(load_image(data, access=access), wanted)  # the program's own
    with pytest.raises(MediaError, match=r"frame 1 of the list: .* lies outside of the roots"):
        preprocess_video([data, str(tmp_path / "outside.png")], access=access)
    with pytest.raises(MediaError, match="allow_local_files is False"):
        load_image(tmp_path / "in" / "a.png", access=Access(local_files=False, roots=root))


@pytest.mark.parametrize("roots", [3, [3], "no/such/folder", ["a\0b"], [None]], ids=repr)
def test_roots_are_folders(roots):
    with pytest.raises(MediaError, match=r"^roots"):
        Access(roots=roots)
    with pytest.raises(MediaError, match=r"^roots: .* is no folder"):
        Access(roots=__file__)


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


@pytest.mark.parametrize("size", [(60000, 60000), (13378, 13378), (8193, 8192), (67_108_865, 1)])
def test_decompression_bomb_is_refused_from_its_header(size):
    data = png_with_header(*size)
    assert len(data) < 200
    with pytest.raises(MediaError, match=r"bytes of length \d+ .*max_source_pixels.*67108864"):
        load_image(data)


def test_source_limit_is_the_callers(recwarn):
    pixels = np.zeros((100, 100, 3), np.uint8)
    few, enough, many = (Access(limits=Limits(max_source_pixels=most)) for most in (9999, 10000, 150_000_000))
    for source in (encode_image(pixels), Image.fromarray(pixels)):
        with pytest.raises(MediaError, match="100 x 100 pixels, more than max_source_pixels = 9999"):
            load_image(source, access=few)
        assert load_image(source, access=enough).shape == (100, 100, 3)
    with pytest.raises(MediaError, match="damaged"):  # between Pillow's warning and its error
        load_image(png_with_header(12000, 12000), access=many)
    assert not [warning for warning in recwarn if issubclass(warning.category, Image.DecompressionBombWarning)]


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
        assert item.patches.shape == (item.grid_thw[1] * item.grid_thw[2], 588)


def test_damaged_metadata_is_passed_over_with_one_warning_of_ours(tmp_path):
    """Neither Pillow's warnings nor its log lines reach stderr, even where every warning is shown; what may have said
    how the picture is turned is told."""
    pixels = noise(40, 40)
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x09" + b"\x01\x12\0\x03"  # promises nine entries
    encoded = encode_image(pixels)
    at = encoded.index(b"IDAT") - 4
    (tmp_path / "exif.png").write_bytes(encoded[:at] + png_chunk(b"eXIf", exif[6:]) + encoded[at:])
    (tmp_path / "exif.jpg").write_bytes(encode_image(pixels, "JPEG", exif=exif))
    tiff = bytearray(encode_image(pixels, "TIFF"))
    at = tiff.index(struct.pack("<HHIH", 277, 3, 1, 3))  # samples per pixel
    tiff[at + 8] = 200
    (tmp_path / "samples.tiff").write_bytes(tiff)
    tiff = bytearray(encode_image(pixels, "TIFF", dpi=(72, 72)))
    at = tiff.index(struct.pack("<HHI", 283, 5, 1))
    tiff[at + 8 : at + 12] = struct.pack("<I", 1 << 20)  # where the resolution lies, behind the end
    (tmp_path / "resolution.tiff").write_bytes(tiff)
    code = """if True:
        import sys, qwen2vl.errors
        from qwen2vl.media.image import load_image
        for path in sys.argv[1:]:
            try:
                print(load_image(path).shape)
            except qwen2vl.errors.MediaError:
                print("refused")
    """
    files = [str(tmp_path / name) for name in ("exif.png", "exif.jpg", "samples.tiff", "resolution.tiff")]
    done = subprocess.run([sys.executable, "-W", "always", "-c", code, *files], capture_output=True, text=True)
    assert done.stdout.split("\n")[:4] == ["(40, 40, 3)", "(40, 40, 3)", "refused", "(40, 40, 3)"]
    told = [line for line in done.stderr.split("\n") if line and not line.startswith(" ")]  # without the lines of code
    assert len(told) == 3, told
    for line, name in zip(told, ("exif.png", "exif.jpg", "resolution.tiff"), strict=True):
        assert "<string>" in line and "MediaWarning: " in line and name in line
        assert "has damaged metadata, which is passed over: " in line


# ---------------------------------------------------------------------------------------------------- remote


@pytest.fixture
def server(monkeypatch):
    """An HTTP server on this machine; yields its address and the number of requests seen."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    data = encode_image(noise(30, 44))
    video = video_bytes(numbered(9))
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
            if self.path == "/rude":
                self.send_error(404, "\x1b[2J\x1b]0;gone\x07")
                return
            if self.path == "/slow-headers":
                self.trickle(b"HTTP/1.0 200 OK\r\nX: ")
                return
            self.send_response(404 if self.path == "/missing" else 200)
            if self.path == "/short":
                self.send_header("Content-Length", str(len(data) + 1))
            if self.path == "/large":
                self.send_header("Content-Length", str(1 << 40))
            self.end_headers()
            if self.path in ("/ok", "/missing", "/short"):
                self.wfile.write(data)
            if self.path == "/video":
                self.wfile.write(video)
            if self.path == "/slow-body":
                self.trickle(data[:100])

        def trickle(self, start):
            """Some bytes, and then one every 50 ms, for 3 seconds or as long as somebody listens."""
            with contextlib.suppress(OSError):
                self.wfile.write(start)
                for _ in range(60):
                    time.sleep(0.05)
                    self.wfile.write(b"a")

        def log_message(self, format, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_address[1]}", seen
        httpd.shutdown()
        thread.join()


def test_a_body_shorter_than_its_length_is_refused(server):
    address, _ = server
    with pytest.raises(MediaError, match=r"/short' breaks off after \d+ of \d+ bytes"):
        load_image(f"{address}/short", access=Access(remote=True))


def test_what_a_server_says_has_no_control_characters(server):
    address, _ = server
    with pytest.raises(MediaError, match="gone") as caught:
        load_image(f"{address}/rude", access=Access(remote=True))
    assert str(caught.value).isprintable()


def test_remote_images(server):
    address, seen = server
    with pytest.raises(MediaError, match="allow_remote"):
        load_image(f"{address}/ok")
    assert not seen
    fetched = load_image(f"{address}/ok", access=Access(remote=True, local_files=False))
    np.testing.assert_array_equal(fetched, noise(30, 44))
    for path in ("/ok", "/redirect"):
        np.testing.assert_array_equal(load_image(address + path, access=Access(remote=True)), noise(30, 44))


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
        load_image(server[0] + path, access=Access(remote=True))


@pytest.mark.parametrize("path", ["/slow-headers", "/slow-body"])
def test_a_trickle_does_not_outlast_the_deadline(server, monkeypatch, path):
    monkeypatch.setattr("qwen2vl.media.sources.REMOTE_DEADLINE", 0.4)
    begin = time.monotonic()
    with pytest.raises(MediaError, match=r"took longer than 0\.4 s to arrive"):
        load_image(server[0] + path, access=Access(remote=True))
    assert time.monotonic() - begin < 1.5


def test_a_silent_server_is_left_at_the_deadline(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("qwen2vl.media.sources.REMOTE_DEADLINE", 0.4)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(MediaError, match="took longer than"):
        load_image(f"http://127.0.0.1:{silent.getsockname()[1]}/", access=Access(remote=True))


def test_file_size_limit(tmp_path):
    with open(tmp_path / "huge.webp", "wb") as file:
        file.write(encode_image(noise(30, 30), "WEBP"))
        file.truncate((1 << 30) + 1)  # sparse: takes no space on the disk
    with pytest.raises(MediaError, match="has 1073741825 bytes, more than the limit of 1073741824"):
        load_image(tmp_path / "huge.webp")


def test_remote_size_limit_holds_without_a_declared_length(server, monkeypatch):
    monkeypatch.setattr("qwen2vl.media.image.MAX_IMAGE_BYTES", 100)
    with pytest.raises(MediaError, match="more than the limit of 100 bytes"):
        load_image(server[0] + "/ok", access=Access(remote=True))


def test_unreachable_host():
    with pytest.raises(MediaError, match="could not be fetched"):
        load_image("http://127.0.0.1:9/a.png", access=Access(remote=True))


def test_remote_video(server):
    with pytest.raises(MediaError, match=r"/ok' is a picture \(PNG\), not a video"):
        preprocess_video(server[0] + "/ok", access=Access(remote=True))
    video = preprocess_video(server[0] + "/video", access=Access(remote=True))
    assert numbers(video) == [0, 3, 5, 8]
