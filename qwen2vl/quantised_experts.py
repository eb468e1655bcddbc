"""Routed experts that are quantised alike, in tensors of all of them, for one product of each kind.

They are loaded one by one, as files hold them (:class:`qwen2vl.moe.SeparateExperts`), and then put together. Gate and
up of an expert become one matrix, so that they must take x's columns in one order; and a block of scales must not hold
rows of both. What is not alike stays apart, as where a writer left some experts in 16 bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from qwen2vl_kernels import grouped_quant_linear, swiglu
from qwen2vl_kernels.core.quant_layout import FP8, pack_zeros

from .layers import MLP, Linear
from .moe import SeparateExperts, SparseMoE, summed
from .quantization import QuantisedTogether, QuantLinear, keeping_dtypes


class QuantStack(nn.Module):
    """For each of G experts a quantised matrix, or ``parts`` of them one over the other, of ``(rows, columns)`` each.

    ``weight (G, parts * rows, bytes)`` uint8, fp8 too, ``scales``, ``zeros`` and ``order (G, columns)`` as
    ``qwen2vl_kernels.grouped_quant_linear`` takes them. ``input_scale (G, parts, ...)``: what is kept for a save.
    """

    weight: nn.Parameter
    scales: nn.Parameter
    zeros: nn.Parameter | None
    order: nn.Parameter | None
    input_scale: nn.Parameter | None

    def __init__(self, experts: Sequence[Sequence[QuantLinear]]) -> None:
        """Of copies of what layers hold, of which :func:`alike` is true."""
        super().__init__()
        one, layers = experts[0][0], [layer for parts in experts for layer in parts]
        self.how, self.parts = one.how, len(experts[0])
        self.rows, self.columns = one.out_features, one.in_features
        self.block = (min(one.block[0], self.rows), one.block[1])  # a larger one ends with its part
        self.scale_shapes = [layer.scale_shape for layer in layers]
        given: dict[str, list[torch.Tensor] | None] = {
            "weight": [layer.weight for layer in layers],
            "scales": [layer.scales for layer in layers],
            "zeros": None if all(layer.zeros is None for layer in layers) else list(map(_zeros, layers)),
            "order": None if all(parts[0].order is None for parts in experts) else [_order(p[0]) for p in experts],
            "input_scale": None if one.input_scale is None else [s for x in layers if (s := x.input_scale) is not None],
        }
        for name, tensors in given.items():
            held = None
            if tensors is not None:
                whole = tensors[0].new_empty(len(tensors), *tensors[0].shape)
                for own, tensor in zip(whole.unbind(0), tensors, strict=True):
                    own.copy_(tensor.detach())
                of_each = whole.unflatten(0, (len(experts), -1))
                held = of_each.flatten(1, 2) if name in ("weight", "scales", "zeros") else of_each
                held = nn.Parameter(whole if name == "order" else held, requires_grad=False)
            self.register_parameter(name, held)

    def _apply(self, fn, recurse=True):
        return super()._apply(keeping_dtypes(fn), recurse)

    def forward(self, rows: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
        """``(M, columns)`` rows sorted by expert, ``(G + 1,)`` bounds, to ``(M, parts * rows)``."""
        weight = self.weight if self.how.bits else self.weight.view(FP8)
        return grouped_quant_linear(
            rows, weight, self.scales, bounds, self.zeros, block=self.block, order=self.order
        )  # fmt: skip

    def layer(self, expert: int, part: int) -> QuantLinear:
        """One expert's layer, whose parameters are views of what is here."""
        with torch.device("meta"):
            made = QuantLinear(Linear(self.columns, self.rows, bias=False), self.how)
        for name in ("weight", "scales", "zeros"):
            if (tensor := getattr(self, name)) is not None:
                made.set(name, tensor.detach()[expert].chunk(self.parts)[part])
        if self.order is not None:
            made.set("order", self.order.detach()[expert])
        if self.input_scale is not None:
            made.set("input_scale", self.input_scale.detach()[expert, part])
        made.scale_shape = self.scale_shapes[expert * self.parts + part]
        return made

    def extra_repr(self) -> str:
        return f"{len(self.weight)} x {self.parts} x ({self.rows}, {self.columns}), {self.how.label}"


class QuantExperts(QuantisedTogether):
    """As :class:`qwen2vl.moe.Experts`, the experts from ``begin`` on, quantised alike."""

    def __init__(self, experts: SeparateExperts) -> None:
        super().__init__()
        self.begin = experts.begin
        self.gate_up_proj, self.down_proj = map(QuantStack, _layers(experts))

    def forward(self, x: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        def products(rows: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
            return self.down_proj(swiglu(self.gate_up_proj(rows, bounds)), bounds)

        own = experts - self.begin if self.begin else experts
        return summed(x, weights, own, len(self.down_proj.weight), products)

    def layers(self) -> dict[str, QuantLinear]:
        found = {}
        for n in range(len(self.down_proj.weight)):
            for name, stack, part in (
                ("gate_proj", self.gate_up_proj, 0), ("up_proj", self.gate_up_proj, 1), ("down_proj", self.down_proj, 0)
            ):  # fmt: skip
                found[f"{self.begin + n}.{name}"] = stack.layer(n, part)
        return found


def put_together(mlp: nn.Module) -> QuantExperts | None:
    """Put the experts of a decoder layer's ``mlp`` together, where they are quantised alike, and return them then.

    Layer by layer, so that the memory of those that lay apart serves the next layer's.
    """
    if not (isinstance(mlp, SparseMoE) and isinstance(mlp.experts, SeparateExperts) and alike(mlp.experts)):
        return None
    mlp.experts = QuantExperts(mlp.experts)
    return mlp.experts


def alike(experts: SeparateExperts) -> bool:
    """Whether experts may lie in tensors of all of them."""
    mlps = [mlp for mlp in experts.values() if isinstance(mlp, MLP)]
    if not all(isinstance(one, QuantLinear) for mlp in mlps for one in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)):
        return False
    gate_up, down = _layers(experts)
    for stack in (gate_up, down):
        kinds = {
            (one.scales.dtype, None if (own := one.input_scale) is None else (own.dtype, own.shape))
            for parts in stack
            for one in parts
        }
        if len(kinds) > 1:
            return False
    rows = gate_up[0][0].out_features
    return rows % min(gate_up[0][0].block[0], rows) == 0 and all(_same_order(*parts) for parts in gate_up)


def _layers(experts: SeparateExperts) -> tuple[list[list[QuantLinear]], list[list[QuantLinear]]]:
    mlps = [mlp for mlp in experts.values() if isinstance(mlp, MLP)]
    return [[mlp.gate_proj, mlp.up_proj] for mlp in mlps], [[mlp.down_proj] for mlp in mlps]  # type: ignore[return-value]


def _same_order(one: QuantLinear, other: QuantLinear) -> bool:
    return (one.order is None and other.order is None) or torch.equal(_order(one), _order(other))


def _order(layer: QuantLinear) -> torch.Tensor:
    if layer.order is not None:
        return layer.order
    return torch.arange(layer.in_features, dtype=torch.int32, device=layer.weight.device)


def _zeros(layer: QuantLinear) -> torch.Tensor:
    """A layer's zero points, all in the middle where it has none."""
    if layer.zeros is not None:
        return layer.zeros
    bits = layer.how.bits
    return pack_zeros(torch.full_like(layer.scales, 1 << (bits - 1), dtype=torch.uint8), bits)
