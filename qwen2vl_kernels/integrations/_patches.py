"""Bookkeeping of replaced attributes, shared by the adapters of all stacks.

A feature is applied whole or not at all: every target of it is checked before the first is set. What stands in the way
is a reason in :meth:`PatchSet.status` and a :class:`PatchWarning`. With ``QWEN2VL_KERNELS_DISABLE=1`` in the
environment ``apply`` of every adapter sets nothing and says so.
"""

from __future__ import annotations

import importlib
import inspect
import os
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import FunctionType, MethodType, ModuleType
from typing import Any

SWITCH = "QWEN2VL_KERNELS_DISABLE"
#: An attribute of every function that was set here.
MARK = "__qwen2vl_kernels__"
_ABSENT: Any = object()


class PatchWarning(UserWarning):
    """Something that was asked for is not patched, or is on a version that nobody has tested."""


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
        return None if have == self.parameters else f"takes {have}, not {self.parameters}"

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


class PatchSet:
    """The replaced attributes of one stack. ``tested``: versions, or how their numbers begin ("5.23", "4.57.6")."""

    def __init__(self, stack: str, version: str, tested: Sequence[str]) -> None:
        self.stack, self.version, self.tested = stack, version, tuple(tested)
        self._targets: list[Target] = []

    def add(self, feature: str, owner: Any, name: Any, parameters: Sequence[str] | None, make: Callable) -> None:
        """Register a target, once.

        owner: a class, module, dict (``name`` is the key) or object, or ``"package.module"`` or ``"...:Class"``, looked
        up in :meth:`apply`; an object gets a bound method. parameters: the names that the present function must have;
        ``None`` takes anything, also nothing. make: from the present function (unbound, or ``None``) to the new one.
        """
        weak = not isinstance(owner, (str, type, ModuleType, dict))
        held = weakref.ref(owner) if weak else owner
        key = (feature, id(owner) if isinstance(owner, dict) else held, name)
        if all(t.key != key for t in self._targets):
            shown = owner if isinstance(owner, str) else getattr(owner, "__name__", type(owner).__name__)
            label = f"{shown.rpartition('.')[2].replace(':', '.')}.{name}" + (" of one object" if weak else "")
            names = None if parameters is None else tuple(parameters)
            self._targets.append(Target(feature, label, key, held, name, names, make))

    def apply(self, features: Iterable[str] | None = None) -> list[Target]:
        """Set the targets of these features (default: all) that are not set yet; returns :meth:`status`."""
        known = list(dict.fromkeys(t.feature for t in self._targets))
        wanted = known if features is None else list(features)
        if unknown := [f for f in wanted if f not in known]:
            raise ValueError(f"{self.stack}: there is no feature {unknown[0]!r}; the features are {', '.join(known)}")
        disabled = os.environ.get(SWITCH, "") not in ("", "0")
        if not disabled and not any(f"{self.version}.".startswith(f"{tested}.") for tested in self.tested):
            self._warn(f"version {self.version} was never tested, only {', '.join(self.tested)}")
        for feature in wanted:
            group = [t for t in self.status() if t.feature == feature and t.state != "applied"]
            faults = [f"{SWITCH} is set" if disabled else t.fault() for t in group]
            news = [None if any(faults) else t.make(t.present()) for t in group]  # what may fail, before any is set
            for target, fault, new in zip(group, faults, news, strict=True):
                if any(faults):
                    target.state, target.reason = "skipped", fault or f"{feature} goes whole or not at all"
                else:
                    target.set(new)
            if any(faults) and not disabled:
                why = "; ".join(f"{t.label} {fault}" for t, fault in zip(group, faults, strict=True) if fault)
                self._warn(f"{feature} is left off: {why}")
        return self.status()

    def restore(self) -> None:
        """Put back what was there; what somebody else has replaced since stays, with a warning."""
        for target in reversed(self.status()):
            if not target.unset():
                self._warn(f"{target.label} was replaced by somebody else after apply() and stays as it is")

    def status(self) -> list[Target]:
        """All targets whose owners are alive, in the order of :meth:`add`."""
        self._targets = [t for t in self._targets if t.owner is not None]
        return list(self._targets)

    def _warn(self, message: str) -> None:
        warnings.warn(f"qwen2vl_kernels in {self.stack}: {message}", PatchWarning, stacklevel=4)
