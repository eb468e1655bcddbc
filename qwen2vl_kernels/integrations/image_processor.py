"""transformers' Qwen2-VL image processor over :func:`images_to_patches`.

from qwen2vl_kernels.integrations.image_processor import Qwen2VLImageProcessorNative

processor.image_processor = Qwen2VLImageProcessorNative.from_pretrained(folder)         # inside a Qwen2VLProcessor
AutoImageProcessor.register(Qwen2VLConfig, Qwen2VLImageProcessorNative, exist_ok=True)  # or wherever it is looked up

The class extends transformers' own: ``Qwen2VLImageProcessorPil`` in 5.x, ``Qwen2VLImageProcessor`` in 4.57. It takes
the same settings, per-call overrides and kinds of image, and returns the same ``BatchFeature`` with the same bytes:
``pixel_values (patches, 3 * temporal_patch_size * p * p)`` float32 and ``image_grid_thw (images, 3)`` int64. The class
is made when it is first asked for: transformers is an optional package.

One setting is added, ``output``:

    "float32"   normalised values, as transformers' class gives (default)
    "bfloat16"  the same rounded once; needs 5.x and return_tensors="pt"
    "uint8"     the resized bytes, neither rescaled nor normalised, for a model whose patch embedding has the
                normalisation folded in, as this project's; transformers' model does not take them

The kernel resamples uint8 RGB by bicubic. What else transformers accepts (another ``resample`` or
``rescale_factor``, pixels in floating point, ``do_normalize=False``) is left to the class extended, and refused where
``output`` asks for anything but float32.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from functools import cache, wraps
from types import MethodType
from typing import Any

import numpy as np
import torch

from ..ops.image_to_patches import images_to_patches

_NAME = "Qwen2VLImageProcessorNative"
_BICUBIC = 3  # PIL.Image.Resampling.BICUBIC, which is an int
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "uint8": None}  # None: not normalised


def __getattr__(name: str) -> Any:
    if name == _NAME:
        return _processor_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@cache
def _processor_class() -> type:
    """The class, one object for the life of the process, found by pickle under this module's name."""
    try:
        from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as source
    except ModuleNotFoundError as error:
        if error.name != "transformers.models.qwen2_vl.image_processing_pil_qwen2_vl":
            raise
        from transformers.models.qwen2_vl import image_processing_qwen2_vl as source

        cls = _class_of_4(source)
    else:
        cls = _class_of_5(source)
    cls.__name__ = cls.__qualname__ = _NAME
    cls.__module__ = __name__
    cls.__doc__ = __doc__
    return cls


def _class_of_5(source: Any) -> type:
    class Kwargs(source.Qwen2VLImageProcessorKwargs, total=False):  # type: ignore[call-arg]
        output: str

    class Processor(source.Qwen2VLImageProcessorPil):
        valid_kwargs = Kwargs
        output = "float32"

        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            _check_output(self.output)

        def preprocess(self, images: Any, **kwargs: Any) -> Any:
            if kwargs.pop("videos", None) is not None:
                raise TypeError(f"{_NAME}: videos are for Qwen2VLVideoProcessor, this class takes images")
            return super().preprocess(images, **kwargs)

        def _preprocess(self, images: list[np.ndarray], **kwargs: Any) -> Any:
            """``images``: ``(C, H, W)`` each, as the base class prepares them."""
            output, tensors = kwargs.pop("output", None) or self.output, kwargs["return_tensors"]
            _check_output(output)
            if output == "bfloat16" and tensors != "pt":
                raise ValueError(f"{_NAME}: output='bfloat16' needs return_tensors='pt', got {tensors!r}")
            return _preprocess_5(source, super()._preprocess, output, images, **kwargs)

    return Processor


def _preprocess_5(source: Any, stock: Any, output: str, images: list[np.ndarray], **kwargs: Any) -> Any:
    """``images``: ``(C, H, W)`` each."""
    sizes, tensors, p = _sizes(source, images, **kwargs), kwargs["return_tensors"], kwargs["patch_size"]
    if not _is_native(images, output, **kwargs) or sizes is None:
        return stock(images, **kwargs)
    rows = _patches([_pixels(image) for image in images], sizes, output, **kwargs)
    grids = np.array([[1, h // p, w // p] for h, w in sizes], dtype=np.int64)
    values = rows if tensors == "pt" else rows.numpy()
    return source.BatchFeature({"pixel_values": values, "image_grid_thw": grids}, tensor_type=tensors)


def _class_of_4(source: Any) -> type:
    class Processor(source.Qwen2VLImageProcessor):
        def __init__(self, *args: Any, output: str = "float32", **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            _check_output(output)
            if output == "bfloat16":
                raise ValueError(f"{_NAME}: output='bfloat16' needs transformers 5; 4.x collects rows in NumPy")
            self.output = output

        def _preprocess(self, images: Any, **kwargs: Any) -> Any:
            return _preprocess_4(source, super()._preprocess, self.output, images, **kwargs)

    return Processor


def _preprocess_4(source: Any, stock: Any, output: str, images: Any, **kwargs: Any) -> Any:
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
            raise ValueError(f"{_NAME}: output={output!r} needs frames of one size, data_format 'FIRST'")
        return stock(images, **kwargs)
    sizes = _sizes(source, chw[:1], **kwargs)
    assert sizes is not None  # the base class has refused a size without both edges
    (height, width), p, slots = sizes[0], kwargs["patch_size"], kwargs["temporal_patch_size"]
    rows = _patches([[_pixels(frame) for frame in chw]], sizes, output, **kwargs)
    return rows.numpy(), (-(-len(chw) // slots), height // p, width // p)


def patched_preprocess(stock: Any) -> Any:
    """``_preprocess`` in the place of ``stock``, the function of transformers' own class, 4.x or 5."""
    source = sys.modules[stock.__module__]
    run = _preprocess_5 if hasattr(source, "Qwen2VLImageProcessorPil") else _preprocess_4
    names = tuple(inspect.signature(stock).parameters)[2:]

    @wraps(stock)
    def _preprocess(self: Any, images: Any, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        return run(source, MethodType(stock, self), "float32", images, **given)

    return _preprocess


def _check_output(output: object) -> None:
    if output not in _DTYPES:
        raise ValueError(f"{_NAME}: output must be one of {', '.join(map(repr, _DTYPES))}, got {output!r}")


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
                f"{_NAME}: do_resize=False needs sides that are multiples of patch_size * merge_size = {block}, "
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
            f"{_NAME}: output={output!r} needs uint8 RGB, bicubic resampling and, for bfloat16, the usual "
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
        dtype=_DTYPES[output],
    )
