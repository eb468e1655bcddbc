"""M-RoPE on new keys, and keys and values written into a cache, in one launch.

    for every token t with slots[t] >= 0:   block, offset = divmod(slots[t], block_size)
        k_cache[block, offset] = rotate(k[t]),   v_cache[block, offset] = v[t]

The cache may be paged (vLLM's layout: blocks of ``block_size`` slots, ``slots`` its slot mapping) or contiguous (one
block a sequence). With a ``block_table`` as ``kvcache_attention`` takes it, token j of row b has the slot
``block_table[b, j // block_size] * block_size + j % block_size``. The rotation is :func:`mrope`'s. Shapes: k, v
``(T, Hk, D)``; q ``(T, Hq, D)``; caches ``(blocks, block_size, Hk, D)``; slots ``(T,)``. dtypes: float32, bfloat16,
float16. The kernel is in ``triton.cache``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..core.backends import resolve
from ..core.checks import INTS, Checker, no_grad_through, no_overlap
from ..core.library import direct, mark_written, register_opaque
from ..core.namespace import torch_ops
from ..core.rotation import check_angles, mrope_cos_sin, rotate
from ..triton.cache import launch_append


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
    rotated = k
    if positions is not None:
        cos, sin = mrope_cos_sin(positions, inv_freq, section, interleaved, cos_sin_cache)
        rotated = rotate(k, cos, sin)
        if q is not None:
            q.copy_(rotate(q, cos, sin))
        if overwrite_k:
            k.copy_(rotated)
    if bool((slots < 0).any()):
        kept = slots >= 0
        slots, rotated, v = slots[kept], rotated[kept], v[kept]
    for cache, rows in ((k_cache, rotated), (v_cache, v)):
        block_size = cache.shape[1]
        if cache.stride(0) == block_size * cache.stride(1):  # one run of slots
            cache.flatten(0, 1).index_copy_(0, slots.long(), rows)
        else:
            cache[slots // block_size, slots % block_size] = rows


_BACKENDS = {"eager": append_kv_ref, "triton": launch_append}


def _run(
    k, v, k_cache, v_cache, slots, q, positions, inv_freq, section, interleaved, cos_sin_cache, overwrite_k, backend
) -> None:
    settings = (section, interleaved, cos_sin_cache, overwrite_k)
    _BACKENDS[backend](k, v, k_cache, v_cache, slots, q, positions, inv_freq, *settings)


def _check(
    k, v, k_cache, v_cache, slots, q, positions, inv_freq, section, interleaved, cos_sin_cache, overwrite_k, backend
) -> str:
    """Refuse what does not fit; returns the backend that serves."""
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
    if k.device.type == "cpu" and slots.numel() and not torch.compiler.is_compiling():
        most, places = int(slots.max()), k_cache.shape[0] * k_cache.shape[1]
        check.require(most < places, f"slots must be below {places}, the cache's number of slots, got {most}")
    return resolve("append_kv", k.device.type, backend)


register_opaque(
    "append_kv(Tensor(a!) k, Tensor v, Tensor(b!) k_cache, Tensor(c!) v_cache, Tensor slots, Tensor(d!)? q,"
    " Tensor? positions, Tensor? inv_freq, int[] section, bool interleaved, Tensor? cos_sin_cache, bool overwrite_k,"
    " str backend) -> ()",
    fake=lambda *arguments: None,
    check=_check,
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
    grad, when what is written shares memory with another argument, and on the CPU for slots beyond the cache.
    """
    angles = (positions, inv_freq, section, interleaved, cos_sin_cache)
    chosen = _check(k, v, k_cache, v_cache, slots, q, *angles, overwrite_k, backend)
    no_grad_through("append_kv", "mrope and append_kv on detached tensors", k=k, v=v, **({} if q is None else {"q": q}))
    written = {"k_cache": k_cache, "v_cache": v_cache, "q": q, **({"k": k} if overwrite_k else {})}
    read = {"v": v, "slots": slots, "positions": positions, "inv_freq": inv_freq, "cos_sin_cache": cos_sin_cache}
    no_overlap("append_kv", written, read if overwrite_k else {"k": k, **read})
    tensors = (k, v, k_cache, v_cache, slots, q, positions, inv_freq)
    settings = (list(section), interleaved, cos_sin_cache, overwrite_k)
    if direct(*tensors, cos_sin_cache):
        _BACKENDS[chosen](*tensors, *settings)
        mark_written(k_cache, v_cache, q, k if overwrite_k else None)
    else:
        torch_ops.append_kv(*tensors, *settings, chosen)
