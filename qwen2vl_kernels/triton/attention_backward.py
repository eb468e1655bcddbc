"""The backward Triton kernels of varlen_attention, without atomics: every result is written by one program.

    delta       sum over columns of o do
    dk, dv      by tiles of keys: dv = p^T do,  dp = do v^T,  ds = p (dp - delta),  dk = scale ds^T q
    dq          by tiles of queries: dq = scale ds k                       together 14 L^2 D, p worked out twice

With rotary tables, q and k are turned as they are loaded and dq and dk turned back as they are stored
(``triton.attention_head``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..core.launching import Target, accumulator, architecture, cdiv, jit, launch, next_power_of_2, target_of, tl
from ..core.tile_plan import plan_for
from .attention_head import (
    blocks_of,
    load_head,
    product,
    store_head,
    strides_of,
    tables,
    turned_back,
    turned_for_attention,
)
from .tail import zero_behind


@dataclass(frozen=True)
class BackwardConfig:
    rows: int  # of the tile that a program owns, keys or queries
    step: int  # rows of the other side that it takes at a time
    num_warps: int
    num_stages: int


_WIDE, _NARROW = BackwardConfig(64, 64, 8, 1), BackwardConfig(64, 32, 8, 1)
_AMD_WIDE, _AMD_NARROW = BackwardConfig(64, 64, 4, 1), BackwardConfig(64, 32, 4, 1)

#: As the forward's: by architecture, the first entry whose columns hold a head's, for the pass over tiles of keys and
#: the one over tiles of queries. Not yet timed on any GPU.
_CONFIGS: dict[int, tuple[tuple[int, BackwardConfig, BackwardConfig], ...]] = {
    80: ((256, _NARROW, _NARROW),),
    90: ((96, _WIDE, _WIDE), (256, _NARROW, _NARROW)),
    100: ((96, _WIDE, _WIDE), (256, _NARROW, _NARROW)),
    120: ((256, _NARROW, _NARROW),),
    0: ((96, _AMD_WIDE, _AMD_WIDE), (256, _AMD_NARROW, _AMD_NARROW)),
}


def backward_config(dtype: torch.dtype, columns: int, target: Target) -> tuple[BackwardConfig, BackwardConfig]:
    """Of the pass that makes dk and dv, and of the one that makes dq."""
    if dtype not in (torch.bfloat16, torch.float16):
        plain = BackwardConfig(32, 32, target.warps(128), 1)
        return plain, plain
    known = _CONFIGS[architecture(target, _CONFIGS)]
    return next((entry[1:] for entry in known if columns <= entry[0]), known[-1][1:])


@jit(do_not_specialize=["total"])
def _delta_kernel(
    out, grad, delta, total, grad_row, grad_head,
    HEADS: tl.constexpr, UNIT: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    grad_head *= UNIT
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK)[None, :]
    mask = (row < total)[:, None] & (column < V)
    o = tl.load(out + row[:, None] * (HEADS * V) + head * V + column, mask=mask, other=0.0).to(ACC)
    g = tl.load(grad + row[:, None] * grad_row + head * grad_head + column, mask=mask, other=0.0).to(ACC)
    tl.store(delta + head * total + row, tl.sum(o * g, 1), mask=row < total)


@jit(do_not_specialize=["total"])
def _key_kernel(
    q, k, v, grad, lse, delta, cos, sin, dk, dv, tiles, total, scale, softmax_scale,
    q_row, q_head, k_row, k_head, v_row, v_head, grad_row, grad_head, table_row,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, UNIT: tl.constexpr, D: tl.constexpr, D0: tl.constexpr,
    D1: tl.constexpr, V: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
    CAUSAL: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of keys: over the query heads that read it, and their rows from the segment."""
    q_head *= UNIT
    k_head *= UNIT
    v_head *= UNIT
    grad_head *= UNIT
    tile = tiles + 3 * tl.program_id(0)
    first, begin, end = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    kv_head = tl.program_id(1).to(tl.int64)
    key = first + tl.arange(0, ROWS)
    there = key < end
    k0, k1 = load_head(k + kv_head * k_head, cos, sin, key, there, k_row, table_row, D, D0, D1, ACC)
    v0, v1 = load_head(v + kv_head * v_head, None, None, key, there, v_row, 0, V, V0, V1, ACC)
    dk0 = tl.zeros((ROWS, D0), ACC)
    dk1 = tl.zeros((ROWS, D1 if D1 > 0 else 16), ACC)
    dv0 = tl.zeros((ROWS, V0), ACC)
    dv1 = tl.zeros((ROWS, V1 if V1 > 0 else 16), ACC)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        for start in range(first if CAUSAL else begin, end, STEP):
            row = start + tl.arange(0, STEP)
            live = row < end
            q0, q1 = load_head(q + head * q_head, cos, sin, row, live, q_row, table_row, D, D0, D1, ACC)
            g0, g1 = load_head(grad + head * grad_head, None, None, row, live, grad_row, 0, V, V0, V1, ACC)
            at = head * total + row
            s = product(k0, k1, q0, q1, D1, ACC) * scale - tl.load(lse + at, mask=live, other=0.0)[None, :]
            seen = live[None, :] & there[:, None]
            if CAUSAL:
                seen = seen & (key[:, None] <= row[None, :])
            p = tl.exp2(tl.where(seen, s, float("-inf")))  # (ROWS keys, STEP queries)
            low = p.to(grad.dtype.element_ty)
            dv0 = tl.dot(low, g0, dv0, input_precision="ieee", out_dtype=ACC)
            if V1 > 0:
                dv1 = tl.dot(low, g1, dv1, input_precision="ieee", out_dtype=ACC)
            ds = p * (product(v0, v1, g0, g1, V1, ACC) - tl.load(delta + at, mask=live, other=0.0)[None, :])
            low = ds.to(q.dtype.element_ty)
            dk0 = tl.dot(low, q0, dk0, input_precision="ieee", out_dtype=ACC)
            if D1 > 0:
                dk1 = tl.dot(low, q1, dk1, input_precision="ieee", out_dtype=ACC)
    dk0, dk1 = dk0 * softmax_scale, dk1 * softmax_scale
    store_head(dk + kv_head * D, dk0, dk1, cos, sin, key, there, KV_HEADS * D, table_row, D, D0, D1, ACC)
    store_head(dv + kv_head * V, dv0, dv1, None, None, key, there, KV_HEADS * V, 0, V, V0, V1, ACC)


@jit(do_not_specialize=["total"])
def _query_kernel(
    q, k, v, grad, lse, delta, cos, sin, dq, tiles, total, scale, softmax_scale,
    q_row, q_head, k_row, k_head, v_row, v_head, grad_row, grad_head, table_row,
    HEADS: tl.constexpr, GROUP: tl.constexpr, UNIT: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    V: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
    CAUSAL: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dq of one tile of queries, over the keys of its segment."""
    q_head *= UNIT
    k_head *= UNIT
    v_head *= UNIT
    grad_head *= UNIT
    tile = tiles + 3 * tl.program_id(0)
    first, begin, end = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    head = tl.program_id(1).to(tl.int64)
    kv_head = head // GROUP
    row = first + tl.arange(0, ROWS)
    live = row < end
    q0, q1 = load_head(q + head * q_head, cos, sin, row, live, q_row, table_row, D, D0, D1, ACC)
    g0, g1 = load_head(grad + head * grad_head, None, None, row, live, grad_row, 0, V, V0, V1, ACC)
    at = head * total + row
    row_lse = tl.load(lse + at, mask=live, other=0.0)[:, None]
    row_delta = tl.load(delta + at, mask=live, other=0.0)[:, None]
    dq0 = tl.zeros((ROWS, D0), ACC)
    dq1 = tl.zeros((ROWS, D1 if D1 > 0 else 16), ACC)
    stop = tl.minimum(end, first + ROWS) if CAUSAL else end
    for start in range(begin, stop, STEP):
        key = start + tl.arange(0, STEP)
        there = key < end
        k0, k1 = load_head(k + kv_head * k_head, cos, sin, key, there, k_row, table_row, D, D0, D1, ACC)
        v0, v1 = load_head(v + kv_head * v_head, None, None, key, there, v_row, 0, V, V0, V1, ACC)
        s = product(q0, q1, k0, k1, D1, ACC) * scale - row_lse
        seen = there[None, :] & live[:, None]
        if CAUSAL:
            seen = seen & (key[None, :] <= row[:, None])
        p = tl.exp2(tl.where(seen, s, float("-inf")))
        ds = (p * (product(g0, g1, v0, v1, V1, ACC) - row_delta)).to(k.dtype.element_ty)
        dq0 = tl.dot(ds, k0, dq0, input_precision="ieee", out_dtype=ACC)
        if D1 > 0:
            dq1 = tl.dot(ds, k1, dq1, input_precision="ieee", out_dtype=ACC)
    dq0, dq1 = dq0 * softmax_scale, dq1 * softmax_scale
    store_head(dq + head * D, dq0, dq1, cos, sin, row, live, HEADS * D, table_row, D, D0, D1, ACC)


def launch_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens: torch.Tensor,
    causal: bool,
    softmax_scale: float,
    *,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    fused: bool = True,
    wide: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(dq, dk, dv)``, contiguous; zero outside of the segments. ``cos``, ``sin`` and ``fused`` as the forward had.

    ``wide``: dq and dk in the accumulator's precision.
    """
    gradients = fake(grad, q, k, v)
    if wide:
        gradients = (*(torch.empty_like(g, dtype=lse.dtype) for g in gradients[:2]), gradients[2])
    if out.numel() == 0:
        return tuple(g.zero_() for g in gradients)  # type: ignore[return-value]
    if cos is not None and sin is not None:
        cos, sin = tables((cos, sin))
    if cos is not None and not fused:
        q, k = turned_for_attention(q, k, cos, sin)
        # Not rounded before they are turned back: the bits must not depend on which way was taken.
        dq, dk, dv = launch_backward(grad, q, k, v, out, lse, cu_seqlens, causal, softmax_scale, wide=True)
        return *turned_back(dq, dk, cos, sin, q.dtype), dv
    dq, dk, dv = gradients
    plan = plan_for(cu_seqlens, q.shape[0], q.device)
    for gradient in gradients:
        zero_behind(gradient, plan)
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    (total, heads, columns), kv_heads, acc = q.shape, k.shape[1], accumulator(q.dtype)
    target = target_of(q.device)
    of_keys, of_queries = backward_config(q.dtype, columns, target)
    delta = torch.empty_like(lse)
    grad_strides, grad_unit = strides_of(grad)
    launch(
        _delta_kernel,
        (cdiv(total, 32), heads),
        q.device,
        out,
        grad,
        delta,
        total,
        *grad_strides,
        HEADS=heads,
        UNIT=grad_unit,
        V=v.shape[2],
        BLOCK=next_power_of_2(v.shape[2]),
        ROWS=32,
        ACC=acc,
        num_warps=target.warps(128),
    )
    scales = (softmax_scale * math.log2(math.e), softmax_scale)
    strides, unit = strides_of(q, k, v, grad)
    strides.append(0 if cos is None else cos.stride(0))
    shared = {**blocks_of(q, v), "GROUP": heads // kv_heads, "UNIT": unit, "CAUSAL": causal, "ACC": acc}
    inputs = (q, k, v, grad, lse, delta, cos, sin)
    work = plan.tiles(of_keys.rows)
    launch(
        _key_kernel, (work.shape[0], kv_heads), q.device, *inputs, dk, dv, work, total, *scales, *strides,
        KV_HEADS=kv_heads, **shared, **_options(of_keys),
    )  # fmt: skip
    work = plan.tiles(of_queries.rows)
    launch(
        _query_kernel, (work.shape[0], heads), q.device, *inputs, dq, work, total, *scales, *strides,
        HEADS=heads, **shared, **_options(of_queries),
    )  # fmt: skip
    return dq, dk, dv


def _options(chosen: BackwardConfig) -> dict[str, int]:
    return {
        "ROWS": chosen.rows, "STEP": chosen.step, "num_warps": chosen.num_warps, "num_stages": chosen.num_stages,
    }  # fmt: skip


def run(grad, q, k, v, out, lse, cu_seqlens, cos, sin, causal, softmax_scale, fused):
    """The op."""
    settings = {"cos": cos, "sin": sin, "fused": fused}
    return launch_backward(grad, q, k, v, out, lse, cu_seqlens, causal, softmax_scale, **settings)


def fake(grad, q, k, v, *_):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
