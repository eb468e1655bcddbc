"""A mixture of experts in the place of an MLP, as Qwen2-MoE (arXiv 2407.10671) and Qwen3-VL-MoE have it.

    p = softmax(x W_gate^T) in float32; the k largest of a token choose its experts and, over their sum where
    norm_topk_prob says so, weigh them
    y = sum_e p_e down_e(silu(gate_e(x)) * up_e(x))  +  sigmoid(x w^T) shared(x), where there is a shared expert

Experts' matrices are stacked, gate over up, as transformers 5 holds them, and so are quantised ones that are alike
(:mod:`qwen2vl.quantised_experts`); files hold every expert's apart, and so does the model where they differ, each with
scales and perhaps an order of columns of its own. A process may hold some
of the experts (:mod:`qwen2vl.parallel`): what it computes is then a part of the sum.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from qwen2vl_kernels import group_by_expert, grouped_linear, swiglu

from .layers import MLP, Linear
from .moe_config import MoEConfig
from .quantised_slices import Slice

if TYPE_CHECKING:
    from .parallel import TensorParallel
    from .quantised_experts import QuantExperts

_GATE_UP, _DOWN = ".mlp.experts.gate_up_proj", ".mlp.experts.down_proj"
_ONE = re.compile(r"(.*\.mlp\.experts)\.(0|[1-9]\d{0,5})\.")


class Experts(nn.Module):
    """The routed experts from ``begin`` on, by default all: ``gate_up_proj (E, 2F, C)``, ``down_proj (E, C, F)``."""

    def __init__(self, width: int, moe: MoEConfig, begin: int = 0, end: int | None = None) -> None:
        super().__init__()
        count, inner = (moe.num_experts if end is None else end) - begin, moe.moe_intermediate_size
        self.begin = begin
        self.gate_up_proj = nn.Parameter(torch.empty(count, 2 * inner, width))
        self.down_proj = nn.Parameter(torch.empty(count, width, inner))

    def forward(self, x: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        """``(T, C)``: for each token of ``x (T, C)`` the sum of its ``experts (T, k)`` times ``weights (T, k)``, of
        those that are here."""
        own = experts - self.begin if self.begin else experts
        return routed(x, weights, own, self.gate_up_proj, self.down_proj)


def routed(
    x: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor, gate_up_proj: torch.Tensor, down_proj: torch.Tensor
) -> torch.Tensor:
    """What :class:`Experts` computes; the choices that are none of these experts add nothing."""
    products = lambda rows, bounds: grouped_linear(  # noqa: E731
        swiglu(grouped_linear(rows, gate_up_proj, bounds)), down_proj, bounds
    )
    return summed(x, weights, experts, gate_up_proj.shape[0], products)


def summed(
    x: torch.Tensor,
    weights: torch.Tensor,
    experts: torch.Tensor,
    count: int,
    products: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """``products(rows, bounds)``: of rows ``(T k, C)`` sorted by expert, zeros behind the last bound."""
    order, places, bounds = group_by_expert(experts, count)
    y = products(_Spread.apply(x, order, places, experts.shape[1]), bounds)
    return (y.index_select(0, places).unflatten(0, experts.shape) * weights.unsqueeze(-1)).sum(1)


class SeparateExperts(nn.ModuleDict):
    """As :class:`Experts`, every expert a module by its number, as files name them: for those that are quantised in
    part, or not alike, as :mod:`qwen2vl.quantised_experts` wants them. Only the experts that have tokens are read; who
    has, is read on the host."""

    def __init__(self, stacked: Experts) -> None:
        """Of views of ``stacked``."""
        found = {}
        for e, (both, down) in enumerate(zip(stacked.gate_up_proj, stacked.down_proj, strict=True), stacked.begin):
            with torch.device("meta"):
                found[str(e)] = mlp = MLP(down.shape[0], down.shape[1])
            for layer, matrix in zip((mlp.gate_proj, mlp.up_proj, mlp.down_proj), (*both.chunk(2), down), strict=True):
                layer.weight = nn.Parameter(matrix.detach(), requires_grad=stacked.down_proj.requires_grad)
        super().__init__(found)
        self.begin = stacked.begin

    def keep(self, begin: int, end: int) -> None:
        """Let go of all but the experts ``[begin, end)``."""
        self.begin = begin
        for key in [key for key in self if not begin <= int(key) < end]:
            del self[key]

    def forward(self, x: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        def products(rows: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
            ends = bounds.tolist()
            of_each = zip(self.values(), ends[:-1], ends[1:], strict=True)
            parts = [mlp(rows[begin:end]) for mlp, begin, end in of_each if end > begin]
            return torch.cat([*parts, rows.new_zeros(rows.shape[0] - ends[-1], rows.shape[1])])

        own = experts - self.begin if self.begin else experts
        return summed(x, weights, own, len(self), products)


def separate(layers: Iterable[nn.Module], names: Iterable[str]) -> None:
    """Give the decoder's ``layers`` separate experts where one is among ``names``, of the model's linear layers."""
    found = {match[1] for name in names if (match := _ONE.match(f"{name}."))}
    for n, layer in enumerate(layers):
        mlp = layer.get_submodule("mlp")
        if f"model.layers.{n}.mlp.experts" in found and isinstance(mlp, SparseMoE) and isinstance(mlp.experts, Experts):
            mlp.experts = SeparateExperts(mlp.experts)


class _Spread(torch.autograd.Function):
    """Each token once for each of its choices, in the choices' order. PyTorch's own gradient of that would add the rows
    of a token as they come, on a GPU in any order; this one adds a token's choices in theirs."""

    @staticmethod
    def forward(ctx, x, order, places, chosen):
        ctx.save_for_backward(places)
        ctx.chosen = chosen
        return x[order // chosen]

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        (places,) = ctx.saved_tensors
        return grad[places].unflatten(0, (-1, ctx.chosen)).sum(1), None, None, None


class SparseMoE(nn.Module):
    """Routed experts and, where the config has one, a shared one behind a gate."""

    def __init__(self, width: int, moe: MoEConfig) -> None:
        super().__init__()
        self.chosen, self.normed = moe.num_experts_per_tok, moe.norm_topk_prob
        #: Set where this process holds some of the experts, and some columns of the shared one.
        self.parallel: TensorParallel | None = None
        self.gate = Linear(width, moe.num_experts, bias=False)
        self.experts: Experts | SeparateExperts | QuantExperts = Experts(width, moe)
        self.shared_expert: MLP | None = None
        if moe.shared_expert_intermediate_size:
            self.shared_expert = MLP(width, moe.shared_expert_intermediate_size)
            self.shared_expert_gate = Linear(width, 1, bias=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``(T, C)`` to ``(T, C)`` and the router's logits ``(T, E)``."""
        logits = self.gate(x)
        weights, experts = router_probabilities(logits).topk(self.chosen, -1)
        if self.normed:
            weights = weights / weights.sum(-1, keepdim=True)
        y = self.experts(x, weights.to(logits.dtype), experts)
        if self.shared_expert is not None:
            y = y + self.shared_expert_gate(x).sigmoid() * self.shared_expert(x)
        return (y if self.parallel is None else self.parallel.sum(y)), logits


def router_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """In float32; in float64 for such logits."""
    return logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def load_balancing_loss(router_logits: Sequence[torch.Tensor], chosen: int) -> torch.Tensor:
    """``E sum_e f_e P_e`` over all layers and tokens: f_e the choices of expert e for each token, P_e its mean
    probability. A scalar, ``chosen`` where all experts are met equally, and more the less they are.

    Switch Transformers (arXiv 2101.03961), equations 4 to 6, for several choices a token and layers taken together, as
    in transformers' Qwen2-MoE. ``router_logits``: ``(T, E)`` for each sparse layer.
    """
    counts, sums, rows = [], [], 0
    for logits in router_logits:
        probabilities = router_probabilities(logits)
        picked = torch.zeros_like(probabilities).scatter_(1, probabilities.topk(chosen, -1).indices, 1.0)
        counts.append(picked.sum(0))
        sums.append(probabilities.sum(0))
        rows += logits.shape[0]
    shares, means = (torch.stack(parts).sum(0) / rows for parts in (counts, sums))
    return (shares * means).sum() * shares.shape[0]


def expert_parts(name: str, stacked: torch.Tensor, begin: int = 0) -> Iterator[tuple[str, torch.Tensor]]:
    """A parameter as a checkpoint's files hold it: views of an experts' parameter under the names of each expert's own
    matrices, the first one ``begin``; what is none of these, as it is."""
    if name.endswith(_GATE_UP):
        prefix = name.removesuffix("gate_up_proj")
        for e, both in enumerate(stacked.unbind(0), begin):
            gate, up = both.chunk(2)
            yield from ((f"{prefix}{e}.gate_proj.weight", gate), (f"{prefix}{e}.up_proj.weight", up))
    elif name.endswith(_DOWN):
        prefix = name.removesuffix("down_proj")
        yield from ((f"{prefix}{e}.down_proj.weight", one) for e, one in enumerate(stacked.unbind(0), begin))
    else:
        yield name, stacked


def held_elsewhere(name: str, cuts: Mapping[str, Slice]) -> bool:
    """Whether a file's tensor of this name is an expert's that another rank holds, where a rank holds ``cuts``."""
    found = _ONE.match(name)
    if found is None or (cut := cuts.get(f"{found[1]}.down_proj")) is None:
        return False
    return (number := int(found[2])) < cut.whole and not cut.begin <= number < cut.end
