"""Shared by the training case and its workers: a small model, samples of a realistic mix, each side's loop, the loss.

Both sides take the same samples in the same steps, with the same optimizer, and each gets what its own processor makes:
ours uint8 pixels, packed; transformers' normalised float rows, padded to the longest sample of the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from qwen2vl import Qwen2VL, Qwen2VLConfig
from qwen2vl.config import IMAGE_MEAN, IMAGE_STD, TextConfig, VisionConfig
from qwen2vl.training.config import OptimizerConfig
from qwen2vl.training.example import Example
from qwen2vl.training.optim import Optimizer
from qwen2vl.training.packing import IGNORE, collate
from qwen2vl.training.parallel import wrap_blocks
from qwen2vl.training.step import TrainingStep

#: A rate so small that the losses of the first pass are those of the last.
_OPTIMIZER = OptimizerConfig(lr=1e-6)


def train_config() -> Qwen2VLConfig:
    """Few and narrow layers in the 2B's proportions, so that no part counts for more than there.

    The head has 0.18 times the weights of the decoder's layers (2B: 0.18), an image token meets 1.7 times as many in
    the tower (2B: 1.9); head_dim is 128 and 80 as released.
    """
    text = TextConfig(
        hidden_size=384,
        intermediate_size=2240,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        vocab_size=2752,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
    )
    vision = VisionConfig(hidden_size=384, depth=2, embed_dim=320, num_heads=4)
    ids = {name: 2751 - i for i, name in enumerate(_SPECIAL)}  # until the checkpoint puts its tokenizer's own
    return replace(Qwen2VLConfig.preset("2b"), text=text, vision=vision, **ids)


_SPECIAL = tuple(name for name in Qwen2VLConfig.__dataclass_fields__ if name.endswith("token_id"))


@dataclass(frozen=True)
class Kind:
    """One sort of sample: ``share`` of the mix, patches of its image, tokens of text around it.

    ``median`` and ``sigma`` of the log-normal text length (questions, markup and answers), ``answer``: the share of the
    text that an assistant wrote.
    """

    share: float
    grid: tuple[int, int] | None
    median: float
    sigma: float
    answer: float


#: Dialogues short and long, captions of web pictures, questions on photos, and documents read in detail.
MIX = (
    Kind(0.20, None, 120, 0.7, 0.6),
    Kind(0.15, None, 500, 0.6, 0.7),
    Kind(0.15, (16, 16), 60, 0.4, 0.6),  # 224 x 224
    Kind(0.20, (24, 32), 110, 0.6, 0.6),  # 448 x 336
    Kind(0.20, (34, 46), 160, 0.8, 0.6),  # 644 x 476
    Kind(0.10, (62, 44), 320, 0.6, 0.7),  # 616 x 868, a page
)
#: For a gate and a quick look.
SMALL_MIX = (Kind(0.4, None, 20, 0.5, 0.6), Kind(0.3, (4, 6), 12, 0.4, 0.6), Kind(0.3, (8, 8), 16, 0.4, 0.6))


def make_samples(config: Qwen2VLConfig, count: int, mix: Sequence[Kind] = MIX, seed: int = 0) -> list[Example]:
    """``count`` samples, each kind as often as its share says, shuffled; ids and pixels are noise."""
    generator = torch.Generator().manual_seed(seed)
    kinds = [kind for kind in mix for _ in range(max(1, round(kind.share * count)))][:count]
    kinds += [mix[0]] * (count - len(kinds))
    order = torch.randperm(count, generator=generator).tolist()
    return [_sample(config, kinds[i], generator) for i in order]


def _sample(config: Qwen2VLConfig, kind: Kind, generator: torch.Generator) -> Example:
    spread = torch.randn((), generator=generator).clamp(-2, 2).item()
    length = max(8, round(kind.median * 2.718281828 ** (kind.sigma * spread)))
    special = {getattr(config, name) for name in _SPECIAL}
    plain = torch.tensor([i for i in range(config.text.vocab_size) if i not in special])
    words = plain[torch.randint(len(plain), (length,), generator=generator)]
    answer = max(1, round(kind.answer * length))
    labels = torch.full((length,), IGNORE)
    labels[-answer:] = words[-answer:]
    if kind.grid is None:
        return Example(input_ids=words, labels=labels)
    h, w = kind.grid
    merge, vision = config.vision.spatial_merge_size, config.vision
    marks = (config.vision_start_token_id, config.vision_end_token_id)
    image = torch.tensor([marks[0], *[config.image_token_id] * (h * w // merge**2), marks[1]])
    values = vision.in_channels * vision.patch_size**2
    return Example(
        input_ids=torch.cat((image, words)),
        labels=torch.cat((torch.full_like(image, IGNORE), labels)),
        pixel_values=torch.randint(0, 256, (h * w, values), dtype=torch.uint8, generator=generator),
        image_grid_thw=torch.tensor([[1, h, w]]),
    )


def steps_of(samples: Sequence[Example], batch: int) -> list[list[Example]]:
    return [list(samples[i : i + batch]) for i in range(0, len(samples), batch)]


def padded_tokens(steps: Sequence[Sequence[Example]]) -> int:
    """Tokens of batches padded to their longest sample."""
    return sum(len(step) * max(e.tokens for e in step) for step in steps)


def grads_on() -> AbstractContextManager[Any]:
    """The runner measures in inference mode, in which nothing can be trained."""
    return torch.inference_mode(False)


class Ours:
    """Our model and loop, as :class:`qwen2vl.training.trainer.Trainer` runs them on one process."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype, *, checkpointing: bool = False) -> None:
        self.model = Qwen2VL.from_pretrained(folder, device=device, dtype=dtype).train()
        self.device, self.config = device, self.model.config
        wrap_blocks(self.model, checkpoint_activations=checkpointing, compiled=False)
        self.step = TrainingStep(self.model)
        self.optimizer = Optimizer(self.model.named_parameters(), _OPTIMIZER, master_weights=True)

    def prepare(self, samples: Sequence[Example]) -> list[Example]:
        return list(samples)

    def loss(self, samples: Sequence[Example]) -> torch.Tensor:
        """Mean cross-entropy of a step's supervised tokens."""
        pack = collate(samples, self.config)
        return self.step(pack.to(self.device), 1.0 / pack.supervised)

    def losses(self, samples: Sequence[Example]) -> torch.Tensor:
        """Summed cross-entropy of each sample."""
        pack = collate(samples, self.config).to(self.device)
        return self.step(pack, by_sample=True)[: len(samples)]  # without that of the placeholder image


class Transformers:
    """transformers' model with sdpa, a batch padded to its longest sample, its own loss over all logits."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype, *, checkpointing: bool = False) -> None:
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        model = transformers.Qwen2VLForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, attn_implementation="sdpa"
        )
        self.model: Any = model.to(device).train()  # type: ignore[arg-type]
        self.device, self.config = device, Qwen2VLConfig.from_pretrained(folder)
        if checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        named = [(_released(name), p) for name, p in self.model.named_parameters()]
        self.optimizer = Optimizer(named, _OPTIMIZER, master_weights=True)

    def prepare(self, samples: Sequence[Example]) -> list[Example]:
        return [_as_floats(e, self.config.vision.temporal_patch_size) for e in samples]

    def _inputs(self, samples: Sequence[Example]) -> dict[str, torch.Tensor]:
        longest = max(e.tokens for e in samples)

        def padded(tensors: Sequence[torch.Tensor], value: int) -> torch.Tensor:
            return torch.stack([F.pad(x, (0, longest - x.shape[0]), value=value) for x in tensors])

        ids = padded([e.input_ids for e in samples], self.config.pad_token_id)
        inputs = {
            "input_ids": ids,
            "attention_mask": padded([torch.ones_like(e.input_ids) for e in samples], 0),
            "labels": padded([e.labels for e in samples], IGNORE),
            "mm_token_type_ids": (ids == self.config.image_token_id).int(),
        }
        pixels = [e.pixel_values for e in samples if e.pixel_values is not None]
        grids = [e.image_grid_thw for e in samples if e.image_grid_thw is not None]
        if pixels:
            inputs |= {"pixel_values": torch.cat(pixels), "image_grid_thw": torch.cat(grids)}
        return {name: tensor.to(self.device) for name, tensor in inputs.items()}

    def loss(self, samples: Sequence[Example]) -> torch.Tensor:
        return self.model(**self._inputs(samples), use_cache=False).loss

    @torch.no_grad()
    def losses(self, samples: Sequence[Example]) -> torch.Tensor:
        inputs = self._inputs(samples)
        labels = inputs.pop("labels")
        logits = self.model(**inputs, use_cache=False).logits[:, :-1].float()
        each = F.cross_entropy(logits.transpose(1, 2), labels[:, 1:], ignore_index=IGNORE, reduction="none")
        return each.sum(1)


def _released(name: str) -> str:
    """transformers' name of a parameter, as the checkpoint has it."""
    return name.removeprefix("model.").replace("language_model.", "model.")


def _as_floats(e: Example, frames: int) -> Example:
    """The sample with its pixels normalised and every frame there, as transformers' processor gives it."""
    if e.pixel_values is None:
        return e
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGE_MEAN, IMAGE_STD))
    rows = (e.pixel_values.unflatten(1, (3, 1, -1)).float() / 255 - mean) / std
    return replace(e, pixel_values=rows.expand(-1, -1, frames, -1).flatten(1))


SIDES = {"ours": Ours, "transformers": Transformers}
Side = Ours | Transformers


def train(side: Side, steps: Sequence[Sequence[Example]]) -> torch.Tensor:
    """One pass over ``steps`` of prepared samples, an update each; the losses."""
    losses = []
    with grads_on(), torch.enable_grad():
        for samples in steps:
            loss = side.loss(samples)
            loss.backward()
            side.optimizer.collect()
            side.optimizer.step(1.0)
            losses.append(loss.detach())
    return torch.stack(losses)


def gradients(side: Side, samples: Sequence[Example]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A step's loss and its gradients under their released names; nothing is updated."""
    with grads_on(), torch.enable_grad():
        loss = side.loss(side.prepare(samples))
        loss.backward()
        found = {_released(name) if isinstance(side, Transformers) else name: p.grad
                 for name, p in side.model.named_parameters()}  # fmt: skip
        side.model.zero_grad()
    return loss.detach(), {name: grad for name, grad in found.items() if grad is not None}
