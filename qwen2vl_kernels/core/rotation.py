"""The formula of the rotary embedding, in PyTorch's operations, and what its arguments must be.

Pair j of a head's columns (j, j + R/2) is rotated by an angle of its own (RoFormer, arXiv 2104.09864, in the half-split
layout of GPT-NeoX). mrope, vision_rope, append_kv and varlen_attention share it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .checks import EAGER_FLOATS, INTS, Checker


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate pairs (j, j + R/2) of ``x (T, H, D)`` by ``cos, sin (T, R/2)`` in their dtype; columns from R pass."""
    half = cos.shape[-1]
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # (T, 1, R/2): one angle for all heads
    a, b = x[..., :half].to(cos.dtype), x[..., half : 2 * half].to(cos.dtype)
    rotated = torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)
    return rotated if 2 * half == x.shape[-1] else torch.cat((rotated, x[..., 2 * half :]), -1)


def by_axis(values: torch.Tensor, section: Sequence[int], interleaved: bool = False) -> torch.Tensor:
    """Select from ``values (3, T, R/2)``, all pairs for each axis, every pair's value on its own axis: ``(T, R/2)``."""
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


def check_rotation(op, q, k, positions, inv_freq, cos, sin, section, interleaved, inverse) -> None:
    """Refuse what the op of a rotation, called by its name, would read or write beyond: ``positions (3, T)`` choose
    among frequencies, or among the rows of ``cos`` and ``sin``; without them row t of these is token t's."""
    check = Checker(op)
    check.tensor("q", q, ("T", "Hq", "D"), contiguous_last=op == "rotate_")
    check.tensor("k", k, ("T", "Hk", "D"), contiguous_last=op == "rotate_")
    if positions is not None:
        check.tensor("positions", positions, (3, "T"), dtypes=INTS)
    if inv_freq is not None:
        check.require(positions is not None, "positions must be given with inv_freq")
        check.tensor("inv_freq", inv_freq, ("R/2",))
    if inv_freq is None or cos is not None or sin is not None:
        rows = "T" if positions is None else "P"
        for name, table in (("cos", cos), ("sin", sin)):
            check.tensor(name, table, (rows, "R/2"), dtypes=EAGER_FLOATS)
        ok = positions is None or check.sizes[rows] > 0
        check.require(ok, "cos and sin must have a row at least, got none")
    pairs = check.sizes["R/2"]
    check.require(2 * pairs <= q.shape[2], f"{pairs} pairs do not fit q's head_dim {q.shape[2]}")
    ok = positions is None or (len(section) == 3 and min(section) >= 0 and sum(section) == pairs)
    check.require(ok, f"section must be three numbers that sum to {pairs} pairs, got {list(section)}")
