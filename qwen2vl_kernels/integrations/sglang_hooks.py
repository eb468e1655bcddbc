"""Targets in SGLang: entries of its tables, and functions that its ``HookRegistry`` hooks.

The registry reaches modules that imported a function by name, too. A hook is registered first, and set when SGLang
applies all of them; one that it cannot set it only logs. It takes none back, so :meth:`Hook.unset` does that.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

from ._registered import Registered
from ._target import MARK, Target

_REGISTRY = "sglang.srt.plugins.hook_registry"
_NEEDS = {
    f"{_REGISTRY}:HookRegistry.register": ("cls", "target", "hook", "hook_type", "source"),
    f"{_REGISTRY}:HookRegistry.apply_hooks": ("cls",),
    f"{_REGISTRY}:HookRegistry._hooks": None,
    f"{_REGISTRY}:HookRegistry._patched": None,
}


class Hook(Registered):
    """A function ``name`` of ``held`` under a hook of ``kind``: "AROUND", "AFTER" or "REPLACE"."""

    def __init__(
        self,
        feature: str,
        held: str,
        name: str,
        parameters: Sequence[str],
        make: Callable[[Any], Any],
        kind: str,
        needs: Mapping[str, Sequence[str] | None] | None = None,
    ) -> None:
        needs = {**_NEEDS, **(needs or {})}
        calls: Any = {"taken": self._hooked, "put": self._register, "take": self._take_back}
        super().__init__(feature, held, name, parameters, make, needs=needs, **calls)
        self._kind, self._path, self._stock = kind, f"{held.replace(':', '.')}.{name}", None

    def is_set(self) -> bool:
        """Whether SGLang has set the hook."""
        return self._path in _registry().HookRegistry._patched

    def _hooked(self) -> str | None:
        if self.is_set():
            return "was hooked by another plugin before, and SGLang hooks a function only once"
        waiting = _registry().HookRegistry._hooks.get(self._path, ())
        return "has a hook of these kernels already" if any(getattr(entry[1], MARK, 0) for entry in waiting) else None

    def _register(self, hook: Any) -> None:
        setattr(hook, MARK, True)
        self._stock = self.present()
        _registry().HookRegistry.register(self._path, hook, _registry().HookType[self._kind])

    def _take_back(self, hook: Any) -> bool:
        """Where others have hooked the function as well, or replaced it since, everything stays."""
        hooks, patched = _registry().HookRegistry._hooks, _registry().HookRegistry._patched
        others = [entry for entry in hooks.get(self._path, ()) if entry[1] is not hook]
        if self.is_set():
            hooked = self.present()
            if others or getattr(hooked, "__wrapped__", None) is not self._stock:
                return False
            for holder in (self.owner, *(m for m in list(sys.modules.values()) if isinstance(m, ModuleType))):
                for key in [key for key, value in list(vars(holder).items()) if value is hooked]:
                    setattr(holder, key, self._stock)
            patched.discard(self._path)
        hooks.pop(self._path, None)
        if others:
            hooks[self._path] = others
        return True


def set_hooks() -> None:
    """Have SGLang set what is registered."""
    _registry().HookRegistry.apply_hooks()


class Entry(Target):
    """A ``key`` added to a ``table`` of ``module``: a dict, or a frozenset, in whose place a larger one is put."""

    def __init__(self, feature: str, module: str, table: str, key: str, kind: type, make: Callable[[Any], Any]) -> None:
        held, name = (f"{module}:{table}", key) if kind is dict else (module, table)
        super().__init__(feature, table, (feature, held, name), held, name, None, make)
        self._key, self._kind = key, kind

    def fault(self) -> str | None:
        if (reason := super().fault()) is not None:
            return reason
        table = self.owner if self._kind is dict else self.present()
        if not isinstance(table, self._kind):
            return f"is a {type(table).__name__}, not a {self._kind.__name__}"
        return f"holds {self._key!r} already" if self._key in table else None


def _registry() -> Any:
    return importlib.import_module(_REGISTRY)
