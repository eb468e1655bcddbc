"""The language model: Qwen2 with multimodal rotary positions, run on packed sequences without padding."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from qwen2vl_kernels import (
    TilePlan,
    append_kv,
    decode_attention_,
    kvcache_attention,
    linear_add_,
    mrope,
    mrope_,
    plan_tiles,
    rms_norm_linear,
    rms_norm_swiglu,
    varlen_attention,
)
from qwen2vl_kernels.core.backends import resolve
from qwen2vl_kernels.ops.decode_attention import fused
from qwen2vl_kernels.triton.few_rows import MAX_ROWS

from .cache import KVCache
from .config import TextConfig
from .layers import MLP, Embedding, Linear, RMSNorm, idle_rows, inverse_frequencies, length_bound, untouched
from .moe import SparseMoE


class Pack:
    """What every layer needs to know about the packed tokens of one call.

    ``positions (3, T)``; ``inv_freq (D/2,)`` float32; ``counts``: tokens of each sequence; ``cu_seqlens (B + 1,)``
    int32, their bounds. With a cache, ``slots (T,)`` says where the tokens' keys go (nowhere, where negative), and
    ``totals`` how many tokens each sequence then has; a step of one token a sequence has them as ``seqlens (B,)`` int32
    on the device too, or alone where nothing is read on the host. ``tiles``: the bounds' plan for the attention's
    kernels, made by the decoder.

    It is no dataclass on purpose: FSDP casts the tensors of those that a layer is called with to the dtype of its
    parameters, and frequencies in 16 bits turn far tokens by wrong angles.
    """

    def __init__(
        self,
        positions: torch.Tensor,
        inv_freq: torch.Tensor,
        counts: list[int],
        cu_seqlens: torch.Tensor,
        cache: KVCache | None = None,
        slots: torch.Tensor | None = None,
        totals: list[int] | None = None,
        tiles: TilePlan | None = None,
        seqlens: torch.Tensor | None = None,
    ) -> None:
        self.positions, self.inv_freq, self.counts, self.cu_seqlens = positions, inv_freq, counts, cu_seqlens
        self.cache, self.slots, self.totals, self.tiles = cache, slots, totals, tiles
        self.seqlens = seqlens
        # One number for the layers to read: compiled for the list of counts, they would be compiled for each pack.
        self.max_seqlen = length_bound(counts)

    def padded(self, idle: int) -> Pack:
        """The same with rows appended that nothing attends to and no cache keeps."""
        slots = None if self.slots is None else F.pad(self.slots, (0, idle), value=-1)
        given = (self.counts, self.cu_seqlens, self.cache, slots, self.totals)
        return Pack(F.pad(self.positions, (0, idle)), self.inv_freq, *given)

    @property
    def resumed(self) -> bool:
        """Whether some sequence had tokens before these."""
        return self.seqlens is not None or (self.totals is not None and self.totals != self.counts)


def _place(cache: KVCache, seqlens: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What decode_attention_ takes behind the caches."""
    return seqlens, cache.next_position, cache.inv_freq, cache.arrived


class Attention(nn.Module):
    """Causal grouped-query attention with M-RoPE."""

    def __init__(self, config: TextConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.section = config.mrope_section
        width, kv_width = config.hidden_size, config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(width, width)
        self.k_proj = Linear(width, kv_width)
        self.v_proj = Linear(width, kv_width)
        self.o_proj = Linear(width, width, bias=False)

    def appends(self, x: torch.Tensor) -> bool:
        """Whether one launch rotates, stores and attends in a step: where it comes first and has a form."""
        heads, kv_heads = self.q_proj.out_features // self.head_dim, self.k_proj.out_features // self.head_dim
        return not torch.is_grad_enabled() and fused(x.device.type, x.dtype, heads, kv_heads, self.head_dim)

    def forward(self, x: torch.Tensor, pack: Pack) -> torch.Tensor:
        heads = (-1, self.head_dim)
        q, k, v = (proj(x).unflatten(-1, heads) for proj in (self.q_proj, self.k_proj, self.v_proj))  # (T, H, D)
        cache, angles = pack.cache, {"positions": pack.positions, "inv_freq": pack.inv_freq, "section": self.section}
        appends = pack.seqlens is not None and self.appends(x)
        if appends:
            pass  # the attention rotates and stores on its way
        elif q.requires_grad or k.requires_grad or v.requires_grad:
            if pack.resumed:
                raise ValueError("tokens in a cache get no gradients: call the model under torch.no_grad()")
            q, k = mrope(q, k, **angles)
            if cache is not None and pack.slots is not None:
                append_kv(k.detach(), v.detach(), *cache.layers[self.layer], pack.slots)
        elif cache is not None and pack.slots is not None:
            # The attention of a prefill reads k itself.
            append_kv(k, v, *cache.layers[self.layer], pack.slots, q=q, overwrite_k=not pack.resumed, **angles)
        else:
            q, k = mrope_(q, k, **angles)
        if cache is not None and pack.seqlens is not None and appends:
            out = decode_attention_(q, k, v, *cache.layers[self.layer], *_place(cache, pack.seqlens))
        elif cache is not None and pack.totals is not None and pack.resumed:
            out = kvcache_attention(q, *cache.layers[self.layer], pack.counts, pack.totals)
        elif cache is not None and pack.seqlens is not None:
            out = kvcache_attention(q, *cache.layers[self.layer], None, pack.seqlens)
        else:
            out = varlen_attention(q, k, v, pack.cu_seqlens, pack.max_seqlen, causal=True, tiles=pack.tiles)
        return self.o_proj(out.flatten(1))


class Layer(nn.Module):
    """Pre-norm decoder layer, dense or with experts. The MLP's output stays unadded until the next norm, which adds and
    normalises."""

    def __init__(self, config: TextConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        width, moe = config.hidden_size, config.experts(layer)
        self.mlp = MLP(width, config.intermediate_size) if moe is None else SparseMoE(width, moe)

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None, pack: Pack
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The unadded output, what it is to be added to, and its router's logits ``(T, E)``, if it has experts."""
        x, total = self.input_layernorm(x, residual)
        x, total = self.post_attention_layernorm(self.self_attn(x, pack), total)
        x, logits = self.mlp(x) if isinstance(self.mlp, SparseMoE) else (self.mlp(x), None)
        return x, total, logits

    def step(self, x: torch.Tensor, cache: KVCache, seqlens: torch.Tensor) -> None:
        """One token of each row, in place in ``x (B, C)``, the residual stream, by five launches that read ahead; of a
        dense layer."""
        assert isinstance(self.mlp, MLP)
        attention, mlp, norm = self.self_attn, self.mlp, self.input_layernorm
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        weights, biases = [one.weight for one in projections], [one.bias for one in projections]
        qkv = rms_norm_linear(x, norm.weight, weights, biases, eps=norm.eps, prefetch=True)
        heads = (-1, attention.head_dim)
        q, k, v = (part.unflatten(1, heads) for part in qkv.split([one.shape[0] for one in weights], 1))
        out = decode_attention_(q, k, v, *cache.layers[attention.layer], *_place(cache, seqlens), prefetch=True)
        linear_add_(x, out.flatten(1), attention.o_proj.weight, prefetch=True)
        norm = self.post_attention_layernorm
        h = rms_norm_swiglu(x, norm.weight, mlp.gate_proj.weight, mlp.up_proj.weight, eps=norm.eps, prefetch=True)
        linear_add_(x, h, mlp.down_proj.weight, prefetch=True)


class Decoder(nn.Module):
    """Embeddings, layers and the final norm; the head belongs to the whole model."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def inv_freq(self, device: torch.device) -> torch.Tensor:
        """What :class:`Pack` holds, see :func:`qwen2vl.layers.inverse_frequencies`."""
        return inverse_frequencies(self.config, device)

    @property
    def cache_config(self) -> TextConfig:
        """What a :class:`KVCache` is made by: with the key-value heads that this process holds of the model's."""
        held = cast(Layer, self.layers[0]).self_attn.k_proj.out_features
        return replace(self.config, num_key_value_heads=held // self.config.head_dim)

    def steps(self, x: torch.Tensor) -> bool:
        """Whether :meth:`step` serves rows ``x (B, C)``: few of them, where its kernels come first, and nobody has put
        anything of theirs in a layer's place, nor another process holds a part of it."""
        kernels = ("rms_norm_linear", "linear_add", "rms_norm_swiglu")
        fits = x.dtype == torch.bfloat16 and x.shape[0] <= MAX_ROWS and not torch.is_grad_enabled()
        fits = fits and self.config.moe is None
        fits = fits and all(cast(Layer, layer).self_attn.appends(x) for layer in self.layers)
        return fits and all(resolve(op, x.device.type, None) != "eager" for op in kernels) and untouched(self, _PARTS)

    def step(self, x: torch.Tensor, cache: KVCache, seqlens: torch.Tensor) -> None:
        """One token of each row, ``x (B, C)`` its embedding, which becomes the last layer's sum, not normed yet.

        ``seqlens (B,)`` int32: tokens in each row of the cache with the new one.
        """
        for layer in self.layers:
            cast(Layer, layer).step(x, cache, seqlens)

    def forward(
        self, embeddings: torch.Tensor, pack: Pack, router_logits: list[torch.Tensor] | None = None
    ) -> torch.Tensor:
        """``(T, C)`` packed embeddings to ``(T, C)`` normed hidden states; ``router_logits`` gets ``(T, E)`` of each
        layer with experts."""
        x, residual, tokens = embeddings, None, embeddings.shape[0]
        if not pack.resumed and (idle := idle_rows(x)):
            x, pack = F.pad(x, (0, 0, 0, idle)), pack.padded(idle)
        if not pack.resumed:
            pack.tiles = plan_tiles(pack.cu_seqlens, x.shape[0], device=x.device)
        for layer in self.layers:
            x, residual, logits = layer(x, residual, pack)
            if router_logits is not None and logits is not None:
                router_logits.append(logits[:tokens])
        x, _ = self.norm(x, residual)
        return x if x.shape[0] == tokens else x[:tokens]


#: What :meth:`Decoder.step` computes without calling it.
_PARTS = (Decoder, nn.ModuleList, Layer, Attention, MLP, RMSNorm, Linear, Embedding)
