"""What the adapter touches of vLLM 0.33, with its names and parameters and formulas of our own."""

from __future__ import annotations

import types
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from .modules import install


def install_vllm(monkeypatch: pytest.MonkeyPatch, version: str = "0.33.0", platform: str = "cpu") -> SimpleNamespace:
    """Put the fake into ``sys.modules``; returns its classes and its settings."""
    settings = SimpleNamespace(custom_ops=["none"])
    registry: dict[str, type] = {}

    class CustomOp(nn.Module):
        def __new__(cls, *args, **kwargs):
            return super().__new__(registry.get(cls.__name__, cls))

        def __init__(self):
            super().__init__()
            self._forward_method = self.forward_cpu if self.enabled() else self.forward_native

        @classmethod
        def enabled(cls):
            return "all" in settings.custom_ops

        @classmethod
        def register_oot(cls, _decorated_op_cls=None, name=None):
            def decorator(op_cls):
                assert name not in registry, f"Duplicate op name: {name}"
                op_cls.name = name
                registry[name] = op_cls
                return op_cls

            return decorator

        def forward(self, *args, **kwargs):
            return self._forward_method(*args, **kwargs)

        def forward_cpu(self, *args, **kwargs):
            return self.forward_native(*args, **kwargs)

    class QuickGELU(CustomOp):
        def forward_native(self, x):
            return x * torch.sigmoid(1.702 * x)

        def forward_cuda(self, x):
            raise AssertionError("needs a compiled op")

    class MMEncoderAttention(CustomOp):
        def __init__(self, num_heads, head_size, scale=None, num_kv_heads=None, prefix=""):
            super().__init__()
            self.num_heads, self.head_size, self.num_kv_heads = num_heads, head_size, num_kv_heads or num_heads
            self.scale, self.attn_backend = scale or head_size**-0.5, SimpleNamespace(name="TORCH_SDPA")
            self.seen = []

        @classmethod
        def enabled(cls):
            return True

        def forward_cpu(self, query, key, value, cu_seqlens=None, max_seqlen=None, sequence_lengths=None):
            self.seen.append((query, key, value))
            shape = query.shape
            q, k, v = (x.reshape(*x.shape[:2], -1, self.head_size) for x in (query, key, value))
            bounds = cu_seqlens.tolist() if cu_seqlens is not None else [0, shape[1]]
            out = torch.zeros_like(q)
            for a, b in zip(bounds, bounds[1:], strict=False):
                parts = (x[:, a:b].transpose(1, 2) for x in (q, k, v))
                out[:, a:b] = F.scaled_dot_product_attention(*parts, scale=self.scale).transpose(1, 2)
            return out.reshape(shape)

        def forward_cuda(self, query, key, value, cu_seqlens=None, max_seqlen=None, sequence_lengths=None):
            raise AssertionError("needs a device")

    class Linear(nn.Linear):
        def forward(self, x):
            return super().forward(x), None

    class Qwen2VisionAttention(nn.Module):
        """``tp_size`` ranks in one process: the gathered projection is the whole one."""

        def __init__(self, embed_dim, num_heads, tp_size=1, tp_rank=0):
            super().__init__()
            self.tp_size, self.tp_rank, self.heads, self.head_dim = tp_size, tp_rank, num_heads, embed_dim // num_heads
            self.qkv = Linear(embed_dim, 3 * embed_dim)
            self.proj = Linear(embed_dim // tp_size, embed_dim)
            self.attn = MMEncoderAttention(num_heads // tp_size, self.head_dim)

        def split_qkv(self, qkv):
            rows, batch, _ = qkv.shape
            mine = self.heads // self.tp_size
            parts = (x.chunk(self.tp_size, -1)[self.tp_rank] for x in qkv.chunk(3, dim=2))
            return tuple(x.view(rows, batch, mine, self.head_dim) for x in parts)

        def forward(self, x, cu_seqlens, rotary_pos_emb_cos, rotary_pos_emb_sin, max_seqlen=None):
            q, k, v = (t.transpose(0, 1) for t in self.split_qkv(self.qkv(x)[0]))
            cos, sin = (torch.cat((t, t), -1)[None, :, None] for t in (rotary_pos_emb_cos, rotary_pos_emb_sin))
            half = self.head_dim // 2
            q, k = (t * cos + torch.cat((-t[..., half:], t[..., :half]), -1) * sin for t in (q, k))
            out = self.attn(query=q, key=k, value=v, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
            return self.proj(out.transpose(0, 1).flatten(2).contiguous())[0]

    class MRotaryEmbedding(CustomOp):
        def __init__(self, head_size, cache, section, interleaved=False, is_neox_style=True):
            super().__init__()
            self.head_size, self.cos_sin_cache, self.is_neox_style = head_size, cache, is_neox_style
            self.mrope_section, self.mrope_interleaved = section, interleaved

        def _match_cos_sin_cache_dtype(self, query):
            return self.cos_sin_cache.to(query.dtype)

        def forward_native(self, positions, query, key=None, offsets=None):
            cos, sin = self.cos_sin_cache[positions].chunk(2, -1)  # (3, T, R/2)
            axes = torch.arange(3).repeat_interleave(torch.tensor(self.mrope_section))
            pick = lambda x: x.gather(0, axes.expand(1, *x.shape[1:]))[0] if x.ndim == 3 else x  # noqa: E731
            cos, sin = pick(cos)[:, None], pick(sin)[:, None]

            def turn(x):
                a, b = x.reshape(x.shape[0], -1, self.head_size).chunk(2, -1)
                return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).reshape(x.shape)

            return turn(query), turn(key)

        def forward_cuda(self, positions, query, key=None, offsets=None):
            raise AssertionError("needs a device")

    here = types.SimpleNamespace(
        CustomOp=CustomOp, QuickGELU=QuickGELU, MMEncoderAttention=MMEncoderAttention, registry=registry,
        Qwen2VisionAttention=Qwen2VisionAttention, MRotaryEmbedding=MRotaryEmbedding, settings=settings,
    )  # fmt: skip
    current = SimpleNamespace(
        device_type=platform, is_cpu=lambda: platform == "cpu", is_cuda_alike=lambda: platform == "cuda"
    )
    layers = "vllm.model_executor.layers"
    install(
        monkeypatch,
        {
            "vllm": {"__version__": version},
            "vllm.config": {"get_cached_compilation_config": lambda: settings},
            "vllm.platforms": {"current_platform": current},
            "vllm.model_executor.custom_op": {"CustomOp": CustomOp, "op_registry_oot": registry},
            "vllm.model_executor.models.qwen2_vl": {"Qwen2VisionAttention": Qwen2VisionAttention},
            f"{layers}.activation": {"QuickGELU": QuickGELU},
            f"{layers}.attention.mm_encoder_attention": {"MMEncoderAttention": MMEncoderAttention},
            f"{layers}.rotary_embedding.mrope": {"MRotaryEmbedding": MRotaryEmbedding},
        },
    )
    return here
