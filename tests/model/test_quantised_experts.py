"""Quantised experts: each a module by its name, with scales of its own, as Qwen's releases store them."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import Qwen2MoeForCausalLM

from benchmarks.random_checkpoint import small_config, write_random_checkpoint
from qwen2vl import CheckpointError, MoEConfig, Qwen2VL
from qwen2vl.cache import KVCache
from qwen2vl.graphs import unfit
from qwen2vl.quantization import parameter_count, quantised
from qwen2vl.speed import step_bytes
from tests.model.checkpoint_files import IDS, logits, rewrite
from tests.model.test_quantised import FORMATS, assert_same_files, quantise


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """A layer with experts, one without."""
    moe = MoEConfig(4, 2, 128, False, shared_expert_intermediate_size=256, mlp_only_layers=(1,))
    config = small_config(tie_word_embeddings=False)
    config = replace(config, text=replace(config.text, moe=moe))
    return write_random_checkpoint(tmp_path_factory.mktemp("experts"), config, dtype=torch.float32, std=0.08)


_ONE = "model.layers.0.mlp.experts"


@pytest.mark.parametrize("name", ["awq", "gptq int8", "gptq act-order", "fp8 tensors", "fp8 blocks"])
def test_experts_are_quantised_one_by_one(experts, tmp_path, name):
    """Each with scales and an order of columns of its own, and some not at all, as writers leave those that no text of
    theirs has met: as its values in float32, and saved as it was. Routers keep their bits."""
    kept = (f"{_ONE}.1.gate_proj", f"{_ONE}.3.down_proj", f"{_ONE}.3.up_proj", f"{_ONE}.3.gate_proj")
    folder, values = quantise(experts, tmp_path, FORMATS[name], kept=kept)
    torch.testing.assert_close(logits(folder), logits(values), rtol=2e-4, atol=2e-4)
    model = Qwen2VL.from_pretrained(folder, device="cpu")
    layers = quantised(model)
    assert len(layers) == 14 + 3 * 4 - len(kept) and f"{_ONE}.1.up_proj" in layers
    assert parameter_count(model) == parameter_count(Qwen2VL.from_pretrained(values, device="cpu"))
    model.save_pretrained(tmp_path / "again")
    assert_same_files(folder, tmp_path / "again")


def test_gradients_pass_quantised_experts(experts, tmp_path):
    """To what is before them, as adapters over a quantised model need; of two tokens not all experts are read."""
    found = []
    for folder in quantise(experts, tmp_path, FORMATS["gptq int4 zeros"]):
        model = Qwen2VL.from_pretrained(folder, device="cpu")
        for ids in (IDS, IDS[:, :2]):
            model.zero_grad()
            model(ids).square().mean().backward()
            found.append(model.model.layers[0].input_layernorm.weight.grad)
    for got, wanted in zip(found[:2], found[2:], strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-5)


def test_only_experts_with_tokens_are_read(experts, tmp_path, monkeypatch):
    folder, _ = quantise(experts, tmp_path, FORMATS["fp8 rows"])
    model = Qwen2VL.from_pretrained(folder, device="cpu")
    monkeypatch.setattr(KVCache, "asynchronous", staticmethod(lambda device: True))
    assert "read on the host" in unfit(model, model.model)
    read = set()
    for name, layer in quantised(model).items():
        layer.register_forward_pre_hook(lambda *_, name=name: read.add(name))
    with torch.no_grad():
        model(IDS[:, :1])
    assert sum(name.startswith(_ONE) for name in read) == 3 * 2
    held = sum(p.nbytes for p in (*model.model.layers.parameters(), *model.model.norm.parameters()))
    routed = sum(p.nbytes for p in model.model.layers[0].mlp.experts.parameters())
    assert step_bytes(model, 0) == held - routed // 2 + model.head_weight.nbytes


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(f"{_ONE}.2.up_proj.scales"), f"{_ONE}.2.up_proj.scales: missing"),
        (lambda t: t.pop(f"{_ONE}.2.up_proj.qweight"), f"{_ONE}.2.up_proj.weight: missing|does not tell of"),
        (lambda t: t.update({f"{_ONE}.4.up_proj.qweight": torch.zeros(1)}), f"{_ONE}.4.up_proj: is quantised, and no"),
        (
            lambda t: t.update({f"{_ONE}.gate_up_proj.qweight": torch.zeros(1)}),
            "experts.gate_up_proj: is quantised, and",
        ),
        (lambda t: t.update({"model.layers.0.mlp.gate.qweight": torch.zeros(1)}), "mlp.gate: cannot be gptq int4"),
    ],
)
def test_quantised_experts_that_do_not_fit(experts, tmp_path, change, words):
    folder, _ = quantise(experts, tmp_path, FORMATS["gptq int4"])
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=words):
        Qwen2VL.from_pretrained(folder, device="cpu")


def test_transformers_reads_the_same_from_experts_in_fp8(experts, tmp_path):
    """By its Qwen2-MoE, whose names of experts ours are."""
    how = FORMATS["fp8 fine-grained"] | {"modules_to_not_convert": ["lm_head", "gate", "shared_expert_gate"]}
    folder, _ = quantise(experts, tmp_path, how)
    wanted = logits(folder)
    path = folder / "config.json"
    flat = json.loads(path.read_text())
    left_out = ("vision_config", "rope_scaling", "architectures")
    path.write_text(json.dumps({k: v for k, v in flat.items() if k not in left_out} | {"model_type": "qwen2_moe"}))
    theirs = Qwen2MoeForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert theirs.model.layers[0].mlp.experts.gate_up_proj.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(wanted, theirs(IDS).logits, rtol=2e-4, atol=2e-4)
