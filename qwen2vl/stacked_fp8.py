"""Experts of a layer in two tensors of fp8, as transformers 5 holds them, read into a model that has them one by one.

    mlp.experts.gate_up_proj (E, 2F, C) float8_e4m3fn, gate over up; gate_up_proj_scale_inv (E, 2F / rows, C / columns)
    mlp.experts.down_proj    (E, C, F)  float8_e4m3fn;               down_proj_scale_inv    (E, C / rows, F / columns)

Blocks of ``weight_block_size`` (rows, columns) share a scale, as in layers of ``quant_method`` fp8; where that is null,
gate, up and down of an expert have one each, (E, 2, 1) and (E, 1, 1). A rank reads nothing but its own experts.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .errors import CheckpointError
from .quantised_slices import Slice
from .quantization import Quantization, Stored

if TYPE_CHECKING:
    from .config import TextConfig

#: A stack -> what of each expert lies in it, from the first row on.
_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
_ONE = re.compile(r"(.*\.mlp\.experts)\.(0|[1-9]\d{0,5})\.(gate|up|down)_proj\.weight(|_scale_inv)")


class Part(NamedTuple):
    """Where in a stack a tensor of one expert lies: in rows of its own among ``of`` as many."""

    matrix: str  # the model's name of the stack of weights
    stack: str  # and of the stack that holds the tensor, which is that one or the one of its scales
    expert: int
    place: int
    of: int


def part_of(name: str) -> Part | None:
    """Where a stack would hold an expert's tensor of the model's name, ``None`` for what is none."""
    if (found := _ONE.fullmatch(name)) is None:
        return None
    prefix, expert, kind, scales = found.groups()
    matrix = f"{prefix}.{'down_proj' if kind == 'down' else 'gate_up_proj'}"
    return Part(matrix, matrix + scales, int(expert), int(kind == "up"), 1 if kind == "down" else 2)


def one_by_one(how: Quantization, text: TextConfig, names: Mapping[str, str]) -> dict[str, str]:
    """``names``, the model's name of every stored tensor -> its dtype, and beside stacks of experts in fp8 the names
    that files have where experts lie apart.

    Raises :class:`CheckpointError` where a block of scales would hold rows of gate and of up.
    """
    found = dict(names)
    for layer in range(text.num_hidden_layers if how.method == "fp8" else 0):
        prefix, moe = f"model.layers.{layer}.mlp.experts", text.experts(layer)
        for stack, parts in _PARTS.items():
            if moe is None or names.get(f"{prefix}.{stack}") != "F8_E4M3":
                continue
            if len(parts) > 1 and how.block[0] and moe.moe_intermediate_size % how.block[0]:
                raise CheckpointError(
                    f"{prefix}.{stack}: cannot be {how.label}: one would hold rows of gate and of up, of which there "
                    f"are {moe.moe_intermediate_size} each"
                )
            experts = range(moe.num_experts)
            found |= {f"{prefix}.{e}.{part}.weight": "F8_E4M3" for e in experts for part in parts}
    return found


def in_files(wanted: Stored, where: Collection[str], cuts: Mapping[str, Slice]) -> Stored:
    """``wanted`` of files with the stacks that are among them, ``where``, in the place of their parts.

    ``cuts``: what a rank holds, by which the files have more experts than the model.
    """
    found: Stored = {}
    counts: dict[str, int] = {}
    for name, (shapes, dtypes) in wanted.items():
        part = part_of(name)
        if part is None or part.matrix not in where:
            found[name] = (shapes, dtypes)
            continue
        cut = cuts.get(part.matrix)
        counts[part.stack] = max(counts.get(part.stack, 0), part.expert + 1 if cut is None else cut.whole)
        whole = tuple((counts[part.stack], part.of * s[0], s[1]) for s in shapes if len(s) == 2)
        found[part.stack] = (whole, dtypes)
    return found


def read_part(file: Any, stored: str, part: Part) -> torch.Tensor:
    """One expert's matrix or scales, of a stack that has passed the check of its shape."""
    view = file.get_slice(stored)
    rows = view.get_shape()[1] // part.of
    begin = part.place * rows
    return view[part.expert : part.expert + 1, begin : begin + rows].squeeze(0).contiguous()
