"""The token merger: LayerNorm, 2x2 gather and two matrix products with GELU between them, as the tower ends."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from qwen2vl_kernels import patch_merge

from ..case import Case, Context, Workload
from ._ops import Op, random, token_counts


def workloads(context: Context) -> Iterator[Workload]:
    for tokens in token_counts(context):
        for hidden in (96,) if context.quick else (1536, 3584):
            yield from _merge(context, tokens, hidden)


def _formula(x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias) -> torch.Tensor:
    """transformers' PatchMerger."""
    h = F.layer_norm(x, (x.shape[-1],), norm_weight, norm_bias, 1e-6).view(-1, fc1_weight.shape[1])
    return F.linear(F.gelu(F.linear(h, fc1_weight, fc1_bias)), fc2_weight, fc2_bias)


def _merge(context: Context, tokens: int, hidden: int) -> Iterator[Workload]:
    # The tower's width, or one that a CPU without instructions for bf16 multiplies in a moment.
    channels = 80 if context.quick else 1280
    wide = 4 * channels
    inputs = [
        random(context, tokens, channels),
        random(context, channels, seed=1),
        random(context, channels, seed=2),
        random(context, wide, wide, seed=3, scale=wide**-0.5),
        random(context, wide, seed=4),
        random(context, hidden, wide, seed=5, scale=wide**-0.5),
        random(context, hidden, seed=6),
    ]
    merged = tokens // 4
    flops = 2 * merged * wide * (wide + hidden)
    moved = sum(x.nbytes for x in inputs) + 2 * merged * hidden
    op = Op(context, _formula, patch_merge, inputs)
    name = f"patch_merge {channels} to {hidden}"
    yield op.forward(name, tokens, bytes=moved, flops=flops)
    yield op.backward(name, tokens, bytes=2 * moved, flops=2 * flops)


CASE = Case("merge", "The 2x2 token merger, forward and backward", workloads)
