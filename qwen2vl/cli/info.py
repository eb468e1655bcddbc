"""``qwen2vl info``: versions, what serves each operation here, and why nothing better does."""

from __future__ import annotations

import json
import os
import platform
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .common import installed_version
from .stack import Stack
from .stack import collect as collect_stack
from .stack import show as show_stack

_PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "flash-attn",
    "av",
    "tokenizers",
    "safetensors",
    "pillow",
    "numpy",
    "matplotlib",
)

#: What is said of varlen_attention for each dtype and head_dim.
_ATTENTION = ("dtype", "head_dim", "inference", "training", "why")


def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    stack: Annotated[
        Stack | None,
        typer.Option(help="Instead: which functions of this stack these kernels replace here, and why not others."),
    ] = None,
) -> None:
    """Versions, extensions, the backend of every operation, GPU and threads."""
    facts, show = (collect(), _print) if stack is None else (collect_stack(stack), show_stack)
    if as_json:
        print(json.dumps(facts, ensure_ascii=False))
    else:
        show(facts)


def collect() -> dict[str, Any]:
    """What ``--json`` prints."""
    import torch

    from qwen2vl_kernels import _backend, _native
    from qwen2vl_kernels.ops import varlen_attention

    tables = {device: _backend.table(device) for device in ("cpu", "cuda")}
    backends = sorted({b for row in _backend.PREFERENCE.values() for choices in row.values() for b in choices})
    gpus = [torch.cuda.get_device_properties(n) for n in range(torch.cuda.device_count())]
    return {
        "versions": {
            "python": platform.python_version(),
            "qwen2vl": installed_version("qwen2vl"),
            **{name: installed_version(name) for name in _PACKAGES},
        },
        "platform": f"{platform.system()} {platform.machine()}",
        "extensions": {
            "native": _extension(_native.cpu_reason()),
            "cuda": _extension(_native.cuda_reason()),
        },
        "build": _native.build_info(),
        "backends": {
            device: [{"op": op, "backend": backend, "not_taken": missed} for op, backend, missed in rows]
            for device, rows in tables.items()
        },
        "attention": {
            device: [dict(zip(_ATTENTION, row, strict=True)) for row in varlen_attention.choices(device)]
            for device in ("cpu", "cuda")
        },
        "unavailable": {
            name: reason for name in backends if (reason := _backend.unavailable(name, "cuda")) is not None
        },
        "gpus": [
            {"name": gpu.name, "capability": f"{gpu.major}.{gpu.minor}", "memory": gpu.total_memory} for gpu in gpus
        ],
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "threads": {"torch": torch.get_num_threads(), "cpus": os.cpu_count()},
    }


def _extension(reason: str | None) -> dict[str, Any]:
    return {"available": reason is None, "reason": reason}


def _print(facts: dict[str, Any]) -> None:
    console = Console(highlight=False)
    table = _table("", "")
    for name, version in facts["versions"].items():
        table.add_row(name, version or "[dim]not installed[/]")
    table.add_row("platform", facts["platform"])
    threads = facts["threads"]
    table.add_row("threads", f"{threads['torch']} (of {threads['cpus']} CPUs)")
    gpus = [f"{gpu['name']} (capability {gpu['capability']}, {gpu['memory'] / 2**30:.0f} GiB)" for gpu in facts["gpus"]]
    table.add_row("GPU", escape("\n".join(gpus)) or "none")
    for name, extension in facts["extensions"].items():
        state = "[green]available[/]" if extension["available"] else f"[yellow]no[/]: {escape(extension['reason'])}"
        table.add_row(f"{name} extension", state)
    for name, value in facts["build"].items():
        table.add_row(f"built: {name}", escape(value))
    console.print(table)

    console.print("\n[bold]Backend of every operation[/], by the device of its tensors")
    table = _table("operation", "cpu", "cuda", header=True)
    for cpu, cuda in zip(facts["backends"]["cpu"], facts["backends"]["cuda"], strict=True):
        table.add_row(cpu["op"], _choice(cpu), _choice(cuda))
    console.print(table)
    console.print("\n[bold]varlen_attention[/] by dtype and head_dim: without gradients / with them")
    table = _table("dtype", "head_dim", "cpu", "cuda", header=True)
    for (dtype, cpu, cuda), head_dims in _grouped(facts["attention"]).items():
        table.add_row(dtype, ", ".join(map(str, head_dims)), cpu, cuda)
    console.print(table)
    for name, reason in facts["unavailable"].items():
        console.print(f"* no {name}: {escape(reason)}", soft_wrap=True)


def _grouped(attention: dict[str, list[dict[str, Any]]]) -> dict[tuple[str, str, str], list[int]]:
    """The head_dims that are served alike, by dtype and what serves them on a CPU and on a GPU."""
    groups: dict[tuple[str, str, str], list[int]] = {}
    for rows in zip(attention["cpu"], attention["cuda"], strict=True):
        cpu, cuda = (f"{row['inference']} / {row['training']} ({row['why']})" for row in rows)
        groups.setdefault((rows[0]["dtype"], cpu, cuda), []).append(rows[0]["head_dim"])
    return groups


def _choice(row: dict[str, Any]) -> str:
    """The backend taken, starred where a preferred one is missing; the reasons stand below the table."""
    return f"{row['backend']} *" if row["not_taken"] else row["backend"]


def _table(*columns: str, header: bool = False) -> Table:
    table = Table(*columns, show_header=header, box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.columns[0].style = "cyan"
    table.columns[0].no_wrap = True
    return table
