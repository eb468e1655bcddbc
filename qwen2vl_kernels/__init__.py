"""Kernels of Qwen2-VL as plain functions over packed tensors; see each function's docstring for shapes and dtypes."""

from typing import Any

from .core.backends import BackendError, use_backend
from .core.tile_plan import TilePlan, plan_tiles
from .ops.append_kv import append_kv
from .ops.decode_attention import decode_attention_
from .ops.few_rows import linear_add_, rms_norm_linear, rms_norm_swiglu
from .ops.grouped_linear import group_by_expert, grouped_linear
from .ops.grouped_quant_linear import grouped_quant_linear
from .ops.image_to_patches import image_to_patches, images_to_patches
from .ops.kvcache_attention import kvcache_attention
from .ops.layer_norm import add_layer_norm, layer_norm
from .ops.linear_cross_entropy import linear_cross_entropy
from .ops.mrope import mrope, mrope_
from .ops.mrope_positions import mrope_positions, mrope_positions_chunk
from .ops.patch_embed import fold_patch_embed, patch_embed
from .ops.patch_merge import patch_merge
from .ops.quant_linear import quant_linear
from .ops.quick_gelu import quick_gelu, quick_gelu_
from .ops.rms_norm import add_rms_norm, rms_norm
from .ops.sample_tokens import sample_tokens_
from .ops.smart_resize import smart_resize
from .ops.swiglu import swiglu, swiglu_
from .ops.varlen_attention import varlen_attention
from .ops.vision_positions import vision_positions
from .ops.vision_rope import vision_rope, vision_rope_, vision_rope_qkv_, vision_rope_tables

__all__ = [
    "BackendError",
    "TilePlan",
    "add_layer_norm",
    "add_rms_norm",
    "append_kv",
    "decode_attention_",
    "fold_patch_embed",
    "group_by_expert",
    "grouped_linear",
    "grouped_quant_linear",
    "image_to_patches",
    "images_to_patches",
    "kvcache_attention",
    "layer_norm",
    "linear_add_",
    "linear_cross_entropy",
    "mrope",
    "mrope_",
    "mrope_positions",
    "mrope_positions_chunk",
    "patch_embed",
    "patch_merge",
    "plan_tiles",
    "quant_linear",
    "quick_gelu",
    "quick_gelu_",
    "rms_norm",
    "rms_norm_linear",
    "rms_norm_swiglu",
    "sample_tokens_",
    "smart_resize",
    "swiglu",
    "swiglu_",
    "use_backend",
    "varlen_attention",
    "vision_positions",
    "vision_rope",
    "vision_rope_",
    "vision_rope_qkv_",
    "vision_rope_tables",
]


def _version() -> str:
    """The version of the distribution ``qwen2vl``, which holds both packages.

    Its one source is pyproject.toml. A checkout reads that file, since what is installed beside it may be older; an
    installation has the metadata that were made from it.
    """
    import tomllib
    from importlib.metadata import version
    from pathlib import Path

    file = Path(__file__).resolve().parents[1] / "pyproject.toml"
    if file.is_file():
        project = tomllib.loads(file.read_text(encoding="utf-8")).get("project", {})
        if project.get("name") == "qwen2vl":
            return project["version"]
    return version("qwen2vl")


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), "__version__"})
