"""The grouped product of a mixture of experts, at the shapes of Qwen2-MoE's 60 experts and of Qwen3-VL-MoE's 128."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from qwen2vl_kernels import group_by_expert, grouped_linear

from ..case import Case, Context, Workload
from ._ops import Op, random, token_counts

#: Experts, how many of them a token meets, rows and columns of the matrix of gate and up.
_SHAPES = ((60, 4, 2816, 2048), (128, 8, 1536, 2048))
_SMALL = (8, 2, 352, 256)


def workloads(context: Context) -> Iterator[Workload]:
    small = context.quick or context.device.type != "cuda"
    for tokens in token_counts(context):
        for experts, chosen, columns, depth in (_SMALL,) if small else _SHAPES:
            yield from _products(context, tokens, experts, chosen, columns, depth)


def _formula(x: torch.Tensor, weight: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    """transformers' loop over the experts, of rows that are sorted."""
    ends = bounds.tolist()
    groups = zip(ends[:-1], ends[1:], weight.unbind(0), strict=True)
    return torch.cat([F.linear(x[begin:end], matrix) for begin, end, matrix in groups])


def _torch() -> Callable:
    from torch.nn.functional import grouped_mm

    return lambda x, weight, bounds: grouped_mm(x, weight.mT, offs=bounds[1:])


def _products(context: Context, tokens: int, experts: int, chosen: int, columns: int, depth: int) -> Iterator[Workload]:
    rows = tokens * chosen
    picked = random(context, tokens, experts, seed=2).topk(chosen, -1).indices
    _, _, bounds = group_by_expert(picked, experts, backend="eager")
    inputs = random(context, rows, depth), random(context, experts, columns, depth, seed=1, scale=0.02)
    op = Op(context, _formula, grouped_linear, inputs, (bounds,), peers={"PyTorch's grouped_mm": ("torch", _torch)})
    name, met = f"{chosen} of {experts} experts, {columns}x{depth}", min(experts, rows)
    moved = 2 * (rows * (columns + depth) + met * columns * depth)
    flops = 2 * rows * columns * depth
    yield op.forward(name, tokens, bytes=moved, flops=flops)
    yield op.backward(name, tokens, bytes=2 * moved, flops=2 * flops)


CASE = Case("experts", "the grouped product of a mixture of experts, forward and backward", workloads)
