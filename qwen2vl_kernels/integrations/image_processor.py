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
from functools import cache, wraps
from types import MethodType
from typing import Any

import numpy as np

from .image_preprocess import DTYPES, NAME, preprocess_4, preprocess_5


def __getattr__(name: str) -> Any:
    if name == NAME:
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
    cls.__name__ = cls.__qualname__ = NAME
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
                raise TypeError(f"{NAME}: videos are for Qwen2VLVideoProcessor, this class takes images")
            return super().preprocess(images, **kwargs)

        def _preprocess(self, images: list[np.ndarray], **kwargs: Any) -> Any:
            """``images``: ``(C, H, W)`` each, as the base class prepares them."""
            output, tensors = kwargs.pop("output", None) or self.output, kwargs["return_tensors"]
            _check_output(output)
            if output == "bfloat16" and tensors != "pt":
                raise ValueError(f"{NAME}: output='bfloat16' needs return_tensors='pt', got {tensors!r}")
            return preprocess_5(source, super()._preprocess, output, images, **kwargs)

    return Processor


def _class_of_4(source: Any) -> type:
    class Processor(source.Qwen2VLImageProcessor):
        def __init__(self, *args: Any, output: str = "float32", **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            _check_output(output)
            if output == "bfloat16":
                raise ValueError(f"{NAME}: output='bfloat16' needs transformers 5; 4.x collects rows in NumPy")
            self.output = output

        def _preprocess(self, images: Any, **kwargs: Any) -> Any:
            return preprocess_4(source, super()._preprocess, self.output, images, **kwargs)

    return Processor


def patched_preprocess(stock: Any) -> Any:
    """``_preprocess`` in the place of ``stock``, the function of transformers' own class, 4.x or 5."""
    source = sys.modules[stock.__module__]
    run = preprocess_5 if hasattr(source, "Qwen2VLImageProcessorPil") else preprocess_4
    names = tuple(inspect.signature(stock).parameters)[2:]

    @wraps(stock)
    def _preprocess(self: Any, images: Any, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        return run(source, MethodType(stock, self), "float32", images, **given)

    return _preprocess


def _check_output(output: object) -> None:
    if output not in DTYPES:
        raise ValueError(f"{NAME}: output must be one of {', '.join(map(repr, DTYPES))}, got {output!r}")
