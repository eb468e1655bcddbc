"""What training costs in floating-point operations, and a model's parameters, from shapes alone.

A multiply-add counts two. A backward costs a forward once more for the gradients of what came in and once more for
those of the weights. Recomputed activations do not count: model FLOPs, as in PaLM (arXiv 2204.02311, appendix B).
"""

from __future__ import annotations

from dataclasses import dataclass

from ..config import Qwen2VLConfig
from .packing import Batch


@dataclass(frozen=True)
class Work:
    """What goes through the model: tokens and their causal pairs, supervised rows, patches and their pairs."""

    tokens: float
    pairs: float
    supervised: float
    patches: float
    patch_pairs: float


def work_of(batch: Batch) -> Work:
    """FLOPs of a pack on the host; the placeholder image counts, as it is computed."""
    lengths = batch.cu_seqlens.diff().tolist()
    frames = [
        (t, h * w)
        for grid in (batch.image_grid_thw, batch.video_grid_thw)
        if grid is not None
        for t, h, w in grid.tolist()
    ]
    return Work(
        tokens=batch.tokens,
        pairs=sum(n * (n + 1) / 2 for n in lengths),
        supervised=batch.supervised,
        patches=sum(t * n for t, n in frames),
        patch_pairs=sum(t * n * n for t, n in frames),
    )


def layer_matrices(config: Qwen2VLConfig, layer: int = 0, *, active: bool = True) -> int:
    """Elements of one decoder layer's matrices; of routed experts those that a token meets, all unless ``active``."""
    t = config.text
    attention = t.hidden_size * (2 * t.hidden_size + 2 * t.num_key_value_heads * t.head_dim)
    if (moe := t.experts(layer)) is None:
        return attention + 3 * t.hidden_size * t.intermediate_size
    shared = moe.shared_expert_intermediate_size
    routed = (moe.num_experts_per_tok if active else moe.num_experts) * moe.moe_intermediate_size
    return attention + t.hidden_size * (3 * (routed + shared) + moe.num_experts + bool(shared))  # and the gates


def block_matrices(config: Qwen2VLConfig) -> int:
    """Elements of one vision block's matrices."""
    v = config.vision
    return 4 * v.embed_dim**2 + 2 * v.embed_dim * int(v.embed_dim * v.mlp_ratio)


def merger_matrices(config: Qwen2VLConfig) -> int:
    v = config.vision
    width = v.embed_dim * v.spatial_merge_size**2
    return width * width + width * v.hidden_size


def layer_parameters(config: Qwen2VLConfig, layer: int = 0) -> int:
    """Parameters of one decoder layer: its matrices, the biases of q, k and v, two norms."""
    t = config.text
    return layer_matrices(config, layer, active=False) + 3 * t.hidden_size + 2 * t.num_key_value_heads * t.head_dim


def block_parameters(config: Qwen2VLConfig) -> int:
    """Parameters of one vision block: its matrices with a bias each, two norms with weight and bias."""
    v = config.vision
    return block_matrices(config) + (3 + 1 + 1 + 4) * v.embed_dim + int(v.embed_dim * v.mlp_ratio)


def parameters(config: Qwen2VLConfig) -> dict[str, int]:
    """Parameters of each part, as :data:`qwen2vl.training.stages.PARTS` names them; a tied head counts once."""
    t, v = config.text, config.vision
    merged = v.embed_dim * v.spatial_merge_size**2
    embeddings = (1 if t.tie_word_embeddings else 2) * t.vocab_size * t.hidden_size
    return {
        "tower": v.patch_values * v.embed_dim + v.depth * block_parameters(config),
        "merger": merger_matrices(config) + merged + v.hidden_size + 2 * v.embed_dim,
        "llm": sum(layer_parameters(config, i) for i in range(t.num_hidden_layers)) + t.hidden_size + embeddings,
    }


def mean_work(*, vision_share: float, sample_tokens: int, image_tokens: int, merge_size: int = 2) -> Work:
    """One mean token of samples of ``sample_tokens``, of which a share are vision tokens and all others supervised;
    images of ``image_tokens`` each."""
    patches = vision_share * merge_size**2
    return Work(
        tokens=1.0,
        pairs=(sample_tokens + 1) / 2,
        supervised=1 - vision_share,
        patches=patches,
        patch_pairs=patches * image_tokens * merge_size**2,
    )


def training_flops(
    config: Qwen2VLConfig, work: Work, trained: frozenset[str] | set[str], *, adapters: bool = False
) -> float:
    """FLOPs of a forward and backward in which the parts ``trained`` (of tower, merger, llm) learn.

    With ``adapters`` these are frozen and pass gradients on to adapters, whose own arithmetic is left out.
    """
    t, v = config.text, config.vision
    layers = 2 * work.tokens * sum(layer_matrices(config, i) for i in range(t.num_hidden_layers))
    attention = 4 * work.pairs * t.num_hidden_layers * t.hidden_size
    head = 2 * work.supervised * t.hidden_size * t.vocab_size
    tower = 2 * work.patches * (v.patch_values * v.embed_dim + v.depth * block_matrices(config))
    tower_attention = 4 * work.patch_pairs * v.depth * v.embed_dim
    merger = 2 * work.patches / v.spatial_merge_size**2 * merger_matrices(config)
    vision_learns = bool(trained & {"tower", "merger"})
    learns = 2 if adapters else 3
    # The decoder's attention and matrices pass gradients on to the tower even where their own weights are frozen.
    llm = (learns if "llm" in trained else 2 if vision_learns else 1) * (layers + head)
    llm += (3 if "llm" in trained or vision_learns else 1) * attention
    vision = (learns if "tower" in trained else 1) * tower + (3 if "tower" in trained else 1) * tower_attention
    vision += (3 if "merger" in trained else 2 if "tower" in trained else 1) * merger
    return llm + vision
