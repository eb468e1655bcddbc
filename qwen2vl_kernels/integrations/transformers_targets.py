"""Which functions of transformers are replaced, by version: one literal table, read by :mod:`.transformers`.

What a version calls a function's parameters is found out by looking at it: those that not all versions have are marked,
``"name?"``, and every replacement takes them by name. Version numbers decide only which class of several it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from . import transformers_attention as tower_attention
from . import transformers_loss as loss
from . import transformers_positions as positions
from . import transformers_text as text
from . import transformers_vision as vision
from ._switch import STACKS
from .image_processor import patched_preprocess

#: Versions whose whole models were compared, patched with stock: the last of each of these.
TESTED = ("4.57", *(f"5.{minor}" for minor in range(25)))

DEFAULT, FEATURES = STACKS["transformers"].default, STACKS["transformers"].features


class Place(NamedTuple):
    """``module`` below ``transformers.models``, class in it (or ``""``), attribute, parameters, and what makes it.

    Parameters as :class:`~._target.Target` has them: ``"name?"`` may be absent. ``None``: whatever stock's
    function takes is given to it.
    """

    feature: str
    module: str
    cls: str
    name: str
    parameters: tuple[str, ...] | None
    make: Callable[[Callable], Callable]


_X, _STATES, _STATE = ("self", "x"), ("self", "hidden_states"), ("self", "hidden_state")
_ANGLES = ("self", "x", "position_ids")


def places(version: str) -> list[Place]:
    """The table for a version, as its number begins."""
    release = tuple(int(part) for part in version.split(".")[:2])
    block = ("self", "hidden_states", "cu_seqlens", "rotary_pos_emb?", "position_embeddings", "kwargs")
    tower = (*block[:-1], "max_seqlen?", "kwargs")
    qwen2 = ("self", "hidden_states", "attention_mask", "position_ids", "past_key_values?", "cache?",
             "output_attentions?", "use_cache?", "cache_position?", "position_embeddings", "kwargs")  # fmt: skip
    qwen3 = ("self", "hidden_states", "position_embeddings", "attention_mask", "past_key_values?", "cache?",
             "cache_position?", "kwargs")  # fmt: skip
    # 5.2 has no token types, and deltas that no other version has, cut off at zero: there this fits nothing.
    types, kwargs = (("mm_token_type_ids",), ("kwargs",)) if release >= (5, 2) else ((), ())
    index = ("self", "input_ids", *types, "image_grid_thw", "video_grid_thw", "attention_mask", *kwargs)
    two, two_5, three = (f"{family}.modeling_{family}" for family in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"))
    table = [
        Place("mrope", two, "Qwen2VLRotaryEmbedding", "forward", _ANGLES, text.angles),
        Place("mrope", two, "Qwen2VLAttention", "forward", qwen2, text.attention_in_order),
        Place("mrope", two_5, "Qwen2_5_VLRotaryEmbedding", "forward", _ANGLES, text.angles),
        Place("mrope", two_5, "Qwen2_5_VLAttention", "forward", qwen2, text.attention_in_order),
        Place("mrope", three, "Qwen3VLTextRotaryEmbedding", "forward", _ANGLES, text.angles),
        Place("mrope", three, "Qwen3VLTextAttention", "forward", qwen3, text.attention_interleaved),
        Place("vision_attention", two, "VisionAttention", "forward", tower, tower_attention.attention),
        Place("vision_attention", two_5, "Qwen2_5_VLVisionAttention", "forward", tower, tower_attention.attention),
        Place("vision_attention", three, "Qwen3VLVisionAttention", "forward", tower, tower_attention.attention),
        Place("patch_embed", two, "PatchEmbed", "forward", _STATES, vision.embed),
        Place("patch_embed", two_5, "Qwen2_5_VisionPatchEmbed", "forward", _STATES, vision.embed),
        Place("patch_embed", three, "Qwen3VLVisionPatchEmbed", "forward", _STATES, vision.embed),
        Place("norm", two, "Qwen2VLVisionBlock", "forward", block, vision.block),
        Place("norm", two_5, "Qwen2_5_VLVisionBlock", "forward", block, vision.block),
        Place("norm", three, "Qwen3VLVisionBlock", "forward", block, vision.block),
        Place("norm", three, "Qwen3VLTextRMSNorm", "forward", _STATES, text.norm),
        Place("activation", two, "VisionMlp", "forward", _X, vision.mlp),
        Place("activation", two, "Qwen2MLP", "forward", _X, text.mlp),
        Place("activation", two_5, "Qwen2_5_VLMLP", "forward", _STATE, text.mlp),
        Place("activation", two_5, "Qwen2MLP", "forward", _X, text.mlp),
        Place("activation", three, "Qwen3VLTextMLP", "forward", _X, text.mlp),
        Place("merger", two, "PatchMerger", "forward", _X, vision.merger),
        Place("merger", three, "Qwen3VLVisionPatchMerger", "forward", _X, vision.merger),
        Place("positions", two, "Qwen2VLModel", "get_rope_index", index, positions.of_qwen2),
        Place("positions", three, "Qwen3VLModel", "get_rope_index", index, positions.of_qwen3),
    ]
    heads = ((two, "Qwen2VL"), (two_5, "Qwen2_5_VL"), (three, "Qwen3VL"))
    table += [
        Place("loss", module, f"{family}ForConditionalGeneration", "forward", None, loss.causal_lm)
        for module, family in heads
    ]
    table += [
        Place("vision_rope", module, "", "apply_rotary_pos_emb_vision", ("q", "k", "cos", "sin"), tower_attention.rope)
        for module in (two, two_5, three)
    ]
    if release >= (5, 2):
        table.append(Place("norm", two, "Qwen2VLRMSNorm", "forward", _STATES, text.norm))
        table.append(Place("norm", two_5, "Qwen2_5_VLRMSNorm", "forward", _STATES, text.norm))
    else:  # the text model's own, which both share with it
        table.append(Place("norm", "qwen2.modeling_qwen2", "Qwen2RMSNorm", "forward", _STATES, text.norm))
    pixels = ("self", "images", "do_resize", "size", "resample", "do_rescale", "rescale_factor", "do_normalize",
              "image_mean", "image_std", "patch_size", "temporal_patch_size", "merge_size")  # fmt: skip
    if release >= (5, 4):
        module, cls, rest = "image_processing_pil_qwen2_vl", "Qwen2VLImageProcessorPil", ("return_tensors", "kwargs")
    else:
        module, cls = "image_processing_qwen2_vl", "Qwen2VLImageProcessor"
        rest = ("do_convert_rgb", "data_format", "input_data_format")
    made = Place("image_processor", f"qwen2_vl.{module}", cls, "_preprocess", (*pixels, *rest), patched_preprocess)
    return [*table, made]
