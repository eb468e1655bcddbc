"""Rotary embedding of the vision tower's queries and keys from ready cosines and sines.

    (x_j, x_{j+R/2})  ->  (x_j cos_j - x_{j+R/2} sin_j,  x_{j+R/2} cos_j + x_j sin_j)

The 2D form of Qwen2-VL (arXiv 2409.12191, section 2.1) lies in the tables: the first half of the pairs is rotated by a
patch's row, the second half by its column (:func:`vision_rope_tables`). Shapes: q, k ``(T, H, D)`` or packed qkv
``(T, 3, H, D)``; cos, sin ``(T, R/2)``, R <= D. dtypes: float32, bfloat16, float16, tables of any float dtype; the
rotation is float32. The kernels are in ``triton.rotary``, which mrope shares.
"""

from __future__ import annotations

import torch

from ..core.backends import resolve
from ..core.checks import INTS, Checker, no_grad_through, no_overlap
from ..core.library import register_composite, writes_only
from ..core.rotation import rotate
from ..triton.rope_tables import tables
from ..triton.rotary import rotate_in_place, rotated


def vision_rope_tables_ref(positions: torch.Tensor, inv_freq: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    angles = (positions.to(inv_freq.dtype).unsqueeze(-1) * inv_freq).flatten(1)  # (T, 2, D/4) -> (T, D/2)
    return angles.cos(), angles.sin()


def vision_rope_ref(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The formula in (at least) float32, rounded once."""
    wide = torch.promote_types(q.dtype, torch.float32)
    cos, sin = cos.to(wide), sin.to(wide)
    return rotate(q, cos, sin), rotate(k, cos, sin)


def _in_place_ref(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    # On a CPU in pieces whose temporaries stay in a core's cache: twice as fast on 5184 tokens (2 Zen 5 cores).
    tokens = q.shape[0]
    step = _PIECE_TOKENS if q.device.type == "cpu" and not torch.compiler.is_compiling() else max(tokens, 1)
    for start in range(0, tokens, step):
        rows = slice(start, start + step)
        q_out, k_out = vision_rope_ref(q[rows], k[rows], cos[rows], sin[rows])
        q[rows].copy_(q_out)
        k[rows].copy_(k_out)


_PIECE_TOKENS = 256


def vision_rope_tables(
    positions: torch.Tensor, inv_freq: torch.Tensor, *, backend: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of ``positions (T, 2)`` (row, column) and ``inv_freq (D/4,)`` float32: two ``(T, D/2)``.

    backend: ``None`` (choose), ``"triton"``, ``"eager"``. Raises ``TypeError``/``ValueError`` naming the argument.
    """
    check = Checker("vision_rope_tables")
    check.tensor("positions", positions, ("T", 2), dtypes=INTS)
    check.tensor("inv_freq", inv_freq, ("D/4",), dtypes=(torch.float32, torch.float64))
    if resolve("vision_rope", positions.device.type, backend) == "eager":
        return vision_rope_tables_ref(positions, inv_freq)
    return tables(positions, inv_freq)


def vision_rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, backend: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate q and k.

    Args:
        q, k: ``(T, H, D)``, one dtype, any token and head strides, last dimension contiguous.
        cos, sin: ``(T, R/2)`` of any float dtype, R <= D; columns from R on pass through.
        backend: ``None`` (choose), ``"triton"``, ``"eager"``.

    Returns new ``(q, k)``. Raises ``TypeError``/``ValueError`` naming the argument that does not fit.
    """
    _check("vision_rope", q, k, cos, sin)
    tracked = torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad)
    if resolve("vision_rope", q.device.type, backend, prefer="eager" if tracked else None) == "eager":
        return vision_rope_ref(q, k, cos, sin)
    if tracked:
        raise ValueError("vision_rope: cos and sin must not require grad with backend 'triton', which gives them none")
    return rotated(q, k, cos=cos, sin=sin)


def vision_rope_(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, backend: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`vision_rope` in place: q and k are overwritten and returned. Refused when either requires grad, and
    when what is overwritten shares memory with another argument or, like an expanded tensor, with itself."""
    _check("vision_rope_", q, k, cos, sin)
    no_grad_through("vision_rope_", "vision_rope", q=q, k=k)
    no_overlap("vision_rope_", {"q": q, "k": k}, {"cos": cos, "sin": sin})
    if resolve("vision_rope", q.device.type, backend) == "eager":
        _in_place_ref(q, k, cos, sin)
    else:
        rotate_in_place(q, k, cos=cos, sin=sin)
    return q, k


def vision_rope_qkv_(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, backend: str | None = None
) -> torch.Tensor:
    """Rotate the q and k inside a packed projection ``(T, 3, H, D)`` in place; v is untouched.

    Args as in :func:`vision_rope`. Returns ``qkv``. Refused when ``qkv`` requires grad.
    """
    check = Checker("vision_rope_qkv_")
    check.tensor("qkv", qkv, ("T", 3, "H", "D"), contiguous_last=True)
    q, k = qkv[:, 0], qkv[:, 1]
    _check("vision_rope_qkv_", q, k, cos, sin)
    no_grad_through("vision_rope_qkv_", "vision_rope on its q and k", qkv=qkv)
    no_overlap("vision_rope_qkv_", {"qkv": qkv}, {"cos": cos, "sin": sin})
    if resolve("vision_rope", q.device.type, backend) == "eager":
        _in_place_ref(q, k, cos, sin)
    else:
        rotate_in_place(q, k, cos=cos, sin=sin)
    return qkv


def _check(op: str, q, k, cos, sin) -> None:
    check = Checker(op)
    check.tensor("q", q, ("T", "Hq", "D"), contiguous_last=True)
    check.tensor("k", k, ("T", "Hk", "D"), like=q, contiguous_last=True)
    check.tensor("cos", cos, ("T", "R/2"))
    check.tensor("sin", sin, ("T", "R/2"))
    check.require(
        2 * cos.shape[-1] <= q.shape[-1],
        f"cos has {cos.shape[-1]} pairs, but q's head_dim {q.shape[-1]} holds {q.shape[-1] // 2}",
    )


register_composite("vision_rope(Tensor q, Tensor k, Tensor cos, Tensor sin) -> (Tensor, Tensor)", vision_rope)
register_composite("vision_rope_(Tensor(a!) q, Tensor(b!) k, Tensor cos, Tensor sin) -> ()", writes_only(vision_rope_))
register_composite("vision_rope_qkv_(Tensor(a!) qkv, Tensor cos, Tensor sin) -> ()", writes_only(vision_rope_qkv_))
register_composite("vision_rope_tables(Tensor positions, Tensor inv_freq) -> (Tensor, Tensor)", vision_rope_tables)
