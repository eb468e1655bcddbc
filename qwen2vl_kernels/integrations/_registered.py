"""Targets that a stack itself sets, through a function of its own, and checks beyond the replaced function.

Plugins of a serving stack do not overwrite everything: a class goes into a registry, a hook is handed over. Such a
target is put and taken back by two callables instead of an assignment, and is reported like any other.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ._patches import PatchSet
from ._target import Target


class Registered(Target):
    """A function ``name`` of ``held`` ("package.module" or "package.module:Class") whose place something else takes.

    needs: "package.module:Class.name" -> parameters, of what the replacement calls besides; ``None`` takes anything.
    taken: why it cannot be set although all signatures are right, or ``None``; called after these were checked.
    put, take: hand the replacement over, and back: ``take`` returns False where that cannot be done. Without them the
        function is assigned.
    """

    def __init__(
        self,
        feature: str,
        held: str,
        name: str,
        parameters: Sequence[str],
        make: Callable[[Any], Any],
        *,
        label: str | None = None,
        needs: Mapping[str, Sequence[str] | None] | None = None,
        taken: Callable[[], str | None] = lambda: None,
        put: Callable[[Any], None] | None = None,
        take: Callable[[Any], bool] | None = None,
    ) -> None:
        label = label or f"{held.rpartition('.')[2].replace(':', '.')}.{name}"
        super().__init__(feature, label, (feature, held, name), held, name, tuple(parameters), make)
        self._needs, self._taken, self._put, self._take = dict(needs or {}), taken, put, take

    def fault(self) -> str | None:
        if (reason := super().fault()) is not None:
            return reason
        for path, parameters in self._needs.items():
            held, _, name = path.rpartition(".")
            names = None if parameters is None else tuple(parameters)
            needed = Target(self.feature, path, (path,), held, name, names, lambda present: present)
            if (reason := needed.fault()) is not None or needed.present() is None:
                return f"needs {path}, which {reason or 'was not found'}"
        return self._taken()

    def set(self, new: Any) -> None:
        if self._put is None:
            super().set(new)
            return
        self._put(new)
        self.new, self.state, self.reason = new, "applied", ""

    def unset(self) -> bool:
        if self._take is None:
            return super().unset()
        was, self.state, self.reason = self.state, "off", ""
        return was != "applied" or self._take(self.new)


class StackPatches(PatchSet):
    """The patches of a stack that is looked for when it is asked for."""

    def __init__(self, stack: str, module: str, tested: Sequence[str], targets: Iterable[Target]) -> None:
        found = version_of(module)
        # A stack that is absent is no version that was never tested: every target says that it was not found.
        super().__init__(stack, found or "not installed", tested if found else (*tested, "not installed"))
        self._targets.extend(targets)

    def withdraw(self, target: Target, fault: str) -> None:
        """Take the whole feature of a target off again, because of what the stack made of it afterwards."""
        for other in self.status():
            if other.feature == target.feature:
                other.unset()
                other.state = "skipped"
                other.reason = fault if other is target else f"{target.feature} goes whole or not at all"
        self._warn(f"{target.feature} is left off: {target.label} {fault}")


def version_of(module: str) -> str | None:
    """``__version__`` of a module, ``None`` where it cannot be imported."""
    try:
        return str(getattr(importlib.import_module(module), "__version__", "unknown"))
    except ImportError:
        return None
