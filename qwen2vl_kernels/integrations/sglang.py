"""These kernels inside SGLang: a plugin that every process of it loads (entry point ``sglang.srt.plugins``).

The plugin acts only where the environment switches it on: ``QWEN2VL_KERNELS=sglang`` for all features,
``QWEN2VL_KERNELS=sglang:vision_rope,quick_gelu`` for some (``_switch.py`` has the grammar). ``SGLANG_PLUGINS`` says
which plugins SGLang loads at all. In Python, before SGLang builds a model:
``qwen2vl_kernels.integrations.sglang.apply(features=...)``.

feature            what it does
vision_rope        hooks around ``apply_rotary_pos_emb`` and its eager form: q and k of a vision tower in one kernel,
                   read where the projection left them
quick_gelu         hooks in the place of ``QuickGELU.forward_cuda`` and ``forward_native``
vision_attention   a vision attention backend ``qwen2vl``, taken where the default would be SGLang's Triton kernel (no
                   Hopper, no Blackwell) and a head is not a power of two, which that kernel pads. Whoever names a
                   backend (``--mm-attention-backend``, or a model) gets it.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

from ._registered import StackPatches
from ._switch import STACKS, requested
from ._target import Target
from .sglang_hooks import Entry, Hook, set_hooks
from .sglang_layers import BACKEND, attention_class, choose_attention, quick_gelu_forward, vision_rope_around

TESTED = ("0.5.23",)
DEFAULT, FEATURES = STACKS["sglang"].default, STACKS["sglang"].features

_ROTARY, _VISION = "sglang.srt.layers.rotary_embedding.utils", "sglang.srt.layers.attention.vision"


@cache
def _patches() -> StackPatches:
    rotary, x = ("q", "k", "cos", "sin", "unsqueeze_dim"), ("self", "x")
    gelu, attention = "sglang.srt.layers.activation:QuickGELU", f"{_VISION}:VisionAttention"
    called = ("self", "q", "k", "v", "cu_seqlens", "bsz", "seq_len", "softmax_scale", "forward_metadata", "kwargs")
    backend = {
        f"{_VISION}:VisionTritonAttention.forward": called,
        f"{_VISION}.resolve_seqlens": ("cu_seqlens", "bsz", "seq_len", "device"),
        "sglang.srt.runtime_context.get_mm": (),
    }
    choice = "_determine_attention_backend", ("self", "passed_backend"), choose_attention, "AFTER", backend
    targets = [
        Hook("vision_rope", _ROTARY, "apply_rotary_pos_emb", rotary, vision_rope_around, "AROUND"),
        Hook("vision_rope", _ROTARY, "apply_rotary_pos_emb_native_eager", rotary, vision_rope_around, "AROUND"),
        Hook("quick_gelu", gelu, "forward_cuda", x, quick_gelu_forward, "REPLACE"),
        Hook("quick_gelu", gelu, "forward_native", x, quick_gelu_forward, "REPLACE"),
        Entry("vision_attention", _VISION, "QKV_BACKEND_IMPL", BACKEND, dict, attention_class),
        Entry("vision_attention", _VISION, "STRIDED_QKV_BACKENDS", BACKEND, frozenset, lambda names: names | {BACKEND}),
        Hook("vision_attention", attention, *choice),
    ]
    return StackPatches("SGLang", "sglang", TESTED, targets)


def apply(features: Iterable[str] = DEFAULT) -> list[Target]:
    """Put kernels into SGLang, for models that are built from now on; returns :func:`status`.

    What does not fit the SGLang at hand is left as it is and reported, with a ``PatchWarning``; so is a version that
    was never tested. ``QWEN2VL_KERNELS_DISABLE=1`` leaves everything as it is. To apply twice changes nothing.
    Raises ``ValueError`` for a feature that is not of :data:`FEATURES`.
    """
    patches = _patches()
    if any(target.state == "applied" for target in patches.apply(features)):
        set_hooks()
        for target in patches.status():
            if isinstance(target, Hook) and target.state == "applied" and not target.is_set():
                patches.withdraw(target, "could not be hooked; SGLang's log says why")
    return status()


def restore() -> None:
    """Undo every :func:`apply`. Models that were built in between keep the attention backend they have."""
    _patches().restore()


def status() -> list[Target]:
    """A row a target: "applied", "skipped" for its ``reason``, or "off" (not asked for)."""
    return _patches().status()


def plugin() -> None:
    """What SGLang calls in every process: register the hooks of the features that ``QWEN2VL_KERNELS`` asks for.

    By default these are none. SGLang sets the hooks when every plugin has registered its own.
    """
    if features := requested("sglang"):
        _patches().apply(features)
