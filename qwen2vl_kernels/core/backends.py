"""Which implementation serves a call: one literal table, one switch, and the reasons when something cannot serve.

``backend=None`` takes the first available entry of :data:`PREFERENCE` for the op and the tensor's device type. A
named backend that cannot serve raises :class:`BackendError` with the reason; nothing ever falls back silently.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from . import attention_peers, launching, native

#: op -> device type -> backends, first choice first. ROCm tensors have device type "cuda" in PyTorch.
PREFERENCE: dict[str, dict[str, tuple[str, ...]]] = {
    "mrope": {"cpu": ("eager", "triton"), "cuda": ("triton", "eager")},
    "vision_rope": {"cpu": ("eager", "triton"), "cuda": ("triton", "eager")},
    "append_kv": {"cpu": ("eager", "triton"), "cuda": ("triton", "eager")},
    # varlen_attention has a table of its own, _attention_choice.TABLE; what is here are the names.
    "varlen_attention": {
        "cpu": ("sdpa", "blocked", "eager", "triton"),
        "cuda": ("torch", "triton", "sdpa", "flash", "cudnn", "sm90", "eager"),
    },
    "kvcache_attention": {"cpu": ("varlen", "sdpa", "eager"), "cuda": ("varlen", "sdpa", "eager")},
    # kvcache_attention with lengths on the device. No GPU has run the kernels yet. Once one has, they come first: they
    # read the keys that there are, and once, where the formula reads and writes the whole capacity several times.
    "kvcache_attention_decode": {"cpu": ("eager", "triton"), "cuda": ("eager", "triton")},
    # A step of decoding in five calls a layer. No GPU has run the kernels either; until one has, a step on one is made
    # of the ops above and PyTorch's matrix products.
    "decode_attention": {"cpu": ("native", "eager", "triton"), "cuda": ("eager", "triton")},
    "rms_norm_linear": {"cpu": ("native", "eager", "triton"), "cuda": ("eager", "triton")},
    "rms_norm_swiglu": {"cpu": ("native", "eager", "triton"), "cuda": ("eager", "triton")},
    "linear_add": {"cpu": ("native", "eager", "triton"), "cuda": ("eager", "triton")},
    # No GPU has run the kernels yet. Once one has, they come first: two launches, where the formula is up to
    # 28 operators and sorts the vocabulary.
    "sample_tokens": {"cpu": ("eager", "triton"), "cuda": ("eager", "triton")},
    "patch_embed": {"cpu": ("eager", "triton"), "cuda": ("triton", "eager")},
    "patch_merge": {"cpu": ("eager", "triton"), "cuda": ("triton", "eager")},
    "rms_norm": {"cpu": ("eager", "triton"), "cuda": ("triton", "eager")},
    "layer_norm": {"cpu": ("eager", "triton"), "cuda": ("triton", "eager")},
    "swiglu": {"cpu": ("eager", "triton"), "cuda": ("triton", "eager")},
    "quick_gelu": {"cpu": ("eager", "triton"), "cuda": ("triton", "eager")},
    # No GPU has run the kernels yet. Once one has, they come first: eager writes and reads the whole weight in 16 bits.
    "quant_linear": {"cpu": ("native", "eager", "triton"), "cuda": ("eager", "triton")},
    # No GPU has run the kernel yet. Once one has, it comes first: between the products it moves a seventh of the bytes.
    "linear_cross_entropy": {"cpu": ("chunked", "triton", "eager"), "cuda": ("chunked", "triton", "eager")},
    # Experts. No GPU has run the kernels yet. Once one has, they come first: one launch, for which the host does not
    # wait, where the formula reads the bounds on the host and takes a launch an expert.
    "group_by_expert": {"cpu": ("eager", "triton"), "cuda": ("eager", "triton")},
    "grouped_linear": {"cpu": ("eager", "triton"), "cuda": ("eager", "triton")},
    "grouped_quant_linear": {"cpu": ("native", "eager", "triton"), "cuda": ("eager", "triton")},
    "vision_positions": {"cpu": ("native", "eager", "scan"), "cuda": ("cuda", "scan", "eager")},
    "mrope_positions": {"cpu": ("native", "eager"), "cuda": ("cuda", "eager")},
    "image_to_patches": {"cpu": ("native", "eager"), "cuda": ("cuda", "eager")},
}

#: What an op takes for some shapes before the table's first choice, in words for :func:`table`.
SHAPE_CHOICES = {
    ("varlen_attention", "cpu"): "bf16 inference on AMD's CPUs: blocked",
    ("varlen_attention", "cuda"): "by the table below",
}

#: op -> device type -> the result under benchmarks/results that a first choice was read from. Others are not measured.
MEASURED: dict[str, dict[str, str]] = {
    "varlen_attention": {"cpu": "amd-epyc-2-threads/attention.json"},
    "mrope_positions": {"cpu": "amd-epyc-2-threads/positions.json"},
    "vision_positions": {"cpu": "amd-epyc-2-threads/positions.json"},
    "image_to_patches": {"cpu": "amd-epyc-2-threads/preprocess.json"},
}

#: Why a backend is taken, in words for :func:`table`.
_WHY = {
    "native": "one pass in C++, where PyTorch's operations take many",
    "cuda": "one launch and nothing read by the host, where PyTorch's operations take many",
    "triton": "one pass over the memory, where PyTorch's operations take several",
    "scan": "nothing read by the host, which PyTorch's formula does grid by grid",
    "chunked": "logits of a few rows at a time, where PyTorch's operations hold all of them",
    "sdpa": "PyTorch's fused attention",
    "varlen": "single tokens by PyTorch's fused attention, prompts by what serves varlen_attention",
    "torch": "PyTorch's own FlashAttention",
    "eager": "the formula in PyTorch's operations",
}

_EVERYTHING = ""
_forced: dict[str, str] = {}  # op, or _EVERYTHING -> backend, set by use_backend


class BackendError(ValueError):
    """The backend asked for cannot serve this op here; the message says why."""


def unavailable(backend: str, device_type: str) -> str | None:
    """Why ``backend`` cannot run on such tensors in this process, or ``None`` when it can."""
    if backend == "triton":
        return launching.reason(device_type)
    if backend == "torch":
        return _no_device() or attention_peers.torch_reason()
    if backend == "flash":
        return _no_device() or attention_peers.flash_reason()
    if backend == "cudnn":
        return _no_device() or attention_peers.cudnn_reason()
    if backend == "sm90":
        return native.sm90_reason()
    if backend == "native":
        return native.cpu_reason()
    if backend == "cuda":
        return native.cuda_reason()
    return None


def _no_device() -> str | None:
    return None if torch.cuda.is_available() else "PyTorch sees no CUDA device"


def forced(op: str) -> str | None:
    """The backend that :func:`use_backend` names for ``op`` now."""
    return _forced.get(op)


def forced_everywhere() -> str | None:
    """The backend that :func:`use_backend` names for all ops now, and for what is no op but has forms, too."""
    return _forced.get(_EVERYTHING)


def resolve(op: str, device_type: str, requested: str | None, prefer: str | None = None) -> str:
    """The backend that serves ``op`` on tensors of ``device_type``. Raises :class:`BackendError`.

    ``requested`` is the caller's word, then :func:`use_backend`'s; failing both, ``prefer`` is an op's own first
    choice for the shapes at hand, before the table's.
    """
    choices = PREFERENCE[op].get(device_type, ("eager",))
    name = requested if requested is not None else _forced.get(op)
    if name is None:
        if prefer is not None and prefer in choices and unavailable(prefer, device_type) is None:
            return prefer
        return next(choice for choice in choices if choice == "eager" or unavailable(choice, device_type) is None)
    if name not in choices:
        raise BackendError(
            f"{op}: backend {name!r} does not serve {device_type} tensors; these do: {', '.join(choices)}"
        )
    if (reason := unavailable(name, device_type)) is not None:
        raise BackendError(f"{op}: backend {name!r} is not available here: {reason}")
    return name


@contextmanager
def use_backend(name: str | None = None, **per_op: str) -> Iterator[None]:
    """Make a backend the default inside a ``with`` block, for every op or for those named.

    ``use_backend("eager")`` turns the whole model into its own reference; ``use_backend(varlen_attention="sdpa")``
    changes one op. The switch is process-wide (it must hold in autograd's threads too), so do not race it from
    several threads. Raises :class:`BackendError` for an unknown op or a backend that an op does not have.
    """
    wanted = dict.fromkeys(PREFERENCE, name) if name is not None else {}
    wanted.update(per_op)
    for op, backend in wanted.items():
        if op not in PREFERENCE:
            raise BackendError(f"use_backend: no op is called {op!r}; the ops are {', '.join(PREFERENCE)}")
        have = sorted({b for row in PREFERENCE[op].values() for b in row})
        if backend not in have:
            raise BackendError(f"use_backend: {op} has no backend {backend!r}; it has {', '.join(have)}")
    saved = dict(_forced)
    _forced.update(wanted)  # type: ignore[arg-type]
    if name is not None:
        _forced[_EVERYTHING] = name
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(saved)


def table(device_type: str = "cpu") -> list[tuple[str, str, str, str | None, str]]:
    """Rows ``(op, backend taken, why the preferred ones are not, where it was measured, why it is taken)`` for
    ``device_type``; ``qwen2vl info`` prints it."""
    rows = []
    for op, by_device in PREFERENCE.items():
        choices = by_device.get(device_type, ("eager",))
        taken = resolve(op, device_type, None)
        missed = [f"{c}: {unavailable(c, device_type)}" for c in choices[: choices.index(taken)]]
        special = SHAPE_CHOICES.get((op, device_type)) if op not in _forced else None
        measured = MEASURED.get(op, {}).get(device_type) if taken == choices[0] else None
        why = _WHY.get(taken, "") if op not in _forced else "use_backend names it"
        rows.append((op, f"{taken} ({special})" if special else taken, "; ".join(missed), measured, why))
    return rows
