"""The three stages of Qwen2-VL's training (arXiv 2409.12191, section 2.2) and what each begins from.

vision       the tower learns, the language model is Qwen2's and frozen
multimodal   everything learns
instruct     the language model learns, the tower is frozen
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from .. import adapter, hub, weights
from ..config import Qwen2VLConfig, VisionConfig
from ..errors import CheckpointError, install_hint
from ..files import read_json
from ..model import Qwen2VL
from ..quantization import quantised
from .config import LoraConfig, ModelConfig
from .errors import TrainingConfigError

PARTS = ("tower", "merger", "llm")
#: Stage to the parts whose parameters change in it.
STAGES: dict[str, tuple[str, ...]] = {
    "vision": ("tower", "merger"),
    "multimodal": PARTS,
    "instruct": ("llm",),
}


def part_of(name: str) -> str:
    """The part that a parameter belongs to."""
    if name.startswith("visual.merger."):
        return "merger"
    return "tower" if name.startswith("visual.") else "llm"


def freeze(model: Qwen2VL, stage: str) -> None:
    """Let the stage's parts learn and nothing else. Raises :class:`TrainingConfigError` for an unknown stage."""
    if stage not in STAGES:
        raise TrainingConfigError(f"stage: must be one of {', '.join(STAGES)}, got {stage!r}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) in STAGES[stage])


# ----------------------------------------------------------------------------------------------- what a run begins from


def refuse_training(model: nn.Module) -> None:
    """Raises :class:`CheckpointError` for a model with quantised weights, which get no gradients."""
    if found := quantised(model):
        how = next(iter(found.values())).how.label
        raise CheckpointError(
            f"the checkpoint is quantised ({how}), and quantised weights get no gradients, nor could the model that a "
            "run exports be merged with an adapter; train the release in 16 bits"
        )


def build_model(config: ModelConfig, *, seed: int = 0, checkpoint: hub.Checkpoint | None = None) -> Qwen2VL:
    """The model on the CPU, its tensors maps of the files where the dtype allows; the same on every rank.

    ``checkpoint``: what ``config.checkpoint`` names, where it has been found. Raises :class:`CheckpointError` for one
    that cannot be loaded, or is quantised.
    """
    if config.checkpoint is not None:
        model = Qwen2VL.from_pretrained(checkpoint or config.checkpoint, device="cpu", dtype=config.dtype)
        refuse_training(model)
        return model.train()
    assert config.config is not None
    folder = Path(config.config)
    shape = Qwen2VLConfig.from_pretrained(folder) if folder.is_dir() else Qwen2VLConfig.preset(config.config)
    model = Qwen2VL.from_config(shape, device="meta", dtype=config.dtype)
    if config.llm is not None:
        load_qwen2(model, hub.resolve(config.llm))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.init_weights(torch.device("cpu"))
    if config.tower is not None:
        load_clip_tower(model, hub.resolve(config.tower))
    return model.train()


#: Keys of a Qwen2 config.json that must say what the model's text config says.
_SHARED = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "rms_norm_eps",
    "tie_word_embeddings",
)
#: Of those for experts, the ones that no tensor's shape tells.
_MOE = {"num_experts_per_tok", "norm_topk_prob"}


def load_qwen2(model: Qwen2VL, folder: Path) -> None:
    """Fill the language model and its head from a Qwen2 text checkpoint in ``folder`` (transformers' layout).

    Its tensors are then on the CPU, maps of the files where the dtype allows, even of a model on the meta device.

    Tensor names are the model's own. A model with experts begins from a Qwen2-MoE checkpoint. Raises
    :class:`CheckpointError` listing what does not fit.
    """
    theirs, text = read_json(folder / "config.json"), model.config.text
    want = "qwen2" if text.moe is None else "qwen2_moe"
    if not isinstance(theirs, dict) or theirs.get("model_type") != want:
        kind = theirs.get("model_type") if isinstance(theirs, dict) else theirs
        raise CheckpointError(f"{folder}: model.llm must be a Qwen2 checkpoint (model_type {want!r}), got {kind!r}")
    rope = theirs.get("rope_parameters") or theirs
    pairs = {key: (theirs[key], getattr(text, key)) for key in _SHARED if key in theirs}
    if text.moe is not None:
        pairs |= {key: (theirs[key], value) for key, value in text.moe.to_dict().items() if key in _MOE & theirs.keys()}
    pairs["rope_theta"] = (rope.get("rope_theta", text.rope_theta), text.rope_theta)
    if wrong := [f"{key} {got!r}, the model has {want!r}" for key, (got, want) in pairs.items() if got != want]:
        raise CheckpointError(f"{folder}: config.json does not fit: {'; '.join(wrong)}")
    part = nn.Module()
    part.model = model.model
    if not text.tie_word_embeddings:
        part.lm_head = model.lm_head
    elif weights.holds_own_head(folder):
        raise CheckpointError(
            f"{folder}: {weights.HEAD_NAME} differs from {weights.EMBEDDING_NAME}, and the model's config ties the "
            "two; set tie_word_embeddings to false there"
        )
    ignore = (weights.HEAD_NAME,) if text.tie_word_embeddings else ()
    weights.load_weights(part, folder, device=torch.device("cpu"), dtype=model.dtype, ignore=ignore)


#: (name in a block of transformers' CLIPVisionModel, name in ours); the three projections become one.
_CLIP_BLOCK = (
    ("layer_norm1", "norm1"),
    ("layer_norm2", "norm2"),
    ("self_attn.out_proj", "attn.proj"),
    ("mlp.fc1", "mlp.fc1"),
    ("mlp.fc2", "mlp.fc2"),
)
_CLIP_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
#: The tensors of CLIP that the tower has no place for: positions are rotary here, there is no class token, and its
#: norms before and after the blocks, and its projection, have no counterpart before the merger, which is drawn at
#: random.
CLIP_DROPPED = (
    "embeddings.position_embedding.weight",
    "embeddings.position_ids",
    "embeddings.class_embedding",
    "pre_layrnorm.weight",
    "pre_layrnorm.bias",
    "post_layernorm.weight",
    "post_layernorm.bias",
)


def load_clip_tower(model: Qwen2VL, folder: Path) -> list[str]:
    """Fill the tower, the merger excepted, from a CLIP ViT in ``folder`` (transformers' CLIPVisionModel or CLIPModel).

    The position embedding is dropped. The patch embedding ``(C, 3, p, p)`` becomes ``(C, 3, 2, p, p)``, half of it in
    each frame, so that two equal frames embed as the image did.

    Returns the names of the vision tensors that were dropped. Raises :class:`CheckpointError` listing what is missing,
    left over or of another shape, or what config.json says otherwise than the tower.
    """
    _check_clip_config(read_json(folder / "config.json"), model.config.vision, folder)
    found: dict[str, torch.Tensor] = {}
    for path in weights.shards(folder):
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118  (not a dict)
                    if name.startswith("vision_model.") or name.startswith(("embeddings.", "encoder.")):
                        found[name.removeprefix("vision_model.")] = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: damaged or truncated: {error}") from error
    ours: dict[str, torch.Tensor] = {}
    missing: list[str] = []

    def take(name: str) -> torch.Tensor | None:
        if name not in found:
            missing.append(f"{name}: missing")
        return found.pop(name, None)

    frames = model.config.vision.temporal_patch_size
    if (patch := take("embeddings.patch_embedding.weight")) is not None:
        ours["patch_embed.proj.weight"] = (patch.unsqueeze(2) / frames).expand(-1, -1, frames, -1, -1)
    for i in range(model.config.vision.depth):
        for end in ("weight", "bias"):
            for theirs, our in _CLIP_BLOCK:
                if (tensor := take(f"encoder.layers.{i}.{theirs}.{end}")) is not None:
                    ours[f"blocks.{i}.{our}.{end}"] = tensor
            qkv = [take(f"encoder.layers.{i}.{theirs}.{end}") for theirs in _CLIP_QKV]
            if all(tensor is not None for tensor in qkv):
                ours[f"blocks.{i}.attn.qkv.{end}"] = torch.cat([t for t in qkv if t is not None])
    dropped = [name for name in found if name in CLIP_DROPPED]
    problems = missing + [f"{name}: no place for it" for name in found if name not in CLIP_DROPPED]
    parameters = dict(model.visual.named_parameters())
    for name, tensor in ours.items():
        if tensor.shape != parameters[name].shape:
            want = tuple(parameters[name].shape)
            problems.append(f"{name}: shape {tuple(tensor.shape)}, the config wants {want}")
    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems[:20])
        raise CheckpointError(f"{folder}: {len(problems)} tensor(s) of the CLIP tower do not fit:\n{listed}")
    with torch.no_grad():
        for name, tensor in ours.items():
            parameters[name].copy_(tensor)
    return dropped


def _check_clip_config(theirs: Any, vision: VisionConfig, folder: Path) -> None:
    """What tensors' shapes do not tell. The epsilon of norms, CLIP's 1e-5 and the tower's 1e-6, is let pass."""
    theirs = theirs.get("vision_config", theirs) if isinstance(theirs, dict) else {}
    wanted = {
        "num_attention_heads": vision.num_heads,
        "patch_size": vision.patch_size,
        "num_hidden_layers": vision.depth,
        "hidden_act": "quick_gelu",
    }
    wrong = [f"{key} {theirs[key]!r}, the tower has {want!r}" for key, want in wanted.items()
             if key in theirs and theirs[key] != want]  # fmt: skip
    if wrong:
        raise CheckpointError(f"{folder}: config.json does not fit: {'; '.join(wrong)}")


# ---------------------------------------------------------------------------------------------------------------- LoRA


def add_lora(model: Qwen2VL, config: LoraConfig, stage: str) -> None:
    """Freeze everything and put peft's adapters into the decoder's linear layers, and the tower's blocks and routed
    experts if asked.

    Raises :class:`TrainingConfigError` for a stage that freezes the decoder, a target that is none, and without peft.
    """
    if "llm" not in STAGES[stage]:
        raise TrainingConfigError(f"lora: adapters of the decoder do not go with stage {stage}, which freezes it")
    layers = adapter.adaptable(model)

    def named(prefix: str, targets: tuple[str, ...], key: str) -> list[str]:
        inside = {name: name.rpartition(".")[2] for name in layers if name.startswith(prefix)}
        if unknown := [target for target in targets if target not in inside.values()]:
            raise TrainingConfigError(
                f"{key}: {unknown[0]!r} names no linear layer; there are {', '.join(sorted(set(inside.values())))}"
            )
        return [name for name, leaf in inside.items() if leaf in targets]

    names = named("model.layers.", config.targets, "lora.targets")
    if config.tower:
        names += named("visual.blocks.", ("qkv", "proj", "fc1", "fc2"), "lora.tower")
    stacked = adapter.stacked_experts(model) if config.experts else {}
    if config.experts and not stacked:
        raise TrainingConfigError("lora.experts: the model has no routed experts")
    parameters = [f"{name}.{leaf}" for name in stacked for leaf in ("gate_up_proj", "down_proj")]
    try:
        adapter.add_layers(model, names, adapter.LoraShape(config.rank, config.alpha, config.dropout), parameters)
    except ImportError as error:
        raise TrainingConfigError(f"lora: needs the package peft; {install_hint('peft')}") from error
    for parameter in model.parameters():
        if parameter.requires_grad:  # peft makes them float32; shards of one block share a dtype
            parameter.data = parameter.data.to(model.dtype)
