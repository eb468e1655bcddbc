"""Files that end early are refused, whatever another library wants of Pillow, which gets back what it wanted."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageFile

from qwen2vl.errors import MediaError
from qwen2vl.media.image import load_image
from qwen2vl.media.strictness import strict_pillow
from qwen2vl.media.video import preprocess_video
from tests.media.media_fixtures import encode_image, noise


@pytest.fixture
def lenient(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_file_that_ends_early_is_refused_beside_a_lenient_library(lenient, format):
    data = encode_image(noise(120, 160), format)
    for end in (100, len(data) // 2, len(data) - 100):
        with pytest.raises(MediaError, match=r"is (a damaged image|not an image)"):
            load_image(data[:end])
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_a_picture_that_was_opened_before_is_refused_too(lenient, tmp_path):
    (tmp_path / "cut.png").write_bytes(encode_image(noise(120, 160))[:5000])
    with Image.open(tmp_path / "cut.png") as image, pytest.raises(MediaError, match="is a damaged image"):
        load_image(image)


def test_an_animation_that_ends_early_is_refused(lenient):
    frames = [Image.fromarray(noise(60, 60, seed=n)) for n in range(4)]
    data = encode_image(frames[0], "TIFF", save_all=True, append_images=frames[1:])
    with pytest.raises(MediaError, match=r"damaged|picture"):
        preprocess_video(data[: len(data) - 5000])


def test_threads_decode_side_by_side_and_the_last_one_gives_the_flag_back(lenient):
    """Both are inside at once: each waits for the other there."""
    meet = threading.Barrier(2, timeout=30)

    def inside(n):
        with strict_pillow():
            meet.wait()
            assert ImageFile.LOAD_TRUNCATED_IMAGES is False
            meet.wait()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(inside, range(2)))
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True
    whole, data = noise(120, 160), encode_image(noise(120, 160))

    def outcome(n):
        try:
            return load_image(data if n % 2 else data[:5000])
        except MediaError:
            return None

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(outcome, range(80)))
    assert all(pixels is None for pixels in found[::2])
    assert all(pixels is not None and np.array_equal(pixels, whole) for pixels in found[1::2])
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_who_sets_the_flag_meanwhile_keeps_it(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)
    with strict_pillow():
        ImageFile.LOAD_TRUNCATED_IMAGES = True
        with strict_pillow():
            assert ImageFile.LOAD_TRUNCATED_IMAGES is False
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True
