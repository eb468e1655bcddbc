"""The mixture of experts in a config.json, in the words of Qwen2-MoE's and Qwen3-VL-MoE's (arXiv 2407.10671, 2.2.2).

No released Qwen2-VL has one. A checkpoint that has is of the model type ``qwen2_vl_moe``, so that what knows dense
decoders only refuses it, and does not draw the missing matrices at random.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from .errors import CheckpointError

MODEL_TYPE = "qwen2_vl_moe"
#: What no model has, and building one would not end with.
_MOST_EXPERTS = 10_000
_REQUIRED = ("num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob")
_OPTIONAL = ("shared_expert_intermediate_size", "decoder_sparse_step", "mlp_only_layers", "router_aux_loss_coef")
#: How other families count their experts, which would be read as a dense decoder without a word.
_OTHERS = ("num_local_experts", "n_routed_experts")


@dataclass(frozen=True)
class MoEConfig:
    """The experts of a decoder's sparse layers.

    Attributes:
        num_experts: routed experts of a layer.
        num_experts_per_tok: of which a token meets these many, those that its router finds likeliest.
        moe_intermediate_size: width of a routed expert.
        norm_topk_prob: whether the chosen experts' probabilities are scaled to a sum of one (Qwen3-VL-MoE does).
        shared_expert_intermediate_size: width of the expert that every token meets behind a sigmoid gate; 0: none.
        decoder_sparse_step: layers step - 1, 2 step - 1, ... are sparse,
        mlp_only_layers: but for these.
        router_aux_loss_coef: weight of the load-balancing loss in training.
    """

    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    norm_topk_prob: bool
    shared_expert_intermediate_size: int = 0
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()
    router_aux_loss_coef: float = 0.001

    def __post_init__(self) -> None:
        counts = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "decoder_sparse_step")
        for name in (*counts, "shared_expert_intermediate_size"):
            value, least = getattr(self, name), 1 if name in counts else 0
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**31:
                raise CheckpointError(f"{name} must be an integer from {least} to {2**31 - 1}, got {value!r}")
        if self.num_experts > _MOST_EXPERTS:
            raise CheckpointError(f"num_experts must be at most {_MOST_EXPERTS}, got {self.num_experts}")
        if self.num_experts_per_tok > self.num_experts:
            raise CheckpointError(
                f"num_experts_per_tok {self.num_experts_per_tok} must be at most num_experts {self.num_experts}"
            )
        if not isinstance(self.norm_topk_prob, bool):
            raise CheckpointError(f"norm_topk_prob must be true or false, got {self.norm_topk_prob!r}")
        layers = self.mlp_only_layers
        if not isinstance(layers, tuple) or not all(type(n) is int and n >= 0 for n in layers):
            raise CheckpointError(f"mlp_only_layers must be a list of layers, got {layers!r}")
        weight = self.router_aux_loss_coef
        real = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if not real or not 0 <= weight < math.inf:
            raise CheckpointError(f"router_aux_loss_coef must be a number from 0, got {weight!r}")

    def sparse(self, layer: int) -> bool:
        """Whether this layer has experts in the place of its MLP."""
        return layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0

    def check_depth(self, layers: int) -> None:
        """Raises :class:`CheckpointError` where a decoder of so many layers has no sparse one, or not those named."""
        if beyond := [layer for layer in self.mlp_only_layers if layer >= layers]:
            raise CheckpointError(f"mlp_only_layers names layer {beyond[0]}, num_hidden_layers is {layers}")
        if not any(map(self.sparse, range(layers))):
            raise CheckpointError(
                f"num_experts is {self.num_experts}, but decoder_sparse_step {self.decoder_sparse_step} and "
                f"mlp_only_layers {list(self.mlp_only_layers)} leave no layer of {layers} for them"
            )

    def to_dict(self) -> dict[str, Any]:
        """The keys of a config.json."""
        shared = self.shared_expert_intermediate_size
        return {
            "num_experts": self.num_experts,
            **{key: getattr(self, key) for key in (*_REQUIRED, "decoder_sparse_step", "router_aux_loss_coef")},
            "mlp_only_layers": list(self.mlp_only_layers),
            **({"shared_expert_intermediate_size": shared} if shared else {}),
        }


def moe_from_dict(data: dict[str, Any]) -> MoEConfig | None:
    """The experts that a config's text part states, without its nulls; ``None`` where it has none.

    Raises :class:`CheckpointError` for what is missing (Qwen2-MoE and Qwen3-VL-MoE differ in ``norm_topk_prob``, so
    nothing is assumed), malformed, or said in another family's words.
    """
    if other := next((key for key in _OTHERS if key in data), None):
        raise CheckpointError(f"{other} is not supported; experts are counted by num_experts, as in Qwen's models")
    if "num_experts" not in data:
        if stray := next((key for key in _REQUIRED if key in data), None):
            raise CheckpointError(f"{stray} is there and num_experts is missing")
        return None
    count = data["num_experts"]
    if type(count) is int and count == 0:  # transformers' word for a dense decoder
        return None
    if missing := [key for key in _REQUIRED if key not in data]:
        raise CheckpointError(f"num_experts is {count!r}, and these are missing: {', '.join(missing)}")
    values = {key: data[key] for key in (*_REQUIRED, *_OPTIONAL) if key in data}
    if isinstance(layers := values.get("mlp_only_layers"), list):
        values["mlp_only_layers"] = tuple(layers)
    return MoEConfig(num_experts=count, **values)
