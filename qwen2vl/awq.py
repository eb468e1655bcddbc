"""Activation-aware scales (AWQ, arXiv 2306.00978): channels that carry large activations lose less by rounding.

    y = W x = (W diag(s)) (diag(s)^-1 x),    s = mean|x|^alpha

The columns of W are multiplied by s before they are rounded, and whatever makes x gives x / s, which costs nothing
where it has weights of its own for every channel:

    q, k, v      input_layernorm's weight
    o            v's rows; a key-value head's channels are read by several query heads, which have one scale in common
    gate, up     post_attention_layernorm's weight
    down         up's rows

alpha is the one of a grid with the smallest squared error of the outputs over calibration activations, 0 among them:
plain rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from .errors import PromptError
from .layers import MLP, RMSNorm
from .text import Layer

if TYPE_CHECKING:
    from .model import Qwen2VL

#: A float32 weight (N, K) and the mean squares (K,) of what it is multiplied with -> the values that it is stored as.
Rounded = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

_ALPHAS = tuple(n / 10 for n in range(11))
#: Rows of activations that errors are taken over, at least where there are so many, and up to twice as many.
_ROWS = 256
#: Values of a weight that are rounded at a time.
_VALUES = 1 << 20
#: Means of a channel that count as this share of the largest, at least: a scale is finite for a channel of zeros, too.
_SMALLEST = 1e-4


@dataclass(frozen=True)
class Group:
    """Linear layers that read the same channels, and what makes these: a norm, or a linear layer with its rows.

    ``heads``: (heads, repeats, width): channel ``d`` of head ``h`` of the source is read ``repeats`` times.
    """

    linears: tuple[nn.Linear, ...]
    source: RMSNorm | nn.Linear
    heads: tuple[int, int, int]

    def spread(self, scales: torch.Tensor) -> torch.Tensor:
        """What is one of each of the source's channels, for each of the channels that are read."""
        heads, repeats, width = self.heads
        return scales.view(heads, 1, width).expand(heads, repeats, width).reshape(-1)


def groups(layer: Layer) -> list[Group]:
    """Those of a dense decoder layer, in the order in which they are computed."""
    attention, mlp = layer.self_attn, layer.mlp
    assert isinstance(mlp, MLP)
    width, hidden = attention.head_dim, attention.q_proj.in_features
    kv_heads = attention.v_proj.out_features // width
    repeats = attention.o_proj.in_features // attention.v_proj.out_features
    return [
        Group((attention.q_proj, attention.k_proj, attention.v_proj), layer.input_layernorm, (1, 1, hidden)),
        Group((attention.o_proj,), attention.v_proj, (kv_heads, repeats, width)),
        Group((mlp.gate_proj, mlp.up_proj), layer.post_attention_layernorm, (1, 1, hidden)),
        Group((mlp.down_proj,), mlp.up_proj, (1, 1, mlp.down_proj.in_features)),
    ]


class Activations:
    """What a group reads: ``mean (K,)`` float32 of the absolute values, and some ``rows (R, K)``, evenly spread."""

    def __init__(self) -> None:
        self.count, self._step = 0, 1
        self._sum: torch.Tensor | float = 0.0
        self._rows: list[torch.Tensor] = []

    def add(self, x: torch.Tensor) -> None:
        x = x.detach().flatten(0, -2)
        self._sum = self._sum + x.abs().sum(0, dtype=torch.float32)
        self._rows.append(x[-self.count % self._step :: self._step].clone())
        self.count += x.shape[0]
        while sum(map(len, self._rows)) > 2 * _ROWS:
            self._rows, self._step = [torch.cat(self._rows)[::2].clone()], 2 * self._step

    @property
    def mean(self) -> torch.Tensor:
        return torch.as_tensor(self._sum) / self.count

    @property
    def rows(self) -> torch.Tensor:
        return torch.cat(self._rows)


def _see(seen: Activations, _: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
    seen.add(args[0])


@torch.no_grad()
def collect(model: Qwen2VL, calibration: Iterable[Mapping[str, torch.Tensor]]) -> list[list[Activations]]:
    """What the groups of every decoder layer read while the model reads conversations, given as
    :class:`qwen2vl.Processor` gives them.

    Raises :class:`PromptError` where there is no conversation, and where activations are no finite numbers.
    """
    found: list[list[Activations]] = []
    hooks = []
    try:
        for layer in model.model.layers:
            assert isinstance(layer, Layer)
            found.append([])
            for group in groups(layer):
                seen = Activations()
                found[-1].append(seen)
                hooks.append(group.linears[0].register_forward_pre_hook(partial(_see, seen)))
        for inputs in calibration:
            model(**{name: tensor for name, tensor in inputs.items() if name != "labels"}, last_only=True)
    finally:
        for hook in hooks:
            hook.remove()
    if not found[0][0].count:
        raise PromptError("calibration: wants at least one conversation, got none")
    for n, layer in enumerate(found):
        if not all(seen.mean.isfinite().all() for seen in layer):
            raise PromptError(f"calibration: layer {n} of the decoder reads activations that are no finite numbers")
    return found


@torch.no_grad()
def scale(layer: Layer, seen: Iterable[Activations], rounded: Rounded) -> dict[nn.Linear, torch.Tensor]:
    """Fold into the layer the scales that are best for ``rounded``, and return what its linear layers then read: the
    mean square ``(K,)`` of every channel.

    The layer computes what it did, but for rounding. Its linear layers should have float32 weights.
    """
    squares = {}
    for group, one in zip(groups(layer), seen, strict=True):
        scales = best(group, one, rounded)
        squares |= dict.fromkeys(group.linears, one.rows.float().div(group.spread(scales)).square().mean(0))
        fold(group, scales)
    return squares


def best(group: Group, seen: Activations, rounded: Rounded) -> torch.Tensor:
    """The scales, ``(channels of the source,)`` float32, with the smallest error of the group's outputs."""
    rows, mean = seen.rows.float(), seen.mean.view(group.heads).mean(1).flatten()
    mean = (mean / mean.max().clamp_min(torch.finfo(torch.float32).tiny)).clamp_min(_SMALLEST)
    found, least = torch.ones_like(mean), float("inf")
    for alpha in _ALPHAS:
        scales = mean**alpha
        scales = scales / (scales.max() * scales.min()).sqrt()
        read = group.spread(scales)
        squares, error = (rows / read).square().mean(0), 0.0
        for weight in _parts(group.linears):
            wrong = rounded(weight * read, squares) / read - weight
            error += (rows @ wrong.T).square().sum().item()
        if error < least:
            found, least = scales, error
    return found


def _parts(linears: Iterable[nn.Linear]) -> Iterator[torch.Tensor]:
    """Their weights in float32, some rows at a time, so that what is made of them stays in a CPU's caches."""
    for linear in linears:
        for rows in linear.weight.split(max(_VALUES // linear.in_features, 1)):
            yield rows.float()


@torch.no_grad()
def fold(group: Group, scales: torch.Tensor) -> None:
    """Multiply the group's columns by ``scales``, ``(channels of the source,)``, and divide what the source gives."""
    source = group.source
    if isinstance(source, RMSNorm):
        # What the norm's dtype makes of the quotient is what the columns make good: they are rounded only later.
        before = source.weight
        after = (before / scales).to(before.dtype)
        after = torch.where(after.isfinite() & (after != 0), after, before)
        source.weight = nn.Parameter(after, requires_grad=before.requires_grad)
        scales = torch.where(before == 0, 1.0, before.float() / after.float())
    else:
        source.weight.div_(scales.unsqueeze(1))
        if source.bias is not None:
            source.bias.div_(scales)
    for linear in group.linears:
        linear.weight.mul_(group.spread(scales))
