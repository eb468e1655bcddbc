"""Attention for Hopper on the host: a case of packed tensors to host/attention_forward.cpp and back."""

from __future__ import annotations

import math
import os
import subprocess
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from qwen2vl_kernels.core.tile_plan import plan_tiles
from tests.kernels.on_host import SANITIZERS, build_on_host

NO_BOUND = 2**31 - 1


@dataclass(frozen=True)
class Shape:
    """A configuration of the kernel, as csrc/cuda/attention_shape.h has it."""

    head: int = 80
    consumers: int = 3
    keys: int = 96
    share: int = 0
    p_shared: bool = False
    columns: int = 0  # of a block, and of the second product; 0: what the head has by default
    across: int = 0

    @property
    def numbers(self) -> str:
        """As arguments of the template."""
        numbers = [self.head, self.consumers, self.keys, self.share, int(self.p_shared)]
        return ",".join(map(str, [*numbers, self.columns, self.across] if self.columns else numbers))

    def program(self, sanitized: bool = True) -> Path:
        flags = SANITIZERS if sanitized else ()
        return build_on_host("attention_forward", *flags, f"-DQWEN2VL_CONFIG={self.numbers}")


@dataclass(frozen=True)
class Case:
    """Packed q, k, v with any strides, and what the kernel is told of them."""

    q: torch.Tensor  # (T, Hq, D) views of buffers that end where the last row does
    k: torch.Tensor
    v: torch.Tensor
    cu_seqlens: list[int]
    cu_seqlens_k: list[int] | None = None
    causal: bool = False
    scale: float | None = None
    bounds: tuple[int, int] = (-1, NO_BOUND)
    blocks: int = 3
    padded: bool = False

    @property
    def softmax_scale(self) -> float:
        return self.q.shape[2] ** -0.5 if self.scale is None else self.scale

    def boundaries(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        own = torch.tensor(self.cu_seqlens, dtype=torch.int32)
        return own, None if self.cu_seqlens_k is None else torch.tensor(self.cu_seqlens_k, dtype=torch.int32)

    def tiles(self, rows: int) -> torch.Tensor:
        own, keys = self.boundaries()
        total_k = None if keys is None else self.k.shape[0]
        plan = plan_tiles(own, self.q.shape[0], cu_seqlens_k=keys, total_k=total_k, padded=self.padded)
        return plan.tiles(rows)


def run_case(shape: Shape, case: Case, time: str = "0", sanitized: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """``(out (T, Hq, D), lse (Hq, T) in powers of two)``; what the kernel leaves as it was holds NaN."""
    made, result = run_program(shape.program(sanitized), shape, case, time)
    assert result.returncode == 0, f"{result.returncode}: {result.stdout[-2000:]}{result.stderr[-4000:]}"
    rows, heads, width = case.q.shape
    bits = torch.frombuffer(bytearray(made[: 2 * case.q.numel()]), dtype=torch.int16)
    lse = torch.frombuffer(bytearray(made[2 * case.q.numel() :]), dtype=torch.float32)
    return bits.view(case.q.dtype).view(rows, heads, width), lse.view(heads, rows)


def run_program(
    program: Path, shape: Shape, case: Case, time: str = "0", told: str = ""
) -> tuple[bytes, subprocess.CompletedProcess[str]]:
    """What the program wrote, if it got so far, and how it ended; ``time`` and what the emulation is
    ``told`` are in host/fibers.h."""
    tiles = case.tiles(64 * shape.consumers)
    tensors = case.q, case.k, case.v
    header = [case.q.dtype == torch.float16, case.causal, case.q.shape[1], case.k.shape[1], len(case.q), len(case.k)]
    header += [stride for x in tensors for stride in x.stride()[:2]]
    buffers = [_buffer(x) for x in tensors]
    header += [len(buffer) for buffer in buffers]
    header += [*tiles.shape, *case.bounds, case.blocks]
    scale = case.softmax_scale * math.log2(math.e)
    with tempfile.TemporaryDirectory() as folder:
        given, made = Path(folder, "in"), Path(folder, "out")
        parts = [np.array(header, np.int64), np.array([scale]), tiles.numpy(), *buffers]
        given.write_bytes(b"".join(part.tobytes() for part in parts))
        command = [str(program), str(given), str(made), time]
        environment = {**os.environ, "QWEN2VL_ON_HOST": told}
        result = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
        return made.read_bytes() if made.is_file() else b"", result


def _buffer(x: torch.Tensor) -> np.ndarray:
    """From the tensor's first number to its last and not one more, so that a load behind it is seen."""
    assert x.stride(2) == 1 and x.element_size() == 2
    if x.numel() == 0:
        return np.zeros(0, np.uint16)
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    flat = torch.as_strided(x.detach(), (last + 1,), (1,), x.storage_offset())
    return flat.contiguous().view(torch.int16).numpy().view(np.uint16)


def alone(case: Case, segment: int) -> Case:
    """The same segment in a pack of its own."""
    begin, end = case.cu_seqlens[segment], case.cu_seqlens[segment + 1]
    rows = slice(begin, end)
    return replace(case, q=case.q[rows], k=case.k[rows], v=case.v[rows], cu_seqlens=[0, end - begin], blocks=1)
