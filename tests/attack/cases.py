"""What an attacker sends, one case for every seed: damaged files, messages of any shape, forged archives.

A case is made from the numbers of a ``random.Random`` alone, so that its seed names it, and is then read as a server or
a training run would read it.
"""

from __future__ import annotations

import io
import json
import os
import random
import struct
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from qwen2vl.prompt.processor import Processor
from qwen2vl.training.data import build_dataset
from tests.training.data_files import chat, make_processor

#: One case: made from a generator of numbers, and read.
Case = Callable[[random.Random], None]

_FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "ICO")
_NUMBERS = (0, 1, -1, 2, 28, 2**15, 2**16, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**70, -(2**63), 10**400)
_TEXTS = (
    "",
    "a",
    "<|im_start|>",
    "<|image_pad|>",
    "\x00",
    "\ud800",
    "é" * 50,
    "{{7*7}}",
    "../../etc/passwd",
    "file:///",
)
_KEYS = (
    *(
        "type",
        "text",
        "image",
        "video",
        "image_url",
        "role",
        "content",
        "min_pixels",
        "max_pixels",
        "fps",
        "num_frames",
    ),
    *("video_start", "loss", "tool_calls", "function_call", "name", "arguments", "resized_height", "x"),
)

_MEMBERS = (tarfile.REGTYPE,) * 8 + (tarfile.GNUTYPE_SPARSE, tarfile.SYMTYPE, tarfile.DIRTYPE)
_SIZES = (b"\xff" * 12, b"\x80" + b"\xff" * 11, b"77777777777\0", b"\x80" + bytes(11))


@cache
def processor() -> Processor:
    """With the tokenizer of bytes, no files, no network and few pixels: what fails here is not the machine."""
    with tempfile.TemporaryDirectory() as folder:
        made = make_processor(Path(folder))
    return Processor(made.tokenizer, allow_local_files=False, max_pixels=28 * 28 * 16, video_max_pixels=28 * 28 * 4)


def mutated(data: bytes, draw: random.Random) -> bytes:
    """``data`` with a few bytes, numbers, stretches or ends that are others."""
    found = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 4, 16))):
        place = draw.randrange(len(found)) if found else 0
        what = draw.randrange(7)
        if what == 0:
            found[place : place + 1] = bytes([draw.randrange(256)])
        elif what == 1:
            order, kind = draw.choice("<>"), draw.choice("HIQ")
            number = draw.choice(_NUMBERS) % 2 ** (8 * struct.calcsize(kind))
            found[place : place + struct.calcsize(kind)] = struct.pack(order + kind, number)
        elif what == 2:
            del found[place:]
        elif what == 3:
            del found[place : place + draw.randrange(1, 64)]
        elif what == 4:
            other = draw.randrange(len(found)) if found else 0
            found[place:place] = found[other : other + draw.randrange(1, 256)]
        elif what == 5:
            found[place:place] = draw.randbytes(draw.randrange(1, 64))
        elif found:
            found[place] ^= 1 << draw.randrange(8)
    return bytes(found)


@cache
def _picture(format: str, mode: str) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, format)
    return file.getvalue()


def picture(draw: random.Random) -> None:
    mode = draw.choice(("RGB", "L", "P"))
    format = draw.choice([f for f in _FORMATS if mode == "RGB" or f in ("PNG", "GIF", "BMP", "TIFF")])
    data = mutated(_picture(format, mode), draw)
    processor()([{"role": "user", "content": [{"type": "image", "image": data}]}])


@cache
def _clip() -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for n in range(8):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 20 * n, np.uint8), format="rgb24")
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return file.getvalue()


def clip(draw: random.Random) -> None:
    processor()([{"role": "user", "content": [{"type": "video", "video": mutated(_clip(), draw)}]}])


def _value(draw: random.Random, depth: int = 0) -> Any:
    what = draw.randrange(10 if depth < 4 else 7)
    if what < 2:
        return draw.choice(_TEXTS)
    if what == 2:
        return draw.choice(_NUMBERS)
    if what == 3:
        return draw.choice((None, True, False, float("nan"), float("inf"), -0.5, 1e308, b"\x89PNG"))
    if what == 4:
        return draw.choice(("user", "assistant", "system", "tool", "image", "video", "text"))
    if what < 7:
        return mutated(_picture("PNG", "RGB"), draw) if draw.random() < 0.2 else draw.choice(_TEXTS)
    if what == 7:
        return [_value(draw, depth + 1) for _ in range(draw.randrange(4))]
    return {draw.choice(_KEYS): _value(draw, depth + 1) for _ in range(draw.randrange(5))}


def message(draw: random.Random) -> None:
    """A conversation that is nearly right: one or two of its values are anything."""
    turns: Any = [
        {"role": "system", "content": "s"},
        {
            "role": "user",
            "content": [{"type": "image", "image": _picture("PNG", "RGB")}, {"type": "text", "text": "q"}],
        },
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": [{"type": "text", "text": draw.choice(_TEXTS)}]},
    ]
    for _ in range(draw.choice((1, 1, 2))):
        turn = draw.choice(turns)
        if not isinstance(turn, dict):
            continue
        where: Any = turn
        if isinstance(turn.get("content"), list) and turn["content"] and draw.random() < 0.7:
            item = draw.choice(turn["content"])
            where = item if isinstance(item, dict) else turn
        where[draw.choice([*where, draw.choice(_KEYS)])] = _value(draw)
    processor()(draw.choice((turns, turns, turns, _value(draw))), add_generation_prompt=draw.random() < 0.5)


def archive(draw: random.Random) -> None:
    file = io.BytesIO()
    kind = draw.choice((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
    with tarfile.open(fileobj=file, mode="w", format=kind) as tar:
        for n in range(3):
            long = "n" * draw.choice((1, 90, 300))
            members = {"json": json.dumps(chat(n)).encode(), "png": _picture("PNG", "L"), "jpg": b"no picture"}
            for extension in draw.sample(sorted(members), draw.randrange(1, 4)):
                info = tarfile.TarInfo(f"{long}{n}.{extension}")
                info.size = len(members[extension])
                info.type = draw.choice(
                    (tarfile.REGTYPE,) * 8 + (tarfile.GNUTYPE_SPARSE, tarfile.SYMTYPE, tarfile.DIRTYPE)
                )
                tar.addfile(info, io.BytesIO(members[extension]) if info.isreg() else None)
    data = bytearray(file.getvalue())
    if draw.random() < 0.5:  # a header whose sum is right, and whose size is not
        place = draw.randrange(len(data) // 512) * 512
        data[place + 124 : place + 136] = draw.choice(
            (b"\xff" * 12, b"\x80" + b"\xff" * 11, b"77777777777\0", b"\x80" + bytes(11))
        )
        data[place + 148 : place + 156] = b" " * 8
        data[place + 148 : place + 156] = f"{sum(data[place : place + 512]):06o}\0 ".encode()
    else:
        data = bytearray(mutated(bytes(data), draw))
    with tempfile.NamedTemporaryFile(suffix=".tar") as shard:
        shard.write(data or b"\0")
        shard.flush()
        entry = {"path": shard.name, "format": "webdataset", "shuffle": False, "max_pixels": 28 * 28}
        for _ in build_dataset([entry], processor(), max_tokens=500, epochs=1, max_bad=None, threads=0):
            pass


def _sleep(draw: random.Random) -> None:
    time.sleep(60)


def _end(draw: random.Random) -> None:
    os._exit(3)


def _fill(draw: random.Random) -> None:
    b"x" * (700 << 20)  # written to, so that the memory is there


def _exhaust(draw: random.Random) -> None:
    bytes(64 << 30)


def _raise(draw: random.Random) -> None:
    raise KeyError("of no type of ours")


CASES: dict[str, Case] = {"picture": picture, "message": message, "archive": archive, "clip": clip}
#: What each bad outcome is told by, for the test of those who tell.
PROBES: dict[str, Case] = {"sleep": _sleep, "end": _end, "fill": _fill, "exhaust": _exhaust, "raise": _raise}


def run(kind: str, seed: int, number: int) -> None:
    """Read one case. Raises what reading it raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (CASES | PROBES)[kind](random.Random(f"{kind} {seed} {number}"))
