"""The two figures of README.md, which are kept in ``docs/figures``: a few rows of committed results.

``python -m benchmarks report`` makes them, with all other figures, which are not kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from . import page, plot

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "figures"


@dataclass(frozen=True)
class Kept:
    """``<name>.svg``: the ratios of one ``provider`` to some ``peers``, in some workloads of a result."""

    name: str
    device: str
    case: str
    provider: str
    peers: Mapping[str, str]  # as the result names them -> as the figure does
    workloads: Mapping[str, str]


FIGURES = (
    Kept(
        "attention-h200",
        "nvidia-h200",
        "attention",
        "triton",
        {"torch varlen": "FlashAttention 2", "cuDNN": "cuDNN", "flash-attn 3": "FlashAttention 3"},
        {
            "64 of 256, 16 heads of 80": "64 segments of 256",
            "16 of 1024, 16 heads of 80": "16 segments of 1024",
            "4 of 4096, 16 heads of 80": "4 segments of 4096",
            "1 of 16384, 16 heads of 80": "1 segment of 16384",
            "1 of 16384 and 63 of 256, 16 heads of 80": "1 of 16384 and 63 of 256",
            "64 of 256, 16 heads of 80, backward": "backward, 64 of 256",
            "4 of 4096, 16 heads of 80, backward": "backward, 4 of 4096",
        },
    ),
    Kept(
        "preprocess-cpu",
        "amd-epyc-2-threads",
        "preprocess",
        "uint8",
        {"transformers": "transformers", "torch": "torch", "Pillow, resize alone": "Pillow, resize alone"},
        {
            "448x448": "448×448, not resized",
            "1344x1008": "1344×1008, not resized",
            "3840x2160": "3840×2160",
            "4032x3024 to 1280 tokens": "4032×3024 to 1280 tokens",
            "32 images of 200 to 500 px": "32 images of 200 to 500 px",
        },
    ),
)


def rows(kept: Kept, result: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a result that a figure draws, with its names for workloads and peers."""
    found = {row["workload"]: row for row in result["rows"] if row["provider"] == kept.provider}
    drawn = []
    for workload, shown in kept.workloads.items():
        ratios = found[workload]["ratios"]
        named = {name: ratios[peer] for peer, name in kept.peers.items() if peer in ratios}
        drawn.append(found[workload] | {"workload": shown, "provider": "ours", "ratios": named})
    return drawn


def draw(results: Path, folder: Path = FOLDER) -> list[Path]:
    """Write every figure to ``folder``, of the results in the folder ``results``; returns their paths."""
    found = page.read(results)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for kept in FIGURES:
        result = next(r for r in found[kept.device] if r["case"] == kept.case)
        written.append(folder / f"{kept.name}.svg")
        plot.save(written[-1], partial(plot.ratios, result, rows(kept, result)), page.caption(result))
    return written
