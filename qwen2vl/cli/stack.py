"""``qwen2vl info --stack``: what these kernels replace in transformers, vLLM or SGLang, or would."""

from __future__ import annotations

import contextlib
import importlib
import os
import site
import sys
import warnings
from dataclasses import dataclass
from enum import StrEnum
from importlib import metadata
from pathlib import Path
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
    empty: bool  # whether an empty value of the variable loads all plugins, too


_PLUGINS = {
    Stack.vllm: _Plugins("vllm.general_plugins", "VLLM_PLUGINS", empty=False),
    Stack.sglang: _Plugins("sglang.srt.plugins", "SGLANG_PLUGINS", empty=True),
}

_PTH = "qwen2vl_kernels.pth"


def collect(stack: Stack) -> dict[str, Any]:
    """What ``--json`` prints.

    Every feature is applied once, to learn what fits the stack that is installed, and taken off again. A target is then
    "on" (a process of the stack that starts in this environment replaces it), "off" (it fits, and is not switched on)
    or "skipped" for its reason. transformers has no plugins; what Python runs as it starts is reported as one.

    Raises ``Qwen2VLError`` where the stack is not installed, or cannot be imported.
    """
    version = installed_version(stack.value)
    if version is None:
        raise Qwen2VLError(f"--stack {stack.value}: {stack.value} is not installed beside this package")
    from qwen2vl_kernels.integrations._patches import SWITCH, PatchWarning

    # Stacks log on stdout as they are imported, and --json leaves that to one object.
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", PatchWarning)
        try:
            importlib.import_module(stack.value)
        except Exception as error:  # whatever is wrong with somebody else's installation
            raise Qwen2VLError(f"--stack {stack.value}: {stack.value} {version} cannot be imported: {error}") from error
        adapter: Any = importlib.import_module(f"qwen2vl_kernels.integrations.{stack.value}")
        plugins = _plugins(_PLUGINS[stack]) if stack in _PLUGINS else _start()
        switch = _switch(stack, loaded=any(plugin["loaded"] for plugin in plugins))
        rows = adapter.apply(features=adapter.FEATURES)
        targets = [{name: getattr(r, name) for name in ("feature", "label", "state", "reason")} for r in rows]
        adapter.restore()
    for target in targets:
        if target["state"] == "applied":  # of transformers with the family before the feature
            target["state"] = "on" if target["feature"].rpartition(" ")[2] in switch["on"] else "off"
    return {
        "stack": stack.value,
        "version": version,
        "tested": list(adapter.TESTED),
        "kill_switch": {"variable": SWITCH, "value": os.environ.get(SWITCH)},
        "switch": switch,
        "plugins": plugins,
        "targets": targets,
        "warnings": [str(w.message) for w in caught if issubclass(w.category, PatchWarning)],
    }


def _plugins(plugins: _Plugins) -> list[dict[str, Any]]:
    """Our entry points, and whether the server loads each."""
    given = os.environ.get(plugins.variable)
    named = None if given is None or (plugins.empty and not given) else [n.strip() for n in given.split(",")]
    return [
        {
            "name": entry.name,
            "loaded": named is None or entry.name in named,
            "variable": plugins.variable,
            "value": given,
        }
        for entry in metadata.entry_points(group=plugins.group)
        if entry.value.startswith("qwen2vl_kernels.")
    ]


def _start() -> list[dict[str, Any]]:
    """The file of ours that this interpreter runs as it starts, if it has one."""
    folders = map(Path, (*site.getsitepackages(), site.getusersitepackages() if site.ENABLE_USER_SITE else ""))
    found = any((folder / _PTH).is_file() for folder in folders)
    return [{"name": _PTH, "loaded": True, "variable": None, "value": None}] if found else []


def _switch(stack: Stack, loaded: bool) -> dict[str, Any]:
    """What the environment switches on where the plugin is ``loaded``, and the settings that switch the rest on."""
    from qwen2vl_kernels.integrations._switch import STACKS, VARIABLE, requested, setting

    known = STACKS[stack.value]
    return {
        "variable": VARIABLE,
        "value": os.environ.get(VARIABLE),
        "on": list(requested(stack.value)) if loaded else [],
        "default": list(known.default),
        "settings": list(dict.fromkeys(setting(stack.value, names) for names in (known.default, known.features))),
    }


def show(report: dict[str, Any]) -> None:
    """The report as a table."""
    console, kill = Console(highlight=False), report["kill_switch"]
    console.print(f"{report['stack']} {report['version']} (tested: {', '.join(report['tested'])})", soft_wrap=True)
    plugins, switch = report["plugins"], report["switch"]
    said = [f"{p['name']}{'' if p['loaded'] else ' (not loaded)'}" for p in plugins]
    console.print(f"plugin: {', '.join(said) or f'[yellow]none found: {_lacking(report)}[/]'}", soft_wrap=True)
    if plugins and (given := plugins[0]["value"]) is not None:
        console.print(f"{plugins[0]['variable']}: {escape(given)}")
    console.print(f"{switch['variable']}: {escape(switch['value'] or 'not set')}", soft_wrap=True)
    console.print(f"{kill['variable']}: {escape(kill['value'] or 'not set')}")
    rows = [("feature", "target", "state")]
    for target in report["targets"]:
        state = f"{target['state']}: {target['reason']}" if target["reason"] else target["state"]
        rows.append((target["feature"], target["label"], state))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for feature, label, state in rows:  # no table of rich's: names that a narrow one folds cannot be searched for
        console.print(f"{feature:{widths[0]}}  {label:{widths[1]}}  {state}", markup=False, soft_wrap=True)
    for warning in report["warnings"]:
        console.print(f"* {escape(warning)}", soft_wrap=True)
    console.print(_how(report), markup=False, soft_wrap=True)


def _lacking(report: dict[str, Any]) -> str:
    """What to do where nothing of ours is loaded."""
    if report["stack"] != Stack.transformers:
        return "install this package"
    return f"no {_PTH} in site-packages (a checkout, or pip's --target), so the variable does nothing; call apply()"


def _how(report: dict[str, Any]) -> str:
    """How what is off is switched on."""
    switch = report["switch"]
    default, *more = switch["settings"]
    where = "of any command" if report["stack"] == Stack.transformers else "of the server"
    text = f"off: {default} in the environment {where} switches on {', '.join(switch['default'])}"
    text = "; ".join((text, *(f"{setting} switches on everything" for setting in more)))
    code = "; so does qwen2vl_kernels.integrations.transformers.apply() in a program"
    return text + code if report["stack"] == Stack.transformers else text
