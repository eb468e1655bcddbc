"""What ``QWEN2VL_KERNELS`` asks for, module by module, as transformers is imported.

``_qwen2vl_kernels_switch.py`` beside the packages watches imports where the variable is set, and calls this.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from importlib import import_module

from ._switch import requested


def imported(module: str) -> None:
    """Apply the features that are asked for to a module of transformers that was executed just now, maybe again."""
    if features := requested("transformers"):
        from . import transformers as adapter

        adapter._patches().forget(module)
        adapter._set([place for place in adapter._on_classes() if place[2].partition(":")[0] == module], features)


def import_owners(owners: Iterable[object]) -> None:
    """Import the modules of those that are given by name ("module", "module:Class"), before anything is replaced there.

    An import that is switched on applies its features, and must not do so among the targets of another ``apply``.
    """
    for module in dict.fromkeys(owner.partition(":")[0] for owner in owners if isinstance(owner, str)):
        with suppress(ImportError):  # the target will report it
            import_module(module)
