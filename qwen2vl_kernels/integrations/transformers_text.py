"""Methods that take the place of those of transformers' language models of Qwen2-VL, Qwen2.5-VL and Qwen3-VL.

As in :mod:`.transformers_vision`, each ``make`` takes stock's function and returns one with its parameters.

M-RoPE has two targets. The rotary embedding answers with a :class:`~.transformers_rotation.Rotation`, which is stock's
``(cos, sin)`` to whoever reads them; the attention takes positions and frequencies out of it and rotates by them in
place. An attention that is given tables runs as stock's does, and so does a step of decoding on a CPU.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from ..ops.mrope import mrope, mrope_
from ..ops.rms_norm import rms_norm
from ..ops.swiglu import swiglu, swiglu_
from ._modules import (
    Part,
    in_place_of,
    of_transformers,
    owned,
    parameters_after,
    project,
    same_dtype,
    step_on_cpu,
    unhooked,
    with_idle_rows,
    without_idle_rows,
)  # fmt: skip
from .transformers_rotation import Rotation

#: Names of the norms of language models, which 4.57's towers share.
RMS_NORMS = ("Qwen2RMSNorm", "Qwen2VLRMSNorm", "Qwen2_5_VLRMSNorm", "Qwen3VLTextRMSNorm")


def angles(stock: Callable) -> Callable:
    """``forward`` of the rotary embedding, unless it is scaled (YaRN and its kind) or hooked."""

    @in_place_of(stock)
    def forward(self: Any, x: torch.Tensor, position_ids: torch.Tensor) -> Any:
        if self.rope_type != "default" or self.attention_scaling != 1 or not unhooked(self):
            return stock(self, x, position_ids)
        return Rotation.of(partial(stock, self), self.inv_freq, _section(self), x, position_ids)

    return forward


def _section(rotary: Any) -> list[int] | None:
    """Pairs an axis; of 4.57 from the settings."""
    found = getattr(rotary, "mrope_section", None) or (rotary.config.rope_scaling or {}).get("mrope_section")
    return None if found is None else list(found)


#: What the cache is called: from 5.24 on, until then, and until 4.57. The old names stay keywords for a while.
_CACHES = ("cache", "past_key_values", "past_key_value")


def attention(stock: Callable, *, interleaved: bool) -> Callable:
    """``forward`` of the attention. Masks, cache and the attention itself are transformers'."""
    names, own_globals = parameters_after(stock, 2), inspect.unwrap(stock).__globals__
    norms = of_transformers(stock, *RMS_NORMS)
    functions, eager = own_globals["ALL_ATTENTION_FUNCTIONS"], own_globals["eager_attention_forward"]

    def interface(name: str) -> Callable:
        if hasattr(functions, "get_interface"):
            return functions.get_interface(name, eager)
        return eager if name == "eager" else functions[name]  # 4.57

    @in_place_of(stock)
    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, Any]:
        given = dict(zip(names, args, strict=False)) | kwargs
        rotation: Any = given.get("position_embeddings")
        section = rotation.section(interleaved) if isinstance(rotation, Rotation) else None
        if section is None or step_on_cpu(hidden_states):
            return stock(self, hidden_states, **given)
        projections = (self.q_proj, self.k_proj, self.v_proj)
        rows = with_idle_rows(hidden_states, *projections)
        q, k, v = (
            without_idle_rows(project(proj, rows), hidden_states).unflatten(-1, (-1, self.head_dim))
            for proj in projections
        )  # (B, L, H, D)
        mine = owned(q, self.q_proj) and owned(k, self.k_proj)
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
            mine = owned(q, self.q_norm, *norms) and owned(k, self.k_norm, *norms)
        rotate = mrope_ if mine else mrope
        leading, (positions, inv_freq) = hidden_states.shape[:-1], rotation.of_rows(q)
        q, k = rotate(q.flatten(0, 1), k.flatten(0, 1), positions, inv_freq, section, interleaved=interleaved)
        q, k, v = q.unflatten(0, leading).transpose(1, 2), k.unflatten(0, leading).transpose(1, 2), v.transpose(1, 2)

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
        out = out.reshape(*leading, -1)
        return without_idle_rows(project(self.o_proj, with_idle_rows(out, self.o_proj)), out), weights

    return forward


attention_in_order = partial(attention, interleaved=False)
attention_interleaved = partial(attention, interleaved=True)


def norm(stock: Callable) -> Callable:
    """``forward`` of an RMSNorm, of either tower."""

    @in_place_of(stock)
    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        if step_on_cpu(hidden_states) or not same_dtype(hidden_states, self.weight):
            return stock(self, hidden_states)
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)

    return forward


def mlp(stock: Callable) -> Callable:
    """``forward`` of a gated MLP, of either tower, where its activation is SiLU."""
    from transformers import activations

    silu = (nn.SiLU, getattr(activations, "SiLUActivation", nn.SiLU))

    def parts(self: Any) -> list[Part]:
        return [("act_fn", self.act_fn, silu)]

    @in_place_of(stock, parts)
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        if step_on_cpu(x):
            return stock(self, x)
        rows = with_idle_rows(x, self.gate_proj, self.up_proj, self.down_proj)
        gate, up = project(self.gate_proj, rows), project(self.up_proj, rows)
        mine = owned(gate, self.gate_proj) and owned(up, self.up_proj)
        h = swiglu_(gate, up) if mine else swiglu(gate, up)
        return without_idle_rows(project(self.down_proj, h), x)

    return forward
