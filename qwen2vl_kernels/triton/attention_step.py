"""The Triton kernel of decode_attention_: a step's rotary embedding, its append to the cache and its attention, in one.

Program (row, split, key head) takes the query heads that share the key head, BLOCK_M of them with padding, and every
SPLITS-th block of BLOCK_N keys, beginning with its own number, as ``attention_decode`` does. Each rotates its queries
and the new key, D values; the one whose split holds the new slot stores key and value there, and all put them into the
block in their registers, so nobody reads what another writes.

The splits of a head are summed by the program that comes last, in the order of the splits: what came first leaves its
part in float32, counts itself in ``arrived`` with release, and the last one, which has counted with acquire, reads all
of them past the first cache. So a sum costs one trip to the second cache behind the last split, and what runs next
reads D values a head. ``arrived`` is zero before and after.

Bytes: keys and values once. The keys and values of earlier tokens, lengths and positions are read before the program
waits for the kernel ahead of it; **whoever asks for that sees to it** that no kernel since the last ordinary launch
writes them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..core.launching import (
    Target,
    architecture,
    cdiv,
    gdc_launch_dependents,
    gdc_wait,
    jit,
    launch,
    next_power_of_2,
    target_of,
    tl,
)
from .attention_head import softmax_step
from .rotary import cos_sin, rotate_pair

#: Splits of a row's keys. With two key heads (the 2B's) an eighth of a long context's time goes into their sum; twice
#: as many would read the keys no faster, half as many only half as fast.
MAX_SPLITS = 32


@dataclass(frozen=True)
class StepConfig:
    block_n: int  # keys that a program takes at a time
    num_warps: int


#: By architecture (86: also 8.9; 0: AMD's). Two blocks of keys and values of 128 columns are 64 KB in registers. Not
#: yet timed on any GPU.
_CONFIGS = {80: StepConfig(64, 4), 86: StepConfig(32, 4), 90: StepConfig(64, 4), 0: StepConfig(32, 4)}


def config(target: Target) -> StepConfig:
    return _CONFIGS[architecture(target, _CONFIGS)]


@jit
def _block(cache, start, last, step, D: tl.constexpr, BLOCK_N: tl.constexpr):
    """Keys or values ``(BLOCK_N, D)`` from slot ``start`` on, zero from the slot ``last``, which is being written."""
    key = start + tl.arange(0, BLOCK_N)[:, None]
    return tl.load(cache + key.to(tl.int64) * step + tl.arange(0, D)[None, :], mask=key < last, other=0.0)


@jit
def _rotated(x, c, s, at, live, D: tl.constexpr):
    """Heads ``x + at``, whose columns are the last axis, rotated: column j with j + D / 2."""
    column = tl.arange(0, D)[None, :]
    own = tl.load(x + at + column, mask=live, other=0.0).to(tl.float32)
    partner = tl.load(x + at + (column + D // 2) % D, mask=live, other=0.0).to(tl.float32)
    first, second = rotate_pair(own, partner, c, s)[0], rotate_pair(partner, own, c, s)[1]
    return tl.where(column < D // 2, first, second).to(x.dtype.element_ty)


_STRIDES = ["q_row", "q_head", "k_row", "k_head", "v_row", "v_head"]
_CACHES = ["k_batch", "k_slot", "k_kind", "v_batch", "v_slot", "v_kind"]


@jit(do_not_specialize=["capacity", "seqlens_row", "positions_row", *_STRIDES, *_CACHES])
def _step_kernel(
    q,
    k,
    v,
    k_cache,
    v_cache,
    cache_seqlens,
    positions,
    inv_freq,
    out,
    partial,
    maxima,
    sums,
    arrived,
    capacity,
    scale,
    seqlens_row,
    positions_row,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    k_batch,
    k_slot,
    k_kind,
    v_batch,
    v_slot,
    v_kind,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    SPLITS: tl.constexpr,
    UNIT: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    row = (tl.program_id(0) // SPLITS).to(tl.int64)
    split = tl.program_id(0) % SPLITS
    kv_head = tl.program_id(1).to(tl.int64)
    end = tl.load(cache_seqlens + row * seqlens_row)
    end = tl.where((end > 0) & (end <= capacity), end, 0)  # any other row stores nothing, and gets zeros
    last = end - 1
    live = tl.maximum(tl.minimum(tl.cdiv(end, BLOCK_N), SPLITS), 1)  # splits that have keys
    # Strides come in units and are wide before they are whole again.
    k_cache += (row * k_batch + kv_head * k_kind) * UNIT
    v_cache += (row * v_batch + kv_head * v_kind) * UNIT
    k_step, v_step = k_slot.to(tl.int64) * UNIT, v_slot.to(tl.int64) * UNIT
    keys = _block(k_cache, split * BLOCK_N, last, k_step, D, BLOCK_N)
    values = _block(v_cache, split * BLOCK_N, last, v_step, D, BLOCK_N)
    column = tl.arange(0, D)[None, :]
    AXES: tl.constexpr = (D // 2, 0, 0, False)  # pyright: ignore[reportAssignmentType]
    at_row = row + tl.zeros((1, 1), tl.int64)
    c, s = cos_sin(
        positions, inv_freq, None, None, at_row, column % (D // 2), at_row >= 0, 0, 0, positions_row, 0, D // 2, AXES,
        tl.float32,
    )  # fmt: skip
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()
    if split < live:
        member = tl.arange(0, BLOCK_M)
        head = kv_head * GROUP + member
        mine = (member < GROUP)[:, None]
        q_at = (row * q_row + head[:, None] * q_head) * UNIT
        queries = _rotated(q, c, s, q_at, mine, D)  # (BLOCK_M, D)
        new_key = _rotated(k, c, s, (row * k_row + kv_head * k_head) * UNIT, end > 0, D)  # (1, D)
        new_value = tl.load(v + (row * v_row + kv_head * v_head) * UNIT + column, mask=end > 0, other=0.0)
        stores = (end > 0) & (last // BLOCK_N % SPLITS == split)
        tl.store(k_cache + last.to(tl.int64) * k_step + column, new_key, mask=stores)
        tl.store(v_cache + last.to(tl.int64) * v_step + column, new_value, mask=stores)
        acc = tl.zeros((BLOCK_M, D), tl.float32)
        m_i = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        l_i = tl.zeros((BLOCK_M,), tl.float32)
        for start in range(split * BLOCK_N, end, SPLITS * BLOCK_N):
            key = start + tl.arange(0, BLOCK_N)
            keys = tl.where((key == last)[:, None], new_key, keys)
            values = tl.where((key == last)[:, None], new_value, values)
            qk = tl.dot(queries, tl.trans(keys))  # (BLOCK_M, BLOCK_N)
            qk = tl.where((key < end)[None, :], qk, float("-inf"))
            p, alpha, m_i, l_i = softmax_step(qk, m_i, l_i, scale)
            acc = tl.dot(p.to(values.dtype), values, acc * alpha[:, None])
            keys = _block(k_cache, start + SPLITS * BLOCK_N, last, k_step, D, BLOCK_N)
            values = _block(v_cache, start + SPLITS * BLOCK_N, last, v_step, D, BLOCK_N)
        out_at = (row * HEADS + head[:, None]) * D + column
        if live == 1:
            o = acc / tl.where(end > 0, l_i, 1.0)[:, None]
            tl.store(out + out_at, o.to(out.dtype.element_ty), mask=mine)
        else:
            # One split of all heads behind the other: (B, SPLITS, Hq) and (B, SPLITS, Hq, D).
            left = (row * SPLITS + split) * HEADS + head
            tl.store(maxima + left, m_i, mask=member < GROUP)
            tl.store(sums + left, l_i, mask=member < GROUP)
            tl.store(partial + left[:, None] * D + column, acc, mask=mine)
            tl.debug_barrier()  # all of it, before the one thread counts
            count = arrived + row * (HEADS // GROUP) + kv_head
            if tl.atomic_add(count, 1, sem="acq_rel", scope="gpu") == live - 1:
                tl.store(count, 0)
                best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
                for first in range(0, live, CHUNK):
                    which = first + tl.arange(0, CHUNK)[:, None]
                    there = (which < live) & (member < GROUP)[None, :]
                    at = (row * SPLITS + which) * HEADS + head[None, :]
                    m = tl.load(maxima + at, mask=there, other=float("-inf"), cache_modifier=".cg")
                    best = tl.maximum(best, tl.max(m, 0))
                best = tl.where(member < GROUP, best, 0.0)
                o = tl.zeros((BLOCK_M, D), tl.float32)
                total = tl.zeros((BLOCK_M,), tl.float32)
                for first in range(0, live, CHUNK):
                    which = first + tl.arange(0, CHUNK)[:, None]
                    there = (which < live) & (member < GROUP)[None, :]
                    at = (row * SPLITS + which) * HEADS + head[None, :]  # (CHUNK, BLOCK_M)
                    m = tl.load(maxima + at, mask=there, other=float("-inf"), cache_modifier=".cg")
                    n = tl.load(sums + at, mask=there, other=0.0, cache_modifier=".cg")
                    where = at[:, :, None] * D + tl.arange(0, D)[None, None, :]
                    part = tl.load(partial + where, mask=there[:, :, None], other=0.0, cache_modifier=".cg")
                    weight = tl.exp2(m - best[None, :])
                    total += tl.sum(n * weight, 0)
                    o += tl.sum(part * weight[:, :, None], 0)
                o /= tl.where(member < GROUP, total, 1.0)[:, None]
                tl.store(out + out_at, o.to(out.dtype.element_ty), mask=mine)


def serves(heads: int, kv_heads: int, columns: int) -> bool:
    """Whether the kernel has a form for these heads: a power of two of columns, at most 16 queries a key."""
    return 16 <= columns <= 256 and columns & (columns - 1) == 0 and heads <= 16 * kv_heads


def launch_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    positions: torch.Tensor,
    inv_freq: torch.Tensor,
    arrived: torch.Tensor,
    softmax_scale: float,
    prefetch: bool,
) -> torch.Tensor:
    """``(B, Hq, D)``; shapes as :func:`qwen2vl_kernels.decode_attention_` has them."""
    (batch, heads, columns), (_, capacity, kv_heads, _) = q.shape, k_cache.shape
    out = torch.empty((batch, heads, columns), dtype=q.dtype, device=q.device)
    target = target_of(q.device)
    chosen = config(target)
    splits = min(MAX_SPLITS, next_power_of_2(cdiv(capacity, chosen.block_n)))
    partial = torch.empty((batch, splits, heads, columns), dtype=torch.float32, device=q.device)
    maxima, sums = torch.empty((2, batch, splits, heads), dtype=torch.float32, device=q.device)
    named = {
        name: n
        for x, names in ((q, _STRIDES[:2]), (k, _STRIDES[2:4]), (v, _STRIDES[4:]))
        for name, n in zip(names, x.stride(), strict=False)
    }
    named |= {
        name: n
        for x, names in ((k_cache, _CACHES[:3]), (v_cache, _CACHES[3:]))
        for name, n in zip(names, x.stride(), strict=False)
    }
    unit = math.gcd(16, *named.values())
    launch(
        _step_kernel,
        (batch * splits, kv_heads),
        q.device,
        **{name: stride // unit for name, stride in named.items()},
        q=q,
        k=k,
        v=v,
        k_cache=k_cache,
        v_cache=v_cache,
        cache_seqlens=cache_seqlens,
        positions=positions,
        inv_freq=inv_freq,
        out=out,
        partial=partial,
        maxima=maxima,
        sums=sums,
        arrived=arrived,
        capacity=capacity,
        scale=softmax_scale * math.log2(math.e),
        seqlens_row=cache_seqlens.stride(0),
        positions_row=positions.stride(0),
        HEADS=heads,
        GROUP=heads // kv_heads,
        SPLITS=splits,
        UNIT=unit,
        D=columns,
        BLOCK_M=16,
        BLOCK_N=chosen.block_n,
        CHUNK=min(8, splits),
        DEPENDENT=prefetch and target.dependent,
        num_warps=chosen.num_warps,
        max_registers=255,
    )
    return out
