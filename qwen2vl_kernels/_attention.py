"""The Triton kernels of varlen_attention: forward, and a backward without atomics.

A head of D columns is two blocks, the largest power of two and the rest (80 = 64 + 16), so that the matrix units do
62.5 % of the work that padding to 128 costs. Programs are handed out by a flat list of tiles, (first row, begin and end
of its segment), longest segments first: none is dead, however the lengths differ.

Per segment of L rows and head, with softmax statistics in float32 (FlashAttention 2, arXiv 2307.08691):

    forward     s = q k^T,  p = exp(scale s - lse),  o = p v                             4 L^2 D  FLOPs
    delta       sum over columns of o do
    dk, dv      by tiles of keys: dv = p^T do,  dp = do v^T,  ds = p (dp - delta),  dk = scale ds^T q
    dq          by tiles of queries: dq = scale ds k                       together 14 L^2 D, p worked out twice

Every sum has one order, so results do not depend on the run or on what else is in the pack.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ._library import direct, register_opaque
from ._tiles import tiles
from ._triton import Target, accumulator, cdiv, jit, launch, next_power_of_2, target_of, tl


@dataclass(frozen=True)
class AttentionConfig:
    rows: int  # of the tile that a program owns
    step: int  # rows of the other side that it takes at a time
    num_warps: int
    num_stages: int


def forward_config(dtype: torch.dtype, columns: int, target: Target) -> AttentionConfig:
    """A tile for all lengths, so that no result depends on the pack. Compiles without spills; not yet tuned."""
    if dtype not in (torch.bfloat16, torch.float16):
        return AttentionConfig(32, 32, target.warps(128), 1)
    step = 32 if columns > 96 and _keeps_tiles_in_registers(target) and target.capability >= 120 else 64
    return AttentionConfig(128, step, target.warps(256), 2)


def backward_config(dtype: torch.dtype, columns: int, target: Target) -> AttentionConfig:
    """Of both passes. Compiles without spills; not yet tuned."""
    if dtype not in (torch.bfloat16, torch.float16):
        return AttentionConfig(32, 32, target.warps(128), 1)
    step = 32 if columns > 96 or _keeps_tiles_in_registers(target) else 64
    return AttentionConfig(64, step, target.warps(256), 1)


def _keeps_tiles_in_registers(target: Target) -> bool:
    """Whether both operands of a matrix instruction come from registers, as on all of NVIDIA's but 90 and 100."""
    return target.backend == "cuda" and target.capability // 10 not in (9, 10)


def column_blocks(columns: int) -> tuple[int, int]:
    """The two blocks of a head: powers of two of at least 16 (a matrix instruction's least), the second may be 0."""
    first = max(16, 1 << (columns.bit_length() - 1))
    rest = columns - first
    return first, max(16, next_power_of_2(rest)) if rest > 0 else 0


@jit
def _rows_of(x, row, live, x_row, START: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    """``(rows, BLOCK)``: columns [START, START + BLOCK) of the rows, zero where not ``live`` or from COLUMNS on."""
    column = START + tl.arange(0, BLOCK)[None, :]
    at = x + row.to(tl.int64)[:, None] * x_row + column
    if START + BLOCK <= COLUMNS:
        return tl.load(at, mask=live[:, None], other=0.0)
    return tl.load(at, mask=live[:, None] & (column < COLUMNS), other=0.0)


@jit
def _store_rows(x, value, row, live, x_row, START: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    column = START + tl.arange(0, BLOCK)[None, :]
    at = x + row.to(tl.int64)[:, None] * x_row + column
    tl.store(at, value.to(x.dtype.element_ty), mask=live[:, None] & (column < COLUMNS))


@jit
def _head(x, row, live, x_row, FIRST: tl.constexpr, SECOND: tl.constexpr, COLUMNS: tl.constexpr):
    """Both blocks of columns of the rows; the second is only there to be named where its size is 0."""
    first = _rows_of(x, row, live, x_row, 0, FIRST, COLUMNS)
    second = first
    if SECOND > 0:
        second = _rows_of(x, row, live, x_row, FIRST, SECOND, COLUMNS)
    return first, second


@jit
def _store_head(x, first, second, row, live, x_row, FIRST: tl.constexpr, SECOND: tl.constexpr, COLUMNS: tl.constexpr):
    _store_rows(x, first, row, live, x_row, 0, FIRST, COLUMNS)
    if SECOND > 0:
        _store_rows(x, second, row, live, x_row, FIRST, SECOND, COLUMNS)


@jit
def _product(a0, a1, b0, b1, REST: tl.constexpr, ACC: tl.constexpr):
    """``a b^T`` over both blocks of columns."""
    out = tl.dot(a0, tl.trans(b0), input_precision="ieee", out_dtype=ACC)
    if REST > 0:
        out = tl.dot(a1, tl.trans(b1), out, input_precision="ieee", out_dtype=ACC)
    return out


@jit(do_not_specialize=["total"])
def _forward_kernel(
    q, k, v, out, lse, tiles, total, scale,
    q_row, q_head, k_row, k_head, v_row, v_head,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    V: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
    CAUSAL: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    tile = tiles + 3 * tl.program_id(0)
    first, begin, end = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    head = tl.program_id(1).to(tl.int64)
    q += head * q_head
    k += head // GROUP * k_head
    v += head // GROUP * v_head
    row = first + tl.arange(0, ROWS)
    live = row < end
    q0, q1 = _head(q, row, live, q_row, D0, D1, D)
    o0 = tl.zeros((ROWS, V0), ACC)
    o1 = tl.zeros((ROWS, V1 if V1 > 0 else 16), ACC)
    most = tl.full((ROWS,), float("-inf"), ACC)
    total_p = tl.zeros((ROWS,), ACC)
    stop = tl.minimum(end, first + ROWS) if CAUSAL else end
    for start in range(begin, stop, STEP):
        key = start + tl.arange(0, STEP)
        there = key < end
        k0, k1 = _head(k, key, there, k_row, D0, D1, D)
        s = _product(q0, q1, k0, k1, D1, ACC) * scale  # (ROWS, STEP), in powers of two
        seen = there[None, :]
        if CAUSAL:
            seen = seen & (key[None, :] <= row[:, None])
        s = tl.where(seen, s, float("-inf"))
        new = tl.maximum(most, tl.max(s, 1))
        p = tl.exp2(s - new[:, None])
        shrink = tl.exp2(most - new)
        total_p = total_p * shrink + tl.sum(p, 1)
        most = new
        p = p.to(v.dtype.element_ty)
        # One block of v at a time: both together cost registers that some targets do not have.
        v0 = _rows_of(v, key, there, v_row, 0, V0, V)
        o0 = tl.dot(p, v0, o0 * shrink[:, None], input_precision="ieee", out_dtype=ACC)
        if V1 > 0:
            v1 = _rows_of(v, key, there, v_row, V0, V1, V)
            o1 = tl.dot(p, v1, o1 * shrink[:, None], input_precision="ieee", out_dtype=ACC)
    total_p = tl.where(live, total_p, 1.0)
    total_column = total_p[:, None]
    _store_head(out + head * V, o0 / total_column, o1 / total_column, row, live, HEADS * V, V0, V1, V)
    if lse is not None:
        tl.store(lse + head * total + row, most + tl.log2(total_p), mask=live)


@jit(do_not_specialize=["total"])
def _delta_kernel(
    out, grad, delta, total, grad_row, grad_head,
    HEADS: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK)[None, :]
    mask = (row < total)[:, None] & (column < V)
    o = tl.load(out + row[:, None] * (HEADS * V) + head * V + column, mask=mask, other=0.0).to(ACC)
    g = tl.load(grad + row[:, None] * grad_row + head * grad_head + column, mask=mask, other=0.0).to(ACC)
    tl.store(delta + head * total + row, tl.sum(o * g, 1), mask=row < total)


@jit(do_not_specialize=["total"])
def _key_kernel(
    q, k, v, grad, lse, delta, dk, dv, tiles, total, scale, softmax_scale,
    q_row, q_head, k_row, k_head, v_row, v_head, grad_row, grad_head,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    V: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
    CAUSAL: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of keys: over the query heads that read it, and their rows from the segment."""
    tile = tiles + 3 * tl.program_id(0)
    first, begin, end = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    kv_head = tl.program_id(1).to(tl.int64)
    key = first + tl.arange(0, ROWS)
    there = key < end
    k0, k1 = _head(k + kv_head * k_head, key, there, k_row, D0, D1, D)
    v0, v1 = _head(v + kv_head * v_head, key, there, v_row, V0, V1, V)
    dk0 = tl.zeros((ROWS, D0), ACC)
    dk1 = tl.zeros((ROWS, D1 if D1 > 0 else 16), ACC)
    dv0 = tl.zeros((ROWS, V0), ACC)
    dv1 = tl.zeros((ROWS, V1 if V1 > 0 else 16), ACC)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        for start in range(first if CAUSAL else begin, end, STEP):
            row = start + tl.arange(0, STEP)
            live = row < end
            q0, q1 = _head(q + head * q_head, row, live, q_row, D0, D1, D)
            g0, g1 = _head(grad + head * grad_head, row, live, grad_row, V0, V1, V)
            at = head * total + row
            s = _product(k0, k1, q0, q1, D1, ACC) * scale - tl.load(lse + at, mask=live, other=0.0)[None, :]
            seen = live[None, :] & there[:, None]
            if CAUSAL:
                seen = seen & (key[:, None] <= row[None, :])
            p = tl.exp2(tl.where(seen, s, float("-inf")))  # (ROWS keys, STEP queries)
            low = p.to(grad.dtype.element_ty)
            dv0 = tl.dot(low, g0, dv0, input_precision="ieee", out_dtype=ACC)
            if V1 > 0:
                dv1 = tl.dot(low, g1, dv1, input_precision="ieee", out_dtype=ACC)
            ds = p * (_product(v0, v1, g0, g1, V1, ACC) - tl.load(delta + at, mask=live, other=0.0)[None, :])
            low = ds.to(q.dtype.element_ty)
            dk0 = tl.dot(low, q0, dk0, input_precision="ieee", out_dtype=ACC)
            if D1 > 0:
                dk1 = tl.dot(low, q1, dk1, input_precision="ieee", out_dtype=ACC)
    dk0, dk1 = dk0 * softmax_scale, dk1 * softmax_scale
    _store_head(dk + kv_head * D, dk0, dk1, key, there, KV_HEADS * D, D0, D1, D)
    _store_head(dv + kv_head * V, dv0, dv1, key, there, KV_HEADS * V, V0, V1, V)


@jit(do_not_specialize=["total"])
def _query_kernel(
    q, k, v, grad, lse, delta, dq, tiles, total, scale, softmax_scale,
    q_row, q_head, k_row, k_head, v_row, v_head, grad_row, grad_head,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    V: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
    CAUSAL: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dq of one tile of queries, over the keys of its segment."""
    tile = tiles + 3 * tl.program_id(0)
    first, begin, end = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    head = tl.program_id(1).to(tl.int64)
    kv_head = head // GROUP
    row = first + tl.arange(0, ROWS)
    live = row < end
    q0, q1 = _head(q + head * q_head, row, live, q_row, D0, D1, D)
    g0, g1 = _head(grad + head * grad_head, row, live, grad_row, V0, V1, V)
    at = head * total + row
    row_lse = tl.load(lse + at, mask=live, other=0.0)[:, None]
    row_delta = tl.load(delta + at, mask=live, other=0.0)[:, None]
    dq0 = tl.zeros((ROWS, D0), ACC)
    dq1 = tl.zeros((ROWS, D1 if D1 > 0 else 16), ACC)
    stop = tl.minimum(end, first + ROWS) if CAUSAL else end
    for start in range(begin, stop, STEP):
        key = start + tl.arange(0, STEP)
        there = key < end
        k0, k1 = _head(k + kv_head * k_head, key, there, k_row, D0, D1, D)
        v0, v1 = _head(v + kv_head * v_head, key, there, v_row, V0, V1, V)
        s = _product(q0, q1, k0, k1, D1, ACC) * scale - row_lse
        seen = there[None, :] & live[:, None]
        if CAUSAL:
            seen = seen & (key[None, :] <= row[:, None])
        p = tl.exp2(tl.where(seen, s, float("-inf")))
        ds = (p * (_product(g0, g1, v0, v1, V1, ACC) - row_delta)).to(k.dtype.element_ty)
        dq0 = tl.dot(ds, k0, dq0, input_precision="ieee", out_dtype=ACC)
        if D1 > 0:
            dq1 = tl.dot(ds, k1, dq1, input_precision="ieee", out_dtype=ACC)
    _store_head(dq + head * D, dq0 * softmax_scale, dq1 * softmax_scale, row, live, HEADS * D, D0, D1, D)


def _shape(q: torch.Tensor, v: torch.Tensor) -> dict[str, int]:
    (d0, d1), (v0, v1) = column_blocks(q.shape[2]), column_blocks(v.shape[2])
    return {"D": q.shape[2], "D0": d0, "D1": d1, "V": v.shape[2], "V0": v0, "V1": v1}


def _rows_between(x: torch.Tensor, cu_seqlens: torch.Tensor) -> None:
    """Zero the rows of a fresh output that no segment holds."""
    if cu_seqlens.device.type == "cpu":
        x[int(cu_seqlens[-1]) :].zero_()
    else:  # where they begin is not known here
        x.zero_()


def launch_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    causal: bool,
    softmax_scale: float,
    keep: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(out (T, Hq, Dv), lse)``; lse is ``(Hq, T)`` in powers of two, empty unless ``keep``."""
    out, lse = _fake_forward(q, k, v, cu_seqlens, causal, softmax_scale, keep)
    total, heads, columns = q.shape
    if out.numel() == 0:
        return out, lse
    _rows_between(out, cu_seqlens)
    chosen = forward_config(q.dtype, columns, target_of(q.device))
    work = tiles(cu_seqlens, chosen.rows, total, q.device)
    launch(
        _forward_kernel,
        (work.shape[0], heads),
        q.device,
        q,
        k,
        v,
        out,
        lse if keep else None,
        work,
        total,
        softmax_scale * math.log2(math.e),
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        HEADS=heads,
        GROUP=heads // k.shape[1],
        **_shape(q, v),
        ROWS=chosen.rows,
        STEP=chosen.step,
        CAUSAL=causal,
        ACC=accumulator(q.dtype),
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
    )
    return out, lse


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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(dq, dk, dv)``, contiguous; zero outside of the segments."""
    gradients = _fake_backward(grad, q, k, v)
    if out.numel() == 0:
        return tuple(g.zero_() for g in gradients)  # type: ignore[return-value]
    dq, dk, dv = gradients
    for gradient in gradients:
        _rows_between(gradient, cu_seqlens)
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    (total, heads, columns), kv_heads, acc = q.shape, k.shape[1], accumulator(q.dtype)
    target = target_of(q.device)
    chosen = backward_config(q.dtype, columns, target)
    delta = torch.empty_like(lse)
    launch(
        _delta_kernel,
        (cdiv(total, 32), heads),
        q.device,
        out,
        grad,
        delta,
        total,
        *grad.stride()[:2],
        HEADS=heads,
        V=v.shape[2],
        BLOCK=next_power_of_2(v.shape[2]),
        ROWS=32,
        ACC=acc,
        num_warps=target.warps(128),
    )
    work = tiles(cu_seqlens, chosen.rows, total, q.device)
    scales = (softmax_scale * math.log2(math.e), softmax_scale)
    strides = [stride for x in (q, k, v, grad) for stride in x.stride()[:2]]
    shared = {**_shape(q, v), "GROUP": heads // kv_heads, "ROWS": chosen.rows, "STEP": chosen.step, "CAUSAL": causal}
    options = {"ACC": acc, "num_warps": chosen.num_warps, "num_stages": chosen.num_stages}
    inputs = (q, k, v, grad, lse, delta)
    launch(
        _key_kernel, (work.shape[0], kv_heads), q.device, *inputs, dk, dv, work, total, *scales, *strides,
        KV_HEADS=kv_heads, **shared, **options,
    )  # fmt: skip
    launch(
        _query_kernel, (work.shape[0], heads), q.device, *inputs, dq, work, total, *scales, *strides,
        HEADS=heads, **shared, **options,
    )  # fmt: skip
    return dq, dk, dv


def _fake_forward(q, k, v, cu_seqlens, causal, softmax_scale, keep=True):
    wide = torch.promote_types(q.dtype, torch.float32)
    out = torch.empty((q.shape[0], q.shape[1], v.shape[2]), dtype=q.dtype, device=q.device)
    return out, torch.empty((q.shape[1], q.shape[0]) if keep else (0,), dtype=wide, device=q.device)


def _fake_backward(grad, q, k, v, *_):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, cu_seqlens, ctx.causal, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output, cu_seqlens)


def _backward(ctx, grad, _):
    q, k, v, out, lse, cu_seqlens = ctx.saved_tensors
    arguments = (grad, q, k, v, out, lse, cu_seqlens, ctx.causal, ctx.scale)
    return *torch.ops.qwen2vl.attention_backward(*arguments), None, None, None


register_opaque(
    "attention_forward(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, bool causal, float softmax_scale)"
    " -> (Tensor, Tensor)",
    fake=_fake_forward,
    setup_context=_setup_context,
    backward=_backward,
    CPU=launch_forward,
    CUDA=launch_forward,
)
register_opaque(
    "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor cu_seqlens,"
    " bool causal, float softmax_scale) -> (Tensor, Tensor, Tensor)",
    fake=_fake_backward,
    CPU=launch_backward,
    CUDA=launch_backward,
)


def attention(q, k, v, cu_seqlens, causal: bool, softmax_scale: float) -> torch.Tensor:
    """varlen_attention on these kernels."""
    if direct(q, k, v, cu_seqlens):
        return launch_forward(q, k, v, cu_seqlens, causal, softmax_scale, keep=False)[0]
    return torch.ops.qwen2vl.attention_forward(q, k, v, cu_seqlens, causal, softmax_scale)[0]
