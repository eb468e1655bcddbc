"""Checkpoints on disk: what a loaded one answers, files rewritten, and the layouts of config.json."""

import torch
from safetensors.torch import load_file, save_file

from qwen2vl import Qwen2VL

IDS = torch.arange(10, 40)[None]


def logits(folder, **kwargs):
    with torch.no_grad():
        return Qwen2VL.from_pretrained(folder, device="cpu", **kwargs)(IDS)


def rewrite(folder, change):
    """Load the single file, let ``change`` edit the dict, write it back."""
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)


def _nested_4(flat):
    """4.52-4.57: text_config with rope_scaling, theta and the tie flag, vision_config under its own model_type."""
    text_keys = [k for k in flat if k not in ("architectures", "model_type", "vision_config")]
    section = flat["rope_scaling"]["mrope_section"]
    rope = {"rope_type": "default", "type": "default", "mrope_section": section}
    return {
        "model_type": "qwen2_vl",
        "image_token_id": flat["image_token_id"],
        "video_token_id": flat["video_token_id"],
        "text_config": {k: flat[k] for k in text_keys} | {"model_type": "qwen2_vl_text", "rope_scaling": rope},
        "vision_config": flat["vision_config"] | {"model_type": "qwen2_vl"},
    }


def _nested_5(flat):
    """5.x: text_config with rope_parameters, which hold theta; ids at the top."""
    text = _nested_4(flat)["text_config"]
    rope = text.pop("rope_scaling") | {"rope_theta": text.pop("rope_theta")}
    ids = {k: text.pop(k) for k in list(text) if k.startswith(("image", "video", "vision"))}
    dtype, tie = text.pop("torch_dtype"), text.pop("tie_word_embeddings")
    return {
        "model_type": "qwen2_vl",
        "dtype": dtype,
        "tie_word_embeddings": tie,
        **ids,
        "text_config": text | {"rope_parameters": rope, "dtype": dtype},
        "vision_config": flat["vision_config"] | {"model_type": "qwen2_vl_vision", "dtype": dtype},
    }


LAYOUTS = {"flat": dict, "nested 4.x": _nested_4, "nested 5.x": _nested_5}
