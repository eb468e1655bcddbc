"""Checkpoints with random weights in the released layout.

Benchmarks, tests and the demo load them through the path of a released checkpoint, without a download.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from qwen2vl.config import Qwen2VLConfig, TextConfig, VisionConfig
from qwen2vl.media.options import DEFAULTS, PatchShape
from qwen2vl.model import Qwen2VL
from qwen2vl.prompt.files import write_media_options

from .byte_tokenizer import write_byte_tokenizer

#: Field of the configuration -> the name of its special token.
SPECIAL_TOKENS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "vision_token_id": "<|vision_pad|>",
    "bos_token_id": "<|endoftext|>",
    "eos_token_id": "<|im_end|>",
    "pad_token_id": "<|endoftext|>",
}


def small_config(tie_word_embeddings: bool = True) -> Qwen2VLConfig:
    """The configuration of a model of about 2M parameters with the structure of the released ones.

    Vision heads are 80 wide, 2 x 2 patches are merged, positions are M-RoPE's, and query heads share keys and values.
    The special tokens have the last ids of a vocabulary of 512; :func:`write_random_checkpoint` replaces them by those
    of the tokenizer that it writes.
    """
    text = TextConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
        rms_norm_eps=1e-6,
        tie_word_embeddings=tie_word_embeddings,
        mrope_section=(8, 12, 12),
    )
    vision = VisionConfig(hidden_size=256, depth=2, embed_dim=160, num_heads=2)
    return replace(
        Qwen2VLConfig.preset("2b"), text=text, vision=vision, **{name: 511 - i for i, name in enumerate(SPECIAL_TOKENS)}
    )


def write_random_checkpoint(
    folder: str | Path,
    config: Qwen2VLConfig | None = None,
    *,
    seed: int = 0,
    std: float = 0.02,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_bytes: int = 5 * 10**9,
    device: torch.device | str = "cpu",
) -> Path:
    """Write configuration, weights, a byte-level tokenizer and the processor's files; returns the folder.

    Args:
        config: by default :func:`small_config`. Its special tokens get the ids of the tokenizer that is written, which
            are the released ones where `config` has these.
        seed: of the weights; torch's global generator stays as it is.
        std: the standard deviation of the weights. At 0.02 a small model mostly repeats its last token; at 0.1 it
            writes varied noise.
        dtype: of the stored weights.
        max_shard_bytes: the size at which weights go into several files.
        device: where the weights are drawn. A GPU takes moments where a CPU takes minutes, but draws other weights.
    """
    device = torch.device(device)
    folder = Path(folder)
    released = config is not None and config.image_token_id == Qwen2VLConfig.image_token_id
    names = write_byte_tokenizer(folder, released_ids=released)
    ids = {field: names[token] for field, token in SPECIAL_TOKENS.items()}
    config = replace(small_config() if config is None else config, **ids)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        model = Qwen2VL.from_config(config, device=device, dtype=dtype, std=std)
    write_checkpoint(model, folder, max_shard_bytes=max_shard_bytes)
    return folder


def write_checkpoint(model: Qwen2VL, folder: Path, *, max_shard_bytes: int = 5 * 10**9, **options: int) -> None:
    """Write a new model's weights, configurations and limits of media, beside its tokenizer's files.

    The model decodes greedily by default.

    Args:
        options: limits of `MediaOptions`, by name, over its defaults.
    """
    config, vision = model.config, model.config.vision
    model.generation_defaults = {
        "bos_token_id": config.bos_token_id,
        "pad_token_id": config.pad_token_id,
        "eos_token_id": [config.eos_token_id, config.pad_token_id],
        "do_sample": False,
    }
    model.save_pretrained(folder, max_shard_bytes)
    shape = PatchShape(vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size)
    write_media_options(folder, DEFAULTS.updated(options), shape)
