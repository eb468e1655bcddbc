"""What a rank holds of a quantised layer, as files store it: cut along words, and inside of groups and blocks.

A rank's columns need not begin where a group does, and with act-order they belong to groups of the whole layer. So a
rank has blocks of its own, each inside of one group or block of the file, with that one's scale and zero point.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch

from qwen2vl_kernels.core.quant_layout import COLUMNS

from .errors import CheckpointError
from .quantization import Quantization, QuantLinear


class Slice(NamedTuple):
    """``[begin, end)`` of dimension ``dim``, which has ``whole`` entries in the checkpoint. Of a layer's weight
    ``(outputs, inputs)``, whatever the layout of what is stored."""

    dim: int
    begin: int
    end: int
    whole: int

    @property
    def count(self) -> int:
        return self.end - self.begin


class Part(NamedTuple):
    """A rank's part of a layer.

    Attributes:
        tensors: what a file would store of it, in blocks of its own.
        block: rows and columns of these.
        order: None, or ``(K',)`` int64, K' at least the part's columns: which of them each column of the blocks is, -1
            where a block is filled up.
    """

    tensors: dict[str, torch.Tensor]
    block: tuple[int, int]
    order: torch.Tensor | None


def check_cut(name: str, how: Quantization, cut: Slice) -> None:
    """Raises :class:`CheckpointError` where a rank's part would be no layer for the kernels, or cut a word."""
    each, what = (COLUMNS, "stretches") if cut.dim == 1 else (32 // how.bits if how.bits else 1, "words")
    if cut.begin % each or (cut.end % each and cut.end != cut.whole):
        raise CheckpointError(
            f"{name}: {cut.count} of {cut.whole} for each rank cut {what} of {each}; take fewer ranks"
        )


def stored_slices(how: Quantization, cut: Slice | None) -> dict[str, Slice]:
    """What is to be read of each tensor that :meth:`Quantization.stored` names; those that are read whole are left out.

    ``cut`` has passed :func:`check_cut`.
    """
    if cut is None:
        return {}
    along_inputs = cut.dim == 1

    def of(dim: int, each: int = 1) -> Slice:
        return Slice(dim, cut.begin // each, -(-cut.end // each), -(-cut.whole // each))

    if not how.bits:
        block = how.block[cut.dim]
        return {"weight": cut} | ({how.scale_name: of(cut.dim, block)} if block else {})
    word = 32 // how.bits
    if not along_inputs:
        weight = of(1, word) if how.method == "awq" else of(1)
        return {"qweight": weight, "qzeros": of(1, word), "scales": of(1)}
    found = {"qweight": of(0) if how.method == "awq" else of(0, word)}
    if how.method == "gptq":
        found["g_idx"] = of(0)
    # In the order of activations the columns belong to any groups.
    own = bool(how.group) and not how.act_order
    return found | ({name: of(0, how.group) for name in ("qzeros", "scales")} if own else {})


def own_part(layer: QuantLinear, cut: Slice | None, tensors: Mapping[str, torch.Tensor]) -> Part:
    """What :func:`stored_slices` said is read of the ``layer``, in blocks of the rank's own.

    Raises :class:`CheckpointError` where ``g_idx`` names groups that are not there, or one too often.
    """
    how, found = layer.how, dict(tensors)
    if cut is None or not (each := (0, how.group)[cut.dim] if how.bits else how.block[cut.dim]):
        return Part(found, layer.block, None)
    size, order, first = math.gcd(each, cut.begin), None, 0 if how.act_order else cut.begin // each
    blocks = torch.arange(cut.begin, cut.end, size) // each
    if "g_idx" in found:
        g_idx = found["g_idx"].cpu().long()
        if torch.equal(g_idx, torch.arange(cut.begin, cut.end) // each):
            found["g_idx"] = (torch.arange(cut.count) // size).int()
        elif how.act_order:
            size, order, blocks = _together(g_idx, how, found["scales"].shape[0])
    for name in ("qzeros", "scales") if how.bits else (how.scale_name,):
        found[name] = found[name].index_select(0 if how.bits else cut.dim, blocks - first)
    return Part(found, (size, layer.block[1]) if cut.dim == 0 else (layer.block[0], size), order)


def _together(g_idx: torch.Tensor, how: Quantization, groups: int) -> tuple[int, torch.Tensor, torch.Tensor]:
    """Columns of a block, the order of :class:`Part`, and each block's group, where few bytes are spent on filling."""
    counts = torch.bincount(g_idx.clamp(0), minlength=groups)
    if int(g_idx.min()) < 0 or counts.numel() > groups or int(counts.max()) > how.group:
        raise CheckpointError(f"g_idx: must name each of {groups} groups {how.group} times at most")

    def bits(size: int) -> int:
        return int((-(-counts // size)).sum()) * (size * how.bits + how.bits + 16)

    size = min((n for n in range(COLUMNS, how.group + 1, COLUMNS) if how.group % n == 0), key=bits)
    blocks = -(-counts // size)
    sorted_, begins = torch.argsort(g_idx, stable=True), (blocks.cumsum(0) - blocks) * size
    places = begins[g_idx[sorted_]] + torch.arange(g_idx.numel()) - (counts.cumsum(0) - counts)[g_idx[sorted_]]
    order = torch.full((int(blocks.sum()) * size,), -1)
    order[places] = sorted_
    return size, order, torch.arange(groups).repeat_interleave(blocks)
