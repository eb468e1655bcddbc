"""Grouped products with quantised weights beside a loop over the experts, and bf16 ones, from a step to a prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from qwen2vl.quantised_experts import QuantStack
from qwen2vl.quantising import nearest, stated
from qwen2vl.quantization import Quantization
from qwen2vl_kernels import group_by_expert, grouped_linear, grouped_quant_linear, quant_linear
from qwen2vl_kernels.core.quant_layout import FP8, dequantize

from ..case import Case, Check, Context, Workload, two_times
from ._ops import DTYPE, made, random

#: Experts, how many of them a token meets, rows and columns of the matrix of gate and up: as in the case "experts".
_SHAPES = ((60, 4, 2816, 2048), (128, 8, 1536, 2048))
_SMALL = (8, 2, 352, 256)
_FORMS = ("awq", "gptq-int8", "fp8")
_BACKENDS = {"cuda": ("triton",), "cpu": ("native",)}


def workloads(context: Context) -> Iterator[Workload]:
    small = context.quick or context.device.type != "cuda"
    for shape in (_SMALL,) if small else _SHAPES:
        for form in _FORMS:
            for tokens in (1, 64) if small else (1, 8, 1024, 8192):
                yield _workload(context, form, tokens, *shape)


def _workload(
    context: Context, form: str, tokens: int, experts: int, chosen: int, outputs: int, columns: int
) -> Workload:
    how, rows = Quantization.from_dict(stated(form, 128)), tokens * chosen

    @cache
    def inputs() -> tuple[torch.Tensor, QuantStack, torch.Tensor, torch.Tensor]:
        picked = random(context, tokens, experts, seed=2).topk(chosen, -1).indices
        _, _, bounds = group_by_expert(picked, experts, backend="eager")
        weight = random(context, experts, outputs, columns, seed=1, scale=columns**-0.5)
        layers = []
        for matrix in weight:
            layer = nn.Linear(columns, outputs, bias=False, device="meta")
            layer.weight = nn.Parameter(matrix, requires_grad=False)
            layers.append([nearest(layer, how)])
        return random(context, rows, columns), QuantStack(layers), bounds, weight

    def matrices() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        stack = inputs()[1]
        weight = stack.weight.detach()
        return weight if how.bits else weight.view(FP8), stack.scales, stack.zeros

    def loop(x: torch.Tensor, bounds: torch.Tensor, product: Callable[[torch.Tensor, int], torch.Tensor]):
        ends = bounds.tolist()
        groups = enumerate(zip(ends[:-1], ends[1:], strict=True))
        return torch.cat([product(x[begin:end], g) for g, (begin, end) in groups if end > begin])

    def ours(backend: str) -> Callable[[], torch.Tensor]:
        (x, stack, bounds, _), (weight, scales, zeros) = inputs(), matrices()
        return lambda: grouped_quant_linear(x, weight, scales, bounds, zeros, block=stack.block, backend=backend)

    def one_by_one() -> Callable[[], torch.Tensor]:
        (x, stack, bounds, _), (weight, scales, zeros) = inputs(), matrices()

        def product(own: torch.Tensor, g: int) -> torch.Tensor:
            return quant_linear(own, weight[g], scales[g], None if zeros is None else zeros[g], block=stack.block)

        return lambda: loop(x, bounds, product)

    def bf16() -> Callable[[], torch.Tensor]:
        x, _, bounds, weight = inputs()
        return lambda: grouped_linear(x, weight, bounds)

    def gate(outputs_by: Mapping[str, Any]) -> list[Check]:
        (x, stack, bounds, _), (weight, scales, zeros) = inputs(), matrices()

        def values(g: int) -> torch.Tensor:
            points = None if zeros is None else zeros[g]
            return dequantize(weight[g], scales[g], points, stack.block, torch.float64, columns)

        exact = loop(x.double(), bounds, lambda own, g: F.linear(own, values(g)))
        low = loop(x, bounds, lambda own, g: F.linear(own, values(g).to(DTYPE)))
        return [two_times(name, got, low, exact, 1e-6, name) for name, got in outputs_by.items() if name != "bf16"]

    met, groups = min(experts, rows), columns // 128
    each = outputs * (columns * (how.bits or 8) // 8 + (2 * groups if how.bits else 4))
    contenders = [made(backend, partial(ours, backend), peer=False) for backend in _BACKENDS[context.device.type]]
    contenders += [made("one by one", one_by_one), made("bf16", bf16)]
    series = f"{form}, {chosen} of {experts} experts, {outputs}x{columns}"
    return Workload(
        f"{series}, {tokens} tokens",
        contenders,
        gate=gate,
        bytes=met * each + 2 * rows * (columns + outputs),
        flops=2 * rows * outputs * columns,
        dtype=DTYPE,
        series=series,
        size=tokens,
    )


CASE = Case("quant_experts", "the grouped product of quantised experts, beside one by one and bf16", workloads)
