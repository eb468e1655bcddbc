"""What the small model is, and what its training begins from.

All parts of Qwen2-VL are there: a tower with heads 80 wide and 2D-RoPE over packed patches, the 2 x 2 merger, M-RoPE,
grouped queries, and all special tokens under their names. Three settings differ from those of the released models:

- rope_theta is 100 and not a million. M-RoPE gives the horizontal axis the slowest third of the frequencies. At a
  million, one step rotates these by less than a thousandth of a radian, which small weights do not learn to tell
  apart; at 100 by 0.01 to 0.06 radians.
- The vocabulary has some 900 tokens, see `examples.small.tokenizer`.
- Images keep their size from 9,408 pixels, which are 12 tokens, to 25,088, which are 32. Smaller ones are enlarged:
  letters that are smaller than one and a half patches are not read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.random_checkpoint import SPECIAL_TOKENS, write_checkpoint
from qwen2vl.config import Qwen2VLConfig, TextConfig, VisionConfig
from qwen2vl.errors import CheckpointError
from qwen2vl.model import Qwen2VL
from qwen2vl.prompt.tokenizer import BYTE_OF_CHAR, Tokenizer

from .tokenizer import write_tokenizer

#: The limits that its processor holds pictures and frames to, larger ones are reduced: what it was not trained on, it
#: does not read. Frames keep the size that they have, up to 4 x 4 tokens.
LIMITS = {
    "min_pixels": 12 * 28 * 28,
    "max_pixels": 32 * 28 * 28,
    "video_min_pixels": 28 * 28,
    "video_max_pixels": 16 * 28 * 28,
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


def write_beginning(
    folder: Path,
    *,
    seed: int,
    source: Path | None = None,
    depth: int = DEPTH,
    layers: int = LAYERS,
    limits: Mapping[str, int] = LIMITS,
) -> None:
    """Write a checkpoint in float32, tokenizer and image settings; equal calls write equal bytes.

    The entries of a matrix are normal with a variance of one over its number of inputs. The variance of the matrices
    that write into the residual stream is also divided by their number, so that activations neither grow nor fade. With
    the usual standard deviation of 0.02 the model needs three times as many samples until it reads its first
    characters. The embeddings have a standard deviation of 0.1, so that a token's own embedding does not vanish beside
    what attention adds from its picture.

    Args:
        seed: of the random weights.
        source: a checkpoint of the same shape, whose weights are taken in place of random ones. It may have another
            tokenizer: a token begins as the mean of those that spell it there.
        limits: those that its processor holds pictures and frames to, in pixels.
    """
    config = shape(write_tokenizer(folder), depth=depth, layers=layers)
    model = Qwen2VL.from_config(config, device="cpu", dtype=torch.float32)
    with torch.no_grad():
        if source is None:
            _draw_weights(model, torch.Generator().manual_seed(seed))
        else:
            _take_weights(model, Tokenizer.from_pretrained(folder), source)
    write_checkpoint(model, folder, **limits)


def _draw_weights(model: Qwen2VL, generator: torch.Generator) -> None:
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            continue
        blocks = model.config.vision.depth if name.startswith("visual.") else model.config.text.num_hidden_layers
        std = 1 / math.sqrt(parameter[0].numel())
        if name.endswith(_OUTPUTS):
            std /= math.sqrt(2 * blocks)
        parameter.normal_(std=_EMBEDDING_STD if "embed_tokens" in name else std, generator=generator)


def _take_weights(model: Qwen2VL, tokenizer: Tokenizer, source: Path) -> None:
    """Raises a CheckpointError naming the tensor that is missing, or has another shape, in `source`."""
    theirs = dict(Qwen2VL.from_pretrained(source, device="cpu", dtype="float32").named_parameters())
    other = Tokenizer.from_pretrained(source)
    for name, parameter in model.named_parameters():
        found = theirs.get(name)
        if found is not None and "embed_tokens" in name:
            found = torch.stack([found[ids].mean(0) for ids in _spellings(tokenizer, other)])
        if found is None or found.shape != parameter.shape:
            got = "missing" if found is None else f"of shape {tuple(found.shape)}"
            raise CheckpointError(f"{source}: {name} is {got}, and the model's has shape {tuple(parameter.shape)}")
        parameter.copy_(found)


def _spellings(tokenizer: Tokenizer, other: Tokenizer) -> Iterator[list[int]]:
    """For each token of one tokenizer, in the order of ids, the tokens of another one that spell it."""
    for symbol in sorted(tokenizer.backend.get_vocab(), key=tokenizer.backend.get_vocab().__getitem__):
        same = other.backend.token_to_id(symbol)
        if same is not None:
            yield [same]
            continue
        data = bytes(BYTE_OF_CHAR[character] for character in symbol)
        text = data.decode("utf-8", errors="replace")
        whole = text.encode() == data  # and no part of a Chinese character
        yield other.encode_plain(text) if whole else [other.backend.token_to_id(one) for one in symbol]  # type: ignore[misc]
