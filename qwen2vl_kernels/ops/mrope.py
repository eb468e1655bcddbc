"""Multimodal rotary embedding (M-RoPE) of the language model's queries and keys.

Every token has three positions p = (temporal, height, width). Pair j of a head's columns (j, j + R/2) turns by

    angle_j = p[axis(j)] * inv_freq[j]
    (x_j, x_{j+R/2})  ->  (x_j cos - x_{j+R/2} sin,  x_{j+R/2} cos + x_j sin)

(Qwen2-VL, arXiv 2409.12191, section 2.1; rotation in the half-split layout of GPT-NeoX). ``section = (t, h, w)`` says
which axis a pair listens to: in order (t pairs temporal, then h, then w; Qwen2-VL and Qwen2.5-VL), or *interleaved*
(Qwen3-VL): pairs 1, 4, 7, ... below 3h follow height, pairs 2, 5, 8, ... below 3w follow width, all others time.

Shapes: q ``(T, Hq, D)``, k ``(T, Hk, D)``, positions ``(3, T)`` integers, inv_freq ``(R/2,)`` float32 with R <= D;
columns from R on pass through (partial rotary). dtypes: float32, bfloat16, float16; angles and rotation are float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .._backend import resolve
from .._checks import INTS, Checker, no_grad_through
from .._library import register_composite
from .._rotary import rotate


def mrope_angles(
    positions: torch.Tensor, inv_freq: torch.Tensor, section: Sequence[int], interleaved: bool = False
) -> torch.Tensor:
    """The ``(T, R/2)`` float32 angles of every token and pair.

    A product, not a matrix product: TF32 would round positions above 2048.
    """
    angles = positions.to(inv_freq.dtype).unsqueeze(-1) * inv_freq  # (3, T, R/2)
    if not interleaved:
        return torch.cat([part[axis] for axis, part in enumerate(angles.split(list(section), -1))], -1)
    mixed = angles[0].clone()
    for axis in (1, 2):
        pairs = slice(axis, 3 * section[axis], 3)
        mixed[:, pairs] = angles[axis][:, pairs]
    return mixed


def mrope_ref(
    q: torch.Tensor,
    k: torch.Tensor,
    positions: torch.Tensor,
    inv_freq: torch.Tensor,
    section: Sequence[int],
    interleaved: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The formula: angles, cosines and the rotation in inv_freq's dtype, rounded once to q's and k's."""
    angles = mrope_angles(positions, inv_freq, section, interleaved)
    cos, sin = angles.cos(), angles.sin()
    return rotate(q, cos, sin), rotate(k, cos, sin)


def _mrope_inplace_ref(
    q: torch.Tensor,
    k: torch.Tensor,
    positions: torch.Tensor,
    inv_freq: torch.Tensor,
    section: Sequence[int],
    interleaved: bool = False,
) -> None:
    q_out, k_out = mrope_ref(q, k, positions, inv_freq, section, interleaved)
    q.copy_(q_out)
    k.copy_(k_out)


register_composite(
    "mrope(Tensor q, Tensor k, Tensor positions, Tensor inv_freq, int[] section, bool interleaved=False)"
    " -> (Tensor, Tensor)",
    mrope_ref,
)
register_composite(
    "mrope_(Tensor(a!) q, Tensor(b!) k, Tensor positions, Tensor inv_freq, int[] section, bool interleaved=False)"
    " -> ()",
    _mrope_inplace_ref,
)


def mrope(
    q: torch.Tensor,
    k: torch.Tensor,
    positions: torch.Tensor,
    inv_freq: torch.Tensor,
    section: Sequence[int],
    *,
    interleaved: bool = False,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate queries and keys by their three-axis positions.

    Args:
        q: ``(T, Hq, D)``, any token and head strides, last dimension contiguous.
        k: ``(T, Hk, D)``, likewise, q's dtype.
        positions: ``(3, T)`` int32 or int64: temporal, height, width.
        inv_freq: ``(R/2,)`` float32, R <= D even; ``theta ** (-2j / R)``.
        section: pairs per axis ``(t, h, w)``, summing to R/2. With ``interleaved`` only h and w are read.
        backend: ``None`` (choose), ``"eager"``.

    Returns new ``(q, k)``. Raises ``TypeError``/``ValueError`` naming the argument that does not fit.
    """
    _check("mrope", q, k, positions, inv_freq, section, interleaved)
    resolve("mrope", q.device.type, backend)
    return mrope_ref(q, k, positions, inv_freq, section, interleaved)


def mrope_(
    q: torch.Tensor,
    k: torch.Tensor,
    positions: torch.Tensor,
    inv_freq: torch.Tensor,
    section: Sequence[int],
    *,
    interleaved: bool = False,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`mrope` in place: ``q`` and ``k`` are overwritten and returned. Refused when either requires grad."""
    _check("mrope_", q, k, positions, inv_freq, section, interleaved)
    no_grad_through("mrope_", "mrope", q=q, k=k)
    resolve("mrope", q.device.type, backend)
    _mrope_inplace_ref(q, k, positions, inv_freq, section, interleaved)
    return q, k


def _check(op, q, k, positions, inv_freq, section, interleaved) -> None:
    check = Checker(op)
    check.tensor("q", q, ("T", "Hq", "D"), contiguous_last=True)
    check.tensor("k", k, ("T", "Hk", "D"), like=q, contiguous_last=True)
    check.tensor("positions", positions, (3, "T"), dtypes=INTS)
    check.tensor("inv_freq", inv_freq, ("R/2",), dtypes=(torch.float32, torch.float64))
    pairs, columns = inv_freq.shape[0], q.shape[-1]
    check.require(2 * pairs <= columns, f"inv_freq has {pairs} pairs, but q's head_dim {columns} holds {columns // 2}")
    ok = len(section) == 3 and all(isinstance(s, int) and s >= 0 for s in section)
    check.require(ok, f"section must be three non-negative integers, got {section!r}")
    check.require(sum(section) == pairs, f"section {tuple(section)} must sum to inv_freq's {pairs} pairs")
    if interleaved:
        highest = max(3 * section[1] - 2, 3 * section[2] - 1)
        check.require(highest < pairs, f"section {tuple(section)} does not fit {pairs} pairs when interleaved")
