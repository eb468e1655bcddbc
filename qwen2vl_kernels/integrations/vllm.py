"""These kernels inside vLLM: a plugin that every process of it loads (entry point ``vllm.general_plugins``).

The plugin acts only where the environment switches it on: ``QWEN2VL_KERNELS=vllm`` for the default features,
``QWEN2VL_KERNELS=vllm:default,mrope`` for those and one more (``_switch.py`` has the grammar). ``VLLM_PLUGINS`` says
which plugins vLLM loads at all. In Python, before vLLM builds a model:
``qwen2vl_kernels.integrations.vllm.apply(features=...)``.

feature            what it replaces
vision_rope        (default) ``Qwen2VisionAttention.forward``: q and k are rotated where the projection left them; vLLM
                   concatenates them, rotates into a third tensor and takes that apart
quick_gelu         (default) the activation ``QuickGELU``, also where compilation would turn vLLM's own kernel off
vision_attention   ``MMEncoderAttention`` by ``varlen_attention``, for heads of any size without padding
mrope              ``MRotaryEmbedding``: cosines and sines are read by position inside the kernel, which works in place

``max_seqlen`` is read where the host has it and nothing is compiled. vLLM gives none, 0, or under encoder CUDA graphs
more than there is; where it is not known, the Triton kernel serves, which takes any bound. Boundaries may be padded by
repeating the last one, and rows past it come out as zeros. Under tensor parallelism a rank works on its own heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

from ._registered import Registered, StackPatches
from ._switch import STACKS, requested
from ._target import Target
from .vllm_layers import attention_forward, encoder_attention_class, mrope_class, quick_gelu_class

TESTED = ("0.33",)
DEFAULT, FEATURES = STACKS["vllm"].default, STACKS["vllm"].features

_LAYERS = "vllm.model_executor.layers"
_ENCODER_CLASS = f"{_LAYERS}.attention.mm_encoder_attention:MMEncoderAttention"
_REGISTER = {"vllm.model_executor.custom_op:CustomOp.register_oot": ("cls", "_decorated_op_cls", "name")}
_ENCODER = ("self", "query", "key", "value", "cu_seqlens", "max_seqlen", "sequence_lengths")
_MROPE = ("self", "positions", "query", "key", "offsets")


@cache
def _patches() -> StackPatches:
    tower = "vllm.model_executor.models.qwen2_vl:Qwen2VisionAttention"
    forward = ("self", "x", "cu_seqlens", "rotary_pos_emb_cos", "rotary_pos_emb_sin", "max_seqlen")
    needs = {f"{tower}.split_qkv": ("self", "qkv")}
    targets = [
        Registered("vision_rope", tower, "forward", forward, attention_forward, needs=needs, taken=_other_platform),
        _class("quick_gelu", f"{_LAYERS}.activation:QuickGELU", ("self", "x"), quick_gelu_class),
        _class("vision_attention", _ENCODER_CLASS, _ENCODER, encoder_attention_class),
        _class("mrope", f"{_LAYERS}.rotary_embedding.mrope:MRotaryEmbedding", _MROPE, mrope_class),
    ]
    return StackPatches("vLLM", "vllm", TESTED, targets)


def _class(feature: str, stock: str, parameters: tuple[str, ...], make: Callable[[Any], Any]) -> Registered:
    """A class that vLLM instantiates in the place of its own, which has a ``forward_cuda`` with these parameters."""
    name = stock.rpartition(":")[2]

    def registry() -> dict[str, type]:
        from vllm.model_executor.custom_op import op_registry_oot  # type: ignore[import-not-found]

        return op_registry_oot

    def taken() -> str | None:
        other = registry().get(name)
        return f"has a class in its place already, {other!r}" if other is not None else _other_platform()

    def put(new: type) -> None:
        from vllm.model_executor.custom_op import CustomOp  # type: ignore[import-not-found]

        CustomOp.register_oot(name=name)(new)

    def take(new: type) -> bool:
        return registry().get(name) is new and registry().pop(name) is new

    return Registered(
        feature, stock, "forward_cuda", parameters, make, label=name, needs=_REGISTER, taken=taken, put=put, take=take
    )


def _other_platform() -> str | None:
    from vllm.platforms import current_platform  # type: ignore[import-not-found]

    ours = current_platform.is_cuda_alike() or current_platform.is_cpu()
    return None if ours else f"runs on {current_platform.device_type}, for which there are no kernels here"


def apply(features: Iterable[str] = DEFAULT) -> list[Target]:
    """Put kernels into vLLM, for models that are built from now on; returns :func:`status`.

    What does not fit the vLLM at hand is left as it is and reported, with a ``PatchWarning``; so is a version that was
    never tested. ``QWEN2VL_KERNELS_DISABLE=1`` leaves everything as it is. To apply twice changes nothing.
    Raises ``ValueError`` for a feature that is not of :data:`FEATURES`.
    """
    return _patches().apply(features)


def restore() -> None:
    """Undo every :func:`apply`. Models that were built in between keep the activations and layers they have."""
    _patches().restore()


def status() -> list[Target]:
    """A row a target: "applied", "skipped" for its ``reason``, or "off" (not asked for)."""
    return _patches().status()


def plugin() -> None:
    """What vLLM calls in every process: apply the features that ``QWEN2VL_KERNELS`` asks for, by default none."""
    if features := requested("vllm"):
        apply(features)
