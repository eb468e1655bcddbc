"""One replaced attribute: what may stand in its way, and how it is set and put back."""

from __future__ import annotations

import importlib
import inspect
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any

#: An attribute of every function that was set here.
MARK = "__qwen2vl_kernels__"
_ABSENT: Any = object()


def fits(have: tuple[str, ...] | None, wanted: tuple[str, ...]) -> bool:
    """Whether a function has the parameters that are wanted, in this order. ``"name?"``: with it or without it."""
    here = have or ()
    return have == tuple(name.rstrip("?") for name in wanted if name[-1] != "?" or name[:-1] in here)


@dataclass(eq=False)
class Target:
    """One attribute: ``state`` is "applied", "skipped" for the ``reason``, or "off" (not asked for, or restored)."""

    feature: str
    label: str
    key: tuple
    held: Any  # the owner: a class, module or dict, a weak reference to another object, a name until it is looked up
    name: Any
    parameters: tuple[str, ...] | None
    make: Callable[[Any], Any]
    state: str = "off"
    reason: str = ""
    old: Any = _ABSENT  # what the owner itself held, as it held it: a staticmethod as such, nothing if inherited
    new: Any = None

    owner = property(lambda self: self.held() if isinstance(self.held, weakref.ref) else self.held)

    def present(self) -> Any:
        """What is to be replaced; of an object the function of its class, unless it has one of its own."""
        if isinstance(self.owner, dict):
            return self.owner.get(self.name)
        found = getattr(self.owner, self.name, None)
        return getattr(found, "__func__", found)

    def fault(self) -> str | None:
        """Why the target cannot be set; a name of an owner is looked up."""
        if isinstance(self.held, str):
            module, _, inside = self.held.partition(":")
            try:
                found = importlib.import_module(module)
                self.held = getattr(found, inside) if inside else found
            except (ImportError, AttributeError) as error:
                return f"was not found ({error})"
        if self.parameters is None:
            return None
        present = self.present()
        if getattr(present, MARK, False):
            return "is patched already, on the class or by another set"
        have = tuple(inspect.signature(present).parameters) if callable(present) else None
        return None if fits(have, self.parameters) else f"takes {have}, not {self.parameters}"

    def set(self, new: Any) -> None:
        self.old, self.new = self._own().get(self.name, _ABSENT), new
        if isinstance(new, FunctionType):
            setattr(new, MARK, True)
        self._store(MethodType(new, self.owner) if isinstance(self.held, weakref.ref) else new)
        self.state, self.reason = "applied", ""

    def unset(self) -> bool:
        """Undo :meth:`set` where it was done; False if somebody has set the attribute since."""
        was, self.state, self.reason = self.state, "off", ""
        now = self._own().get(self.name) if was == "applied" else None
        ours = now is not None and (now is self.new or getattr(now, "__func__", None) is self.new)
        if ours:
            self._store(self.old)
        return ours or was != "applied"

    def _own(self) -> Any:
        """The owner's attributes without those it inherits."""
        return self.owner if isinstance(self.owner, dict) else vars(self.owner)

    def _store(self, value: Any) -> None:
        if isinstance(self.owner, dict):
            self.owner.pop(self.name, None) if value is _ABSENT else self.owner.update({self.name: value})
        elif value is _ABSENT:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, value)
