"""The forward Triton kernel of varlen_attention; the backward kernels are in ``triton.attention_backward``.

Per segment of L rows and head, with softmax statistics in float32 (FlashAttention 2, arXiv 2307.08691):

    s = q k^T,  p = exp(scale s - lse),  o = p v                                         4 L^2 D  FLOPs

Programs are handed out by a flat list of tiles, (first row, begin and end of its segment), longest segments first: none
is dead, however the lengths differ. A tile takes the keys of its segment BLOCK_N at a time: first those that all of
its rows see, without a mask, then the rest. Every sum has one order, so results do not depend on the run or on what
else is in the pack. How a head's columns are held, and rotated on the way in, is in ``triton.attention_head``.

Where keys have boundaries of their own (SPLIT), a tile names their segment, and a causal mask ends where both end: row
i of n sees the keys up to i + (keys - n).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from ..core.launching import Target, accumulator, architecture, jit, launch, like, strides, target_of, tl
from ..core.tile_plan import TilePlan
from .attention_head import (
    dot_heads,
    head_of,
    head_strides,
    load_block,
    load_head,
    softmax_step,
    store_head,
    tile_bounds,
    zeros_head,
)
from .rotary import as_kernels_read, launch_rotation
from .tail import zero_behind


@dataclass(frozen=True)
class ForwardConfig:
    block_m: int  # queries that a program owns
    block_n: int  # keys that it takes at a time
    num_warps: int
    num_stages: int


#: For 16-bit tensors, by architecture (86: also 8.9; 0: AMD's), the first entry whose columns hold a head's. Chosen so
#: that nothing spills and two programs share a multiprocessor where they can; not yet timed on any GPU.
_CONFIGS: dict[int, tuple[tuple[int, ForwardConfig], ...]] = {
    80: ((96, ForwardConfig(128, 64, 8, 2)), (256, ForwardConfig(128, 32, 8, 2))),
    86: ((96, ForwardConfig(128, 64, 8, 2)), (256, ForwardConfig(128, 32, 8, 2))),
    90: ((96, ForwardConfig(128, 64, 8, 2)), (256, ForwardConfig(128, 64, 8, 2))),
    100: ((80, ForwardConfig(128, 64, 8, 2)), (96, ForwardConfig(128, 64, 8, 3)), (256, ForwardConfig(128, 64, 8, 2))),
    120: ((96, ForwardConfig(128, 64, 8, 2)), (256, ForwardConfig(128, 32, 8, 2))),
    0: ((96, ForwardConfig(128, 64, 4, 2)), (256, ForwardConfig(128, 64, 4, 2))),
}


def forward_config(dtype: torch.dtype, columns: int, max_seqlen: int, target: Target) -> ForwardConfig:
    """One ``block_n`` for all lengths, so that no result depends on the pack; half ``block_m`` for short segments."""
    if dtype not in (torch.bfloat16, torch.float16):
        return ForwardConfig(32, 32, target.warps(128), 1)
    known = _CONFIGS[architecture(target, _CONFIGS)]
    chosen = next((config for most, config in known if columns <= most), known[-1][1])
    if max_seqlen <= chosen.block_m // 2:  # Qwen2.5-VL's windows of 64 patches: half of a whole tile would be idle
        return replace(chosen, block_m=chosen.block_m // 2, num_warps=chosen.num_warps // 2)
    return chosen


@jit
def _attend(
    q0,
    q1,
    k,
    v,
    cos,
    sin,
    last,
    start,
    whole,
    end,
    acc0,
    acc1,
    m_i,
    l_i,
    scale,
    k_row,
    v_row,
    cos_row,
    QK_HEAD: tl.constexpr,
    V_HEAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    ACC: tl.constexpr,
):
    """The queries' sums with BLOCK_N more keys: all rows see those before ``whole``, each row those up to ``last``."""
    key = start + tl.arange(0, BLOCK_N)
    there = key < end
    k0, k1 = load_head(k, cos, sin, key, there, k_row, cos_row, QK_HEAD, ACC)
    qk = dot_heads(q0, q1, k0, k1, QK_HEAD, ACC)  # (BLOCK_M, BLOCK_N)
    if start >= whole:
        seen = end - start
        if CAUSAL:
            seen = tl.minimum(seen, last - start + 1)[:, None]
        # Not arange < seen: the compiler would keep every column's number in a register through the loop.
        qk = tl.where(seen - tl.arange(0, BLOCK_N)[None, :] > 0, qk, float("-inf"))
    p, alpha, m_i, l_i = softmax_step(qk, m_i, l_i, scale)
    p = p.to(v.dtype.element_ty)
    # One block of v at a time: both together cost registers that some targets do not have.
    v0 = load_block(v, key, there, v_row, 0, V_HEAD[1], V_HEAD[0])
    acc0 = tl.dot(p, v0, acc0 * alpha[:, None], input_precision="ieee", out_dtype=ACC)
    if V_HEAD[2] > 0:
        v1 = load_block(v, key, there, v_row, V_HEAD[1], V_HEAD[2], V_HEAD[0])
        acc1 = tl.dot(p, v1, acc1 * alpha[:, None], input_precision="ieee", out_dtype=ACC)
    return acc0, acc1, m_i, l_i


@jit(do_not_specialize=["total"])
def _forward_kernel(
    q,
    k,
    v,
    cos,
    sin,
    out,
    lse,
    tiles,
    total,
    scale,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
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
    q_head *= UNIT
    k_head *= UNIT
    v_head *= UNIT
    first, begin, end, own_end = tile_bounds(tiles, SPLIT)
    head = tl.program_id(1).to(tl.int64)
    k += head // GROUP * k_head
    v += head // GROUP * v_head
    row = first + tl.arange(0, BLOCK_M)
    live = row < own_end
    q0, q1 = load_head(q + head * q_head, cos, sin, row, live, q_row, cos_row, QK_HEAD, ACC)
    acc0, acc1 = zeros_head(BLOCK_M, V_HEAD, ACC)
    m_i = tl.full((BLOCK_M,), float("-inf"), ACC)
    l_i = tl.zeros((BLOCK_M,), ACC)
    seen, last = end, row  # by all rows, and the last key that a row sees
    if CAUSAL:
        seen = first
        if SPLIT:
            seen += end - own_end
            last = row + (end - own_end)
    stop = tl.minimum(end, seen + BLOCK_M) if CAUSAL else end
    whole = begin + (seen - begin) // BLOCK_N * BLOCK_N
    for start in range(begin, stop, BLOCK_N):
        acc0, acc1, m_i, l_i = _attend(
            q0,
            q1,
            k,
            v,
            cos,
            sin,
            last,
            start,
            whole,
            end,
            acc0,
            acc1,
            m_i,
            l_i,
            scale,
            k_row,
            v_row,
            cos_row,
            QK_HEAD,
            V_HEAD,
            BLOCK_N,
            CAUSAL,
            ACC,
        )
    l_i = tl.where(live, l_i, 1.0)
    if SPLIT and CAUSAL:
        # The largest score of a row that sees no key is minus infinity, and its sums are no numbers.
        blind = last < begin
        acc0, acc1 = tl.where(blind[:, None], 0.0, acc0), tl.where(blind[:, None], 0.0, acc1)
        m_i, l_i = tl.where(blind, float("-inf"), m_i), tl.where(blind, 1.0, l_i)
    elif SPLIT:
        l_i = tl.where(begin < end, l_i, 1.0)
    sums = l_i[:, None]
    V: tl.constexpr = V_HEAD[0]
    store_head(out + head * V, acc0 / sums, acc1 / sums, None, None, row, live, HEADS * V, 0, V_HEAD, ACC)
    if lse is not None:
        tl.store(lse + head * total + row, m_i + tl.log2(l_i), mask=live)


#: Rows up to which a segment's queries and keys are rotated by tables as they are loaded, each key once for every
#: tile of queries; beyond, in one pass of their own. Estimated for Hopper, where rotating a key costs a tile about 3.75
#: cycles and the pass 10 kB of traffic a token and layer (16 heads of 80); not measured. Either way has the same bits.
FUSED_ROPE_MAX_SEQLEN = 1024


def fuses_rope(max_seqlen: int, columns: int, target: Target) -> bool:
    """Whether q and k are rotated on the way into the kernels.

    Only where matrix instructions read from shared memory, or registers are plenty (AMD's): elsewhere a rotated tile
    spills, whatever its size. So do heads of 72 columns on capability 10.
    """
    generation = target.capability // 10
    roomy = target.backend == "hip" or generation == 9 or (generation == 10 and columns % 16 == 0)
    return roomy and max_seqlen <= FUSED_ROPE_MAX_SEQLEN


def launch_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: TilePlan,
    max_seqlen: int,
    causal: bool,
    softmax_scale: float,
    *,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    fused: bool = True,
    keep: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(out (T, Hq, Dv), lse)``; lse is ``(Hq, T)`` in powers of two, empty unless ``keep``.

    With tables ``cos, sin (T, D/2)`` q and k are rotated first: on the way into the kernel if ``fused``, else by a pass
    of its own.
    """
    out, lse = fake_forward(q, k, v, keep)
    total, heads, columns = q.shape
    if out.numel() == 0:
        return out, lse
    if cos is not None and not fused:
        rotated = like(q, k)
        launch_rotation(q, k, *rotated, cos=cos, sin=sin, pairs_adjacent_out=True)
        (q, k), cos, sin = rotated, None, None
    _, cos, sin = as_kernels_read(None, cos, sin)
    chosen = forward_config(q.dtype, columns, max_seqlen, target_of(q.device))
    work = plan.tiles(chosen.block_m)
    launch(
        _forward_kernel,
        (work.shape[0], heads),
        q.device,
        q=q,
        k=k,
        v=v,
        cos=cos,
        sin=sin,
        out=out,
        lse=lse if keep else None,
        tiles=work,
        total=total,
        scale=softmax_scale * math.log2(math.e),
        **head_strides(q=q, k=k, v=v),
        **strides(("row",), cos=cos),
        HEADS=heads,
        GROUP=heads // k.shape[1],
        QK_HEAD=head_of(q),
        V_HEAD=head_of(v),
        BLOCK_M=chosen.block_m,
        BLOCK_N=chosen.block_n,
        CAUSAL=causal,
        SPLIT=plan.split,
        ACC=accumulator(q.dtype),
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
    )
    return zero_behind(out, plan.queries), lse


def fake_forward(q, k, v, keep=True):
    wide = torch.promote_types(q.dtype, torch.float32)
    out = torch.empty((q.shape[0], q.shape[1], v.shape[2]), dtype=q.dtype, device=q.device)
    return out, torch.empty((q.shape[1], q.shape[0]) if keep else (0,), dtype=wide, device=q.device)
