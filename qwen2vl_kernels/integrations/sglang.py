"""These kernels inside SGLang: a plugin that every process of it loads (entry point ``sglang.srt.plugins``).

Installed beside SGLang all features are on; ``SGLANG_PLUGINS`` restricts which plugins are loaded. In Python, before
SGLang builds a model: ``qwen2vl_kernels.integrations.sglang.apply(features=...)``.

feature            what it does
vision_rope        hooks around ``apply_rotary_pos_emb`` and its eager form: q and k of a vision tower in one kernel,
                   read where the projection left them
quick_gelu         hooks in the place of ``QuickGELU.forward_cuda`` and ``forward_native``
vision_attention   a vision attention backend ``qwen2vl``, taken where the default would be SGLang's Triton kernel (no
                   Hopper, no Blackwell) and a head is not a power of two, which that kernel pads. Whoever names a
                   backend (``--mm-attention-backend``, or a model) gets it.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Iterable
from functools import cache
from types import ModuleType
from typing import Any

from ._patches import Target
from ._registered import Registered, StackPatches
from .sglang_layers import BACKEND, attention_class, choose_attention, quick_gelu_forward, vision_rope_around

TESTED = ("0.5.23",)
FEATURES = ("vision_rope", "quick_gelu", "vision_attention")

_ROTARY, _VISION = "sglang.srt.layers.rotary_embedding.utils", "sglang.srt.layers.attention.vision"
_REGISTRY = "sglang.srt.plugins.hook_registry:HookRegistry"
_REGISTER = {
    f"{_REGISTRY}.register": ("cls", "target", "hook", "hook_type", "source"),
    f"{_REGISTRY}.apply_hooks": ("cls",),
}


@cache
def _patches() -> StackPatches:
    rotary = ("q", "k", "cos", "sin", "unsqueeze_dim")
    gelu, attention = "sglang.srt.layers.activation:QuickGELU", f"{_VISION}:VisionAttention"
    called = ("self", "q", "k", "v", "cu_seqlens", "bsz", "seq_len", "softmax_scale", "forward_metadata", "kwargs")
    backend = {
        f"{_VISION}:VisionTritonAttention.forward": called,
        f"{_VISION}.resolve_seqlens": ("cu_seqlens", "bsz", "seq_len", "device"),
        "sglang.srt.runtime_context.get_mm": (),
    }
    entry, strided = f"{_VISION}:QKV_BACKEND_IMPL", "STRIDED_QKV_BACKENDS"
    choice = "_determine_attention_backend", ("self", "passed_backend"), choose_attention, "AFTER", backend
    targets = [
        _hook("vision_rope", _ROTARY, "apply_rotary_pos_emb", rotary, vision_rope_around, "AROUND"),
        _hook("vision_rope", _ROTARY, "apply_rotary_pos_emb_native_eager", rotary, vision_rope_around, "AROUND"),
        _hook("quick_gelu", gelu, "forward_cuda", ("self", "x"), quick_gelu_forward, "REPLACE"),
        _hook("quick_gelu", gelu, "forward_native", ("self", "x"), quick_gelu_forward, "REPLACE"),
        Target("vision_attention", "QKV_BACKEND_IMPL", (entry,), entry, BACKEND, None, attention_class),
        Target("vision_attention", strided, (strided,), _VISION, strided, None, lambda present: present | {BACKEND}),
        _hook("vision_attention", attention, *choice),
    ]
    return StackPatches("SGLang", "sglang", TESTED, targets)


def _hook(feature: str, held: str, name: str, parameters: Any, make: Any, kind: str, needs: Any = None) -> Registered:
    """A function that SGLang's ``HookRegistry`` hooks, which reaches modules that imported it by name too."""
    path = f"{held.replace(':', '.')}.{name}"

    def registry() -> Any:
        return importlib.import_module("sglang.srt.plugins.hook_registry")

    def taken() -> str | None:
        hooked = path in registry().HookRegistry._patched
        return "was hooked by another plugin before, and SGLang hooks a function only once" if hooked else None

    def put(hook: Any) -> None:
        registry().HookRegistry.register(path, hook, registry().HookType[kind])

    def take(hook: Any) -> bool:
        hooks, patched = registry().HookRegistry._hooks, registry().HookRegistry._patched
        others = [entry for entry in hooks.get(path, ()) if entry[1] is not hook]
        if path in patched:  # SGLang has set it, and cannot unset it
            if others:
                return False
            _put_back(pkgutil.resolve_name(held), name)
            patched.discard(path)
        hooks[path] = others
        return True

    needs = {**_REGISTER, **(needs or {})}
    return Registered(feature, held, name, parameters, make, needs=needs, taken=taken, put=put, take=take)


def _put_back(owner: Any, name: str) -> None:
    """Undo a hook: what it wraps takes its place in ``owner`` and wherever the hooked function was imported."""
    hooked = getattr(owner, name)
    for holder in (owner, *(m for m in list(sys.modules.values()) if isinstance(m, ModuleType))):
        for key in [key for key, value in list(vars(holder).items()) if value is hooked]:
            setattr(holder, key, hooked.__wrapped__)


def apply(features: Iterable[str] = FEATURES) -> list[Target]:
    """Put kernels into SGLang, for models that are built from now on; returns :func:`status`.

    What does not fit the SGLang at hand is left as it is and reported, with a ``PatchWarning``; so is a version that
    was never tested. ``QWEN2VL_KERNELS_DISABLE=1`` leaves everything as it is. To apply twice changes nothing.
    Raises ``ValueError`` for a feature that is not of :data:`FEATURES`.
    """
    if any(target.state == "applied" for target in _patches().apply(features)):
        importlib.import_module("sglang.srt.plugins.hook_registry").HookRegistry.apply_hooks()
    return status()


def restore() -> None:
    """Undo every :func:`apply`. Models that were built in between keep the attention backend they have."""
    _patches().restore()


def status() -> list[Target]:
    """A row a target: "applied", "skipped" for its ``reason``, or "off" (not asked for)."""
    return _patches().status()


def plugin() -> None:
    """Register the hooks; SGLang sets them when every plugin has registered its own."""
    _patches().apply(FEATURES)
