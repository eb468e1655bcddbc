"""The forward Triton kernels of varlen_attention, and the op that has a backward (``triton.attention_backward``).

Per segment of L rows and head, with softmax statistics in float32 (FlashAttention 2, arXiv 2307.08691):

    s = q k^T,  p = exp(scale s - lse),  o = p v                                         4 L^2 D  FLOPs

Programs are handed out by a flat list of tiles, (first row, begin and end of its segment), longest segments first: none
is dead, however the lengths differ. A tile takes the keys of its segment STEP at a time: first those that all of its
rows see, without a mask, then the rest. Every sum has one order, so results do not depend on the run or on what else is
in the pack. How a head's columns are held, and turned by rotary tables on the way in, is in ``triton.attention_head``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from ..core.launching import Target, accumulator, architecture, jit, launch, target_of, tl
from ..core.library import direct, first_order, register_opaque
from ..core.namespace import torch_ops
from ..core.tile_plan import TilePlan, plan_for
from . import attention_backward
from .attention_head import (
    blocks_of,
    load_block,
    load_head,
    product,
    store_head,
    strides_of,
    tables,
    turned_for_attention,
)
from .tail import zero_behind


@dataclass(frozen=True)
class ForwardConfig:
    rows: int  # of queries that a program owns
    step: int  # keys that it takes at a time
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
    """One step for all lengths, so that no result depends on the pack; half the rows where no segment has more."""
    if dtype not in (torch.bfloat16, torch.float16):
        return ForwardConfig(32, 32, target.warps(128), 1)
    known = _CONFIGS[architecture(target, _CONFIGS)]
    chosen = next((config for most, config in known if columns <= most), known[-1][1])
    if max_seqlen <= chosen.rows // 2:  # Qwen2.5-VL's windows of 64 patches: half of a whole tile would be idle
        return replace(chosen, rows=chosen.rows // 2, num_warps=chosen.num_warps // 2)
    return chosen


@jit
def _softmax_step(s, most, total_p, scale):
    """The scores' weights by the largest so far, and how what was summed by the old largest shrinks."""
    new = tl.maximum(most, tl.max(s, 1) * scale)
    p = tl.exp2(s * scale - new[:, None])  # one multiply-add an element; scale is in powers of two
    shrink = tl.exp2(most - new)
    return p, shrink, new, total_p * shrink + tl.sum(p, 1)


@jit
def _attend(
    q0, q1, k, v, cos, sin, row, start, whole, end, o0, o1, most, total_p, scale, k_row, v_row, table_row,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, V: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    STEP: tl.constexpr, CAUSAL: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The queries' sums with STEP more keys, of which all rows see those before ``whole``."""
    key = start + tl.arange(0, STEP)
    there = key < end
    k0, k1 = load_head(k, cos, sin, key, there, k_row, table_row, D, D0, D1, ACC)
    s = product(q0, q1, k0, k1, D1, ACC)  # (ROWS, STEP)
    if start >= whole:
        seen = end - start
        if CAUSAL:
            seen = tl.minimum(seen, row - start + 1)[:, None]
        # Not arange < seen: the compiler would keep every column's number in a register through the loop.
        s = tl.where(seen - tl.arange(0, STEP)[None, :] > 0, s, float("-inf"))
    p, shrink, most, total_p = _softmax_step(s, most, total_p, scale)
    p = p.to(v.dtype.element_ty)
    # One block of v at a time: both together cost registers that some targets do not have.
    v0 = load_block(v, key, there, v_row, 0, V0, V)
    o0 = tl.dot(p, v0, o0 * shrink[:, None], input_precision="ieee", out_dtype=ACC)
    if V1 > 0:
        v1 = load_block(v, key, there, v_row, V0, V1, V)
        o1 = tl.dot(p, v1, o1 * shrink[:, None], input_precision="ieee", out_dtype=ACC)
    return o0, o1, most, total_p


@jit
def _finish(
    out, lse, o0, o1, most, total_p, row, live, head, total,
    HEADS: tl.constexpr, V: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    total_p = tl.where(live, total_p, 1.0)
    column = total_p[:, None]
    store_head(out + head * V, o0 / column, o1 / column, None, None, row, live, HEADS * V, 0, V, V0, V1, ACC)
    if lse is not None:
        tl.store(lse + head * total + row, most + tl.log2(total_p), mask=live)


@jit(do_not_specialize=["total"])
def _forward_kernel(
    q, k, v, cos, sin, out, lse, tiles, total, scale,
    q_row, q_head, k_row, k_head, v_row, v_head, table_row,
    HEADS: tl.constexpr, GROUP: tl.constexpr, UNIT: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    V: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
    CAUSAL: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    q_head *= UNIT
    k_head *= UNIT
    v_head *= UNIT
    tile = tiles + 3 * tl.program_id(0)
    first, begin, end = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    head = tl.program_id(1).to(tl.int64)
    k += head // GROUP * k_head
    v += head // GROUP * v_head
    row = first + tl.arange(0, ROWS)
    live = row < end
    q0, q1 = load_head(q + head * q_head, cos, sin, row, live, q_row, table_row, D, D0, D1, ACC)
    o0 = tl.zeros((ROWS, V0), ACC)
    o1 = tl.zeros((ROWS, V1 if V1 > 0 else 16), ACC)
    most = tl.full((ROWS,), float("-inf"), ACC)
    total_p = tl.zeros((ROWS,), ACC)
    stop = tl.minimum(end, first + ROWS) if CAUSAL else end
    whole = begin + ((first if CAUSAL else end) - begin) // STEP * STEP
    for start in range(begin, stop, STEP):
        o0, o1, most, total_p = _attend(
            q0, q1, k, v, cos, sin, row, start, whole, end, o0, o1, most, total_p, scale, k_row, v_row, table_row,
            D, D0, D1, V, V0, V1, STEP, CAUSAL, ACC,
        )  # fmt: skip
    _finish(out, lse, o0, o1, most, total_p, row, live, head, total, HEADS, V, V0, V1, ACC)


#: Rows up to which a segment's queries and keys are turned by rotary tables as they are loaded, each key once for every
#: tile of queries; beyond, in one pass of their own. Estimated for Hopper, where turning a key costs a tile about 3.75
#: cycles and the pass 10 kB of traffic a token and layer (16 heads of 80); not measured. Either way has the same bits.
FUSED_ROPE_MAX_SEQLEN = 1024


def fuses_rope(max_seqlen: int, columns: int, target: Target) -> bool:
    """Whether q and k are turned on the way into the kernels.

    Only where matrix instructions read from shared memory, or registers are plenty (AMD's): elsewhere a turned tile
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
    rope: tuple[torch.Tensor, torch.Tensor] | None = None,
    fused: bool = True,
    keep: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(out (T, Hq, Dv), lse)``; lse is ``(Hq, T)`` in powers of two, empty unless ``keep``.

    With ``rope`` q and k are turned first: on the way into the kernel if ``fused``, else by a pass of their own.
    """
    out, lse = _fake_forward(q, k, v, keep)
    total, heads, columns = q.shape
    if out.numel() == 0:
        return out, lse
    cos, sin = tables(rope) if rope is not None and fused else (None, None)
    if rope is not None and cos is None:
        q, k = turned_for_attention(q, k, *rope)
    chosen = forward_config(q.dtype, columns, max_seqlen, target_of(q.device))
    work = plan.tiles(chosen.rows)
    shape = blocks_of(q, v)
    strides, unit = strides_of(q, k, v)
    launch(
        _forward_kernel,
        (work.shape[0], heads),
        q.device,
        q,
        k,
        v,
        cos,
        sin,
        out,
        lse if keep else None,
        work,
        total,
        softmax_scale * math.log2(math.e),
        *strides,
        0 if cos is None else cos.stride(0),
        HEADS=heads,
        GROUP=heads // k.shape[1],
        UNIT=unit,
        **shape,
        ROWS=chosen.rows,
        STEP=chosen.step,
        CAUSAL=causal,
        ACC=accumulator(q.dtype),
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
    )
    return zero_behind(out, plan), lse


def _fake_forward(q, k, v, keep=True):
    wide = torch.promote_types(q.dtype, torch.float32)
    out = torch.empty((q.shape[0], q.shape[1], v.shape[2]), dtype=q.dtype, device=q.device)
    return out, torch.empty((q.shape[1], q.shape[0]) if keep else (0,), dtype=wide, device=q.device)


def _run(q, k, v, cu_seqlens, cos, sin, max_seqlen, causal, softmax_scale, fused):
    plan = plan_for(cu_seqlens, q.shape[0], q.device)
    rope = None if cos is None else (cos, sin)
    return launch_forward(q, k, v, plan, max_seqlen, causal, softmax_scale, rope=rope, fused=fused)


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, cu_seqlens, cos, sin, _, ctx.causal, ctx.scale, ctx.fused = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output, cu_seqlens, cos, sin)


def _backward(ctx, grad, _):
    q, k, v, out, lse, cu_seqlens, cos, sin = ctx.saved_tensors
    arguments = (grad, q, k, v, out, lse, cu_seqlens, cos, sin, ctx.causal, ctx.scale, ctx.fused)
    return *first_order("varlen_attention", torch_ops.attention_backward, *arguments), *[None] * 7


_PACK = "Tensor cu_seqlens, Tensor? cos, Tensor? sin"
_SETTINGS = "bool causal, float softmax_scale, bool fused"
register_opaque(
    f"attention_forward(Tensor q, Tensor k, Tensor v, {_PACK}, int max_seqlen, {_SETTINGS}) -> (Tensor, Tensor)",
    fake=lambda q, k, v, *_: _fake_forward(q, k, v),
    setup_context=_setup_context,
    backward=_backward,
    CPU=_run,
    CUDA=_run,
)
register_opaque(
    f"attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_PACK}, {_SETTINGS})"
    " -> (Tensor, Tensor, Tensor)",
    fake=attention_backward.fake,
    CPU=attention_backward.run,
    CUDA=attention_backward.run,
)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    causal: bool,
    softmax_scale: float,
    *,
    tiles: TilePlan | None = None,
    rope: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """varlen_attention on these kernels."""
    fused = rope is not None and fuses_rope(max_seqlen, q.shape[2], target_of(q.device))
    if direct(q, k, v, cu_seqlens):
        plan = plan_for(cu_seqlens, q.shape[0], q.device) if tiles is None else tiles
        settings = {"rope": rope, "fused": fused, "keep": False}
        return launch_forward(q, k, v, plan, max_seqlen, causal, softmax_scale, **settings)[0]
    cos, sin = (None, None) if rope is None else rope
    settings = (max_seqlen, causal, softmax_scale, fused)
    return torch_ops.attention_forward(q, k, v, cu_seqlens, cos, sin, *settings)[0]
