"""Softmax attention inside the segments of one packed sequence.

    o_i = sum_j softmax_j(softmax_scale * q_i . k_j) v_j,   j over i's own segment (and j <= i when causal)

Segment s is rows ``cu_seqlens[s] .. cu_seqlens[s + 1]``: an image, a video frame pair, or one text of a batch
(block-diagonal attention as in FlashAttention's varlen interface, arXiv 2307.08691). For lengths 2 and 3:

    o o . . .          causal:  o . . . .
    o o . . .                   o o . . .
    . . o o o                   . . o . .
    . . o o o                   . . o o .
    . . o o o                   . . o o o

Queries and keys may have boundaries of their own, as where a chat's new turn meets what it has in a cache. A causal
mask is then aligned at the bottom right, where both end. For 2 queries over 4 keys, and for 3 over 2:

    o o o .            . .
    o o o o            o .
                       o o

A query that sees no key has zeros for a result, and minus infinity for the log of its sum, lse_i = log sum_j
exp(softmax_scale * q_i . k_j).

Shapes: q ``(T, Hq, D)``, k ``(T, Hk, D)``, v ``(T, Hk, Dv)``, Hq a multiple of Hk (query head h reads key head
``h // (Hq / Hk)``), cu_seqlens ``(S + 1,)`` int32. dtypes: float32, bfloat16, float16. With ``rope`` q and k are first
rotated, pairs (j, j + D/2) by the angles of their row (RoFormer, arXiv 2104.09864, in transformers' order of columns).
Triton's kernels are in ``triton.attention_forward`` and ``triton.attention_backward``, Hopper's own forward in
``core.attention_sm90``, others' in ``core.attention_peers``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from ..core import attention_calls, attention_sm90
from ..core.attention_checks import check_boundaries, check_rope, check_rows, split_boundaries
from ..core.attention_choice import OURS, chosen
from ..core.attention_cpu import blocked, joined, keeps_statistics, sdpa, sdpa_backward, segments_of
from ..core.attention_cpu import sdpa_with_statistics as sdpa_and_lse
from ..core.attention_peers import PEERS
from ..core.backends import resolve
from ..core.checks import Checker
from ..core.launching import like, target_of
from ..core.library import direct, first_order, register_opaque, watched
from ..core.matmul import in_autocast_dtype
from ..core.namespace import torch_ops
from ..core.rotation import rotate
from ..core.tile_plan import TilePlan, check_bounds, check_tiles, plan_for
from ..triton.attention_backward import launch_backward
from ..triton.attention_forward import fake_forward, fuses_rope, launch_forward
from ..triton.rotary import rotated
from ..triton.tail import zero_behind


def varlen_attention_ref(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    causal: bool = False,
    softmax_scale: float | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    *,
    upcast: bool = False,
    return_lse: bool = False,
) -> Any:
    """The formula, segment by segment, the softmax in (at least) float32; everything in it with ``upcast``.

    Rows past ``cu_seqlens[-1]`` are zero, and minus infinity in lse ``(Hq, T)``. Reads boundaries on the host.
    """
    out_dtype, wide = q.dtype, torch.promote_types(q.dtype, torch.float32)
    if upcast:
        q, k, v = q.to(wide), k.to(wide), v.to(wide)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    group = q.shape[1] // k.shape[1]
    parts, logs = [], []
    for rows, keys in segments_of(cu_seqlens, cu_seqlens_k):
        past = keys.stop - keys.start - (rows.stop - rows.start)
        blind = max(0, -past) if causal else 0  # queries that see no key
        qs = q[rows][blind:].transpose(0, 1)  # (Hq, L, D)
        ks = k[keys].transpose(0, 1).repeat_interleave(group, 0)
        vs = v[keys].transpose(0, 1).repeat_interleave(group, 0)
        # Scaling q first keeps float16 scores finite: Qwen2's key biases push q.k past 65504.
        scores = ((qs * scale) @ ks.transpose(1, 2)).to(wide)  # (Hq, L, keys)
        if causal:
            future = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(max(past, 0) + 1)
            scores = scores.masked_fill(future, float("-inf"))
        attended = (scores.softmax(-1).to(v.dtype) @ vs).transpose(0, 1).to(out_dtype)
        parts.append(F.pad(attended, (0, 0, 0, 0, blind, 0)))
        logs.append(F.pad(scores.logsumexp(-1).t(), (0, 0, blind, 0), value=float("-inf")))
    out = joined(parts, q.shape[0], q.new_empty((0, q.shape[1], v.shape[2]), dtype=out_dtype))
    lse = joined(logs, q.shape[0], q.new_empty((0, q.shape[1]), dtype=wide), float("-inf")).t()
    return (out, lse) if return_lse else out


# ------------------------------------------------------------- our kernels and others', which work by a plan of tiles


def _forward(q, k, v, plan: TilePlan, cos, sin, longest, causal, scale, fused, backend, keep=True):
    """``(out, lse)``, where lse is what the backend's backward takes; zero behind the last segment."""
    if backend == "triton":
        rope = {"cos": cos, "sin": sin, "fused": fused}
        return launch_forward(q, k, v, plan, longest[0], causal, scale, **rope, keep=keep)
    if backend == "sm90":
        out, lse = attention_sm90.launch_forward(q, k, v, plan, longest[1], causal, scale, keep)
    else:
        out, lse = attention_calls.forward(backend, q, k, v, plan, longest, causal, scale, keep)
    return zero_behind(out, plan.queries), lse


def _backward(dout, dlse, q, k, v, out, lse, plan: TilePlan, cos, sin, longest, causal, scale, fused, backend):
    """``(dq, dk, dv)``, zero behind the last segment."""
    if backend in OURS:
        options = {"dlse": dlse, "cos": cos, "sin": sin, "fused": fused}
        return launch_backward(dout, q, k, v, out, lse, plan, causal, scale, **options)
    grads = attention_calls.backward(backend, dout, q, k, v, out, lse, plan, longest, causal, scale)
    sides = plan.queries, plan.keys, plan.keys
    return tuple(zero_behind(x, side) for x, side in zip(grads, sides, strict=True))


class _Planned(torch.autograd.Function):
    """These with gradients, where nothing but autograd watches: the plan that was given serves both passes."""

    @staticmethod
    def forward(ctx, q, k, v, cos, sin, plan, settings, with_lse):
        out, lse = _forward(q, k, v, plan, cos, sin, *settings)
        ctx.plan, ctx.settings, ctx.with_lse = plan, settings, with_lse
        ctx.set_materialize_grads(False)
        _keep(ctx, out, lse, q, k, v, cos, sin)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        q, k, v, out, lse, cos, sin = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else dout
        arguments = dout, dlse, q, k, v, out, lse, ctx.plan, cos, sin, *ctx.settings
        return *first_order("varlen_attention", _backward, *arguments), *[None] * 5


def _keep(ctx, out, lse, q, k, v, cos, sin, *boundaries) -> None:
    if not ctx.with_lse:
        ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse, cos, sin, *boundaries)


# --------------------------------------------------------------------- all backends as one op, for compilers and hooks


def _keeps(q, v, cu_seqlens_k) -> bool:  # what its backward takes, which knows no past
    return cu_seqlens_k is None and keeps_statistics(q, v)


def _widens(q, v, cu_seqlens_k) -> bool:
    """Whether the op's own backward takes short segments through float32, which PyTorch's own does not."""
    return q.dtype.itemsize < 4 and _keeps(q, v, cu_seqlens_k)


def _tracked(q, k, v) -> bool:
    return torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)


#: Those that work by a plan of tiles.
_WITH_PLAN = (*OURS, *PEERS)
#: Those that read boundaries on the host, and need no bound of the lengths.
_BACKENDS = {"eager": varlen_attention_ref, "sdpa": sdpa, "blocked": blocked}


def _attend(backend, q, k, v, cu_seqlens, cu_seqlens_k, causal, scale) -> torch.Tensor:
    out = _BACKENDS[backend](q, k, v, cu_seqlens, causal, scale, cu_seqlens_k)
    if _tracked(q, k, v) and not out.requires_grad:
        # No segment has rows: these zeros came from nothing, and what asks for gradients gets zeros, too.
        out = out + (q[:0].sum() + k[:0].sum() + v[:0].sum())
    return out


def _run(q, k, v, cu_seqlens, cu_seqlens_k, cos, sin, most_q, most_k, causal, scale, fused, with_lse, backend):
    """``(out, lse)``, where lse is what the backend's backward takes, or empty."""
    if backend in _WITH_PLAN:
        plan = plan_for(cu_seqlens, q.shape[0], q.device, cu_seqlens_k, k.shape[0])
        return _forward(q, k, v, plan, cos, sin, (most_q, most_k), causal, scale, fused, backend)
    if backend == "sdpa" and (with_lse or _keeps(q, v, cu_seqlens_k)):
        return sdpa_and_lse(q, k, v, cu_seqlens, causal, scale, cu_seqlens_k)
    if with_lse:
        out, lse = varlen_attention_ref(q, k, v, cu_seqlens, causal, scale, cu_seqlens_k, return_lse=True)
        return out.contiguous(), lse.contiguous()
    return _attend(backend, q, k, v, cu_seqlens, cu_seqlens_k, causal, scale).contiguous(), q.new_empty(0)


def _run_backward(
    dout, dlse, q, k, v, out, lse, cos, sin, cu_seqlens, cu_seqlens_k, most_q, most_k, causal, scale, fused, backend
):
    if backend in _WITH_PLAN:
        plan = plan_for(cu_seqlens, q.shape[0], q.device, cu_seqlens_k, k.shape[0])
        settings = (most_q, most_k), causal, scale, fused, backend
        return _backward(dout, dlse, q, k, v, out, lse, plan, cos, sin, *settings)
    if backend == "sdpa" and _keeps(q, v, cu_seqlens_k):
        return sdpa_backward(dout, q, k, v, out, lse, cu_seqlens, causal, scale)
    # The formula, and PyTorch's attention where it picks a kernel of its own by the shape, keep nothing between two
    # operators, so the forward is run once more.
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    with torch.enable_grad():
        if dlse is None:
            again, given = _attend(backend, q, k, v, cu_seqlens, cu_seqlens_k, causal, scale), dout
        else:
            again = varlen_attention_ref(q, k, v, cu_seqlens, causal, scale, cu_seqlens_k, return_lse=True)
            given = dout, dlse
    return tuple(g.contiguous() for g in torch.autograd.grad(again, (q, k, v), given))


def _fake(q, k, v, cu_seqlens, cu_seqlens_k, cos, sin, most_q, most_k, causal, scale, fused, with_lse, backend):
    wide = torch.promote_types(q.dtype, torch.float32)
    if backend in OURS:
        return fake_forward(q, k, v)
    if backend in PEERS:  # of one shape for all: cuDNN's changed between versions
        lse = q.new_empty(q.shape[0] * q.shape[1], dtype=torch.float32)
    elif backend == "sdpa" and (with_lse or _keeps(q, v, cu_seqlens_k)):
        lse = q.new_empty(q.shape[:2], dtype=wide)
    else:
        lse = q.new_empty((q.shape[1], q.shape[0]) if with_lse else 0, dtype=wide if with_lse else q.dtype)
    return q.new_empty((q.shape[0], q.shape[1], v.shape[2])), lse


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, cu_seqlens, cu_seqlens_k, cos, sin, *ctx.settings, ctx.with_lse, backend = inputs
    ctx.settings.append(backend)
    _keep(ctx, *output, q, k, v, cos, sin, cu_seqlens, cu_seqlens_k)


def _backward_of_op(ctx, dout, dlse):
    arguments = dout, dlse if ctx.with_lse else None, *ctx.saved_tensors, *ctx.settings
    grads = first_order("varlen_attention", torch_ops.varlen_attention_backward, *arguments)
    return *grads, *[None] * 11


def _check_op(q, k, v, bounds, of_keys, cos, sin, most_q, most_k, *rest) -> Checker:
    """As for the public function: the boundaries' contents where reading them costs no wait."""
    check, packed = Checker("varlen_attention"), of_keys is None
    check_rows(check, q, k, v, packed)
    for side, x, rows, most in (("", bounds, q, most_q), ("_k", of_keys, k, most_k)):
        if x is not None:
            check_boundaries(check, q, x, most, side)
            if x.device.type == "cpu":
                check_bounds(check, x.tolist(), rows.shape[0], most, side)
    if cos is not None or sin is not None:
        check_rope(check, q, (cos, sin))
    if rest[-1] == "triton":  # the others look where tensors are
        resolve("varlen_attention", q.device.type, rest[-1])
    return check


def _check_backward(dout, dlse, q, k, v, out, lse, cos, sin, bounds, of_keys, *options) -> None:
    check = _check_op(q, k, v, bounds, of_keys, cos, sin, *options)
    for name, x in (("dout", dout), ("out", out)):
        check.tensor(name, x, ("T", "Hq", "Dv"))
    rows = q.shape[0] * q.shape[1]  # of the statistics, in the layout of whoever made them
    for name, x in (("lse", lse), ("dlse", dlse)):
        if x is not None and (options[-1] in _WITH_PLAN or x.numel()):
            check.require(x.numel() == rows, f"{name} must have {rows} values, got shape {tuple(x.shape)}")


_PACK = "Tensor cu_seqlens, Tensor? cu_seqlens_k"
_OPTIONS = "SymInt max_seqlen_q, SymInt max_seqlen_k, bool causal, float softmax_scale, bool fused"
register_opaque(
    f"varlen_attention(Tensor q, Tensor k, Tensor v, {_PACK}, Tensor? cos, Tensor? sin, {_OPTIONS}, bool with_lse,"
    " str backend) -> (Tensor, Tensor)",
    fake=_fake,
    check=_check_op,
    setup_context=_setup_context,
    backward=_backward_of_op,
    CPU=_run,
    CUDA=_run,
)
register_opaque(
    "varlen_attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
    f" Tensor? cos, Tensor? sin, {_PACK}, {_OPTIONS}, str backend) -> (Tensor, Tensor, Tensor)",
    fake=lambda dout, dlse, q, k, v, *_: like(q, k, v),
    check=_check_backward,
    CPU=_run_backward,
    CUDA=_run_backward,
)


def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
    *,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    causal: bool = False,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    tiles: TilePlan | None = None,
    rope: tuple[torch.Tensor, torch.Tensor] | None = None,
    invariant: bool = False,
    backend: str | None = None,
) -> Any:
    """Attention over packed variable-length segments.

    Args:
        q: ``(T, Hq, D)``, any token and head strides, last dimension contiguous.
        k: ``(T, Hk, D)``, v: ``(T, Hk, Dv)``, likewise, q's dtype; Hq a multiple of Hk.
        cu_seqlens: ``(S + 1,)`` int32 row at which each segment starts, then the last one's end; non-decreasing,
            first entry 0, last at most T. Repeated values are empty segments. On q's device or on the CPU.
        max_seqlen: an upper bound of the segments' lengths. A tight one counts where others' kernels are chosen: they
            launch programs for as many rows in every segment, and a captured graph replays these: longer segments are
            refused then, by :meth:`TilePlan.update_` or by an assertion on the device.
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k: in the place of those two, as in flash-attention, where
            keys have boundaries (and a number of rows) of their own: segment s of q attends to segment s of k.
        causal: a row sees only rows of its segment up to itself; with boundaries of their own, both ends meet.
        softmax_scale: default ``D ** -0.5``; positive.
        return_lse: also return lse, by which results over parts of the keys can be added up. Its gradients are served
            by ``"triton"``, ``"sm90"`` and ``"eager"``.
        tiles: :func:`plan_tiles` of these boundaries, which all layers share: what is worked by, forward and backward,
            whatever the boundaries hold by then. Without it a plan is made at the first call with a ``cu_seqlens``, and
            again when that was written to: on the host by any way, on a GPU by PyTorch's operations. What writes to it
            there in another way, as a kernel of yours may, goes with ``tiles``.
        rope: ``(cos, sin)``, ``(T, D/2)`` each, of any float dtype, without gradients: q and k are rotated first, and
            keep what they held. The Triton kernels rotate them as they load them where segments are short and in a
            pass of its own where they are long, with the same bits; others' and ``"sm90"`` always by such a pass. For
            packed sequences only.
        invariant: the same bits twice, forward and backward, and a segment's bits do not depend on what it is packed
            with. On a GPU ``"triton"`` promises that, and runs, for float32 too, and ``"sm90"`` by name; on a CPU every
            backend does. ``torch.use_deterministic_algorithms(True)`` chooses the same.
        backend: ``None`` chooses by a table of measurements (``qwen2vl info`` prints it): the architecture, dtype, D,
            ``max_seqlen``, and whether gradients are wanted; where nobody measured, PyTorch's own kernel. Or

            - ``"triton"``: reads nothing on the host, can be captured in a CUDA graph; deterministic, and a segment's
              result does not depend on what it is packed with.
            - ``"sm90"``: the same in CUDA C++, the backward Triton's: on capability 9.0 where it was built, for 16-bit
              heads of 64, 72, 80, 96 or 128. No GPU has run it yet.
            - ``"torch"``: PyTorch's own FlashAttention 2; ``"flash"``: flash-attn 4, 3 (also its forward alone, of
              ``fa3-fwd``) or 2, the newest installed that serves the call. They read nothing on the host either, and
              promise neither.
            - ``"cudnn"``: cuDNN on packs, by PyTorch's operators; promises neither. It makes a plan for every new
              shape, PyTorch 2.10 at every call. Gradients from PyTorch 2.14 on.
            - ``"sdpa"``: PyTorch's fused attention, once a segment, or once for all when they are equally long.
            - ``"blocked"``: CPU, no backward: blocked matrix products for segments of 256 rows or more, ``"sdpa"`` for
              shorter ones; chosen for bf16 on AMD's CPUs that have matrix products of it.
            - ``"eager"``: the formula.

            The last three read ``cu_seqlens`` on the host, which waits for the device if it lies there.

    Under autocast q, k and v are taken in its dtype, as PyTorch does for matrix products.

    Returns ``(T, Hq, Dv)``; rows past q's last segment are zero. With ``return_lse`` also lse ``(Hq, T)`` in float32
    (float64 for float64), a natural logarithm; minus infinity where a row sees no key. Raises
    ``TypeError``/``ValueError`` naming the argument that does not fit; a backend that cannot serve the call is a
    :class:`BackendError` with the reason.
    """
    q, k, v = in_autocast_dtype(q, k, v)
    check = Checker("varlen_attention")
    lengths = cu_seqlens, max_seqlen, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    bounds, of_keys, longest = split_boundaries(*lengths)
    packed = of_keys is None
    check_rows(check, q, k, v, packed)
    check_boundaries(check, q, bounds, longest[0], "" if packed else "_q")
    if not packed:
        check_boundaries(check, q, of_keys, longest[1], "_k")
    ok = softmax_scale is None or softmax_scale > 0
    check.require(ok, f"softmax_scale must be positive, got {softmax_scale!r}")
    if rope is not None:
        check.require(packed, "rope is for packed sequences, where queries and keys share their rows' angles")
        check_rope(check, q, rope)
    traced = torch.compiler.is_compiling() or type(q) is not torch.Tensor or q.is_meta
    if tiles is not None:
        check_tiles(check, tiles, q, k, bounds, longest, packed, traced)
        bounds, of_keys = tiles.queries.cu_seqlens, None if packed else tiles.keys.cu_seqlens
    elif not traced and bounds.device.type == "cpu":  # nor is it to be compiled in: it would serve one number of rows
        check_bounds(check, bounds.tolist(), q.shape[0], longest[0], "" if packed else "_q")
        if of_keys is not None and of_keys.device.type == "cpu":
            check_bounds(check, of_keys.tolist(), k.shape[0], longest[1], "_k")

    facts = {"causal": causal, "invariant": invariant, "segments": bounds.shape[0] - 1, "split": not packed}
    name = chosen(q, k, v, max(longest), **facts, statistics=return_lse, backend=backend)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    (cos, sin), fused = (None, None) if rope is None else rope, False
    if name == "triton":
        fused = rope is not None and fuses_rope(longest[0], q.shape[2], target_of(q.device))
    elif rope is not None:
        q, k = _rotated(q, k, rope, name)
        cos = sin = None
    if name in _WITH_PLAN:
        settings = longest, causal, scale, fused, name
        alone = direct(q, k, v, bounds, of_keys)
        if alone or not (traced or watched()):
            plan = tiles or plan_for(bounds, q.shape[0], q.device, of_keys, k.shape[0])
            if not alone:
                out, lse = _Planned.apply(q, k, v, cos, sin, plan, settings, return_lse)  # type: ignore[misc]
            elif name == "triton":
                options = {"cos": cos, "sin": sin, "fused": fused, "keep": return_lse}
                out, lse = launch_forward(q, k, v, plan, longest[0], causal, scale, **options)
            else:
                out, lse = _forward(q, k, v, plan, cos, sin, *settings, keep=return_lse)
            return (out, _natural(name, lse, q, plan.queries.bounds())) if return_lse else out
    elif not traced and not return_lse and not (name == "sdpa" and _tracked(q, k, v) and _widens(q, v, of_keys)):
        return _attend(name, q, k, v, bounds, of_keys, causal, scale)
    elif not traced and name == "eager":
        return varlen_attention_ref(q, k, v, bounds, causal, scale, of_keys, return_lse=True)
    # Tracers need one opaque op, as the implementations read boundaries.
    options = *longest, causal, scale, fused, return_lse, name
    out, lse = torch_ops.varlen_attention(q, k, v, bounds, of_keys, cos, sin, *options)
    return (out, _natural(name, lse, q, bounds)) if return_lse else out


def _natural(name: str, lse: Any, q: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    """The logs of the sums ``(Hq, T)`` from what a backend keeps: rows behind the last segment hold nothing there."""
    if name in OURS:
        lse = lse * math.log(2)
    elif name in PEERS:
        lse = attention_calls.statistics(name, lse, q)
    elif name == "sdpa":
        return lse.t()
    behind = torch.arange(q.shape[0], device=q.device) >= bounds[-1].to(q.device, non_blocking=True)
    return lse.masked_fill(behind, float("-inf"))


def _rotated(q, k, rope, name) -> tuple[torch.Tensor, torch.Tensor]:
    """New q and k, by the kernel that serves ``vision_rope`` there; the formula stays the formula."""
    cos, sin = rope
    if name != "eager" and resolve("vision_rope", q.device.type, None) == "triton":
        return rotated(q, k, cos=cos, sin=sin)
    wide = torch.promote_types(q.dtype, torch.float32)
    cos, sin = cos.to(wide), sin.to(wide)
    return rotate(q, cos, sin), rotate(k, cos, sin)
