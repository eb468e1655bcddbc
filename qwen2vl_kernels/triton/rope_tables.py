"""The Triton kernel of vision_rope_tables: cosines and sines of every patch, by its row and its column.

Half of the pairs are rotated by the row, the other half by the column, with the same frequencies. Bytes of a patch: 16
of positions and two rows of D/2 values in float32.
"""

from __future__ import annotations

import torch

from ..core.checks import EAGER_FLOATS, INTS, Checker
from ..core.launching import accumulator, cdiv, jit, launch, next_power_of_2, strides, target_of, tl
from ..core.library import direct, register_opaque
from ..core.namespace import torch_ops
from .rotary import config, cos_sin


@jit(do_not_specialize=["tokens", "positions_axis", "positions_token"])
def _tables_kernel(
    positions,
    inv_freq,
    cos,
    sin,
    tokens,
    positions_axis,
    positions_token,
    PAIRS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    AXES: tl.constexpr,
    ACC: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    column = tl.arange(0, BLOCK_N)[None, :]
    live = row < tokens
    frequency = inv_freq + tl.where(column < AXES[0], 0, -AXES[0])  # both halves have the same ones
    c, s = cos_sin(
        positions,
        frequency,
        None,
        None,
        row,
        column,
        live,
        0,
        positions_axis,
        positions_token,
        0,
        PAIRS,
        AXES,
        ACC,
    )
    mask = live & (column < PAIRS)
    tl.store(cos + row * PAIRS + column, c.to(cos.dtype.element_ty), mask=mask)
    tl.store(sin + row * PAIRS + column, s.to(sin.dtype.element_ty), mask=mask)


def launch_tables(positions: torch.Tensor, inv_freq: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines ``(T, 2 F)`` of ``positions (T, 2)``: F frequencies for the row, then F for the column."""
    tokens, frequencies = positions.shape[0], inv_freq.shape[0]
    cos, sin = _fake_tables(positions, inv_freq)
    if cos.numel() == 0:
        return cos, sin
    chosen = config(2 * frequencies, inv_freq.dtype, target_of(positions.device))
    launch(
        _tables_kernel,
        (cdiv(tokens, chosen.block_m),),
        positions.device,
        positions=positions,
        inv_freq=inv_freq.contiguous(),
        cos=cos,
        sin=sin,
        tokens=tokens,
        **strides(("token", "axis"), positions=positions),
        PAIRS=2 * frequencies,
        BLOCK_N=next_power_of_2(2 * frequencies),
        BLOCK_M=chosen.block_m,
        AXES=(frequencies, frequencies, 0, False),
        ACC=accumulator(inv_freq.dtype),
        num_warps=chosen.num_warps,
    )
    return cos, sin


def _fake_tables(positions, inv_freq):
    shape = (positions.shape[0], 2 * inv_freq.shape[0])
    return positions.new_empty(shape, dtype=inv_freq.dtype), positions.new_empty(shape, dtype=inv_freq.dtype)


def _check(positions, inv_freq) -> None:
    check = Checker("rope_tables")
    check.tensor("positions", positions, ("T", 2), dtypes=(*INTS, *EAGER_FLOATS))
    check.tensor("inv_freq", inv_freq, ("F",))


register_opaque(
    "rope_tables(Tensor positions, Tensor inv_freq) -> (Tensor, Tensor)",
    fake=_fake_tables,
    check=_check,
    CPU=launch_tables,
    CUDA=launch_tables,
)


def tables(positions: torch.Tensor, inv_freq: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`launch_tables`, or the op of it."""
    run = launch_tables if direct(positions, inv_freq) else torch_ops.rope_tables
    return run(positions, inv_freq)
