"""varlen_attention at the vision tower's head and at the language models', forward and backward."""

from __future__ import annotations

from functools import partial

import torch

from qwen2vl_kernels._attention import launch_backward, launch_forward

from .compiler import Specimen, label, meta

_TOKENS = 4100


def _attention(heads: int, kv_heads: int, columns: int, dtype: torch.dtype, causal: bool) -> None:
    q = meta(_TOKENS, heads, columns, dtype=dtype)
    k = v = meta(_TOKENS, kv_heads, columns, dtype=dtype)
    cu_seqlens = meta(65, dtype=torch.int32)
    out, lse = launch_forward(q, k, v, cu_seqlens, causal, columns**-0.5)
    launch_backward(q, q, k, v, out, lse, cu_seqlens, causal, columns**-0.5)


SPECIMENS = tuple(
    Specimen(
        f"attention {heads}/{kv_heads}x{columns} {label(dtype)}{' causal' * causal}",
        partial(_attention, heads, kv_heads, columns, dtype, causal),
    )
    for heads, kv_heads, columns, dtype, causal in (
        (16, 16, 80, torch.bfloat16, False),
        (16, 16, 80, torch.float16, False),
        (16, 16, 72, torch.bfloat16, False),
        (16, 16, 64, torch.bfloat16, False),
        (28, 4, 128, torch.bfloat16, True),
    )
)
