"""Loading of the two compiled extensions, and the reason when one of them is not there.

``_cpu`` (from ``csrc/cpu``) is part of every build; ``_cuda`` (from ``csrc/cuda``) only of builds that found
nvcc. Neither links against PyTorch: they take addresses, sizes and streams, so one build serves every PyTorch
version.
"""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType

import torch

View = tuple[int, int, int, int]


def _load(name: str) -> tuple[ModuleType | None, str | None]:
    full = f"{__name__.removesuffix('.core.native')}.{name}"
    try:
        return importlib.import_module(full), None
    except ModuleNotFoundError as error:
        if error.name != full:
            raise
        return None, f"the extension {full} is not built"
    except ImportError as error:  # built for another Python or C library, say
        return None, f"the extension {full} does not load: {error}"


_cpu, _cpu_reason = _load("_cpu")
_cuda, _cuda_reason = _load("_cuda")


def cpu_reason() -> str | None:
    """Why the CPU extension cannot serve, or ``None`` when it can."""
    return _cpu_reason


def cuda_reason() -> str | None:
    """Why the CUDA extension cannot serve, or ``None`` when it can."""
    if torch.version.hip is not None:
        return "this PyTorch is built for ROCm; the CUDA extension serves NVIDIA GPUs"
    if _cuda is None:
        return f"{_cuda_reason} ({_cpu.build_info()['cuda']})" if _cpu is not None else _cuda_reason
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    return _device_reason(torch.cuda.current_device())


def sm90_reason() -> str | None:
    """Why the CUDA extension has no attention for Hopper (sm_90a) that can serve, or ``None`` when it can."""
    if (reason := cuda_reason()) is not None:
        return reason
    built = build_info()["sm90"]
    if not built.startswith("built"):
        return f"attention for Hopper is not part of the extension ({built})"
    capability = torch.cuda.get_device_capability()
    return None if capability == (9, 0) else f"it runs on capability 9.0, this GPU has {'.'.join(map(str, capability))}"


def _device_reason(device: int) -> str | None:
    """An older driver, or a GPU that the extension was not built for."""
    return _asked(device)


# What torch.compiler.assume_constant_result sets, and imports all of Dynamo for. Dynamo would look into a cached
# function and find the extension's, which it cannot trace.
_device_reason._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


@cache
def _asked(device: int) -> str | None:
    """Once per device."""
    problem = cuda().device_problem(device)
    return problem and f"GPU {device} cannot run the extension, {build_info()['cuda']}: {problem}"


def cpu() -> ModuleType:
    """The CPU extension; call it only where :func:`cpu_reason` is ``None``."""
    assert _cpu is not None, _cpu_reason
    return _cpu


def cuda() -> ModuleType:
    """The CUDA extension; call it only where :func:`cuda_reason` is ``None``."""
    assert _cuda is not None, _cuda_reason
    return _cuda


def build_info() -> dict[str, str]:
    """How the extensions were built: ``version``, ``compiler``, ``cuda`` and ``sm90`` (for what, or why left out)."""
    return dict(_cpu.build_info()) if _cpu is not None else {}


def view(tensor: torch.Tensor | None) -> View:
    """A tensor of at most two dimensions as ``(address, bytes per element, row stride, column stride)``.

    This is how tensors reach the extensions; the strides count elements, and ``None`` is address 0. The
    caller keeps the tensor alive for as long as the extension may read it.
    """
    if tensor is None:
        return (0, 1, 0, 0)
    strides = tensor.stride()
    row, column = strides if len(strides) == 2 else (0, *strides)
    return (tensor.data_ptr(), tensor.element_size(), row, column)
