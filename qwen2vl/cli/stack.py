"""``qwen2vl info --stack``: what of these kernels goes into transformers, vLLM or SGLang here, and what does not."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import warnings
from dataclasses import dataclass
from enum import StrEnum
from importlib import metadata
from typing import Any

from rich.console import Console
from rich.markup import escape

from ..errors import Qwen2VLError
from .common import installed_version


class Stack(StrEnum):
    """Choices of --stack."""

    transformers = "transformers"
    vllm = "vllm"
    sglang = "sglang"


@dataclass(frozen=True)
class _Plugins:
    """How a server finds plugins: the group of entry points, and the variable with names to load (default all)."""

    group: str
    variable: str


_PLUGINS = {
    Stack.vllm: _Plugins("vllm.general_plugins", "VLLM_PLUGINS"),
    Stack.sglang: _Plugins("sglang.srt.plugins", "SGLANG_PLUGINS"),
}


def collect(stack: Stack) -> dict[str, Any]:
    """What ``--json`` prints: the patch report after what a process of the stack does on its start.

    The plugins of the servers are loaded as they are there, from their entry points; transformers has none, so
    its adapter is applied. Nothing stays applied. Raises ``Qwen2VLError`` where the stack is not installed.
    """
    version = installed_version(stack.value)
    if version is None:
        raise Qwen2VLError(f"--stack {stack.value}: {stack.value} is not installed beside this package")
    from qwen2vl_kernels.integrations._patches import SWITCH, PatchWarning

    # Stacks log on stdout as they are imported, and --json leaves that to one object.
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", PatchWarning)
        adapter: Any = importlib.import_module(f"qwen2vl_kernels.integrations.{stack.value}")
        try:
            plugins = _load_plugins(_PLUGINS[stack]) if stack in _PLUGINS else None
            rows = adapter.apply() if plugins is None else adapter.status()
            targets = [{name: getattr(r, name) for name in ("feature", "label", "state", "reason")} for r in rows]
            adapter.restore()
        except ImportError as error:
            raise Qwen2VLError(f"--stack {stack.value}: {stack.value} {version} cannot be imported: {error}") from error
    return {
        "stack": stack.value,
        "version": version,
        "tested": list(adapter.TESTED),
        "kill_switch": {"variable": SWITCH, "value": os.environ.get(SWITCH)},
        "plugins": plugins,
        "targets": targets,
        "warnings": [str(w.message) for w in caught if issubclass(w.category, PatchWarning)],
    }


def _load_plugins(plugins: _Plugins) -> list[dict[str, Any]]:
    """Ours, loaded where the server would."""
    given = os.environ.get(plugins.variable)
    named = None if given is None else [name.strip() for name in given.split(",")]
    found = []
    for entry in metadata.entry_points(group=plugins.group):
        if entry.value.startswith("qwen2vl_kernels."):
            loaded = named is None or entry.name in named
            if loaded:
                entry.load()()
            found.append({"name": entry.name, "loaded": loaded, "variable": plugins.variable, "value": given})
    return found


def show(report: dict[str, Any]) -> None:
    """The report as a table."""
    console, switch = Console(highlight=False), report["kill_switch"]
    console.print(f"{report['stack']} {report['version']} (tested: {', '.join(report['tested'])})")
    console.print(f"{switch['variable']}: {switch['value'] or 'not set'}")
    if report["plugins"] is not None:
        said = [f"{p['name']}{'' if p['loaded'] else ' (not loaded)'}" for p in report["plugins"]]
        console.print(f"plugins: {', '.join(said) or '[yellow]none found: install this package[/]'}")
        if report["plugins"] and (given := report["plugins"][0]["value"]) is not None:
            console.print(f"{report['plugins'][0]['variable']}: {escape(given)}")
    rows = [("feature", "target", "state")]
    for target in report["targets"]:
        state = f"{target['state']}: {target['reason']}" if target["reason"] else target["state"]
        rows.append((target["feature"], target["label"], state))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for feature, label, state in rows:  # no table of rich's: names that a narrow one folds cannot be searched for
        console.print(f"{feature:{widths[0]}}  {label:{widths[1]}}  {state}", markup=False, soft_wrap=True)
    for warning in report["warnings"]:
        console.print(f"* {escape(warning)}", soft_wrap=True)
