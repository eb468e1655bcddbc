"""One replaced attribute: what may stand in its way, and how it is set and put back."""

from __future__ import annotations

import importlib
import inspect
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
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
    """One attribute: ``state`` is "applied", "skipped" for the ``reason``, or "off" (not asked for, or restored).

    Of an object that is no class, module or dict, the class is replaced by one that differs in this attribute.
    """

    feature: str
    label: str
    key: tuple
    held: Any  # the owner: a class, module or dict, a weak reference to another object, a name until it is looked up
    name: Any
    parameters: tuple[str, ...] | None
    make: Callable[[Any], Any]
    package: str | None = None  # whose code may be replaced; None: anybody's
    state: str = "off"
    reason: str = ""
    old: Any = _ABSENT  # what the owner itself held, as it held it: a staticmethod as such, nothing if inherited
    new: Any = None

    owner = property(lambda self: self.held() if isinstance(self.held, weakref.ref) else self.held)
    of_one = property(lambda self: isinstance(self.held, weakref.ref), doc="Whether the owner is an object.")

    def present(self) -> Any:
        """What is to be replaced; of an object the function of its class."""
        if isinstance(self.owner, dict):
            return self.owner.get(self.name)
        found = getattr(type(self.owner) if self.of_one else self.owner, self.name, None)
        return getattr(found, "__func__", found)

    def own_code(self) -> str | None:
        """Why this one object is left alone, whatever becomes of others: it, or its class, runs somebody's code."""
        if not self.of_one:
            return None
        if self.name in vars(self.owner):
            return f"has a {self.name} of its own (a hook that offloads, or somebody's code)"
        return self._foreign(self.present())

    def fault(self) -> str | None:
        """Why the target cannot be set; a name of an owner is looked up."""
        if isinstance(self.held, str) and (lacking := self._look_up(*self.held.partition(":")[::2])):
            return lacking
        if self.parameters is None:
            return None
        present = self.present()
        if getattr(present, MARK, False):
            return "is patched already, on the class or by another set"
        have = tuple(inspect.signature(present).parameters) if callable(present) else None
        return self._foreign(present) if fits(have, self.parameters) else f"takes {have}, not {self.parameters}"

    def set(self, new: Any) -> None:
        """Put ``new`` there: of an object the class, of all others the attribute."""
        self.new = new
        if self.of_one:
            self.old, self.owner.__class__ = type(self.owner), new
        else:
            self.old = self._own().get(self.name, _ABSENT)
            self._store(new)
        function = vars(new)[self.name] if self.of_one else new
        if isinstance(function, FunctionType):
            setattr(function, MARK, True)
        self.state, self.reason = "applied", ""

    def unset(self) -> bool:
        """Undo :meth:`set` where it was done; False if somebody has set the attribute since."""
        was, self.state, self.reason = self.state, "off", ""
        if was != "applied":
            return True
        if self.of_one:
            if ours := type(self.owner) is self.new:
                self.owner.__class__ = self.old
            return ours and self.name not in vars(self.owner)
        if ours := self._own().get(self.name) is self.new:
            self._store(self.old)
        return ours

    def _look_up(self, module: str, inside: str) -> str | None:
        try:
            found = importlib.import_module(module)
            found = getattr(found, inside) if inside else found
        except (ImportError, AttributeError) as error:
            return f"was not found ({error})"
        if self.package and inside and found.__module__ != module:
            return f"is {found.__module__}.{found.__qualname__}, which somebody put there"
        self.held = found
        return None

    def _foreign(self, function: Any) -> str | None:
        """What is wrong with the origin of a function: it is not of the package whose code may be replaced."""
        origin = getattr(inspect.unwrap(function), "__module__", None) if callable(function) else None
        if self.package is None or origin is None or origin.partition(".")[0] == self.package:
            return None
        return f"runs code of {origin}, which is left alone"

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
