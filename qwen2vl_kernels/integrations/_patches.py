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
from dataclasses import replace
from types import ModuleType
from typing import Any

from ._subclass import subclass
from ._target import Target

SWITCH = "QWEN2VL_KERNELS_DISABLE"


class PatchWarning(UserWarning):
    """Something that was asked for is not patched or not known, or is on a version that nobody has tested."""


def disabled() -> bool:
    """Whether ``QWEN2VL_KERNELS_DISABLE`` turns every adapter off."""
    return os.environ.get(SWITCH, "") not in ("", "0")


class PatchSet:
    """The replaced attributes of one stack.

    tested: versions, or how their numbers begin ("5.23", "4.57.6"). package: only code of this package is replaced, and
    what others have put in its place is left alone; ``None``: whatever is there.
    """

    def __init__(self, stack: str, version: str, tested: Sequence[str], package: str | None = None) -> None:
        self.stack, self.version, self.tested, self.package = stack, version, tuple(tested), package
        self._targets: list[Target] = []
        self._classes: dict[tuple, type] = {}  # of patched objects: one for all objects of a class

    def add(self, feature: str, owner: Any, name: Any, parameters: Sequence[str] | None, make: Callable) -> Target:
        """Register a target, once; returns it.

        owner: a class, module, dict (``name`` is the key) or object, or ``"package.module"`` or ``"...:Class"``, looked
        up in :meth:`apply`; an object gets a class of its own kind, and so do its copies. parameters: the names that
        the present function must have, or may ("name?"); ``None`` takes anything, also nothing. make: from the present
        function (unbound, or ``None``) to the new one.
        """
        weak = not isinstance(owner, (str, type, ModuleType, dict))
        held = weakref.ref(owner) if weak else owner
        key = (feature, id(owner) if isinstance(owner, dict) else held, name)
        if (known := next((t for t in self._targets if t.key == key), None)) is not None:
            return known
        shown = owner if isinstance(owner, str) else getattr(owner, "__name__", type(owner).__name__)
        label = f"{shown.rpartition('.')[2].replace(':', '.')}.{name}" + (" of one object" if weak else "")
        names = None if parameters is None else tuple(parameters)
        self._targets.append(Target(feature, label, key, held, name, names, make, self.package))
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
            if not off and (left := [(t, why) for t in group if (why := t.own_code())]):
                _skip(left)
                self._warn(f"{feature} leaves alone what runs other code: {_told(left)}")
                group = [t for t in group if t not in [target for target, _ in left]]
            faults = [(t, f"{SWITCH} is set" if off else t.fault()) for t in group]
            if not any(fault for _, fault in faults):
                _set_whole(group, [self._made(t) for t in group])  # what may fail is made before any is set
                continue
            _skip([(t, fault or f"{feature} goes whole or not at all") for t, fault in faults])
            if not off:
                self._warn(f"{feature} is left off: {_told(faults)}")
        return self.status()

    def restore(self) -> None:
        """Put back what was there; what somebody else has replaced since stays, with a warning."""
        for target in reversed(self.status()):
            if not target.unset():
                self._warn(f"{target.label} was replaced by somebody else after apply() and stays as it is")
        self._classes.clear()

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

    def _made(self, target: Target) -> Any:
        """What :meth:`Target.set` takes."""
        if not target.of_one:
            return target.make(target.present())
        base = type(target.owner)
        key = (base, target.name, target.make)
        if key not in self._classes:
            function = target.make(target.present())
            self._classes[key] = subclass(base, target.name, function, lambda copy: self._copied(target, copy))
        return self._classes[key]

    def _copied(self, target: Target, copy: Any) -> None:
        """A copy of a patched object, or of another that shares its class: it is patched too, and to be restored."""
        held = weakref.ref(copy)
        key = (target.feature, held, target.name)
        self._targets.append(replace(target, key=key, held=held, state="applied", reason=""))

    def _warn(self, message: str) -> None:
        warnings.warn(f"qwen2vl_kernels in {self.stack}: {message}", PatchWarning, stacklevel=4)


def _skip(reasons: Iterable[tuple[Target, str]]) -> None:
    for target, reason in reasons:
        target.state, target.reason = "skipped", reason


def _told(faults: Iterable[tuple[Target, str | None]]) -> str:
    """Labels with their faults, each once."""
    return "; ".join(dict.fromkeys(f"{target.label} {fault}" for target, fault in faults if fault))


def _set_whole(group: Sequence[Target], news: Sequence[Any]) -> None:
    """Set all of a feature's targets, or none where setting one raises."""
    try:
        for target, new in zip(group, news, strict=True):
            target.set(new)
    except BaseException:
        for target in reversed(group):
            target.unset()
        raise
