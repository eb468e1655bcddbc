"""Model configuration: the released flat config.json, the layouts transformers re-saves it in, and presets.

Every field is explicit. A missing key that has a value in all released checkpoints takes that value; one that differs
between sizes (widths, depths, rms_norm_eps, tie_word_embeddings) is required, because transformers' class defaults
are those of the 72B and would build a different model without a word.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import CheckpointError


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower: depth blocks of width embed_dim, merged into tokens of width hidden_size."""

    hidden_size: int  # width of a merged token, the language model's width
    depth: int = 32
    embed_dim: int = 1280
    num_heads: int = 16
    mlp_ratio: float = 4
    in_channels: int = 3
    patch_size: int = 14
    spatial_merge_size: int = 2
    temporal_patch_size: int = 2
    rope_theta: float = 10_000.0
    layer_norm_eps: float = 1e-6

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    @property
    def patch_values(self) -> int:
        """Values in one packed patch: channels x frames x height x width."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2


@dataclass(frozen=True)
class TextConfig:
    """The Qwen2 language model."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    rope_theta: float = 1_000_000.0
    mrope_section: tuple[int, int, int] = (16, 24, 24)
    max_position_embeddings: int = 32768

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class Qwen2VLConfig:
    """A whole model. ``from_pretrained`` reads a folder, ``preset`` gives a released size, ``to_dict`` writes."""

    text: TextConfig
    vision: VisionConfig
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653
    vision_token_id: int = 151654
    bos_token_id: int = 151643
    eos_token_id: int = 151645
    pad_token_id: int = 151643
    torch_dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        t, v = self.text, self.vision
        problems = []
        if t.hidden_size % t.num_attention_heads:
            problems.append(
                f"hidden_size {t.hidden_size} is no multiple of num_attention_heads {t.num_attention_heads}"
            )
        if t.num_attention_heads % t.num_key_value_heads:
            problems.append(
                f"num_attention_heads {t.num_attention_heads} is no multiple of num_key_value_heads "
                f"{t.num_key_value_heads}"
            )
        if len(t.mrope_section) != 3 or 2 * sum(t.mrope_section) != t.head_dim:
            problems.append(f"mrope_section {t.mrope_section} must be three sizes summing to {t.head_dim // 2} pairs")
        if v.embed_dim % v.num_heads or v.head_dim % 4:
            problems.append(f"vision embed_dim {v.embed_dim} over {v.num_heads} heads must give a multiple of 4")
        if v.hidden_size != t.hidden_size:
            problems.append(f"vision hidden_size {v.hidden_size} differs from the text's {t.hidden_size}")
        ids = {name: getattr(self, name) for name in _TOKEN_IDS}
        problems += [
            f"{n} {i} is outside the vocabulary of {t.vocab_size}" for n, i in ids.items() if i >= t.vocab_size
        ]
        if problems:
            raise CheckpointError(f"config: {'; '.join(problems)}")

    @classmethod
    def preset(cls, name: str) -> Qwen2VLConfig:
        """A released size: ``"2b"``, ``"7b"`` or ``"72b"``."""
        if name.lower() not in _PRESETS:
            raise CheckpointError(f"preset: {name!r} is unknown; the presets are {', '.join(_PRESETS)}")
        text = TextConfig(*_PRESETS[name.lower()])
        return cls(text=text, vision=VisionConfig(hidden_size=text.hidden_size))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Qwen2VLConfig:
        """Read ``folder/config.json``. Raises :class:`CheckpointError` saying what is missing or unsupported."""
        path = Path(folder) / "config.json"
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(f"{path}: no such file; a checkpoint folder holds a config.json") from None
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
        if not isinstance(data, dict):
            raise CheckpointError(f"{path}: must hold a JSON object, got {type(data).__name__}")
        try:
            return cls.from_dict(data)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Qwen2VLConfig:
        """Read any known layout: flat (released), nested by transformers 4.52-4.57, or nested by 5.x."""
        model_type = data.get("model_type", "qwen2_vl")
        if model_type != "qwen2_vl":
            raise CheckpointError(f"model_type is {model_type!r}; this package loads 'qwen2_vl'")
        quantised = data.get("quantization_config") or {}
        if quantised:
            method = quantised.get("quant_method", "unknown method")
            raise CheckpointError(
                f"quantised checkpoints ({method}) are not supported; load the bfloat16 release of the same model"
            )
        text = data.get("text_config") or data
        vision = data.get("vision_config")
        if not isinstance(vision, dict):
            raise CheckpointError("vision_config is missing")
        if (act := text.get("hidden_act", "silu")) != "silu" or vision.get("hidden_act", "quick_gelu") != "quick_gelu":
            raise CheckpointError(f"hidden_act {act!r} / {vision.get('hidden_act')!r} must be 'silu' / 'quick_gelu'")
        if text.get("use_sliding_window", False):
            raise CheckpointError("use_sliding_window is true; sliding-window attention is not supported")
        merged = {**data, **text}  # ids may stand at the top only, or in text_config only
        rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in ("default", "mrope"):  # both mean: plain inverse frequencies, mixed by section
            raise CheckpointError(f"rope type {kind!r} is not supported; 'default' and 'mrope' are")
        section = tuple(rope.get("mrope_section", (16, 24, 24)))
        ties = [d["tie_word_embeddings"] for d in (data, text) if d.get("tie_word_embeddings") is not None]
        values: dict[str, Any] = {name: merged.get(name) for name in _REQUIRED_TEXT}
        values["tie_word_embeddings"] = any(ties)  # transformers writes it whenever it is true
        if missing := sorted(name for name, value in values.items() if value is None):
            raise CheckpointError(f"missing {', '.join(missing)}")
        for name in _INTEGERS:
            if not isinstance(values[name], int) or values[name] <= 0:
                raise CheckpointError(f"{name} must be a positive integer, got {values[name]!r}")
        values["rope_theta"] = float(rope.get("rope_theta", merged.get("rope_theta", 1_000_000.0)))
        values["max_position_embeddings"] = merged.get("max_position_embeddings", 32768)
        vision_theta = (vision.get("rope_parameters") or {}).get("rope_theta", 10_000.0)
        ids = {name: merged[name] for name in _TOKEN_IDS if isinstance(merged.get(name), int)}
        return cls(
            text=TextConfig(mrope_section=section, **values),  # type: ignore[arg-type]
            vision=VisionConfig(
                hidden_size=vision.get("hidden_size", values["hidden_size"]),
                in_channels=vision.get("in_channels", vision.get("in_chans", 3)),
                rope_theta=float(vision_theta),
                **{name: vision[name] for name in _VISION_FIELDS if name in vision},
            ),
            torch_dtype=str(merged.get("dtype") or merged.get("torch_dtype") or "bfloat16").removeprefix("torch."),
            **ids,
        )

    def to_dict(self) -> dict[str, Any]:
        """The released flat layout, which transformers, vLLM and SGLang read."""
        t, v = self.text, self.vision
        return {
            "architectures": ["Qwen2VLForConditionalGeneration"],
            "model_type": "qwen2_vl",
            "attention_dropout": 0.0,
            "hidden_act": "silu",
            "hidden_size": t.hidden_size,
            "initializer_range": 0.02,
            "intermediate_size": t.intermediate_size,
            "max_position_embeddings": t.max_position_embeddings,
            "max_window_layers": t.num_hidden_layers,
            "num_attention_heads": t.num_attention_heads,
            "num_hidden_layers": t.num_hidden_layers,
            "num_key_value_heads": t.num_key_value_heads,
            "rms_norm_eps": t.rms_norm_eps,
            "rope_scaling": {"type": "mrope", "mrope_section": list(t.mrope_section)},
            "rope_theta": t.rope_theta,
            "sliding_window": t.max_position_embeddings,
            "tie_word_embeddings": t.tie_word_embeddings,
            "torch_dtype": self.torch_dtype,
            "use_cache": True,
            "use_sliding_window": False,
            "vocab_size": t.vocab_size,
            **{name: getattr(self, name) for name in _TOKEN_IDS},
            "vision_config": {
                "model_type": "qwen2_vl",
                "depth": v.depth,
                "embed_dim": v.embed_dim,
                "hidden_size": v.hidden_size,
                "in_chans": v.in_channels,
                "in_channels": v.in_channels,  # transformers reads this name, the released files have the other
                "mlp_ratio": v.mlp_ratio,
                "num_heads": v.num_heads,
                "patch_size": v.patch_size,
                "spatial_merge_size": v.spatial_merge_size,
                "spatial_patch_size": v.patch_size,
                "temporal_patch_size": v.temporal_patch_size,
            },
        }


_TOKEN_IDS = (
    "image_token_id",
    "video_token_id",
    "vision_start_token_id",
    "vision_end_token_id",
    "vision_token_id",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
_INTEGERS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
_REQUIRED_TEXT = (*_INTEGERS, "rms_norm_eps")
_VISION_FIELDS = (
    "depth",
    "embed_dim",
    "num_heads",
    "mlp_ratio",
    "patch_size",
    "spatial_merge_size",
    "temporal_patch_size",
)

#: TextConfig's first eight fields, in order.
_PRESETS: dict[str, tuple[Any, ...]] = {
    "2b": (1536, 8960, 28, 12, 2, 151936, 1e-6, True),
    "7b": (3584, 18944, 28, 28, 4, 152064, 1e-6, False),
    "72b": (8192, 29568, 80, 64, 8, 152064, 1e-6, False),
}
