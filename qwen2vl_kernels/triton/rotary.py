"""The rotation that every rotary op shares: the formula, and its Triton kernels.

Angles come from one of three sources: positions and inverse frequencies, worked out in registers; a table of cosines
and sines by position, read row by row; or ready cosines and sines by token. With positions, every pair of columns
listens to one of three axes (M-RoPE).

Bytes of a token: each value of q and k is read and written once, 2 (Hq + Hk) D b, beside 24 of positions. A program
takes a few tokens and a share of the heads, so that angles are worked out once for many heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..core.checks import Checker
from ..core.launching import Target, accumulator, cdiv, jit, launch, next_power_of_2, target_of, tl
from ..core.library import direct, register_opaque, run_in_place
from ..core.namespace import torch_ops


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate pairs (j, j + R/2) of ``x (T, H, D)`` by ``cos, sin (T, R/2)`` in their dtype; columns from R pass."""
    half = cos.shape[-1]
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # (T, 1, R/2): one angle for all heads
    a, b = x[..., :half].to(cos.dtype), x[..., half : 2 * half].to(cos.dtype)
    turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)
    return turned if 2 * half == x.shape[-1] else torch.cat((turned, x[..., 2 * half :]), -1)


def by_axis(values: torch.Tensor, section: Sequence[int], interleaved: bool = False) -> torch.Tensor:
    """Of ``values (3, T, R/2)``, one row of all pairs an axis, each pair's own axis: ``(T, R/2)``."""
    if not interleaved:
        return torch.cat([part[axis] for axis, part in enumerate(values.split(list(section), -1))], -1)
    mixed = values[0].clone()
    for axis in (1, 2):
        pairs = slice(axis, 3 * section[axis], 3)
        mixed[:, pairs] = values[axis][:, pairs]
    return mixed


def mrope_cos_sin(
    positions: torch.Tensor,
    inv_freq: torch.Tensor | None,
    section: Sequence[int],
    interleaved: bool = False,
    cos_sin_cache: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``(T, R/2)`` cosines and sines of every token and pair, in at least float32."""
    if cos_sin_cache is not None:
        wide = torch.promote_types(cos_sin_cache.dtype, torch.float32)
        cos, sin = cos_sin_cache.to(wide)[positions].chunk(2, -1)  # (3, T, R/2) each
        return by_axis(cos, section, interleaved), by_axis(sin, section, interleaved)
    assert inv_freq is not None
    # A product, not a matrix product: TF32 would round positions above 2048.
    angles = by_axis(positions.to(inv_freq.dtype).unsqueeze(-1) * inv_freq, section, interleaved)
    return angles.cos(), angles.sin()


def check_angles(check: Checker, x, inv_freq, section, interleaved, cos_sin_cache) -> None:
    """Refuse positions' sources that do not fit rows ``x`` of D columns, or each other."""
    check.require(
        (inv_freq is None) != (cos_sin_cache is None),
        "inv_freq and cos_sin_cache: one must be given, got " + ("neither" if inv_freq is None else "both"),
    )
    columns = x.shape[-1]
    if inv_freq is not None:
        check.tensor("inv_freq", inv_freq, ("R/2",), dtypes=(torch.float32, torch.float64))
        name, pairs = "inv_freq", inv_freq.shape[0]
    else:
        check.tensor("cos_sin_cache", cos_sin_cache, ("P", "R"))
        rows, width = cos_sin_cache.shape
        check.require(
            width % 2 == 0 and rows > 0, f"cos_sin_cache must have shape (P, R), P > 0, R even, got {(rows, width)}"
        )
        name, pairs = "cos_sin_cache", width // 2
    check.require(2 * pairs <= columns, f"{name} has {pairs} pairs, but q's head_dim {columns} holds {columns // 2}")
    ok = len(section) == 3 and all(isinstance(s, int) and s >= 0 for s in section)
    check.require(ok, f"section must be three non-negative integers, got {section!r}")
    check.require(sum(section) == pairs, f"section {tuple(section)} must sum to {name}'s {pairs} pairs")
    if interleaved:
        highest = max(3 * section[1] - 2, 3 * section[2] - 1)
        check.require(highest < pairs, f"section {tuple(section)} does not fit {pairs} pairs when interleaved")


@dataclass(frozen=True)
class RotaryConfig:
    rows: int  # tokens of a program
    heads: int  # of q and k together in a program, about
    num_warps: int


def config(pairs: int, dtype: torch.dtype, target: Target) -> RotaryConfig:
    """A vector of 16 bytes a thread from either half of a head, 128 threads a program. Not yet tuned."""
    lanes = max(1, next_power_of_2(pairs) * dtype.itemsize // 16)  # threads that one half of a head keeps busy
    return RotaryConfig(rows=max(1, 128 // lanes), heads=8, num_warps=target.warps(128))


@jit
def _cos_sin_float32(angle):
    """Both of a float32 angle below 2^17 or so, to about an ulp.

    Taken back by quarter turns (pi/2 in three parts, Cody and Waite 1980), then Taylor's series, whose next terms are
    below float32's rounding on [-pi/4, pi/4]. Triton's own functions keep a table in local memory for large angles.
    """
    turns = tl.floor(angle * 0.6366197723675814 + 0.5)
    r = tl.fma(turns, -1.5703125, angle)
    r = tl.fma(turns, -0.0004838267923332751, r)
    r = tl.fma(turns, -2.5633440682570896e-12, r)
    quarter = turns.to(tl.int32)
    x = r * r
    s = r + r * x * (-1 / 6 + x * (1 / 120 + x * (-1 / 5040 + x * (1 / 362880))))
    c = 1 + x * (-0.5 + x * (1 / 24 + x * (-1 / 720 + x * (1 / 40320 + x * (-1 / 3628800)))))
    swapped = (quarter & 1) == 1
    cos = tl.where(swapped, s, c)
    sin = tl.where(swapped, c, s)
    return tl.where(((quarter + 1) & 2) == 2, -cos, cos), tl.where((quarter & 2) == 2, -sin, sin)


@jit
def cos_sin(
    positions, inv_freq, cos, sin, row, column, live, last_position,
    position_axis, position_token, table_row,
    PAIRS: tl.constexpr, TIME: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, INTERLEAVED: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Cosines and sines ``(ROWS, BLOCK)`` of the tokens ``row (ROWS, 1)`` and pairs ``column (1, BLOCK)``."""
    valid = column < PAIRS
    if positions is not None:
        if INTERLEAVED:
            height = (column % 3 == 1) & (column < 3 * HEIGHT)
            width = (column % 3 == 2) & (column < 3 * WIDTH)
        else:
            height = (column >= TIME) & (column < TIME + HEIGHT)
            width = column >= TIME + HEIGHT
        axis = tl.where(height, 1, tl.where(width, 2, 0))  # (1, BLOCK)
        # One load an element: the threads of a warp read three addresses, and no thread reads axes it has no use for.
        position = tl.load(positions + row * position_token + axis * position_axis, mask=live & valid, other=0)
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
def turn(a, b, c, s):
    """The pair (a, b) turned by the angle of cosine c and sine s. Which product of two is rounded is said here: left to
    compilers, kernels that turn would choose differently, and differ in their bits."""
    return tl.fma(a, c, -(b * s)), tl.fma(b, c, a * s)


@jit
def turn_heads(
    x, out, from_row, to_row, live, c, s, first, x_head, out_head,
    HEADS: tl.constexpr, COUNT: tl.constexpr, PAIRS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
    REST: tl.constexpr, FROM_SIDE: tl.constexpr, TO_SIDE: tl.constexpr,
):  # fmt: skip
    """Rotate heads [first, first + COUNT) of the rows that begin at offsets ``from_row``, to offsets ``to_row``.

    ``REST``: a block for the columns from 2 PAIRS on, which are copied; 0 where there are none or all is in place.
    ``FROM_SIDE``, ``TO_SIDE``: pair j lies side by side, in columns 2 j and 2 j + 1, not PAIRS apart.
    """
    column = tl.arange(0, BLOCK)[None, :]
    wide = tl.arange(0, 2 * BLOCK)[None, :]
    for n in tl.static_range(COUNT):  # pyright: ignore[reportGeneralTypeIssues]
        head = first.to(tl.int64) + n
        mask = live & (column < PAIRS) & (head < HEADS)
        at, to = x + from_row + head * x_head, out + to_row + head * out_head
        both = live & (wide < 2 * PAIRS) & (head < HEADS)
        if FROM_SIDE:
            pairs = tl.load(at + wide, mask=both, other=0.0).to(c.dtype)
            a, b = tl.split(tl.reshape(pairs, (pairs.shape[0], BLOCK, 2)))
        else:
            a = tl.load(at + column, mask=mask, other=0.0).to(c.dtype)
            b = tl.load(at + PAIRS + column, mask=mask, other=0.0).to(c.dtype)
        first_turned, second_turned = turn(a, b, c, s)
        if TO_SIDE:
            turned = tl.join(first_turned.to(out.dtype.element_ty), second_turned.to(out.dtype.element_ty))
            tl.store(to + wide, tl.reshape(turned, (turned.shape[0], 2 * BLOCK)), mask=both)
        else:
            tl.store(to + column, first_turned, mask=mask)
            tl.store(to + PAIRS + column, second_turned, mask=mask)
        if REST > 0:
            rest = 2 * PAIRS + tl.arange(0, REST)[None, :]
            mask = live & (rest < COLUMNS) & (head < HEADS)
            tl.store(to + rest, tl.load(at + rest, mask=mask, other=0.0), mask=mask)


@jit(do_not_specialize=["tokens", "last_position", "position_axis", "position_token"])
def _rotate_kernel(
    q, k, q_out, k_out, positions, inv_freq, cos, sin,
    tokens, last_position, position_axis, position_token, table_row,
    q_row, q_head, k_row, k_head, q_out_row, q_out_head, k_out_row, k_out_head,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, Q_COUNT: tl.constexpr, K_COUNT: tl.constexpr, PAIRS: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr, ROWS: tl.constexpr,
    TIME: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr,
    FROM_SIDE: tl.constexpr, TO_SIDE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    live = row < tokens
    c, s = cos_sin(
        positions, inv_freq, cos, sin, row, tl.arange(0, BLOCK)[None, :], live, last_position, position_axis,
        position_token, table_row, PAIRS, TIME, HEIGHT, WIDTH, INTERLEAVED, ACC,
    )  # fmt: skip
    if INVERSE:
        s = -s
    share = tl.program_id(1)
    turn_heads(
        q, q_out, row * q_row, row * q_out_row, live, c, s, share * Q_COUNT, q_head, q_out_head,
        Q_HEADS, Q_COUNT, PAIRS, COLUMNS, BLOCK, REST, FROM_SIDE, TO_SIDE,
    )  # fmt: skip
    turn_heads(
        k, k_out, row * k_row, row * k_out_row, live, c, s, share * K_COUNT, k_head, k_out_head,
        K_HEADS, K_COUNT, PAIRS, COLUMNS, BLOCK, REST, FROM_SIDE, TO_SIDE,
    )  # fmt: skip


@jit(do_not_specialize=["tokens", "position_axis", "position_token"])
def _tables_kernel(
    positions, inv_freq, cos, sin, tokens, position_axis, position_token,
    PAIRS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, TIME: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    live = row < tokens
    frequency = inv_freq + tl.where(column < TIME, 0, -TIME)  # both halves have the same ones
    c, s = cos_sin(
        positions, frequency, None, None, row, column, live, 0, position_axis, position_token, 0,
        PAIRS, TIME, PAIRS - TIME, 0, False, ACC,
    )  # fmt: skip
    mask = live & (column < PAIRS)
    tl.store(cos + row * PAIRS + column, c.to(cos.dtype.element_ty), mask=mask)
    tl.store(sin + row * PAIRS + column, s.to(sin.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class Angles:
    """Where angles come from: ``positions (3, T)`` with ``inv_freq (R/2,)`` or with tables ``cos, sin (P, R/2)`` by
    position; or tables ``(T, R/2)`` by token. ``section``: pairs of the three axes."""

    positions: torch.Tensor | None = None
    inv_freq: torch.Tensor | None = None
    cos: torch.Tensor | None = None
    sin: torch.Tensor | None = None
    section: Sequence[int] = (0, 0, 0)
    interleaved: bool = False
    inverse: bool = False  # turn the other way

    @classmethod
    def of_cache(cls, positions, inv_freq, cos_sin_cache, section, interleaved) -> Angles:
        """With ``cos_sin_cache (P, R)`` where it is given: cosines, then sines, of every position."""
        if cos_sin_cache is None:
            return cls(positions, inv_freq, None, None, section, interleaved)
        cos, sin = cos_sin_cache.chunk(2, -1)
        return cls(positions, None, cos, sin, section, interleaved)

    @property
    def pairs(self) -> int:
        table = self.inv_freq if self.inv_freq is not None else self.cos
        assert table is not None
        return table.shape[-1]

    def op_arguments(self) -> tuple:
        """In the order of the ops' schemas."""
        return (
            self.positions, self.inv_freq, self.cos, self.sin, list(self.section), self.interleaved, self.inverse,
        )  # fmt: skip

    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """Positions, frequencies, cosines and sines with the layout that kernels read."""
        inv_freq = None if self.inv_freq is None else self.inv_freq.contiguous()
        cos, sin = self.cos, self.sin
        if cos is not None and sin is not None and (cos.stride() != sin.stride() or cos.stride(-1) != 1):
            cos, sin = cos.contiguous(), sin.contiguous()
        return self.positions, inv_freq, cos, sin

    def constants(self) -> dict[str, int | bool]:
        time, height, width = self.section
        return {"TIME": time, "HEIGHT": height, "WIDTH": width, "INTERLEAVED": self.interleaved}


def launch_rotation(
    q: torch.Tensor,
    k: torch.Tensor,
    q_out: torch.Tensor,
    k_out: torch.Tensor,
    angles: Angles,
    *,
    from_side: bool = False,
    to_side: bool = False,
) -> None:
    """Rotate ``q (T, Hq, D)`` and ``k (T, Hk, D)`` into tensors of their shapes, which may be themselves.

    ``from_side``, ``to_side``: pair j is in columns 2 j and 2 j + 1 of what is read or written, as attention has it.
    """
    tokens, q_heads, columns = q.shape
    if q.numel() + k.numel() == 0:
        return
    k_heads, pairs = k.shape[1], angles.pairs
    chosen = config(pairs, q.dtype, target_of(q.device))
    shares = cdiv(q_heads + k_heads, chosen.heads)
    rest = 0 if q_out is q and k_out is k else columns - 2 * pairs
    positions, inv_freq, cos, sin = angles.tensors()
    operands = (q, k, q_out, k_out, positions, inv_freq, cos, sin)
    launch(
        _rotate_kernel,
        (cdiv(tokens, chosen.rows), shares),
        q.device,
        *operands,
        tokens,
        0 if cos is None else cos.shape[0] - 1,
        *((0, 0) if positions is None else positions.stride()),
        0 if cos is None else cos.stride(0),
        *q.stride()[:2],
        *k.stride()[:2],
        *q_out.stride()[:2],
        *k_out.stride()[:2],
        Q_HEADS=q_heads,
        K_HEADS=k_heads,
        Q_COUNT=cdiv(q_heads, shares),
        K_COUNT=cdiv(k_heads, shares),
        PAIRS=pairs,
        COLUMNS=columns,
        BLOCK=next_power_of_2(pairs),
        REST=next_power_of_2(rest) if rest else 0,
        ROWS=chosen.rows,
        INVERSE=angles.inverse,
        FROM_SIDE=from_side,
        TO_SIDE=to_side,
        ACC=accumulator(q.dtype),
        **angles.constants(),
        num_warps=chosen.num_warps,
    )


def launch_tables(positions: torch.Tensor, inv_freq: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines ``(T, 2 F)`` of ``positions (T, 2)``, F frequencies for the row and again for the column."""
    tokens, frequencies = positions.shape[0], inv_freq.shape[0]
    cos, sin = _fake_tables(positions, inv_freq)
    if cos.numel() == 0:
        return cos, sin
    chosen = config(2 * frequencies, inv_freq.dtype, target_of(positions.device))
    launch(
        _tables_kernel,
        (cdiv(tokens, chosen.rows),),
        positions.device,
        positions,
        inv_freq.contiguous(),
        cos,
        sin,
        tokens,
        positions.stride(1),
        positions.stride(0),
        PAIRS=2 * frequencies,
        BLOCK=next_power_of_2(2 * frequencies),
        ROWS=chosen.rows,
        TIME=frequencies,
        ACC=accumulator(inv_freq.dtype),
        num_warps=chosen.num_warps,
    )
    return cos, sin


def _rows(x: torch.Tensor) -> torch.Tensor:
    """A gradient may come with any strides."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _rotate(q, k, positions, inv_freq, cos, sin, section, interleaved, inverse):
    outputs = _fake_rotate(q, k)
    angles = Angles(positions, inv_freq, cos, sin, section, interleaved, inverse)
    launch_rotation(_rows(q), _rows(k), *outputs, angles)
    return outputs


def _rotate_in_place(q, k, positions, inv_freq, cos, sin, section, interleaved, inverse) -> None:
    launch_rotation(q, k, q, k, Angles(positions, inv_freq, cos, sin, section, interleaved, inverse))


def _fake_rotate(q, k, *_angles):
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), torch.empty(k.shape, dtype=k.dtype, device=k.device)


def _fake_tables(positions, inv_freq):
    shape = (positions.shape[0], 2 * inv_freq.shape[0])
    return positions.new_empty(shape, dtype=inv_freq.dtype), positions.new_empty(shape, dtype=inv_freq.dtype)


def _setup_context(ctx, inputs, output) -> None:
    _, _, positions, inv_freq, cos, sin, ctx.section, ctx.interleaved, ctx.inverse = inputs
    ctx.save_for_backward(positions, inv_freq, cos, sin)


def _backward(ctx, dq, dk):
    """A rotation's transpose is the rotation by the negative angle."""
    positions, inv_freq, cos, sin = ctx.saved_tensors
    angles = Angles(positions, inv_freq, cos, sin, ctx.section, ctx.interleaved, not ctx.inverse)
    dq, dk = torch_ops.rotate(dq, dk, *angles.op_arguments())
    return dq, dk, None, None, None, None, None, None, None


_ANGLES = "Tensor? positions, Tensor? inv_freq, Tensor? cos, Tensor? sin, int[] section, bool interleaved, bool inverse"
register_opaque(
    f"rotate(Tensor q, Tensor k, {_ANGLES}) -> (Tensor, Tensor)",
    fake=_fake_rotate,
    setup_context=_setup_context,
    backward=_backward,
    CPU=_rotate,
    CUDA=_rotate,
)
register_opaque(
    f"rotate_(Tensor(a!) q, Tensor(b!) k, {_ANGLES}) -> ()",
    fake=lambda *arguments: None,
    CPU=_rotate_in_place,
    CUDA=_rotate_in_place,
)
register_opaque(
    "rope_tables(Tensor positions, Tensor inv_freq) -> (Tensor, Tensor)",
    fake=_fake_tables,
    CPU=launch_tables,
    CUDA=launch_tables,
)


def rotated(q: torch.Tensor, k: torch.Tensor, angles: Angles) -> tuple[torch.Tensor, torch.Tensor]:
    """New q and k. Gradients reach q and k, not the angles."""
    run = _rotate if direct(q, k) else torch_ops.rotate
    return run(q, k, *angles.op_arguments())


def rotate_in_place(q: torch.Tensor, k: torch.Tensor, angles: Angles) -> None:
    run_in_place(_rotate_in_place, torch_ops.rotate_, (q, k), q, k, *angles.op_arguments())


def tables(positions: torch.Tensor, inv_freq: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    run = launch_tables if direct(positions, inv_freq) else torch_ops.rope_tables
    return run(positions, inv_freq)
