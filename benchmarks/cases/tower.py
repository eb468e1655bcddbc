"""The whole vision tower on a pack of mixed images: ours, transformers' as it is, and transformers' on these kernels.

The patched tower is a second instance of the same checkpoint, after ``integrations.transformers.apply(model)``. Beside
the time of a forward there is what it is made of (``_trace``): seconds, launches and traffic by part, from one forward
under the profiler, whose own cost is in those seconds.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import cast

import torch

from qwen2vl import Qwen2VLConfig
from qwen2vl_kernels import use_backend
from qwen2vl_kernels.core.matmul import slow_on_cpu

from .. import providers
from ..case import Case, Check, Context, Provider, Workload, relative_error, two_times
from ..random_checkpoint import small_config
from ._ops import MODELING
from ._qwen2vl import (
    Ours,
    Transformers,
    by_graph,
    checkpoint,
    graph_check,
    unallocated,
    vision_flops,
    weight_bytes,
    wide_config,
)
from ._trace import LAYER, PARTS, Trace, trace

FLOAT = torch.float32

Grids = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Size:
    """Layers of the 2B's tower, and its images' patches, height x width."""

    depth: int
    grids: Grids

    @property
    def patches(self) -> int:
        return sum(h * w for h, w in self.grids)


#: Photos of 640x480, 512x384, 336x336 and 224x224. No multiple of 8 rows, as three packs of four mixed images in ten.
PHOTOS = Size(32, ((34, 46), (28, 36), (24, 24), (16, 16)))
#: 16k patches as servers pack them.
SERVED = Size(32, ((72, 96), (52, 94), *PHOTOS.grids, (34, 36)))
#: For a CPU that multiplies bf16 element by element, where PHOTOS would take an hour.
FEW = Size(2, ((18, 22), (16, 16), (8, 14)))
QUICK = Size(2, ((16, 18), (2, 6)))
GATE: Grids = ((18, 18), (6, 10), (2, 2))

PATCHED, STOCK, FLASH = "transformers, patched", "transformers", "transformers, flash_attention_2"


def size(context: Context) -> Size:
    if context.quick:
        return QUICK
    if context.device.type == "cuda":
        return SERVED
    return FEW if slow_on_cpu(torch.bfloat16) else PHOTOS


def tower_config(depth: int) -> Qwen2VLConfig:
    """The 2B's tower before one layer of its decoder."""
    return replace(wide_config(1), vision=replace(Qwen2VLConfig.preset("2b").vision, depth=depth))


def patched(*given: object) -> Transformers:
    """transformers' model with these kernels in its own modules, and in nobody else's."""
    from qwen2vl_kernels.integrations import transformers as kernels

    made = Transformers(*given)  # type: ignore[arg-type]
    kernels.apply(made.model.model)
    return made


def gate(context: Context) -> list[Check]:
    """Two layers: float32 against transformers' (without it, our eager) float32, and bf16 by the two-times rule."""
    device, contenders = context.device, {"ours": Ours, PATCHED: patched}
    rows, grid = pack(GATE, device)

    def run(make: Callable[..., Ours | Transformers], folder: Path, dtype: torch.dtype) -> torch.Tensor:
        return make(folder, device, dtype).vision(rows, grid).float()

    def formula(folder: Path, dtype: torch.dtype) -> torch.Tensor:
        if STOCK not in absent:
            try:
                return run(Transformers, folder, dtype)
            except Exception as error:
                if "CUDA error" in str(error):
                    raise
                traceback.print_exc()
                absent[STOCK] = str(error)
        with use_backend("eager"):
            return run(Ours, folder, dtype)

    absent = _absent()
    # Weights of 0.1: at 0.02 a small model passes its input through and a wrong layer would hardly show.
    small = checkpoint(context, "small-gate", small_config(), torch.float32, 0.1)
    wide = small if context.quick else checkpoint(context, "2b-tower-2", tower_config(2))
    want, exact, low = (formula(f, t) for f, t in ((small, FLOAT), (wide, FLOAT), (wide, torch.bfloat16)))
    if STOCK in absent:
        contenders.pop(PATCHED)
    checks = [
        Check(f"float32 {who}", relative_error(run(c, small, FLOAT), want), 1e-5) for who, c in contenders.items()
    ]
    if device.type == "cuda":
        checks.append(graph_check(Ours(wide, device), rows, grid, low, exact))
    return checks + [
        two_times(f"bf16 {who}, 2x the peer's error", run(c, wide, torch.bfloat16), low, exact)
        for who, c in contenders.items()
    ]


def _absent() -> dict[str, str]:
    """Peers that are not here, and why."""
    reason = providers.why_not("transformers")
    found = {} if reason is None else {PATCHED: reason, STOCK: reason}
    if (reason := reason or providers.why_not("flash_attn")) is not None:
        found[FLASH] = reason
    return found


def pack(grids: Grids, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised rows ``(T, 1176)`` of noise and their grids ``(n, 3)``."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(sum(h * w for h, w in grids), 1176, generator=generator)
    return rows.to(device), torch.tensor([[1, h, w] for h, w in grids], device=device)


def workloads(context: Context) -> Iterator[Workload]:
    chosen, device = size(context), context.device
    config = replace(small_config(), vision=replace(small_config().vision, depth=chosen.depth))
    name = f"small-tower-{chosen.depth}" if context.quick else f"2b-tower-{chosen.depth}"
    folder = checkpoint(context, name, config if context.quick else tower_config(chosen.depth))
    absent = _absent()
    towers: dict[str, Callable[..., Ours | Transformers]] = {"ours": Ours}
    if STOCK not in absent:
        towers |= {PATCHED: patched, STOCK: Transformers}
    if device.type == "cuda" and FLASH not in absent:
        towers[FLASH] = partial(Transformers, attention="flash_attention_2")
    skipped = (
        []
        if device.type != "cuda" and STOCK not in absent
        else [Provider(who, skipped=reason, peer=who != PATCHED) for who, reason in absent.items()]
    )
    config = Qwen2VLConfig.from_pretrained(folder)
    rows, grid = pack(chosen.grids, device)
    title = f"{len(chosen.grids)} images, {chosen.patches} patches, {chosen.depth} layers"

    @cache
    def model(who: str) -> Ours | Transformers:
        return towers[who](folder, device)

    def contender(who: str, make: Callable[[str], Callable]) -> Provider:
        peer = who in (STOCK, FLASH)
        return Provider(who, make=lambda: Provider(who, make(who), peer=peer), peer=peer)

    def call(who: str) -> Callable[[], torch.Tensor]:
        return partial(model(who).vision, rows, grid)

    yield Workload(
        f"tower, {title}",
        [*(contender(who, call) for who in towers), by_graph(lambda: cast(Ours, model("ours")), rows, grid), *skipped],
        flops=vision_flops(config.vision, chosen.patches, sum((h * w) ** 2 for h, w in chosen.grids)),
        bytes=weight_bytes(unallocated(config).visual),
        dtype=torch.bfloat16,
        min_rounds=3,
        budget_s=20.0,
    )

    @cache
    def traced(who: str) -> Trace:
        forward = call(who)
        for _ in range(2):  # a first one compiles, and makes buffers and plans
            forward()
        return trace(forward, _visual(model(who)))

    def counted(what: str, unit: str, parts: Sequence[str], values: Callable[[Trace], dict[str, float]]) -> Workload:
        contenders = [contender(who, lambda who: lambda: values(traced(who))) for who in towers]
        units = {part: unit for part in parts}
        return Workload(f"{what}, {title}", contenders, units=units, late=True, min_rounds=1, max_rounds=1)

    depth = chosen.depth
    yield counted("seconds by part", "s", PARTS, lambda t: {part: t.seconds[part] for part in PARTS})
    yield counted(
        "traffic of a layer", "B", ("all", *LAYER),
        lambda t: {"all": t.of_layers(t.bytes) / depth} | {part: t.bytes[part] / depth for part in LAYER},
    )  # fmt: skip
    yield counted(
        "launches of a layer", "launches", ("all", *LAYER),
        lambda t: {"all": t.of_layers(t.launches) / depth} | {part: t.launches[part] / depth for part in LAYER},
    )  # fmt: skip


def _visual(of: Ours | Transformers) -> torch.nn.Module:
    return of.model.visual if isinstance(of, Ours) else of.model.model.visual


CASE = Case(
    "tower",
    "The vision tower on mixed images in bf16, beside transformers' own and patched",
    workloads,
    gate,
    imports=MODELING,
)
