"""The attention of transformers' vision towers, in the manner of :mod:`.transformers_vision`."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from .._tiles import TilePlan, plan_tiles
from ..ops.varlen_attention import chosen, reads_host, varlen_attention
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
        backend = chosen(q, k, v, tokens)
        cu_seqlens, longest = bounds(given["cu_seqlens"], tokens, backend)
        tiles = _tiles(cu_seqlens, q, backend)
        out = varlen_attention(q, k, v, cu_seqlens, longest, softmax_scale=self.scaling, tiles=tiles)
        return project(self.proj, out.flatten(1))[:tokens]

    return forward


def bounds(cu_seqlens: torch.Tensor, tokens: int, backend: str) -> tuple[torch.Tensor, int]:
    """``cu_seqlens`` where the attention wants it, and a bound of the longest segment.

    Our kernel takes both as they are. Others' launch programs for as many rows in every segment, and do not know where
    the last one ends, so the boundaries are read. What was read is kept on the tensor, which all layers share: one wait
    for the device a forward instead of one a layer.
    """
    cu_seqlens = cu_seqlens if cu_seqlens.dtype == torch.int32 else cu_seqlens.int()
    unread = cu_seqlens.device.type == "cpu" or torch.compiler.is_compiling() or backend == "triton"
    if unread or (cu_seqlens.is_cuda and torch.cuda.is_current_stream_capturing()):
        return cu_seqlens, tokens
    version, copy = getattr(cu_seqlens, "_on_host", (None, None))
    if copy is None or version != _version(cu_seqlens):
        copy = cu_seqlens.cpu()
        cu_seqlens._on_host = (_version(cu_seqlens), copy)  # type: ignore[attr-defined]
    return copy, max(copy.diff().tolist(), default=0)


def _version(tensor: torch.Tensor) -> int:
    """Inference tensors have none; their model makes them anew for every forward."""
    return 0 if tensor.is_inference() else tensor._version


def _tiles(cu_seqlens: torch.Tensor, q: torch.Tensor, backend: str) -> TilePlan | None:
    """The plan of inference tensors, which all layers share, as their model makes them anew for every forward.

    Of ordinary tensors the op keeps plans itself, as long as they are not written to; of these nobody can tell.
    """
    if torch.compiler.is_compiling() or not cu_seqlens.is_inference() or reads_host(backend):
        return None
    plan = getattr(cu_seqlens, "_tiles", None)
    if plan is None or plan.total != q.shape[0] or plan.device != q.device:
        plan = cu_seqlens._tiles = plan_tiles(cu_seqlens, q.shape[0], device=q.device)  # type: ignore[attr-defined]
    return plan


def _halves(*tables: torch.Tensor) -> list[torch.Tensor]:
    """The first half of the columns, which stock repeats."""
    return [table[:, : table.shape[-1] // 2] for table in tables]
