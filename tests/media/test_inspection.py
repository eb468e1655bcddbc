"""Pictures of patches, frames and positions: their sizes, and that what they show is where they show it."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from qwen2vl.errors import MediaError
from qwen2vl.media.inspection import (
    draw_contact_sheet,
    draw_patch_grid,
    patches_to_frames,
    plot_positions,
    position_ids,
)
from qwen2vl_kernels import images_to_patches

MAGENTA = (235, 20, 130)


@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize(("frames", "height", "width"), [(2, 28, 28), (2, 56, 84), (6, 112, 28)])
def test_patches_to_frames_is_the_inverse(frames, height, width, slots):
    pixels = np.random.default_rng(0).integers(0, 256, (frames, height, width, 3), np.uint8)
    patches = images_to_patches([pixels], [(height, width)], temporal_patch_size=slots).numpy()
    assert np.array_equal(patches_to_frames(patches, (frames // slots, height // 14, width // 14)), pixels)


def test_patches_to_frames_checks_shapes():
    with pytest.raises(MediaError, match="grid_thw"):
        patches_to_frames(np.zeros((4, 1176), np.uint8), (1, 4, 4))
    with pytest.raises(MediaError, match="grid_thw"):
        patches_to_frames(np.zeros((4, 1175), np.uint8), (1, 2, 2))


@pytest.mark.parametrize(("height", "width", "scale"), [(56, 84, 7), (28, 560, 1), (588, 616, 1), (280, 28, 2)])
def test_grid_lines_lie_on_patch_and_token_borders(height, width, scale):
    grey = np.full((height, width, 3), 60, np.uint8)
    picture = draw_patch_grid(grey)
    assert picture.size == (width * scale, height * scale)
    # A row and a column that cross neither labels nor the first and last token.
    drawn = np.asarray(picture)
    side = 28 * scale
    if width > 2 * 28:
        row = drawn[7 * scale, side:-side].astype(int)
        tokens = np.flatnonzero((row == MAGENTA).all(-1)) + side
        assert {round(x / side) for x in tokens} == set(range(1, width // 28))
        assert all(abs(x - side * round(x / side)) <= 2 for x in tokens)
        plain = np.flatnonzero((row == 60).all(-1)) + side
        assert not {x for x in plain if x % (14 * scale) == 0}, "a patch border without a line"
        assert len(plain) > 0.7 * len(row)
    assert (drawn[side // 2, 4] != 60).any() and (drawn[-side // 2, -4] != 60).any()  # first and last are tinted


def test_grid_wants_whole_blocks():
    with pytest.raises(MediaError, match="multiples of 28"):
        draw_patch_grid(np.zeros((42, 56, 3), np.uint8))


@pytest.mark.parametrize("steps", [1, 3, 7, 384])
def test_contact_sheet_shows_every_frame(steps):
    """Every frame has a colour of its own; all are found, in reading order."""
    count = 2 * steps
    colours = [(n * 37 % 256, n % 256, 128 + n // 256) for n in range(count)]
    frames = np.array(colours, np.uint8)[:, None, None, :].repeat(28, 1).repeat(56, 2)
    sheet = draw_contact_sheet(frames, [n / 2 for n in range(count)], tokens_per_step=2)
    assert max(sheet.size) < 6000
    seen: dict[tuple[int, ...], tuple[int, int]] = {}
    pixels = np.asarray(sheet)
    for y in range(0, pixels.shape[0], 3):
        for x, pixel in enumerate(pixels[y]):
            seen.setdefault(tuple(pixel.tolist()), (y, x))
    places = [seen[colour] for colour in colours]
    assert places == sorted(places)


def test_position_ids_of_an_image():
    positions, begin, end = position_ids("image", (1, 4, 6))
    assert (begin, end) == (8, 14) and positions.shape == (3, 22)
    assert positions[:, :8].tolist() == [list(range(8))] * 3
    assert positions[:, 8:14].tolist() == [[8] * 6, [8, 8, 8, 9, 9, 9], [8, 9, 10, 8, 9, 10]]
    assert positions[:, 14:].tolist() == [list(range(11, 19))] * 3


def test_position_ids_of_a_video():
    positions, begin, end = position_ids("video", (3, 2, 4))
    assert positions[:, begin:end].tolist() == [[8, 8, 9, 9, 10, 10], [8] * 6, [8, 9] * 3]
    assert positions[:, end].tolist() == [11] * 3


def test_plot_is_drawn(tmp_path):
    for kind, grid in (("image", (1, 2, 2)), ("image", (1, 128, 128)), ("video", (4, 20, 30))):
        path = tmp_path / "plot.png"
        plot_positions(path, kind, grid, title="a title")
        with Image.open(path) as picture:
            colours = {tuple(c) for c in np.asarray(picture.convert("RGB")).reshape(-1, 3).tolist()}
            assert picture.size == (1440, 600)
            assert {(0x56, 0xB4, 0xE9), (0xD5, 0x5E, 0x00), (0x11, 0x11, 0x11)} <= colours
