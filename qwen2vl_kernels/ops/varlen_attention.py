"""Softmax attention inside the segments of one packed sequence.

    o_i = sum_j softmax_j(softmax_scale * q_i . k_j) v_j,   j over i's own segment (and j <= i when causal)

Segment s is rows ``cu_seqlens[s] .. cu_seqlens[s + 1]``: an image, a video frame pair, or one text of a batch
(block-diagonal attention as in FlashAttention's varlen interface, arXiv 2307.08691). For lengths 2 and 3:

    o o . . .          causal:  o . . . .
    o o . . .                   o o . . .
    . . o o o                   . . o . .
    . . o o o                   . . o o .
    . . o o o                   . . o o o

Shapes: q ``(T, Hq, D)``, k ``(T, Hk, D)``, v ``(T, Hk, Dv)``, Hq a multiple of Hk (query head h reads key head
``h // (Hq / Hk)``), cu_seqlens ``(S + 1,)`` int32. dtypes: float32, bfloat16, float16. With ``rope`` q and k are first
rotated, pairs (j, j + D/2) by the angles of their row (RoFormer, arXiv 2104.09864, in transformers' order of columns).
Triton's kernels are in ``triton.attention_forward`` and ``triton.attention_backward``, others' in
``core.attention_peers``.
"""

from __future__ import annotations

import torch

from ..core import attention_calls
from ..core.attention_choice import chosen
from ..core.attention_cpu import blocked, keeps_statistics, per_segment, sdpa, sdpa_backward, sdpa_with_statistics
from ..core.attention_peers import PEERS
from ..core.backends import resolve
from ..core.checks import Checker
from ..core.launching import target_of
from ..core.library import direct, first_order, register_opaque
from ..core.namespace import torch_ops
from ..core.rotation import rotate
from ..core.tile_plan import TilePlan, check_bounds, plan_for
from ..triton.attention_backward import launch_backward
from ..triton.attention_forward import fake_forward, fuses_rope, launch_forward
from ..triton.attention_head import like
from ..triton.rotary import rotated
from ..triton.tail import zero_behind


def varlen_attention_ref(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    causal: bool = False,
    softmax_scale: float | None = None,
    *,
    upcast: bool = False,
) -> torch.Tensor:
    """The formula, segment by segment, the softmax in (at least) float32; everything in it with ``upcast``.

    Rows past ``cu_seqlens[-1]`` are zero. Reads ``cu_seqlens`` on the host.
    """
    out_dtype, wide = q.dtype, torch.promote_types(q.dtype, torch.float32)
    if upcast:
        q, k, v = q.to(wide), k.to(wide), v.to(wide)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    group = q.shape[1] // k.shape[1]

    def attend(rows: slice) -> torch.Tensor:
        qs = q[rows].transpose(0, 1)  # (Hq, L, D)
        ks = k[rows].transpose(0, 1).repeat_interleave(group, 0)
        vs = v[rows].transpose(0, 1).repeat_interleave(group, 0)
        # Scaling q first keeps float16 scores finite: Qwen2's key biases push q.k past 65504.
        scores = ((qs * scale) @ ks.transpose(1, 2)).to(wide)  # (Hq, L, L)
        if causal:
            future = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill(future, float("-inf"))
        return (scores.softmax(-1).to(v.dtype) @ vs).transpose(0, 1).to(out_dtype)

    return per_segment(attend, q.shape[0], q.new_empty((0, q.shape[1], v.shape[2]), dtype=out_dtype), cu_seqlens)


def _peer_forward(name, q, k, v, plan: TilePlan, max_seqlen: int, causal: bool, scale: float, keep: bool):
    """``(out, lse)`` of others' kernels (:func:`attention_calls.forward`), zero behind the last segment."""
    out, lse = attention_calls.forward(name, q, k, v, plan, max_seqlen, causal, scale, keep)
    return zero_behind(out, plan), lse


def _peer_backward(name, dout, q, k, v, out, lse, plan: TilePlan, max_seqlen: int, causal: bool, scale: float):
    """``(dq, dk, dv)`` of others' kernels (:func:`attention_calls.backward`), zero behind the last segment."""
    grads = attention_calls.backward(name, dout, q, k, v, out, lse, plan, max_seqlen, causal, scale)
    return tuple(zero_behind(x, plan) for x in grads)


# ------------------------------------------------------------------------------ the op on our kernels, and its backward


def _run_triton(q, k, v, cu_seqlens, cos, sin, max_seqlen, causal, softmax_scale, fused):
    plan = plan_for(cu_seqlens, q.shape[0], q.device)
    return launch_forward(q, k, v, plan, max_seqlen, causal, softmax_scale, cos=cos, sin=sin, fused=fused)


def _setup_triton(ctx, inputs, output) -> None:
    q, k, v, cu_seqlens, cos, sin, _, ctx.causal, ctx.scale, ctx.fused = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output, cu_seqlens, cos, sin)


def _backward_triton(ctx, dout, _):
    arguments = (dout, *ctx.saved_tensors, ctx.causal, ctx.scale, ctx.fused)
    return *first_order("varlen_attention", torch_ops.attention_backward, *arguments), *[None] * 7


_PACK = "Tensor cu_seqlens, Tensor? cos, Tensor? sin"
_OPTIONS = "bool causal, float softmax_scale, bool fused"
register_opaque(
    f"attention_forward(Tensor q, Tensor k, Tensor v, {_PACK}, int max_seqlen, {_OPTIONS}) -> (Tensor, Tensor)",
    fake=lambda q, k, v, *_: fake_forward(q, k, v),
    setup_context=_setup_triton,
    backward=_backward_triton,
    CPU=_run_triton,
    CUDA=_run_triton,
)
register_opaque(
    f"attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_PACK}, {_OPTIONS})"
    " -> (Tensor, Tensor, Tensor)",
    fake=lambda dout, q, k, v, *_: like(q, k, v),
    CPU=launch_backward,
    CUDA=launch_backward,
)


# -------------------------------------------------------------------- the op on everything else, by the backend's name


#: Those that read ``cu_seqlens`` on the host, and need no ``max_seqlen``.
_BACKENDS = {"eager": varlen_attention_ref, "sdpa": sdpa, "blocked": blocked}


def _attend(backend, q, k, v, cu_seqlens, causal, softmax_scale) -> torch.Tensor:
    out = _BACKENDS[backend](q, k, v, cu_seqlens, causal, softmax_scale)
    tracked = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if tracked and not out.requires_grad:
        # No segment has rows: these zeros came from nothing, and what asks for gradients gets zeros, too.
        out = out + (q[:0].sum() + k[:0].sum() + v[:0].sum())
    return out


def _run(q, k, v, cu_seqlens, max_seqlen, causal, softmax_scale, backend):
    """``(out, lse)``, where lse is what the backend's backward takes, or empty."""
    if backend in PEERS:
        plan = plan_for(cu_seqlens, q.shape[0], q.device)
        return _peer_forward(backend, q, k, v, plan, max_seqlen, causal, softmax_scale, keep=True)
    if backend == "sdpa" and keeps_statistics(q, v):
        return sdpa_with_statistics(q, k, v, cu_seqlens, causal, softmax_scale)
    return _attend(backend, q, k, v, cu_seqlens, causal, softmax_scale).contiguous(), q.new_empty(0)


def _run_backward(dout, q, k, v, out, lse, cu_seqlens, max_seqlen, causal, softmax_scale, backend):
    if backend in PEERS:
        plan = plan_for(cu_seqlens, q.shape[0], q.device)
        return _peer_backward(backend, dout, q, k, v, out, lse, plan, max_seqlen, causal, softmax_scale)
    if backend == "sdpa" and keeps_statistics(q, v):
        return sdpa_backward(dout, q, k, v, out, lse, cu_seqlens, causal, softmax_scale)
    # The formula, and PyTorch's attention where it picks a kernel of its own by the shape, keep nothing between two
    # operators, so the forward is run once more.
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    with torch.enable_grad():
        again = _attend(backend, leaves[0], leaves[1], leaves[2], cu_seqlens, causal, softmax_scale)
    return tuple(g.contiguous() for g in torch.autograd.grad(again, leaves, dout))


def _fake_forward(q, k, v, cu_seqlens, max_seqlen, causal, softmax_scale, backend):
    wide = torch.promote_types(q.dtype, torch.float32)
    if backend in PEERS:  # of one shape for all: cuDNN's changed between versions
        lse = q.new_empty(q.shape[0] * q.shape[1], dtype=torch.float32)
    elif backend == "sdpa" and keeps_statistics(q, v):
        lse = q.new_empty(q.shape[:2], dtype=wide)
    else:
        lse = q.new_empty(0)
    return q.new_empty((q.shape[0], q.shape[1], v.shape[2])), lse


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, cu_seqlens, *ctx.settings = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output, cu_seqlens)


def _backward(ctx, dout, _):
    backward = torch_ops.varlen_attention_backward
    grads = first_order("varlen_attention", backward, dout, *ctx.saved_tensors, *ctx.settings)
    return *grads, *[None] * 5


_SETTINGS = "Tensor cu_seqlens, int max_seqlen, bool causal, float softmax_scale, str backend"
register_opaque(
    f"varlen_attention(Tensor q, Tensor k, Tensor v, {_SETTINGS}) -> (Tensor, Tensor)",
    fake=_fake_forward,
    setup_context=_setup_context,
    backward=_backward,
    CPU=_run,
    CUDA=_run,
)
register_opaque(
    f"varlen_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_SETTINGS})"
    " -> (Tensor, Tensor, Tensor)",
    fake=lambda dout, q, k, v, *_: tuple(x.new_empty(x.shape) for x in (q, k, v)),
    CPU=_run_backward,
    CUDA=_run_backward,
)


def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    tiles: TilePlan | None = None,
    rope: tuple[torch.Tensor, torch.Tensor] | None = None,
    invariant: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """Attention over packed variable-length segments.

    Args:
        q: ``(T, Hq, D)``, any token and head strides, last dimension contiguous.
        k: ``(T, Hk, D)``, v: ``(T, Hk, Dv)``, likewise, q's dtype; Hq a multiple of Hk.
        cu_seqlens: ``(S + 1,)`` int32 row at which each segment starts, then the last one's end; non-decreasing,
            first entry 0, last at most T. Repeated values are empty segments. On q's device or on the CPU.
        max_seqlen: an upper bound of the segments' lengths. A tight one counts where others' kernels are chosen: they
            launch programs for as many rows in every segment, and a captured graph replays these: longer segments are
            refused then, by :meth:`TilePlan.update_` or by an assertion on the device.
        causal: a row sees only rows of its segment up to itself.
        softmax_scale: default ``D ** -0.5``; positive.
        tiles: :func:`plan_tiles` of these ``cu_seqlens``, so that all layers share the list of tiles; without it the
            list is made at the first call with a ``cu_seqlens``, and again when that was written to: on the host by
            any way, on a GPU by PyTorch's operations. What writes to it there in another way, as a kernel of yours may,
            goes with ``tiles``.
        rope: ``(cos, sin)``, ``(T, D/2)`` each, of any float dtype, without gradients: q and k are rotated first, and
            keep what they held. The Triton kernels rotate them as they load them where segments are short and in a
            pass of its own where they are long, with the same bits.
        invariant: the same bits twice, forward and backward, and a segment's bits do not depend on what it is packed
            with. On a GPU only ``"triton"`` promises that, and runs, for float32 too; on a CPU every backend does.
            ``torch.use_deterministic_algorithms(True)`` chooses the same.
        backend: ``None`` chooses by a table of measurements (``qwen2vl info`` prints it): the architecture, dtype, D,
            ``max_seqlen``, and whether gradients are wanted; where nobody measured, PyTorch's own kernel. Or

            - ``"triton"``: reads nothing on the host, can be captured in a CUDA graph; deterministic, and a segment's
              result does not depend on what it is packed with.
            - ``"torch"``: PyTorch's own FlashAttention 2; ``"flash"``: flash-attn 4, 3 (also its forward alone, of
              ``fa3-fwd``) or 2, the newest installed that serves the call. They read nothing on the host either, and
              promise neither.
            - ``"cudnn"``: cuDNN on packs, by PyTorch's operators; promises neither. It makes a plan for every new
              shape, PyTorch 2.10 at every call. Gradients from PyTorch 2.14 on.
            - ``"sdpa"``: PyTorch's fused attention, once a segment, or once for all when they are equally long.
            - ``"blocked"``: CPU, no backward: blocked matrix products for segments of 256 rows or more, ``"sdpa"`` for
              shorter ones; chosen for bf16 where the CPU has matrix products of it.
            - ``"eager"``: the formula.

            The last three read ``cu_seqlens`` on the host, which waits for the device if it lies there.

    Returns ``(T, Hq, Dv)``; rows past ``cu_seqlens[-1]`` are zero. Raises ``TypeError``/``ValueError`` naming the
    argument that does not fit; a backend that cannot serve the call is a :class:`BackendError` with the reason.
    """
    check = Checker("varlen_attention")
    check.tensor("q", q, ("T", "Hq", "D"), contiguous_last=True)
    check.tensor("k", k, ("T", "Hk", "D"), like=q, contiguous_last=True)
    check.tensor("v", v, ("T", "Hk", "Dv"), like=q, contiguous_last=True)
    check.tensor("cu_seqlens", cu_seqlens, ("S+1",), dtypes=(torch.int32,), any_device=True)
    heads, kv_heads = q.shape[1], k.shape[1]
    check.require(kv_heads > 0 and heads % kv_heads == 0, f"q's {heads} heads must be a multiple of k's {kv_heads}")
    check.require(cu_seqlens.shape[0] >= 1, "cu_seqlens must have at least one entry, got shape (0,)")
    ok = cu_seqlens.device.type == "cpu" or cu_seqlens.device == q.device
    check.require(ok, f"cu_seqlens must be on {q.device} or cpu, got {cu_seqlens.device}")
    if not (isinstance(max_seqlen, int) and max_seqlen >= 0):  # words only then: a compiler has no number to put in
        check.require(False, f"max_seqlen must be a non-negative int, got {max_seqlen!r}")
    ok = softmax_scale is None or softmax_scale > 0
    check.require(ok, f"softmax_scale must be positive, got {softmax_scale!r}")
    if rope is not None:
        _check_rope(check, q, rope)
    traced = torch.compiler.is_compiling() or type(q) is not torch.Tensor or q.is_meta
    if traced:  # neither is to be compiled in: code for one number of rows would serve no other
        pass
    elif tiles is not None:
        _check_tiles(check, tiles, cu_seqlens, q, max_seqlen)
    elif cu_seqlens.device.type == "cpu":
        check_bounds(check, cu_seqlens.tolist(), q.shape[0], max_seqlen)

    segments = cu_seqlens.shape[0] - 1
    name = chosen(q, k, v, max_seqlen, causal=causal, invariant=invariant, segments=segments, backend=backend)
    settings = (max_seqlen, causal, q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
    (cos, sin), fused = (None, None) if rope is None else rope, False
    if name == "triton":
        fused = rope is not None and fuses_rope(max_seqlen, q.shape[2], target_of(q.device))
    elif rope is not None:
        q, k = _rotated(q, k, rope, name)
    if (name == "triton" or name in PEERS) and direct(q, k, v, cu_seqlens):
        plan = plan_for(cu_seqlens, q.shape[0], q.device) if tiles is None else tiles
        if name == "triton":
            return launch_forward(q, k, v, plan, *settings, cos=cos, sin=sin, fused=fused, keep=False)[0]
        return _peer_forward(name, q, k, v, plan, *settings, keep=False)[0]
    if name == "triton":  # an op of its own, which keeps what its backward needs
        return torch_ops.attention_forward(q, k, v, cu_seqlens, cos, sin, *settings, fused)[0]
    if tiles is not None and name in PEERS and not traced:
        tiles.hold_to(max_seqlen)  # the operator is not told of it
    if traced or name in PEERS:  # tracers need one opaque op, as the implementations read cu_seqlens
        return torch_ops.varlen_attention(q, k, v, cu_seqlens, *settings, name)[0]
    return _attend(name, q, k, v, cu_seqlens, *settings[1:])


def _rotated(q, k, rope, name) -> tuple[torch.Tensor, torch.Tensor]:
    """New q and k, by the kernel that serves ``vision_rope`` there; the formula stays the formula."""
    cos, sin = rope
    if name != "eager" and resolve("vision_rope", q.device.type, None) == "triton":
        return rotated(q, k, cos=cos, sin=sin)
    wide = torch.promote_types(q.dtype, torch.float32)
    cos, sin = cos.to(wide), sin.to(wide)
    return rotate(q, cos, sin), rotate(k, cos, sin)


def _check_rope(check: Checker, q: torch.Tensor, rope: object) -> None:
    ok = isinstance(rope, (tuple, list)) and len(rope) == 2
    check.require(ok, f"rope must be a pair of tensors (cos, sin), got {type(rope).__name__}")
    columns = q.shape[2]
    check.require(columns % 2 == 0, f"rope rotates pairs of columns, but q's head_dim is {columns}")
    for name, table in zip(("rope's cos", "rope's sin"), rope, strict=True):  # pyright: ignore[reportArgumentType]
        check.tensor(name, table, ("T", columns // 2))
        check.require(not table.requires_grad, f"{name} must not require grad: it is given none")


def _check_tiles(check: Checker, tiles: object, cu_seqlens: torch.Tensor, q: torch.Tensor, max_seqlen: int) -> None:
    if not isinstance(tiles, TilePlan):
        raise TypeError(f"varlen_attention: tiles must be a TilePlan, got {type(tiles).__name__}")
    check.require(tiles.total == q.shape[0], f"tiles are planned for {tiles.total} rows, but q has {q.shape[0]}")
    check.require(tiles.device == q.device, f"tiles must be on {q.device} like q, got {tiles.device}")
    have, want = tiles.cu_seqlens.shape[0], cu_seqlens.shape[0]
    check.require(have == want, f"tiles are planned for {have - 1} segments, but cu_seqlens has {want - 1}")
    longest = tiles.longest
    ok = longest is None or max_seqlen >= longest
    check.require(ok, f"max_seqlen is {max_seqlen}, but tiles are planned for a segment of {longest} rows")
