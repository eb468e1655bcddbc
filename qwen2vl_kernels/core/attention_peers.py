"""Others' fused kernels behind varlen_attention, and which calls each can serve: PyTorch's FlashAttention 2 and cuDNN,
and flash-attn 4, 3 or 2.

What a kernel cannot serve is said from what the host knows of a call, before anything is launched. How the kernels are
called is in ``attention_calls``.
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch

#: The dtypes that all of them take.
HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Call:
    """What the host knows of a call of varlen_attention; a choice depends on nothing else.

    ``capability`` is 90 for 9.0, 0 for what is no NVIDIA GPU; ``rows`` the bucket of ``max_seqlen``. ``aligned``: the
    strides of rows and heads of q, k and v are multiples of 16 bytes; ``wide``: offsets of one of them pass 2^31
    elements; ``empty``: no rows, or no segments; ``many``: more segments than a grid's second and third dimension
    count; ``split``: keys have boundaries of their own; ``statistics``: the logs of the sums are asked for;
    ``repeatable``: deterministic algorithms are demanded; ``replaced``: what ``torch.nn.attention`` has
    activated in the place of PyTorch's FlashAttention 2; ``mapped``: no stride of a row or head is 0, as in
    expanded tensors, and q and k have fewer than 2^31 rows.
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
    split: bool = False
    statistics: bool = False
    repeatable: bool = False
    replaced: str | None = None
    mapped: bool = True


#: The most blocks that CUDA allows in a grid's second and third dimension.
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
    if call.statistics and call.gradients:
        return "its backward takes no gradient of the logs of the sums (return_lse)"
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
    if call.split:
        return "nobody has tried it where keys have boundaries of their own"
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
    found = backward_of(flash.module)
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


#: What the backward passes of flash-attn ask for beside tensors: no dropout, windows, softcap or biases.
FLASH_CONSTANTS = {
    "dropout_p": 0.0, "window_size_left": -1, "window_size_right": -1, "softcap": 0.0, "alibi_slopes": None,
    "rng_state": None,
}  # fmt: skip
_FLASH_NAMES = {"dout", "q", "k", "v", "out", "dq", "dk", "dv", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q"}
_FLASH_ALIASES = ({"softmax_lse", "lse"}, {"causal", "is_causal"})


@cache
def backward_of(name: str) -> tuple[Any, set[str]] | str:
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
    offered = _FLASH_NAMES.union({"max_seqlen_k", "softmax_scale", "deterministic"}, FLASH_CONSTANTS, *_FLASH_ALIASES)
    unknown = {k for k, p in parameters.items() if p.default is p.empty and k not in offered}
    if missing or unknown:
        return f"its backward takes other arguments than those known: {', '.join(sorted(missing | unknown))}"
    # FlashAttention 4 says None for no window where the others say -1.
    return function, {k for k, p in parameters.items() if not (k.startswith("window_size") and p.default is None)}


def module_of(name: str) -> Any:
    module = _loaded(name)
    assert not isinstance(module, str), module
    return module
