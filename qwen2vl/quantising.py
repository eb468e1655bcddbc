"""Quantising a model's decoder: the nearest integers of each group, or the nearest numbers in fp8, without training.

With AWQ, activations of a calibration may choose which channels of the layers are rounded more finely; see ``awq``.

Integers of a group of columns come from one scale, and with AWQ a zero point. Its range is that of the weights, or a
little less where that makes their squared error smaller: most of a group then gets finer steps, and its largest weight
is cut. With activations of a calibration at hand, the error of a column counts as much as these are large.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from qwen2vl_kernels.core.quant_layout import FP8, pack_columns, pack_zeros

from . import awq
from .adapter import adaptable, adapted
from .errors import CheckpointError
from .model import Qwen2VL
from .moe import Experts, SeparateExperts, SparseMoE
from .quantised_experts import put_together
from .quantization import Quantization, QuantLinear, quantised
from .text import Layer
from .weights import Progress

#: What is kept in 16 bits, in the words of the released checkpoints' configs.
_KEPT = ["visual", "lm_head"]
#: Shares of a group's range that are tried.
_RANGES = (1.0, 0.95, 0.9, 0.85, 0.8)


def stated(form: str, group_size: int, kept: Sequence[str] = ()) -> dict[str, Any]:
    """The ``quantization_config`` of a form: ``"awq"``, ``"gptq-int4"``, ``"gptq-int8"`` or ``"fp8"``.

    ``group_size``: columns of a group, -1 for whole rows; of no meaning for fp8, whose rows have a scale each.
    ``kept``: linear layers of the decoder that keep 16 bits. Raises :class:`CheckpointError` for an unknown form.
    """
    if form == "awq":
        how: dict[str, Any] = {"quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": True}
        return how | {"version": "gemm", "modules_to_not_convert": [*_KEPT, *kept]}
    if form in ("gptq-int4", "gptq-int8"):
        how = {"quant_method": "gptq", "bits": int(form[-1]), "group_size": group_size, "desc_act": False, "sym": True}
        return how | {"checkpoint_format": "gptq", "lm_head": False, "modules_to_not_convert": [*_KEPT, *kept]}
    if form == "fp8":
        weights = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}
        group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
        how = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": group}}
        return how | {"ignore": ["re:.*visual.*", "lm_head", *kept], "quantization_status": "compressed"}
    raise CheckpointError(f"form must be one of awq, gptq-int4, gptq-int8, fp8, got {form!r}")


@torch.no_grad()
def quantise(
    model: Qwen2VL,
    form: str,
    group_size: int = 128,
    progress: Progress | None = None,
    *,
    calibration: Iterable[Mapping[str, torch.Tensor]] | None = None,
) -> Qwen2VL:
    """Quantise the decoder's linear layers in place, and return the model, whose config then says so.

    Args:
        form, group_size: as :func:`stated`.
        progress: called with (layers done, layers in all).
        calibration: for ``"awq"``: conversations as :class:`qwen2vl.Processor` gives them, read once before anything is
            quantised, whose activations choose the scales of :mod:`qwen2vl.awq`.

    Routers and the gates of shared experts keep their bits.

    Raises :class:`CheckpointError` for a model that is quantised, adapted or is held by several ranks, where sizes do
    not allow the form, and for a calibration of another form or with experts; :class:`PromptError` for one without
    conversations. The model is not touched then.
    """
    if quantised(model) or adapted(model):
        raise CheckpointError("quantise: wants a model in 16 or 32 bits without an adapter that is not merged")
    if model.parallel is not None:
        raise CheckpointError(
            "quantise: wants a whole model; quantise it in one process, then load the result in parallel"
        )
    sparse = {n: mlp for n, layer in enumerate(model.model.layers)
              if isinstance(mlp := layer.get_submodule("mlp"), SparseMoE)}  # fmt: skip
    experts = {n: SeparateExperts(mlp.experts) for n, mlp in sparse.items() if isinstance(mlp.experts, Experts)}
    gates = [f"model.layers.{n}.mlp.{name}" for n in experts for name in ("gate", "shared_expert_gate")]
    layers = {name: one for name, one in adaptable(model).items() if name.startswith("model.layers.")}
    kept = [name for name in gates if layers.pop(name, None) is not None]
    for n, separate in experts.items():
        prefix = f"model.layers.{n}.mlp.experts"
        layers |= {f"{prefix}.{name}": one for name, one in separate.named_modules() if isinstance(one, nn.Linear)}
    how = Quantization.from_dict(stated(form, group_size, kept))
    if calibration is not None and how.method != "awq":
        raise CheckpointError(f"calibration: is of form awq, which has scales to choose, got form {form!r}")
    if calibration is not None and experts:
        raise CheckpointError("calibration: wants a dense model, an expert would see few of its tokens")
    for name, layer in layers.items():
        try:
            how.stored(layer.out_features, layer.in_features)
            if how.group and layer.in_features % how.group:
                raise CheckpointError(f"{layer.in_features} columns are no multiple of groups of {how.group}")
        except CheckpointError as error:
            raise CheckpointError(f"{name}: cannot be {how.label}: {error}") from None
    seen = None if calibration is None else awq.collect(model, calibration)
    done, squares = 0, {}
    for n, decoder_layer in enumerate(model.model.layers):
        if n in experts:
            sparse[n].experts = experts.pop(n)
        within = [name for name in layers if name.startswith(f"model.layers.{n}.")]
        if seen is not None:
            for name in within:
                layers[name].weight = nn.Parameter(layers[name].weight.float(), requires_grad=False)
            assert isinstance(decoder_layer, Layer)
            squares = awq.scale(decoder_layer, seen[n], partial(_rounded, how))
        for name in within:
            layer = layers.pop(name)
            model.set_submodule(name, nearest(layer, how, squares.get(layer)))
            done += 1
            if progress is not None:
                progress(done, done + len(layers))
        put_together(decoder_layer.get_submodule("mlp"))
    model.config = replace(model.config, quantization=how)
    return model


def nearest(layer: nn.Linear, how: Quantization, squares: torch.Tensor | None = None) -> QuantLinear:
    """The layer with its weight rounded; ``squares (K,)``: how much the errors of a column's integers matter."""
    made, weight = QuantLinear(layer, how), layer.weight.detach().float()
    if not how.bits:
        scale = (weight.abs().amax(1, keepdim=True) / torch.finfo(FP8).max).clamp_min(1e-12)
        made.set("weight", (weight / scale).to(FP8).view(torch.uint8))
        made.set("scales", scale)
        made.scale_shape = tuple(scale.shape)
        return made
    q, zeros, scales = _integers(weight.unflatten(1, (-1, made.block[1])), how, squares)
    made.set("weight", pack_columns(q.flatten(1), how.bits))
    made.set("scales", scales)
    made.set("zeros", pack_zeros(zeros, how.bits) if how.method == "awq" else None)
    return made


def _rounded(how: Quantization, weight: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
    """The values of the integers that :func:`nearest` makes of a float32 weight."""
    q, zeros, scales = _integers(weight.unflatten(1, (-1, how.group or weight.shape[1])), how, squares)
    return ((q.float() - zeros.unsqueeze(2)) * scales.float().unsqueeze(2)).flatten(1)


def _integers(
    groups: torch.Tensor, how: Quantization, squares: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(N, G, columns)`` weights to integers of that shape, ``(N, G)`` zero points and ``(N, G)`` float16 scales."""
    weighing = 1.0 if squares is None else squares.view(groups.shape[1:])
    top, best = (1 << how.bits) - 1, None
    low, high = groups.amin(2).clamp_max(0), groups.amax(2).clamp_min(0)
    if how.method != "awq":  # symmetric
        high = torch.maximum(high, -low)
        low = -high
    for share in _RANGES:
        # The scale is what will be stored: float16's smallest where a group holds nothing but zeros.
        scales = ((high - low) * share / top).clamp(torch.finfo(torch.float16).tiny, torch.finfo(torch.float16).max)
        scales = scales.half().float()
        middle = torch.full_like(low, (top + 1) // 2)
        zeros = (-low * share / scales).round().clamp(0, top) if how.method == "awq" else middle
        q = ((groups / scales.unsqueeze(2)).round() + zeros.unsqueeze(2)).clamp(0, top)
        error = ((q - zeros.unsqueeze(2)) * scales.unsqueeze(2) - groups).square().mul(weighing).sum(2)
        if best is None:
            best = [q, zeros, scales, error]
            continue
        better = error < best[3]
        for n, found in enumerate((q, zeros, scales, error)):
            best[n] = torch.where(better.unsqueeze(2) if found.ndim == 3 else better, found, best[n])
    assert best is not None
    return best[0].byte(), best[1].byte(), best[2].half()
