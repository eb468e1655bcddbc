"""Pictures of what a media file becomes: its patches and tokens, the kept frames, the rotary position ids."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from qwen2vl_kernels import mrope_positions

from ..errors import MediaError, Qwen2VLError, install_hint

_INK = (20, 24, 32)
_PAPER = (255, 255, 255)
_TOKEN = (235, 20, 130)  # a colour that photos seldom have
# Okabe and Ito's colours, which colour-blind readers can tell apart; narrow lines lie over wide ones.
_AXES = (("t: time", "#56B4E9", 5.0), ("h: row", "#D55E00", 2.4), ("w: column", "#111111", 0.9))
_STEPS = ((0, 84, 140), (150, 70, 0))
_SHEET_WIDTH = 1600


def patches_to_frames(
    patches: np.ndarray, grid_thw: Sequence[int], *, patch_size: int = 14, merge_size: int = 2
) -> np.ndarray:
    """The inverse of :func:`qwen2vl_kernels.images_to_patches` at the size of the frames.

    Args:
        patches: (t * gh * gw, 3 * temporal_patch_size * patch_size**2) uint8 in merge-block order.
        grid_thw: (t, gh, gw).

    Returns:
        (t * temporal_patch_size, gh * patch_size, gw * patch_size, 3) uint8.

    Raises:
        MediaError: patches do not fit the grid.
    """
    t, gh, gw = grid_thw
    step, rest = divmod(patches.shape[-1], 3 * patch_size**2)
    if rest or patches.shape[0] != t * gh * gw or gh % merge_size or gw % merge_size:
        raise MediaError(f"patches of shape {patches.shape} do not fit grid_thw {tuple(grid_thw)}")
    blocks = patches.reshape(
        t, gh // merge_size, gw // merge_size, merge_size, merge_size, 3, step, patch_size, patch_size
    )
    # (t, block row, block column, row, column, c, frame, y, x) to (t, frame, rows and y, columns and x, c)
    frames = blocks.transpose(0, 6, 1, 3, 7, 2, 4, 8, 5)
    return frames.reshape(t * step, gh * patch_size, gw * patch_size, 3)


def draw_patch_grid(
    image: np.ndarray, *, patch_size: int = 14, merge_size: int = 2, first_token: int = 0
) -> Image.Image:
    """A resized image under the grid of its patches (thin) and of the blocks that become tokens (thick).

    The first and the last token carry their index. Images below 560 pixels are enlarged by a whole factor,
    so that the lines stay apart.

    Args:
        image: (H, W, 3) uint8, sides multiples of patch_size * merge_size.
        first_token: index of the first token.
    """
    height, width = image.shape[:2]
    block = patch_size * merge_size
    if height % block or width % block:
        raise MediaError(f"image must have sides that are multiples of {block}, got {height} x {width}")
    scale = max(1, math.ceil(560 / max(height, width)))
    size = (width * scale, height * scale)
    enlarged = Image.fromarray(np.ascontiguousarray(image)).resize(size, Image.Resampling.NEAREST)
    pixels = np.array(enlarged)
    # Darker on light ground, lighter on dark.
    lines = np.where(pixels.mean(-1, keepdims=True) > 128, pixels * 0.6, pixels * 0.6 + 102).astype(np.uint8)
    every = patch_size * scale
    pixels[::every] = lines[::every]
    pixels[:, ::every] = lines[:, ::every]
    rows, columns, side = height // block, width // block, block * scale
    ends = ((first_token, 0, 0), (first_token + rows * columns - 1, size[0] - side, size[1] - side))
    for _, left, top in ends:
        tile = pixels[top : top + side, left : left + side]
        tile[:] = tile * 0.55 + np.array(_TOKEN) * 0.45
    picture = Image.fromarray(pixels)
    draw = ImageDraw.Draw(picture)
    _rule(draw, size, side, 2 if side < 100 else 3, _TOKEN)
    font = _font(min(36, max(14, side // 2)))
    for index, left, top in ends:
        _label(draw, str(index), (left, top, left + side - 1, top + side - 1), size, font)
    return picture


def draw_contact_sheet(
    frames: np.ndarray, times: Sequence[float], *, tokens_per_step: int, temporal_patch_size: int = 2
) -> Image.Image:
    """The kept frames of a video in reading order.

    The frames of one time step, which share their tokens, stand side by side under one bar that names them.

    Args:
        frames: (T, H, W, 3) uint8, T a multiple of temporal_patch_size.
        times: seconds of every frame.
        tokens_per_step: tokens that each time step becomes.
    """
    count, height, width = frames.shape[:3]
    steps = count // temporal_patch_size
    gap, caption, bar = 10, 22, 22
    # As near to a square sheet as whole time steps allow.
    per_row = min(steps, math.ceil(math.sqrt(steps * height / width / temporal_patch_size)))
    columns = per_row * temporal_patch_size
    thumb_w = max(72, min(320, width, (_SHEET_WIDTH - gap) // columns - gap))
    thumb_h = max(1, round(thumb_w * height / width))
    rows = math.ceil(steps / per_row)
    cell_w, cell_h = thumb_w + gap, thumb_h + caption + bar + gap
    sheet = Image.new("RGB", (gap + columns * cell_w, gap + rows * cell_h), _PAPER)
    draw = ImageDraw.Draw(sheet)
    small = _font(14)
    labels = ("step {0}: tokens {1}-{2}", "step {0}", "{0}")
    widest = (steps - 1, (steps - 1) * tokens_per_step, steps * tokens_per_step - 1)
    room = temporal_patch_size * cell_w - gap - 8
    label = next((text for text in labels if draw.textlength(text.format(*widest), font=small) <= room), "")
    for step in range(steps):
        row, column = divmod(step, per_row)
        left, top = gap + column * temporal_patch_size * cell_w, gap + row * cell_h
        right = left + temporal_patch_size * cell_w - gap
        colour = _STEPS[(step + row * (per_row % 2 == 0)) % 2]
        draw.rectangle((left, top, right - 1, top + bar - 1), fill=colour)
        first = step * tokens_per_step
        text = label.format(step, first, first + tokens_per_step - 1)
        draw.text((left + 5, top + bar / 2), text, fill=_PAPER, font=small, anchor="lm")
        for slot in range(temporal_patch_size):
            index = step * temporal_patch_size + slot
            x = left + slot * cell_w
            thumb = Image.fromarray(np.ascontiguousarray(frames[index]))
            sheet.paste(thumb.resize((thumb_w, thumb_h), Image.Resampling.LANCZOS), (x, top + bar))
            middle = (x + thumb_w / 2, top + bar + thumb_h + caption / 2)
            draw.text(middle, f"{times[index]:.2f} s", fill=_INK, font=small, anchor="mm")
    return sheet


def position_ids(kind: str, grid_thw: Sequence[int], *, merge_size: int = 2) -> tuple[np.ndarray, int, int]:
    """The M-RoPE position ids of ``text + one image or video + text`` (arXiv 2409.12191, section 2.1).

    Args:
        kind: ``"image"`` or ``"video"``.
        grid_thw: (t, gh, gw) in patches.

    Returns:
        (3, L) int64 ids on the axes t, h, w, and the first and one past the last index of the media tokens.
    """
    tokens = math.prod(grid_thw) // merge_size**2
    # Enough text to be seen beside the media, and little enough for their rise to be seen beside the text's.
    text = max(8, tokens // 20, grid_thw[0], grid_thw[1] // merge_size, grid_thw[2] // merge_size)
    ids = torch.tensor([[0] * text + [1] * tokens + [0] * text])
    grid = torch.tensor([list(grid_thw)])
    positions, _ = mrope_positions(
        ids,
        grid if kind == "image" else None,
        grid if kind == "video" else None,
        image_token_id=1 if kind == "image" else 2,
        video_token_id=1 if kind == "video" else 2,
        spatial_merge_size=merge_size,
    )
    return positions[:, 0].numpy(), text, text + tokens


def plot_positions(path: Path, kind: str, grid_thw: Sequence[int], *, title: str, merge_size: int = 2) -> None:
    """Save a plot of :func:`position_ids`: three lines over the index in the sequence.

    Raises:
        Qwen2VLError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ModuleNotFoundError as error:
        raise Qwen2VLError(
            f"the plot of position ids needs matplotlib ({error}); {install_hint('matplotlib')}"
        ) from error
    positions, begin, end = position_ids(kind, grid_thw, merge_size=merge_size)
    t, gh, gw = grid_thw
    figure = Figure(figsize=(12, 5), dpi=120, layout="constrained")
    axes: Any = figure.add_subplot()
    index = np.arange(positions.shape[1])
    for (name, colour, width), values in zip(_AXES, positions, strict=True):
        axes.plot(index, values, color=colour, linewidth=width, label=name)
    axes.axvspan(begin - 0.5, end - 0.5, color="#000000", alpha=0.05, linewidth=0)
    low, high = int(positions.min()), int(positions.max())
    axes.set_ylim(low - 0.04 * (high - low), high + 0.14 * (high - low))
    axes.set_xlim(-0.5, len(index) - 0.5)
    size = f"{gh // merge_size} × {gw // merge_size}"
    what = f"image: {size} tokens" if kind == "image" else f"video: {t} steps of {size} tokens"
    for at, text in (
        ((begin - 1) / 2, "text"),
        ((begin + end - 1) / 2, what),
        ((end + len(index) - 1) / 2, "text"),
    ):
        axes.annotate(text, (at, high + 0.07 * (high - low)), ha="center", va="center", fontsize=10)
    axes.set_xlabel("index in the sequence")
    axes.set_ylabel("position id")
    axes.set_title(title, fontsize=11, parse_math=False)  # it holds the name of a file
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.savefig(path)


def _rule(draw: ImageDraw.ImageDraw, size: tuple[int, int], every: int, width: int, colour: tuple[int, ...]) -> None:
    """Lines over the whole picture, centred on the multiples of ``every``; the outermost lie on its edges."""
    for axis in (0, 1):
        for at in range(0, size[axis] + 1, every):
            low = min(max(at - width // 2, 0), size[axis] - width)
            band = [0, 0, size[0] - 1, size[1] - 1]
            band[axis], band[axis + 2] = low, low + width - 1
            draw.rectangle(band, fill=colour)


def _label(
    draw: ImageDraw.ImageDraw, text: str, box: tuple[int, int, int, int], size: tuple[int, int], font: Any
) -> None:
    """Text in the middle of ``box``, on a plate that is pushed inside the picture where it is wider."""
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font, anchor="lt")
    width, height = right - left + 8, bottom - top + 8
    x = min(max((box[0] + box[2] + 1 - width) // 2, 0), size[0] - width)
    y = min(max((box[1] + box[3] + 1 - height) // 2, 0), size[1] - height)
    draw.rounded_rectangle((x, y, x + width - 1, y + height - 1), radius=4, fill=_INK)
    draw.text((x + 4, y + 4), text, fill=_PAPER, font=font, anchor="lt")


def _font(size: int) -> Any:
    return ImageFont.load_default(size)
