"""Layers of which a rank holds a part, see :mod:`qwen2vl.parallel`, and what puts them in a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from .layers import Embedding, Linear
from .moe import Experts, SeparateExperts, SparseMoE
from .parallel import TensorParallel, slices, split_of
from .quantised_slices import Slice, check_cut
from .quantization import QuantLinear
from .text import Layer

if TYPE_CHECKING:
    from .model import Qwen2VL


class _RowParallel:
    """Beside a linear layer that holds the columns of this rank's inputs: its product is summed over the ranks."""

    parallel: TensorParallel

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.parallel.sum(super().forward(input))  # type: ignore[misc]


class RowParallelLinear(_RowParallel, Linear):
    pass


class RowParallelQuantLinear(_RowParallel, QuantLinear):
    pass


class VocabParallelEmbedding(Embedding):
    """The rows of an embedding from ``begin`` on; those of other ranks count as zeros in a sum over the ranks."""

    def __init__(self, begin: int, count: int, width: int, parallel: TensorParallel) -> None:
        super().__init__(count, width)
        self.begin, self.parallel = begin, parallel

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        own = input - self.begin
        foreign = (own < 0) | (own >= self.num_embeddings)
        rows = F.embedding(own.masked_fill(foreign, 0), self.weight)
        return self.parallel.sum(rows.masked_fill_(foreign.unsqueeze(-1), 0))


def split(model: Qwen2VL, parallel: TensorParallel) -> dict[str, Slice]:
    """Put this rank's part of them in the place of the layers of ``model``, which is on the meta device; returns what
    the checkpoint is to be cut by, as :func:`qwen2vl.parallel.slices`."""
    text = model.config.text
    cuts = slices(text, parallel.rank, parallel.ranks)
    with torch.device("meta"):
        for n, layer in enumerate(model.model.layers):
            assert isinstance(layer, Layer)
            for name in split_of(text, n):
                path = f"model.layers.{n}.{name}"
                # What a shared expert gives is summed with what the routed ones do.
                summed = None if ".shared_expert." in path else parallel
                layer.set_submodule(name, _part(layer.get_submodule(name), path, cuts[f"{path}.weight"], summed))
            if isinstance(layer.mlp, SparseMoE) and text.moe is not None:
                _, begin, end, _ = cuts[f"model.layers.{n}.mlp.experts.down_proj"]
                if isinstance(layer.mlp.experts, SeparateExperts):
                    layer.mlp.experts.keep(begin, end)
                else:
                    layer.mlp.experts = Experts(text.hidden_size, text.moe, begin, end)
                layer.mlp.parallel = parallel
        rows = cuts["model.embed_tokens.weight"]
        model.model.embed_tokens = VocabParallelEmbedding(rows.begin, rows.count, text.hidden_size, parallel)
        if not text.tie_word_embeddings:
            model.lm_head = Linear(text.hidden_size, rows.count, bias=False)
    model.requires_grad_(False)
    model.parallel = parallel
    return cuts


def _part(whole: torch.nn.Module, path: str, cut: Slice, parallel: TensorParallel | None) -> torch.nn.Linear:
    """This rank's part of a linear layer; ``parallel``: where it is cut along its inputs, what sums over the ranks."""
    assert isinstance(whole, (Linear, QuantLinear))
    outputs, inputs = (cut.count if cut.dim == n else size for n, size in enumerate((whole.out_features,
                                                                                    whole.in_features)))  # fmt: skip
    summed = cut.dim == 1 and parallel is not None
    part = (RowParallelLinear if summed else Linear)(inputs, outputs, bias=whole.bias is not None)
    if isinstance(whole, QuantLinear):
        check_cut(path, whole.how, cut)
        part = (RowParallelQuantLinear if summed else QuantLinear)(part, whole.how)
    if isinstance(part, _RowParallel):
        assert parallel is not None
        part.parallel = parallel
    return part
