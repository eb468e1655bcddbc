"""varlen_attention for boundaries that the host reads: PyTorch's fused attention by runs of equal segments, and blocks.

Every segment is worked on by itself, or with equal ones as a batch, so its bits do not depend on the pack. A causal
mask ends where queries and keys both end: of n queries over m keys, the first n - m see none (m < n), or all see the
first m - n (m > n), their past.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

#: Query rows that "blocked" works on at a time. On 2 Zen 5 cores, bf16, 512 beat 128 and 256 at every length.
_BLOCK_ROWS = 512
#: From this length on "blocked" beats PyTorch's attention there (1.3x at 256 rows, 2.9x at 5184, 2.4x causal 1333).
_BLOCKED_MIN_SEQLEN = 256
#: Query rows that share one mask, so that many queries over a long past need 256 x keys of it and not queries x keys.
_MASK_ROWS = 256
#: A past is short beside at least so many times as many queries. Two calls took 1.1x to 1.8x the processor time of one
#: for 1318 queries behind 15 keys, and 1.1x to 1.3x behind 330 of 1333, on a busy Xeon.
_SHORT_PAST = 4
#: Below so many rows PyTorch's backward of 16 bits is slower than its float32 one of copies, by a factor of 3.0 at 64
#: rows of 80 columns, 2.0 at 128, 1.4 at 256 and 1.0 at 384, on a Zen 4 core with products of bf16.
_WIDENED_BELOW = 384


def segments_of(cu_seqlens: torch.Tensor, cu_seqlens_k: torch.Tensor | None) -> list[tuple[slice, slice]]:
    """The rows of queries and of keys of every segment that has queries."""
    bounds = cu_seqlens.tolist()
    of_keys = bounds if cu_seqlens_k is None else cu_seqlens_k.tolist()
    pairs = zip(bounds, bounds[1:], of_keys, of_keys[1:], strict=False)
    return [(slice(a, b), slice(c, d)) for a, b, c, d in pairs if b > a]


def joined(parts: list[torch.Tensor], total: int, empty: torch.Tensor, fill: float = 0.0) -> torch.Tensor:
    """``parts``, which are the first rows, and ``fill`` up to ``total`` rows of ``empty``'s shape."""
    covered = sum(part.shape[0] for part in parts)
    if covered < total:
        parts.append(empty.new_full((total - covered, *empty.shape[1:]), fill))
    return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else empty


def sdpa(q, k, v, cu_seqlens, causal, scale, cu_seqlens_k=None) -> torch.Tensor:
    """PyTorch's fused attention, one call for each run of neighbours of one length: the frames of a video, say."""
    empty = q.new_empty((0, q.shape[1], v.shape[2]))
    runs = _runs(cu_seqlens, cu_seqlens_k)
    of_keys = [keys for _, keys, _ in runs]
    given = zip(_cut(q, [rows for rows, _, _ in runs]), _cut(k, of_keys), _cut(v, of_keys), runs, strict=True)
    parts = [_sdpa_equal(qr, kr, vr, count, causal, scale) for qr, kr, vr, (_, _, count) in given]
    return joined(parts, q.shape[0], empty)


def _cut(x: torch.Tensor, rows: list[slice]) -> list[torch.Tensor]:
    """``x[rows[0]], x[rows[1]], ...`` of rows in order. The gradient of one split is one concatenation; that of every
    slice would be zeros for all of ``x``, added up."""
    sizes, kept, end = [], [], 0
    for one in rows:
        if one.start > end:  # keys of a segment without queries
            sizes.append(one.start - end)
        kept.append(len(sizes))
        sizes.append(one.stop - one.start)
        end = one.stop
    if end < x.shape[0]:
        sizes.append(x.shape[0] - end)
    pieces = x.split_with_sizes(sizes)
    return [pieces[n] for n in kept]


def _runs(cu_seqlens: torch.Tensor, cu_seqlens_k: torch.Tensor | None = None) -> list[tuple[slice, slice, int]]:
    """Rows of queries and of keys of each run of neighbours that are equally long, and how many these are."""
    runs: list[tuple[slice, slice, int]] = []
    for rows, keys in segments_of(cu_seqlens, cu_seqlens_k):
        if runs:
            before, keys_before, count = runs[-1]
            length, length_k = rows.stop - rows.start, keys.stop - keys.start
            whole, whole_k = rows.stop - before.start, keys.stop - keys_before.start
            if (whole, whole_k) == (length * (count + 1), length_k * (count + 1)):
                runs[-1] = (slice(before.start, rows.stop), slice(keys_before.start, keys.stop), count + 1)
                continue
        runs.append((rows, keys, 1))
    return runs


def _batched(x: torch.Tensor, count: int) -> torch.Tensor:
    """The rows of ``count`` equal segments as ``(count, H, L, ...)``."""
    return x.unflatten(0, (count, x.shape[0] // count)).transpose(1, 2)


def _sdpa_equal(q, k, v, count: int, causal, scale) -> torch.Tensor:
    """``count`` equal segments in one fused call, or in a few where queries have a past."""
    qb, kb, vb = (_batched(x, count) for x in (q, k, v))
    length = qb.shape[2]
    tracked = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if not causal or kb.shape[2] <= length or tracked or not keeps_statistics(q, v):
        return _called(qb, kb, vb, causal, scale).transpose(1, 2).flatten(0, 1)
    out = q.new_empty((count, length, q.shape[1], v.shape[2]))
    out.transpose(1, 2).copy_(_with_statistics(qb, kb, vb, causal, scale)[0])
    return out.flatten(0, 1)


def _called(qb, kb, vb, causal, scale) -> torch.Tensor:
    """PyTorch's fused attention on ``(S, H, L, D)``, which any device and autograd know. Its own causal mask begins
    where queries and keys both begin, so it serves equal lengths only."""
    gqa, length, keys = qb.shape[1] != kb.shape[1], qb.shape[2], kb.shape[2]
    past = keys - length if causal or not keys else 0
    if past == 0:
        return F.scaled_dot_product_attention(qb, kb, vb, is_causal=causal, scale=scale, enable_gqa=gqa)
    if past < 0:
        return F.pad(_called(qb[:, :, -past:], kb, vb, causal, scale), (0, 0, -past, 0))
    parts = []
    for first in range(0, length, _MASK_ROWS):
        last = min(first + _MASK_ROWS, length)
        seen = past + last
        mask = torch.ones((last - first, seen), dtype=torch.bool, device=qb.device).tril(past + first)
        given = qb[:, :, first:last], kb[:, :, :seen], vb[:, :, :seen], mask
        parts.append(F.scaled_dot_product_attention(*given, scale=scale, enable_gqa=gqa))
    return torch.cat(parts, 2)


def _with_statistics(qb, kb, vb, causal, scale) -> tuple[torch.Tensor, torch.Tensor]:
    """What :func:`keeps_statistics` says yes to: the result ``(S, H, L, D)`` and the log of its sums ``(S, H, L)``.

    Queries with a past need no mask over it: they attend to the past and to each other, and the two results are added
    by the weights of their sums. A mask of all keys would cost PyTorch's kernel the half that it skips. A past that is
    short beside them gets queries of its own, whose results are dropped.
    """
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    past = kb.shape[2] - qb.shape[2] if causal else 0
    if kb.shape[2] == 0:
        wide = torch.promote_types(qb.dtype, torch.float32)
        return torch.zeros_like(qb), qb.new_full(qb.shape[:3], float("-inf"), dtype=wide)
    if past == 0:
        return kernel(qb, kb, vb, 0.0, causal, scale=scale)
    if past < 0:
        out, lse = kernel(qb[:, :, -past:], kb, vb, 0.0, True, scale=scale)
        return F.pad(out, (0, 0, -past, 0)), F.pad(lse, (-past, 0), value=float("-inf"))
    if past * _SHORT_PAST <= qb.shape[2]:
        made = kernel(F.pad(qb, (0, 0, past, 0)), kb, vb, 0.0, True, scale=scale)
        return made[0][:, :, past:], made[1][:, :, past:]
    out, lse = kernel(qb, kb[:, :, :past], vb[:, :, :past], 0.0, False, scale=scale)
    own, own_lse = kernel(qb, kb[:, :, past:], vb[:, :, past:], 0.0, True, scale=scale)
    whole = torch.logaddexp(lse, own_lse)
    weights = ((part - whole).exp().unsqueeze(-1) for part in (lse, own_lse))
    return torch.add(*(part * weight for part, weight in zip((out, own), weights, strict=True))).to(qb.dtype), whole


def blocked(q, k, v, cu_seqlens, causal, scale, cu_seqlens_k=None) -> torch.Tensor:
    """Long segments by :func:`_blocked_segment`, short ones by PyTorch's attention: each by its own length alone.

    A choice by the longest segment of the pack would make a result depend on what it is packed with.
    """
    segments = segments_of(cu_seqlens, cu_seqlens_k)
    if all(rows.stop - rows.start < _BLOCKED_MIN_SEQLEN for rows, _ in segments):
        return sdpa(q, k, v, cu_seqlens, causal, scale, cu_seqlens_k)

    def attend(rows: slice, keys: slice) -> torch.Tensor:
        length, blind = rows.stop - rows.start, rows.stop - rows.start - (keys.stop - keys.start)
        if length < _BLOCKED_MIN_SEQLEN or keys.stop == keys.start:
            return _sdpa_equal(q[rows], k[keys], v[keys], 1, causal, scale)
        if causal and blind > 0:
            return F.pad(_blocked_segment(q[rows][blind:], k[keys], v[keys], causal, scale), (0, 0, 0, 0, blind, 0))
        return _blocked_segment(q[rows], k[keys], v[keys], causal, scale)

    empty = q.new_empty((0, q.shape[1], v.shape[2]))
    return joined([attend(*segment) for segment in segments], q.shape[0], empty)


def _blocked_segment(q, k, v, causal, scale) -> torch.Tensor:
    """Two matrix products and a softmax per head and block of query rows, scores in the working dtype.

    PyTorch's CPU attention runs bf16 at half the rate of its bf16 matrix products or less; keeping one block's
    scores in cache and leaving the products to the GEMM library is faster on long segments. One head's keys and
    values are copied together for it at a time. The rounding is that of :func:`varlen_attention_ref`: scores and
    probabilities in the input dtype, softmax inside in float32.
    """
    (length, heads, _), keys, group = q.shape, k.shape[0], q.shape[1] // k.shape[1]
    past = keys - length
    out = q.new_empty((length, heads, v.shape[2]))
    buffer = q.new_empty((min(_BLOCK_ROWS, length), keys))
    for kv_head in range(k.shape[1]):
        transposed, values = k[:, kv_head].t().contiguous(), v[:, kv_head].contiguous()  # (D, keys), (keys, Dv)
        for row in range(0, length, _BLOCK_ROWS):
            stop = min(row + _BLOCK_ROWS, length)
            seen = past + stop if causal else keys
            scores = buffer[: stop - row, :seen]
            if causal:
                future = torch.ones((stop - row, stop - row), dtype=torch.bool).triu(1)
            for head in range(kv_head * group, (kv_head + 1) * group):
                # alpha is applied to the float32 accumulator, so scaling costs no rounding of its own.
                torch.addmm(scores, q[row:stop, head], transposed[:, :seen], beta=0, alpha=scale, out=scores)
                if causal:
                    scores[:, past + row :].masked_fill_(future, float("-inf"))
                out[row:stop, head] = scores.softmax(-1) @ values[:seen]
    return out


def keeps_statistics(q: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether PyTorch's attention is its fused CPU kernel for such heads, whose statistics have one form."""
    return q.device.type == "cpu" and q.shape[2] == v.shape[2]


def sdpa_with_statistics(q, k, v, cu_seqlens, causal, scale, cu_seqlens_k=None) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`sdpa` on a CPU, and the logs ``(T, Hq)`` of its sums."""
    out = q.new_zeros((q.shape[0], q.shape[1], v.shape[2]))
    lse = q.new_full(q.shape[:2], float("-inf"), dtype=torch.promote_types(q.dtype, torch.float32))
    for rows, keys, count in _runs(cu_seqlens, cu_seqlens_k):
        qb, kb, vb = (_batched(x, count) for x in (q[rows], k[keys], v[keys]))
        made = _with_statistics(qb, kb, vb, causal, scale)
        for whole, part in zip((out, lse), made, strict=True):
            _batched(whole[rows], count).copy_(part)
    return out, lse


def sdpa_backward(grad, q, k, v, out, lse, cu_seqlens, causal, scale) -> tuple[torch.Tensor, ...]:
    """Gradients from what :func:`sdpa_with_statistics` kept of a packed sequence."""
    grads = tuple(x.new_zeros(x.shape) for x in (q, k, v))
    for rows, _, count in _runs(cu_seqlens):
        given = [_batched(x[rows], count) for x in (grad, q, k, v, out, lse)]
        if q.dtype.itemsize < 4 and given[0].shape[2] < _WIDENED_BELOW:
            given = [x.float() for x in given]
        made = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*given, 0.0, causal, scale=scale)
        for whole, part in zip(grads, made, strict=True):
            _batched(whole[rows], count).copy_(part)
    return grads
