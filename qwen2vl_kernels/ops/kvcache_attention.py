"""Attention of new tokens to everything that their sequence holds in a key/value cache.

Row b of the cache holds ``cache_seqlens[b]`` tokens, the last ``n_b`` of which are the queries (n_b = 1 in decoding):

    o_i = sum_j softmax_j(softmax_scale * q_i . k_j) v_j,   j <= cache_seqlens[b] - n_b + i,   i = 0 .. n_b - 1

the causal mask aligned at the bottom right, as in FlashAttention's ``flash_attn_with_kvcache``. For n_b = 2 of 5:

    o o o o .
    o o o o o

Shapes: q ``(T, Hq, D)`` packed row after row, k_cache ``(B, capacity, Hk, D)``, v_cache ``(B, capacity, Hk, Dv)``, Hq a
multiple of Hk. dtypes: float32, bfloat16, float16. Inference only.

Where ``cache_seqlens`` is a tensor, every row has one new token, T = B, and no length comes to the host: the registered
op ``kvcache_attention_decode``, which a captured graph can replay while its rows grow. There the cache may be paged:
with ``block_table (B, blocks)``, k_cache ``(pages, page_size, Hk, D)`` and v_cache ``(pages, page_size, Hk, Dv)``,

    k_j of row b  =  k_cache[block_table[b, j // page_size], j % page_size]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import torch
import torch.nn.functional as F

from ..core.attention_choice import chosen
from ..core.attention_cpu import sdpa
from ..core.backends import resolve
from ..core.checks import Checker
from ..core.formulas import attend_to_cache
from ..core.library import direct, register_opaque
from ..core.matmul import in_autocast_dtype
from ..core.namespace import torch_ops
from ..triton.attention_decode import launch_decode


def kvcache_attention_ref(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    new_tokens: Sequence[int],
    cache_seqlens: Sequence[int],
    softmax_scale: float,
) -> torch.Tensor:
    """The formula, row by row, the softmax in (at least) float32."""
    wide = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k_cache.shape[2]
    parts = []
    for row, (part, seen) in enumerate(zip(q.split(list(new_tokens)), cache_seqlens, strict=True)):
        queries = part.transpose(0, 1)  # (Hq, n, D)
        keys = k_cache[row, :seen].transpose(0, 1).repeat_interleave(group, 0)  # (Hq, seen, D)
        values = v_cache[row, :seen].transpose(0, 1).repeat_interleave(group, 0)
        scores = ((queries * softmax_scale) @ keys.transpose(1, 2)).to(wide)
        future = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(seen - part.shape[0] + 1)
        weights = scores.masked_fill(future, float("-inf")).softmax(-1).to(values.dtype)
        parts.append((weights @ values).transpose(0, 1))
    return torch.cat(parts)


def kvcache_attention_decode_ref(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    softmax_scale: float,
    block_table: torch.Tensor | None = None,
) -> torch.Tensor:
    """The formula for one new token a row, over the whole capacity behind a mask; zeros in a row without tokens."""
    if block_table is not None:
        pages = block_table.masked_fill(~_in_use(block_table, cache_seqlens, k_cache.shape[1]), 0).long()
        k_cache, v_cache = k_cache[pages].flatten(1, 2), v_cache[pages].flatten(1, 2)  # a copy of all that is in use
    seen = torch.arange(k_cache.shape[1], device=q.device) < cache_seqlens[:, None]  # (B, capacity)
    return attend_to_cache(q, k_cache, v_cache, seen, softmax_scale)


def _in_use(block_table: torch.Tensor, cache_seqlens: torch.Tensor, page_size: int) -> torch.Tensor:
    """``(B, blocks)`` bool: the entries of a table that a row reaches; the others mean nothing."""
    begins = torch.arange(block_table.shape[1], device=block_table.device) * page_size
    return begins < cache_seqlens[:, None]


def _by_rows(prompt: Callable, q, k_cache, v_cache, new_tokens, cache_seqlens, softmax_scale) -> torch.Tensor:
    """Row by row, several new tokens by ``prompt``: no row's result depends on how long the others are."""
    kv_heads = k_cache.shape[2]
    out = q.new_empty((q.shape[0], q.shape[1], v_cache.shape[3]))
    start = 0
    for row, (new, seen) in enumerate(zip(new_tokens, cache_seqlens, strict=True)):
        rows, keys, values = slice(start, start + new), k_cache[row, :seen], v_cache[row, :seen]
        if new == 1:
            # The heads that share keys become rows of one query: every key is read once, not once a head. 8x
            # faster than a grouped call at 1333 tokens, 12/2 heads, bf16 (2 Zen 5 cores).
            queries = q[rows].unflatten(1, (kv_heads, -1))  # (1, Hk, Hq / Hk, D)
            ks, vs = (x.transpose(0, 1).unsqueeze(0) for x in (keys, values))  # (1, Hk, seen, D)
            out[rows] = F.scaled_dot_product_attention(queries, ks, vs, scale=softmax_scale).flatten(1, 2)
        elif new:
            out[rows] = prompt(q[rows], keys, values, softmax_scale)
        start += new
    return out


@lru_cache(maxsize=256)
def _one_segment(rows: int) -> torch.Tensor:
    """Boundaries on the host, the same tensor for all layers: its plan is made, and copied to a device, once."""
    with torch.inference_mode(False):
        return torch.tensor([0, rows], dtype=torch.int32)


def _by_sdpa(q, k, v, softmax_scale) -> torch.Tensor:
    return sdpa(q, k, v, _one_segment(q.shape[0]), True, softmax_scale, _one_segment(k.shape[0]))


def _by_varlen(q, k, v, softmax_scale) -> torch.Tensor:
    """varlen_attention over keys of their own number, by what it would choose."""
    longest = q.shape[0], k.shape[0]
    name = chosen(q, k, v, max(longest), causal=True, split=True)
    options = *longest, True, softmax_scale, False, False, name
    return torch_ops.varlen_attention(q, k, v, *map(_one_segment, longest), None, None, *options)[0]


_BACKENDS = {
    "eager": kvcache_attention_ref,
    "sdpa": partial(_by_rows, _by_sdpa),
    "varlen": partial(_by_rows, _by_varlen),
}


def _run(q, k_cache, v_cache, new_tokens, cache_seqlens, softmax_scale, backend) -> torch.Tensor:
    return _BACKENDS[backend](q, k_cache, v_cache, new_tokens, cache_seqlens, softmax_scale)


def _check_tensors(q, k_cache, v_cache, rows: str, slots: tuple[str, str] = ("B", "capacity")) -> Checker:
    check = Checker("kvcache_attention")
    check.tensor("q", q, (rows, "Hq", "D"), contiguous_last=True)
    check.tensor("k_cache", k_cache, (*slots, "Hk", "D"), like=q, contiguous_last=True)
    check.tensor("v_cache", v_cache, (*slots, "Hk", "Dv"), like=q, contiguous_last=True)
    heads, kv_heads = q.shape[1], k_cache.shape[2]
    check.require(
        kv_heads > 0 and heads % kv_heads == 0, f"q's {heads} heads must be a multiple of k_cache's {kv_heads}"
    )
    return check


def _check(q, k_cache, v_cache, new_tokens, cache_seqlens, softmax_scale, backend) -> str:
    """Refuse what does not fit; returns the backend that serves."""
    check = _check_tensors(q, k_cache, v_cache, rows="T")
    batch, capacity = k_cache.shape[:2]
    for name, values in (("new_tokens", new_tokens), ("cache_seqlens", cache_seqlens)):
        check.require(len(values) == batch, f"{name} must have one entry for each of {batch} rows, got {len(values)}")
    ok = min(new_tokens, default=0) >= 0 and sum(new_tokens) == q.shape[0]
    check.require(ok, f"new_tokens must be non-negative and sum to q's {q.shape[0]} rows, got {list(new_tokens)}")
    ok = all(new <= total <= capacity for new, total in zip(new_tokens, cache_seqlens, strict=True))
    check.require(
        ok,
        f"cache_seqlens must be at least new_tokens {list(new_tokens)} and at most the capacity {capacity}, "
        f"got {list(cache_seqlens)}",
    )
    return resolve("kvcache_attention", q.device.type, backend)


register_opaque(
    "kvcache_attention(Tensor q, Tensor k_cache, Tensor v_cache, SymInt[] new_tokens, SymInt[] cache_seqlens,"
    " float softmax_scale, str backend) -> Tensor",
    fake=lambda q, k_cache, v_cache, *_: q.new_empty((q.shape[0], q.shape[1], v_cache.shape[3])),
    check=_check,
    CPU=_run,
    CUDA=_run,
)


_DECODE = {"eager": kvcache_attention_decode_ref, "triton": launch_decode}


def _run_decode(q, k_cache, v_cache, cache_seqlens, softmax_scale, backend, block_table=None) -> torch.Tensor:
    return _DECODE[backend](q, k_cache, v_cache, cache_seqlens, softmax_scale, block_table)


def _check_decode(q, k_cache, v_cache, cache_seqlens, softmax_scale, backend, block_table=None) -> str:
    """Refuse what does not fit by what the host knows; returns the backend that serves."""
    paged = block_table is not None
    check = _check_tensors(q, k_cache, v_cache, "B", ("pages", "page_size") if paged else ("B", "capacity"))
    check.tensor("cache_seqlens", cache_seqlens, ("B",), dtypes=(torch.int32,))
    if paged:
        check.tensor("block_table", block_table, ("B", "blocks"), dtypes=(torch.int32,), contiguous_last=True)
        pages, page_size = k_cache.shape[:2]
        check.require(page_size > 0, f"k_cache must have pages of at least one slot, got {tuple(k_cache.shape)}")
        if q.device.type == "cpu" and not torch.compiler.is_compiling():
            used = block_table[_in_use(block_table, cache_seqlens, page_size)]
            least, most = (int(end) for end in used.aminmax()) if used.numel() else (0, -1)
            got = least if least < 0 else most
            check.require(
                least >= 0 and most < pages,
                f"block_table must hold pages in [0, {pages}) as far as the rows are long, got {got}",
            )
    return resolve("kvcache_attention_decode", q.device.type, backend)


register_opaque(
    "kvcache_attention_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens, float softmax_scale,"
    " str backend, Tensor? block_table=None) -> Tensor",
    fake=lambda q, k_cache, v_cache, *_: q.new_empty((q.shape[0], q.shape[1], v_cache.shape[3])),
    check=_check_decode,
    CPU=_run_decode,
    CUDA=_run_decode,
)


def kvcache_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    new_tokens: Sequence[int] | None,
    cache_seqlens: Sequence[int] | torch.Tensor,
    *,
    block_table: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Attention of each row's newest tokens, already in the cache, to all of that row's tokens.

    Args:
        q: ``(T, Hq, D)``, the new tokens of all rows, row after row; last dimension contiguous.
        k_cache: ``(B, capacity, Hk, D)``, v_cache: ``(B, capacity, Hk, Dv)``, q's dtype, last dimension contiguous.
        new_tokens: B integers on the host, the new tokens of each row, summing to T; ``None`` where ``cache_seqlens``
            is a tensor, which goes with one new token a row: q ``(B, Hq, D)``.
        cache_seqlens: B integers on the host, the tokens in each row with the new ones; at most capacity. Or ``(B,)``
            int32 on q's device, which no host reads: a length of 0 or less gives zeros, one beyond the capacity counts
            as the capacity, and nothing in the cache behind a row's length reaches its result.
        block_table: ``(B, blocks)`` int32 on q's device, with ``cache_seqlens`` in a tensor: the pages of each row, in
            order, of k_cache ``(pages, page_size, Hk, D)`` and v_cache ``(pages, page_size, Hk, Dv)``; any page_size, a
            capacity of ``blocks * page_size``. Rows may share pages. An entry behind a row's length is not read. On a
            GPU entries are not checked: one that is no page reads outside of the cache.
        softmax_scale: default ``D ** -0.5``.
        backend: ``None`` (choose), ``"varlen"`` (row by row, single tokens by PyTorch's fused attention and several by
            what ``varlen_attention`` chooses), ``"sdpa"`` (PyTorch's fused attention for both), ``"eager"``. With
            lengths on the device ``None``, ``"triton"`` or ``"eager"``; ``use_backend`` names them for the op
            ``kvcache_attention_decode``.

    Under autocast the tensors are taken in its dtype, as PyTorch does for matrix products.

    Returns ``(T, Hq, Dv)``. Raises ``TypeError``/``ValueError`` naming the argument that does not fit, also when an
    input requires grad.
    """
    q, k_cache, v_cache = in_autocast_dtype(q, k_cache, v_cache)
    decodes = isinstance(cache_seqlens, torch.Tensor)
    if decodes != (new_tokens is None):
        wanted = "None with lengths in a tensor" if decodes else "a sequence with lengths in a sequence"
        got = new_tokens if new_tokens is None else type(new_tokens).__name__
        raise TypeError(f"kvcache_attention: new_tokens must be {wanted}, got {got}")
    if decodes:
        name = _check_decode(q, k_cache, v_cache, cache_seqlens, softmax_scale, backend, block_table)
    else:
        if block_table is not None:
            raise TypeError("kvcache_attention: block_table must be None with lengths in a sequence, got a tensor")
        name = _check(q, k_cache, v_cache, new_tokens, cache_seqlens, softmax_scale, backend)
    tracked = torch.is_grad_enabled() and (q.requires_grad or k_cache.requires_grad or v_cache.requires_grad)
    if tracked:
        raise ValueError(
            "kvcache_attention: q, k_cache and v_cache must not require grad; call it under torch.no_grad()"
        )
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    if decodes:
        tensors = q, k_cache, v_cache, cache_seqlens
        run = _run_decode if direct(*tensors, block_table) else torch_ops.kvcache_attention_decode
        return run(*tensors, scale, name, block_table)
    run = torch_ops.kvcache_attention if torch.compiler.is_compiling() else _run
    return run(q, k_cache, v_cache, new_tokens, cache_seqlens, scale, name)
