"""What the small model is, and what its training begins from.

All parts of Qwen2-VL are there: a tower with heads 80 wide and 2D-RoPE over packed patches, the 2 x 2 merger, M-RoPE,
grouped queries, and all special tokens under their names. Three settings differ from those of the released models:

- rope_theta is 100 and not a million. M-RoPE gives the horizontal axis the slowest third of the frequencies. At a
  million, one step rotates these by less than a thousandth of a radian, which small weights do not learn to tell
  apart; at 100 by 0.01 to 0.06 radians.
- The vocabulary has 2048 tokens, see `examples.small.tokenizer`.
- Images keep their size from 56 x 56 pixels on, which are 4 tokens.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.random_checkpoint import SPECIAL_TOKENS, write_checkpoint
from qwen2vl.config import Qwen2VLConfig, TextConfig, VisionConfig
from qwen2vl.model import Qwen2VL

from .tokenizer import write_tokenizer

#: The limits that its processor holds pictures and frames to: what it was not trained on, it does not read. The largest
#: picture has 7 x 8 tokens, the largest frame 5 x 5; frames keep the size that they have.
LIMITS = {
    "min_pixels": 4 * 28 * 28,
    "max_pixels": 56 * 28 * 28,
    "video_min_pixels": 28 * 28,
    "video_max_pixels": 25 * 28 * 28,
}
DEPTH, LAYERS = 5, 4  # blocks of the vision tower, layers of the language model
_EMBEDDING_STD = 0.1
#: The matrices that write into the residual stream, whose variance grows with every block.
_OUTPUTS = ("o_proj.weight", "down_proj.weight", "attn.proj.weight", "fc2.weight")


def shape(ids: dict[str, int], *, depth: int = DEPTH, layers: int = LAYERS) -> Qwen2VLConfig:
    """The configuration.

    Args:
        ids: name -> id of the special tokens, which are the last ids of the vocabulary.
        depth, layers: blocks of the tower and layers of the language model.
    """
    text = TextConfig(
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=layers,
        num_attention_heads=3,
        num_key_value_heads=1,
        vocab_size=max(ids.values()) + 1,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        rope_theta=100.0,
        mrope_section=(8, 12, 12),
    )
    vision = VisionConfig(hidden_size=192, depth=depth, embed_dim=160, num_heads=2)
    fields = {field: ids[token] for field, token in SPECIAL_TOKENS.items()}
    return replace(Qwen2VLConfig.preset("2b"), text=text, vision=vision, torch_dtype="float32", **fields)


def write_beginning(folder: Path, *, seed: int, depth: int = DEPTH, layers: int = LAYERS) -> None:
    """Write a checkpoint of random weights in float32, tokenizer and image settings; equal calls write equal bytes.

    The entries of a matrix are normal with a variance of one over its number of inputs. The variance of the matrices
    that write into the residual stream is also divided by their number, so that activations neither grow nor fade. With
    the usual standard deviation of 0.02 the model needs three times as many samples until it reads its first
    characters. The embeddings have a standard deviation of 0.1, so that a token's own embedding does not vanish beside
    what attention adds from its picture.
    """
    config = shape(write_tokenizer(folder), depth=depth, layers=layers)
    generator = torch.Generator().manual_seed(seed)
    model = Qwen2VL.from_config(config, device="cpu", dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2:
                continue
            blocks = config.vision.depth if name.startswith("visual.") else config.text.num_hidden_layers
            std = 1 / math.sqrt(parameter[0].numel())
            if name.endswith(_OUTPUTS):
                std /= math.sqrt(2 * blocks)
            parameter.normal_(std=_EMBEDDING_STD if "embed_tokens" in name else std, generator=generator)
    write_checkpoint(model, folder, **LIMITS)
