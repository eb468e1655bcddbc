"""What SGLang's hooks and its table of vision attention backends are given; :mod:`.sglang` says where and when."""

from __future__ import annotations

from typing import Any

import torch

from ..core.backends import forced
from ..ops.quick_gelu import quick_gelu
from ..ops.varlen_attention import varlen_attention
from ..ops.vision_rope import vision_rope

#: The name of our attention among SGLang's vision backends.
BACKEND = "qwen2vl"
_LARGEST_HEAD = 256  # of what the Triton kernel of ``varlen_attention`` is chosen for


def vision_rope_around(stock: Any) -> Any:
    def around(original: Any, q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Any:
        """A vision tower's call: packed rows, and tables as wide as a head. Language models make others."""
        packed = unsqueeze_dim == 1 and q.ndim == k.ndim == 3 and cos.ndim == 2 and cos.shape[-1] == q.shape[-1]
        if not packed or cos.shape[0] != q.shape[0]:
            return original(q, k, cos, sin, unsqueeze_dim)
        pairs = cos.shape[-1] // 2  # the tables hold every pair twice
        return vision_rope(q, k, cos[:, :pairs], sin[:, :pairs])

    return around


def quick_gelu_forward(stock: Any) -> Any:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return quick_gelu(x)

    return forward


def attention_class(stock: Any) -> Any:
    from sglang.srt.layers.attention import vision  # type: ignore[import-not-found]

    class VisionVarlenAttention(torch.nn.Module):
        """Takes what ``VisionTritonAttention`` takes; also the list that the tower's CUDA graphs pass."""

        def __init__(self, **kwargs: Any) -> None:
            super().__init__()

        def forward(self, q, k, v, cu_seqlens, bsz, seq_len, softmax_scale=None, forward_metadata=None, **kwargs):
            if kwargs.get("s_aux") is not None or tuple(kwargs.get("window_size", (-1, -1))) != (-1, -1):
                raise ValueError(f"{BACKEND}: this attention has no windows or sinks; set --mm-attention-backend")
            if forward_metadata is not None:
                cu_seqlens = forward_metadata.cu_seqlens
            elif isinstance(cu_seqlens, list):
                cu_seqlens = cu_seqlens[0]
            else:
                cu_seqlens = vision.resolve_seqlens(cu_seqlens, bsz, seq_len, device=q.device)
            # The longest segment is not known without waiting for the device; all rows are a bound, for which others'
            # kernels would launch programs in every segment. A user's word goes first.
            backend = "triton" if q.is_cuda and forced("varlen_attention") is None else None
            out = varlen_attention(q, k, v, cu_seqlens.int(), q.shape[0], softmax_scale=softmax_scale, backend=backend)
            if (prepared := kwargs.get("output_ws")) is None:
                return out
            return prepared.copy_(out)

    return VisionVarlenAttention


def choose_attention(stock: Any) -> Any:
    def choose(chosen: str, self: Any, passed_backend: str | None) -> str:
        """SGLang's choice, or ours where that is its Triton kernel by default and it would pad the heads."""
        from sglang.srt.runtime_context import get_mm  # type: ignore[import-not-found]

        padded = self.head_size & (self.head_size - 1) != 0 and self.head_size <= _LARGEST_HEAD
        by_default = passed_backend is None and get_mm().mm_attention_backend is None
        return BACKEND if chosen == "triton_attn" and padded and by_default else chosen

    return choose
