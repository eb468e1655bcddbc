"""Kernels of Qwen2-VL as functions over packed tensors, and layers of them that ``kernelize`` can put into a model."""

from . import layers
from .ops.layer_norm import add_layer_norm, layer_norm
from .ops.linear_cross_entropy import linear_cross_entropy
from .ops.mrope import mrope
from .ops.quick_gelu import quick_gelu
from .ops.rms_norm import add_rms_norm, rms_norm
from .ops.swiglu import swiglu
from .ops.varlen_attention import varlen_attention
from .ops.vision_rope import vision_rope

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "layer_norm",
    "layers",
    "linear_cross_entropy",
    "mrope",
    "quick_gelu",
    "rms_norm",
    "swiglu",
    "varlen_attention",
    "vision_rope",
]
