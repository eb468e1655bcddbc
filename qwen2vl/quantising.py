"""Quantising a model's decoder: the nearest integers of each group, or the nearest numbers in fp8, without training.

Integers of a group of columns come from one scale, and with AWQ a zero point. Its range is that of the weights, or a
little less where that makes their squared error smaller: most of a group then gets finer steps, and its largest weight
is cut.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from qwen2vl_kernels.core.quant_layout import FP8, pack_columns, pack_zeros

from .adapter import adaptable, adapted
from .errors import CheckpointError
from .model import Qwen2VL
from .quantization import Quantization, QuantLinear, quantised
from .weights import Progress

#: What is kept in 16 bits, in the words of the released checkpoints' configs.
_KEPT = ["visual", "lm_head"]
#: Shares of a group's range that are tried.
_RANGES = (1.0, 0.95, 0.9, 0.85, 0.8)


def stated(form: str, group_size: int) -> dict[str, Any]:
    """The ``quantization_config`` of a form: ``"awq"``, ``"gptq-int4"``, ``"gptq-int8"`` or ``"fp8"``.

    ``group_size``: columns of a group, -1 for whole rows; of no meaning for fp8, whose rows have a scale each. Raises
    :class:`CheckpointError` for an unknown form.
    """
    if form == "awq":
        how: dict[str, Any] = {"quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": True}
        return how | {"version": "gemm", "modules_to_not_convert": _KEPT}
    if form in ("gptq-int4", "gptq-int8"):
        how = {"quant_method": "gptq", "bits": int(form[-1]), "group_size": group_size, "desc_act": False, "sym": True}
        return how | {"checkpoint_format": "gptq", "lm_head": False, "modules_to_not_convert": _KEPT}
    if form == "fp8":
        weights = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}
        group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
        how = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": group}}
        return how | {"ignore": ["re:.*visual.*", "lm_head"], "quantization_status": "compressed"}
    raise CheckpointError(f"form must be one of awq, gptq-int4, gptq-int8, fp8, got {form!r}")


@torch.no_grad()
def quantise(model: Qwen2VL, form: str, group_size: int = 128, progress: Progress | None = None) -> Qwen2VL:
    """Quantise the decoder's linear layers in place, and return the model, whose config then says so.

    Args:
        form, group_size: as :func:`stated`.
        progress: called with (layers done, layers in all).

    Raises :class:`CheckpointError` for a model that is quantised or adapted, and where sizes do not allow the form;
    the model is not touched then.
    """
    if quantised(model) or adapted(model):
        raise CheckpointError("quantise: wants a model in 16 or 32 bits without an adapter that is not merged")
    how = Quantization.from_dict(stated(form, group_size))
    layers = {name: one for name, one in adaptable(model).items() if name.startswith("model.layers.")}
    for name, layer in layers.items():
        try:
            how.stored(layer.out_features, layer.in_features)
            if how.group and layer.in_features % how.group:
                raise CheckpointError(f"{layer.in_features} columns are no multiple of groups of {how.group}")
        except CheckpointError as error:
            raise CheckpointError(f"{name}: cannot be {how.label}: {error}") from None
    for done, (name, layer) in enumerate(layers.items(), 1):
        model.set_submodule(name, nearest(layer, how))
        if progress is not None:
            progress(done, len(layers))
    model.config = replace(model.config, quantization=how)
    return model


def nearest(layer: nn.Linear, how: Quantization) -> QuantLinear:
    """The layer with its weight rounded."""
    made, weight = QuantLinear(layer, how), layer.weight.detach().float()
    if not how.bits:
        scale = (weight.abs().amax(1, keepdim=True) / torch.finfo(FP8).max).clamp_min(1e-12)
        made.set("weight", (weight / scale).to(FP8).view(torch.uint8))
        made.set("scales", scale)
        made.scale_shape = tuple(scale.shape)
        return made
    q, zeros, scales = _integers(weight.unflatten(1, (-1, made.block[1])), how)
    made.set("weight", pack_columns(q.flatten(1), how.bits))
    made.set("scales", scales)
    made.set("zeros", pack_zeros(zeros, how.bits) if how.method == "awq" else None)
    return made


def _integers(groups: torch.Tensor, how: Quantization) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(N, G, columns)`` weights to integers of that shape, ``(N, G)`` zero points and ``(N, G)`` float16 scales."""
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
        error = ((q - zeros.unsqueeze(2)) * scales.unsqueeze(2) - groups).square().sum(2)
        if best is None:
            best = [q, zeros, scales, error]
            continue
        better = error < best[3]
        for n, found in enumerate((q, zeros, scales, error)):
            best[n] = torch.where(better.unsqueeze(2) if found.ndim == 3 else better, found, best[n])
    assert best is not None
    return best[0].byte(), best[1].byte(), best[2].half()
