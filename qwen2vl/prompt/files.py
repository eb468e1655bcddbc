"""The files of a checkpoint folder that a processor reads and writes: image settings, tokenizer and chat template."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config import IMAGE_MEAN, IMAGE_STD, Qwen2VLConfig
from ..errors import CheckpointError
from ..files import read_json, write_json, write_text
from .chatml import CHAT_TEMPLATE
from .tokenizer import END_OF_TEXT, IM_END, IMAGE_PAD, VIDEO_PAD, VISION_END, VISION_START, Tokenizer

_MODEL_MAX_LENGTH = 32768  # of the released tokenizer_config.json


def check_token_ids(config: Qwen2VLConfig, tokenizer: Tokenizer, folder: Path) -> None:
    """Raise CheckpointError where config.json and tokenizer.json disagree about a placeholder or vision mark."""
    for name, field in (
        (IMAGE_PAD, "image_token_id"),
        (VIDEO_PAD, "video_token_id"),
        (VISION_START, "vision_start_token_id"),
        (VISION_END, "vision_end_token_id"),
    ):
        if getattr(config, field) != tokenizer.id(name):
            raise CheckpointError(
                f"{folder}: {field} is {getattr(config, field)} in config.json, "
                f"but {name} is {tokenizer.id(name)} in tokenizer.json"
            )


def read_image_settings(folder: Path) -> dict[str, Any]:
    """The image processor's settings, {} if none; transformers 5 saves them in processor_config.json.

    Raises:
        CheckpointError: unreadable, or a mean and deviation other than `IMAGE_MEAN` and `IMAGE_STD`.
    """
    for name, key in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
        path = folder / name
        if not path.is_file():
            continue
        data = read_json(path)
        settings = data.get(key, {}) if isinstance(data, dict) and key else data
        if not isinstance(settings, dict):
            raise CheckpointError(f"{path}: wants a JSON object of settings, got {type(settings).__name__}")
        for field, wanted in (("image_mean", IMAGE_MEAN), ("image_std", IMAGE_STD)):
            given = settings.get(field)
            # The model normalises by itself, with these values folded into its first layer.
            if given is not None and not _same_values(given, wanted):
                raise CheckpointError(f"{path}: {field} {given} is not supported; Qwen2-VL has {list(wanted)}")
        return settings
    return {}


def pixel_limits_of(settings: Mapping[str, Any], folder: Path) -> tuple[int | None, int | None]:
    """(min, max) pixels of an image in those settings, None where they say nothing."""
    size = settings.get("size") or {}
    if not isinstance(size, Mapping):
        raise CheckpointError(f"{folder}: size in preprocessor_config.json wants an object, got {size!r}")
    limits = (
        settings.get("min_pixels") or size.get("shortest_edge") or size.get("min_pixels"),
        settings.get("max_pixels") or size.get("longest_edge") or size.get("max_pixels"),
    )
    for name, value in zip(("min_pixels", "max_pixels"), limits, strict=True):
        if value is not None and (not isinstance(value, int) or value <= 0):
            raise CheckpointError(f"{folder}: {name} in preprocessor_config.json wants a positive int, got {value!r}")
    return limits


def write_image_settings(
    folder: Path, *, min_pixels: int, max_pixels: int, patch_size: int, merge_size: int, temporal_patch_size: int
) -> None:
    """Write preprocessor_config.json, and its copy in processor_config.json if the folder has one."""
    settings = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2VLProcessor",
        "min_pixels": min_pixels,
        "max_pixels": max_pixels,
        "size": {"shortest_edge": min_pixels, "longest_edge": max_pixels},
        "patch_size": patch_size,
        "temporal_patch_size": temporal_patch_size,
        "merge_size": merge_size,
        "image_mean": list(IMAGE_MEAN),
        "image_std": list(IMAGE_STD),
    }
    write_json(folder / "preprocessor_config.json", settings)
    other = folder / "processor_config.json"
    if other.is_file() and isinstance(data := read_json(other), dict):
        write_json(other, data | {"image_processor": settings})


def write_tokenizer_files(folder: Path, tokenizer: Tokenizer) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.json."""
    tokens = tokenizer.backend.get_added_tokens_decoder()
    fields = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    config = {
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(token_id): {field: getattr(token, field) for field in fields} for token_id, token in tokens.items()
        },
        "additional_special_tokens": [name for name in tokenizer.special_ids if name != END_OF_TEXT],
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": IM_END,
        "errors": "replace",
        "model_max_length": _MODEL_MAX_LENGTH,
        "pad_token": END_OF_TEXT,
        "padding_side": "left",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    write_text(folder / "tokenizer.json", tokenizer.backend.to_str(pretty=True) + "\n")
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "chat_template.json", {"chat_template": CHAT_TEMPLATE})


def _same_values(given: Any, wanted: Sequence[float]) -> bool:
    if not isinstance(given, list) or len(given) != len(wanted):
        return False
    return all(isinstance(a, (int, float)) and abs(a - b) < 1e-4 for a, b in zip(given, wanted, strict=True))
