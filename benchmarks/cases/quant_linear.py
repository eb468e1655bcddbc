"""Products with quantised weights beside bf16 ones, at a decoder's shapes: one row, a few, and a prompt's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from qwen2vl.quantising import nearest, stated
from qwen2vl.quantization import Quantization, QuantLinear
from qwen2vl_kernels import quant_linear
from qwen2vl_kernels.core.matmul import linear
from qwen2vl_kernels.core.quant_layout import FP8, dequantize

from ..case import Case, Check, Context, Workload, two_times
from ._ops import DTYPE, made, random

#: (outputs, columns): the 2B's MLP up and down, and the 7B's.
_SHAPES = ((8960, 1536), (1536, 8960), (18944, 3584), (3584, 18944))
_FORMS = ("awq", "gptq-int4", "gptq-int8", "fp8")
_BACKENDS = {"cuda": ("triton",), "cpu": ("native",)}
#: Weights that calls take in turn, so that none finds its own in a cache.
_BYTES = 256 << 20


def workloads(context: Context) -> Iterator[Workload]:
    for outputs, columns in _SHAPES[:1] if context.quick else _SHAPES[:2] if context.device.type == "cpu" else _SHAPES:
        for form in _FORMS:
            for rows in (1, 8) if context.quick else (1, 8, 16, 1024):
                yield _workload(context, form, rows, outputs, columns)


def _workload(context: Context, form: str, rows: int, outputs: int, columns: int) -> Workload:
    device = context.device
    how = Quantization.from_dict(stated(form, 128))

    @cache
    def inputs() -> tuple[torch.Tensor, QuantLinear, torch.Tensor]:
        plain = nn.Linear(columns, outputs, bias=False, device=device, dtype=DTYPE)
        plain.weight.data = random(context, outputs, columns, scale=columns**-0.5)
        with torch.no_grad():
            return random(context, rows, columns, seed=1), nearest(plain, how), plain.weight.detach()

    def bytes_() -> int:
        groups = columns // 128
        return outputs * (columns * (how.bits or 8) // 8 + (2 * groups if how.bits else 4)) + 2 * rows * (
            columns + outputs
        )

    def in_turn(tensors: tuple[torch.Tensor, ...], run: Callable[..., torch.Tensor]) -> Callable[[], torch.Tensor]:
        copies = max(1, _BYTES // sum(tensor.nbytes for tensor in tensors))
        sets = [tuple(tensor.clone() for tensor in tensors) for _ in range(copies)]
        state = {"next": 0}

        def call() -> torch.Tensor:
            state["next"] = (state["next"] + 1) % copies
            with torch.no_grad():
                return run(*sets[state["next"]])

        return call

    def ours(backend: str) -> Callable[[], torch.Tensor]:
        x, layer, _ = inputs()
        weight = layer.weight.detach() if how.bits else layer.weight.detach().view(FP8)
        rest = {"zeros": layer.zeros, "block": layer.block, "backend": backend}
        return in_turn((weight,), lambda w: quant_linear(x, w, layer.scales, **rest))

    def bf16() -> Callable[[], torch.Tensor]:
        x, _, weight = inputs()
        return in_turn((weight,), partial(linear, x))

    def gate(outputs_by: Mapping[str, Any]) -> list[Check]:
        x, layer, _ = inputs()
        weight = layer.weight.detach() if how.bits else layer.weight.detach().view(FP8)
        values = dequantize(weight, layer.scales, layer.zeros, layer.block, torch.float64, columns)
        exact, low = F.linear(x.double(), values), F.linear(x, values.to(DTYPE))
        return [two_times(name, got, low, exact, 1e-6, name) for name, got in outputs_by.items() if name != "bf16"]

    contenders = [made(backend, partial(ours, backend), peer=False) for backend in _BACKENDS[device.type]]
    contenders.append(made("bf16", bf16))
    series = f"quant_linear {form} {outputs}x{columns}"
    return Workload(
        f"{series}, {rows} rows",
        contenders,
        gate=gate,
        bytes=bytes_(),
        flops=2 * rows * outputs * columns,
        dtype=DTYPE,
        series=series,
        size=rows,
    )


CASE = Case("quant_linear", "Products with weights of 4 and 8 bits and fp8, beside bf16", workloads)
