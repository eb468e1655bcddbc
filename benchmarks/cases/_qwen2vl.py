"""Shared by the whole-model cases: checkpoints, one prompt, what it costs, and both models behind one interface."""

from __future__ import annotations

import contextlib
import os
import shutil
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from qwen2vl import Qwen2VL, Qwen2VLConfig
from qwen2vl.cache import KVCache
from qwen2vl.config import IMAGE_MEAN, IMAGE_STD, TextConfig, VisionConfig
from qwen2vl.decoding import Steps, begin_steps, wants_graphs
from qwen2vl.errors import Qwen2VLError
from qwen2vl.tower_graph import replayed
from qwen2vl.vision import Encode

from ..case import Check, Context, Provider, Skip, two_times
from ..random_checkpoint import small_config, write_random_checkpoint


def wide_config(layers: int) -> Qwen2VLConfig:
    """The 2B's widths with few layers and the vocabulary of :func:`small_config`, for a gate."""
    small, full = small_config(), Qwen2VLConfig.preset("2b")
    text = replace(full.text, num_hidden_layers=layers, vocab_size=small.text.vocab_size)
    return replace(small, text=text, vision=replace(full.vision, depth=layers))


def checkpoint(
    context: Context, name: str, config: Qwen2VLConfig, dtype: torch.dtype = torch.bfloat16, std: float = 0.02
) -> Path:
    """The folder of a random checkpoint, made on the context's device and written unless it is there already."""
    folder = context.checkpoints() / f"qwen2vl-{name}-{str(dtype).removeprefix('torch.')}"
    if not folder.is_dir():
        scratch = folder.with_name(f"{folder.name}.{os.getpid()}")
        try:
            write_random_checkpoint(scratch, config, dtype=dtype, std=std, device=context.device)
            with contextlib.suppress(OSError):  # another process was faster
                scratch.rename(folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return folder


@dataclass(frozen=True)
class Prompt:
    """One image between some text.

    ``ids (1, L)``, ``grid (1, 3)``, ``pixels (patches, 588)`` uint8, ``rows (patches, 1176)`` the same normalised
    to float32 as transformers' processor does, ``kinds (1, L)`` 1 at image tokens, ``next_ids``: ids fed
    while decoding.
    """

    ids: torch.Tensor
    grid: torch.Tensor
    pixels: torch.Tensor
    rows: torch.Tensor
    kinds: torch.Tensor
    next_ids: list[torch.Tensor]

    @property
    def tokens(self) -> int:
        return self.ids.shape[1]


def make_prompt(config: Qwen2VLConfig, side: int, text: int, steps: int, device: torch.device) -> Prompt:
    """An image of ``side`` x ``side`` patches of noise among ``text`` text tokens, the vision marks included."""
    generator = torch.Generator().manual_seed(0)
    vision = config.vision
    shape = (side * side, vision.in_channels, 1, vision.patch_size**2)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGE_MEAN, IMAGE_STD))
    rows = ((pixels.float() / 255 - mean) / std).expand(-1, -1, vision.temporal_patch_size, -1)
    image = [config.image_token_id] * (side // vision.spatial_merge_size) ** 2
    words = torch.randint(10, 200, (text - 2 + steps,), generator=generator).tolist()
    before, after, following = words[:14], words[14 : text - 2], words[text - 2 :]
    ids = [*before, config.vision_start_token_id, *image, config.vision_end_token_id, *after]
    ids_t = torch.tensor([ids], device=device)
    return Prompt(
        ids=ids_t,
        grid=torch.tensor([[1, side, side]], device=device),
        pixels=pixels.flatten(1).to(device),
        rows=rows.flatten(1).to(device),
        kinds=(ids_t == config.image_token_id).int(),
        next_ids=[torch.tensor([[i]], device=device) for i in following],
    )


#: The tower as a captured graph: it has to be asked for, as no GPU has run it yet.
BY_GRAPH = "ours, one graph"


def by_graph(model: Callable[[], Ours], rows: torch.Tensor, grid: torch.Tensor) -> Provider:
    """A trial of the tower as a captured graph, beside the eager one of the same model."""

    def make() -> Provider:
        ours = model()
        try:
            encode = ours.graph()
        except Qwen2VLError as error:
            raise Skip(str(error)) from None
        return Provider(BY_GRAPH, lambda: ours.model.visual(rows, grid, encode=encode), trial=True)

    return Provider(BY_GRAPH, make=make, trial=True)


def graph_check(ours: Ours, rows: torch.Tensor, grid: torch.Tensor, low: torch.Tensor, exact: torch.Tensor) -> Check:
    """The graph by the two-times rule; red, for it alone, where it cannot be run."""
    name = f"bf16 {BY_GRAPH}, 2x the peer's error"
    try:
        got = ours.model.visual(rows, grid, encode=ours.graph()).float()
    except Exception as error:
        if "CUDA error" in str(error):
            raise
        traceback.print_exc()
        return Check(name, float("inf"), 0.0, BY_GRAPH)
    return two_times(name, got, low, exact, provider=BY_GRAPH)


class Ours:
    """Our model; cache and steps are made as :func:`qwen2vl.generate` makes them."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> None:
        self.model = Qwen2VL.from_pretrained(folder, device=device, dtype=dtype)
        self.config = self.model.config
        self.steps: Steps | None = None

    def vision(self, rows: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        return self.model.visual(rows, grid)

    def graph(self) -> Encode:
        """What encodes packs by captured graphs. Raises :class:`Qwen2VLError` where that cannot be."""
        with patch.dict(os.environ, {"QWEN2VL_GRAPHS": "1"}):
            encode = replayed(self.model, True)
        assert encode is not None
        return encode

    def prefill(self, prompt: Prompt, features: torch.Tensor) -> torch.Tensor:
        """Logits of the last token, ``(1, vocab)``."""
        model = self.model
        capacity = prompt.tokens + len(prompt.next_ids)
        if self.steps is not None:
            self.steps.close()
        cache = KVCache(model.config.text, 1, capacity, device=model.device, dtype=model.dtype)
        logits = model(
            prompt.ids,
            image_grid_thw=prompt.grid,
            features=(features, None),
            cache=cache,
            last_only=True,
        )
        self.steps = begin_steps(model, cache, 1, capacity, wants_graphs(model, None))
        return logits[:, -1]

    def rewind(self, prompt: Prompt) -> None:
        """Forget what was decoded after the prompt."""
        assert self.steps is not None, "prefill comes first"
        self.steps.cache.forget(self.steps.cache.lengths[0] - prompt.tokens)

    def decode(self, prompt: Prompt) -> torch.Tensor:
        """Feed ``next_ids`` one by one, choosing greedily each time; logits of the last, ``(1, vocab)``."""
        assert self.steps is not None, "prefill comes first"
        for step in prompt.next_ids:
            logits = self.steps(step.flatten())
            logits.argmax(-1)
        return logits.clone()  # the next step may be a replay, which overwrites them


class Transformers:
    """transformers' model, by default with its fused attention; the cache is the one its ``generate`` makes."""

    def __init__(
        self, folder: Path, device: torch.device, dtype: torch.dtype = torch.bfloat16, attention: str = "sdpa"
    ) -> None:
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        model = transformers.Qwen2VLForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, attn_implementation=attention
        )
        self.model: Any = model.to(device).eval()  # type: ignore[arg-type]
        self.config = Qwen2VLConfig.from_pretrained(folder)
        self.cache: Any = None

    def vision(self, rows: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        images = self.model.get_image_features(rows, grid).pooler_output
        return images[0] if len(images) == 1 else torch.cat(tuple(images))

    def prefill(self, prompt: Prompt, features: torch.Tensor) -> torch.Tensor:
        from transformers import DynamicCache
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        encoded = BaseModelOutputWithPooling(pooler_output=(features,))  # type: ignore[arg-type]
        self.cache = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        output = self.model(
            input_ids=prompt.ids,
            image_grid_thw=prompt.grid,
            mm_token_type_ids=prompt.kinds,
            mm_encoder_outputs={"image": encoded},
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]

    def rewind(self, prompt: Prompt) -> None:
        self.cache.crop(prompt.tokens - self.cache.get_seq_length())

    def decode(self, prompt: Prompt) -> torch.Tensor:
        for step in prompt.next_ids:
            output = self.model(input_ids=step, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
            logits = output.logits[:, -1]
            logits.argmax(-1)
        return logits


MODELS = {"ours": Ours, "transformers": Transformers}


def unallocated(config: Qwen2VLConfig) -> Qwen2VL:
    """The model in bf16 without memory, to be counted."""
    return Qwen2VL.from_config(config, device="meta", dtype=torch.bfloat16)


def weight_bytes(model: torch.nn.Module) -> int:
    return sum(p.nbytes for p in model.parameters())


def vision_flops(config: VisionConfig, patches: int, pairs: int | None = None) -> float:
    """Multiply-adds count two; norms and activations are left out.

    ``pairs`` of patches that see each other, by default those of one segment.
    """
    seen = patches if pairs is None else pairs / patches
    width, merged = config.embed_dim, config.embed_dim * config.spatial_merge_size**2
    hidden = int(width * config.mlp_ratio)
    block = 2 * (4 * width * width + 2 * width * hidden) + 4 * seen * width
    merger = 2 * (merged * merged + merged * config.hidden_size) / config.spatial_merge_size**2
    return patches * (2 * config.patch_values * width + config.depth * block + merger)


def layer_weights(config: TextConfig) -> int:
    """Elements of the matrices of all decoder layers."""
    kv = config.num_key_value_heads * config.head_dim
    attention = config.hidden_size * (2 * config.hidden_size + 2 * kv)
    return config.num_hidden_layers * (attention + 3 * config.hidden_size * config.intermediate_size)


def prefill_flops(config: TextConfig, tokens: int) -> float:
    """Causal attention counts the pairs it needs; the head runs for one token."""
    pairs = tokens * (tokens + 1) / 2
    attention = 4 * pairs * config.num_hidden_layers * config.hidden_size
    return 2 * tokens * layer_weights(config) + attention + 2 * config.hidden_size * config.vocab_size


def decode_flops(config: TextConfig, seen: int) -> float:
    attention = 4 * seen * config.num_hidden_layers * config.hidden_size
    return 2 * (layer_weights(config) + config.hidden_size * config.vocab_size) + attention


def decode_bytes(config: TextConfig, seen: int, itemsize: int) -> float:
    """Every weight and every cached key and value is read once a token."""
    cached = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * seen
    return itemsize * (layer_weights(config) + config.hidden_size * config.vocab_size + cached)
