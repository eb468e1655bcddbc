"""M-RoPE on new keys, and keys and values written into a cache, in one launch.

    for every token t with slots[t] >= 0:   block, offset = divmod(slots[t], block_size)
        k_cache[block, offset] = rotate(k[t]),   v_cache[block, offset] = v[t]

The cache may be paged (vLLM's layout: blocks of ``block_size`` slots, ``slots`` its slot mapping) or contiguous (one
block a sequence). The rotation is :func:`mrope`'s. Shapes: k, v ``(T, Hk, D)``; q ``(T, Hq, D)``; caches ``(blocks,
block_size, Hk, D)``; slots ``(T,)``. dtypes: float32, bfloat16, float16. Bytes: k and v read and written once, and q
where it is turned along.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..core.backends import resolve
from ..core.checks import INTS, Checker, no_grad_through
from ..core.launching import accumulator, cdiv, jit, launch, next_power_of_2, target_of, tl
from ..core.library import register_opaque, run_in_place
from ..core.namespace import torch_ops
from ..triton.rotary import Angles, check_angles, config, cos_sin, mrope_cos_sin, rotate, turn_heads


def append_kv_ref(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    q: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    inv_freq: torch.Tensor | None = None,
    section: Sequence[int] = (0, 0, 0),
    interleaved: bool = False,
    cos_sin_cache: torch.Tensor | None = None,
    overwrite_k: bool = False,
) -> None:
    """The formula; q, and k where asked, are overwritten with their rotation."""
    turned = k
    if positions is not None:
        cos, sin = mrope_cos_sin(positions, inv_freq, section, interleaved, cos_sin_cache)
        turned = rotate(k, cos, sin)
        if q is not None:
            q.copy_(rotate(q, cos, sin))
        if overwrite_k:
            k.copy_(turned)
    if bool((slots < 0).any()):
        kept = slots >= 0
        slots, turned, v = slots[kept], turned[kept], v[kept]
    for cache, rows in ((k_cache, turned), (v_cache, v)):
        block_size = cache.shape[1]
        if cache.stride(0) == block_size * cache.stride(1):  # one run of slots
            cache.flatten(0, 1).index_copy_(0, slots.long(), rows)
        else:
            cache[slots // block_size, slots % block_size] = rows


@jit
def _copy_heads(
    x, out, from_row, to_row, live, first, x_head, out_head,
    HEADS: tl.constexpr, COUNT: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)[None, :]
    for n in tl.static_range(COUNT):  # pyright: ignore[reportGeneralTypeIssues]
        head = first.to(tl.int64) + n
        mask = live & (column < COLUMNS) & (head < HEADS)
        value = tl.load(x + from_row + head * x_head + column, mask=mask, other=0.0)
        tl.store(out + to_row + head * out_head + column, value, mask=mask)


@jit(do_not_specialize=["tokens", "block_size", "last_position", "position_axis", "position_token", "slot_stride"])
def _append_kernel(
    q, k, v, k_cache, v_cache, slots, positions, inv_freq, cos, sin,
    tokens, block_size, last_position, position_axis, position_token, slot_stride, table_row,
    q_row, q_head, k_row, k_head, v_row, v_head, k_block, k_slot, k_cache_head, v_block, v_slot, v_cache_head,
    Q_HEADS: tl.constexpr, HEADS: tl.constexpr, Q_COUNT: tl.constexpr, COUNT: tl.constexpr, PAIRS: tl.constexpr,
    COLUMNS: tl.constexpr, V_COLUMNS: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr, WHOLE: tl.constexpr,
    V_WHOLE: tl.constexpr, ROWS: tl.constexpr, TIME: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    INTERLEAVED: tl.constexpr, OVERWRITE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # (ROWS, 1)
    live = row < tokens
    slot = tl.load(slots + row * slot_stride, mask=live, other=-1).to(tl.int64)
    stored = slot >= 0
    slot = tl.where(stored, slot, 0)
    block, offset = slot // block_size, slot % block_size
    share = tl.program_id(1)
    k_to = block * k_block + offset * k_slot
    if positions is not None:
        c, s = cos_sin(
            positions, inv_freq, cos, sin, row, tl.arange(0, BLOCK)[None, :], live, last_position, position_axis,
            position_token, table_row, PAIRS, TIME, HEIGHT, WIDTH, INTERLEAVED, ACC,
        )  # fmt: skip
        if q is not None:
            turn_heads(
                q, q, row * q_row, row * q_row, live, c, s, share * Q_COUNT, q_head, q_head,
                Q_HEADS, Q_COUNT, PAIRS, COLUMNS, BLOCK, 0, False, False,
            )  # fmt: skip
        turn_heads(
            k, k_cache, row * k_row, k_to, stored, c, s, share * COUNT, k_head, k_cache_head,
            HEADS, COUNT, PAIRS, COLUMNS, BLOCK, REST, False, False,
        )  # fmt: skip
        if OVERWRITE:
            turn_heads(
                k, k, row * k_row, row * k_row, live, c, s, share * COUNT, k_head, k_head,
                HEADS, COUNT, PAIRS, COLUMNS, BLOCK, 0, False, False,
            )  # fmt: skip
    else:
        _copy_heads(
            k, k_cache, row * k_row, k_to, stored, share * COUNT, k_head, k_cache_head, HEADS, COUNT, COLUMNS, WHOLE
        )
    _copy_heads(
        v, v_cache, row * v_row, block * v_block + offset * v_slot, stored, share * COUNT, v_head, v_cache_head,
        HEADS, COUNT, V_COLUMNS, V_WHOLE,
    )  # fmt: skip


def launch_append(
    k, v, k_cache, v_cache, slots, q, positions, inv_freq, section, interleaved, cos_sin_cache, overwrite_k
) -> None:
    """``append_kv_ref`` in one launch."""
    tokens, heads, columns = k.shape
    q_heads = 0 if q is None else q.shape[1]
    if tokens * (q_heads + heads) == 0:
        return
    angles = Angles.of_cache(positions, inv_freq, cos_sin_cache, section, interleaved)
    pairs = columns // 2 if positions is None else angles.pairs
    rest = columns - 2 * pairs
    chosen = config(pairs, k.dtype, target_of(k.device))
    shares = cdiv(q_heads + 2 * heads, chosen.heads)
    at, inv_freq, cos, sin = angles.tensors()
    launch(
        _append_kernel,
        (cdiv(tokens, chosen.rows), shares),
        k.device,
        q,
        k,
        v,
        k_cache,
        v_cache,
        slots,
        at,
        inv_freq,
        cos,
        sin,
        tokens,
        k_cache.shape[1],
        0 if cos is None else cos.shape[0] - 1,
        *((0, 0) if at is None else at.stride()),
        slots.stride(0),
        0 if cos is None else cos.stride(0),
        *((0, 0) if q is None else q.stride()[:2]),
        *k.stride()[:2],
        *v.stride()[:2],
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        Q_HEADS=q_heads,
        HEADS=heads,
        Q_COUNT=cdiv(q_heads, shares),
        COUNT=cdiv(heads, shares),
        PAIRS=pairs,
        COLUMNS=columns,
        V_COLUMNS=v.shape[-1],
        BLOCK=next_power_of_2(pairs),
        REST=next_power_of_2(rest) if rest else 0,
        WHOLE=next_power_of_2(columns),
        V_WHOLE=next_power_of_2(v.shape[-1]),
        ROWS=chosen.rows,
        OVERWRITE=overwrite_k,
        ACC=accumulator(k.dtype),
        **angles.constants(),
        num_warps=chosen.num_warps,
    )


_BACKENDS = {"eager": append_kv_ref, "triton": launch_append}


def _run(
    q, k, v, k_cache, v_cache, slots, positions, inv_freq, section, interleaved, cos_sin_cache, overwrite_k, backend
) -> None:
    _BACKENDS[backend](
        k, v, k_cache, v_cache, slots, q, positions, inv_freq, section, interleaved, cos_sin_cache, overwrite_k
    )


register_opaque(
    "append_kv(Tensor(a!)? q, Tensor(b!) k, Tensor v, Tensor(c!) k_cache, Tensor(d!) v_cache, Tensor slots,"
    " Tensor? positions, Tensor? inv_freq, int[] section, bool interleaved, Tensor? cos_sin_cache, bool overwrite_k,"
    " str backend) -> ()",
    fake=lambda *arguments: None,
    CPU=_run,
    CUDA=_run,
)


def append_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    *,
    q: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    inv_freq: torch.Tensor | None = None,
    section: Sequence[int] = (0, 0, 0),
    interleaved: bool = False,
    cos_sin_cache: torch.Tensor | None = None,
    overwrite_k: bool = False,
    backend: str | None = None,
) -> None:
    """Store new keys and values in a cache, keys (and queries, in place) rotated on the way.

    Args:
        k: ``(T, Hk, D)``, any token and head strides, last dimension contiguous.
        v: ``(T, Hk, Dv)``, likewise, k's dtype.
        k_cache, v_cache: ``(blocks, block_size, Hk, D)`` and ``(..., Dv)``, k's dtype, any strides but for a contiguous
            last dimension. A contiguous cache ``(B, capacity, Hk, D)`` is one of B blocks.
        slots: ``(T,)`` int32 or int64, ``block * block_size + offset``; a token with a negative slot is not stored.
            Slots must differ. On a GPU they are not checked: one beyond the cache writes outside of it.
        q: ``(T, Hq, D)``, k's dtype: rotated in place, every token of it.
        positions: ``(3, T)`` int32 or int64, with ``inv_freq`` or ``cos_sin_cache``, ``section`` and ``interleaved`` as
            :func:`mrope` takes them. ``None``: keys are stored as they are.
        overwrite_k: rotate k in place too, for an attention that reads it beside the cache.
        backend: ``None`` (choose), ``"triton"``, ``"eager"``.

    Raises ``TypeError``/``ValueError`` naming the argument that does not fit; ``ValueError`` when q, k or v requires
    grad, and on the CPU for slots beyond the cache.
    """
    check = Checker("append_kv")
    check.tensor("k", k, ("T", "Hk", "D"), contiguous_last=True)
    check.tensor("v", v, ("T", "Hk", "Dv"), like=k, contiguous_last=True)
    check.tensor("k_cache", k_cache, ("blocks", "block_size", "Hk", "D"), like=k, contiguous_last=True)
    check.tensor("v_cache", v_cache, ("blocks", "block_size", "Hk", "Dv"), like=k, contiguous_last=True)
    check.tensor("slots", slots, ("T",), dtypes=INTS)
    if q is not None:
        check.tensor("q", q, ("T", "Hq", "D"), like=k, contiguous_last=True)
    if positions is not None:
        check.tensor("positions", positions, (3, "T"), dtypes=INTS)
        check_angles(check, k, inv_freq, section, interleaved, cos_sin_cache)
    else:
        for name, value in (("q", q), ("inv_freq", inv_freq), ("cos_sin_cache", cos_sin_cache)):
            check.require(value is None, f"positions must be given with {name}")
        check.require(not overwrite_k, "positions must be given with overwrite_k")
    no_grad_through("append_kv", "mrope and append_kv on detached tensors", k=k, v=v, **({} if q is None else {"q": q}))
    if k.device.type == "cpu" and slots.numel() and not torch.compiler.is_compiling():
        most, places = int(slots.max()), k_cache.shape[0] * k_cache.shape[1]
        check.require(most < places, f"slots must be below {places}, the cache's number of slots, got {most}")
    chosen = resolve("append_kv", k.device.type, backend)
    tensors = (q, k, v, k_cache, v_cache, slots, positions, inv_freq)
    written = (k_cache, v_cache, q, k if overwrite_k else None)
    settings = (list(section), interleaved, cos_sin_cache, overwrite_k, chosen)
    run_in_place(_run, torch_ops.append_kv, written, *tensors, *settings)
