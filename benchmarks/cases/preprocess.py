"""Images and clips to patches on the CPU: decoded pixels in, what a model takes out.

Every provider begins with the form it likes best, made before the clock starts (arrays for ours, PIL images for
Pillow and transformers, channels-last tensors for torch), runs on the same number of threads as far as it can use them,
and allocates its own result, but for one row. Ours are the bytes that this package's model takes, the same on one
thread, and the normalised float32 rows that transformers' processor makes, in new memory and in a caller's buffer.
``torch`` is what torchvision does: an antialiased bicubic of uint8, then normalisation and the cut. ``Pillow`` is its
resize alone, without patches, and ``qwen-vl-utils`` its own way to that. The declared bytes are those of the input, so
that the rate is in bytes of pixels a second, beside the machine's copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from PIL import Image

from qwen2vl.config import IMAGE_MEAN, IMAGE_STD
from qwen2vl_kernels import images_to_patches, smart_resize

from ..case import Case, Check, Context, Provider, Workload, equal
from ._ops import made

RELEASED = 12_845_056  # pixels at most: the released checkpoints' setting
DEFAULT = 1_003_520  # transformers' default, 1280 tokens
CLIP = 512 * 784  # 64 frames of a clip share 16384 tokens
_LEVELS = 3.5 / 255 / min(IMAGE_STD)  # torch's bicubic rounds otherwise, by up to three levels of 255 on noise


def workloads(context: Context) -> Iterator[Workload]:
    if context.device.type != "cpu":
        return  # a case about the CPU
    if context.quick:
        yield _workload("one 70x90 image", [(70, 90)], RELEASED)
        yield _workload("4-frame clip 60x80", [(60, 80)] * 4, CLIP, clip=True)
        return
    for height, width in ((448, 448), (1008, 1344), (2160, 3840)):
        yield _workload(f"{width}x{height}", [(height, width)], RELEASED)
    yield _workload("4032x3024 to 1280 tokens", [(3024, 4032)], DEFAULT)
    sides = np.random.default_rng(0).integers(200, 500, (32, 2)).tolist()
    yield _workload("32 images of 200 to 500 px", sides, RELEASED)
    yield _workload("64-frame clip 1280x720", [(720, 1280)] * 64, CLIP, clip=True)


def photo(height: int, width: int, seed: int) -> np.ndarray:
    """Smooth light, an edge and sensor noise, ``(height, width, 3)`` uint8."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:1:height*1j, 0:1:width*1j].astype(np.float32)  # fmt: skip
    light = 120 + 80 * np.sin(5 * x + seed) * np.cos(4 * y) + 40 * (x + y > 1)
    colour = light[..., None] * np.array([1.0, 0.9, 0.8], np.float32)
    return np.clip(colour + rng.normal(0, 8, (height, width, 3)), 0, 255).astype(np.uint8)


def _workload(name: str, shapes: Sequence[Sequence[int]], max_pixels: int, *, clip: bool = False) -> Workload:
    """``shapes``: height and width of each picture."""
    sizes = [smart_resize(*shape, max_pixels=max_pixels) for shape in shapes]

    @cache
    def arrays() -> list[np.ndarray]:
        return [photo(height, width, n) for n, (height, width) in enumerate(shapes)]

    def ours(**options: Any) -> Callable[[], torch.Tensor]:
        items: Sequence[Any] = [arrays()] if clip else arrays()
        return partial(images_to_patches, items, sizes[:1] if clip else sizes, **options)

    def uint8(**options: Any) -> Callable[[], torch.Tensor]:
        return ours(temporal_patch_size=2 if clip else 1, **options)

    def floats() -> Callable[[], torch.Tensor]:
        return ours(mean=IMAGE_MEAN, std=IMAGE_STD)

    def buffered() -> Callable[[], torch.Tensor]:
        return ours(mean=IMAGE_MEAN, std=IMAGE_STD, out=torch.empty_like(floats()()))

    def pictures() -> list[Image.Image]:
        return [Image.fromarray(array) for array in arrays()]

    def tensors() -> list[torch.Tensor]:
        return [torch.from_numpy(array).permute(2, 0, 1) for array in arrays()]

    if clip:
        theirs = Provider("transformers", skipped="its video processor needs torchvision", peer=True)
    else:
        theirs = made("transformers", lambda: _transformers(pictures(), max_pixels), module="transformers")
    name_of_utils, utils = "qwen-vl-utils, resize alone", lambda: _qwen_vl_utils(pictures(), max_pixels)
    return Workload(
        name=name,
        providers=[
            made("uint8", uint8, peer=False),
            made("uint8, 1 thread", lambda: uint8(num_threads=1), peer=False),
            made("float32", floats, peer=False),
            made("float32 into a buffer", buffered, peer=False),
            theirs,
            Provider(name_of_utils, skipped="it takes a clip as a file", peer=True)
            if clip
            else made(name_of_utils, utils, module="qwen_vl_utils"),
            made("torch", lambda: partial(_torch_path, tensors(), sizes, clip)),
            made("Pillow, resize alone", lambda: partial(_pillow, pictures(), sizes)),
        ],
        gate=partial(_gate, clip),
        bytes=sum(3 * height * width for height, width in shapes),
        max_rounds=30,
    )


def _transformers(pictures: Sequence[Image.Image], max_pixels: int) -> Callable[[], torch.Tensor]:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil(min_pixels=3136, max_pixels=max_pixels)
    return lambda: processor(list(pictures), return_tensors="pt")["pixel_values"]


def _qwen_vl_utils(pictures: Sequence[Image.Image], max_pixels: int) -> Callable[[], list[Any]]:
    """Its fetch and resize: pictures, without patches."""
    from qwen_vl_utils import fetch_image  # pyright: ignore[reportMissingImports]

    requests = [{"image": picture, "min_pixels": 3136, "max_pixels": max_pixels} for picture in pictures]
    return lambda: [fetch_image(request) for request in requests]


def _pillow(pictures: Sequence[Image.Image], sizes: Sequence[tuple[int, int]]) -> list[Image.Image]:
    return [
        picture.resize((width, height), Image.Resampling.BICUBIC)
        for picture, (height, width) in zip(pictures, sizes, strict=True)
    ]


def _torch_path(
    tensors: Sequence[torch.Tensor], sizes: Sequence[tuple[int, int]], clip: bool
) -> torch.Tensor:  # (patches, 1176)
    mean = torch.tensor(IMAGE_MEAN).view(3, 1, 1) * 255
    std = torch.tensor(IMAGE_STD).view(3, 1, 1) * 255
    frames = []
    for tensor, (height, width) in zip(tensors, sizes, strict=True):
        if tuple(tensor.shape[1:]) != (height, width):
            options = {"mode": "bicubic", "antialias": True}
            tensor = torch.nn.functional.interpolate(tensor[None], size=(height, width), **options)[0]
        frames.append((tensor.float() - mean) / std)
    pairs = zip(frames[::2], frames[1::2], strict=True) if clip else ((frame, frame) for frame in frames)
    rows = []
    for pair in pairs:
        both = torch.stack(pair)  # (2, 3, height, width)
        gh, gw = both.shape[2] // 28, both.shape[3] // 28
        blocks = both.reshape(2, 3, gh, 2, 14, gw, 2, 14)
        rows.append(blocks.permute(2, 5, 3, 6, 1, 0, 4, 7).reshape(-1, 1176))
    return torch.cat(rows)


def _gate(clip: bool, outputs: Mapping[str, Any]) -> list[Check]:
    """The bytes are Pillow's in another order, the floats transformers' to the last bit."""
    cut = []
    for picture in outputs["Pillow, resize alone"]:
        pixels = torch.from_numpy(np.asarray(picture).copy())
        gh, gw = pixels.shape[0] // 28, pixels.shape[1] // 28
        blocks = pixels.reshape(gh, 2, 14, gw, 2, 14, 3)
        cut.append(blocks.permute(0, 3, 1, 4, 6, 2, 5).reshape(-1, 3, 1, 196))
    if clip:
        cut = [torch.cat(pair, 2) for pair in zip(cut[::2], cut[1::2], strict=True)]
    expected = torch.cat(cut).flatten(1)
    checks = [equal(f"{name} against Pillow", outputs[name], expected) for name in ("uint8", "uint8, 1 thread")]
    floats = outputs["float32"]
    checks.append(equal("float32 into a buffer against float32", outputs["float32 into a buffer"], floats))
    if "transformers" in outputs:
        checks.append(equal("float32 against transformers", floats, outputs["transformers"]))
    difference = (outputs["torch"] - floats).abs().max().item() if outputs["torch"].shape == floats.shape else np.inf
    checks.append(Check("torch against float32", difference, _LEVELS))
    return checks


CASE = Case(
    "preprocess",
    "Images and clips to patches, on the CPU",
    workloads,
    imports=("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl",),
)
