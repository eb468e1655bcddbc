"""These kernels inside transformers' Qwen2-VL, Qwen2.5-VL and Qwen3-VL (dense).

from qwen2vl_kernels.integrations import transformers as kernels

kernels.apply()                # every model of the process, made before or after this line
kernels.apply(model)           # one model
kernels.apply(features=("vision_attention", "positions"))
for row in kernels.status():
    print(row.feature, row.label, row.state, row.reason)
kernels.restore()

feature            what it replaces
mrope              rotary embedding of the language model, by position ids inside the attention, in place
vision_rope        ``apply_rotary_pos_emb_vision``; a function of the module, so never of one model
vision_attention   attention of the tower: all segments in one call, ``cu_seqlens`` never read once a layer, whatever
                   ``attn_implementation`` says; 2D rotary embedding of the packed projection
patch_embed        the patch embedding's convolution, as a matrix product with the same 5-D ``proj.weight``
norm               RMSNorm; LayerNorm of the tower's blocks, fused with the residual addition
activation         QuickGELU and SwiGLU, in place where no gradient needs the input
merger             the 2x2 mergers that have a LayerNorm (Qwen2-VL, Qwen3-VL and its deepstack)
positions          ``get_rope_index`` of Qwen2-VL and Qwen3-VL, without loops over tokens; in Qwen2-VL it also moves the
                   text after a long video to the paper's position (transformers 5.3 to 5.23 start it too early)
image_processor    preprocessing of the image processor over PIL, same bytes; a class, so never of one model
loss               the training loss from hidden states, a chunk of rows at a time; the output has no logits then, so it
                   is applied by name only: ``apply(features=(*DEFAULT, "loss"))``

Results are stock's up to rounding: in 16-bit dtypes the kernels round less often. Where hooks, offloading, adapters
(LoRA), autocast or an export are in the way, stock's code runs for that module. Only transformers' own code is
replaced: another package's in its place, and modules with a ``forward`` of their own, are left and reported.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn

from ._modules import in_the_way
from ._patches import PatchSet, PatchWarning
from .transformers_import import targets_of
from .transformers_positions import get_rope_index
from .transformers_targets import DEFAULT, FEATURES, TESTED, places

__all__ = ["DEFAULT", "FEATURES", "PatchWarning", "Row", "apply", "get_rope_index", "restore", "status"]


@dataclass(frozen=True)
class Row:
    """A function: "applied", "skipped" for ``reason``, or "off"; or a patched module that runs "stock"'s code."""

    feature: str
    label: str
    state: str
    reason: str


def apply(model: nn.Module | None = None, features: Iterable[str] | None = None) -> list[Row]:
    """Replace functions of transformers by ones that run on these kernels.

    Args:
        model: any module that contains a Qwen2-VL, Qwen2.5-VL or Qwen3-VL, whole or in part; only its own modules are
            patched, and those of its copies that are made from then on. ``None``: the classes, so every model there is
            and will be. Modules that accelerate has hooked (``device_map`` over several devices, offloading) keep what
            they had then: apply to the classes before such a model is loaded.
        features: of :data:`FEATURES`; ``None`` for :data:`DEFAULT` (with ``model``, what can be had for one).

    Returns :func:`status`. A feature of a model family whose functions do not have the parameters that this adapter
    knows is left as it is and reported, with a ``PatchWarning``; so is a version of transformers that was never tested.
    ``QWEN2VL_KERNELS_DISABLE=1`` in the environment leaves everything as it is. To apply twice changes nothing.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: no such feature, or one that cannot be had for a single model; nothing to patch in ``model``.
    """
    wanted = DEFAULT if features is None else tuple(features)
    if unknown := [f for f in wanted if f not in FEATURES]:
        raise ValueError(f"apply: there is no feature {unknown[0]!r}; the features are {', '.join(FEATURES)}")
    found = _on_classes() if model is None else _on_objects(model)
    had = {feature for feature, *_ in found}
    if model is not None and features is not None and (lacking := [f for f in wanted if f not in had]):
        raise ValueError(f"apply: {type(model).__name__} has nothing for {lacking[0]!r}; it has {', '.join(had)}")
    patches = _patches()
    patches.apply(targets=targets_of(patches, found, wanted))
    return status()


def restore() -> None:
    """Undo every :func:`apply`, on copies too: each attribute is again what it was, and absent where it was. What has
    wrapped a patched module since (FSDP, accelerate) keeps it; for single models a ``PatchWarning`` says where."""
    _patches().restore()


def status(model: nn.Module | None = None) -> list[Row]:
    """What was ever asked for, in order; the modules of one kind are one row. With a model also its patched modules for
    which stock's code runs, as something is in the way at present."""
    count = Counter((t.feature, t.label, t.state, t.reason) for t in _patches().status())
    rows = [Row(feature, label if n == 1 else f"{label} ({n})", *rest) for (feature, label, *rest), n in count.items()]
    names = {} if model is None else {module: name for name, module in model.named_modules()}
    for feature, family, module, *_ in [] if model is None else _on_objects(model):
        if parts := in_the_way(module):
            reason = f"{', '.join(parts)}: hooked, or not transformers' own"
            rows.append(Row(f"{family}: {feature}", names[module], "stock", reason))
    return rows


def _patches() -> PatchSet:
    from transformers import __version__

    return _patches_of(__version__)


@cache
def _patches_of(version: str) -> PatchSet:
    return PatchSet("transformers", version, TESTED, package="transformers")


def _on_classes() -> list[tuple]:
    """``(feature, family, owner, name, parameters, make)`` of every place."""
    found = []
    for place in places(_patches().version):
        owner = f"transformers.models.{place.module}" + (f":{place.cls}" if place.cls else "")
        found.append((place.feature, place.module.split(".")[0], owner, place.name, place.parameters, place.make))
    return found


def _on_objects(model: Any) -> list[tuple]:
    """The same with the modules of ``model`` as owners; of a subclass the place of its base."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"apply: model must be a torch.nn.Module, got {type(model).__name__}")
    by_class = {}
    for place in places(_patches().version):
        module = f"transformers.models.{place.module}"
        cls = getattr(sys.modules.get(module), place.cls, None) if place.cls else None
        if cls is not None and cls.__module__ == module and issubclass(cls, nn.Module):
            by_class[cls] = place
    found = []
    for module in model.modules():
        place = next((by_class[cls] for cls in type(module).__mro__ if cls in by_class), None)
        if place is not None:
            family = place.module.split(".")[0]
            found.append((place.feature, family, module, place.name, place.parameters, place.make))
    if not found:
        raise ValueError(f"apply: {type(model).__name__} contains no Qwen2-VL, Qwen2.5-VL or Qwen3-VL")
    return found
