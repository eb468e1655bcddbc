"""The files of a checkpoint folder that a processor reads and writes: image settings, tokenizer and chat template."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config import IMAGE_MEAN, IMAGE_STD, MAX_PIXELS, MIN_PIXELS, Qwen2VLConfig, VisionConfig
from ..errors import CheckpointError
from ..files import read_json, read_text, write_json, write_text
from ..media.options import DEFAULTS, MediaOptions, PatchShape, positive_int
from .chatml import CHAT_TEMPLATE
from .template import ChatTemplate
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


def read_media_options(folder: Path, vision: VisionConfig) -> MediaOptions:
    """The limits of a checkpoint's images and of its videos' frames, over the defaults.

    Those of images stand in preprocessor_config.json, those of frames in video_preprocessor_config.json; transformers 5
    saves both in processor_config.json.

    Raises:
        CheckpointError: a file is unreadable, a value is out of range, patches are cut in another way than `vision`
            cuts them, or pixels are normalised by other values than `IMAGE_MEAN` and `IMAGE_STD`.
    """
    given: dict[str, int | None] = {}
    for kind, name, prefix in _SETTINGS:
        settings, where = _read_settings(folder, name, f"{kind}_processor")
        for field, wanted in (("image_mean", IMAGE_MEAN), ("image_std", IMAGE_STD)):
            value = settings.get(field)
            # The model normalises by itself, with these values folded into its first layer.
            if value is not None and not _same_values(value, wanted):
                raise CheckpointError(f"{where}: {field} {value} is not supported; Qwen2-VL has {list(wanted)}")
        sizes = (vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size)
        for field, size in zip(("patch_size", "merge_size", "temporal_patch_size"), sizes, strict=True):
            if settings.get(field, size) != size:
                raise CheckpointError(f"{where}: {field} is {settings[field]!r} for {kind}s, but {size} in config.json")
        low, high = _pixel_limits(settings, where)
        if kind == "video" and (low, high) == (MIN_PIXELS, MAX_PIXELS):
            continue  # transformers 4.52 to 4.57 copied the released limits of images there, for want of any of frames
        given |= {f"{prefix}min_pixels": low, f"{prefix}max_pixels": high}
    return DEFAULTS.updated(given)


#: (kind, its own file, what its limits are called in `MediaOptions` before "min_pixels" and "max_pixels").
_SETTINGS = (("image", "preprocessor_config.json", ""), ("video", "video_preprocessor_config.json", "video_"))


def _read_settings(folder: Path, name: str, key: str) -> tuple[dict[str, Any], Path]:
    """What `name`, or `key` of processor_config.json, says, {} if nothing, and the file that says it."""
    for path, inner in ((folder / name, None), (folder / "processor_config.json", key)):
        if not path.is_file():
            continue
        data = read_json(path)
        settings = data.get(inner, {}) if isinstance(data, dict) and inner else data
        if not isinstance(settings, dict):
            raise CheckpointError(f"{path}: wants a JSON object of settings, got {type(settings).__name__}")
        return settings, path
    return {}, folder / name


def _pixel_limits(settings: Mapping[str, Any], where: Path) -> tuple[int | None, int | None]:
    """(min, max) pixels in those settings, None where they say nothing."""
    size = settings.get("size") or {}
    if not isinstance(size, Mapping):
        raise CheckpointError(f"{where}: size wants an object, got {size!r}")
    limits = (
        settings.get("min_pixels") or size.get("shortest_edge") or size.get("min_pixels"),
        settings.get("max_pixels") or size.get("longest_edge") or size.get("max_pixels"),
    )
    for name, value in zip(("min_pixels", "max_pixels"), limits, strict=True):
        if value is not None and positive_int(value) is None:
            raise CheckpointError(f"{where}: {name} wants a positive int, got {value!r}")
    return limits


def write_media_options(folder: Path, options: MediaOptions, shape: PatchShape) -> None:
    """Write preprocessor_config.json and video_preprocessor_config.json, and their copies in processor_config.json if
    the folder has one."""
    written: dict[str, Any] = {}
    for kind, name, prefix in _SETTINGS:
        low, high = getattr(options, f"{prefix}min_pixels"), getattr(options, f"{prefix}max_pixels")
        settings = {
            f"{kind}_processor_type": f"Qwen2VL{kind.title()}Processor",
            "processor_class": "Qwen2VLProcessor",
            "min_pixels": low,
            "max_pixels": high,
            "size": {"shortest_edge": low, "longest_edge": high},
            "patch_size": shape.patch_size,
            "temporal_patch_size": shape.temporal_patch_size,
            "merge_size": shape.merge_size,
            "image_mean": list(IMAGE_MEAN),
            "image_std": list(IMAGE_STD),
        }
        write_json(folder / name, settings)
        written[f"{kind}_processor"] = settings
    other = folder / "processor_config.json"
    if other.is_file() and isinstance(data := read_json(other), dict):
        write_json(other, data | written)


#: The names under which templates may ask for tokens, and what this package writes for them.
_TOKEN_NAMES = {"bos_token": None, "eos_token": IM_END, "pad_token": END_OF_TEXT, "unk_token": None}


def read_chat_template(folder: Path, tokenizer: Tokenizer) -> ChatTemplate | None:
    """The checkpoint's own chat template, None if it has none.

    It is looked for where transformers does: chat_template.json, chat_template.jinja, tokenizer_config.json. Of several
    by name, it is the one called "default".

    Raises:
        CheckpointError: a file is unreadable, or the template is no Jinja.
    """
    config = _read_object(folder / "tokenizer_config.json")
    stated = {name: config.get(name) for name in _TOKEN_NAMES}
    spelled = {name: token.get("content") if isinstance(token, dict) else token for name, token in stated.items()}
    variables = {name: token for name, token in spelled.items() if isinstance(token, str)}
    jinja = folder / "chat_template.jinja"
    found = _read_object(folder / "chat_template.json").get("chat_template")
    if found is None and jinja.is_file():
        found = read_text(jinja)
    if found is None:
        found = config.get("chat_template")
    if isinstance(found, list):
        found = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
    if isinstance(found, dict):
        if "default" not in found:
            raise CheckpointError(f"{folder}: of the chat templates {', '.join(map(repr, found))} none is 'default'")
        found = found["default"]
    if found is None:
        return None
    if not isinstance(found, str):
        raise CheckpointError(f"{folder}: the chat template wants text, got {type(found).__name__}")
    try:
        return ChatTemplate(found, tokenizer, variables)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file, {} if there is no such file."""
    data = read_json(path) if path.is_file() else {}
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: wants a JSON object, got {type(data).__name__}")
    return data


def write_tokenizer_files(folder: Path, tokenizer: Tokenizer, template: ChatTemplate | None = None) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.json, and chat_template.jinja if the folder has
    one; without a template of the checkpoint's own they get `CHAT_TEMPLATE`."""
    tokens = tokenizer.backend.get_added_tokens_decoder()
    source = CHAT_TEMPLATE if template is None else template.source
    fields = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    config = {
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(token_id): {field: getattr(token, field) for field in fields} for token_id, token in tokens.items()
        },
        "additional_special_tokens": [name for name in tokenizer.special_ids if name != END_OF_TEXT],
        "chat_template": source,
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "model_max_length": _MODEL_MAX_LENGTH,
        "padding_side": "left",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        **_TOKEN_NAMES,
        **({} if template is None else template.variables),
    }
    write_text(folder / "tokenizer.json", tokenizer.backend.to_str(pretty=True) + "\n")
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "chat_template.json", {"chat_template": source})
    if (jinja := folder / "chat_template.jinja").is_file():
        write_text(jinja, source)


def _same_values(given: Any, wanted: Sequence[float]) -> bool:
    if not isinstance(given, list) or len(given) != len(wanted):
        return False
    return all(isinstance(a, (int, float)) and abs(a - b) < 1e-4 for a, b in zip(given, wanted, strict=True))
