"""A step of decoding: one layer of two released sizes, and one whose widths are no multiples of a tile."""

from __future__ import annotations

from functools import partial

import torch

from qwen2vl_kernels.core.launching import target_of
from qwen2vl_kernels.triton.attention_step import launch_step
from qwen2vl_kernels.triton.few_rows import launch_linear_add, launch_norm_linear, launch_norm_swiglu

from .compiler import Specimen, meta

_CAPACITY = 8192


def layer(rows: int, heads: int, kv_heads: int, inner: int, columns: int = 128, prefetch: bool = True) -> None:
    """The five launches of a layer of bfloat16. On AMD's cards the products are PyTorch's."""
    products = target_of(torch.device("meta")).backend == "cuda"
    width, kv_width, bf16 = heads * columns, kv_heads * columns, torch.bfloat16
    x, norm = meta(rows, width, dtype=bf16), meta(width, dtype=bf16)
    counts = (width, kv_width, kv_width)
    weights, biases = [meta(n, width, dtype=bf16) for n in counts], [meta(n, dtype=bf16) for n in counts]
    qkv = meta(rows, sum(counts), dtype=bf16)
    if products:
        qkv = launch_norm_linear(x, norm, weights, biases, 1e-6, prefetch)
    q, k, v = (part.unflatten(1, (-1, columns)) for part in qkv.split(counts, 1))
    cache, lengths = meta(rows, _CAPACITY, kv_heads, columns, dtype=bf16), meta(rows, dtype=torch.int32)
    positions, inv_freq = meta(rows, dtype=torch.int64), meta(columns // 2, dtype=torch.float32)
    arrived = meta(rows, kv_heads, dtype=torch.int32)
    out = launch_step(q, k, v, cache, cache, lengths, positions, inv_freq, arrived, columns**-0.5, prefetch)
    if not products:
        return
    launch_linear_add(x, out.flatten(1), meta(width, width, dtype=bf16), prefetch)
    gate, up = (meta(inner, width, dtype=bf16) for _ in range(2))
    h = launch_norm_swiglu(x, norm, gate, up, 1e-6, prefetch)
    launch_linear_add(x, h, meta(width, inner, dtype=bf16), prefetch)


SPECIMENS = (
    Specimen("step 2b", partial(layer, 1, 12, 2, 8960), wide=0.7, matrix=True),
    Specimen("step 7b", partial(layer, 8, 28, 4, 18_944), wide=0.7, matrix=True, further=True),
    Specimen("step 4/2x32", partial(layer, 1, 4, 2, 344, 32), matrix=True, further=True),
)
