"""Matrix products: in autocast's dtype, and on a CPU whose instructions do not take 16-bit numbers.

Where oneDNN has no kernels for bf16 (x86 without AVX-512), PyTorch multiplies element by element: on one core of an
AVX2 EPYC, 256 x 1280 times 1280 x 5120 took 580 ms in bf16, and 108 ms in float32 with all conversions.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

#: Below it, converting the weight costs more than the product: 16 rows were even, 32 twice as fast.
_LEAST_ROWS = 32


def in_autocast_dtype(*tensors: Any) -> tuple[Any, ...]:
    """The operands of an op that is a matrix product in the dtype that autocast, where it is on, gives such products.

    PyTorch's rule: tensors of floating point on a device for which autocast is on, float64 ones excepted, become of its
    dtype. What is no such tensor (``None``, bytes, what will be refused) is returned as it is.
    """
    first = tensors[0]
    # PyTorch knows no autocast of meta tensors, and raises when it is asked.
    if not isinstance(first, torch.Tensor) or first.is_meta or not torch.is_autocast_enabled(first.device.type):
        return tensors
    dtype = torch.get_autocast_dtype(first.device.type)

    def cast(x: Any) -> Any:
        floats = isinstance(x, torch.Tensor) and x.is_floating_point() and x.dtype != torch.float64
        return x.to(dtype) if floats and x.device.type == first.device.type else x

    return tuple(map(cast, tensors))


@cache
def slow_on_cpu(dtype: torch.dtype) -> bool:
    """Whether matrix products of ``dtype`` are better done in float32 on this machine's CPU."""
    name = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}.get(dtype)
    return name is not None and torch.backends.mkldnn.is_available() and not getattr(torch.ops.mkldnn, name)()


@cache
def cpu_vendor() -> str:
    """What this machine's CPU calls its maker, "AuthenticAMD" say; empty where Linux does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``F.linear`` for inference: in float32, rounded once, where products of the dtype are slow on the CPU.

    With gradients and in compiled code it is ``F.linear`` itself.
    """
    if x.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    if x.shape[:-1].numel() < _LEAST_ROWS or x.dtype != weight.dtype or not slow_on_cpu(x.dtype):
        return F.linear(x, weight, bias)
    return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)
