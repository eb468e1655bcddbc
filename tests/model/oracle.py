"""transformers' Qwen2-VL on the same weights, and the paper's position rule in plain Python."""

from __future__ import annotations

import torch
from transformers import Qwen2VLForConditionalGeneration
from transformers.utils import logging

from qwen2vl.config import IMAGE_MEAN, IMAGE_STD


def load(folder, dtype=torch.float32, attention="sdpa"):
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=dtype, attn_implementation=attention).eval()


def float_rows(patches: torch.Tensor) -> torch.Tensor:
    """uint8 patches to the rows that transformers' processor would have made of the same pixels.

    It shows a still image, of which we keep one frame, twice.
    """
    if patches.shape[1] == 3 * 14 * 14:
        patches = patches.view(-1, 3, 1, 14 * 14).expand(-1, 3, 2, 14 * 14).flatten(1)
    mean, std = (torch.tensor(x).repeat_interleave(2 * 14 * 14) for x in (IMAGE_MEAN, IMAGE_STD))
    return (patches.float() / 255 - mean) / std


def positions(ids: list[int], image_id: int, video_id: int, image_grids, video_grids) -> list[tuple[int, int, int]]:
    """Section 2.1 of arXiv 2409.12191, token by token; grids are iterators that the call consumes."""
    out: list[tuple[int, int, int]] = []
    start, i = 0, 0
    while i < len(ids):
        if ids[i] not in (image_id, video_id):
            out.append((start, start, start))
            start, i = start + 1, i + 1
            continue
        t, h, w = next(image_grids if ids[i] == image_id else video_grids)
        run = [(start + a, start + b, start + c) for a in range(t) for b in range(h // 2) for c in range(w // 2)]
        out += run
        start = 1 + max(max(p) for p in run)
        i += len(run)
    return out


def oracle_inputs(model_config, inputs, extra=()):
    """Our Inputs in transformers' terms, positions by :func:`positions`; ``extra``: ids appended to a batch of one."""
    ids = inputs["input_ids"]
    mask = inputs["attention_mask"]
    if extra:
        ids = torch.cat((ids, torch.tensor([list(extra)])), 1)
        mask = torch.cat((mask, torch.ones(1, len(extra), dtype=mask.dtype)), 1)
    grids = {k: iter(inputs.get(k, torch.zeros(0, 3).long()).tolist()) for k in ("image_grid_thw", "video_grid_thw")}
    position_ids = torch.zeros(3, *ids.shape, dtype=torch.int64)
    for row in range(ids.shape[0]):
        keep = mask[row].bool()
        got = positions(
            ids[row][keep].tolist(),
            model_config.image_token_id,
            model_config.video_token_id,
            grids["image_grid_thw"],
            grids["video_grid_thw"],
        )
        position_ids[:, row, keep] = torch.tensor(got).T
    out = {"input_ids": ids, "attention_mask": mask, "position_ids": position_ids}
    for name in ("pixel_values", "pixel_values_videos"):
        if name in inputs:
            out[name] = float_rows(inputs[name])
    return out | {k: inputs[k] for k in ("image_grid_thw", "video_grid_thw") if k in inputs}


@torch.no_grad()
def greedy(oracle, model_config, inputs, steps: int) -> list[int]:
    """Greedy tokens from full forward passes, without any cache."""
    banned = [model_config.image_token_id, model_config.video_token_id, model_config.vision_token_id]
    tokens: list[int] = []
    for _ in range(steps):
        arguments = oracle_inputs(model_config, inputs, tokens)
        logits = oracle(**arguments, use_cache=False, logits_to_keep=1).logits[0, -1]
        logits[banned] = float("-inf")
        tokens.append(int(logits.argmax()))
    return tokens
