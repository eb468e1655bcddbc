"""varlen_attention by others' fused kernels: PyTorch's own FlashAttention 2, and flash-attn 4, 3 or 2 when installed.

They know packs, take strides, keep softmax statistics in float32 and read no boundary on the host. What they leave open
is closed here: rows past the last segment are made zero. Their backward sums with atomics unless told otherwise.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

#: Distribution's module, and the first capability that it runs on; newest first.
_FLASH = (("flash_attn.cute", 90), ("flash_attn_interface", 90), ("flash_attn", 80))


def torch_reason() -> str | None:
    """Why PyTorch's varlen_attn cannot serve CUDA tensors, or ``None``."""
    if torch.version.hip is None and (old := _older_than(80)) is not None:
        return old
    try:
        importlib.import_module("torch.nn.attention.varlen")
    except ImportError as error:
        return f"this PyTorch has no varlen_attn: {error}"
    return None


def flash_reason() -> str | None:
    """Why no flash-attn can serve CUDA tensors, or ``None``."""
    found = flash_function()
    return found if isinstance(found, str) else None


@cache
def flash_function() -> Callable[..., Any] | str:
    """flash-attn's ``flash_attn_varlen_func``, of the newest that is installed and runs on the GPU; or why there is
    none."""
    problems = []
    for name, capability in _FLASH:
        try:
            function = importlib.import_module(name).flash_attn_varlen_func
        except (ImportError, AttributeError, RuntimeError, OSError) as error:  # built for another torch or CUDA, say
            problems.append(f"{name}: {error}")
            continue
        if (old := _older_than(capability)) is not None:
            problems.append(f"{name}: {old}")
            continue
        return function
    return "; ".join(problems)


def _older_than(capability: int) -> str | None:
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    have = 10 * major + minor
    return f"it needs a GPU of capability {capability / 10}, this one has {have / 10}" if have < capability else None


def shape_reason(q: torch.Tensor, v: torch.Tensor) -> str | None:
    """What these kernels do not take: other dtypes than the 16-bit ones, and widths beyond theirs."""
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 and float16, got {q.dtype}"
    if q.shape[2] != v.shape[2] or q.shape[2] % 8 or q.shape[2] > 256:
        return f"it takes one head_dim, a multiple of 8 up to 256, got {q.shape[2]} and {v.shape[2]}"
    return None


def torch_varlen(q, k, v, cu_seqlens, max_seqlen: int, causal: bool, scale: float) -> torch.Tensor:
    """``torch.nn.attention.varlen.varlen_attn``, whose arguments changed from 2.10 on."""
    from torch.nn.attention.varlen import varlen_attn

    attend: Any = varlen_attn
    known = inspect.signature(attend).parameters
    settings: dict[str, Any] = {}
    if causal:
        settings |= {"is_causal": True} if "is_causal" in known else {"window_size": (-1, 0)}
    if "scale" in known:
        settings["scale"] = scale
    elif scale != q.shape[2] ** -0.5:
        raise ValueError(
            f"varlen_attention: backend 'torch' of PyTorch {torch.__version__} takes no softmax_scale but "
            f"{q.shape[2] ** -0.5}, got {scale}"
        )
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in known:
            settings["enable_gqa"] = True
        else:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    bounds = cu_seqlens.to(q.device)
    return _zero_past(attend(q, k, v, bounds, bounds, max_seqlen, max_seqlen, **settings), cu_seqlens)


def flash_varlen(q, k, v, cu_seqlens, max_seqlen: int, causal: bool, scale: float) -> torch.Tensor:
    """``flash_attn_varlen_func``, in the arguments that 2, 3 and 4 share."""
    function = flash_function()
    assert not isinstance(function, str), function
    bounds = cu_seqlens.to(q.device)
    out = function(q, k, v, bounds, bounds, max_seqlen, max_seqlen, softmax_scale=scale, causal=causal)
    return _zero_past(out[0] if isinstance(out, tuple) else out, cu_seqlens)


def _zero_past(out: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """``out`` with zeros in the rows past the last segment, which nobody wrote."""
    if cu_seqlens.device.type == "cpu":
        held = int(cu_seqlens[-1])
        return (
            out if held == out.shape[0] else torch.cat((out[:held], out.new_zeros(out.shape[0] - held, *out.shape[1:])))
        )
    past = torch.arange(out.shape[0], device=out.device) >= cu_seqlens[-1]
    return out.masked_fill(past[:, None, None], 0)
