"""Methods that take the place of those of transformers' language models of Qwen2-VL, Qwen2.5-VL and Qwen3-VL.

As in :mod:`.transformers_vision`, each ``make`` takes stock's function and returns one with its parameters.

M-RoPE has two targets. The rotary embedding hands the layers ``(positions (3, B, L), inv_freq)`` instead of cosines and
sines, and the attention rotates by them in place: no tables are built or read. An attention that is given tables, by
code that makes its own, runs as stock's does.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch

from ..ops.mrope import mrope, mrope_
from ..ops.rms_norm import rms_norm
from ..ops.swiglu import swiglu, swiglu_
from ._modules import owned, parameters_after, plain, project, same_dtype, with_idle_rows


def angles(stock: Callable) -> Callable:
    """``forward`` of the rotary embedding: ``(positions, inv_freq)``, unless it is scaled (YaRN and its kind)."""

    @wraps(stock)
    def forward(self: Any, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.rope_type != "default" or self.attention_scaling != 1:
            return stock(self, x, position_ids)
        if position_ids.ndim == 2:
            position_ids = position_ids[None]
        return position_ids.expand(3, -1, -1).to(x.device), self.inv_freq.to(x.device, torch.float32)

    return forward


#: What the cache is called: from 5.24 on, until then, and until 4.57. The old names stay keywords for a while.
_CACHES = ("cache", "past_key_values", "past_key_value")


def attention(stock: Callable, *, interleaved: bool) -> Callable:
    """``forward`` of the attention. Masks, cache and the attention itself are transformers'."""
    names, own_globals = parameters_after(stock, 2), inspect.unwrap(stock).__globals__
    functions, eager = own_globals["ALL_ATTENTION_FUNCTIONS"], own_globals["eager_attention_forward"]

    def interface(name: str) -> Callable:
        if hasattr(functions, "get_interface"):
            return functions.get_interface(name, eager)
        return eager if name == "eager" else functions[name]  # 4.57

    @wraps(stock)
    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, Any]:
        given = dict(zip(names, args, strict=False)) | kwargs
        positions, inv_freq = given["position_embeddings"]
        if positions.is_floating_point():
            return stock(self, hidden_states, **given)
        batch, length = hidden_states.shape[:2]
        tokens, rows = batch * length, with_idle_rows(hidden_states)
        q, k, v = (
            project(proj, rows).unflatten(-1, (-1, self.head_dim))[:tokens]  # (T, H, D)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        makers = (self.q_proj, self.k_proj)
        if hasattr(self, "q_norm"):
            q, k, makers = self.q_norm(q), self.k_norm(k), (self.q_norm, self.k_norm)
        rotate = mrope_ if owned(q, makers[0]) and owned(k, makers[1]) else mrope
        q, k = rotate(q, k, positions.flatten(1), inv_freq, _section(self.config), interleaved=interleaved)
        q, k, v = (x.unflatten(0, (batch, length)).transpose(1, 2) for x in (q, k, v))  # (B, H, L, D)

        extra = {name: value for name, value in given.items() if name not in names}
        cache = next((found for name in _CACHES if (found := extra.pop(name, given.get(name))) is not None), None)
        if cache is not None:
            where = ({"cache_position": given.get("cache_position")},) if "cache_position" in names else ()
            k, v = cache.update(k, v, self.layer_idx, *where, **({"kwargs": extra} if "cache" in names else {}))
        if hasattr(self, "sliding_window"):
            extra |= {"sliding_window": self.sliding_window, "position_ids": given.get("position_ids")}
        out, weights = interface(self.config._attn_implementation)(
            self, q, k, v, given.get("attention_mask"),
            dropout=self.attention_dropout if self.training else 0.0, scaling=self.scaling, **extra,
        )  # fmt: skip
        out = project(self.o_proj, with_idle_rows(out.reshape(batch, length, -1)))
        return out[:tokens].unflatten(0, (batch, length)), weights

    return forward


attention_in_order = partial(attention, interleaved=False)
attention_interleaved = partial(attention, interleaved=True)


def _section(config: Any) -> list[int]:
    """Pairs an axis; both names of the settings, 5.x's first."""
    rope = getattr(config, "rope_parameters", None) or config.rope_scaling
    return list(rope["mrope_section"])


def norm(stock: Callable) -> Callable:
    """``forward`` of an RMSNorm, of either tower."""

    @wraps(stock)
    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        if not same_dtype(hidden_states, self.weight):
            return stock(self, hidden_states)
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)

    return forward


def mlp(stock: Callable) -> Callable:
    """``forward`` of a gated MLP, of either tower, where its activation is SiLU."""

    @wraps(stock)
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        if type(self.act_fn).__name__ not in ("SiLU", "SiLUActivation") or not plain(self.act_fn):
            return stock(self, x)
        rows, tokens = with_idle_rows(x), x.shape[:-1].numel()
        gate, up = project(self.gate_proj, rows), project(self.up_proj, rows)
        mine = owned(gate, self.gate_proj) and owned(up, self.up_proj)
        h = swiglu_(gate, up) if mine else swiglu(gate, up)
        return project(self.down_proj, h)[:tokens].unflatten(0, x.shape[:-1])

    return forward
