"""LoRA adapters (arXiv 2106.09685) in peft's layout: read beside a checkpoint, written by training, merged on request.

    adapter_config.json          rank, alpha, what is adapted
    adapter_model.safetensors    base_model.model.<name in transformers>.lora_A.weight (r, in), .lora_B.weight (out, r)

An adapted layer computes ``x W^T + b + s (x A^T) B^T``, ``s = alpha / r``, or ``alpha / sqrt(r)`` with ``use_rslora``.
Of stacked experts (``target_parameters``) each has an A and a B of its own, and W + s B A is made of all of them at
every call. Files of peft 0.19.1 and later hold the A of expert e in rows ``[e r, (e + 1) r)`` of
``.mlp.experts.lora_A.weight (E r, in)`` and its B in every E-th column from e on of ``lora_B (out, r E)``. Where both
of the experts' parameters are adapted, these are ``down_proj``'s, and ``gate_up_proj``'s come under
``.mlp.experts.base_layer``.

The layers are peft's; what of an adapter they would not compute is refused by name.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from . import hub
from .errors import CheckpointError, install_hint
from .files import read_json, withdraw_json, write_json, write_whole
from .moe import Experts
from .quantization import QuantLinear
from .weights import our_name

if TYPE_CHECKING:
    from .model import Qwen2VL

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_NAME = "default"  # of the adapter, inside peft's layers
#: Keys of adapter_config.json that say nothing about what is computed, or that are read here.
_KNOWN = (
    "peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "exclude_modules", "layers_to_transform",
    "target_parameters", "layers_pattern", "megatron_core", "qalora_group_size", "runtime_config", "eva_config",
    "init_lora_weights",
)  # fmt: skip
#: The first of peft's versions whose adapters of stacked experts are laid out so: before, in and out were exchanged.
_STACKED_SINCE = "0.19.1"
#: What of stacked experts may be adapted, in the order in which peft puts its layers around one another.
_STACKED = ("gate_up_proj", "down_proj")
#: Of the ways to begin, those that leave the weights of the base as they are.
_BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class LoraShape:
    """What an adapter's layers have in common."""

    rank: int
    alpha: float
    dropout: float = 0.0
    rslora: bool = False


def linear_layers(model: Qwen2VL) -> dict[str, nn.Linear]:
    """Those of the decoder's layers and of the tower's blocks, by name, without those of adapters.

    The merger, the patch embedding and the head give their weights to kernels.
    """
    parts = (("model.layers", model.model.layers), ("visual.blocks", model.visual.blocks))
    return {
        f"{prefix}.{name}": module
        for prefix, part in parts
        for name, module in part.named_modules()
        if isinstance(module, nn.Linear) and ".lora_" not in f".{name}"
    }


def adaptable(model: Qwen2VL) -> dict[str, nn.Linear]:
    """The linear layers that may have adapters: all but those of routed experts, which are no such layers where they
    are not quantised."""
    return {name: one for name, one in linear_layers(model).items() if ".mlp.experts." not in name}


def stacked_experts(model: nn.Module) -> dict[str, Experts]:
    """The routed experts that may have adapters, by name: those that are not quantised."""
    return {name.removesuffix(".base_layer").removesuffix(".base_layer"): module
            for name, module in model.named_modules() if isinstance(module, Experts)}  # fmt: skip


def adapted(model: nn.Module) -> dict[str, Any]:
    """peft's layers in a model, by the name of the layer that each of them adapts."""
    return {name: module for name, module in model.named_modules()
            if hasattr(module, "lora_A") and hasattr(module, "get_delta_weight")}  # fmt: skip


def add_layers(model: Qwen2VL, names: Iterable[str], shape: LoraShape, parameters: Iterable[str] = ()) -> None:
    """Put adapters that change nothing yet onto the layers of those names, of :func:`adaptable`, and ``parameters`` of
    stacked experts.

    Then only they learn. Raises :class:`ImportError` without peft, and :class:`CheckpointError` for experts with one
    that is too old.
    """
    import peft  # pyright: ignore[reportMissingImports]

    names, parameters = list(names), list(parameters)
    if parameters and not _lays_out_so(peft.__version__):
        raise CheckpointError(f"adapter: experts need peft {_STACKED_SINCE} or later, got {peft.__version__}")
    model.requires_grad_(False)
    for prefix, part in (("model.layers.", model.model.layers), ("visual.blocks.", model.visual.blocks)):
        modules, stacked = ([name.removeprefix(prefix) for name in of if name.startswith(prefix)]
                            for of in (names, parameters))  # fmt: skip
        if modules or stacked:
            settings = peft.LoraConfig(
                r=shape.rank,
                lora_alpha=shape.alpha,  # type: ignore[arg-type]  # an int there, but only divided by the rank
                lora_dropout=shape.dropout,
                use_rslora=shape.rslora,
                target_modules=modules,
                target_parameters=stacked or None,
            )
            peft.inject_adapter_in_model(settings, part)


def _lays_out_so(version: object) -> bool:
    """Whether this version of peft is known to write adapters of stacked experts as they are read here."""
    found = re.match(r"(\d+)\.(\d+)\.(\d+)", version) if isinstance(version, str) else None
    return found is not None and tuple(map(int, found.groups())) >= tuple(map(int, _STACKED_SINCE.split(".")))


# ------------------------------------------------------------------------------------------------------------- reading


def load_adapter(model: Qwen2VL, name_or_path: str | os.PathLike[str]) -> None:
    """Put the adapter in a folder, or of a hub id, onto ``model``, in float32 as peft does; the base stays as it is.

    Raises :class:`CheckpointError`: no adapter, one that is not for this model, one with parts that are not LoRA of a
    linear layer of the decoder or of the tower's blocks (DoRA, ``modules_to_save``, biases, patterns of ranks ...), a
    model that has one already, or peft is missing.
    """
    if model.parallel is not None:
        raise CheckpointError("adapter: wants a whole model; merge it, then load the result in parallel")
    if adapted(model):
        raise CheckpointError("adapter: the model has one; merge it before another is added")
    folder = hub.resolve(name_or_path)
    shape, targets, parameters = _read_config(folder)
    layers, experts = adaptable(model), _adapted_parameters(model, parameters)
    sizes = {name: ((shape.rank, one.in_features), (one.out_features, shape.rank)) for name, one in layers.items()}
    for name, parameter in experts.items():
        count, outputs, inputs = model.get_parameter(parameter).shape
        sizes[name] = ((count * shape.rank, inputs), (outputs, count * shape.rank))
    tensors = _read_tensors(folder, sizes)
    if missing := [parameter for name, parameter in experts.items() if name not in tensors]:
        raise CheckpointError(f"{folder}: target_parameters name {missing[0]}, of which {WEIGHTS_NAME} holds nothing")
    if targets is not None:
        named = [name for name in layers if any(f".{_theirs(name)}".endswith(f".{target}") for target in targets)]
        if missing := [name for name in named if name not in tensors]:
            raise CheckpointError(f"{folder}: target_modules name {missing[0]}, of which {WEIGHTS_NAME} holds nothing")
    try:
        with torch.random.fork_rng(devices=[]):  # peft draws what is replaced below
            add_layers(model, [name for name in tensors if name in layers], shape, experts.values())
    except ImportError as error:
        raise CheckpointError(f"adapter: needs the package peft; {install_hint('peft')}") from error
    for name, layer in adapted(model).items():
        for side, tensor in zip(("lora_A", "lora_B"), tensors[name], strict=True):
            parameter = getattr(layer, side)[_NAME].weight
            parameter.data = tensor.to(device=parameter.device, dtype=torch.float32)
    model.eval()


def _adapted_parameters(model: nn.Module, targets: list[str]) -> dict[str, str]:
    """The name of peft's layer -> the parameter of stacked experts that it adapts.

    Raises :class:`CheckpointError` for a target that is none.
    """
    found: dict[str, str] = {}
    met: set[str] = set()
    for name in stacked_experts(model):
        chosen = []
        for leaf in _STACKED:
            # In transformers' words; those of a language model alone are ours.
            ends = [one for one in targets for whole in (name, _theirs(name)) if f".{whole}.{leaf}".endswith(f".{one}")]
            met.update(ends)
            chosen += [leaf] if ends else []
        for depth, leaf in enumerate(reversed(chosen)):
            found[name + depth * ".base_layer"] = f"{name}.{leaf}"
    if unknown := [one for one in targets if one not in met]:
        raise CheckpointError(f"adapter: target_parameters name {unknown[0]!r}, and no experts of the model have it")
    return found


def _read_config(folder: Path) -> tuple[LoraShape, list[str] | None, list[str]]:
    """The shape, the names that adapted layers end with, None where the file says it in another way, and those that
    parameters of experts end with."""
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise CheckpointError(f"{folder}: holds no {CONFIG_NAME}, so it is no adapter in peft's layout")
    config = read_json(path)
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        got = config.get("peft_type") if isinstance(config, dict) else config
        raise CheckpointError(f"{path}: wants a LoRA adapter (peft_type 'LORA'), got {got!r}")
    for key, value in config.items():
        neutral = value in (None, False, "none") or value in ({}, [])
        if key not in _KNOWN and not neutral:
            raise CheckpointError(f"{path}: {key} is {value!r}, which is not supported")
    if config.get("init_lora_weights") not in _BEGINNINGS:
        raise CheckpointError(
            f"{path}: init_lora_weights is {config['init_lora_weights']!r}, which changes the base's weights and is "
            "not supported; convert the adapter to plain LoRA with peft"
        )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise CheckpointError(f"{path}: r must be a positive integer, got {rank!r}")
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not abs(alpha) < 1e300:  # NaN neither
        raise CheckpointError(f"{path}: lora_alpha must be a number, got {alpha!r}")
    targets = config.get("target_modules")
    narrowed = any(config.get(key) is not None for key in ("layers_to_transform", "exclude_modules"))
    listed = isinstance(targets, list) and all(isinstance(one, str) for one in targets)
    shape = LoraShape(rank, float(alpha), rslora=bool(config.get("use_rslora")))
    parameters = config.get("target_parameters") or []
    if not isinstance(parameters, list) or not all(isinstance(one, str) and one for one in parameters):
        raise CheckpointError(f"{path}: target_parameters must be a list of names, got {parameters!r}")
    if parameters and not _lays_out_so(config.get("peft_version")):
        raise CheckpointError(
            f"{path}: adapters of experts are read as peft {_STACKED_SINCE} and later write them, which before "
            f"exchanged their sides; peft_version is {config.get('peft_version')!r}"
        )
    return shape, targets if listed and not narrowed else None, parameters


def _read_tensors(
    folder: Path, sizes: Mapping[str, tuple[tuple[int, int], tuple[int, int]]]
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The name of an adapted layer -> its A and B, of ``sizes``."""
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        pickled = " (adapter_model.bin can run code when read; save it as safetensors with peft)"
        hint = pickled if (folder / "adapter_model.bin").is_file() else ""
        raise CheckpointError(f"{folder}: holds no {WEIGHTS_NAME}{hint}")
    try:
        stored = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged or truncated: {error}") from error
    found: dict[str, dict[str, torch.Tensor]] = {}
    problems: list[str] = []
    for key, tensor in stored.items():
        name, _, side = our_name(key.removeprefix(_PREFIX)).removesuffix(".weight").rpartition(".")
        if side not in ("lora_A", "lora_B") or name not in sizes:
            problems.append(f"{key}: is no part of LoRA of a linear layer of the decoder or of the tower's blocks")
            if ".mlp.experts." in key:
                problems[-1] += "; routed experts have adapters of the stacked kind, as target_parameters says"
            continue
        want = sizes[name][side == "lora_B"]
        if tuple(tensor.shape) != want or not tensor.is_floating_point():
            problems.append(f"{key}: {tensor.dtype} {tuple(tensor.shape)}, rank and model want floats {want}")
        found.setdefault(name, {})[side] = tensor
    problems += [f"{name}: only {next(iter(sides))} is there" for name, sides in found.items() if len(sides) < 2]
    if not stored:
        problems.append("it holds no tensor")
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise CheckpointError(f"{path}: " + "; ".join(problems[:8]) + more)
    return {name: (sides["lora_A"], sides["lora_B"]) for name, sides in found.items()}


# ------------------------------------------------------------------------------------------------------------- writing


def adapter_parameters(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The adapter's parameters under peft's names."""
    for name, layer in adapted(model).items():
        for side in ("lora_A", "lora_B"):
            yield f"{_PREFIX}{_theirs(name)}.{side}.weight", getattr(layer, side)[_NAME].weight.detach()


def write_adapter(model: Qwen2VL, folder: Path, tensors: dict[str, torch.Tensor], *, base: str | None = None) -> None:
    """Write ``tensors``, which :func:`adapter_parameters` gave, and their configuration, as peft does.

    ``base``: name of the checkpoint that was adapted. Raises :class:`CheckpointError` for a model without adapter.
    """
    layers = adapted(model)
    if not layers:
        raise CheckpointError("adapter: the model has none to be saved")
    layer = next(iter(layers.values()))
    rank, alpha = layer.r[_NAME], layer.lora_alpha[_NAME]
    experts = {_parameter_name(name, one) for name, one in layers.items() if _of_parameter(one)}
    layers = {name: one for name, one in layers.items() if not _of_parameter(one)}
    leaves = {name.rpartition(".")[2] for name in layers}
    # The last parts of names say which layers where no others have them; those of the tower others do have.
    whole = {
        name.removesuffix(".base_layer")
        for name in adaptable(model)
        if name.removesuffix(".base_layer").rpartition(".")[2] in leaves
    }
    plain = whole == set(layers) and all(name.startswith("model.layers.") for name in layers)
    config = {
        "base_model_name_or_path": base,
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": getattr(layer.lora_dropout[_NAME], "p", 0.0),
        "modules_to_save": None,
        "peft_type": "LORA",
        **({"peft_version": _STACKED_SINCE} if experts else {}),
        "r": rank,
        "target_modules": sorted(leaves) if plain else [_theirs(name) for name in layers],
        "target_parameters": _targets(model, experts),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": not math.isclose(layer.scaling[_NAME], alpha / rank),
    }
    folder.mkdir(parents=True, exist_ok=True)
    held = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}

    def write(path: Path) -> None:
        save_file(held, path, metadata={"format": "pt"})
        withdraw_json(folder / CONFIG_NAME, config)  # its scale is not that of other weights

    write_whole(folder / WEIGHTS_NAME, write)
    write_json(folder / CONFIG_NAME, config)


def _targets(model: nn.Module, parameters: Iterable[str]) -> list[str] | None:
    """The names that end those of ``parameters`` of experts, and of no others."""
    found = set(parameters)
    leaves = {name.rpartition(".")[2] for name in found}
    if found == {f"{name}.{leaf}" for name in stacked_experts(model) for leaf in leaves}:
        return [f"mlp.experts.{leaf}" for leaf in sorted(leaves)] or None
    return [_theirs(name) for name in sorted(found)]


def _theirs(name: str) -> str:
    """The name of a layer in transformers, 4.52 and later."""
    return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else f"model.{name}"


# ------------------------------------------------------------------------------------------------------------- merging


def merged_parameters(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The model's parameters under their released names, adapters added to the weights that they adapt, one after
    another, so that no more than one merged matrix is held."""
    found = adapted(model)
    _refuse_quantised(found)
    layers = {id(_parameter(layer)): layer for layer in found.values()}
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            continue
        tensor, layer = parameter.detach(), layers.get(id(parameter))
        yield re.sub(r"(\.base_layer)+\.", ".", name), tensor if layer is None else _merged(tensor, layer)


def merge_layers(model: Qwen2VL) -> None:
    """Put every adapted layer's sum in its place; nothing of the adapter is left.

    Raises :class:`CheckpointError` where one adapts quantised weights, in which the sum would be rounded away.
    """
    layers = adapted(model)
    _refuse_quantised(layers)
    for layer in layers.values():
        parameter = _parameter(layer)
        parameter.data = _merged(parameter.detach(), layer)
    for name, layer in layers.items():
        if not name.endswith(".base_layer"):  # inside of another, which is taken away with it
            model.set_submodule(name, layer.get_base_layer())
    for part in (model.model.layers, model.visual.blocks):
        if hasattr(part, "peft_config"):
            del part.peft_config


def _of_parameter(layer: Any) -> bool:
    """Whether one of peft's layers adapts a parameter of a module and not a linear layer."""
    return hasattr(layer, "parameter_name")


def _parameter(layer: Any) -> nn.Parameter:
    """What one of peft's layers adapts."""
    return layer.get_param() if _of_parameter(layer) else layer.base_layer.weight


def _parameter_name(name: str, layer: Any) -> str:
    return f"{name.removesuffix('.base_layer')}.{layer.parameter_name}"


def _refuse_quantised(layers: dict[str, Any]) -> None:
    for name, layer in layers.items():
        if isinstance(layer.base_layer, QuantLinear):
            raise CheckpointError(
                f"adapter: {name} is quantised ({layer.base_layer.how.label}), and the sum would be rounded to its few "
                "values; merge into the checkpoint in 16 bits, or keep the adapter beside this one"
            )


def _merged(weight: torch.Tensor, layer: Any) -> torch.Tensor:
    return (weight.float() + layer.get_delta_weight(_NAME).detach().float()).to(weight.dtype)
