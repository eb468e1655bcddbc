"""Matrix products: in autocast's dtype, of few rows on a CPU, and on one whose instructions take no 16-bit numbers.

A decoder multiplies every weight with one row, or with one of each conversation, so that reading the weights is all the
work there is. The extension's kernel reads them as fast as they can be copied; what PyTorch 2.13 did in the same run on
two cores of a Xeon with AVX-512 and its instructions for bf16, for 8960 x 1536, in GB/s, and how fast a copy reads and
writes (nothing else was sure of the cores):

=======  ====  =====  ======  ====
threads  rows  ours   oneDNN  copy
=======  ====  =====  ======  ====
1        1     12.8   8.6     11.8
2        1     23.2   14.9    23.6
2        8     17.4   9.6     23.6
=======  ====  =====  ======  ====

Beside a busy program, where threads of OpenMP that spin wait for those that cannot run, it was 12.5 against 0.6.

Where oneDNN has no kernels for bf16 (x86 without AVX-512), PyTorch multiplies element by element: on one core of an
AVX2 EPYC, 256 x 1280 times 1280 x 5120 took 580 ms in bf16, and 108 ms in float32 with all conversions.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from . import backends, native

#: The rows that are few: from 16 on, PyTorch's products are as fast.
_FEW_ROWS = 8
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
    """``F.linear`` for inference. On the CPU bf16 products of few rows are the extension's, with sums in float32, and
    the rest is done in float32 and rounded once where products of the dtype are slow.

    With gradients and in compiled code it is ``F.linear`` itself.
    """
    if x.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    if _has_few_rows(x, weight, bias):
        return _few_rows(x, weight, bias)
    if x.shape[:-1].numel() < _LEAST_ROWS or x.dtype != weight.dtype or not slow_on_cpu(x.dtype):
        return F.linear(x, weight, bias)
    return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)


def _has_few_rows(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether the extension's kernel is to serve: plain bf16 tensors that nobody looks at but this call."""
    if x.dtype != torch.bfloat16 or weight.dtype != torch.bfloat16 or native.cpu_reason() is not None:
        return False
    rows = x.shape[:-1].numel()
    if not 0 < rows < (_LEAST_ROWS if slow_on_cpu(torch.bfloat16) else _FEW_ROWS + 1):
        return False
    plain = type(x) is torch.Tensor and type(weight) in _PLAIN and (bias is None or type(bias) in _PLAIN)
    fits = weight.dim() == 2 and x.shape[-1] == weight.shape[1] > 0 and weight.stride(1) == 1
    if bias is not None:
        fits = fits and bias.dtype == torch.bfloat16 and bias.shape == weight.shape[:1] and bias.stride(0) == 1
    if not plain or not fits or backends.forced_everywhere() == "eager":
        return False
    # Autocast may want another dtype; modes and transforms are to see PyTorch's operation.
    watched = torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack()
    transforms = torch._C._functorch.peek_interpreter_stack()  # pyright: ignore[reportAttributeAccessIssue]
    return not (watched or transforms is not None or torch.is_autocast_enabled("cpu"))


_PLAIN = (torch.Tensor, torch.nn.Parameter)


def _few_rows(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    rows = x.reshape(-1, x.shape[-1])
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    y = rows.new_empty(rows.shape[0], weight.shape[0])
    threads = torch.get_num_threads()
    sizes = (*y.shape, x.shape[-1])
    native.cpu().few_rows(
        native.view(rows), native.view(weight), native.view(bias), native.view(y), sizes, (threads, 0)
    )
    return y.view(*x.shape[:-1], weight.shape[0])
