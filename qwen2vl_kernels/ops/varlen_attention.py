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
turned, pairs (j, j + D/2) by the angles of their row (RoFormer, arXiv 2104.09864, in transformers' order of columns).
Triton's kernels are in ``triton.attention_forward`` and ``triton.attention_backward``, others' in
``core.attention_peers``.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from operator import index

import torch

from ..core import attention_choice, attention_peers
from ..core.attention_cpu import blocked, keeps_statistics, per_segment, sdpa, sdpa_backward, sdpa_with_statistics
from ..core.attention_peers import Call
from ..core.backends import BackendError, forced, resolve
from ..core.checks import Checker
from ..core.launching import target_of
from ..core.library import direct, first_order, register_opaque
from ..core.namespace import torch_ops
from ..core.tile_plan import TilePlan, check_bounds, plan_for
from ..triton.attention_forward import attention
from ..triton.rotary import Angles, rotate, rotated
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


def _host(implementation):
    """The form that all backends share: those that read ``cu_seqlens`` on the host need no ``max_seqlen``."""
    return lambda q, k, v, cu_seqlens, max_seqlen, causal, scale: implementation(q, k, v, cu_seqlens, causal, scale)


def peer_forward(name, q, k, v, plan: TilePlan, max_seqlen: int, causal: bool, scale: float, keep: bool):
    """``(out, lse)`` of others' kernels (:func:`attention_peers.forward`), zero behind the last segment."""
    out, lse = attention_peers.forward(name, q, k, v, plan, max_seqlen, causal, scale, keep)
    return zero_behind(out, plan), lse


def peer_backward(name, grad, q, k, v, out, lse, plan: TilePlan, max_seqlen: int, causal: bool, scale: float):
    """``(dq, dk, dv)`` of others' kernels (:func:`attention_peers.backward`), zero behind the last segment."""
    grads = attention_peers.backward(name, grad, q, k, v, out, lse, plan, max_seqlen, causal, scale)
    return tuple(zero_behind(x, plan) for x in grads)


def _peer(name):
    """Others' kernels, without what their backward needs."""

    def attend(q, k, v, cu_seqlens, max_seqlen, causal, scale, tiles=None):
        plan = plan_for(cu_seqlens, q.shape[0], q.device) if tiles is None else tiles
        return peer_forward(name, q, k, v, plan, max_seqlen, causal, scale, keep=False)[0]

    return attend


#: Others' kernels by what an operator is told, "torch", "cudnn" or a module; "flash" is the newest one that serves.
_PEERS = ("torch", "cudnn", *(flash.module for flash in attention_peers.FLASH))
_BACKENDS = {
    "eager": _host(varlen_attention_ref),
    "sdpa": _host(sdpa),
    "blocked": _host(blocked),
    "triton": attention,
    **{name: _peer(name) for name in _PEERS},
}


def _run(q, k, v, cu_seqlens, max_seqlen, causal, softmax_scale, backend):
    """``(out, lse)``, where lse is what the backend's backward takes, or empty."""
    settings = (max_seqlen, causal, softmax_scale)
    if backend in _PEERS:
        plan = plan_for(cu_seqlens, q.shape[0], q.device)
        return peer_forward(backend, q, k, v, plan, *settings, keep=True)
    if backend == "sdpa" and keeps_statistics(q, v):
        return sdpa_with_statistics(q, k, v, cu_seqlens, causal, softmax_scale)
    return _BACKENDS[backend](q, k, v, cu_seqlens, *settings).contiguous(), q.new_empty(0)


def _run_backward(grad, q, k, v, out, lse, cu_seqlens, max_seqlen, causal, softmax_scale, backend):
    settings = (max_seqlen, causal, softmax_scale)
    if backend in _PEERS:
        plan = plan_for(cu_seqlens, q.shape[0], q.device)
        return peer_backward(backend, grad, q, k, v, out, lse, plan, *settings)
    if backend == "sdpa" and keeps_statistics(q, v):
        return sdpa_backward(grad, q, k, v, out, lse, cu_seqlens, causal, softmax_scale)
    # The formula, and PyTorch's attention where it picks a kernel of its own by the shape, keep nothing between two
    # operators: the forward once more.
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    with torch.enable_grad():
        again = _BACKENDS[backend](*leaves, cu_seqlens, *settings)
    return tuple(g.contiguous() for g in torch.autograd.grad(again, leaves, grad))


def _fake_forward(q, k, v, cu_seqlens, max_seqlen, causal, softmax_scale, backend):
    wide = torch.promote_types(q.dtype, torch.float32)
    if backend in _PEERS:  # of one shape for all: cuDNN's changed between versions
        lse = q.new_empty(q.shape[0] * q.shape[1], dtype=torch.float32)
    elif backend == "sdpa" and keeps_statistics(q, v):
        lse = q.new_empty(q.shape[:2], dtype=wide)
    else:
        lse = q.new_empty(0)
    return q.new_empty((q.shape[0], q.shape[1], v.shape[2])), lse


def _fake_backward(grad, q, k, v, *_):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, cu_seqlens, *ctx.settings = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output, cu_seqlens)


def _backward(ctx, grad, _):
    backward = torch_ops.varlen_attention_backward
    grads = first_order("varlen_attention", backward, grad, *ctx.saved_tensors, *ctx.settings)
    return (*grads, None, None, None, None, None)


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
    f"varlen_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_SETTINGS})"
    " -> (Tensor, Tensor, Tensor)",
    fake=_fake_backward,
    CPU=_run_backward,
    CUDA=_run_backward,
)


def chosen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    max_seqlen: int,
    *,
    causal: bool = False,
    invariant: bool = False,
    segments: int = 1,
    backend: str | None = None,
) -> str:
    """Which of :data:`_BACKENDS` serves such a call. Raises :class:`BackendError` where the one named does not."""
    tracked = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    repeatable, kind = torch.are_deterministic_algorithms_enabled(), q.device.type
    (rows, heads, columns), (_, kv_heads, value_columns) = q.shape, v.shape
    widths = index(columns), index(value_columns)
    facts = (kind, q.device.index, q.dtype, *widths, _settled(heads != kv_heads), causal, tracked)
    if kind == "cuda":
        empty = _settled(segments < 1 or rows == 0 or heads == 0)
        aligned, farthest = True, heads * columns
        for x in (q, k, v):
            of_rows, of_heads, _ = x.stride()
            aligned = aligned and _settled(of_rows % 8 == 0 and of_heads % 8 == 0)
            farthest = max(farthest, of_rows)
        facts += (attention_choice.bucket(max_seqlen), aligned or empty, _settled(rows * farthest >= 2**31), empty)
        facts += (_settled(segments > attention_peers.MOST_BLOCKS),)
    else:
        facts += (0, True, False, False, False)
    requested = backend if backend is not None else forced("varlen_attention")
    name = _choose(*facts, repeatable, invariant, requested)
    if name.startswith(_REFUSED):
        raise BackendError(name.removeprefix(_REFUSED))
    return name


def _settled(condition: bool) -> bool:
    """A compiler that traces sizes makes code for this answer; as for ``index`` of a width above."""
    if condition:  # noqa: SIM103
        return True
    return False


_REFUSED = "refused: "


def _choose(kind, *facts) -> str:
    """A backend, or why there is none: what is raised here would be an error of the compiler's."""
    try:
        if kind == "cuda":
            return _known(kind, *facts, replaced=attention_peers.replaced())
        return _decide(kind, *facts)
    except BackendError as error:
        return f"{_REFUSED}{error}"


# As torch.compiler.assume_constant_result says it, which imports all of Dynamo: what is asked here are modules, a
# driver and a table, and the answer is one for all calls alike.
_choose._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def _decide(
    kind, ordinal, dtype, columns, value_columns, grouped, causal, tracked, rows, aligned, wide, empty, many,
    repeatable, invariant, requested, replaced=None,
) -> str:  # fmt: skip
    device = torch.device(kind, ordinal) if kind == "cuda" else torch.device(kind)
    target = target_of(device)
    call = Call(
        kind, target.capability if kind == "cuda" else 0, dtype, columns, value_columns, grouped, causal, tracked, rows,
        aligned, wide, empty, many, repeatable, replaced,
    )  # fmt: skip
    if requested is None:
        try:
            choice = attention_choice.choose(call, invariant)
        except LookupError as error:
            raise BackendError(
                f"varlen_attention: invariant=True has only Triton's kernels here, and {error}"
            ) from None
        return choice.peer or choice.backend
    if invariant and kind == "cuda" and requested != "triton":
        raise BackendError(
            f"varlen_attention: invariant=True asks for the same bits twice and in every pack, which backend "
            f"{requested!r} does not promise; 'triton' does"
        )
    name = resolve("varlen_attention", kind, requested)
    if name == "blocked" and tracked:
        raise BackendError("varlen_attention: backend 'blocked' has no backward; q, k and v must not require grad")
    if name in ("torch", "flash", "cudnn"):
        peer, reason = attention_peers.peer_of(name, call)
        if peer is None:
            raise BackendError(f"varlen_attention: backend {name!r} does not serve this call: {reason}")
        return peer
    return name


_known = cache(_decide)  # modules and GPUs stay what they are


def reads_host(backend: str) -> bool:
    """Whether a backend reads ``cu_seqlens`` on the host, and waits for the device where it lies there."""
    return backend in ("eager", "sdpa", "blocked")


def by_max_seqlen(backend: str) -> bool:
    """Whether a backend launches programs for ``max_seqlen`` rows in every segment."""
    return backend in _PEERS


#: Calls that :func:`choices` tells of: ``max_seqlen``, and what of :class:`Call` is not as in a tower's inference.
KINDS: dict[str, tuple[int, dict[str, bool]]] = {
    "inference": (0, {}),
    "long": (4096, {}),
    "training": (4096, {"gradients": True}),
    "prefill": (4096, {"causal": True, "grouped": True}),
}


def choices(device_type: str) -> list[dict[str, object]]:
    """What serves each of :data:`KINDS` on such tensors, where it was measured and why, for ``qwen2vl info``."""
    rows: list[dict[str, object]] = []
    capability = 0
    if device_type == "cuda" and torch.cuda.is_available():
        capability = target_of(torch.device("cuda", torch.cuda.current_device())).capability
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for columns in (64, 72, 80, 128, 512):
            row: dict[str, object] = {"dtype": str(dtype).removeprefix("torch."), "head_dim": columns}
            for kind, (longest, facts) in KINDS.items():
                rows_ = attention_choice.bucket(longest)
                known = Call(device_type, capability, dtype, columns, columns, rows=rows_)
                call = replace(known, replaced=attention_peers.replaced(), **facts)
                choice = attention_choice.choose(call)
                row[kind] = {"backend": choice.backend, "measured": choice.measured, "why": choice.why}
            rows.append(row)
    return rows


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
            list is made at the first call with a ``cu_seqlens``, and again when that was written to.
        rope: ``(cos, sin)``, ``(T, D/2)`` each, of any float dtype, without gradients: q and k are turned first, and
            keep what they held. The Triton kernels turn them as they load them where segments are short and in a pass
            of its own where they are long, with the same bits.
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
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    if name == "triton":  # an op of its own, which keeps what its backward needs
        return _BACKENDS[name](q, k, v, cu_seqlens, max_seqlen, causal, scale, tiles=tiles, rope=rope)
    if rope is not None:
        q, k = _turn(q, k, rope, name)
    if name in _PEERS and direct(q, k, v, cu_seqlens):
        return _BACKENDS[name](q, k, v, cu_seqlens, max_seqlen, causal, scale, tiles)
    if tiles is not None and name in _PEERS and not traced:
        tiles.hold_to(max_seqlen)  # the operator is not told of it
    if traced or name in _PEERS:  # tracers need one opaque op, as the implementations read cu_seqlens
        return torch_ops.varlen_attention(q, k, v, cu_seqlens, max_seqlen, causal, scale, name)[0]
    return _BACKENDS[name](q, k, v, cu_seqlens, max_seqlen, causal, scale)


def _turn(q, k, rope, name) -> tuple[torch.Tensor, torch.Tensor]:
    """New q and k, by the kernel that serves ``vision_rope`` there; the formula stays the formula."""
    cos, sin = rope
    if name != "eager" and resolve("vision_rope", q.device.type, None) == "triton":
        return rotated(q, k, Angles(cos=cos, sin=sin))
    wide = torch.promote_types(q.dtype, torch.float32)
    cos, sin = cos.to(wide), sin.to(wide)
    return rotate(q, cos, sin), rotate(k, cos, sin)


def _check_rope(check: Checker, q: torch.Tensor, rope: object) -> None:
    ok = isinstance(rope, (tuple, list)) and len(rope) == 2
    check.require(ok, f"rope must be a pair of tensors (cos, sin), got {type(rope).__name__}")
    columns = q.shape[2]
    check.require(columns % 2 == 0, f"rope turns pairs of columns, but q's head_dim is {columns}")
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
