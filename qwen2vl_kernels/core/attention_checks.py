"""What the arguments of varlen_attention must be, whatever serves the call."""

from __future__ import annotations

from typing import Any

import torch

from .checks import Checker


def check_rows(check: Checker, q, k, v, packed: bool) -> None:
    """Refuse other shapes of queries, keys and values, which have rows of their own unless ``packed``."""
    rows_of_keys = "T" if packed else "Tk"
    check.tensor("q", q, ("T", "Hq", "D"), contiguous_last=True)
    check.tensor("k", k, (rows_of_keys, "Hk", "D"), like=q, contiguous_last=True)
    check.tensor("v", v, (rows_of_keys, "Hk", "Dv"), like=q, contiguous_last=True)
    heads, kv_heads = q.shape[1], k.shape[1]
    check.require(kv_heads > 0 and heads % kv_heads == 0, f"q's {heads} heads must be a multiple of k's {kv_heads}")


def check_rope(check: Checker, q: torch.Tensor, rope: object) -> None:
    """Refuse what is no pair of tables of q's rows."""
    ok = isinstance(rope, (tuple, list)) and len(rope) == 2
    check.require(ok, f"rope must be a pair of tensors (cos, sin), got {type(rope).__name__}")
    columns = q.shape[2]
    check.require(columns % 2 == 0, f"rope rotates pairs of columns, but q's head_dim is {columns}")
    for name, table in zip(("rope's cos", "rope's sin"), rope, strict=True):  # pyright: ignore[reportArgumentType]
        check.tensor(name, table, ("T", columns // 2))
        check.require(not table.requires_grad, f"{name} must not require grad: it is given none")


def split_boundaries(*values: Any) -> tuple[Any, Any, tuple[Any, Any]]:
    """Boundaries of queries and of keys (``None`` where these share them) and the bounds of both lengths;
    ``TypeError`` unless one of both forms is given whole."""
    pack, own = ("cu_seqlens", "max_seqlen"), ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    given = tuple(name for name, value in zip((*pack, *own), values, strict=True) if value is not None)
    if given not in (pack, own):
        raise TypeError(
            "varlen_attention: takes either cu_seqlens and max_seqlen, or cu_seqlens_q, cu_seqlens_k, max_seqlen_q and "
            f"max_seqlen_k, got {', '.join(given) or 'none of them'}"
        )
    cu_seqlens, max_seqlen, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k = values
    if given == pack:
        return cu_seqlens, None, (max_seqlen, max_seqlen)
    return cu_seqlens_q, cu_seqlens_k, (max_seqlen_q, max_seqlen_k)


def check_boundaries(check: Checker, q: torch.Tensor, cu_seqlens: Any, max_seqlen: Any, suffix: str) -> None:
    """Refuse what are no boundaries, whatever they hold, or no bound of the lengths."""
    name = f"cu_seqlens{suffix}"
    check.tensor(name, cu_seqlens, ("S+1",), dtypes=(torch.int32,), any_device=True)
    check.require(cu_seqlens.shape[0] >= 1, f"{name} must have at least one entry, got shape (0,)")
    ok = cu_seqlens.device.type == "cpu" or cu_seqlens.device == q.device
    check.require(ok, f"{name} must be on {q.device} or cpu, got {cu_seqlens.device}")
    if not (isinstance(max_seqlen, int) and max_seqlen >= 0):  # words only then: a compiler has no number to put in
        check.require(False, f"max_seqlen{suffix} must be a non-negative int, got {max_seqlen!r}")
