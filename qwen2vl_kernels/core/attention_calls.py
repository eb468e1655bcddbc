"""How varlen_attention calls others' fused kernels, which ``attention_peers`` chooses among.

They know packs, take strides, keep softmax statistics in float32 and read no boundary on the host. Causal masks end
where queries and keys both end. They leave the rows behind the last segment as they were, in results and in gradients;
``ops.varlen_attention`` makes these zero. Their backward passes get the statistics that their forward passes kept, in a
compiled graph too. By its source FlashAttention 2 multiplies rows by strides in 64 bits, while cuDNN's offsets have 32;
nobody has run either past 2^31 here.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from . import attention_peers
from .tile_plan import Side, TilePlan


def forward(name, q, k, v, plan: TilePlan, longest: Sequence[int], causal: bool, scale: float, keep: bool):
    """``(out (T, Hq, D), lse (T * Hq,))`` by the peer ``name``; lse is its statistics, ``None`` unless ``keep``.

    longest: bounds of the segments' lengths, those of the queries' and those of the keys'.
    """
    packs = _packs(plan, longest)
    q, k, v = at_16_bytes(q, k, v)
    shared = _shared_options(packs, causal, scale)
    if name == "torch":
        options = {"return_debug_mask": False, **shared}
        out, lse = torch.ops.aten._flash_attention_forward(query=q, key=k, value=v, **options)[:2]
    elif name == "cudnn":
        options = {"attn_bias": None, "compute_log_sumexp": keep, "return_debug_mask": False, **shared}
        out, lse = torch.ops.aten._cudnn_attention_forward(query=q, key=k, value=v, **options)[:2]
    else:
        out, lse = _flash_forward(name, q, k, v, packs, causal, scale, keep)
    out = out.contiguous()
    if not keep:
        return out, None
    assert lse is not None, name
    _dimensions[name] = lse.ndim
    return out, lse.reshape(-1)


#: Dimensions of the statistics that a peer's forward returned last: cuDNN's are (T, H, 1) in some versions, (H, T) in
#: others.
_dimensions: dict[str, int] = {}


def statistics(name: str, lse: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """:func:`forward`'s as ``(Hq, T)``, where a row that sees no key has the log of nothing: FlashAttention 2 says
    plus infinity for it."""
    rows, heads, _ = q.shape
    lse = lse.view(rows, heads).t() if _dimensions.get(name) == 3 else lse.view(heads, rows)
    return lse.masked_fill(lse == float("inf"), float("-inf"))


def backward(name, grad, q, k, v, out, lse, plan: TilePlan, longest: Sequence[int], causal: bool, scale: float):
    """``(dq, dk, dv)`` of :func:`forward` from what it returned."""
    packs = _packs(plan, longest)
    q, k, v, grad, out = at_16_bytes(q, k, v, grad.contiguous(), out)
    lse = lse.view(q.shape[0], q.shape[1], 1) if _dimensions.get(name) == 3 else lse.view(q.shape[1], q.shape[0])
    tensors = {"grad_out": grad, "query": q, "key": k, "value": v, "out": out, "logsumexp": lse}
    shared = _shared_options(packs, causal, scale)
    if name == "torch":
        state = torch.empty(2, dtype=torch.uint64, device=q.device)  # of the random numbers for dropout, not read
        grads = torch.ops.aten._flash_attention_backward(**tensors, rng_state=state, unused=state, **shared)
    elif name == "cudnn":
        if torch.are_deterministic_algorithms_enabled():
            _refuse_determinism(name)
        state = torch.empty(1, dtype=torch.int64, device=q.device)
        options = {"philox_seed": state, "philox_offset": state, "attn_bias": None, **shared}
        grads = torch.ops.aten._cudnn_attention_backward(**tensors, **options)
    else:
        grads = _flash_backward(name, grad, q, k, v, out, lse, packs, causal, scale)
    return tuple(x.contiguous() for x in grads)


def _packs(plan: TilePlan, longest: Sequence[int]) -> dict[str, Any]:
    """Boundaries of queries and keys and bounds of their lengths, by the names that flash-attn gives them."""
    packs: dict[str, Any] = {}
    for name, side, most in zip("qk", (plan.queries, plan.keys), longest, strict=True):
        packs |= {f"cu_seqlens_{name}": side.bounds(), f"max_seqlen_{name}": _longest(side, most)}
    return packs


def _longest(side: Side, max_seqlen: int) -> int:
    """What a peer's grid is made of, which must reach every segment, now and when a captured graph is replayed.

    No segment has more rows than there are. FlashAttention 2 takes 1 for decoding, with all segments full.
    """
    side.hold_to(max_seqlen)
    return max(2, min(max_seqlen, side.total))


def _shared_options(packs: dict[str, Any], causal: bool, scale: float) -> dict[str, object]:
    """What PyTorch's two operators and their backward passes are all told, by the names of their schemas."""
    named = {"cu_seqlens_q": "cum_seq_q", "cu_seqlens_k": "cum_seq_k", "max_seqlen_q": "max_q", "max_seqlen_k": "max_k"}
    return {**{named[key]: x for key, x in packs.items()}, "dropout_p": 0.0, "is_causal": causal, "scale": scale}


def at_16_bytes(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Those that begin elsewhere copied: such kernels load 16 bytes at a time, and fault. A view may begin anywhere,
    which a compiler does not tell, so no choice depends on it."""
    return [x if x.data_ptr() % 16 == 0 else x.clone() for x in tensors]


def device_of(q: torch.Tensor) -> AbstractContextManager:
    """Makes q's GPU the current one, as PyTorch's dispatcher does for its own operators: kernels from Python run on
    the current one's stream."""
    elsewhere = q.is_cuda and q.device.index != torch.cuda.current_device()
    return torch.cuda.device(q.device) if elsewhere else nullcontext()


def _refuse_determinism(name: str) -> None:
    """The forward was chosen when nobody asked for it; PyTorch's FlashAttention looks for itself."""
    raise RuntimeError(
        f"varlen_attention: the backward of {name} is not deterministic, and torch.use_deterministic_algorithms(True) "
        f"was called after the forward, which chooses the kernel; call it before"
    )


def _flash_forward(name, q, k, v, packs, causal, scale, keep):
    function = attention_peers.module_of(name).flash_attn_varlen_func
    wanted = {"return_attn_probs", "return_lse"} & inspect.signature(function).parameters.keys() if keep else ()
    with device_of(q):
        result = function(q, k, v, **packs, softmax_scale=scale, causal=causal, **dict.fromkeys(wanted, True))
    return result[:2] if isinstance(result, tuple) else (result, None)


def _flash_backward(name, grad, q, k, v, out, lse, packs, causal, scale):
    made = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    offered = {
        **{"dout": grad, "q": q, "k": k, "v": v, "out": out, "softmax_lse": lse, "lse": lse},
        **packs,
        **{"softmax_scale": scale, "causal": causal, "is_causal": causal},
        **{"deterministic": torch.are_deterministic_algorithms_enabled()},
        **dict(zip(("dq", "dk", "dv"), made, strict=True)),
        **attention_peers.FLASH_CONSTANTS,
    }
    found = attention_peers.backward_of(name)
    assert not isinstance(found, str), found
    function, known = found
    if offered["deterministic"] and "deterministic" not in known:
        _refuse_determinism(name)
    with device_of(q):
        function(**{key: offered[key] for key in known if key in offered})
    return made
