"""Bookkeeping of replaced attributes, shared by the adapters of all stacks.

A feature is applied whole or not at all: every target of it is checked before the first is set. What stands in the way
is a reason in :meth:`PatchSet.status` and a :class:`PatchWarning`. With ``QWEN2VL_KERNELS_DISABLE=1`` in the
environment ``apply`` of every adapter sets nothing and says so.
"""

from __future__ import annotations

import os
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any

from ._target import Target

SWITCH = "QWEN2VL_KERNELS_DISABLE"


class PatchWarning(UserWarning):
    """Something that was asked for is not patched or not known, or is on a version that nobody has tested."""


def disabled() -> bool:
    """Whether ``QWEN2VL_KERNELS_DISABLE`` turns every adapter off."""
    return os.environ.get(SWITCH, "") not in ("", "0")


class PatchSet:
    """The replaced attributes of one stack. ``tested``: versions, or how their numbers begin ("5.23", "4.57.6")."""

    def __init__(self, stack: str, version: str, tested: Sequence[str]) -> None:
        self.stack, self.version, self.tested = stack, version, tuple(tested)
        self._targets: list[Target] = []

    def add(self, feature: str, owner: Any, name: Any, parameters: Sequence[str] | None, make: Callable) -> Target:
        """Register a target, once; returns it.

        owner: a class, module, dict (``name`` is the key) or object, or ``"package.module"`` or ``"...:Class"``, looked
        up in :meth:`apply`; an object gets a bound method. parameters: the names that the present function must have,
        or may ("name?"); ``None`` takes anything, also nothing. make: from the present function (unbound, or ``None``)
        to the new one.
        """
        weak = not isinstance(owner, (str, type, ModuleType, dict))
        held = weakref.ref(owner) if weak else owner
        key = (feature, id(owner) if isinstance(owner, dict) else held, name)
        if (known := next((t for t in self._targets if t.key == key), None)) is not None:
            return known
        shown = owner if isinstance(owner, str) else getattr(owner, "__name__", type(owner).__name__)
        label = f"{shown.rpartition('.')[2].replace(':', '.')}.{name}" + (" of one object" if weak else "")
        names = None if parameters is None else tuple(parameters)
        self._targets.append(Target(feature, label, key, held, name, names, make))
        return self._targets[-1]

    def apply(self, features: Iterable[str] | None = None, targets: Iterable[Target] | None = None) -> list[Target]:
        """Set what is not set yet, of these features and these targets (default: all); returns :meth:`status`."""
        among = self.status() if targets is None else list(targets)
        known = list(dict.fromkeys(t.feature for t in among))
        wanted = known if features is None else list(features)
        if unknown := [f for f in wanted if f not in known]:
            raise ValueError(f"{self.stack}: there is no feature {unknown[0]!r}; the features are {', '.join(known)}")
        off = disabled()
        if not off and not any(f"{self.version}.".startswith(f"{tested}.") for tested in self.tested):
            self._warn(f"version {self.version} was never tested, only {', '.join(self.tested)}")
        for feature in wanted:
            group = [t for t in among if t.feature == feature and t.state != "applied"]
            faults = [f"{SWITCH} is set" if off else t.fault() for t in group]
            news = [None if any(faults) else t.make(t.present()) for t in group]  # what may fail, before any is set
            if not any(faults):
                _set_whole(group, news)
                continue
            for target, fault in zip(group, faults, strict=True):
                target.state, target.reason = "skipped", fault or f"{feature} goes whole or not at all"
            if not off:
                why = "; ".join(f"{t.label} {fault}" for t, fault in zip(group, faults, strict=True) if fault)
                self._warn(f"{feature} is left off: {why}")
        return self.status()

    def restore(self) -> None:
        """Put back what was there; what somebody else has replaced since stays, with a warning."""
        for target in reversed(self.status()):
            if not target.unset():
                self._warn(f"{target.label} was replaced by somebody else after apply() and stays as it is")

    def forget(self, module: str) -> None:
        """A module of this name was executed again. Its old classes can be restored; its new ones are new targets."""
        again = [t for t in self._targets if f"{t.key[1]}:".startswith(f"{module}:")]
        self._targets = [t for t in self._targets if t not in again or isinstance(t.held, type)]
        for target in again:
            target.key = (target.feature, target.held, target.name)

    def status(self) -> list[Target]:
        """All targets whose owners are alive, in the order of :meth:`add`."""
        self._targets = [t for t in self._targets if t.owner is not None]
        return list(self._targets)

    def _warn(self, message: str) -> None:
        warnings.warn(f"qwen2vl_kernels in {self.stack}: {message}", PatchWarning, stacklevel=4)


def _set_whole(group: Sequence[Target], news: Sequence[Any]) -> None:
    """Set all of a feature's targets, or none where setting one raises."""
    try:
        for target, new in zip(group, news, strict=True):
            target.set(new)
    except BaseException:
        for target in reversed(group):
            target.unset()
        raise
