"""The Triton kernel of append_kv: M-RoPE on new keys and queries, and keys and values stored in a cache, in one launch.

Bytes of a token: k and v are read and written once, and q where it is rotated along. A program takes a few tokens and a
share of the heads, as in ``triton.rotary``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..core.launching import accumulator, cdiv, jit, launch, next_power_of_2, strides, target_of, tl
from .rotary import as_kernels_read, config, cos_sin, halves_of, pairs_of, rotate_heads


@jit
def _copy_heads(
    x,
    out,
    from_row,
    to_row,
    live,
    first,
    x_head,
    out_head,
    HEADS: tl.constexpr,
    COUNT: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    column = tl.arange(0, BLOCK_N)[None, :]
    for n in tl.static_range(COUNT):  # pyright: ignore[reportGeneralTypeIssues]
        head = first.to(tl.int64) + n
        mask = live & (column < COLUMNS) & (head < HEADS)
        value = tl.load(x + from_row + head * x_head + column, mask=mask, other=0.0)
        tl.store(out + to_row + head * out_head + column, value, mask=mask)


@jit(do_not_specialize=["tokens", "block_size", "last_position", "positions_axis", "positions_token", "slots_token"])
def _append_kernel(
    q,
    k,
    v,
    k_cache,
    v_cache,
    slots,
    positions,
    inv_freq,
    cos,
    sin,
    tokens,
    block_size,
    last_position,
    positions_axis,
    positions_token,
    slots_token,
    cos_row,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    k_cache_block,
    k_cache_slot,
    k_cache_head,
    v_cache_block,
    v_cache_slot,
    v_cache_head,
    Q_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    Q_COUNT: tl.constexpr,
    COUNT: tl.constexpr,
    PAIRS: tl.constexpr,
    COLUMNS: tl.constexpr,
    V_COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    REST: tl.constexpr,
    WHOLE: tl.constexpr,
    V_WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    AXES: tl.constexpr,
    OVERWRITE: tl.constexpr,
    ACC: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]  # (BLOCK_M, 1)
    live = row < tokens
    slot = tl.load(slots + row * slots_token, mask=live, other=-1).to(tl.int64)
    stored = slot >= 0
    slot = tl.where(stored, slot, 0)
    block, offset = slot // block_size, slot % block_size
    share = tl.program_id(1)
    k_to = block * k_cache_block + offset * k_cache_slot
    if positions is not None:
        c, s = cos_sin(
            positions,
            inv_freq,
            cos,
            sin,
            row,
            tl.arange(0, BLOCK_N)[None, :],
            live,
            last_position,
            positions_axis,
            positions_token,
            cos_row,
            PAIRS,
            AXES,
            ACC,
        )
        if q is not None:
            rotate_heads(
                q,
                q,
                row * q_row,
                row * q_row,
                live,
                c,
                s,
                share * Q_COUNT,
                q_head,
                q_head,
                Q_HEADS,
                Q_COUNT,
                PAIRS,
                COLUMNS,
                BLOCK_N,
                0,
                False,
                False,
            )
        rotate_heads(
            k,
            k_cache,
            row * k_row,
            k_to,
            stored,
            c,
            s,
            share * COUNT,
            k_head,
            k_cache_head,
            HEADS,
            COUNT,
            PAIRS,
            COLUMNS,
            BLOCK_N,
            REST,
            False,
            False,
        )
        if OVERWRITE:
            rotate_heads(
                k,
                k,
                row * k_row,
                row * k_row,
                live,
                c,
                s,
                share * COUNT,
                k_head,
                k_head,
                HEADS,
                COUNT,
                PAIRS,
                COLUMNS,
                BLOCK_N,
                0,
                False,
                False,
            )
    else:
        _copy_heads(
            k, k_cache, row * k_row, k_to, stored, share * COUNT, k_head, k_cache_head, HEADS, COUNT, COLUMNS, WHOLE
        )
    _copy_heads(
        v,
        v_cache,
        row * v_row,
        block * v_cache_block + offset * v_cache_slot,
        stored,
        share * COUNT,
        v_head,
        v_cache_head,
        HEADS,
        COUNT,
        V_COLUMNS,
        V_WHOLE,
    )


def launch_append(
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
    """Shapes as :func:`qwen2vl_kernels.append_kv` has them."""
    (tokens, heads, columns), v_columns = k.shape, v.shape[-1]
    q_heads = 0 if q is None else q.shape[1]
    if tokens * (q_heads + heads) == 0:
        return
    inv_freq, cos, sin = as_kernels_read(inv_freq, *halves_of(cos_sin_cache))
    pairs = columns // 2 if positions is None else pairs_of(inv_freq, cos)
    rest = columns - 2 * pairs
    chosen = config(pairs, k.dtype, target_of(k.device))
    shares = cdiv(q_heads + 2 * heads, chosen.heads)
    launch(
        _append_kernel,
        (cdiv(tokens, chosen.block_m), shares),
        k.device,
        q=q,
        k=k,
        v=v,
        k_cache=k_cache,
        v_cache=v_cache,
        slots=slots,
        positions=positions,
        inv_freq=inv_freq,
        cos=cos,
        sin=sin,
        tokens=tokens,
        block_size=k_cache.shape[1],
        last_position=0 if cos is None else cos.shape[0] - 1,
        **strides(("axis", "token"), positions=positions),
        **strides(("token",), slots=slots),
        **strides(("row",), cos=cos),
        **strides(("row", "head"), q=q, k=k, v=v),
        **strides(("block", "slot", "head"), k_cache=k_cache, v_cache=v_cache),
        Q_HEADS=q_heads,
        HEADS=heads,
        Q_COUNT=cdiv(q_heads, shares),
        COUNT=cdiv(heads, shares),
        PAIRS=pairs,
        COLUMNS=columns,
        V_COLUMNS=v_columns,
        BLOCK_N=next_power_of_2(pairs),
        REST=next_power_of_2(rest) if rest else 0,
        WHOLE=next_power_of_2(columns),
        V_WHOLE=next_power_of_2(v_columns),
        BLOCK_M=chosen.block_m,
        AXES=(*section, interleaved),
        OVERWRITE=overwrite_k,
        ACC=accumulator(k.dtype),
        num_warps=chosen.num_warps,
    )
