"""The Triton kernels of the rotary embedding, which mrope, vision_rope, append_kv and varlen_attention share.

Angles come from one of three sources: ``positions (3, T)`` and ``inv_freq (R/2,)``, worked out in registers;
``positions`` and tables ``cos, sin (P, R/2)`` by position, read row by row; or tables ``cos, sin (T, R/2)`` by token.
With positions, every pair of columns listens to one of three axes (M-RoPE). The formula is in ``core.rotation``.

Bytes of a token: each value of q and k is read and written once, 2 (Hq + Hk) D b, beside 24 of positions. A program
takes a few tokens and a share of the heads, so that angles are worked out once for many heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from ..core.launching import Target, accumulator, cdiv, jit, launch, like, next_power_of_2, strides, target_of, tl
from ..core.library import direct, mark_written, register_opaque
from ..core.namespace import torch_ops
from ..core.rotation import check_rotation


@dataclass(frozen=True)
class RotaryConfig:
    block_m: int  # tokens of a program
    heads: int  # of q and k together in a program, about
    num_warps: int


def config(pairs: int, dtype: torch.dtype, target: Target) -> RotaryConfig:
    """A vector of 16 bytes a thread from either half of a head, 128 threads a program. Not yet tuned."""
    lanes = max(1, next_power_of_2(pairs) * dtype.itemsize // 16)  # threads that one half of a head keeps busy
    return RotaryConfig(block_m=max(1, 128 // lanes), heads=8, num_warps=target.warps(128))


@jit
def _cos_sin_float32(angle):
    """Cosine and sine of a float32 angle below about 2^17, to about an ulp.

    The angle is reduced by multiples of pi/2, in three parts (Cody and Waite 1980), then Taylor's series is summed,
    whose next terms are below float32's rounding on [-pi/4, pi/4]. Triton's own functions keep a table in local memory
    for large angles.
    """
    quarters = tl.floor(angle * 0.6366197723675814 + 0.5)
    r = tl.fma(quarters, -1.5703125, angle)
    r = tl.fma(quarters, -0.0004838267923332751, r)
    r = tl.fma(quarters, -2.5633440682570896e-12, r)
    quarter = quarters.to(tl.int32)
    x = r * r
    s = r + r * x * (-1 / 6 + x * (1 / 120 + x * (-1 / 5040 + x * (1 / 362880))))
    c = 1 + x * (-0.5 + x * (1 / 24 + x * (-1 / 720 + x * (1 / 40320 + x * (-1 / 3628800)))))
    swapped = (quarter & 1) == 1
    cos = tl.where(swapped, s, c)
    sin = tl.where(swapped, c, s)
    return tl.where(((quarter + 1) & 2) == 2, -cos, cos), tl.where((quarter & 2) == 2, -sin, sin)


@jit
def cos_sin(
    positions,
    inv_freq,
    cos,
    sin,
    row,
    column,
    live,
    last_position,
    positions_axis,
    positions_token,
    table_row,
    PAIRS: tl.constexpr,
    AXES: tl.constexpr,
    ACC: tl.constexpr,
):
    """Cosines and sines ``(BLOCK_M, BLOCK_N)`` of the tokens ``row (BLOCK_M, 1)`` and pairs ``column (1, BLOCK_N)``.

    ``AXES``: pairs of the time, of the height and of the width, and whether they are interleaved.
    """
    valid = column < PAIRS
    if positions is not None:
        TIME: tl.constexpr = AXES[0]
        HEIGHT: tl.constexpr = AXES[1]
        WIDTH: tl.constexpr = AXES[2]
        if AXES[3]:
            height = (column % 3 == 1) & (column < 3 * HEIGHT)
            width = (column % 3 == 2) & (column < 3 * WIDTH)
        else:
            height = (column >= TIME) & (column < TIME + HEIGHT)
            width = column >= TIME + HEIGHT
        axis = tl.where(height, 1, tl.where(width, 2, 0))  # (1, BLOCK_N)
        # One load an element: the threads of a warp read three addresses, and no thread reads axes it has no use for.
        position = tl.load(positions + row * positions_token + axis * positions_axis, mask=live & valid, other=0)
    if inv_freq is not None:
        frequency = tl.load(inv_freq + column, mask=valid, other=0.0)
        angle = position.to(frequency.dtype) * frequency
        if ACC == tl.float32:  # noqa: SIM300
            c, s = _cos_sin_float32(angle)
        else:
            c, s = tl.cos(angle), tl.sin(angle)
    else:
        if positions is not None:
            at_row = tl.minimum(tl.maximum(position, 0), last_position).to(tl.int64) * table_row + column
        else:
            at_row = row * table_row + column
        c = tl.load(cos + at_row, mask=live & valid, other=0.0).to(ACC)
        s = tl.load(sin + at_row, mask=live & valid, other=0.0).to(ACC)
    return c, s


@jit
def rotate_pair(a, b, c, s):
    """The pair (a, b) rotated by the angle of cosine c and sine s.

    Which of the two products is rounded before the sum is written down here: compilers would choose differently in each
    kernel that rotates, and the kernels' results would differ in their bits.
    """
    return tl.fma(a, c, -(b * s)), tl.fma(b, c, a * s)


@jit
def rotate_heads(
    x,
    out,
    from_row,
    to_row,
    live,
    c,
    s,
    first,
    x_head,
    out_head,
    HEADS: tl.constexpr,
    COUNT: tl.constexpr,
    PAIRS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    REST: tl.constexpr,
    ADJACENT_IN: tl.constexpr,
    ADJACENT_OUT: tl.constexpr,
):
    """Rotate heads [first, first + COUNT) of the rows that begin at offsets ``from_row``, to offsets ``to_row``.

    ``REST``: a block for the columns from 2 PAIRS on, which are copied; 0 where there are none or all is in place.
    ``ADJACENT_IN``, ``ADJACENT_OUT``: pair j lies side by side, in columns 2 j and 2 j + 1, not PAIRS apart.
    """
    column = tl.arange(0, BLOCK_N)[None, :]
    wide = tl.arange(0, 2 * BLOCK_N)[None, :]
    for n in tl.static_range(COUNT):  # pyright: ignore[reportGeneralTypeIssues]
        head = first.to(tl.int64) + n
        mask = live & (column < PAIRS) & (head < HEADS)
        at, to = x + from_row + head * x_head, out + to_row + head * out_head
        both = live & (wide < 2 * PAIRS) & (head < HEADS)
        if ADJACENT_IN:
            pairs = tl.load(at + wide, mask=both, other=0.0).to(c.dtype)
            a, b = tl.split(tl.reshape(pairs, (pairs.shape[0], BLOCK_N, 2)))
        else:
            a = tl.load(at + column, mask=mask, other=0.0).to(c.dtype)
            b = tl.load(at + PAIRS + column, mask=mask, other=0.0).to(c.dtype)
        rotated_a, rotated_b = rotate_pair(a, b, c, s)
        if ADJACENT_OUT:
            rotated = tl.join(rotated_a.to(out.dtype.element_ty), rotated_b.to(out.dtype.element_ty))
            tl.store(to + wide, tl.reshape(rotated, (rotated.shape[0], 2 * BLOCK_N)), mask=both)
        else:
            tl.store(to + column, rotated_a, mask=mask)
            tl.store(to + PAIRS + column, rotated_b, mask=mask)
        if REST > 0:
            rest = 2 * PAIRS + tl.arange(0, REST)[None, :]
            mask = live & (rest < COLUMNS) & (head < HEADS)
            tl.store(to + rest, tl.load(at + rest, mask=mask, other=0.0), mask=mask)


@jit(do_not_specialize=["tokens", "last_position", "positions_axis", "positions_token"])
def _rotate_kernel(
    q,
    k,
    q_out,
    k_out,
    positions,
    inv_freq,
    cos,
    sin,
    tokens,
    last_position,
    positions_axis,
    positions_token,
    cos_row,
    q_row,
    q_head,
    k_row,
    k_head,
    q_out_row,
    q_out_head,
    k_out_row,
    k_out_head,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    Q_COUNT: tl.constexpr,
    K_COUNT: tl.constexpr,
    PAIRS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    AXES: tl.constexpr,
    INVERSE: tl.constexpr,
    ADJACENT_IN: tl.constexpr,
    ADJACENT_OUT: tl.constexpr,
    ACC: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    live = row < tokens
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
    if INVERSE:
        s = -s
    share = tl.program_id(1)
    rotate_heads(
        q,
        q_out,
        row * q_row,
        row * q_out_row,
        live,
        c,
        s,
        share * Q_COUNT,
        q_head,
        q_out_head,
        Q_HEADS,
        Q_COUNT,
        PAIRS,
        COLUMNS,
        BLOCK_N,
        REST,
        ADJACENT_IN,
        ADJACENT_OUT,
    )
    rotate_heads(
        k,
        k_out,
        row * k_row,
        row * k_out_row,
        live,
        c,
        s,
        share * K_COUNT,
        k_head,
        k_out_head,
        K_HEADS,
        K_COUNT,
        PAIRS,
        COLUMNS,
        BLOCK_N,
        REST,
        ADJACENT_IN,
        ADJACENT_OUT,
    )


def launch_rotation(
    q: torch.Tensor,
    k: torch.Tensor,
    q_out: torch.Tensor,
    k_out: torch.Tensor,
    positions: torch.Tensor | None = None,
    inv_freq: torch.Tensor | None = None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    section: Sequence[int] = (0, 0, 0),
    interleaved: bool = False,
    inverse: bool = False,
    *,
    pairs_adjacent_in: bool = False,
    pairs_adjacent_out: bool = False,
) -> None:
    """Rotate ``q (T, Hq, D)`` and ``k (T, Hk, D)`` into tensors of their shapes, which may be themselves.

    ``inverse``: by the negative angles. ``pairs_adjacent_in``, ``pairs_adjacent_out``: pair j is in columns 2 j and
    2 j + 1 of what is read or written, as the attention kernels hold it.
    """
    (tokens, q_heads, columns), k_heads = q.shape, k.shape[1]
    if q.numel() + k.numel() == 0:
        return
    inv_freq, cos, sin = as_kernels_read(inv_freq, cos, sin)
    pairs = pairs_of(inv_freq, cos)
    chosen = config(pairs, q.dtype, target_of(q.device))
    shares = cdiv(q_heads + k_heads, chosen.heads)
    rest = 0 if q_out is q and k_out is k else columns - 2 * pairs
    launch(
        _rotate_kernel,
        (cdiv(tokens, chosen.block_m), shares),
        q.device,
        q=q,
        k=k,
        q_out=q_out,
        k_out=k_out,
        positions=positions,
        inv_freq=inv_freq,
        cos=cos,
        sin=sin,
        tokens=tokens,
        last_position=0 if cos is None else cos.shape[0] - 1,
        **strides(("axis", "token"), positions=positions),
        **strides(("row",), cos=cos),
        **strides(("row", "head"), q=q, k=k, q_out=q_out, k_out=k_out),
        Q_HEADS=q_heads,
        K_HEADS=k_heads,
        Q_COUNT=cdiv(q_heads, shares),
        K_COUNT=cdiv(k_heads, shares),
        PAIRS=pairs,
        COLUMNS=columns,
        BLOCK_N=next_power_of_2(pairs),
        REST=next_power_of_2(rest) if rest else 0,
        BLOCK_M=chosen.block_m,
        INVERSE=inverse,
        ADJACENT_IN=pairs_adjacent_in,
        ADJACENT_OUT=pairs_adjacent_out,
        ACC=accumulator(q.dtype),
        AXES=(*section, interleaved),
        num_warps=chosen.num_warps,
    )


def halves_of(cos_sin_cache: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Cosines and sines by position from ``cos_sin_cache (P, R)``, which has them side by side, as views."""
    if cos_sin_cache is None:
        return None, None
    half = cos_sin_cache.shape[-1] // 2
    return cos_sin_cache[:, :half], cos_sin_cache[:, half:]


def pairs_of(inv_freq: torch.Tensor | None, cos: torch.Tensor | None) -> int:
    """Pairs of columns that are rotated, R/2."""
    table = inv_freq if inv_freq is not None else cos
    assert table is not None
    return table.shape[-1]


def as_kernels_read(
    inv_freq: torch.Tensor | None, cos: torch.Tensor | None, sin: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Frequencies and tables in the one layout that the kernels read: cosines and sines have equal strides."""
    inv_freq = None if inv_freq is None else inv_freq.contiguous()
    if cos is not None and sin is not None and (cos.stride() != sin.stride() or cos.stride(-1) != 1):
        cos, sin = cos.contiguous(), sin.contiguous()
    return inv_freq, cos, sin


def _last_contiguous(x: torch.Tensor) -> torch.Tensor:
    """A gradient may come with any strides."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _rotate(q, k, *angles):
    q_out, k_out = like(q, k)
    launch_rotation(_last_contiguous(q), _last_contiguous(k), q_out, k_out, *angles)
    return q_out, k_out


def _rotate_in_place(q, k, *angles) -> None:
    launch_rotation(q, k, q, k, *angles)


def _setup_context(ctx, inputs, output) -> None:
    _, _, positions, inv_freq, cos, sin, ctx.section, ctx.interleaved, ctx.inverse = inputs
    ctx.save_for_backward(positions, inv_freq, cos, sin)


def _backward(ctx, dq, dk):
    """A rotation's transpose is the rotation by the negative angle."""
    angles = (*ctx.saved_tensors, ctx.section, ctx.interleaved, not ctx.inverse)
    dq, dk = torch_ops.rotate(dq, dk, *angles)
    return dq, dk, *[None] * len(angles)


_ANGLES = "Tensor? positions, Tensor? inv_freq, Tensor? cos, Tensor? sin, int[] section, bool interleaved, bool inverse"
register_opaque(
    f"rotate(Tensor q, Tensor k, {_ANGLES}) -> (Tensor, Tensor)",
    fake=lambda q, k, *_: like(q, k),
    check=partial(check_rotation, "rotate"),
    setup_context=_setup_context,
    backward=_backward,
    CPU=_rotate,
    CUDA=_rotate,
)
register_opaque(
    f"rotate_(Tensor(a!) q, Tensor(b!) k, {_ANGLES}) -> ()",
    fake=lambda *arguments: None,
    check=partial(check_rotation, "rotate_"),
    CPU=_rotate_in_place,
    CUDA=_rotate_in_place,
)


def rotated(
    q: torch.Tensor,
    k: torch.Tensor,
    positions: torch.Tensor | None = None,
    inv_freq: torch.Tensor | None = None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    section: Sequence[int] = (0, 0, 0),
    interleaved: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """New q and k, rotated. Gradients reach q and k, not the angles."""
    if not direct(q, k):
        section = list(section)
        return torch_ops.rotate(q, k, positions, inv_freq, cos, sin, section, interleaved, False)
    q_out, k_out = like(q, k)
    launch_rotation(q, k, q_out, k_out, positions, inv_freq, cos, sin, section, interleaved)
    return q_out, k_out


def rotate_in_place(
    q: torch.Tensor,
    k: torch.Tensor,
    positions: torch.Tensor | None = None,
    inv_freq: torch.Tensor | None = None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    section: Sequence[int] = (0, 0, 0),
    interleaved: bool = False,
) -> None:
    """q and k, overwritten with their rotation."""
    if direct(q, k, positions, inv_freq, cos, sin):
        launch_rotation(q, k, q, k, positions, inv_freq, cos, sin, section, interleaved)
        mark_written(q, k)
    else:
        section = list(section)
        torch_ops.rotate_(q, k, positions, inv_freq, cos, sin, section, interleaved, False)
