"""How fast a model answered, beside what the memory of its device allows."""

from __future__ import annotations

import time
from typing import Any

import torch

from .generation import GenerationResult
from .model import Qwen2VL
from .moe import Experts, SeparateExperts
from .quantised_experts import QuantExperts

#: Bytes that are copied to measure a device's memory, many times what its caches hold.
_COPIED = {"cpu": 1 << 27, "cuda": 1 << 29}


def step_bytes(model: Qwen2VL, seen: float, rows: int = 1) -> float:
    """Bytes that a step of decoding reads at least: every weight of the decoder and the head once, but of routed
    experts those that one token meets, and the keys and values of ``seen`` tokens in each of ``rows`` rows; of a model
    that is split, what this rank holds of them."""
    text, itemsize = model.model.cache_config, model.head_weight.itemsize
    weights = sum(p.nbytes for p in (*model.model.layers.parameters(), *model.model.norm.parameters()))
    if (moe := text.moe) is not None:
        experts = [one for one in model.modules() if isinstance(one, (Experts, SeparateExperts, QuantExperts))]
        routed = sum(p.nbytes for one in experts for p in one.parameters())
        weights -= routed * (moe.num_experts - moe.num_experts_per_tok) // moe.num_experts
    cached = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * seen * rows * itemsize
    return weights + model.head_weight.nbytes + cached


def copy_rate(device: torch.device) -> float:
    """Bytes read plus written a second by a copy on ``device``: the best of five, after one to touch the memory."""
    size = _COPIED.get(device.type, 1 << 27)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for timed in range(6):
        begin = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if timed:
            best = min(best, time.perf_counter() - begin)
    return 2 * size / best


def decoding(model: Qwen2VL, result: GenerationResult) -> dict[str, Any]:
    """The speed of an answer's decoding: ``tokens_per_s`` of all rows, the ids that end them included, ``step_bytes``
    of a step at the middle of the answer, ``copy_bytes_per_s``, and ``share_of_copy``, in which 1 is a step that reads
    what it must as fast as a copy moves bytes. Empty where there was no step behind the first token."""
    steps, seconds = result.timings["decode_steps"], result.timings["decode"]
    if not steps or not seconds:
        return {}
    rows = len(result.sequences)
    needed = step_bytes(model, sum(result.prompt_tokens) / rows + steps / 2, rows)
    rate = copy_rate(model.device)
    return {
        "tokens_per_s": rows * steps / seconds,
        "step_bytes": round(needed),
        "copy_bytes_per_s": rate,
        "share_of_copy": needed * steps / seconds / rate,
    }
