"""Multimodal rotary embedding (M-RoPE) of the language model's queries and keys.

Every token has three positions p = (temporal, height, width). Pair j of a head's columns (j, j + R/2) turns by

    angle_j = p[axis(j)] * inv_freq[j]
    (x_j, x_{j+R/2})  ->  (x_j cos - x_{j+R/2} sin,  x_{j+R/2} cos + x_j sin)

(Qwen2-VL, arXiv 2409.12191, section 2.1; rotation in the half-split layout of GPT-NeoX). ``section = (t, h, w)`` says
which axis a pair listens to: in order (t pairs temporal, then h, then w; Qwen2-VL and Qwen2.5-VL), or *interleaved*
(Qwen3-VL): pairs 1, 4, 7, ... below 3h follow height, pairs 2, 5, 8, ... below 3w follow width, all others time.

Shapes: q ``(T, Hq, D)``, k ``(T, Hk, D)``, positions ``(3, T)`` integers, inv_freq ``(R/2,)`` float32 with R <= D;
columns from R on pass through (partial rotary). dtypes: float32, bfloat16, float16; angles and rotation are float32.
The kernels are in ``_rotary``, which vision_rope shares.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .._backend import resolve
from .._checks import INTS, Checker, no_grad_through
from .._library import register_composite
from .._rotary import Angles, rotate, rotate_in_place, rotated


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


def mrope_ref(
    q: torch.Tensor,
    k: torch.Tensor,
    positions: torch.Tensor,
    inv_freq: torch.Tensor | None,
    section: Sequence[int],
    interleaved: bool = False,
    cos_sin_cache: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The formula: angles, cosines and the rotation in inv_freq's dtype, rounded once to q's and k's."""
    cos, sin = mrope_cos_sin(positions, inv_freq, section, interleaved, cos_sin_cache)
    return rotate(q, cos, sin), rotate(k, cos, sin)


def _run(
    q, k, positions, inv_freq, section, interleaved=False, cos_sin_cache=None, backend=None
) -> tuple[torch.Tensor, torch.Tensor]:
    if resolve("mrope", q.device.type, backend) == "eager":
        return mrope_ref(q, k, positions, inv_freq, section, interleaved, cos_sin_cache)
    return rotated(q, k, Angles.of_cache(positions, inv_freq, cos_sin_cache, section, interleaved))


def _run_in_place(q, k, positions, inv_freq, section, interleaved=False, cos_sin_cache=None, backend=None) -> None:
    if resolve("mrope", q.device.type, backend) == "eager":
        q_out, k_out = mrope_ref(q, k, positions, inv_freq, section, interleaved, cos_sin_cache)
        q.copy_(q_out)
        k.copy_(k_out)
    else:
        rotate_in_place(q, k, Angles.of_cache(positions, inv_freq, cos_sin_cache, section, interleaved))


_SETTINGS = "Tensor positions, Tensor? inv_freq, int[] section, bool interleaved=False, Tensor? cos_sin_cache=None"
register_composite(f"mrope(Tensor q, Tensor k, {_SETTINGS}) -> (Tensor, Tensor)", _run)
register_composite(f"mrope_(Tensor(a!) q, Tensor(b!) k, {_SETTINGS}) -> ()", _run_in_place)


def mrope(
    q: torch.Tensor,
    k: torch.Tensor,
    positions: torch.Tensor,
    inv_freq: torch.Tensor | None,
    section: Sequence[int],
    *,
    interleaved: bool = False,
    cos_sin_cache: torch.Tensor | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate queries and keys by their three-axis positions.

    Args:
        q: ``(T, Hq, D)``, any token and head strides, last dimension contiguous.
        k: ``(T, Hk, D)``, likewise, q's dtype.
        positions: ``(3, T)`` int32 or int64: temporal, height, width.
        inv_freq: ``(R/2,)`` float32, R <= D even; ``theta ** (-2j / R)``. ``None`` with ``cos_sin_cache``.
        section: pairs per axis ``(t, h, w)``, summing to R/2. With ``interleaved`` only h and w are read.
        cos_sin_cache: instead of inv_freq, ``(P, R)`` of any float dtype: the cosines, then the sines of R/2 pairs at
            every position below P. On a GPU contents are not checked, and positions outside take the nearest row.
        backend: ``None`` (choose), ``"triton"``, ``"eager"``.

    Returns new ``(q, k)``. Raises ``TypeError``/``ValueError`` naming the argument that does not fit.
    """
    _check("mrope", q, k, positions, inv_freq, section, interleaved, cos_sin_cache)
    return _run(q, k, positions, inv_freq, section, interleaved, cos_sin_cache, backend)


def mrope_(
    q: torch.Tensor,
    k: torch.Tensor,
    positions: torch.Tensor,
    inv_freq: torch.Tensor | None,
    section: Sequence[int],
    *,
    interleaved: bool = False,
    cos_sin_cache: torch.Tensor | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`mrope` in place: ``q`` and ``k`` are overwritten and returned. Refused when either requires grad."""
    _check("mrope_", q, k, positions, inv_freq, section, interleaved, cos_sin_cache)
    no_grad_through("mrope_", "mrope", q=q, k=k)
    _run_in_place(q, k, positions, inv_freq, section, interleaved, cos_sin_cache, backend)
    return q, k


def _check(op, q, k, positions, inv_freq, section, interleaved, cos_sin_cache) -> None:
    check = Checker(op)
    check.tensor("q", q, ("T", "Hq", "D"), contiguous_last=True)
    check.tensor("k", k, ("T", "Hk", "D"), like=q, contiguous_last=True)
    check.tensor("positions", positions, (3, "T"), dtypes=INTS)
    check_angles(check, q, inv_freq, section, interleaved, cos_sin_cache)


def check_angles(check: Checker, x, inv_freq, section, interleaved, cos_sin_cache) -> None:
    """Refuse what :func:`mrope` refuses of its angles, for rows ``x`` of D columns."""
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
