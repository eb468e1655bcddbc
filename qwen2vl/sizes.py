"""A config's sizes, held to what the headers of a checkpoint's files say, before a module is built of them."""

from __future__ import annotations

import math
from pathlib import Path

from safetensors import SafetensorError, safe_open

from .config import Qwen2VLConfig
from .errors import CheckpointError
from .weights import shards


def check_sizes(config: Qwen2VLConfig, folder: Path) -> None:
    """Hold a config's sizes to what the headers of the files say, before a module is built of them.

    This refuses what could not be built at all; every shape that differs is listed by :func:`load_weights`.

    Raises:
        CheckpointError: there are fewer tensors than layers, or a matrix would be larger than all tensors together.
    """
    count = total = 0
    for path in shards(folder):
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118  (not a dict)
                    view = file.get_slice(name)
                    values = math.prod(view.get_shape()) * (8 if view.get_dtype() == "I32" else 1)  # of four bits
                    count, total = count + 1, total + values
        except (SafetensorError, OSError):  # listed with all else by the loading; any model may have been in it
            count, total = max(count, 1000), max(total, 2**36)
    text, vision = config.text, config.vision
    layers = text.num_hidden_layers + vision.depth
    if layers > count:
        raise CheckpointError(
            f"{folder}: num_hidden_layers and depth make {layers} layers, but the files hold {count} tensors"
        )
    merged = vision.embed_dim * vision.spatial_merge_size**2
    dense = any(text.experts(layer) is None for layer in range(text.num_hidden_layers))
    routed = 0 if text.moe is None else text.moe.num_experts * text.moe.moe_intermediate_size
    shared = 0 if text.moe is None else text.moe.shared_expert_intermediate_size
    for name, values in (
        ("vocab_size", text.vocab_size * text.hidden_size),
        ("hidden_size", text.hidden_size**2),
        ("intermediate_size", dense * text.intermediate_size * text.hidden_size),
        ("num_experts", routed * text.hidden_size),
        ("shared_expert_intermediate_size", shared * text.hidden_size),
        ("vision_config.embed_dim", 3 * vision.embed_dim**2),
        ("vision_config.mlp_ratio", vision.embed_dim * int(vision.embed_dim * vision.mlp_ratio)),
        ("vision_config.patch_size", vision.embed_dim * vision.patch_values),
        ("vision_config.spatial_merge_size", merged**2),
    ):
        if values > total:
            raise CheckpointError(
                f"{folder}: {name} asks for a matrix of {values} values, but the files hold {total} in all"
            )
