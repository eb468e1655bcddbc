"""Pictures and a video drawn on the spot, for demos and tests that ship no media files."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from qwen2vl.errors import MediaError, install_hint

_DAY = {
    "sky": ((86, 150, 222), (222, 238, 250)),
    "light": (255, 214, 90),
    "hills": ((126, 168, 150), (88, 142, 84), (62, 114, 58)),
    "wall": (236, 224, 200),
    "roof": (164, 62, 46),
    "window": (120, 170, 205),
    "sign": (250, 246, 232),
}
_NIGHT = {
    "sky": ((10, 16, 48), (58, 62, 108)),
    "light": (240, 240, 220),
    "hills": ((38, 52, 78), (26, 44, 52), (18, 34, 36)),
    "wall": (92, 88, 98),
    "roof": (70, 34, 40),
    "window": (255, 214, 120),
    "sign": (150, 146, 138),
}


def draw_scene(width: int, height: int, *, night: bool = False, text: str = "QWEN2-VL") -> Image.Image:
    """A landscape with a house, a tree, a sun or moon, and a sign with ``text``; RGB."""
    colours = _NIGHT if night else _DAY
    w, h = 2 * width, 2 * height  # drawn at twice the size, for smooth edges
    y, x = np.mgrid[0:h, 0:w].astype(np.float32)
    top, bottom = (np.array(c, np.float32) for c in colours["sky"])
    down = (y / h)[..., None]
    pixels = top * (1 - down) + bottom * down
    # The light's disc, and a glow that fades with the distance.
    radius = 0.09 * min(w, h)
    distance = np.hypot(x - 0.78 * w, y - 0.2 * h)[..., None]
    fading = np.exp(-np.maximum(distance - radius, 0) / (1.6 * radius)) * (0.35 if night else 0.6)
    glow = np.where(distance < radius, 1, fading)
    pixels = pixels * (1 - glow) + np.array(colours["light"], np.float32) * glow
    for n, colour in enumerate(colours["hills"]):
        crest = h * (0.56 + 0.13 * n) + 0.05 * h * np.sin(x[0] / w * (5 + 2 * n) + 2.1 * n)
        shade = 1 - 0.25 * np.clip((y - crest) / h, 0, 1)[..., None]
        pixels = np.where((y > crest)[..., None], np.array(colour, np.float32) * shade, pixels)
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)

    unit = min(w, h) / 20  # the rest is laid out on a grid that keeps its proportions
    left, ground = 0.14 * w, 0.86 * h
    draw.rectangle((left, ground - 6 * unit, left + 7 * unit, ground), fill=colours["wall"])
    draw.rectangle((left + 5 * unit, ground - 10 * unit, left + 6 * unit, ground - 6 * unit), fill=colours["roof"])
    ridge = [(left - unit, ground - 6 * unit), (left + 3.5 * unit, ground - 10 * unit)]
    draw.polygon([*ridge, (left + 8 * unit, ground - 6 * unit)], fill=colours["roof"])
    draw.rectangle((left + 2.9 * unit, ground - 3.2 * unit, left + 4.3 * unit, ground), fill=(92, 60, 40))
    for side in (0.7, 4.9):
        pane = (left + side * unit, ground - 4.6 * unit, left + (side + 1.5) * unit, ground - 3.1 * unit)
        draw.rectangle(pane, fill=colours["window"], outline=(250, 250, 250), width=max(2, int(unit / 8)))

    trunk = max(0.56 * w, left + 11 * unit)  # clear of the house, in narrow pictures too
    draw.rectangle((trunk - 0.3 * unit, ground - 3 * unit, trunk + 0.3 * unit, ground), fill=(84, 58, 38))
    for across, up, size in ((0, 5.2, 1.7), (-1.2, 4, 1.5), (1.2, 4, 1.5)):
        centre = (trunk + across * unit, ground - up * unit)
        draw.ellipse(_round(centre, size * unit), fill=tuple(int(0.85 * c) for c in colours["hills"][1]))

    font = ImageFont.load_default(1.5 * unit)
    place = (min(0.68 * w, w - draw.textlength(text, font=font) - unit), ground - 1.6 * unit)
    box = draw.textbbox(place, text, font=font, anchor="lm")
    board = (box[0] - 0.6 * unit, box[1] - 0.6 * unit, box[2] + 0.6 * unit, box[3] + 0.6 * unit)
    for at in (board[0] + unit, board[2] - unit):
        draw.rectangle((at - 0.15 * unit, board[3], at + 0.15 * unit, ground + unit), fill=(84, 58, 38))
    draw.rectangle(board, fill=colours["sign"], outline=(84, 58, 38), width=max(2, int(unit / 6)))
    draw.text(place, text, font=font, anchor="lm", fill=(40, 32, 28))
    return image.resize((width, height), Image.Resampling.LANCZOS)


def write_video(path: Path, *, width: int = 320, height: int = 240, seconds: float = 6.0, fps: int = 24) -> None:
    """An MP4 in which a balloon crosses the scene.

    Raises:
        MediaError: PyAV is missing.
    """
    background = draw_scene(width, height)
    count = round(seconds * fps)

    def frames() -> Iterator[Image.Image]:
        for n in range(count):
            frame = background.copy()
            way = n / max(1, count - 1)
            _draw_balloon(frame, 0.1 + 0.8 * way, 0.42 - 0.22 * math.sin(math.pi * way))
            yield frame

    write_frames(path, frames(), size=(width, height), fps=fps)


def write_frames(path: Path, frames: Iterable[Image.Image], *, size: tuple[int, int], fps: int) -> None:
    """An MP4 of RGB pictures.

    Args:
        size: (width, height) in pixels of each, even numbers.

    Raises:
        MediaError: PyAV is missing.
    """
    try:
        import av
    except ModuleNotFoundError as error:
        raise MediaError(f"writing a video needs PyAV ({error}); {install_hint('av')}") from error
    with av.open(str(path), "w") as container:
        # MPEG-4 part 2, which every build of FFmpeg can encode.
        stream = container.add_stream("mpeg4", rate=fps, options={"qmax": "3"})
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.bit_rate = 400_000
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())


def _draw_balloon(image: Image.Image, across: float, down: float) -> None:
    draw = ImageDraw.Draw(image)
    x, y, r = across * image.width, down * image.height, 0.09 * image.height
    for side in (-0.5, 0.5):
        draw.line((x + side * r, y + 0.8 * r, x + 0.5 * side * r, y + 1.7 * r), fill=(70, 50, 40), width=1)
    draw.ellipse(_round((x, y), r), fill=(214, 48, 60))
    draw.ellipse((x - 0.4 * r, y - r, x + 0.4 * r, y + r), fill=(250, 196, 60))
    draw.rectangle((x - 0.3 * r, y + 1.7 * r, x + 0.3 * r, y + 2.1 * r), fill=(120, 80, 50))


def _round(centre: tuple[float, float], radius: float) -> tuple[float, float, float, float]:
    return (centre[0] - radius, centre[1] - radius, centre[0] + radius, centre[1] + radius)
