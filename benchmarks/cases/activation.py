"""QuickGELU of the vision tower, with and without the bias before it, and SwiGLU of the language models."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from qwen2vl_kernels import quick_gelu, swiglu

from ..case import Case, Context, Workload
from ._ops import Op, random, token_counts


def workloads(context: Context) -> Iterator[Workload]:
    for tokens in token_counts(context):
        yield from _quick_gelu(context, tokens, 5120)
        for columns in (8960,) if context.quick else (8960, 18944):
            yield from _swiglu(context, tokens, columns)


def _formula_quick_gelu(x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """transformers' QuickGELUActivation, after the addition that the projection would do."""
    h = x if bias is None else x + bias
    return h * torch.sigmoid(1.702 * h)


def _formula_swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate) * up


def _liger_swiglu() -> Callable:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction  # pyright: ignore[reportMissingImports]

    return LigerSiLUMulFunction.apply


def _quick_gelu(context: Context, tokens: int, columns: int) -> Iterator[Workload]:
    x, bias, row = random(context, tokens, columns, scale=3), random(context, columns, seed=1), 2 * tokens * columns
    for name, inputs in (
        (f"quick_gelu {tokens}x{columns}", (x,)),
        (f"quick_gelu {tokens}x{columns} + bias", (x, bias)),
    ):
        op = Op(context, _formula_quick_gelu, quick_gelu, inputs)
        yield op.forward(name, tokens, bytes=2 * row)
        yield op.backward(name, tokens, bytes=3 * row)


def _swiglu(context: Context, tokens: int, columns: int) -> Iterator[Workload]:
    gate, up = random(context, tokens, columns, scale=3), random(context, tokens, columns, seed=1)
    name, row = f"swiglu {columns}", 2 * tokens * columns
    op = Op(context, _formula_swiglu, swiglu, (gate, up), peers={"Liger": ("liger_kernel", _liger_swiglu)})
    yield op.forward(name, tokens, bytes=3 * row)
    yield op.backward(name, tokens, bytes=5 * row)


CASE = Case("activation", "QuickGELU and SwiGLU, forward and backward", workloads)
