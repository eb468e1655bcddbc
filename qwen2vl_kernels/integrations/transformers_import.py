"""Places in modules of transformers that are imported already, and in those that are only just imported.

``_qwen2vl_kernels_switch.py`` beside the packages watches imports where ``QWEN2VL_KERNELS`` is set, and calls
:func:`imported`.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from importlib import import_module

from ._patches import PatchSet
from ._switch import requested
from ._target import Target
from .transformers_targets import FEATURES


def targets_of(patches: PatchSet, found: list[tuple], features: Collection[str]) -> list[Target]:
    """What these features replace, of places ``(feature, family, owner, ...)``, in the order of the features.

    Owners that are given by name ("module", "module:Class") are imported before anything is replaced: an import that is
    switched on applies its features, and must not do so among the targets of another ``apply``.
    """
    found = sorted((place for place in found if place[0] in features), key=lambda place: FEATURES.index(place[0]))
    for module in dict.fromkeys(owner.partition(":")[0] for _, _, owner, *_ in found if isinstance(owner, str)):
        with suppress(ImportError):  # the target will report it
            import_module(module)
    return [patches.add(f"{family}: {feature}", *rest) for feature, family, *rest in found]


def imported(module: str) -> None:
    """Apply the features that are asked for to a module of transformers that was executed just now, maybe again."""
    if features := requested("transformers"):
        from . import transformers as adapter

        patches = adapter._patches()
        patches.forget(module)
        places = [place for place in adapter._on_classes() if place[2].partition(":")[0] == module]
        patches.apply(targets=targets_of(patches, places, features))
