"""A step's attention: the rotary embedding of one new token a row, its place in the cache, and what it attends to.

Row b of the cache holds ``n_b = cache_seqlens[b]`` tokens with the new one. Where 1 <= n_b <= capacity:

    k_cache[b, n_b - 1] = rotate(k[b], positions[b]),   v_cache[b, n_b - 1] = v[b]
    o[b] = sum_j softmax_j(softmax_scale * rotate(q[b], positions[b]) . k_cache[b, j]) v_cache[b, j],   j < n_b

Any other row stores nothing, and its result is zero. A token of text has one position on the three axes of M-RoPE
(arXiv 2409.12191, section 2.1), so that the axes need not be told apart; the pair of columns (j, j + D/2) turns by
``positions[b] * inv_freq[j]``.

Shapes: q ``(B, Hq, D)``, k, v ``(B, Hk, D)``, caches ``(B, capacity, Hk, D)``. It is ``append_kv`` and
``kvcache_attention`` with lengths on the device in one launch (``triton.attention_step``), or in one call of the CPU's
extension (``csrc/cpu/decoder_step``). Inference only.
"""

from __future__ import annotations

from functools import cache as once

import torch

from ..core import native
from ..core.backends import BackendError, forced, resolve
from ..core.checks import INTS, Checker, no_grad_through, no_overlap
from ..core.formulas import attend_to_cache
from ..core.library import direct, mark_written, register_opaque
from ..core.namespace import torch_ops
from ..core.rotation import mrope_cos_sin, rotate
from ..triton.attention_step import launch_step, serves


def decode_attention_ref(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    positions: torch.Tensor,
    inv_freq: torch.Tensor,
    arrived: torch.Tensor,
    softmax_scale: float,
) -> torch.Tensor:
    """The formula, over the whole capacity behind a mask, the softmax in (at least) float32."""
    (batch, _, pairs), capacity = (*q.shape[:2], q.shape[2] // 2), k_cache.shape[1]
    cos, sin = mrope_cos_sin(positions.expand(3, -1), inv_freq, (pairs, 0, 0), False, None)
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    lives = (cache_seqlens > 0) & (cache_seqlens <= capacity)
    end = torch.where(lives, cache_seqlens, 0)
    row, last = torch.arange(batch, device=q.device), (end - 1).clamp(min=0).long()
    for cache, new in ((k_cache, k), (v_cache, v)):
        cache[row, last] = torch.where(lives[:, None, None], new, cache[row, last])
    seen = torch.arange(capacity, device=q.device) < end[:, None]  # (B, capacity)
    return attend_to_cache(q, k_cache, v_cache, seen, softmax_scale)


def _check(
    q, k, v, k_cache, v_cache, cache_seqlens, positions, inv_freq, arrived, softmax_scale, prefetch, backend
) -> str:
    """Refuse what does not fit; returns the backend that serves."""
    check = Checker("decode_attention_")
    check.tensor("q", q, ("B", "Hq", "D"), contiguous_last=True)
    check.tensor("k", k, ("B", "Hk", "D"), like=q, contiguous_last=True)
    check.tensor("v", v, ("B", "Hk", "D"), like=q, contiguous_last=True)
    check.tensor("k_cache", k_cache, ("B", "capacity", "Hk", "D"), like=q, contiguous_last=True)
    check.tensor("v_cache", v_cache, ("B", "capacity", "Hk", "D"), like=q, contiguous_last=True)
    check.tensor("cache_seqlens", cache_seqlens, ("B",), dtypes=(torch.int32,))
    check.tensor("positions", positions, ("B",), dtypes=INTS)
    (_, heads, columns), kv_heads = q.shape, k.shape[1]
    check.require(columns > 0 and columns % 2 == 0, f"q's {columns} columns must be a positive even number")
    check.require(kv_heads > 0 and heads % kv_heads == 0, f"q's {heads} heads must be a multiple of k's {kv_heads}")
    check.tensor("inv_freq", inv_freq, (columns // 2,), dtypes=(torch.float32,), contiguous_last=True)
    check.tensor("arrived", arrived, ("B", "Hk"), dtypes=(torch.int32,))
    check.require(arrived.is_contiguous(), f"arrived must be contiguous, got strides {arrived.stride()}")
    name = resolve("decode_attention", q.device.type, backend)
    asked = backend is not None or forced("decode_attention") is not None
    if name == "native" and not asked and _portable():
        return "eager"
    if name == "eager" or (k_cache.shape[1] > 0 and fits(name, q.dtype, heads, kv_heads, columns)):
        return name
    if asked:
        what = f"{q.dtype}, {heads}/{kv_heads}x{columns} and {k_cache.shape[1]} slots"
        raise BackendError(f"decode_attention_: backend {name!r} takes {_TAKEN[name]}, got {what}")
    return "eager"


_TAKEN = {
    "triton": "16-bit heads of a power of two of 16 to 256 columns, at most 16 queries a key, and slots",
    "native": "bfloat16 heads of a multiple of 16 columns, and slots",
}


def fits(name: str, dtype: torch.dtype, heads: int, kv_heads: int, columns: int) -> bool:
    """Whether the backend of that name has a form for such heads."""
    if name == "native":
        return dtype == torch.bfloat16 and columns % 16 == 0
    return name == "eager" or (dtype in (torch.bfloat16, torch.float16) and serves(heads, kv_heads, columns))


def fused(device_type: str, dtype: torch.dtype, heads: int, kv_heads: int, columns: int) -> bool:
    """Whether what comes first on such a device is one launch, or one call, for such heads."""
    name = resolve("decode_attention", device_type, None)
    if name == "native" and forced("decode_attention") is None and _portable():
        return False
    return name != "eager" and fits(name, dtype, heads, kv_heads, columns)


@once
def _portable() -> bool:
    """Whether the extension knows no instructions of this processor: PyTorch's attention may then be the faster one."""
    return native.cpu().step_kernels()[0] == "portable"


def _run_native(q, k, v, k_cache, v_cache, cache_seqlens, positions, inv_freq, arrived, softmax_scale) -> torch.Tensor:
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    strides = [*(n for one in (q, k, v) for n in one.stride()[:2]), *k_cache.stride()[:3], *v_cache.stride()[:3]]
    native.cpu().decode_attention(
        [one.data_ptr() for one in (q, k, v, k_cache, v_cache)], strides,
        native.view(cache_seqlens), native.view(positions), native.view(inv_freq), out.data_ptr(),
        (*q.shape[:2], k.shape[1], q.shape[2], k_cache.shape[1]), softmax_scale, (torch.get_num_threads(), 0),
    )  # fmt: skip
    return out


def _run(
    q, k, v, k_cache, v_cache, cache_seqlens, positions, inv_freq, arrived, softmax_scale, prefetch, backend
) -> torch.Tensor:
    given = (q, k, v, k_cache, v_cache, cache_seqlens, positions, inv_freq, arrived, softmax_scale)
    if backend == "native":
        return _run_native(*given)
    return launch_step(*given, prefetch) if backend == "triton" else decode_attention_ref(*given)


register_opaque(
    "decode_attention_(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor cache_seqlens,"
    " Tensor positions, Tensor inv_freq, Tensor(c!) arrived, float softmax_scale, bool prefetch, str backend)"
    " -> Tensor",
    fake=lambda q, *_: torch.empty_like(q, memory_format=torch.contiguous_format),
    check=_check,
    CPU=_run,
    CUDA=_run,
)


def decode_attention_(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    positions: torch.Tensor,
    inv_freq: torch.Tensor,
    arrived: torch.Tensor,
    *,
    softmax_scale: float | None = None,
    prefetch: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """Attention of one new token a row, which is rotated and stored on the way.

    Args:
        q: ``(B, Hq, D)``, k, v: ``(B, Hk, D)``, not rotated yet; any strides, last dimension contiguous, so that all
            three may be views of one packed projection.
        k_cache, v_cache: ``(B, capacity, Hk, D)``, q's dtype, written in place; keys of earlier tokens are rotated.
        cache_seqlens: ``(B,)`` int32 on q's device, the tokens of each row with the new one. A row whose length is not
            in [1, capacity] stores nothing and gets zeros.
        positions: ``(B,)`` int32 or int64, the new tokens' place on all three axes.
        inv_freq: ``(D / 2,)`` float32.
        arrived: ``(B, Hk)`` int32 zeros, contiguous, which are zero again when the call has ended; the kernel counts
            in them, so calls that may run side by side must not share them.
        softmax_scale: default ``D ** -0.5``.
        prefetch: on cards from Hopper on, read caches, lengths and positions before the kernel ahead in the stream has
            ended. Only where no kernel launched since the last ordinary one writes them.
        backend: ``None`` (choose), ``"triton"`` (16-bit, D a power of two of 16 to 256, Hq at most 16 Hk),
            ``"native"`` (the CPU's; bfloat16, D a multiple of 16), ``"eager"``.

    Returns ``(B, Hq, D)``. Raises ``TypeError``/``ValueError`` naming the argument that does not fit, ``ValueError``
    when a tensor requires grad or when what is written shares memory with another argument, and :class:`BackendError`
    for a backend that does not serve.
    """
    scale = q.shape[-1] ** -0.5 if softmax_scale is None and isinstance(q, torch.Tensor) else softmax_scale
    given = (q, k, v, k_cache, v_cache, cache_seqlens, positions, inv_freq, arrived, scale, prefetch)
    name = _check(*given, backend)
    no_grad_through("decode_attention_", "mrope and kvcache_attention", q=q, k=k, v=v, k_cache=k_cache, v_cache=v_cache)
    read: dict[str, torch.Tensor | None] = {
        "q": q,
        "k": k,
        "v": v,
        "cache_seqlens": cache_seqlens,
        "positions": positions,
        "inv_freq": inv_freq,
    }
    no_overlap("decode_attention_", {"k_cache": k_cache, "v_cache": v_cache, "arrived": arrived}, read)
    if not direct(*given[:9]):
        return torch_ops.decode_attention_(*given, name)
    out = _run(*given, name)
    mark_written(k_cache, v_cache, arrived)
    return out
