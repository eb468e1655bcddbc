"""Loading the 2B checkpoint from safetensors, each time in a fresh process, the page cache warm.

Both sides may map the file instead of reading it, so loading alone can be almost free; the time until every weight
was read once is what a first forward will have paid.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from qwen2vl import Qwen2VLConfig

from .. import providers
from ..case import Case, Check, Context, Provider, Workload
from ..random_checkpoint import small_config
from ._qwen2vl import checkpoint
from ._worker import in_subprocess

UNITS = {"import": "s", "load": "s", "load and read every weight": "s", "peak memory": "B"}


def workloads(context: Context) -> Iterator[Workload]:
    name, config = ("small", small_config()) if context.quick else ("2b", Qwen2VLConfig.preset("2b"))
    folder = checkpoint(context, name, config)
    reason = providers.why_not("transformers")
    yield Workload(
        name=f"{name}, bf16",
        providers=[
            _provider("ours", folder, context),
            _provider("transformers", folder, context)
            if reason is None
            else Provider("transformers", skipped=reason, peer=True),
        ],
        gate=_gate,
        units=UNITS,
        min_rounds=5,
        max_rounds=5,
    )


def _provider(who: str, folder: Any, context: Context) -> Provider:
    call = partial(in_subprocess, "load", who, folder=folder, device=context.device)
    return Provider(who, call, peer=who != "ours")


def _gate(outputs: Mapping[str, Mapping[str, float]]) -> list[Check]:
    """All load the same bits. The same calls leave the file in the page cache."""
    want = outputs["ours"]["checksum"]
    return [Check(f"{name} weights", abs(got["checksum"] - want), 0, name) for name, got in outputs.items()]


CASE = Case("load", "Loading a checkpoint from safetensors in a fresh process", workloads, limit_s=300.0)
