"""Multimodal rotary embedding (M-RoPE) of the language model's queries and keys.

Every token has three positions p = (temporal, height, width). Pair j of a head's columns (j, j + R/2) is rotated by

    angle_j = p[axis(j)] * inv_freq[j]
    (x_j, x_{j+R/2})  ->  (x_j cos - x_{j+R/2} sin,  x_{j+R/2} cos + x_j sin)

(Qwen2-VL, arXiv 2409.12191, section 2.1; rotation in the half-split layout of GPT-NeoX). ``section = (t, h, w)`` says
which axis a pair listens to: in order (t pairs temporal, then h, then w; Qwen2-VL and Qwen2.5-VL), or *interleaved*
(Qwen3-VL): pairs 1, 4, 7, ... below 3h follow height, pairs 2, 5, 8, ... below 3w follow width, all others time.

Shapes: q ``(T, Hq, D)``, k ``(T, Hk, D)``, positions ``(3, T)`` integers, inv_freq ``(R/2,)`` float32 with R <= D;
columns from R on pass through (partial rotary). dtypes: float32, bfloat16, float16; angles and rotation are float32.
The kernels are in ``triton.rotary``, which vision_rope shares.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..core.backends import resolve
from ..core.checks import INTS, Checker, no_grad_through, no_overlap
from ..core.library import register_composite, writes_only
from ..core.rotation import check_angles, mrope_cos_sin, rotate
from ..triton.rotary import halves_of, rotate_in_place, rotated


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
    if resolve("mrope", q.device.type, backend) == "eager":
        return mrope_ref(q, k, positions, inv_freq, section, interleaved, cos_sin_cache)
    return rotated(q, k, positions, inv_freq, *halves_of(cos_sin_cache), section, interleaved)


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
    """:func:`mrope` in place: ``q`` and ``k`` are overwritten and returned. Refused when either requires grad, and
    when what is overwritten shares memory with another argument or, like an expanded tensor, with itself."""
    _check("mrope_", q, k, positions, inv_freq, section, interleaved, cos_sin_cache)
    no_grad_through("mrope_", "mrope", q=q, k=k)
    read = {"positions": positions, "inv_freq": inv_freq, "cos_sin_cache": cos_sin_cache}
    no_overlap("mrope_", {"q": q, "k": k}, read)
    if resolve("mrope", q.device.type, backend) == "eager":
        q_out, k_out = mrope_ref(q, k, positions, inv_freq, section, interleaved, cos_sin_cache)
        q.copy_(q_out)
        k.copy_(k_out)
    else:
        rotate_in_place(q, k, positions, inv_freq, *halves_of(cos_sin_cache), section, interleaved)
    return q, k


def _check(op, q, k, positions, inv_freq, section, interleaved, cos_sin_cache) -> None:
    check = Checker(op)
    check.tensor("q", q, ("T", "Hq", "D"), contiguous_last=True)
    check.tensor("k", k, ("T", "Hk", "D"), like=q, contiguous_last=True)
    check.tensor("positions", positions, (3, "T"), dtypes=INTS)
    check_angles(check, q, inv_freq, section, interleaved, cos_sin_cache)


_SETTINGS = "Tensor positions, Tensor? inv_freq, int[] section, *, bool interleaved=False, Tensor? cos_sin_cache=None"
register_composite(f"mrope(Tensor q, Tensor k, {_SETTINGS}) -> (Tensor, Tensor)", mrope)
register_composite(f"mrope_(Tensor(a!) q, Tensor(b!) k, {_SETTINGS}) -> ()", writes_only(mrope_))
