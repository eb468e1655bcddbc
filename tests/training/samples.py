"""Small samples of every kind and a dataset in memory, of the protocol that packing draws from."""

from __future__ import annotations

from dataclasses import replace

import torch

from qwen2vl import Qwen2VL
from qwen2vl.config import Qwen2VLConfig, TextConfig, VisionConfig
from qwen2vl.moe_config import MoEConfig
from qwen2vl.training.example import Example

IMAGE, VIDEO = 60, 61


def tiny_config(tie: bool = True, layers: int = 2, vocabulary: int = 64) -> Qwen2VLConfig:
    """Some 30 thousand parameters: two layers, two heads sharing no key head, so that two ranks can split them."""
    text = TextConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=vocabulary,
        rms_norm_eps=1e-6,
        tie_word_embeddings=tie,
        mrope_section=(2, 1, 1),
    )
    vision = VisionConfig(hidden_size=32, depth=layers, embed_dim=16, num_heads=2)
    special = {
        "image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": 58, "vision_end_token_id": 59,
        "vision_token_id": 57, "bos_token_id": 62, "eos_token_id": 63, "pad_token_id": 62,
    }  # fmt: skip
    return Qwen2VLConfig(text=text, vision=vision, torch_dtype="float32", **special)


def tiny_moe_config(**changes) -> Qwen2VLConfig:
    """Three layers, of which the middle one is dense; a token meets two of five experts, and the shared one."""
    given = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": False,
             "shared_expert_intermediate_size": 40, "mlp_only_layers": (1,), "router_aux_loss_coef": 0.5}  # fmt: skip
    config = tiny_config(tie=False, layers=3)
    return replace(config, text=replace(config.text, moe=MoEConfig(**{**given, **changes})))


def tiny_model(
    tie: bool = True,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    layers: int = 2,
    config: Qwen2VLConfig | None = None,
) -> Qwen2VL:
    """Large weights, so that what a layer does wrong shows in the loss."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2VL.from_config(config or tiny_config(tie, layers), device="cpu", dtype="float32", std=0.15)
        for p in model.parameters():  # biases and norms that are not neutral
            if p.ndim == 1:
                p.data.add_(0.1 * torch.randn(p.shape))
    return model.to(dtype)


def make_example(number: int, kind: str = "text", length: int = 9) -> Example:
    """Sample ``number`` of a kind: "text", "image", "images" (two of them) or "video"."""
    g = torch.Generator().manual_seed(number)
    grids = {
        "text": [],
        "image": [(1, 4, 2 + 2 * (number % 3))],
        "images": [(1, 2, 4), (1, 4, 4)],
        "video": [(2, 2, 4)],
    }[kind]
    token, rows = (VIDEO, 1176) if kind == "video" else (IMAGE, 588)
    ids = torch.randint(0, 56, (3,), generator=g).tolist()
    for t, h, w in grids:
        ids += [58, *[token] * (t * h * w // 4), 59]
    ids += torch.randint(0, 56, (length - 3,), generator=g).tolist()
    input_ids = torch.tensor(ids)
    labels = input_ids.clone()
    labels[: len(ids) - length + 4] = -100  # what comes before the answer, media included
    media: dict = {}
    if grids:
        patches = sum(t * h * w for t, h, w in grids)
        pixels = torch.randint(0, 256, (patches, rows), dtype=torch.uint8, generator=g)
        end = "_videos" if kind == "video" else ""
        media = {f"pixel_values{end}": pixels, f"{'video' if end else 'image'}_grid_thw": torch.tensor(grids)}
    return Example(input_ids=input_ids, labels=labels, source=f"memory:{number}", **media)


KINDS = ("text", "image", "video", "images")


class InMemory:
    """Samples in order, every ``world``-th one from ``rank`` on; remembers where it stands."""

    def __init__(self, examples, rank: int = 0, world: int = 1) -> None:
        self.examples = list(examples)[rank::world]
        self.next = 0
        self.report: dict = {}

    def __iter__(self):
        if self.next >= len(self.examples):
            self.next = 0
        while self.next < len(self.examples):
            self.next += 1
            yield self.examples[self.next - 1]

    def state_dict(self):
        return {"next": self.next}

    def load_state_dict(self, state):
        self.next = state["next"]


def mixed(count: int = 24, rank: int = 0, world: int = 1) -> InMemory:
    """Samples of all kinds and of different lengths."""
    return InMemory([make_example(i, KINDS[i % 4], 6 + (5 * i) % 11) for i in range(count)], rank, world)
