"""The ``_preprocess`` of transformers' Qwen2-VL image processors, 4.x and 5, over :func:`images_to_patches`.

It serves :mod:`.image_processor`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..ops.image_to_patches import images_to_patches

NAME = "Qwen2VLImageProcessorNative"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "uint8": None}  # None: not normalised
_BICUBIC = 3  # PIL.Image.Resampling.BICUBIC, which is an int


def preprocess_5(source: Any, stock: Any, output: str, images: list[np.ndarray], **kwargs: Any) -> Any:
    """``images``: ``(C, H, W)`` each."""
    sizes, tensors, p = _sizes(source, images, **kwargs), kwargs["return_tensors"], kwargs["patch_size"]
    if not _is_native(images, output, **kwargs) or sizes is None:
        return stock(images, **kwargs)
    rows = _patches([_pixels(image) for image in images], sizes, output, **kwargs)
    grids = np.array([[1, h // p, w // p] for h, w in sizes], dtype=np.int64)
    values = rows if tensors == "pt" else rows.numpy()
    return source.BatchFeature({"pixel_values": values, "image_grid_thw": grids}, tensor_type=tensors)


def preprocess_4(source: Any, stock: Any, output: str, images: Any, **kwargs: Any) -> Any:
    """One image, or the frames of one clip, which share the first frame's size."""
    frames = source.make_flat_list_of_images(images)
    if kwargs["do_convert_rgb"]:
        frames = [source.convert_to_rgb(frame) for frame in frames]
    frames = [source.to_numpy_array(frame) for frame in frames]
    layout = kwargs["input_data_format"] or source.infer_channel_dimension_format(frames[0])
    last = layout == source.ChannelDimension.LAST
    chw = [np.moveaxis(frame, -1, 0) if last and frame.ndim == 3 else frame for frame in frames]
    same = all(frame.shape == chw[0].shape for frame in chw)
    standard = same and kwargs["data_format"] == source.ChannelDimension.FIRST
    if not _is_native(chw, output, **kwargs) or not standard:
        if output != "float32":
            raise ValueError(f"{NAME}: output={output!r} needs frames of one size, data_format 'FIRST'")
        return stock(images, **kwargs)
    sizes = _sizes(source, chw[:1], **kwargs)
    assert sizes is not None  # the base class has refused a size without both edges
    (height, width), p, slots = sizes[0], kwargs["patch_size"], kwargs["temporal_patch_size"]
    rows = _patches([[_pixels(frame) for frame in chw]], sizes, output, **kwargs)
    return rows.numpy(), (-(-len(chw) // slots), height // p, width // p)


def _sizes(
    source: Any, images: Sequence[np.ndarray], do_resize: bool, size: Any, patch_size: int, merge_size: int, **_: Any
) -> list[tuple[int, int]] | None:
    """``(height, width)`` that each image gets, by the base class's rule; None where ``size`` lacks an edge."""
    block, sides = patch_size * merge_size, [image.shape[-2:] for image in images]
    if do_resize:
        low, high = size["shortest_edge"], size["longest_edge"]
        if not low or not high:
            return None
        return [source.smart_resize(*hw, factor=block, min_pixels=low, max_pixels=high) for hw in sides]
    for height, width in sides:
        if height % block or width % block:
            raise ValueError(
                f"{NAME}: do_resize=False needs sides that are multiples of patch_size * merge_size = {block}, "
                f"got {height} x {width}"
            )
    return sides


def _is_native(
    images: Sequence[np.ndarray],
    output: str,
    do_resize: bool,
    resample: Any,
    do_rescale: bool,
    rescale_factor: float,
    do_normalize: bool,
    image_mean: Any,
    image_std: Any,
    **_: Any,
) -> bool:
    """Whether the kernel gives what the class extended would; if not and that class cannot either, raises."""
    obstacles = [
        f"pixels of {image.dtype} and shape {image.shape}"
        for image in images
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[0] != 3
    ][:1]
    if do_resize and resample != _BICUBIC:
        obstacles.append(f"resample={resample!r}")
    if output != "uint8":
        if not do_rescale or rescale_factor != 1 / 255:
            obstacles.append(f"do_rescale={do_rescale!r} with rescale_factor={rescale_factor!r}")
        triples = all(isinstance(v, (list, tuple)) and len(v) == 3 for v in (image_mean, image_std))
        if not do_normalize or not triples or min(image_std) <= 0:
            obstacles.append(f"do_normalize={do_normalize!r} with image_mean={image_mean!r}, image_std={image_std!r}")
    if obstacles and output != "float32":
        raise ValueError(
            f"{NAME}: output={output!r} needs uint8 RGB, bicubic resampling and, for bfloat16, the usual "
            f"normalisation; got {'; '.join(obstacles)}"
        )
    return not obstacles


def _pixels(image: np.ndarray) -> np.ndarray:
    """``(3, H, W)`` to ``(H, W, 3)`` with contiguous pixels in each row; a view where it was one of such an array."""
    image = np.moveaxis(image, 0, -1)
    return image if image.strides[1:] == (3, 1) and image.strides[0] > 0 else np.ascontiguousarray(image)


def _patches(
    items: list,
    sizes: list[tuple[int, int]],
    output: str,
    image_mean: Any,
    image_std: Any,
    patch_size: int,
    temporal_patch_size: int,
    merge_size: int,
    **_: Any,
) -> torch.Tensor:
    normalised = output != "uint8"
    return images_to_patches(
        items,
        sizes,
        temporal_patch_size=temporal_patch_size,
        patch_size=patch_size,
        merge_size=merge_size,
        mean=image_mean if normalised else None,
        std=image_std if normalised else None,
        dtype=DTYPES[output],
    )
