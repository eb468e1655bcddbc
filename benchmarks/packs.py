"""The packs of segments that attention is measured on, and the work that kernels' tiles make of them.

Work is counted, not measured: multiply-adds that a kernel's tiles execute for every useful one, and programs that its
grid launches for every one that has rows. Both follow from the tile, the width that a head is padded to, and the grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.table import Table

from qwen2vl_kernels.core.launching import Target
from qwen2vl_kernels.triton.attention_forward import forward_config
from qwen2vl_kernels.triton.attention_head import column_blocks


@dataclass(frozen=True)
class Pack:
    """Segment lengths of one call, and its heads."""

    name: str
    lengths: tuple[int, ...]
    heads: int = 16
    kv_heads: int = 16
    columns: int = 80
    causal: bool = False

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key that it sees."""
        return sum(n * (n + 1) // 2 if self.causal else n * n for n in self.lengths)


def windows(height: int, width: int, side: int = 8) -> tuple[int, ...]:
    """Lengths of Qwen2.5-VL's windows of ``side`` x ``side`` patches over a grid, border windows smaller."""
    spans = [[min(side, whole - begin) for begin in range(0, whole, side)] for whole in (height, width)]
    return tuple(h * w for h in spans[0] for w in spans[1])


#: Patches of photos as people send them, height x width: screens, phone photos, thumbnails, a document page.
_PHOTOS = tuple(
    h * w for h, w in ((76, 136), (72, 96), (52, 94), (60, 82), (96, 68), (46, 46), (32, 32), (24, 36), (16, 16))
)


def packs(tokens: int = 65536) -> tuple[Pack, ...]:
    """What the towers and the decoder see, ``tokens`` at most where segments are alike; the most telling first, as time
    on a GPU ends early: a long and a short kind, a decoder's prefill, ragged packs, windows, Qwen3-VL's heads of 72."""
    alike = {
        (n, total): Pack(f"{total // n} of {n}", (n,) * (total // n))
        for n in (256, 1024, 1600, 4096, 16384)
        for total in (16384, 65536)
        if n <= total <= tokens
    }
    first = [alike.pop(key) for key in ((4096, 16384), (1024, 16384), (256, 16384)) if key in alike]
    decoder = {"heads": 28, "kv_heads": 4, "columns": 128, "causal": True}
    return (
        *first,
        Pack("causal 4096+2048+1333+715", (4096, 2048, 1333, 715), **decoder),
        Pack("9 photos", _PHOTOS),
        Pack("9 photos", _PHOTOS, columns=72),
        Pack("windows of 72x72 and 60x82 patches", windows(72, 72) + windows(60, 82)),
        Pack("1 of 16384 and 63 of 256", (16384, *[256] * 63)),
        Pack("causal 8 of 2048", (2048,) * 8, **decoder),
        Pack("4 of 4096", (4096,) * 4, columns=72),
        *alike.values(),
    )


def small_packs() -> tuple[Pack, ...]:
    """For a CPU."""
    return (
        Pack("16 of 256", (256,) * 16),
        Pack("4 of 1024", (1024,) * 4),
        Pack("1 of 4096", (4096,)),
        Pack("1 of 2048 and 8 of 256", (2048, *[256] * 8)),
        Pack("4 photos", _PHOTOS[-4:]),
        Pack("windows of 60x82 patches", windows(60, 82)),
        Pack("causal 1333", (1333,), 28, 4, 128, True),
    )


@dataclass(frozen=True)
class Kernel:
    """How a kernel cuts a pack: queries and keys of a tile, the width that it pads a head to, and its grid."""

    name: str
    rows: int
    step: int
    width: int
    flat: bool  # programs only for tiles that are there, not for every segment's share of the longest

    def executed(self, pack: Pack) -> float:
        """Multiply-adds executed for every useful one."""
        done = 0
        for n in pack.lengths:
            for first in range(0, n, self.rows):
                keys = min(n, first + self.rows) if pack.causal else n
                done += self.rows * math.ceil(keys / self.step) * self.step
        return done * self.width / (pack.pairs * pack.columns)

    def programs(self, pack: Pack) -> tuple[int, int]:
        """Programs of a head: those with rows, and those launched."""
        live = sum(math.ceil(n / self.rows) for n in pack.lengths)
        return live, live if self.flat else math.ceil(max(pack.lengths) / self.rows) * len(pack.lengths)


def kernels(columns: int, longest: int, capability: int = 90) -> tuple[Kernel, ...]:
    """Ours there for segments of up to ``longest`` rows, ours on heads padded to 128, and the peers' by their sources.

    FlashAttention 2.8: 128 x 64 tiles up to head_dim 96, 128 x 32 (causal) or 128 x 64 at 128, a grid by max_seqlen;
    FlashAttention 3: 192 x 144 at 96, 128 x 128 (causal) at 128, a scheduler that skips; vLLM's and SGLang's Triton
    prefill: 128 x 128 tiles, next power of two, a grid by max_seqlen.
    """
    ours = forward_config(torch.bfloat16, columns, longest, Target("cuda", capability))
    wide = forward_config(torch.bfloat16, 128, longest, Target("cuda", capability))
    padded = 96 if columns <= 96 else 128
    three = (192, 144) if padded == 96 else (128, 128)
    return (
        Kernel("ours", ours.block_m, ours.block_n, sum(column_blocks(columns)), True),
        Kernel("ours, padded to 128", wide.block_m, wide.block_n, 128, True),
        Kernel("FlashAttention 2", 128, 64, padded, False),
        Kernel("FlashAttention 3", *three, padded, True),
        Kernel("vLLM's and SGLang's Triton", 128, 128, 128, False),
    )


def table(chosen: Sequence[Pack]) -> Table:
    """One row a pack: executed work for every useful multiply-add, and live of launched programs a head."""
    names = [kernel.name for kernel in kernels(80, 1024)]
    shown = Table(
        "pack", *names, title="Executed to useful work, and live of launched programs a head (capability 9.0)"
    )
    for pack in chosen:
        cells = []
        for kernel in kernels(pack.columns, max(pack.lengths)):
            live, launched = kernel.programs(pack)
            cells.append(f"{kernel.executed(pack):.2f}  {live}/{launched}")
        shown.add_row(pack.name, *cells)
    return shown
