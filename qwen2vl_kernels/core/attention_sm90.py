"""Attention in CUDA C++ for Hopper (``csrc/cuda/attention_forward.cuh``): its configurations, which calls it can serve,
and how they are launched. The forward alone: the backward is Triton's, from the same statistics.

Two configurations serve a width of heads, one segments of few keys and one those of many. Which of them a segment gets
depends on its own number of keys and on nothing else: another number of keys a step is another order of sums, and a
segment has the same bits in every pack. So a call is one launch where all segments are known to be on one side, and two
where they may be on both, each of which takes its own part of the tiles.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from . import launching, native
from .attention_calls import at_16_bytes, device_of
from .attention_peers import HALVES, Call
from .launching import Launch, collected
from .tile_plan import Side, TilePlan


@dataclass(frozen=True)
class Sm90Config:
    consumers: int  # warpgroups that multiply, of 64 queries each
    keys: int  # that they take at a time
    share: int = 0  # eighths of the exponentials that are polynomials on the units that multiply and add
    p_shared: bool = False  # whether the softmax's weights reach the second product through shared memory
    block: int = 0  # columns of a tile's blocks in shared memory, 16, 32 or 64; 0: as the head's width has it
    across: int = 0  # columns of the second product; 0: the head's, rounded up to 16

    @property
    def rows(self) -> int:
        """Queries of a tile."""
        return 64 * self.consumers


#: By width of the heads: the most keys of a short segment, and what short and long ones take. By the registers that
#: ptxas gave them and a count of cycles; not yet timed on any GPU.
_CONFIGS: dict[int, tuple[int, Sm90Config, Sm90Config]] = {
    64: (512, Sm90Config(2, 128), Sm90Config(3, 128)),
    72: (512, Sm90Config(2, 128), Sm90Config(3, 96)),
    80: (512, Sm90Config(2, 128), Sm90Config(3, 96)),
    96: (512, Sm90Config(2, 128), Sm90Config(3, 96)),
    128: (512, Sm90Config(2, 128), Sm90Config(2, 128)),
}

#: What the tuner tries besides, as (consumers, keys, p_shared), each with both of the shares below: what fits the 240
#: registers that each thread of two consumers has, or the 160 of three. Output and scores take half a register a column
#: and a key, the weights a quarter a key where they stay in registers, everything else some 24.
_TRIED: dict[int, tuple[tuple[int, int, bool], ...]] = {
    64: ((2, 128, False), (2, 176, False), (3, 96, False), (3, 128, False)),
    72: ((2, 128, False), (2, 176, False), (3, 96, False), (3, 112, False), (3, 144, True)),
    80: ((2, 128, False), (2, 176, False), (3, 96, False), (3, 112, False), (3, 144, True)),
    96: ((2, 128, False), (2, 176, False), (3, 80, False), (3, 96, False), (3, 128, True)),
    128: ((2, 96, False), (2, 128, False), (2, 144, False), (2, 160, False), (3, 64, False), (3, 80, False)),
}
_SHARES = (0, 1)

#: And layouts that nothing but a GPU can show to be right, as no layout of CuTe's ends inside a block: blocks of more
#: columns are fewer and longer requests to global memory, and a second product of 72 columns is 8 fewer.
_UNPROVEN: dict[int, tuple[Sm90Config, ...]] = {
    72: (
        Sm90Config(2, 128, block=64, across=72),
        Sm90Config(3, 96, block=64, across=72),
        Sm90Config(3, 96, block=16, across=72),
    ),
    80: (Sm90Config(2, 128, block=64), Sm90Config(3, 96, block=64), Sm90Config(3, 96, block=32)),
}

#: The widths of heads that there are kernels for.
COLUMNS = tuple(_CONFIGS)

#: Bounds of a launch's keys where there are none: segments of any number, also of 0.
_FEWEST, _MOST = -1, 2**31 - 1


@dataclass(frozen=True)
class Kernel:
    """One instantiation of the kernel's template."""

    columns: int
    dtype: torch.dtype
    causal: bool
    config: Sm90Config

    @property
    def block(self) -> int:
        """Columns of a block of q, k and v in shared memory, whose rows are as long as its swizzle."""
        fitting = [block for block in (64, 32) if self.columns % block == 0]
        return self.config.block or (*fitting, 16)[0]

    @property
    def across(self) -> int:
        """Columns of the second product: 72 as 80 with zeros behind, until a GPU has shown that 72 is right."""
        return self.config.across or -(-self.columns // 16) * 16

    @property
    def key(self) -> tuple[int, int, bool, int, int, int, bool, int, int]:
        """As the extension tells kernels apart: head_dim, 1 for float16, causal, and the configuration."""
        config = self.config
        numbers = config.consumers, config.keys, config.share, config.p_shared, self.block, self.across
        return self.columns, int(self.dtype == torch.float16), self.causal, *numbers

    @property
    def label(self) -> str:
        """As its file and tables are named, e.g. ``80-bf16-full-3x96-0-registers``; a layout of its own follows."""
        config, element = self.config, "fp16" if self.dtype == torch.float16 else "bf16"
        mask, weights = "causal" if self.causal else "full", "shared" if config.p_shared else "registers"
        layout = f"-{self.block}-{self.across}" if config.block or config.across else ""
        return f"{self.columns}-{element}-{mask}-{config.consumers}x{config.keys}-{config.share}-{weights}{layout}"


def configs(columns: int) -> tuple[int, Sm90Config, Sm90Config]:
    """``(most keys of a short segment, configuration of short ones, of long ones)`` for heads of so many columns."""
    return _CONFIGS[columns]


def tried(columns: int) -> tuple[Sm90Config, ...]:
    """What the tuner tries for heads of so many columns, what ships among them."""
    found = (Sm90Config(consumers, keys, share, p) for (consumers, keys, p), share in product(_TRIED[columns], _SHARES))
    return tuple(dict.fromkeys((*configs(columns)[1:], *found, *_UNPROVEN.get(columns, ()))))


def kernels() -> tuple[Kernel, ...]:
    """What :func:`configs` may choose for any call, which is what the extension is built with."""
    found = (
        Kernel(columns, dtype, causal, config)
        for columns in COLUMNS
        for dtype in HALVES
        for causal in (False, True)
        for config in configs(columns)[1:]
    )
    return tuple(dict.fromkeys(found))


def reason(call: Call) -> str | None:
    """Why the kernel does not serve ``call``, or ``None``."""
    if (missing := native.sm90_reason()) is not None:
        return missing
    if call.capability != 90:
        have = f"has {call.capability / 10}" if call.capability else "is not NVIDIA's"
        return f"it is made of capability 9.0's own instructions, this GPU {have}"
    if call.dtype not in HALVES:
        return f"it takes bfloat16 and float16, got {call.dtype}"
    if call.columns != call.value_columns or call.columns not in COLUMNS:
        known = ", ".join(map(str, COLUMNS))
        return f"it takes one head_dim, one of {known}, got {call.columns} and {call.value_columns}"
    if not call.aligned:
        return "Hopper copies tiles by multiples of 16 bytes: strides of rows and heads must be multiples of 8 elements"
    if not call.mapped:
        return "Hopper copies tiles of up to 2^31 rows, with strides that are not 0 as those of expanded tensors are"
    if call.gradients and (missing := launching.reason(call.device_type)) is not None:
        return f"its backward is Triton's: {missing}"
    return None


def launches(columns: int, keys: Side, longest: int) -> list[tuple[Sm90Config, int, int]]:
    """``(configuration, least, most)`` of each launch, which takes the segments of ``least < keys <= most``.

    longest: a bound of their lengths that the caller gives. One launch takes all tiles, also those of a segment that is
    longer than was promised. Two take one part of them each, long segments first.
    """
    limit, short, long = configs(columns)
    shortest, most = keys.span() or (0, min(longest, keys.total))
    if most <= limit or short == long:
        return [(short, _FEWEST, _MOST)]
    if shortest > limit:
        return [(long, _FEWEST, _MOST)]
    return [(long, limit, _MOST), (short, _FEWEST, limit)]


def launch_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: TilePlan,
    longest: int,
    causal: bool,
    softmax_scale: float,
    keep: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(out (T, Hq, D), lse)``; lse is ``(Hq, T)`` in powers of two, empty unless ``keep``.

    Rows behind the queries' last segment are not written. longest: a bound of the lengths of the keys' segments.
    """
    total, heads, columns = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((heads, total) if keep else (0,), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    q, k, v = at_16_bytes(q, k, v)
    for config, least, most in launches(columns, plan.keys, longest):
        launch(
            Kernel(columns, q.dtype, causal, config),
            q.device,
            q=q,
            k=k,
            v=v,
            out=out,
            lse=lse if keep else None,
            tiles=plan.tiles(config.rows),
            least=least,
            most=most,
            scale=softmax_scale * math.log2(math.e),
        )
    return out, lse


def launch(kernel: Kernel, device: torch.device, **arguments: Any) -> None:
    """Run ``kernel`` on ``device``'s current stream; nothing runs where there are no tiles.

    Arguments go by name: tensors q, k, v, out, lse (or ``None``) and tiles; least and most, between which the launch
    takes segments by their keys; scale, of the scores in powers of two. Raises ``RuntimeError`` where CUDA refuses.
    """
    q, k, out, lse, tiles = (arguments[name] for name in ("q", "k", "out", "lse", "tiles"))
    if tiles.shape[0] == 0 or collected(Launch(kernel, (), arguments, {})):
        return
    columns, element, causal, *config = kernel.key
    with device_of(q):
        native.cuda().attention_forward(
            *((x.data_ptr(), x.stride(0), x.stride(1), x.shape[0]) for x in (q, k, arguments["v"])),
            out.data_ptr(),
            0 if lse is None else lse.data_ptr(),
            (tiles.data_ptr(), *tiles.shape),
            (q.shape[1], k.shape[1], columns, element, int(causal)),
            tuple(config),
            (arguments["least"], arguments["most"]),
            arguments["scale"],
            device.index,
            torch.cuda.current_stream(device).cuda_stream,
        )
