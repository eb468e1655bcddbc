"""What the three stages take on how many GPUs: memory of one of them, and time, calculated from shapes alone.

The recipe is the trainer's: FSDP2 over all GPUs, bf16 weights with float32 masters and AdamW moments, checkpointed
activations, the chunked loss. Memory is a calculation, not a measurement; time rests on an assumed MFU.

Bytes of a rank, of a parameter that learns: 2 weight, 4 + 2 gradient (the float32 sum, and that of the backward under
way), 12 optimizer (master and two moments); of a frozen one 2. All of these are sharded. What else peaks does so at
three moments, of which the worst counts:

    the loss              kept activations, one chunk's logits, the head's gradient in float32 and rounded
    a block's backward    kept activations, the block's own made again, its weights and gradients whole, the head's
    the last gradients    those of everything outside of the blocks, whole, in bf16 and again for the sum over ranks

and at each the weights outside of the blocks (embedding, head, merger) are whole, as FSDP2 keeps its root gathered.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qwen2vl.config import Qwen2VLConfig
from qwen2vl.training.flops import (
    block_parameters,
    layer_parameters,
    mean_work,
    parameters,
    training_flops,
)
from qwen2vl.training.stages import STAGES
from qwen2vl_kernels.ops.linear_cross_entropy import chunk_size

MODELS = ("2b", "7b", "72b")
GPUS = (8, 64, 512)
#: Tokens of a stage, text and vision together (arXiv 2409.12191, section 2.2), which gives none for the last stage.
TOKENS: dict[str, float | None] = {"vision": 600e9, "multimodal": 800e9, "instruct": None}

_LOW, _FULL = 2, 4  # bytes of bfloat16 and float32


@dataclass(frozen=True)
class Recipe:
    """What is assumed; ``mfu`` most of all.

    Attributes:
        mfu: share of ``peak_tflops`` (of one GPU, dense bf16) that model FLOPs reach.
        memories: GPU sizes in GB (1e9 bytes), of which ``reserve`` GB are left to CUDA, NCCL and fragmentation.
        max_tokens: of one pack, ``run.max_tokens``.
        vision_share, image_tokens, sample_tokens: the mix: share of vision tokens, tokens of one image, of one sample.
        instruct_tokens: of the third stage.
    """

    mfu: float = 0.4
    peak_tflops: float = 989.0
    memories: tuple[float, ...] = (80.0, 141.0)
    reserve: float = 6.0
    max_tokens: int = 8192
    vision_share: float = 0.5
    image_tokens: int = 512
    sample_tokens: int = 1024
    instruct_tokens: float | None = None


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU. ``activations``, ``loss`` and ``gathered`` are each at its largest; ``peak`` is not their sum,
    as not all of them are so at once."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    loss: float
    gathered: float
    peak: float

    @property
    def state(self) -> float:
        return self.weights + self.gradients + self.optimizer


def trained_parameters(config: Qwen2VLConfig, stage: str) -> int:
    counts = parameters(config)
    return sum(counts[part] for part in STAGES[stage])


def state_bytes(config: Qwen2VLConfig, stage: str) -> tuple[int, int, int]:
    """Bytes of weights, gradients and optimizer of the whole model, before they are sharded."""
    trained = trained_parameters(config, stage)
    return _LOW * sum(parameters(config).values()), (_FULL + _LOW) * trained, 3 * _FULL * trained


def kept_activations(config: Qwen2VLConfig, stage: str, tokens: int, patches: int, itemsize: int = _LOW) -> int:
    """Bytes of what checkpointing keeps: each block's input and pending residual, which the first block has not got.

    A frozen tower keeps nothing; a frozen decoder does, as gradients pass through it.
    """
    t, v = config.text, config.vision
    kept = (2 * t.num_hidden_layers - 1) * tokens * t.hidden_size
    if "tower" in STAGES[stage]:
        kept += (2 * v.depth - 1) * patches * v.embed_dim
    return kept * itemsize


def memory(config: Qwen2VLConfig, stage: str, gpus: int, recipe: Recipe) -> Memory:
    """The memory of one of ``gpus`` that share everything."""
    t, v, learns = config.text, config.vision, STAGES[stage]
    tokens = recipe.max_tokens
    patches = int(tokens * recipe.vision_share) * v.spatial_merge_size**2
    weights, gradients, optimizer = (x / gpus for x in state_bytes(config, stage))
    kept = kept_activations(config, stage, tokens, patches)
    # What one block makes again for its backward, and the gradients of its widest tensors. An estimate of the fused
    # ops': norms, q, k, v, turned q and k, attention and sum, then gate, up, their product and the gradients of these.
    kv = t.num_key_value_heads * t.head_dim
    decoder_block = _LOW * tokens * (6 * t.hidden_size + 2 * kv + 6 * t.intermediate_size)
    vision_block = _LOW * patches * (10 * v.embed_dim + 4 * int(v.embed_dim * v.mlp_ratio))
    recomputed = max(decoder_block, vision_block if "tower" in learns else 0)

    layer, block = layer_parameters(config), block_parameters(config)
    counts = parameters(config)
    outside = {
        "tower": counts["tower"] - v.depth * block,
        "merger": counts["merger"],
        "llm": counts["llm"] - t.num_hidden_layers * layer,
    }
    root = _LOW * sum(outside.values())
    # The sum over ranks copies gradients into a float32 buffer while those of bf16 are still there.
    reduced = (_LOW + _FULL) * sum(outside[part] for part in learns)

    def of_block(size: int, part: str) -> int:
        """This block's weights, the next one's and the buffer they arrive in, and its gradients."""
        return 3 * _LOW * size + ((_LOW + _FULL) * size if part in learns else 0)

    blocks = max(of_block(layer, "llm"), of_block(block, "tower") if learns != ("llm",) else 0)
    head = t.vocab_size * t.hidden_size if "llm" in learns else 0
    loss = chunk_size(tokens, t.vocab_size, "cuda") * t.vocab_size * (2 * _LOW + _FULL) + head * (_FULL + _LOW)
    moments = (kept + loss, kept + recomputed + blocks + _LOW * head, reduced)
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=kept + recomputed,
        loss=loss,
        gathered=root + max(blocks, reduced),
        peak=weights + gradients + optimizer + root + max(moments),
    )


def flops_per_token(config: Qwen2VLConfig, stage: str, recipe: Recipe) -> float:
    """Model FLOPs of a mean token's forward and backward."""
    work = mean_work(
        vision_share=recipe.vision_share,
        sample_tokens=recipe.sample_tokens,
        image_tokens=recipe.image_tokens,
        merge_size=config.vision.spatial_merge_size,
    )
    return training_flops(config, work, set(STAGES[stage]))


def seconds(config: Qwen2VLConfig, stage: str, gpus: int, tokens: float, recipe: Recipe) -> float:
    rate = gpus * recipe.mfu * recipe.peak_tflops * 1e12
    return tokens * flops_per_token(config, stage, recipe) / rate


def tokens_of(stage: str, recipe: Recipe) -> float | None:
    return recipe.instruct_tokens if stage == "instruct" else TOKENS[stage]


def fits(memory: Memory, gigabytes: float, recipe: Recipe) -> bool:
    return memory.peak + recipe.reserve * 1e9 <= gigabytes * 1e9


# ---------------------------------------------------------------------------------------------------------- the report


def report(recipe: Recipe, models: Sequence[str] = MODELS, gpus: Sequence[int] = GPUS) -> str:
    """All of it as Markdown, with what it assumes."""
    instruct = recipe.instruct_tokens
    lines = [
        f"Memory of one GPU in GB (1e9 bytes), packs of {recipe.max_tokens} tokens a rank, everything sharded over all "
        "GPUs (FSDP2), calculated from shapes. Of each GPU "
        f"{recipe.reserve:g} GB are left for CUDA, NCCL and fragmentation.",
        "",
        *_table(_memory_rows(recipe, models, gpus), left=2),
        "",
        f"Time, assuming an MFU of {100 * recipe.mfu:g} % of {recipe.peak_tflops:g} TFLOP/s a GPU. No MFU of this code "
        "was measured on a GPU: scale the days by what yours shows. Mix, assumed too: "
        f"{100 * recipe.vision_share:g} % vision tokens, images of {recipe.image_tokens} tokens, samples of "
        f"{recipe.sample_tokens}. Tokens are the paper's for the first two stages; for the last "
        + ("it gives none." if instruct is None else f"it gives none, {_billions(instruct)} are assumed."),
        "",
        *_table(_time_rows(recipe, models, gpus), left=2),
    ]
    return "\n".join(lines) + "\n"


def _memory_rows(recipe: Recipe, models: Sequence[str], gpus: Sequence[int]) -> Iterator[list[str]]:
    yield ["model", "stage", "GPUs", "weights", "gradients", "optimizer", "activations", "loss", "gathered", "peak"] + [
        f"fits {size:g} GB" for size in recipe.memories
    ]
    for model in models:
        config = Qwen2VLConfig.preset(model)
        for stage in STAGES:
            for count in gpus:
                m = memory(config, stage, count, recipe)
                parts = (m.weights, m.gradients, m.optimizer, m.activations, m.loss, m.gathered, m.peak)
                yield [
                    model.upper(),
                    stage,
                    str(count),
                    *(f"{x / 1e9:.1f}" for x in parts),
                    *("yes" if fits(m, size, recipe) else "no" for size in recipe.memories),
                ]


def _time_rows(recipe: Recipe, models: Sequence[str], gpus: Sequence[int]) -> Iterator[list[str]]:
    yield ["model", "stage", "learns", "tokens", "GFLOP a token", "GPU-hours a billion tokens"] + [
        f"days on {count}" for count in gpus
    ]
    for model in models:
        config = Qwen2VLConfig.preset(model)
        for stage in STAGES:
            tokens = tokens_of(stage, recipe)
            days = ["–" if tokens is None else _days(seconds(config, stage, n, tokens, recipe)) for n in gpus]
            yield [
                model.upper(),
                stage,
                f"{trained_parameters(config, stage) / 1e9:.2f} G",
                "–" if tokens is None else _billions(tokens),
                f"{flops_per_token(config, stage, recipe) / 1e9:.1f}",
                f"{seconds(config, stage, 1, 1e9, recipe) / 3600:,.1f}",
                *days,
            ]


def _billions(tokens: float) -> str:
    return f"{tokens / 1e9:g} G"


def _days(seconds: float) -> str:
    days = seconds / 86400
    return f"{days:.1f}" if days < 10 else f"{days:,.0f}"


def _table(rows: Iterator[list[str]], left: int) -> list[str]:
    """A Markdown table; all columns but the first ``left`` are numbers."""
    head, *body = rows
    rule = "|" + "---|" * left + "---:|" * (len(head) - left)
    return ["| " + " | ".join(head) + " |", rule, *("| " + " | ".join(row) + " |" for row in body)]
