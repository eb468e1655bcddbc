"""HEIC and AVIF pictures, and what is said where nothing is installed that reads them."""

import io
import sys

import numpy as np
import pytest
from PIL import Image, features

from qwen2vl.errors import MediaError, MediaWarning
from qwen2vl.media.image import load_image, preprocess_image
from qwen2vl.media.kinds import picture_format, video_container
from qwen2vl.media.options import Access, Limits
from qwen2vl.media.video import preprocess_video
from tests.media.media_fixtures import encode_image

BRANDS = {
    b"heic": "HEIF",
    b"heix": "HEIF",
    b"hevc": "HEIF",
    b"mif1": "HEIF",
    b"msf1": "HEIF",
    b"avif": "AVIF",
    b"avis": "AVIF",
}


def blocks(channels=3):
    """(96, 160, channels) uint8, no two of its four quarters alike, so that a turn shows."""
    colours = np.array([[[200, 30, 40, 255], [30, 180, 60, 255]], [[40, 60, 200, 255], [230, 220, 40, 0]]], np.uint8)
    return colours[..., :channels].repeat(48, 0).repeat(80, 1)


def heic(image, **options):
    """The bytes of a HEIC file, made by pillow-heif."""
    pillow_heif = pytest.importorskip("pillow_heif", reason="pillow-heif is not installed")
    pillow_heif.register_heif_opener()
    return encode_image(image, "HEIF", quality=95, **options)


def ftyp(major, *others):
    brands = b"".join(others)
    return (16 + len(brands)).to_bytes(4, "big") + b"ftyp" + major + b"\0\0\0\0" + brands


@pytest.mark.parametrize("brand", BRANDS)
def test_the_kinds_of_iso_pictures(brand):
    head = ftyp(brand, b"mif1", b"miaf") + b"\0" * 64
    assert picture_format(head[:64]) == BRANDS[brand] and video_container(head) is None
    assert picture_format(ftyp(b"mif1", b"avif")) == "AVIF" and picture_format(ftyp(b"mif1", b"heic")) == "HEIF"
    assert picture_format(ftyp(b"isom", b"avc1")) is None


@pytest.mark.parametrize("brand", [brand for brand, format in BRANDS.items() if format == "HEIF"])
def test_what_is_missing_for_heic_is_named(brand, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)  # which another test may have asked for
    for read in (load_image, preprocess_video):
        with pytest.raises(MediaError, match=r'is a HEIC or HEIF picture: pip install "pillow-heif'):
            read(ftyp(brand, b"mif1") + b"\0" * 100)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_heic_is_read_upright_and_turned_once(orientation):
    """Cameras say it twice: in the container, which counts, and in EXIF, which stays from before."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    want = load_image(encode_image(blocks(), exif=exif))
    camera = Image.fromarray(blocks())
    camera.info["exif"] = exif.tobytes()
    data = heic(camera)
    assert (b"irot" in data or b"imir" in data) == (orientation > 1)
    got = load_image(data)
    assert got.shape == want.shape
    assert np.abs(got[12::24, 12::24].astype(int) - want[12::24, 12::24]).max() < 16
    assert preprocess_image(data).source_size == want.shape[:2]


def test_transparent_and_many_pictures_of_heic():
    got = load_image(heic(blocks(4)))
    assert np.abs(got[72, 120].astype(int) - 255).max() < 4 and np.abs(got[24, 40] - [200.0, 30, 40]).max() < 16
    several = heic(blocks(), save_all=True, append_images=[Image.new("RGB", (64, 64))], primary_index=1)
    with pytest.warns(MediaWarning, match="holds 2 pictures, of which the main one is read"):
        assert load_image(several).shape == (64, 64, 3)


def test_heic_is_no_video_and_damage_is_told(tmp_path):
    several = heic(blocks(), save_all=True, append_images=[Image.new("RGB", (64, 64))])
    for data in (heic(blocks()), several):
        with pytest.raises(MediaError, match=r"is a picture \(HEIF\), not a video: give it as an image"):
            preprocess_video(data)
    whole = heic(blocks())
    for share in (0.1, 0.5, 0.9):
        with pytest.raises(MediaError, match="is a damaged image"):
            load_image(whole[: int(len(whole) * share)])
    with pytest.raises(MediaError, match=r"160 x 96 pixels, more than max_source_pixels = 1000"):
        load_image(whole, access=Access(limits=Limits(max_source_pixels=1000)))


def test_avif_is_read_or_what_is_missing_is_named(monkeypatch):
    if features.check("avif") is True:
        got = load_image(encode_image(blocks(), "AVIF", quality=95))
        assert np.abs(got[12::24, 12::24].astype(int) - blocks()[12::24, 12::24]).max() < 16
    monkeypatch.setattr(features, "check", lambda name: False)
    with pytest.raises(MediaError, match=r'is an AVIF picture, for a newer Pillow: pip install "pillow>=11.3"'):
        load_image(io.BytesIO(ftyp(b"avif", b"mif1") + b"\0" * 100))
