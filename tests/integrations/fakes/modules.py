"""Modules made of attributes, put where ``import`` finds them."""

from __future__ import annotations

import sys
import types

import pytest


def install(monkeypatch: pytest.MonkeyPatch, modules: dict[str, dict[str, object]]) -> None:
    """Put modules with these attributes into ``sys.modules``, with the packages above them."""
    for name in sorted({".".join(n.split(".")[: i + 1]) for n in modules for i in range(n.count(".") + 1)}):
        module = types.ModuleType(name)
        module.__path__ = []  # a package, so that its submodules are looked for in sys.modules
        vars(module).update(modules.get(name, {}))
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
