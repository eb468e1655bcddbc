"""Quantised checkpoints: what a config states, how files store it, and the layer that holds it in the kernels' layout.

    awq                  qweight (K, N/8) int32, qzeros (G, N/8) int32, scales (G, N), as AutoAWQ's GEMM writes them
    gptq                 qweight (K/p, N) int32, qzeros (G, N/p) int32, scales (G, N), g_idx (K,) int32; p = 32 / bits
    compressed-tensors   weight (N, K) float8_e4m3fn, weight_scale (), (1,), (N, 1) or (N/128, K/128)
    fp8                  the same in blocks or of tensors, weight_scale_inv

G groups of columns share scales and zero points. What is quantised is told by the files, not by the lists of modules in
the config, which writers spell in many ways. Only weights are: where a config asks for activations of 8 bits, they stay
in the model's dtype, which is more exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from qwen2vl_kernels import quant_linear
from qwen2vl_kernels.core.quant_layout import (
    COLUMNS,
    FP8,
    pack_columns,
    pack_zeros,
    unpack_columns,
    unpack_zeros,
)

from .errors import CheckpointError
from .quantised_words import ONES, awq_places, pack_rows, unpack_rows

_SCALES = ("F32", "F16", "BF16")

#: What a file stores of a layer: suffix -> (shapes that fit, dtypes that fit).
Stored = dict[str, tuple[tuple[tuple[int, ...], ...], tuple[str, ...]]]


@dataclass(frozen=True)
class Quantization:
    """What ``quantization_config`` states. ``stated`` is that object, which is written again by a save."""

    method: str
    bits: int
    group: int = 0  # columns that share a scale, 0 for all
    act_order: bool = False
    zeros_less_one: bool = False  # GPTQ's first format stores zero points less one
    borrows: bool = False  # which its writer took from whole words, so that a zero point of 0 borrows from the next
    symmetric: bool = False  # GPTQ's word for zero points that are all in the middle
    block: tuple[int, int] = (0, 0)  # of fp8: rows and columns that share a scale, 0 for all
    stated: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def from_dict(cls, stated: Mapping[str, Any]) -> Quantization:
        """Raises :class:`CheckpointError` naming what is not supported."""
        method = stated.get("quant_method")
        readers = {"awq": _awq, "gptq": _gptq, "compressed-tensors": _compressed, "fp8": _fp8}
        if not isinstance(method, str) or method not in readers:
            raise CheckpointError(
                f"quantization_config: quant_method {method!r} is not supported; {', '.join(readers)} are"
            )
        return cls(method, stated=stated, **readers[method](stated))

    @property
    def label(self) -> str:
        """Words for people, "gptq int4, groups of 128" say."""
        if self.bits:
            groups = f"groups of {self.group}" if self.group else "whole rows"
            return f"{self.method} int{self.bits}, {groups}{', act-order' if self.act_order else ''}"
        rows, columns = self.block
        scales = f"blocks of {rows} x {columns}" if columns else "rows" if rows else "tensors"
        return f"{self.method} fp8, {scales}"

    @property
    def scale_name(self) -> str:
        """What files call the scales of fp8."""
        return "weight_scale_inv" if self.method == "fp8" else "weight_scale"

    @property
    def may_be_stored(self) -> Stored:
        """What a file may hold beside :meth:`stored`: scales of activations, which are kept for a save and not used."""
        return {"input_scale": (((), (1,)), _SCALES)} if self.method == "compressed-tensors" else {}

    def stored(self, outputs: int, columns: int) -> Stored:
        """What a file holds of a layer of ``columns`` to ``outputs``, beside its bias.

        Raises :class:`CheckpointError` where no layer of these sizes can be quantised so.
        """
        if columns % COLUMNS:
            raise CheckpointError(f"{columns} columns are no multiple of {COLUMNS}")
        if not self.bits:
            rows, width = self.block
            shapes = ((), (1,), (1, 1))
            if rows:
                shapes = ((-(-outputs // rows), -(-columns // width)),) if width else ((outputs, 1), (outputs,))
            return {"weight": (((outputs, columns),), ("F8_E4M3",)), self.scale_name: (shapes, _SCALES)}
        each = 32 // self.bits
        if outputs % each or (self.method == "awq" and self.group and columns % self.group):
            raise CheckpointError(
                f"{outputs} rows of {columns} are no multiples of {each} rows and of groups of {self.group}"
            )
        groups = -(-columns // self.group) if self.group else 1
        scales = {"qzeros": (((groups, outputs // each),), ("I32",)), "scales": (((groups, outputs),), _SCALES)}
        if self.method == "awq":
            return {"qweight": (((columns, outputs // each),), ("I32",)), **scales}
        indices = {"g_idx": (((columns,),), ("I32",))}
        return {"qweight": (((columns // each, outputs),), ("I32",)), **scales, **indices}


# ------------------------------------------------------------------------------------------------------- what is stated


def _awq(stated: Mapping[str, Any]) -> dict[str, Any]:
    version = str(stated.get("version") or stated.get("format") or "gemm").lower()
    if version != "gemm":
        raise CheckpointError(f"quantization_config: AWQ's version {version!r} is not supported; 'gemm' is")
    if stated.get("zero_point", True) is not True:
        raise CheckpointError("quantization_config: AWQ without zero_point is not supported")
    return {"bits": _bits(stated, (4,)), "group": _group(stated)}


def _gptq(stated: Mapping[str, Any]) -> dict[str, Any]:
    known = {"gptq": True, "gptq_v2": False}
    found = stated.get("checkpoint_format") or "gptq"
    if not isinstance(found, str) or found not in known:
        raise CheckpointError(f"quantization_config: checkpoint_format {found!r} is not supported; gptq, gptq_v2 are")
    if stated.get("dynamic"):
        raise CheckpointError("quantization_config: dynamic, other settings for some layers, is not supported")
    act_order = stated.get("desc_act", False)
    if not isinstance(act_order, bool):
        raise CheckpointError(f"quantization_config: desc_act must be true or false, got {act_order!r}")
    return {
        "bits": _bits(stated, (4, 8)),
        "group": _group(stated),
        "act_order": act_order,
        "zeros_less_one": known[found],
        "borrows": any(one.startswith("gptqmodel:") for one in _writers(stated)),
        "symmetric": stated.get("sym") is True,
    }


def _writers(stated: Mapping[str, Any]) -> list[str]:
    """The programs that wrote a GPTQ checkpoint, "gptqmodel:1.4.0" say, as far as it names them."""
    meta = stated.get("meta")
    named = meta.get("quantizer") if isinstance(meta, dict) else None
    return [one for one in (named if isinstance(named, list) else [named]) if isinstance(one, str)]


def _compressed(stated: Mapping[str, Any]) -> dict[str, Any]:
    if stated.get("format") != "float-quantized":
        raise CheckpointError(
            f"quantization_config: compressed-tensors of format {stated.get('format')!r} are not supported; "
            "'float-quantized' is"
        )
    groups = stated.get("config_groups")
    found = list(groups.values()) if isinstance(groups, dict) else []
    weights = found[0].get("weights") if len(found) == 1 and isinstance(found[0], dict) else None
    if not isinstance(weights, dict):
        raise CheckpointError("quantization_config: config_groups must be one group that has weights")
    if (weights.get("type"), weights.get("num_bits")) != ("float", 8) or weights.get("symmetric", True) is not True:
        raise CheckpointError("quantization_config: weights must be symmetric floats of 8 bits")
    strategy = weights.get("strategy")
    if strategy == "block":
        return {"bits": 0, "block": _block(weights.get("block_structure"), "block_structure")}
    if strategy not in ("tensor", "channel"):
        raise CheckpointError(
            f"quantization_config: strategy {strategy!r} is not supported; tensor, channel and block are"
        )
    return {"bits": 0, "block": (1, 0) if strategy == "channel" else (0, 0)}


def _fp8(stated: Mapping[str, Any]) -> dict[str, Any]:
    if stated.get("fmt", "e4m3") != "e4m3":
        raise CheckpointError(f"quantization_config: fmt {stated.get('fmt')!r} is not supported; 'e4m3' is")
    if "weight_block_size" in stated and stated["weight_block_size"] is None:
        return {"bits": 0}
    return {"bits": 0, "block": _block(stated.get("weight_block_size"), "weight_block_size")}


def _bits(stated: Mapping[str, Any], known: tuple[int, ...]) -> int:
    bits = stated.get("bits", stated.get("w_bit"))
    if type(bits) is not int or bits not in known:
        words = " or ".join(map(str, known))
        raise CheckpointError(f"quantization_config: bits must be {words} for {stated['quant_method']}, got {bits!r}")
    return bits


def _group(stated: Mapping[str, Any]) -> int:
    group = stated.get("group_size", stated.get("q_group_size"))
    if type(group) is not int or (group != -1 and (group < 1 or group % COLUMNS)):
        raise CheckpointError(f"quantization_config: group_size must be -1 or a multiple of {COLUMNS}, got {group!r}")
    return max(group, 0)


def _block(value: object, name: str) -> tuple[int, int]:
    if isinstance(value, list) and [type(n) for n in value] == [int, int] and min(value) > 0 == value[1] % COLUMNS:
        return value[0], value[1]
    raise CheckpointError(
        f"quantization_config: {name} must be two sizes, columns a multiple of {COLUMNS}, got {value!r}"
    )


# -------------------------------------------------------------------------------------------------------------- layers


class QuantLinear(nn.Linear):
    """A linear layer with a quantised weight, as ``qwen2vl_kernels.quant_linear`` reads it.

    ``weight`` is uint8, fp8 too, whose bytes it holds, so that nothing takes it for numbers; it and ``scales`` keep
    their dtypes whatever the model is cast to. ``zeros`` and ``order`` are None where there are none.
    """

    weight: nn.Parameter
    scales: nn.Parameter
    zeros: nn.Parameter | None
    order: nn.Parameter | None
    input_scale: nn.Parameter | None
    bias: nn.Parameter | None  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, like: nn.Linear, how: Quantization) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = like.in_features, like.out_features
        self.how = how
        rows, columns = how.block if how.bits == 0 else (1, how.group)
        self.block = (rows or self.out_features, columns or self.in_features)
        bytes_ = self.in_features * (how.bits or 8) // 8
        self.set("weight", torch.empty(self.out_features, bytes_, dtype=torch.uint8))
        self.set("scales", torch.empty(self.blocks, dtype=torch.float16))
        for name in ("zeros", "order", "input_scale"):
            self.set(name, None)
        self.register_parameter("bias", like.bias)
        self.scale_shape: tuple[int, ...] = ()  # of fp8, as the file has it

    @property
    def blocks(self) -> tuple[int, int]:
        """How many there are, of rows and of columns."""
        return -(-self.out_features // self.block[0]), -(-self.in_features // self.block[1])

    def set(self, name: str, tensor: torch.Tensor | None) -> None:
        """Make a tensor one of the layer's parameters that are not trained."""
        self.register_parameter(name, None if tensor is None else nn.Parameter(tensor, requires_grad=False))

    def _apply(self, fn, recurse=True):
        bias, self._parameters["bias"] = self._parameters["bias"], None
        super()._apply(keeping_dtypes(fn), recurse)
        self._parameters["bias"] = bias
        if bias is not None:
            with torch.no_grad():
                self._parameters["bias"] = nn.Parameter(fn(bias), requires_grad=bias.requires_grad)
        return self

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        weight = self.weight if self.how.bits else self.weight.view(FP8)
        return quant_linear(input, weight, self.scales, self.zeros, self.bias, block=self.block, order=self.order)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.how.label}"


def keeping_dtypes(fn: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """What ``nn.Module`` applies to move and cast parameters, without the cast."""

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        found = fn(tensor)
        return found if found.dtype == tensor.dtype else tensor.to(found.device)

    return moved


class QuantisedTogether(nn.Module):
    """Quantised layers in tensors of several of them."""

    def layers(self) -> dict[str, QuantLinear]:
        """Each by its name in here, of views."""
        raise NotImplementedError


def quantised(model: nn.Module) -> dict[str, QuantLinear]:
    """The layers of a model that hold quantised weights, by name; views of those that lie together."""
    found: dict[str, QuantLinear] = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            found[name] = module
        elif isinstance(module, QuantisedTogether):
            found |= {f"{name}.{part}": one for part, one in module.layers().items()}
    return found


def parameter_count(model: nn.Module) -> int:
    """The values of all parameters, of quantised weights as many as they stand for."""
    holders = [one for one in model.modules() if isinstance(one, (QuantLinear, QuantisedTogether))]
    stored = {p for one in holders for name, p in one.named_parameters() if name != "bias"}
    values = sum(one.in_features * one.out_features for one in quantised(model).values())
    return sum(p.numel() for p in model.parameters() if p not in stored) + values


def stored_so(how: Quantization, names: Mapping[str, str]) -> list[str]:
    """The modules that files quantise, of which ``names`` has the model's name of every stored tensor -> its dtype."""
    marks = (".qweight",) if how.bits else (".weight",)
    return [
        name.rpartition(".")[0]
        for name, dtype in names.items()
        if name.endswith(marks) and (how.bits or dtype == "F8_E4M3")
    ]


def place(model: nn.Module, layers: Mapping[str, nn.Linear], how: Quantization, found: Collection[str]) -> None:
    """Put a :class:`QuantLinear` in the place of every one of ``layers`` that is ``found`` quantised in the files.

    Raises :class:`CheckpointError` where what is quantised is no linear layer of the decoder or of the tower's blocks,
    or none is, or its sizes do not allow it.
    """
    if other := [name for name in found if name not in layers]:
        raise CheckpointError(
            f"{other[0]}: is quantised, and no linear layer of the decoder or of the tower's blocks; only these may be"
        )
    if not found:
        raise CheckpointError(f"quantization_config says {how.label}, but no layer in the files is quantised so")
    for name in found:
        try:
            how.stored(layers[name].out_features, layers[name].in_features)
        except CheckpointError as error:
            raise CheckpointError(f"{name}: cannot be {how.label}: {error}") from None
        model.set_submodule(name, QuantLinear(layers[name], how))


# ------------------------------------------------------------------------------------------------ from and to the files


def from_stored(
    layer: QuantLinear, tensors: Mapping[str, torch.Tensor], order: torch.Tensor | None = None
) -> dict[str, torch.Tensor | None]:
    """The layer's parameters from what :meth:`Quantization.stored` names, whose shapes and dtypes have been checked.

    ``order``: of the columns of a rank's part, see :class:`qwen2vl.quantised_slices.Part`; default what g_idx says.

    Raises :class:`CheckpointError` where values make no sense.
    """
    how, bits = layer.how, layer.how.bits
    if bits == 0:
        scale = tensors[how.scale_name]
        layer.scale_shape = tuple(scale.shape)
        if not scale.isfinite().all():
            raise CheckpointError(f"{how.scale_name}: some are no finite numbers")
        return {
            "weight": tensors["weight"].view(torch.uint8),
            "scales": scale.reshape(layer.blocks),
            "input_scale": tensors.get("input_scale"),
        }
    scales = _turned(tensors["scales"])
    if not scales.isfinite().all():
        raise CheckpointError("scales: some are no finite numbers")
    zeros = unpack_rows(tensors["qzeros"], bits)  # (G, N)
    if how.method == "awq":
        columns_of = awq_places(layer.out_features)
        q = unpack_rows(tensors["qweight"], bits)[:, columns_of].T
        zeros = zeros[:, columns_of]
        order = None
    else:
        q = unpack_rows(tensors["qweight"].T, bits)
        # Some writers of the first format store the zero points of symmetric weights as they are, and readers that know
        # these need none do not notice; less one, they would not be in the middle.
        if how.zeros_less_one and not (how.symmetric and bool((zeros == 1 << (bits - 1)).all())):
            # AutoGPTQ spread the borrow of a zero point of 0 over all of its word; its readers made it 16.
            if not how.borrows and bool((zeros == (1 << bits) - 1).any()):
                raise CheckpointError(
                    f"qzeros: hold {(1 << bits) - 1}, a zero point of 0 less one, of which checkpoint_format gptq's "
                    "writers make different things, and meta.quantizer does not name gptqmodel, whose way is known; "
                    "save the checkpoint as gptq_v2"
                )
            zeros = unpack_rows(tensors["qzeros"] + ONES[bits], bits)
        order = _order(tensors["g_idx"], layer.block[1], how.act_order) if order is None else order.to(q.device)
        if order is not None:
            filling = (order < 0).nonzero().flatten()
            order = order.clamp(0)
            q = q[:, order]
            q[:, filling] = zeros.T[:, filling // layer.block[1]]  # as its zero point: it counts for nothing
    same = bool((zeros == 1 << (bits - 1)).all())
    return {
        "weight": pack_columns(q.contiguous(), bits),
        "scales": scales,
        "zeros": None if same else pack_zeros(_turned(zeros), bits),
        "order": None if order is None else order.int(),
    }


def to_stored(layer: QuantLinear) -> Iterator[tuple[str, torch.Tensor]]:
    """What :func:`from_stored` was given."""
    how, bits = layer.how, layer.how.bits
    if bits == 0:
        yield "weight", layer.weight.detach().view(FP8)
        yield how.scale_name, layer.scales.detach().reshape(layer.scale_shape)
        if layer.input_scale is not None:
            yield "input_scale", layer.input_scale.detach()
        return
    q, groups = unpack_columns(layer.weight.detach(), bits), layer.scales.shape[1]
    order = torch.arange(layer.in_features, device=q.device) if layer.order is None else layer.order.long()
    if layer.zeros is None:
        zeros = torch.full((layer.out_features, groups), 1 << (bits - 1), dtype=torch.uint8, device=q.device)
    else:
        zeros = unpack_zeros(layer.zeros.detach(), bits, groups)
    zeros = _turned(zeros)
    if how.method == "awq":
        places = torch.argsort(awq_places(layer.out_features)).to(q.device)
        yield "qweight", pack_rows(q.T[:, places], bits)
        yield "qzeros", pack_rows(zeros[:, places], bits)
    else:
        back = torch.argsort(order)
        yield "qweight", pack_rows(q[:, back], bits).T.contiguous()
        words = pack_rows(zeros, bits)
        yield "qzeros", words - ONES[bits] if how.zeros_less_one else words
        yield "g_idx", (back // layer.block[1]).int()
    yield "scales", layer.scales.detach().T.contiguous()


def _turned(matrix: torch.Tensor) -> torch.Tensor:
    """The transpose with rows in one piece each, one group's too, whose strides ``contiguous`` would leave alone."""
    return matrix.T.clone(memory_format=torch.contiguous_format)


def _order(g_idx: torch.Tensor, group: int, act_order: bool) -> torch.Tensor | None:
    """The columns of each group one after another, None where they come so."""
    columns = g_idx.numel()
    wanted = torch.arange(columns) // group
    found = g_idx.cpu().long()
    if torch.equal(found, wanted) or (not act_order and not found.any()):  # some writers leave zeros there
        return None
    order = torch.argsort(found, stable=True)
    if not torch.equal(found[order], wanted):
        groups = math.ceil(columns / group)
        raise CheckpointError(f"g_idx: must name each of {groups} groups {group} times, the last one for what is left")
    if not act_order:
        raise CheckpointError("g_idx: columns are out of their order, but desc_act is false")
    return order.to(g_idx.device)
