"""What takes the place of vLLM's layers; :mod:`.vllm` says where and when.

Each function is given the stock function and returns the replacement, or the class that goes into vLLM's registry.
"""

from __future__ import annotations

from typing import Any

import torch

from ..core.backends import forced
from ..ops.mrope import mrope_
from ..ops.quick_gelu import quick_gelu
from ..ops.varlen_attention import varlen_attention
from ..ops.vision_rope import vision_rope_

#: vLLM's attention backends that read q and k through their strides, with boundaries in rows.
_STRIDED = ("FLASH_ATTN", "TORCH_SDPA", "TRITON_ATTN")


def _on_unless_refused(*names: str) -> bool:
    """Whether the user left these custom ops on. vLLM's default turns all off where it expects a compiler to fuse."""
    from vllm.config import get_cached_compilation_config  # type: ignore[import-not-found]

    return not {f"-{name}" for name in names} & set(get_cached_compilation_config().custom_ops)


def attention_forward(stock: Any) -> Any:
    def forward(
        self: Any,
        x: torch.Tensor,
        cu_seqlens: torch.Tensor,
        rotary_pos_emb_cos: torch.Tensor,
        rotary_pos_emb_sin: torch.Tensor,
        max_seqlen: Any = None,
    ) -> torch.Tensor:
        qkv, _ = self.qkv(x)  # (S, B, 3 * H * D), B = 1
        q, k, v = self.split_qkv(qkv)  # views (S, B, H, D) of it, or of what the ranks gathered
        for sequence in range(q.shape[1]):
            vision_rope_(q[:, sequence], k[:, sequence], rotary_pos_emb_cos, rotary_pos_emb_sin)
        q, k, v = (part.transpose(0, 1) for part in (q, k, v))  # (B, S, H, D)
        if self.attn.attn_backend.name not in _STRIDED:
            q, k = q.contiguous(), k.contiguous()
        out = self.attn(query=q, key=k, value=v, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
        out, _ = self.proj(out.transpose(0, 1).flatten(2).contiguous())
        return out

    return forward


def quick_gelu_class(stock: Any) -> Any:
    from vllm.model_executor.layers.activation import QuickGELU as Stock  # type: ignore[import-not-found]

    class QuickGELU(Stock):
        @classmethod
        def enabled(cls) -> bool:
            return _on_unless_refused("quick_gelu", "QuickGELU")

        def forward_cuda(self, x: torch.Tensor) -> torch.Tensor:
            return quick_gelu(x)

        forward_cpu = forward_cuda

    return QuickGELU


def encoder_attention_class(stock: Any) -> Any:
    from vllm.model_executor.layers.attention import mm_encoder_attention  # type: ignore[import-not-found]

    def attend(self, default, query, key, value, cu_seqlens, max_seqlen, sequence_lengths):
        batch, rows = query.shape[:2]
        # The other backends' boundaries count elements. Keys of another length are no self-attention.
        if self.attn_backend.name not in _STRIDED or key.shape[1] != rows:
            return default(query, key, value, cu_seqlens, max_seqlen, sequence_lengths)
        longest = 0  # not known: vLLM's backends that need no longest segment are given 0
        if cu_seqlens is None:
            cu_seqlens = torch.arange(0, (batch + 1) * rows, rows, dtype=torch.int32, device=query.device)
            longest = rows
        elif isinstance(max_seqlen, int):
            longest = max_seqlen
        elif max_seqlen is not None and max_seqlen.device.type == "cpu" and not torch.compiler.is_compiling():
            longest = int(max_seqlen)  # a compiler would have to break its graph here, which vLLM forbids
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        q, k, v = (x.reshape(batch * rows, n, self.head_size) for x, n in zip((query, key, value), heads, strict=True))
        # Ours takes any bound; others' kernels launch programs for it in every segment. A user's word goes first.
        unknown = query.is_cuda and not longest and forced("varlen_attention") is None
        backend = "triton" if unknown else None
        settings = {"softmax_scale": self.scale, "backend": backend}
        out = varlen_attention(q, k, v, cu_seqlens.int(), longest or batch * rows, **settings)
        return out.reshape(query.shape)

    class MMEncoderAttention(mm_encoder_attention.MMEncoderAttention):
        def forward_cuda(self, query, key, value, cu_seqlens=None, max_seqlen=None, sequence_lengths=None):
            return attend(self, super().forward_cuda, query, key, value, cu_seqlens, max_seqlen, sequence_lengths)

        def forward_cpu(self, query, key, value, cu_seqlens=None, max_seqlen=None, sequence_lengths=None):
            return attend(self, super().forward_cpu, query, key, value, cu_seqlens, max_seqlen, sequence_lengths)

    return MMEncoderAttention


def mrope_class(stock: Any) -> Any:
    from vllm.model_executor.layers.rotary_embedding import mrope  # type: ignore[import-not-found]

    def rotate(self, default, positions, query, key, offsets):
        if positions.ndim != 2 or key is None or offsets is not None or not self.is_neox_style:
            return default(positions, query, key, offsets)
        q, k = (x.unflatten(-1, (-1, self.head_size)) for x in (query, key))  # views, of the packed projection too
        cache = self._match_cos_sin_cache_dtype(query)
        section, interleaved = self.mrope_section, self.mrope_interleaved
        mrope_(q, k, positions, None, section, interleaved=interleaved, cos_sin_cache=cache)
        return query, key

    class MRotaryEmbedding(mrope.MRotaryEmbedding):
        @classmethod
        def enabled(cls) -> bool:
            return _on_unless_refused("rotary_embedding", "MRotaryEmbedding")

        def forward_cuda(self, positions, query, key=None, offsets=None):
            return rotate(self, super().forward_cuda, positions, query, key, offsets)

        forward_hip = forward_cuda

        def forward_cpu(self, positions, query, key=None, offsets=None):
            return rotate(self, super().forward_native, positions, query, key, offsets)

    return MRotaryEmbedding
