"""The attention of transformers' vision towers, in the manner of :mod:`.transformers_vision`."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from .._backend import resolve
from .._tiles import TilePlan, plan_tiles
from ..ops.varlen_attention import varlen_attention
from ..ops.vision_rope import vision_rope, vision_rope_qkv_
from ._modules import owned, parameters_after, project, with_idle_rows


def rope(stock: Callable) -> Callable:
    """``apply_rotary_pos_emb_vision`` on ``q, k (T, H, D)`` and tables ``(T, D)`` whose halves are equal."""

    @wraps(stock)
    def apply_rotary_pos_emb_vision(q, k, cos, sin):
        if q.ndim != 3 or cos.ndim != 2:
            return stock(q, k, cos, sin)
        return vision_rope(q, k, *_halves(cos, sin))

    return apply_rotary_pos_emb_vision


def attention(stock: Callable) -> Callable:
    """``forward`` of the attention: one call over all segments, and 2D rotary embedding of the packed projection."""
    names = parameters_after(stock, 2)

    @wraps(stock)
    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        given = dict(zip(names, args, strict=False)) | kwargs
        tokens, rows = hidden_states.shape[0], with_idle_rows(hidden_states)
        qkv = project(self.qkv, rows).unflatten(-1, (3, self.num_heads, -1))  # (T, 3, H, D)
        tables = _halves(*given["position_embeddings"])
        if owned(qkv, self.qkv):
            vision_rope_qkv_(qkv[:tokens], *tables)
            q, k, v = qkv.unbind(1)
        else:
            q, k, v = qkv[:tokens].unbind(1)
            q, k = vision_rope(q, k, *tables)
        cu_seqlens, longest = bounds(given["cu_seqlens"]), q.shape[0]
        tiles = _tiles(cu_seqlens, q)
        out = varlen_attention(q, k, v, cu_seqlens, longest, softmax_scale=self.scaling, tiles=tiles)
        return project(self.proj, out.flatten(1))[:tokens]

    return forward


def bounds(cu_seqlens: torch.Tensor) -> torch.Tensor:
    """``cu_seqlens`` where the attention reads it: on the device if its kernel does, else on the host.

    The copy is kept on the tensor, which all layers share: one wait for the device a forward instead of one a layer.
    """
    cu_seqlens = cu_seqlens if cu_seqlens.dtype == torch.int32 else cu_seqlens.int()
    if cu_seqlens.device.type == "cpu" or torch.compiler.is_compiling():
        return cu_seqlens
    if resolve("varlen_attention", cu_seqlens.device.type, None) == "triton":
        return cu_seqlens
    version, copy = getattr(cu_seqlens, "_on_host", (None, None))
    if copy is None or version != cu_seqlens._version:
        copy = cu_seqlens.cpu()
        cu_seqlens._on_host = (cu_seqlens._version, copy)  # type: ignore[attr-defined]
    return copy


def _tiles(cu_seqlens: torch.Tensor, q: torch.Tensor) -> TilePlan | None:
    """The plan of inference tensors, which all layers share, as their model makes them anew for every forward.

    Of ordinary tensors the op keeps plans itself, as long as they are not written to; of these nobody can tell.
    """
    if torch.compiler.is_compiling() or not cu_seqlens.is_inference():
        return None
    if resolve("varlen_attention", q.device.type, None) != "triton":
        return None
    plan = getattr(cu_seqlens, "_tiles", None)
    if plan is None or plan.total != q.shape[0] or plan.device != q.device:
        plan = cu_seqlens._tiles = plan_tiles(cu_seqlens, q.shape[0], device=q.device)  # type: ignore[attr-defined]
    return plan


def _halves(*tables: torch.Tensor) -> list[torch.Tensor]:
    """The first half of the columns, which stock repeats."""
    return [table[:, : table.shape[-1] // 2] for table in tables]
