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
The Triton kernels are in ``_attention`` and ``_attention_backward``, others' in ``_attention_library``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .._attention import attention
from .._attention_library import flash_varlen, shape_reason, torch_varlen
from .._backend import BackendError, resolve
from .._checks import Checker
from .._library import register_opaque
from .._product import slow_on_cpu
from .._rotary import Angles, rotate, rotated
from .._tiles import TilePlan, check_bounds


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

    return _per_segment(attend, q.shape[0], q.new_empty((0, q.shape[1], v.shape[2]), dtype=out_dtype), cu_seqlens)


#: Query rows that "blocked" works on at a time. On 2 Zen 5 cores, bf16, 512 beat 128 and 256 at every length.
_BLOCK_ROWS = 512
#: From this length on "blocked" beats PyTorch's attention there (1.3x at 256 rows, 2.9x at 5184, 2.4x causal 1333).
_BLOCKED_MIN_SEQLEN = 256


def _per_segment(attend, total: int, empty: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Concatenate ``attend(rows)`` over the non-empty segments, zeros for the rows after the last."""
    bounds = cu_seqlens.tolist()
    parts = [attend(slice(a, b)) for a, b in zip(bounds, bounds[1:], strict=False) if b > a]
    return _joined(parts, bounds[-1], total, empty)


def _joined(parts: list[torch.Tensor], covered: int, total: int, empty: torch.Tensor) -> torch.Tensor:
    """``parts``, which are the first ``covered`` rows, and zeros up to ``total``."""
    if covered < total:
        parts.append(empty.new_zeros((total - covered, *empty.shape[1:])))
    return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else empty


def _sdpa(q, k, v, cu_seqlens, causal, scale) -> torch.Tensor:
    """PyTorch's fused attention, one call for each run of neighbours of one length: the frames of a video, say."""
    bounds = cu_seqlens.tolist()
    runs: list[list[int]] = []  # first row, row behind the last, length of each segment
    for a, b in zip(bounds, bounds[1:], strict=False):
        if runs and runs[-1][2] == b - a:
            runs[-1][1] = b
        elif b > a:
            runs.append([a, b, b - a])
    parts = [_sdpa_equal(q[a:b], k[a:b], v[a:b], length, causal, scale) for a, b, length in runs]
    return _joined(parts, bounds[-1], q.shape[0], q.new_empty((0, q.shape[1], v.shape[2])))


def _sdpa_equal(q, k, v, length: int, causal, scale) -> torch.Tensor:
    """One fused call over segments of ``length`` rows each."""
    qb, kb, vb = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in (q, k, v))  # (S, H, L, D)
    gqa = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(qb, kb, vb, is_causal=causal, scale=scale, enable_gqa=gqa)
    return out.transpose(1, 2).flatten(0, 1)


def _blocked(q, k, v, cu_seqlens, causal, scale) -> torch.Tensor:
    """Long segments by :func:`_blocked_segment`, short ones by PyTorch's attention: each by its own length alone.

    A choice by the longest segment of the pack would make a result depend on what it is packed with.
    """
    bounds = cu_seqlens.tolist()
    if all(b - a < _BLOCKED_MIN_SEQLEN for a, b in zip(bounds, bounds[1:], strict=False)):
        return _sdpa(q, k, v, cu_seqlens, causal, scale)

    def attend(rows: slice) -> torch.Tensor:
        length = rows.stop - rows.start
        if length >= _BLOCKED_MIN_SEQLEN:
            return _blocked_segment(q[rows], k[rows], v[rows], causal, scale)
        return _sdpa_equal(q[rows], k[rows], v[rows], length, causal, scale)

    return _per_segment(attend, q.shape[0], q.new_empty((0, q.shape[1], v.shape[2])), cu_seqlens)


def _blocked_segment(q, k, v, causal, scale) -> torch.Tensor:
    """Two matrix products and a softmax per head and block of query rows, scores in the working dtype.

    PyTorch's CPU attention runs bf16 at half the rate of its bf16 matrix products or less; keeping one block's
    scores in cache and leaving the products to the GEMM library is faster on long segments. One head's keys and
    values are copied together for it at a time. The rounding is that of :func:`varlen_attention_ref`: scores and
    probabilities in the input dtype, softmax inside in float32.
    """
    length, heads, group = q.shape[0], q.shape[1], q.shape[1] // k.shape[1]
    out = q.new_empty((length, heads, v.shape[2]))
    buffer = q.new_empty((min(_BLOCK_ROWS, length), length))
    for kv_head in range(k.shape[1]):
        keys, values = k[:, kv_head].t().contiguous(), v[:, kv_head].contiguous()  # (D, L), (L, Dv)
        for row in range(0, length, _BLOCK_ROWS):
            stop = min(row + _BLOCK_ROWS, length)
            seen = stop if causal else length
            scores = buffer[: stop - row, :seen]
            if causal:
                future = torch.ones((stop - row, stop - row), dtype=torch.bool).triu(1)
            for head in range(kv_head * group, (kv_head + 1) * group):
                # alpha is applied to the float32 accumulator, so scaling costs no rounding of its own.
                torch.addmm(scores, q[row:stop, head], keys[:, :seen], beta=0, alpha=scale, out=scores)
                if causal:
                    scores[:, row:].masked_fill_(future, float("-inf"))
                out[row:stop, head] = scores.softmax(-1) @ values[:seen]
    return out


def _host(implementation):
    """The form that all backends share: those that read ``cu_seqlens`` on the host need no ``max_seqlen``."""
    return lambda q, k, v, cu_seqlens, max_seqlen, causal, scale: implementation(q, k, v, cu_seqlens, causal, scale)


_BACKENDS = {
    "eager": _host(varlen_attention_ref),
    "sdpa": _host(_sdpa),
    "blocked": _host(_blocked),
    "torch": torch_varlen,
    "flash": flash_varlen,
    "triton": attention,
}


def _run(q, k, v, cu_seqlens, max_seqlen, causal, softmax_scale, backend) -> torch.Tensor:
    return _BACKENDS[backend](q, k, v, cu_seqlens, max_seqlen, causal, softmax_scale).contiguous()


def _run_backward(grad, q, k, v, cu_seqlens, max_seqlen, causal, softmax_scale, backend):
    """The forward once more under autograd: these backends keep nothing for a backward of their own."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    with torch.enable_grad():
        out = _BACKENDS[backend](*leaves, cu_seqlens, max_seqlen, causal, softmax_scale)
    return tuple(g.contiguous() for g in torch.autograd.grad(out, leaves, grad))


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, cu_seqlens, *ctx.settings = inputs
    ctx.save_for_backward(q, k, v, cu_seqlens)


def _backward(ctx, grad):
    grads = torch.ops.qwen2vl.varlen_attention_backward(grad, *ctx.saved_tensors, *ctx.settings)
    return (*grads, None, None, None, None, None)


_ARGUMENTS = "Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, int max_seqlen, bool causal, float softmax_scale"
register_opaque(
    f"varlen_attention({_ARGUMENTS}, str backend) -> Tensor",
    fake=lambda q, k, v, *_: q.new_empty((q.shape[0], q.shape[1], v.shape[2])),
    setup_context=_setup_context,
    backward=_backward,
    CPU=_run,
    CUDA=_run,
)
register_opaque(
    f"varlen_attention_backward(Tensor grad, {_ARGUMENTS}, str backend) -> (Tensor, Tensor, Tensor)",
    fake=lambda grad, q, k, v, *_: (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)),
    CPU=_run_backward,
    CUDA=_run_backward,
)


def preferred(device_type: str, dtype: torch.dtype, head_dim: int, tracked: bool) -> tuple[str | None, str]:
    """What serves such a call before the table's first choice, and why; ``None`` leaves it to the table."""
    if device_type == "cpu" and dtype == torch.bfloat16 and not tracked:
        if slow_on_cpu(dtype):
            return "sdpa", "this CPU has no matrix products of bf16, and PyTorch's attention makes them in float32"
        return "blocked", "matrix products in blocks measured faster than PyTorch's attention"
    if device_type == "cuda" and dtype in (torch.float32, torch.float64):
        return "sdpa", "plain float32 runs without matrix units in Triton"
    if device_type == "cuda" and head_dim > 256:
        return "sdpa", "a head of more than 256 columns fits no program's registers"
    return None, "first in the table"


def choices(device_type: str) -> list[tuple[str, int, str, str, str]]:
    """Rows ``(dtype, head_dim, backend without gradients, backend with them, why the first)`` for ``qwen2vl info``."""
    rows = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for head_dim in (64, 72, 80, 128, 512):
            taken = []
            for tracked in (False, True):
                prefer, why = preferred(device_type, dtype, head_dim, tracked)
                taken.append((resolve("varlen_attention", device_type, None, prefer), why))
            rows.append((str(dtype).removeprefix("torch."), head_dim, taken[0][0], taken[1][0], taken[0][1]))
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
    backend: str | None = None,
) -> torch.Tensor:
    """Attention over packed variable-length segments.

    Args:
        q: ``(T, Hq, D)``, any token and head strides, last dimension contiguous.
        k: ``(T, Hk, D)``, v: ``(T, Hk, Dv)``, likewise, q's dtype; Hq a multiple of Hk.
        cu_seqlens: ``(S + 1,)`` int32 row at which each segment starts, then the last one's end; non-decreasing,
            first entry 0, last at most T. Repeated values are empty segments. On q's device or on the CPU.
        max_seqlen: an upper bound of the segments' lengths.
        causal: a row sees only rows of its segment up to itself.
        softmax_scale: default ``D ** -0.5``; positive.
        tiles: :func:`plan_tiles` of these ``cu_seqlens``, so that all layers share the list of tiles; without it the
            list is made at the first call with a ``cu_seqlens``, and again when that was written to.
        rope: ``(cos, sin)``, ``(T, D/2)`` each, of any float dtype, without gradients: q and k are turned first, and
            keep what they held. The Triton kernels turn them as they load them where segments are short and in a pass
            of its own where they are long, with the same bits.
        backend: ``None`` (choose), or

            - ``"triton"``: reads nothing on the host, can be captured in a CUDA graph; deterministic, and a segment's
              result does not depend on what it is packed with. Chosen for 16-bit tensors on a GPU.
            - ``"flash"``: flash-attn 4, 3 or 2, the newest installed; ``"torch"``: PyTorch's own FlashAttention 2.
            - ``"sdpa"``: PyTorch's fused attention, once a segment, or once for all when they are equally long.
            - ``"blocked"``: CPU, no backward: blocked matrix products for segments of 256 rows or more, ``"sdpa"`` for
              shorter ones; chosen for bf16 where the CPU has matrix products of it.
            - ``"eager"``: the formula.

            The last three read ``cu_seqlens`` on the host, which waits for the device if it lies there.

    Returns ``(T, Hq, Dv)``; rows past ``cu_seqlens[-1]`` are zero. Raises ``TypeError``/``ValueError`` naming the
    argument that does not fit.
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
        _check_tiles(check, tiles, cu_seqlens, q)
    elif cu_seqlens.device.type == "cpu":
        check_bounds(check, cu_seqlens.tolist(), q.shape[0], max_seqlen)

    tracked = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    prefer, _ = preferred(q.device.type, q.dtype, q.shape[2], tracked)
    name = resolve("varlen_attention", q.device.type, backend, prefer)
    if name == "blocked" and tracked:
        raise ValueError("varlen_attention: backend 'blocked' has no backward; q, k and v must not require grad")
    if name in ("torch", "flash") and (reason := shape_reason(q, v)) is not None:
        raise BackendError(f"varlen_attention: backend {name!r} does not serve this call: {reason}")
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    if name == "triton":  # an op of its own, which keeps what its backward needs
        return _BACKENDS[name](q, k, v, cu_seqlens, max_seqlen, causal, scale, tiles=tiles, rope=rope)
    if rope is not None:
        q, k = _turn(q, k, rope, name)
    if traced and name not in ("torch", "flash"):  # tracers need one opaque op, as the implementations read cu_seqlens
        return torch.ops.qwen2vl.varlen_attention(q, k, v, cu_seqlens, max_seqlen, causal, scale, name)
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


def _check_tiles(check: Checker, tiles: object, cu_seqlens: torch.Tensor, q: torch.Tensor) -> None:
    if not isinstance(tiles, TilePlan):
        raise TypeError(f"varlen_attention: tiles must be a TilePlan, got {type(tiles).__name__}")
    check.require(tiles.total == q.shape[0], f"tiles are planned for {tiles.total} rows, but q has {q.shape[0]}")
    check.require(tiles.device == q.device, f"tiles must be on {q.device} like q, got {tiles.device}")
    have, want = tiles.cu_seqlens.shape[0], cu_seqlens.shape[0]
    check.require(have == want, f"tiles are planned for {have - 1} segments, but cu_seqlens has {want - 1}")
