"""The Triton kernels of kvcache_attention with lengths on the device: one new token a row, its keys split, then summed.

    attend      m = max s,  l = sum 2^(s - m),  acc = sum 2^(s - m) v        of a row, a head and a split of its keys
    combine     o = sum 2^(m - max m) acc / sum 2^(m - max m) l              of a row and a head, over its splits

The query heads that share keys are rows of one product, padded to the 16 of a matrix instruction, so every key is read
once. Bytes: keys and values once; what a split leaves, written and read once, is a head's width of float32 for each of
its query heads, beside BLOCK_N keys and values at least.

The number of splits follows from the capacity alone: a captured graph serves all lengths, and no bit depends on the
other rows. Of S splits, split s takes the blocks s, s + S, s + 2 S ... of BLOCK_N keys, so that also a row much shorter
than the capacity keeps all of them at work. The sums over splits have one order.

A length counts as one in [0, capacity], and no slot behind it is read: what stands there cannot matter. A paged cache
differs in the address of a key alone, which the row's table gives; tables too are read as far as a row is long.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..core.launching import (
    Target,
    accumulator,
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
from .attention_head import column_blocks, dot_heads, load_block, load_head, softmax_step, store_head, zeros_head


@dataclass(frozen=True)
class DecodeConfig:
    block_n: int  # keys that a program takes at a time
    num_warps: int
    num_stages: int


#: For 16-bit tensors, by architecture (86: also 8.9; 0: AMD's). Chosen so that a program has two blocks of keys and
#: values of 128 columns on their way, 64 KB, and that two programs share a multiprocessor; not yet timed on any GPU.
_CONFIGS = {
    80: DecodeConfig(64, 4, 3),
    86: DecodeConfig(64, 4, 2),
    90: DecodeConfig(64, 4, 3),
    120: DecodeConfig(64, 4, 2),
    0: DecodeConfig(64, 4, 2),
}

#: Splits of a row's keys: with two key heads (the 2B's) nearly as many programs as an H200 has multiprocessors.
MAX_SPLITS = 64

#: Query heads that one program takes at most.
_MAX_BLOCK_M = 64


def decode_config(dtype: torch.dtype, target: Target) -> DecodeConfig:
    if dtype not in (torch.bfloat16, torch.float16):
        return DecodeConfig(32, target.warps(128), 1)
    return _CONFIGS[architecture(target, _CONFIGS)]


def splits_of(capacity: int, block_n: int) -> int:
    """A power of two, so that a cache that grows asks for few kernels."""
    return min(MAX_SPLITS, next_power_of_2(cdiv(capacity, block_n)))


@jit
def _end(cache_seqlens, row, seqlens_row, capacity):
    """The end of the row's keys, whatever its length says: one below 0 ends what has not begun, as 0 does."""
    return tl.minimum(tl.load(cache_seqlens + row * seqlens_row), capacity)


_STRIDES = ["seqlens_row", "table_row", "q_row", "q_head", "k_batch", "k_row", "k_head", "v_batch", "v_row", "v_head"]


@jit(do_not_specialize=["capacity", *_STRIDES])
def _attend_kernel(
    q,
    k_cache,
    v_cache,
    cache_seqlens,
    block_table,
    partial,
    maxima,
    sums,
    capacity,
    scale,
    seqlens_row,
    table_row,
    q_row,
    q_head,
    k_batch,
    k_row,
    k_head,
    v_batch,
    v_row,
    v_head,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
    SPLITS: tl.constexpr,
    PAGE: tl.constexpr,
    UNIT: tl.constexpr,
    QK_HEAD: tl.constexpr,
    V_HEAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DEPENDENT: tl.constexpr,
    ACC: tl.constexpr,
):
    """What BLOCK_M query heads of one row leave of one split of its keys."""
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()
    row = (tl.program_id(0) // SPLITS).to(tl.int64)
    split = tl.program_id(0) % SPLITS
    kv_head = (tl.program_id(1) // PARTS).to(tl.int64)
    member = tl.program_id(1) % PARTS * BLOCK_M + tl.arange(0, BLOCK_M)
    live = member < GROUP
    head = kv_head * GROUP + member
    end = _end(cache_seqlens, row, seqlens_row, capacity)
    # Strides come in units, as in head_strides, and are wide before they are whole again.
    q += row * q_row * UNIT
    k_cache += kv_head * k_head * UNIT
    v_cache += kv_head * v_head * UNIT
    if PAGE > 0:
        block_table += row * table_row
    else:
        k_cache += row * k_batch * UNIT
        v_cache += row * v_batch * UNIT
    q0, q1 = load_head(q, None, None, head, live, q_head.to(tl.int64) * UNIT, 0, QK_HEAD, ACC)
    acc0, acc1 = zeros_head(BLOCK_M, V_HEAD, ACC)
    m_i = tl.full((BLOCK_M,), float("-inf"), ACC)
    l_i = tl.zeros((BLOCK_M,), ACC)
    for start in range(split * BLOCK_N, end, SPLITS * BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        there = key < end
        if PAGE > 0:
            page, slot = tl.load(block_table + key // PAGE, mask=there, other=0).to(tl.int64), key % PAGE
            k_at, v_at = page * k_batch + slot * k_row, page * v_batch + slot * v_row
        else:
            k_at, v_at = key.to(tl.int64) * k_row, key.to(tl.int64) * v_row
        k0, k1 = load_head(k_cache, None, None, k_at, there, UNIT, 0, QK_HEAD, ACC)
        qk = dot_heads(q0, q1, k0, k1, QK_HEAD, ACC)  # (BLOCK_M, BLOCK_N)
        qk = tl.where(there[None, :], qk, float("-inf"))
        p, alpha, m_i, l_i = softmax_step(qk, m_i, l_i, scale)
        p = p.to(v_cache.dtype.element_ty)
        v0 = load_block(v_cache, v_at, there, UNIT, 0, V_HEAD[1], V_HEAD[0])
        acc0 = tl.dot(p, v0, acc0 * alpha[:, None], input_precision="ieee", out_dtype=ACC)
        if V_HEAD[2] > 0:
            v1 = load_block(v_cache, v_at, there, UNIT, V_HEAD[1], V_HEAD[2], V_HEAD[0])
            acc1 = tl.dot(p, v1, acc1 * alpha[:, None], input_precision="ieee", out_dtype=ACC)
    V: tl.constexpr = V_HEAD[0]
    live = live & (split * BLOCK_N < end)  # what an idle split leaves, nobody reads
    at = (row * HEADS + head) * SPLITS + split
    tl.store(maxima + at, m_i, mask=live)
    tl.store(sums + at, l_i, mask=live)
    partial += (row * HEADS * SPLITS + split) * V
    store_head(partial, acc0, acc1, None, None, head, live, SPLITS * V, 0, V_HEAD, ACC)


@jit(do_not_specialize=["capacity", "seqlens_row"])
def _combine_kernel(
    partial,
    maxima,
    sums,
    cache_seqlens,
    out,
    capacity,
    seqlens_row,
    HEADS: tl.constexpr,
    SPLITS: tl.constexpr,
    V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One head of one row: the sum of what its splits have left."""
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    at = row * HEADS + tl.program_id(1)
    end = _end(cache_seqlens, row, seqlens_row, capacity)
    split = tl.arange(0, SPLITS)
    live = split * BLOCK_N < end
    column = tl.arange(0, BLOCK_V)
    m_i = tl.load(maxima + at * SPLITS + split, mask=live, other=float("-inf"))
    l_i = tl.load(sums + at * SPLITS + split, mask=live, other=0.0)
    mask = live[:, None] & (column < V)[None, :]
    acc = tl.load(partial + (at * SPLITS + split)[:, None] * V + column[None, :], mask=mask, other=0.0)
    weight = tl.exp2(m_i - tl.where(end > 0, tl.max(m_i, 0), 0.0))  # 0 of an idle split
    total = tl.where(end > 0, tl.sum(l_i * weight, 0), 1.0)
    o = tl.sum(acc * weight[:, None], 0) / total
    tl.store(out + at * V + column, o.to(out.dtype.element_ty), mask=column < V)


def launch_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    softmax_scale: float,
    block_table: torch.Tensor | None = None,
) -> torch.Tensor:
    """``(B, Hq, Dv)``; shapes as :func:`qwen2vl_kernels.kvcache_attention` has them with lengths on the device.

    Takes ``(Dv + 2) * Hq * B * splits_of(capacity)`` values of float32 for what the splits leave.
    """
    (batch, heads, columns), (_, page, kv_heads, v_columns) = q.shape, v_cache.shape
    capacity = page if block_table is None else page * block_table.shape[1]
    out = torch.empty((batch, heads, v_columns), dtype=q.dtype, device=q.device)
    if out.numel() == 0 or capacity == 0:
        return out.zero_()
    target, group = target_of(q.device), heads // kv_heads
    chosen = decode_config(q.dtype, target)
    splits, block_m = splits_of(capacity, chosen.block_n), min(_MAX_BLOCK_M, max(16, next_power_of_2(group)))
    wide = torch.promote_types(q.dtype, torch.float32)
    partial = torch.empty((batch, heads, splits, v_columns), dtype=wide, device=q.device)
    maxima, sums = torch.empty((2, batch, heads, splits), dtype=wide, device=q.device)
    named = dict(zip(("q_row", "q_head"), q.stride(), strict=False))
    named |= dict(zip(("k_batch", "k_row", "k_head"), k_cache.stride(), strict=False))
    named |= dict(zip(("v_batch", "v_row", "v_head"), v_cache.stride(), strict=False))
    unit = math.gcd(16, *named.values())
    parts = cdiv(group, block_m)
    shared = {
        **{"cache_seqlens": cache_seqlens, "partial": partial, "maxima": maxima, "sums": sums, "capacity": capacity},
        **{"seqlens_row": cache_seqlens.stride(0), "HEADS": heads, "SPLITS": splits, "BLOCK_N": chosen.block_n},
        # Waiting for the kernel before is all that they do ahead of its end, so each may start while that one ends.
        "DEPENDENT": target.dependent,
    }
    launch(
        _attend_kernel,
        (batch * splits, kv_heads * parts),
        q.device,
        **shared,
        **{name: stride // unit for name, stride in named.items()},
        q=q,
        k_cache=k_cache,
        v_cache=v_cache,
        block_table=block_table,
        table_row=0 if block_table is None else block_table.stride(0),
        PAGE=0 if block_table is None else page,
        scale=softmax_scale * math.log2(math.e),
        GROUP=group,
        PARTS=parts,
        UNIT=unit,
        QK_HEAD=(columns, *column_blocks(columns)),
        V_HEAD=(v_columns, *column_blocks(v_columns)),
        BLOCK_M=block_m,
        ACC=accumulator(q.dtype),
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
    )
    launch(
        _combine_kernel,
        (batch, heads),
        q.device,
        **shared,
        out=out,
        V=v_columns,
        BLOCK_V=next_power_of_2(v_columns),
        num_warps=target.warps(128),
    )
    return out
