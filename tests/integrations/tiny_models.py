"""Tiny Qwen2-VL, Qwen2.5-VL and Qwen3-VL of whichever transformers is installed, 4.57 to 5.24, and prompts for them."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from ..kernels.ops.mrope_layouts import IMAGE, PAD, VIDEO

VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
VERSION_5 = VERSION >= (5, 0)
TOKEN_TYPES = VERSION >= (5, 3)  # what get_rope_index goes by, and its conventions for padding
#: Features that fit nothing in the version at hand; test_transformers_versions.py says why.
LEFT_OFF = {"positions"} if VERSION == (5, 2) else set()
FAMILIES = ("Qwen2VL", "Qwen2_5_VL", "Qwen3VL")
VISION_START, VISION_END = 5, 6


def config(family: str, **text_changes: Any) -> Any:
    section = [2, 3, 3] if family != "Qwen3VL" else [4, 2, 2]
    rope: dict[str, Any] = {"rope_type": "default", "mrope_section": section}
    text = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "vocab_size": 100, "max_position_embeddings": 512, "head_dim": 16}
    text |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": PAD}
    text |= {"rope_parameters": {**rope, "rope_theta": 1e4}} if VERSION_5 else {"rope_scaling": rope, "rope_theta": 1e4}
    heads = {"num_heads": 2, "depth": 3}
    vision = {
        "Qwen2VL": {**heads, "embed_dim": 160, "hidden_size": 64, "mlp_ratio": 2},  # heads of 80, as released
        "Qwen2_5_VL": {
            **heads, "hidden_size": 160, "out_hidden_size": 64, "intermediate_size": 96, "window_size": 56,
            "fullatt_block_indexes": [1], "tokens_per_second": 2,
        },
        "Qwen3VL": {
            **heads, "hidden_size": 144, "out_hidden_size": 64, "intermediate_size": 96, "patch_size": 14,
            "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1],
        },  # heads of 72
    }[family]  # fmt: skip
    return getattr(transformers, f"{family}Config")(
        text_config={**text, **text_changes},
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=False,
    )


def model(family: str, dtype: torch.dtype = torch.float32, std: float = 0.1, **text_changes: Any) -> Any:
    torch.manual_seed(0)
    made = getattr(transformers, f"{family}ForConditionalGeneration")(config(family, **text_changes)).eval()
    for name, parameter in made.named_parameters():  # wide enough that every part of it shows in the output
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name and "weight" in name else 0.0, std=std)
    buffers = {name: buffer.clone() for name, buffer in made.named_buffers()}
    made = made.to(dtype)
    for name, buffer in made.named_buffers():  # from_pretrained keeps the frequencies in float32
        buffer.data = buffers[name]
    return made


#: Patches in height and width of the images of each row, and video grids.
ROWS = ((("image", 1, 4, 6),), (("image", 1, 8, 4), ("image", 1, 2, 2)))
WITH_VIDEO = ((("video", 5, 2, 4), ("image", 1, 4, 4)),)


def prompt(family: str, rows: Any = ROWS, side: str = "left", dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """A batch of prompts, padded on one side where they differ in length."""
    texts = []
    for row in rows:
        ids = [11]
        for kind, t, gh, gw in row:
            token = IMAGE if kind == "image" else VIDEO
            frames = t if family == "Qwen3VL" and kind == "video" else 1  # timestamps between the frame pairs
            for frame in range(frames):
                count = t // frames * gh * gw // 4
                ids += [12 + frame, VISION_START, *[token] * count, VISION_END, 13]
        texts.append(ids)
    width = max(map(len, texts))
    fill = [[PAD] * (width - len(ids)) for ids in texts]
    ids = torch.tensor([pad + row if side == "left" else row + pad for pad, row in zip(fill, texts, strict=True)])
    made: dict[str, Any] = {"input_ids": ids, "attention_mask": (ids != PAD).long()}
    if TOKEN_TYPES:
        made["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    generator = torch.Generator().manual_seed(1)
    for kind, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        grid = torch.tensor([[t, gh, gw] for row in rows for k, t, gh, gw in row if k == kind])
        if len(grid):
            patches = torch.randn(int(grid.prod(1).sum()), 1176, generator=generator)
            made |= {name: patches.to(dtype), f"{kind}_grid_thw": grid}
    return made
