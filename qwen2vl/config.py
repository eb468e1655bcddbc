"""Model configuration: the released flat config.json, the layouts transformers re-saves it in, and presets.

Every field is explicit. A missing key that has a value in all released checkpoints takes that value; one that differs
between sizes (widths, depths, rms_norm_eps) is required, because transformers' class defaults are those of the 72B and
would build a different model without a word. tie_word_embeddings is false where it is missing: transformers writes it
whenever it is true, and a tied checkpoint read as untied fails loudly for want of a head.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import CheckpointError
from .files import read_json
from .moe_config import MODEL_TYPE as MOE_TYPE
from .moe_config import MoEConfig, moe_from_dict

if TYPE_CHECKING:
    from .quantization import Quantization

#: Mean and standard deviation of the channels R, G, B in [0, 1], by which every released checkpoint normalises pixels.
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
#: Bounds of a picture's area in pixels after resizing, where a checkpoint states none; 28 x 28 pixels are one token.
MIN_PIXELS = 56 * 56  # 4 tokens
MAX_PIXELS = 12_845_056  # 16,384 tokens
#: The same for each frame of a video, and the most tokens of one video.
MIN_FRAME_PIXELS = 128 * 784
MAX_FRAME_PIXELS = 768 * 784
MAX_VIDEO_TOKENS = 16384


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

    def __post_init__(self) -> None:
        _check_fields(self, "vision_config.")

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    @property
    def patch_values(self) -> int:
        """Values in one packed patch: channels x frames x height x width."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2


@dataclass(frozen=True)
class TextConfig:
    """The Qwen2 language model, with experts in some of its layers where ``moe`` says so."""

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
    moe: MoEConfig | None = None

    def __post_init__(self) -> None:
        _check_fields(self, "")
        if self.moe is not None:
            if not isinstance(self.moe, MoEConfig):
                raise CheckpointError(f"moe must be a MoEConfig or None, got {self.moe!r}")
            self.moe.check_depth(self.num_hidden_layers)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def experts(self, layer: int) -> MoEConfig | None:
        """What this layer has in the place of its MLP, ``None`` where it has an MLP."""
        return self.moe if self.moe is not None and self.moe.sparse(layer) else None


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
    quantization: Quantization | None = None  # of the files' weights; see :mod:`qwen2vl.quantization`

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
        if 2 * sum(t.mrope_section) != t.head_dim:
            problems.append(f"mrope_section {t.mrope_section} must sum to head_dim's {t.head_dim // 2} pairs")
        if v.embed_dim % v.num_heads or v.head_dim % 4:
            problems.append(f"vision embed_dim {v.embed_dim} over {v.num_heads} heads must give a multiple of 4")
        if v.hidden_size != t.hidden_size:
            problems.append(f"vision hidden_size {v.hidden_size} differs from the text's {t.hidden_size}")
        if v.in_channels != 3:
            problems.append(f"in_channels must be 3 (RGB), got {v.in_channels}")
        for name in _TOKEN_IDS:
            token = getattr(self, name)
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < t.vocab_size:
                problems.append(f"{name} {token!r} is outside the vocabulary of {t.vocab_size}")
        if self.image_token_id == self.video_token_id:
            problems.append(f"image_token_id and video_token_id must differ, got {self.image_token_id} twice")
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
        if not path.exists():
            raise CheckpointError(f"{path}: no such file; a checkpoint folder holds a config.json")
        data = read_json(path)
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
        if model_type not in ("qwen2_vl", MOE_TYPE):
            raise CheckpointError(f"model_type is {model_type!r}; this package loads 'qwen2_vl' and {MOE_TYPE!r}")
        stated = _object(data, "quantization_config")
        vision = _object(data, "vision_config")
        if not vision:
            raise CheckpointError("vision_config is missing")
        # Every value may stand at the top only, in text_config only, or in both; a null says nothing in either place.
        text = _object(data, "text_config")
        merged = _stated(data) | _stated(text)
        vision = _stated(vision)
        act, vision_act = merged.get("hidden_act", "silu"), vision.get("hidden_act", "quick_gelu")
        if act != "silu" or vision_act != "quick_gelu":
            raise CheckpointError(f"hidden_act {act!r} / {vision_act!r} must be 'silu' / 'quick_gelu'")
        if merged.get("use_sliding_window", False):
            raise CheckpointError("use_sliding_window is true; sliding-window attention is not supported")
        # What text_config says of positions, in its older or newer words, comes before anything at the top.
        ropes = (_object(part, key) for part in (text, data) for key in ("rope_parameters", "rope_scaling"))
        rope = next(filter(None, ropes), {})
        kind = rope.get("rope_type") or rope.get("type") or "default"
        if kind not in ("default", "mrope"):  # both mean: plain inverse frequencies, mixed by section
            raise CheckpointError(f"rope type {kind!r} is not supported; 'default' and 'mrope' are")
        section = rope.get("mrope_section", (16, 24, 24))
        moe = moe_from_dict(merged)
        if moe is None and model_type == MOE_TYPE:
            raise CheckpointError(f"model_type is {MOE_TYPE!r}, and num_experts is missing or 0")
        values: dict[str, Any] = {name: merged[name] for name in _TEXT_FIELDS if name in merged}
        if missing := sorted(set(_REQUIRED_TEXT) - set(values)):
            raise CheckpointError(f"missing {', '.join(missing)}")
        for part in (merged, rope):
            if part.get("rope_theta") is not None:
                values["rope_theta"] = part["rope_theta"]
        vision_values = {name: vision[name] for name in _VISION_FIELDS if name in vision}
        if "rope_theta" in (vision_rope := _stated(_object(vision, "rope_parameters"))):
            vision_values["rope_theta"] = vision_rope["rope_theta"]
        from .quantization import Quantization  # which loads PyTorch: the command line reads constants of this module

        return cls(
            text=TextConfig(
                mrope_section=tuple(section) if isinstance(section, list) else section,
                tie_word_embeddings=bool(data.get("tie_word_embeddings") or text.get("tie_word_embeddings")),
                moe=moe,
                **values,
            ),
            vision=VisionConfig(
                hidden_size=vision.get("hidden_size", values["hidden_size"]),
                in_channels=vision.get("in_channels", vision.get("in_chans", 3)),
                **vision_values,
            ),
            torch_dtype=str(merged.get("dtype") or merged.get("torch_dtype") or "bfloat16").removeprefix("torch."),
            quantization=Quantization.from_dict(stated) if stated else None,
            **{name: merged[name] for name in _TOKEN_IDS if name in merged},
        )

    def to_dict(self) -> dict[str, Any]:
        """The released flat layout, which transformers, vLLM and SGLang read; with experts none of them does."""
        t, v = self.text, self.vision
        kind = "Qwen2VL" if t.moe is None else "Qwen2VLMoe"
        return {
            "architectures": [f"{kind}ForConditionalGeneration"],
            "model_type": "qwen2_vl" if t.moe is None else MOE_TYPE,
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
            **({} if t.moe is None else t.moe.to_dict()),
            **{name: getattr(self, name) for name in _TOKEN_IDS},
            **({} if self.quantization is None else {"quantization_config": dict(self.quantization.stated)}),
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
                # transformers 5's name; the released files lack it and mean 10000.
                **(
                    {}
                    if v.rope_theta == 1e4
                    else {"rope_parameters": {"rope_type": "axial", "rope_theta": v.rope_theta}}
                ),
            },
        }


def _check_fields(config: VisionConfig | TextConfig, prefix: str) -> None:
    """Every number positive and of its kind; floats may be written as integers."""
    for f in fields(config):
        value = getattr(config, f.name)
        real = isinstance(value, (int, float)) and not isinstance(value, bool)
        if f.type == "int" and not (real and isinstance(value, int) and value > 0):
            raise CheckpointError(f"{prefix}{f.name} must be a positive integer, got {value!r}")
        if f.type == "float" and not (real and 0 < value < float("inf")):
            raise CheckpointError(f"{prefix}{f.name} must be a positive number, got {value!r}")
        most = _LARGEST.get(f.name, 2**31 - 1 if f.type == "int" else 10**15)
        if real and value > most:
            raise CheckpointError(f"{prefix}{f.name} must be at most {most}, got {value!r}")
        if f.name == "mrope_section" and not (
            isinstance(value, tuple) and len(value) == 3 and all(isinstance(n, int) and n >= 0 for n in value)
        ):
            raise CheckpointError(f"{prefix}mrope_section must be three non-negative integers, got {value!r}")


def _object(data: dict[str, Any], key: str) -> dict[str, Any]:
    """``data[key]`` as an object, empty where it is missing or null."""
    value = data.get(key)
    if value is not None and not isinstance(value, dict):
        raise CheckpointError(f"{key} must be a JSON object, got {value!r}")
    return value or {}


def _stated(data: dict[str, Any]) -> dict[str, Any]:
    """What an object says: its values that are not null."""
    return {key: value for key, value in data.items() if value is not None}


#: What no model has, and building one, or cutting pictures for it, would not end with.
_LARGEST = {
    "num_hidden_layers": 10_000,
    "depth": 10_000,
    "patch_size": 256,
    "spatial_merge_size": 32,
    "temporal_patch_size": 32,
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
_REQUIRED_TEXT = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "rms_norm_eps",
)
_TEXT_FIELDS = (*_REQUIRED_TEXT, "max_position_embeddings")
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
