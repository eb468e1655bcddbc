"""The attention of transformers' vision towers, in the manner of :mod:`.transformers_vision`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..core.attention_choice import OURS, by_max_seqlen, chosen, reads_host
from ..core.backends import BackendError, forced
from ..core.tile_plan import TilePlan, plan_tiles
from ..ops.varlen_attention import varlen_attention
from ..ops.vision_rope import vision_rope, vision_rope_qkv_
from ._modules import in_place_of, owned, parameters_after, project, with_idle_rows, without_idle_rows


def rope(stock: Callable) -> Callable:
    """``apply_rotary_pos_emb_vision`` on ``q, k (T, H, D)`` and tables ``(T, D)`` whose halves are equal."""

    @in_place_of(stock)
    def apply_rotary_pos_emb_vision(q, k, cos, sin):
        if q.ndim != 3 or cos.ndim != 2:
            return stock(q, k, cos, sin)
        return vision_rope(q, k, *_halves(cos, sin))

    return apply_rotary_pos_emb_vision


def attention(stock: Callable) -> Callable:
    """``forward`` of the attention: one call over all segments, and 2D rotary embedding of the packed projection."""
    names = parameters_after(stock, 2)

    @in_place_of(stock)
    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        given = dict(zip(names, args, strict=False)) | kwargs
        tokens, rows = hidden_states.shape[0], with_idle_rows(hidden_states, self.qkv, self.proj)
        qkv = project(self.qkv, rows).unflatten(-1, (3, self.num_heads, -1))  # (T, 3, H, D)
        tables = _halves(*given["position_embeddings"])
        if owned(qkv, self.qkv):
            vision_rope_qkv_(qkv[:tokens], *tables)
            q, k, v = qkv.unbind(1)
        else:
            q, k, v = qkv[:tokens].unbind(1)
            q, k = vision_rope(q, k, *tables)
        shared = _shared(given["cu_seqlens"], self)
        cu_seqlens, longest, backend = bounds(shared, given["cu_seqlens"], given.get("max_seqlen"), q, k, v)
        tiles = _tiles(shared, cu_seqlens, longest, backend, q, k, v)
        settings = {"softmax_scale": self.scaling, "tiles": tiles, "backend": backend}
        out = varlen_attention(q, k, v, cu_seqlens, longest, **settings)
        return without_idle_rows(project(self.proj, out.flatten(1)), hidden_states)

    return forward


def bounds(
    shared: dict[str, Any],
    cu_seqlens: torch.Tensor,
    max_seqlen: object,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
) -> tuple[torch.Tensor, int, str | None]:
    """``cu_seqlens`` where the attention wants it, a bound of the longest segment, and the backend if not the default.

    Our kernels take any bound, all rows too. Others' launch programs for as many rows in every segment: where
    transformers does not say it (it does where FlashAttention is configured), the boundaries are read, once a forward,
    as all layers share what was read. A compiler and a capture cannot wait for that. Then ours runs without gradients,
    as no table can tell which of them is faster; with them, where ours was measured 2.1 times slower, the default does.
    """
    cu_seqlens = cu_seqlens if cu_seqlens.dtype == torch.int32 else cu_seqlens.int()
    tokens, segments = q.shape[0], cu_seqlens.shape[0] - 1
    if isinstance(max_seqlen, int) and max_seqlen > 0:
        return cu_seqlens, max_seqlen, None
    if segments == 1 or not q.is_cuda or forced("varlen_attention") in OURS:
        return cu_seqlens, tokens, None
    compiled = torch.compiler.is_compiling()
    if compiled or (cu_seqlens.is_cuda and torch.cuda.is_current_stream_capturing()):
        tracked = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
        return cu_seqlens, tokens, None if tracked or forced("varlen_attention") else _ours(segments, q, k, v)
    if cu_seqlens.device.type != "cpu" and chosen(q, k, v, tokens, segments=segments) in OURS:
        return cu_seqlens, tokens, None
    if "on_host" not in shared:
        copy = cu_seqlens.cpu()
        shared["on_host"] = copy, max(copy.diff().tolist(), default=0)
    copy, longest = shared["on_host"]
    return copy, longest, None


def _ours(segments: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> str | None:
    """Triton in the place of what launches programs for all rows in every segment, where it serves such tensors."""
    if not by_max_seqlen(chosen(q, k, v, q.shape[0], segments=segments)):
        return None
    try:
        return chosen(q, k, v, q.shape[0], segments=segments, backend="triton")
    except BackendError:
        return None


def _shared(cu_seqlens: torch.Tensor, layer: object) -> dict[str, Any]:
    """What the layers of a forward keep about their boundaries, on the tensor, until these are written to.

    Of inference tensors nobody can tell whether they were: the layer that began to keep it, when it comes again, is in
    another forward.
    """
    if torch.compiler.is_compiling():
        return {}
    inference = cu_seqlens.is_inference()
    began, shared = getattr(cu_seqlens, "_qwen2vl", (None, {}))
    if (began == id(layer) or began is None) if inference else began != cu_seqlens._version:
        began, shared = id(layer) if inference else cu_seqlens._version, {}
        cu_seqlens._qwen2vl = (began, shared)  # type: ignore[attr-defined]
    return shared


def _tiles(
    shared: dict[str, Any],
    cu_seqlens: torch.Tensor,
    longest: int,
    backend: str | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
) -> TilePlan | None:
    """The plan of inference tensors. Of ordinary tensors the op keeps plans itself, until they are written to."""
    if torch.compiler.is_compiling() or not cu_seqlens.is_inference():
        return None
    if reads_host(chosen(q, k, v, longest, segments=cu_seqlens.shape[0] - 1, backend=backend)):
        return None
    rows, device = q.shape[0], q.device
    plan = shared.get("tiles")
    if plan is None or plan.total != rows or plan.device != device:
        plan = shared["tiles"] = plan_tiles(cu_seqlens, rows, device=device)
    return plan


def _halves(*tables: torch.Tensor) -> list[torch.Tensor]:
    """The first half of the columns, which stock repeats."""
    return [table[:, : table.shape[-1] // 2] for table in tables]
