"""LayerNorm of the vision tower and RMSNorm of the language models, alone and after a residual sum."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from qwen2vl_kernels import add_layer_norm, add_rms_norm, layer_norm, rms_norm

from ..case import Case, Context, Workload
from ._ops import Op, random, token_counts

EPS = 1e-6


def workloads(context: Context) -> Iterator[Workload]:
    for tokens in token_counts(context):
        yield from _rms(context, tokens, 1536)
        yield from _layer(context, tokens, 1280)
        if not context.quick:
            yield from _rms(context, tokens, 8192)


def _formula_rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """transformers' Qwen2VLRMSNorm: statistics in float32, the product with the weight in the inputs' dtype."""
    h = x.to(torch.promote_types(x.dtype, torch.float32))
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * h.to(x.dtype)


def _formula_add_rms(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    total = x + residual
    return _formula_rms(total, weight), total


def _formula_layer(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, (x.shape[-1],), weight, bias, EPS)


def _formula_add_layer(x, residual, weight, bias) -> tuple[torch.Tensor, torch.Tensor]:
    total = x + residual
    return _formula_layer(total, weight, bias), total


def _liger_rms() -> Callable:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction  # pyright: ignore[reportMissingImports]

    return lambda x, weight: LigerRMSNormFunction.apply(x, weight, EPS, 0.0, "llama", False)


def _liger_add_rms() -> Callable:
    from liger_kernel.ops.fused_add_rms_norm import (  # pyright: ignore[reportMissingImports]
        LigerFusedAddRMSNormFunction,
    )

    return lambda x, residual, weight: LigerFusedAddRMSNormFunction.apply(x, residual, weight, EPS, 0.0, "llama", False)


def _liger_layer() -> Callable:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction  # pyright: ignore[reportMissingImports]

    return lambda x, weight, bias: LigerLayerNormFunction.apply(x, weight, bias, EPS)


def _rms(context: Context, tokens: int, columns: int) -> Iterator[Workload]:
    x, residual = random(context, tokens, columns), random(context, tokens, columns, seed=1)
    weight, row = random(context, columns, seed=2), 2 * tokens * columns  # bytes of one tensor
    torch_own = ("triton", lambda: lambda x, weight: F.rms_norm(x, (columns,), weight, EPS))
    peers = {"Liger": ("liger_kernel", _liger_rms), "torch.rms_norm": torch_own}
    op = Op(context, _formula_rms, rms_norm, (x, weight), peers=peers)
    yield op.forward(f"rms_norm {columns}", tokens, bytes=2 * row)
    yield op.backward(f"rms_norm {columns}", tokens, bytes=3 * row)
    op = Op(
        context,
        _formula_add_rms,
        add_rms_norm,
        (x, residual, weight),
        peers={"Liger": ("liger_kernel", _liger_add_rms)},
    )
    yield op.forward(f"add_rms_norm {columns}", tokens, bytes=4 * row)
    yield op.backward(f"add_rms_norm {columns}", tokens, bytes=4 * row)


def _layer(context: Context, tokens: int, columns: int) -> Iterator[Workload]:
    x, residual = random(context, tokens, columns), random(context, tokens, columns, seed=1)
    weight, bias = random(context, columns, seed=2), random(context, columns, seed=3)
    row = 2 * tokens * columns
    op = Op(context, _formula_layer, layer_norm, (x, weight, bias), peers={"Liger": ("liger_kernel", _liger_layer)})
    yield op.forward(f"layer_norm {columns}", tokens, bytes=2 * row)
    yield op.backward(f"layer_norm {columns}", tokens, bytes=3 * row)
    op = Op(context, _formula_add_layer, add_layer_norm, (x, residual, weight, bias))
    yield op.forward(f"add_layer_norm {columns}", tokens, bytes=4 * row)
    yield op.backward(f"add_layer_norm {columns}", tokens, bytes=4 * row)


CASE = Case("norm", "LayerNorm and RMSNorm, alone and after a residual sum, forward and backward", workloads)
