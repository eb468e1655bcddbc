"""The backward Triton kernels of varlen_attention, without atomics: every result is written by one program.

    delta       sum over columns of o do
    dk, dv      by tiles of keys: dv = p^T do,  dp = do v^T,  ds = p (dp - delta),  dk = scale ds^T q
    dq          by tiles of queries: dq = scale ds k                       together 14 L^2 D, p worked out twice

With rotary tables, q and k are rotated as they are loaded and dq and dk rotated back as they are stored
(``triton.attention_head``).
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
    jit,
    launch,
    like,
    next_power_of_2,
    strides,
    target_of,
    tl,
)
from ..core.tile_plan import TilePlan
from .attention_head import dot_heads, head_of, head_strides, load_head, store_head, tile_bounds, zeros_head
from .rotary import as_kernels_read, launch_rotation
from .tail import zero_behind


@dataclass(frozen=True)
class BackwardConfig:
    block_m: int  # queries that a program owns or takes at a time
    block_n: int  # keys that a program takes at a time or owns
    num_warps: int
    num_stages: int


_WIDE, _AMD_WIDE = BackwardConfig(64, 64, 8, 1), BackwardConfig(64, 64, 4, 1)
#: For the pass over tiles of keys, and for the one over tiles of queries.
_NARROW = (BackwardConfig(32, 64, 8, 1), BackwardConfig(64, 32, 8, 1))
_AMD_NARROW = (BackwardConfig(32, 64, 4, 1), BackwardConfig(64, 32, 4, 1))

#: As the forward's: by architecture, the first entry whose columns hold a head's, for the pass over tiles of keys and
#: the one over tiles of queries. Not yet timed on any GPU.
_CONFIGS: dict[int, tuple[tuple[int, BackwardConfig, BackwardConfig], ...]] = {
    80: ((256, *_NARROW),),
    90: ((96, _WIDE, _WIDE), (256, *_NARROW)),
    100: ((96, _WIDE, _WIDE), (256, *_NARROW)),
    120: ((256, *_NARROW),),
    0: ((96, _AMD_WIDE, _AMD_WIDE), (256, *_AMD_NARROW)),
}


def backward_config(dtype: torch.dtype, columns: int, target: Target) -> tuple[BackwardConfig, BackwardConfig]:
    """The configurations of the pass that makes dk and dv, and of the one that makes dq."""
    if dtype not in (torch.bfloat16, torch.float16):
        plain = BackwardConfig(32, 32, target.warps(128), 1)
        return plain, plain
    known = _CONFIGS[architecture(target, _CONFIGS)]
    return next((entry[1:] for entry in known if columns <= entry[0]), known[-1][1:])


@jit(do_not_specialize=["total"])
def _delta_kernel(
    out,
    dout,
    delta,
    total,
    dout_row,
    dout_head,
    HEADS: tl.constexpr,
    UNIT: tl.constexpr,
    V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ACC: tl.constexpr,
):
    dout_head *= UNIT
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    head = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK_N)[None, :]
    mask = (row < total)[:, None] & (column < V)
    o = tl.load(out + row[:, None] * (HEADS * V) + head * V + column, mask=mask, other=0.0).to(ACC)
    do = tl.load(dout + row[:, None] * dout_row + head * dout_head + column, mask=mask, other=0.0).to(ACC)
    tl.store(delta + head * total + row, tl.sum(o * do, 1), mask=row < total)


@jit(do_not_specialize=["total"])
def _key_kernel(
    q,
    k,
    v,
    dout,
    lse,
    delta,
    cos,
    sin,
    dk,
    dv,
    tiles,
    total,
    scale,
    softmax_scale,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    dout_row,
    dout_head,
    cos_row,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    UNIT: tl.constexpr,
    QK_HEAD: tl.constexpr,
    V_HEAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    SPLIT: tl.constexpr,
    ACC: tl.constexpr,
):
    """dk and dv of one tile of keys: over the query heads that read it, and their rows from the segment."""
    q_head *= UNIT
    k_head *= UNIT
    v_head *= UNIT
    dout_head *= UNIT
    first, begin, end, own_end = tile_bounds(tiles, SPLIT)
    kv_head = tl.program_id(1).to(tl.int64)
    key = first + tl.arange(0, BLOCK_N)
    there = key < own_end
    seer = key  # the first row that sees a key
    if CAUSAL:
        if SPLIT:
            begin = tl.maximum(begin, first - (own_end - end))
            seer = key - (own_end - end)
        else:
            begin = first
    k0, k1 = load_head(k + kv_head * k_head, cos, sin, key, there, k_row, cos_row, QK_HEAD, ACC)
    v0, v1 = load_head(v + kv_head * v_head, None, None, key, there, v_row, 0, V_HEAD, ACC)
    dk0, dk1 = zeros_head(BLOCK_N, QK_HEAD, ACC)
    dv0, dv1 = zeros_head(BLOCK_N, V_HEAD, ACC)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        for start in range(begin, end, BLOCK_M):
            row = start + tl.arange(0, BLOCK_M)
            live = row < end
            q0, q1 = load_head(q + head * q_head, cos, sin, row, live, q_row, cos_row, QK_HEAD, ACC)
            do0, do1 = load_head(dout + head * dout_head, None, None, row, live, dout_row, 0, V_HEAD, ACC)
            at = head * total + row
            qk = dot_heads(k0, k1, q0, q1, QK_HEAD, ACC) * scale - tl.load(lse + at, mask=live, other=0.0)[None, :]
            seen = live[None, :] & there[:, None]
            if CAUSAL:
                seen = seen & (seer[:, None] <= row[None, :])
            p = tl.exp2(tl.where(seen, qk, float("-inf")))  # (BLOCK_N keys, BLOCK_M queries)
            low = p.to(dout.dtype.element_ty)
            dv0 = tl.dot(low, do0, dv0, input_precision="ieee", out_dtype=ACC)
            if V_HEAD[2] > 0:
                dv1 = tl.dot(low, do1, dv1, input_precision="ieee", out_dtype=ACC)
            dp = dot_heads(v0, v1, do0, do1, V_HEAD, ACC)
            ds = p * (dp - tl.load(delta + at, mask=live, other=0.0)[None, :])
            low = ds.to(q.dtype.element_ty)
            dk0 = tl.dot(low, q0, dk0, input_precision="ieee", out_dtype=ACC)
            if QK_HEAD[2] > 0:
                dk1 = tl.dot(low, q1, dk1, input_precision="ieee", out_dtype=ACC)
    D: tl.constexpr = QK_HEAD[0]
    V: tl.constexpr = V_HEAD[0]
    dk0, dk1 = dk0 * softmax_scale, dk1 * softmax_scale
    store_head(dk + kv_head * D, dk0, dk1, cos, sin, key, there, KV_HEADS * D, cos_row, QK_HEAD, ACC)
    store_head(dv + kv_head * V, dv0, dv1, None, None, key, there, KV_HEADS * V, 0, V_HEAD, ACC)


@jit(do_not_specialize=["total"])
def _query_kernel(
    q,
    k,
    v,
    dout,
    lse,
    delta,
    cos,
    sin,
    dq,
    tiles,
    total,
    scale,
    softmax_scale,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    dout_row,
    dout_head,
    cos_row,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    UNIT: tl.constexpr,
    QK_HEAD: tl.constexpr,
    V_HEAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    SPLIT: tl.constexpr,
    ACC: tl.constexpr,
):
    """dq of one tile of queries, over the keys of its segment."""
    q_head *= UNIT
    k_head *= UNIT
    v_head *= UNIT
    dout_head *= UNIT
    first, begin, end, own_end = tile_bounds(tiles, SPLIT)
    head = tl.program_id(1).to(tl.int64)
    kv_head = head // GROUP
    row = first + tl.arange(0, BLOCK_M)
    live = row < own_end
    last, stop = row, end  # the last key that a row sees, and the end of those that any sees
    if CAUSAL:
        stop = first + BLOCK_M
        if SPLIT:
            stop += end - own_end
            last = row + (end - own_end)
        stop = tl.minimum(end, stop)
    q0, q1 = load_head(q + head * q_head, cos, sin, row, live, q_row, cos_row, QK_HEAD, ACC)
    do0, do1 = load_head(dout + head * dout_head, None, None, row, live, dout_row, 0, V_HEAD, ACC)
    at = head * total + row
    lse_i = tl.load(lse + at, mask=live, other=0.0)[:, None]
    delta_i = tl.load(delta + at, mask=live, other=0.0)[:, None]
    dq0, dq1 = zeros_head(BLOCK_M, QK_HEAD, ACC)
    for start in range(begin, stop, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        there = key < end
        k0, k1 = load_head(k + kv_head * k_head, cos, sin, key, there, k_row, cos_row, QK_HEAD, ACC)
        v0, v1 = load_head(v + kv_head * v_head, None, None, key, there, v_row, 0, V_HEAD, ACC)
        qk = dot_heads(q0, q1, k0, k1, QK_HEAD, ACC) * scale - lse_i
        seen = there[None, :] & live[:, None]
        if CAUSAL:
            seen = seen & (key[None, :] <= last[:, None])
        p = tl.exp2(tl.where(seen, qk, float("-inf")))
        ds = (p * (dot_heads(do0, do1, v0, v1, V_HEAD, ACC) - delta_i)).to(k.dtype.element_ty)
        dq0 = tl.dot(ds, k0, dq0, input_precision="ieee", out_dtype=ACC)
        if QK_HEAD[2] > 0:
            dq1 = tl.dot(ds, k1, dq1, input_precision="ieee", out_dtype=ACC)
    D: tl.constexpr = QK_HEAD[0]
    dq0, dq1 = dq0 * softmax_scale, dq1 * softmax_scale
    store_head(dq + head * D, dq0, dq1, cos, sin, row, live, HEADS * D, cos_row, QK_HEAD, ACC)


def launch_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    plan: TilePlan,
    causal: bool,
    softmax_scale: float,
    *,
    dlse: torch.Tensor | None = None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    fused: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(dq, dk, dv)``, contiguous; zero outside of the segments.

    ``plan``, ``cos``, ``sin`` and ``fused`` as the forward had; ``dlse``: the gradient of its lse, if it has one.
    """
    if out.numel() == 0:
        return tuple(x.zero_() for x in like(q, k, v))  # type: ignore[return-value]
    _, cos, sin = as_kernels_read(None, cos, sin)
    if cos is None or fused:
        dq, dk, dv = like(q, k, v)
        _launch_passes(dout, dlse, q, k, v, out, lse, plan, causal, softmax_scale, cos, sin, dq, dk, dv)
        return dq, dk, dv
    q_rotated, k_rotated = like(q, k)
    launch_rotation(q, k, q_rotated, k_rotated, cos=cos, sin=sin, pairs_adjacent_out=True)
    # Not rounded before they are rotated back: the bits must not depend on which way was taken.
    dq_wide, dk_wide = like(q, k, dtype=lse.dtype)
    dq, dk, dv = like(q, k, v)
    inputs = (dout, dlse, q_rotated, k_rotated, v, out, lse, plan, causal, softmax_scale, None, None)
    _launch_passes(*inputs, dq_wide, dk_wide, dv)
    launch_rotation(dq_wide, dk_wide, dq, dk, cos=cos, sin=sin, inverse=True, pairs_adjacent_in=True)
    return dq, dk, dv


def _launch_passes(dout, dlse, q, k, v, out, lse, plan, causal, softmax_scale, cos, sin, dq, dk, dv) -> None:
    """The sums delta, then dk and dv by tiles of keys, then dq by tiles of queries."""
    zero_behind(dq, plan.queries)
    zero_behind(dk, plan.keys)
    zero_behind(dv, plan.keys)
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    (total, heads, columns), kv_heads, acc = q.shape, k.shape[1], accumulator(q.dtype)
    target = target_of(q.device)
    of_keys, of_queries = backward_config(q.dtype, columns, target)
    delta = torch.empty_like(lse)
    launch(
        _delta_kernel,
        (cdiv(total, 32), heads),
        q.device,
        out=out,
        dout=dout,
        delta=delta,
        total=total,
        **head_strides(dout=dout),
        HEADS=heads,
        V=v.shape[2],
        BLOCK_M=32,
        BLOCK_N=next_power_of_2(v.shape[2]),
        ACC=acc,
        num_warps=target.warps(128),
    )
    if dlse is not None:
        # lse counts in powers of two; every score adds its share p of it to a gradient, as it takes that of delta.
        delta.sub_(dlse, alpha=math.log2(math.e))
    shared = {
        **{"q": q, "k": k, "v": v, "dout": dout, "lse": lse, "delta": delta, "cos": cos, "sin": sin, "total": total},
        **{"scale": softmax_scale * math.log2(math.e), "softmax_scale": softmax_scale},
        **head_strides(q=q, k=k, v=v, dout=dout),
        **strides(("row",), cos=cos),
        **{"GROUP": heads // kv_heads, "QK_HEAD": head_of(q), "V_HEAD": head_of(v), "CAUSAL": causal},
        **{"SPLIT": plan.split, "ACC": acc},
    }
    tiles = plan.tiles(of_keys.block_n, of_keys=True)
    grid = (tiles.shape[0], kv_heads)
    launch(_key_kernel, grid, q.device, **shared, **_blocks(of_keys), tiles=tiles, dk=dk, dv=dv, KV_HEADS=kv_heads)
    tiles = plan.tiles(of_queries.block_m)
    grid = (tiles.shape[0], heads)
    launch(_query_kernel, grid, q.device, **shared, **_blocks(of_queries), tiles=tiles, dq=dq, HEADS=heads)


def _blocks(chosen: BackwardConfig) -> dict[str, int]:
    blocks = {"BLOCK_M": chosen.block_m, "BLOCK_N": chosen.block_n}
    return blocks | {"num_warps": chosen.num_warps, "num_stages": chosen.num_stages}
