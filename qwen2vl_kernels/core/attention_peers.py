"""varlen_attention by others' fused kernels: PyTorch's FlashAttention 2 and cuDNN, and flash-attn 4, 3 or 2.

They know packs, take strides, keep softmax statistics in float32 and read no boundary on the host. They leave the rows
behind the last segment as they were, in results and in gradients: ``ops.varlen_attention`` makes these zero. What each
cannot serve is said from what the host knows of a call, before anything is launched. Their backward passes get the
statistics that their forward passes kept, as the operators of ``ops.varlen_attention`` hand them on, in a compiled
graph too. By its source FlashAttention 2 multiplies rows by strides in 64 bits, cuDNN's offsets have 32; nobody has run
either past 2^31 here.
"""

from __future__ import annotations

import importlib
import inspect
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch

from .tile_plan import TilePlan

#: The dtypes that all of them take.
HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Call:
    """What the host knows of a call of varlen_attention; a choice depends on nothing else.

    ``capability`` is 90 for 9.0, 0 for what is no NVIDIA GPU; ``rows`` the bucket of ``max_seqlen``. ``aligned``: the
    strides of rows and heads of q, k and v are multiples of 16 bytes; ``wide``: offsets of one of them pass 2^31
    elements; ``empty``: no rows, or no segments; ``many``: more segments than a grid's second and third dimension
    count; ``repeatable``: deterministic algorithms are demanded; ``replaced``: what ``torch.nn.attention`` has
    activated in the place of PyTorch's FlashAttention 2.
    """

    device_type: str
    capability: int
    dtype: torch.dtype
    columns: int
    value_columns: int
    grouped: bool = False
    causal: bool = False
    gradients: bool = False
    rows: int = 0
    aligned: bool = True
    wide: bool = False
    empty: bool = False
    many: bool = False
    repeatable: bool = False
    replaced: str | None = None


#: Of blocks in a grid's second and third dimension, by CUDA.
MOST_BLOCKS = 65535


@dataclass(frozen=True)
class Flash:
    """A distribution of flash-attn: its module, the GPUs that it is built for, and its backward if it has one."""

    generation: int
    module: str
    capabilities: range
    backward: tuple[str, str] | None


#: Newest first.
FLASH = (
    Flash(4, "flash_attn.cute", range(90, 200), ("flash_attn.cute.interface", "_flash_attn_bwd")),
    Flash(3, "flash_attn_interface", range(90, 100), ("flash_attn_interface", "_flash_attn_backward")),
    Flash(3, "fa3_fwd_interface", range(90, 100), None),
    Flash(2, "flash_attn", range(80, 200), ("flash_attn.flash_attn_interface", "_flash_attn_varlen_backward")),
)

#: Others' kernels by what the op is told: "torch", "cudnn" or a module; "flash" is the newest one that serves a call.
PEERS = ("torch", "cudnn", *(flash.module for flash in FLASH))

#: The first PyTorch whose cuDNN backward on ragged packs may be trusted: before pytorch#186142 it takes head_dim for
#: the longest segment, and its kernel writes beyond the workspace. So does 2.10's binary, and no release up to 2.13 is
#: known to be mended.
_CUDNN_BACKWARD = (2, 14)


# ------------------------------------------------------------------------------------- who can serve what


@cache
def torch_reason() -> str | None:
    """Why PyTorch's FlashAttention cannot serve CUDA tensors, or ``None``."""
    if torch.version.hip is not None:
        return "on ROCm its FlashAttention keeps statistics of another shape, which nobody has tried with this package"
    if not torch.backends.cuda.is_flash_attention_available():
        return "this PyTorch was built without FlashAttention"
    return None


def replaced() -> str | None:
    """What stands for PyTorch's FlashAttention 2 at the moment: ``activate_flash_attention_impl`` registers another's
    kernels as the same operators, "FA3" and "FA4" its own."""
    current = getattr(torch.nn.attention, "current_flash_attention_impl", None)
    return None if current is None else current()


@cache
def cudnn_reason() -> str | None:
    """Why PyTorch's cuDNN attention on packs cannot serve CUDA tensors, or ``None``."""
    if torch.version.hip is not None:
        return "this PyTorch is built for ROCm"
    if not hasattr(torch.ops.aten, "_cudnn_attention_forward"):
        return "this PyTorch has no operator aten::_cudnn_attention_forward"
    return None if torch.backends.cudnn.is_available() else "this PyTorch finds no cuDNN"


def flash_reason() -> str | None:
    """Why no flash-attn can serve CUDA tensors, or ``None``."""
    problems = [f"{flash.module}: {module}" for flash in FLASH if isinstance(module := _loaded(flash.module), str)]
    return "; ".join(problems) if len(problems) == len(FLASH) else None


def why_not(name: str, call: Call) -> str | None:
    """Why the peer ``name`` ("torch", "cudnn" or a module of :data:`FLASH`) does not serve ``call``, or ``None``."""
    if call.dtype not in HALVES:
        return f"it takes bfloat16 and float16, got {call.dtype}"
    if call.columns != call.value_columns or call.columns % 8 or call.columns > 256:
        return f"it takes one head_dim, a multiple of 8 up to 256, got {call.columns} and {call.value_columns}"
    if call.empty:
        return "it takes at least one segment and one row"
    if not call.aligned:
        return "it reads 16 bytes at a time: strides of rows and heads of q, k and v must be multiples of 8 elements"
    if call.many:
        return (
            f"FlashAttention 2 has the segments in a grid's second or third dimension, which ends at {MOST_BLOCKS}, "
            f"and nobody has tried more with the others"
        )
    if name == "torch":
        return _too_old(call, 80) or torch_reason() or (_replaced(call) if call.replaced else _untrainable(call))
    if name == "cudnn":
        return cudnn_reason() or _cudnn_shape(call)
    flash = next(flash for flash in FLASH if flash.module == name)
    module = _loaded(flash.module)
    return module if isinstance(module, str) else _flash_shape(flash, call)


def peer_of(backend: str, call: Call) -> tuple[str | None, str]:
    """Which peer serves ``call`` as ``backend``: "torch", "cudnn", "flash" (the newest that serves it) or "flash 3"
    (of that generation); or ``None`` and why there is none."""
    if not backend.startswith("flash"):
        reason = why_not(backend, call)
        return (backend, "") if reason is None else (None, reason)
    generation = int(backend[6:] or 0)
    problems = []
    for flash in FLASH:
        if generation in (0, flash.generation):
            if (reason := why_not(flash.module, call)) is None:
                return flash.module, ""
            problems.append(f"{flash.module}: {reason}")
    return None, "; ".join(dict.fromkeys(problems))


def _too_old(call: Call, capability: int) -> str | None:
    if call.capability >= capability:
        return None
    if not call.capability:
        return "it needs an NVIDIA GPU"
    return f"it needs a GPU of capability {capability / 10}, this one has {call.capability / 10}"


def _untrainable(call: Call) -> str | None:
    if call.gradients and 192 < call.columns <= 224 and call.capability in (86, 89, 120, 121):
        return f"its backward does not fit heads of {call.columns} on capability {call.capability / 10}"
    return None


def _cudnn_shape(call: Call) -> str | None:
    if (old := _too_old(call, 90)) is not None:
        return old
    if call.columns > 128:
        return f"it takes heads of up to 128 columns on packs, got {call.columns}"
    if call.grouped:
        return "PyTorch's own caller refuses grouped heads there"
    if call.wide:
        return "its offsets into a pack have 32 bits"
    if call.gradients and _torch_version() < _CUDNN_BACKWARD:
        return (
            f"the backward of PyTorch {torch.__version__} takes head_dim for the longest segment and may write beyond "
            f"its memory (pytorch#186142); without gradients it serves"
        )
    if call.gradients and call.repeatable:
        return "its backward sums with atomics, and deterministic algorithms are demanded"
    return None


def _flash_shape(flash: Flash, call: Call) -> str | None:
    if call.capability not in flash.capabilities:
        have = f"capability {call.capability / 10}" if call.capability else "no NVIDIA GPU"
        return f"it is built for capability {flash.capabilities[0] / 10} and later ones of its kind, this is {have}"
    if (part := _left_out(flash, call)) is not None:
        return f"this build is without {part}"
    if (reason := _generation_reason(flash.generation, call)) is not None or not call.gradients:
        return reason
    found = _backward_of(flash.module)
    return found if isinstance(found, str) else None


def _generation_reason(generation: int, call: Call) -> str | None:
    """What no build of a generation serves."""
    if generation == 4 and call.capability >= 100 and 128 < call.columns < 256:
        return f"it takes heads of up to 128 columns or of 256 there, got {call.columns}"
    if call.gradients and generation == 4 and call.capability // 10 == 9 and call.columns % 32:
        return (
            f"its backward on capability 9 is reported to give silently wrong dq where head_dim is no multiple of 32 "
            f"(flash-attention#2896), got {call.columns}"
        )
    return None


def _replaced(call: Call) -> str | None:
    """Why what ``torch.nn.attention`` has activated does not serve a call as PyTorch's own operators."""
    generation = {"FA3": 3, "FA4": 4}.get(call.replaced or "")
    if generation is None:
        return f"torch.nn.attention has {call.replaced!r} activated in its place, which nobody has tried here"
    kinds = (9,) if generation == 3 else (9, 10)
    if call.capability // 10 in kinds:
        reason = _generation_reason(generation, call)
    else:
        reason = f"it serves capability {' and '.join(map(str, kinds))}"
    return reason and f"torch.nn.attention has {call.replaced} activated in its place: {reason}"


@cache
def _loaded(name: str) -> ModuleType | str:
    """A module of flash-attn, or why it cannot be used."""
    try:
        module = importlib.import_module(name)
        module.flash_attn_varlen_func  # noqa: B018
    except (ImportError, AttributeError, RuntimeError, OSError) as error:  # built for another torch or CUDA, say
        return str(error)
    return module


#: Where a build of FlashAttention 3 says what it was built without.
_CONFIGS = {"flash_attn_interface": "flash_attn_config", "fa3_fwd_interface": "fa3_fwd_config"}


def _left_out(flash: Flash, call: Call) -> str | None:
    """What a call needs and this build was made without, or ``None``; builds that do not say have all."""
    if flash.module not in _CONFIGS:
        return None
    try:
        config = getattr(importlib.import_module(_CONFIGS[flash.module]), "CONFIG", {})
    except ImportError:
        return None
    needed = ["VARLEN", f"HDIM{next(width for width in (64, 96, 128, 192, 256) if call.columns <= width)}"]
    needed += ["FP16"] if call.dtype == torch.float16 else []
    needed += ["BACKWARD"] if call.gradients and flash.backward is not None else []
    flags = config.get("build_flags", {})
    return next((part for part in needed if flags.get(f"FLASHATTENTION_DISABLE_{part}")), None)


def _torch_version() -> tuple[int, int]:
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


# ------------------------------------------------------------------------------------------ what is called


def forward(name, q, k, v, plan: TilePlan, max_seqlen: int, causal: bool, scale: float, keep: bool):
    """``(out (T, Hq, D), lse (T * Hq,))`` by the peer ``name``; lse is its statistics, ``None`` unless ``keep``."""
    bounds, longest = plan.bounds(), _longest(plan, max_seqlen)
    q, k, v = _at_16_bytes(q, k, v)
    if name == "torch":
        out, lse = torch.ops.aten._flash_attention_forward(
            query=q, key=k, value=v, cum_seq_q=bounds, cum_seq_k=bounds, max_q=longest, max_k=longest, dropout_p=0.0,
            is_causal=causal, return_debug_mask=False, scale=scale,
        )[:2]  # fmt: skip
    elif name == "cudnn":
        out, lse = torch.ops.aten._cudnn_attention_forward(
            query=q, key=k, value=v, attn_bias=None, cum_seq_q=bounds, cum_seq_k=bounds, max_q=longest, max_k=longest,
            compute_log_sumexp=keep, dropout_p=0.0, is_causal=causal, return_debug_mask=False, scale=scale,
        )[:2]  # fmt: skip
    else:
        out, lse = _flash_forward(name, q, k, v, bounds, longest, causal, scale, keep)
    out = out.contiguous()
    if not keep:
        return out, None
    assert lse is not None, name
    _dimensions[name] = lse.ndim
    return out, lse.reshape(-1)


#: Of the statistics that a peer's forward returned last: cuDNN's are (T, H, 1) in some versions, (H, T) in others.
_dimensions: dict[str, int] = {}


def backward(name, grad, q, k, v, out, lse, plan: TilePlan, max_seqlen: int, causal: bool, scale: float):
    """``(dq, dk, dv)`` of :func:`forward` from what it returned."""
    bounds, longest = plan.bounds(), _longest(plan, max_seqlen)
    q, k, v, grad, out = _at_16_bytes(q, k, v, grad.contiguous(), out)
    lse = lse.view(q.shape[0], q.shape[1], 1) if _dimensions.get(name) == 3 else lse.view(q.shape[1], q.shape[0])
    if name == "torch":
        state = torch.empty(2, dtype=torch.uint64, device=q.device)  # of the random numbers for dropout, not read
        grads = torch.ops.aten._flash_attention_backward(
            grad_out=grad, query=q, key=k, value=v, out=out, logsumexp=lse, cum_seq_q=bounds, cum_seq_k=bounds,
            max_q=longest, max_k=longest, dropout_p=0.0, is_causal=causal, rng_state=state, unused=state, scale=scale,
        )  # fmt: skip
    elif name == "cudnn":
        if torch.are_deterministic_algorithms_enabled():
            _refuse_determinism(name)
        state = torch.empty(1, dtype=torch.int64, device=q.device)
        grads = torch.ops.aten._cudnn_attention_backward(
            grad_out=grad, query=q, key=k, value=v, out=out, logsumexp=lse, philox_seed=state, philox_offset=state,
            attn_bias=None, cum_seq_q=bounds, cum_seq_k=bounds, max_q=longest, max_k=longest, dropout_p=0.0,
            is_causal=causal, scale=scale,
        )  # fmt: skip
    else:
        grads = _flash_backward(name, grad, q, k, v, out, lse, bounds, longest, causal, scale)
    return tuple(x.contiguous() for x in grads)


def _longest(plan: TilePlan, max_seqlen: int) -> int:
    """What a peer's grid is made of, which must reach every segment, now and when a captured graph is replayed.

    No segment has more rows than there are. FlashAttention 2 takes 1 for decoding, with all segments full.
    """
    plan.hold_to(max_seqlen)
    return max(2, min(max_seqlen, plan.total))


def _at_16_bytes(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Those that begin elsewhere copied: these kernels load 16 bytes at a time, and fault. A view may begin anywhere,
    which a compiler does not tell, so no choice depends on it."""
    return [x if x.data_ptr() % 16 == 0 else x.clone() for x in tensors]


def _device_of(q: torch.Tensor) -> AbstractContextManager:
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


def _flash_forward(name, q, k, v, bounds, longest, causal, scale, keep):
    function = _module(name).flash_attn_varlen_func
    wanted = {"return_attn_probs", "return_lse"} & inspect.signature(function).parameters.keys() if keep else ()
    with _device_of(q):
        result = function(
        q, k, v, cu_seqlens_q=bounds, cu_seqlens_k=bounds, max_seqlen_q=longest, max_seqlen_k=longest,
        softmax_scale=scale, causal=causal, **dict.fromkeys(wanted, True),
    )  # fmt: skip
    return result[:2] if isinstance(result, tuple) else (result, None)


def _flash_backward(name, grad, q, k, v, out, lse, bounds, longest, causal, scale):
    made = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    offered = {
        "dout": grad, "q": q, "k": k, "v": v, "out": out, "softmax_lse": lse, "lse": lse, "cu_seqlens_q": bounds,
        "cu_seqlens_k": bounds, "max_seqlen_q": longest, "max_seqlen_k": longest, "softmax_scale": scale,
        "causal": causal, "is_causal": causal, "deterministic": torch.are_deterministic_algorithms_enabled(),
        **dict(zip(("dq", "dk", "dv"), made, strict=True)),
    } | _FLASH_CONSTANTS  # fmt: skip
    found = _backward_of(name)
    assert not isinstance(found, str), found
    function, known = found
    if offered["deterministic"] and "deterministic" not in known:
        _refuse_determinism(name)
    with _device_of(q):
        function(**{key: offered[key] for key in known if key in offered})
    return made


#: What the backward passes of flash-attn ask for beside tensors: no dropout, windows, softcap or biases.
_FLASH_CONSTANTS = {
    "dropout_p": 0.0, "window_size_left": -1, "window_size_right": -1, "softcap": 0.0, "alibi_slopes": None,
    "rng_state": None,
}  # fmt: skip
_FLASH_NAMES = {"dout", "q", "k", "v", "out", "dq", "dk", "dv", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q"}
_FLASH_ALIASES = ({"softmax_lse", "lse"}, {"causal", "is_causal"})


@cache
def _backward_of(name: str) -> tuple[Any, set[str]] | str:
    """The backward of a flash-attn and the arguments to give it; or why it cannot be used.

    It is not public, so its arguments are looked at before one is relied on.
    """
    flash = next(flash for flash in FLASH if flash.module == name)
    if flash.backward is None:
        return "it has a forward pass only; q, k and v must not require grad"
    module, attribute = flash.backward
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        return f"its backward is not where it was: {error}"
    parameters = inspect.signature(getattr(function, "_init_fn", function)).parameters  # of a custom operator
    missing = _FLASH_NAMES - set(parameters) | {min(names) for names in _FLASH_ALIASES if not names & set(parameters)}
    offered = _FLASH_NAMES.union({"max_seqlen_k", "softmax_scale", "deterministic"}, _FLASH_CONSTANTS, *_FLASH_ALIASES)
    unknown = {k for k, p in parameters.items() if p.default is p.empty and k not in offered}
    if missing or unknown:
        return f"its backward takes other arguments than those known: {', '.join(sorted(missing | unknown))}"
    # FlashAttention 4 says None for no window where the others say -1.
    return function, {k for k, p in parameters.items() if not (k.startswith("window_size") and p.default is None)}


def _module(name: str) -> Any:
    module = _loaded(name)
    assert not isinstance(module, str), module
    return module
