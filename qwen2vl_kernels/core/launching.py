"""Triton for every op: its guarded import, where its kernels can run, how they are launched, and how launches are
recorded, so that exactly what a call would run can be compiled without a GPU.

Triton is optional. Where it is missing, ``jit`` leaves a function as it is and ``tl`` is a name that only has to be
there; :func:`reason` then says why no kernel can run. An op file imports both from here:

    from ..core.launching import cdiv, jit, launch, tl
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
    from triton import knobs

    _missing = None
    #: Whether kernels run in Triton's interpreter, on tensors of any device: read when they are decorated, so once.
    INTERPRETED = bool(knobs.runtime.interpret)
except ImportError as error:
    tl: Any = SimpleNamespace(constexpr=lambda value: value)

    _missing = f"Triton cannot be imported: {error}"
    INTERPRETED = False


try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # no Triton, or one without NVIDIA's part, where no target is ``dependent``
    gdc_launch_dependents = gdc_wait = None


def jit(function: Callable | None = None, **options: Any) -> Any:
    """``triton.jit``, with or without options."""
    if _missing is not None:
        return function if function is not None else lambda undecorated: undecorated
    return triton.jit(function, **options)


def reason(device_type: str) -> str | None:
    """Why Triton kernels cannot run on tensors of ``device_type``, or ``None`` when they can."""
    if _missing is not None:
        return _missing
    if device_type == "cpu" and not INTERPRETED:
        return "on CPU tensors Triton only interprets; set TRITON_INTERPRET=1 before Python starts (slow, for tests)"
    return None


def cdiv(a: int, b: int) -> int:
    """``ceil(a / b)``."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least ``n >= 1``."""
    return 1 << (n - 1).bit_length()


@dataclass(frozen=True)
class Target:
    """What a launch configuration is chosen for."""

    backend: str  # "cuda" or "hip"
    capability: int  # 80, 86, 90, 100, 120, ... on NVIDIA's cards, 0 on others

    @property
    def dependent(self) -> bool:
        """Whether kernels can be launched while the one before them ends (programmatic dependent launch)."""
        return self.backend == "cuda" and self.capability >= 90 and not INTERPRETED

    def warps(self, threads: int) -> int:
        """``num_warps`` of a program of about ``threads`` threads: AMD's warps have 64."""
        return max(1, threads // (32 if self.backend == "cuda" else 64))


def architecture(target: Target, known: Collection[int]) -> int:
    """The entry of a table of configurations that serves ``target``: the newest that is not newer, 0 for AMD's."""
    if target.backend != "cuda":
        return 0
    older = [capability for capability in known if 0 < capability <= target.capability]
    return max(older, default=min(capability for capability in known if capability))


@dataclass(frozen=True)
class Launch:
    """One launch as it was asked for: arguments of the kernel and options of the compiler, both by name."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, int | bool]


_recording: tuple[Target, list[Launch]] | None = None


@contextmanager
def record(target: Target) -> Iterator[list[Launch]]:
    """Inside the block, launches are collected instead of run, configured for ``target``.

    Call the ops' launchers with tensors on the "meta" device. What is collected can be compiled ahead of time.
    """
    global _recording
    assert _recording is None
    _recording = (target, [])
    try:
        yield _recording[1]
    finally:
        _recording = None


def collected(launch: Launch) -> bool:
    """Whether launches are recorded now, this one among them, so that it is not to run."""
    if _recording is not None:
        _recording[1].append(launch)
    return _recording is not None


def target_of(device: torch.device) -> Target:
    """The target that ``device`` is; for the interpreter, a Hopper card's."""
    if _recording is not None:
        return _recording[0]
    return _target(device.index) if device.type == "cuda" else Target("cuda", 90)


@cache
def _target(index: int | None) -> Target:
    if torch.version.hip is not None:
        return Target("hip", 0)
    major, minor = torch.cuda.get_device_capability(index)
    return Target("cuda", 10 * major + minor)


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    device: torch.device,
    *,
    num_warps: int,
    num_stages: int = 1,
    max_registers: int | None = None,
    **arguments: Any,
) -> None:
    """Run ``kernel`` with ``arguments`` on ``device``'s current stream; nothing runs when a dimension of ``grid`` is 0.

    All arguments of the kernel go by name: its tensors, their strides (:func:`strides`), numbers and constexprs.
    ``max_registers`` of a thread, on NVIDIA's cards: named, it is what the program may take, where ptxas would rather
    spill some and have more programs at a time.
    With a constexpr ``DEPENDENT`` that is true, on targets that are, it starts while the kernel ahead of it in the
    stream ends; every program of it must call ``gdc_wait`` before it reads or writes memory that others write.
    """
    if 0 in grid:
        return
    # Contraction to FMA is said, not left to the version's default, which changes in Triton 3.10.
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    if arguments.get("DEPENDENT"):
        options["launch_pdl"] = True
    if max_registers is not None and not INTERPRETED and target_of(device).backend == "cuda":
        options["maxnreg"] = max_registers
    if collected(Launch(kernel, grid, arguments, options)):
        return
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):  # Triton launches on the current device, wherever the pointers lie
            kernel[grid](**arguments, **options)
    else:
        kernel[grid](**arguments, **options)


def strides(axes: tuple[str, ...], /, **tensors: torch.Tensor | None) -> dict[str, int]:
    """The first strides of tensors by the names that kernels give them, zeros for a tensor that is not there.

    ``strides(("row", "head"), q=q, k=None)`` is ``{"q_row": ..., "q_head": ..., "k_row": 0, "k_head": 0}``.
    """
    return {
        f"{name}_{axis}": 0 if tensor is None else tensor.stride(place)
        for name, tensor in tensors.items()
        for place, axis in enumerate(axes)
    }


def like(*tensors: torch.Tensor, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, ...]:
    """Contiguous tensors of these shapes without values, for results that a kernel writes whole."""
    return tuple(torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device) for x in tensors)


def accumulator(dtype: torch.dtype) -> Any:
    """The type that kernels compute in: float32; float64 for float64 inputs, which gradient checks use."""
    return tl.float64 if dtype == torch.float64 else tl.float32
