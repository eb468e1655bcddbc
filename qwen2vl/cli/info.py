"""``qwen2vl info``: versions, what is supported, what serves each operation here, and why nothing better does; or what
a checkpoint is."""

from __future__ import annotations

import json
import os
import platform
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..supported import SUPPORTED
from .common import installed_version
from .stack import Stack
from .stack import collect as collect_stack
from .stack import show as show_stack

_PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "flash-attn",
    "flash-attn-4",
    "fa3-fwd",
    "av",
    "tokenizers",
    "safetensors",
    "pillow",
    "pillow-heif",
    "numpy",
    "matplotlib",
)


#: What is said of every operation: what runs, why nothing better does, the result that says so, and why it runs.
_CHOSEN = ("op", "backend", "not_taken", "measured", "why")

#: Calls of varlen_attention, in words: no gradients and no causal mask where they do not say so.
_CALLS = {
    "inference": "to 1023 rows",
    "long": "1024 rows on",
    "training": "gradients",
    "prefill": "causal, grouped heads",
}


def info(
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", metavar="FOLDER|ID", help="Instead: what this checkpoint is, by its config."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    stack: Annotated[
        Stack | None,
        typer.Option(help="Instead: which functions of this stack these kernels replace here, and why not others."),
    ] = None,
) -> None:
    """Versions, extensions, what is supported, the backend of every operation, GPU and threads."""
    if model is not None and stack is not None:
        raise typer.BadParameter("is one thing to be told of, --stack another", param_hint="--model")
    if model is not None:
        facts, show = describe(model), _print_model
    else:
        facts, show = (collect(), _print) if stack is None else (collect_stack(stack), show_stack)
    if as_json:
        print(json.dumps(facts, ensure_ascii=False))
    else:
        show(facts)


def describe(model: str) -> dict[str, Any]:
    """What ``--model`` prints as JSON; no weights are read."""
    from ..hub import Checkpoint
    from ..model import Qwen2VL

    config = Checkpoint.find(model, with_weights=False).config
    text, how = config.text, config.quantization
    moe = text.moe
    return {
        "model": model,
        "parameters": sum(p.numel() for p in Qwen2VL.from_config(config, device="meta").parameters()),
        "layers": text.num_hidden_layers,
        "hidden_size": text.hidden_size,
        "vocabulary": text.vocab_size,
        "experts": moe and {"routed": moe.num_experts, "of_a_token": moe.num_experts_per_tok,
                            "shared": bool(moe.shared_expert_intermediate_size)},
        "dtype": config.torch_dtype,
        "quantization": how and how.label,
    }  # fmt: skip


def _print_model(facts: dict[str, Any]) -> None:
    table = _table("", "")
    words = {"experts": _experts(facts["experts"]), "quantization": facts["quantization"] or "none"}
    for name, value in (facts | words).items():
        table.add_row(name, f"{value:,}" if isinstance(value, int) else escape(str(value)))
    Console(highlight=False).print(table)


def _experts(moe: dict[str, Any] | None) -> str:
    if moe is None:
        return "none"
    return f"{moe['routed']} in a layer, {moe['of_a_token']} for a token{', and a shared one' if moe['shared'] else ''}"


def collect() -> dict[str, Any]:
    """What ``--json`` prints."""
    import torch

    from qwen2vl_kernels.core import attention_choice, backends, native

    tables = {device: backends.table(device) for device in ("cpu", "cuda")}
    names = sorted({b for row in backends.PREFERENCE.values() for choices in row.values() for b in choices})
    gpus = [torch.cuda.get_device_properties(n) for n in range(torch.cuda.device_count())]
    return {
        "versions": {
            "python": platform.python_version(),
            "qwen2vl": installed_version("qwen2vl"),
            **{name: installed_version(name) for name in _PACKAGES},
        },
        "platform": f"{platform.system()} {platform.machine()}",
        "extensions": {
            "native": _extension(native.cpu_reason()),
            "cuda": _extension(native.cuda_reason()),
            "sm90": _extension(native.sm90_reason()),
        },
        "build": native.build_info(),
        "backends": {device: [dict(zip(_CHOSEN, row, strict=True)) for row in rows] for device, rows in tables.items()},
        "attention": {device: attention_choice.choices(device) for device in ("cpu", "cuda")},
        "unavailable": {name: reason for name in names if (reason := backends.unavailable(name, "cuda")) is not None},
        "gpus": [
            {"name": gpu.name, "capability": f"{gpu.major}.{gpu.minor}", "memory": gpu.total_memory} for gpu in gpus
        ],
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "threads": {"torch": torch.get_num_threads(), "cpus": os.cpu_count()},
        "supported": [row._asdict() for row in SUPPORTED],
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

    console.print("\n[bold]What is supported[/]")
    table = _table("", "")
    for row in facts["supported"]:
        table.add_row(row["what"], row["forms"])
    console.print(table)

    for device in _devices(facts):
        console.print(f"\n[bold]Backend of every operation[/] on {device}")
        table, notes = _table("operation", "backend", "", header=True), _Notes()
        for row in facts["backends"][device]:
            table.add_row(row["op"], _choice(row), notes.of(row))
        notes.show(console, table)
        console.print(f"\n[bold]varlen_attention[/] on {device}, by rows of the longest segment")
        table, notes = _table("call", "dtype", "head_dim", "backend", header=True), _Notes()
        for (kind, dtype, served), head_dims in _grouped(facts["attention"][device], notes).items():
            table.add_row(_CALLS[kind], dtype, ", ".join(map(str, head_dims)), served)
        notes.show(console, table)
    for name, reason in facts["unavailable"].items():
        console.print(f"* no {name}: {escape(reason)}", soft_wrap=True)


def _devices(facts: dict[str, Any]) -> list[str]:
    """The kinds of devices that this machine has: a GPU, if there is one, before the CPU."""
    return ["cuda", "cpu"] if facts["gpus"] else ["cpu"]


class _Notes:
    """Where a choice was measured and why it is one, numbered below the table that refers to it."""

    def __init__(self) -> None:
        self.texts: dict[str, int] = {}

    def of(self, row: dict[str, Any]) -> str:
        measured = f"measured in benchmarks/results/{row['measured']}" if row["measured"] else "not measured"
        number = self.texts.setdefault(f"{measured}: {row['why']}", len(self.texts) + 1)
        return f"({number})"

    def show(self, console: Console, table: Table) -> None:
        console.print(table)
        for text, number in self.texts.items():
            console.print(f"({number}) {escape(text)}", soft_wrap=True)


def _grouped(attention: list[dict[str, Any]], notes: _Notes) -> dict[tuple[str, str, str], list[int]]:
    """The head_dims that are served alike, by the kind of call, the dtype, and what serves them, with its note."""
    groups: dict[tuple[str, str, str], list[int]] = {}
    for kind in _CALLS:
        for row in attention:
            served = f"{row[kind]['backend']} {notes.of(row[kind])}"
            groups.setdefault((kind, row["dtype"], served), []).append(row["head_dim"])
    return groups


def _choice(row: dict[str, Any]) -> str:
    """The backend taken, starred where a preferred one is missing; the reasons stand below the table."""
    return f"{row['backend']} *" if row["not_taken"] else row["backend"]


def _table(*columns: str, header: bool = False) -> Table:
    table = Table(*columns, show_header=header, box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.columns[0].style = "cyan"
    table.columns[0].no_wrap = True
    return table
