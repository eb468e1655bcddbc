"""What a rank holds of a quantised layer, as files store it: cut along words, groups and blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from .errors import CheckpointError
from .quantization import Quantization


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


def check_cut(name: str, how: Quantization, cut: Slice) -> None:
    """Raises :class:`CheckpointError` where a rank's part would not be a quantised layer: a word, a group or a block
    would be cut, or its columns come in an order of the whole."""
    if how.act_order and cut.dim == 1:
        raise CheckpointError(
            f"{name}: its columns are ordered by importance (act-order), so that those of a rank belong to groups of "
            "all ranks; load a checkpoint with desc_act false in parallel"
        )
    if how.bits:
        each, what = (how.group, "groups") if cut.dim == 1 else (32 // how.bits, "words")
    else:
        each, what = how.block[cut.dim], "blocks"
    if each and (cut.begin % each or (cut.end % each and cut.end != cut.whole)):
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
    return found | ({name: of(0, how.group) for name in ("qzeros", "scales")} if how.group else {})


def with_own_groups(
    how: Quantization, cut: Slice | None, tensors: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """``tensors`` with groups counted from the first that is held; some writers leave zeros in their place."""
    found = dict(tensors)
    if cut is not None and cut.dim == 1 and how.group and "g_idx" in found and bool(found["g_idx"].any()):
        found["g_idx"] = found["g_idx"] - cut.begin // how.group
    return found
