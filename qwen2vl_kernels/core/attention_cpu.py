"""varlen_attention for boundaries that the host reads: PyTorch's fused attention by runs of equal segments, and blocks.

Every segment is worked on by itself, or with equal ones as a batch, so its bits do not depend on the pack.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

#: Query rows that "blocked" works on at a time. On 2 Zen 5 cores, bf16, 512 beat 128 and 256 at every length.
_BLOCK_ROWS = 512
#: From this length on "blocked" beats PyTorch's attention there (1.3x at 256 rows, 2.9x at 5184, 2.4x causal 1333).
_BLOCKED_MIN_SEQLEN = 256


def per_segment(attend, total: int, empty: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Concatenate ``attend(rows)`` over the non-empty segments, zeros for the rows after the last."""
    bounds = cu_seqlens.tolist()
    parts = [attend(slice(a, b)) for a, b in zip(bounds, bounds[1:], strict=False) if b > a]
    return _joined(parts, bounds[-1], total, empty)


def _joined(parts: list[torch.Tensor], covered: int, total: int, empty: torch.Tensor) -> torch.Tensor:
    """``parts``, which are the first ``covered`` rows, and zeros up to ``total``."""
    if covered < total:
        parts.append(empty.new_zeros((total - covered, *empty.shape[1:])))
    return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else empty


def sdpa(q, k, v, cu_seqlens, causal, scale) -> torch.Tensor:
    """PyTorch's fused attention, one call for each run of neighbours of one length: the frames of a video, say."""
    runs, held = _runs(cu_seqlens)
    parts = [_sdpa_equal(q[a:b], k[a:b], v[a:b], length, causal, scale) for a, b, length in runs]
    return _joined(parts, held, q.shape[0], q.new_empty((0, q.shape[1], v.shape[2])))


def _runs(cu_seqlens: torch.Tensor) -> tuple[list[tuple[int, int, int]], int]:
    """First row, row behind the last and length of each run of equal segments that are not empty; rows held by all."""
    bounds = cu_seqlens.tolist()
    runs: list[tuple[int, int, int]] = []
    for a, b in zip(bounds, bounds[1:], strict=False):
        if runs and runs[-1][2] == b - a:
            runs[-1] = (runs[-1][0], b, b - a)
        elif b > a:
            runs.append((a, b, b - a))
    return runs, bounds[-1]


def _sdpa_equal(q, k, v, length: int, causal, scale) -> torch.Tensor:
    """One fused call over segments of ``length`` rows each."""
    qb, kb, vb = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in (q, k, v))  # (S, H, L, D)
    gqa = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(qb, kb, vb, is_causal=causal, scale=scale, enable_gqa=gqa)
    return out.transpose(1, 2).flatten(0, 1)


def blocked(q, k, v, cu_seqlens, causal, scale) -> torch.Tensor:
    """Long segments by :func:`_blocked_segment`, short ones by PyTorch's attention: each by its own length alone.

    A choice by the longest segment of the pack would make a result depend on what it is packed with.
    """
    bounds = cu_seqlens.tolist()
    if all(b - a < _BLOCKED_MIN_SEQLEN for a, b in zip(bounds, bounds[1:], strict=False)):
        return sdpa(q, k, v, cu_seqlens, causal, scale)

    def attend(rows: slice) -> torch.Tensor:
        length = rows.stop - rows.start
        if length >= _BLOCKED_MIN_SEQLEN:
            return _blocked_segment(q[rows], k[rows], v[rows], causal, scale)
        return _sdpa_equal(q[rows], k[rows], v[rows], length, causal, scale)

    return per_segment(attend, q.shape[0], q.new_empty((0, q.shape[1], v.shape[2])), cu_seqlens)


def _blocked_segment(q, k, v, causal, scale) -> torch.Tensor:
    """Two matrix products and a softmax per head and block of query rows, scores in the working dtype.

    PyTorch's CPU attention runs bf16 at half the rate of its bf16 matrix products or less; keeping one block's
    scores in cache and leaving the products to the GEMM library is faster on long segments. One head's keys and
    values are copied together for it at a time. The rounding is that of :func:`varlen_attention_ref`: scores and
    probabilities in the input dtype, softmax inside in float32.
    """
    length, heads, group = q.shape[0], q.shape[1], q.shape[1] // k.shape[1]
    out = q.new_empty((length, heads, v.shape[2]))
    buffer = q.new_empty((min(_BLOCK_ROWS, length), length))
    for kv_head in range(k.shape[1]):
        keys, values = k[:, kv_head].t().contiguous(), v[:, kv_head].contiguous()  # (D, L), (L, Dv)
        for row in range(0, length, _BLOCK_ROWS):
            stop = min(row + _BLOCK_ROWS, length)
            seen = stop if causal else length
            scores = buffer[: stop - row, :seen]
            if causal:
                future = torch.ones((stop - row, stop - row), dtype=torch.bool).triu(1)
            for head in range(kv_head * group, (kv_head + 1) * group):
                # alpha is applied to the float32 accumulator, so scaling costs no rounding of its own.
                torch.addmm(scores, q[row:stop, head], keys[:, :seen], beta=0, alpha=scale, out=scores)
                if causal:
                    scores[:, row:].masked_fill_(future, float("-inf"))
                out[row:stop, head] = scores.softmax(-1) @ values[:seen]
    return out


def keeps_statistics(q: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether PyTorch's attention is its fused CPU kernel for such heads, whose statistics have one form."""
    return q.device.type == "cpu" and q.shape[2] == v.shape[2]


def _batch(x: torch.Tensor, run: tuple[int, int, int]) -> torch.Tensor:
    """The rows of one run of equal segments as ``(S, H, L, ...)``."""
    return x[run[0] : run[1]].unflatten(0, (-1, run[2])).transpose(1, 2)


def sdpa_with_statistics(q, k, v, cu_seqlens, causal, scale) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`sdpa` on a CPU with the statistics ``(T, Hq)`` of its kernel."""
    out = q.new_empty((q.shape[0], q.shape[1], v.shape[2]))
    lse = q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))
    runs, held = _runs(cu_seqlens)
    for run in runs:
        made = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *(_batch(x, run) for x in (q, k, v)), 0.0, causal, scale=scale
        )
        for whole, part in zip((out, lse), made, strict=True):
            _batch(whole, run).copy_(part)
    out[held:].zero_()
    return out, lse


def sdpa_backward(grad, q, k, v, out, lse, cu_seqlens, causal, scale) -> tuple[torch.Tensor, ...]:
    grads = tuple(x.new_empty(x.shape) for x in (q, k, v))
    runs, held = _runs(cu_seqlens)
    for run in runs:
        given = [_batch(x, run) for x in (grad, q, k, v, out, lse)]
        made = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*given, 0.0, causal, scale=scale)
        for whole, part in zip(grads, made, strict=True):
            _batch(whole, run).copy_(part)
    for whole in grads:
        whole[held:].zero_()
    return grads
