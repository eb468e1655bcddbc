"""Adapters of routed experts beside peft's on transformers' Qwen2-MoE, whose parameters are stacked as ours."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2MoeForCausalLM

from qwen2vl import CheckpointError, Qwen2VL
from tests.model.test_moe import IDS, text_config
from tests.training.samples import tiny_model, tiny_moe_config

peft = pytest.importorskip("peft", minversion="0.19.1")

BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
#: What is adapted -> the settings of peft that adapt it.
KINDS = {
    "both": {"target_modules": [], "target_parameters": BOTH},
    "one": {"target_modules": ["q_proj", "shared_expert.up_proj"], "target_parameters": ["experts.down_proj"]},
    "a layer by name": {"target_modules": [], "target_parameters": ["model.layers.2.mlp.experts.gate_up_proj"]},
    "scaled by the root": {
        "target_modules": ["shared_expert_gate"],
        "target_parameters": BOTH,
        "use_rslora": True,
        "lora_alpha": 3,
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    model = tiny_model(config=tiny_moe_config())
    for name, config in (("ours", model.config.to_dict()), ("theirs", text_config(model))):
        model.save_pretrained(folder / name)
        (folder / name / "config.json").write_text(json.dumps(config))
    return folder


def _theirs(folder):
    return Qwen2MoeForCausalLM.from_pretrained(folder / "theirs", dtype=torch.float32, experts_implementation="eager")


def _make(folder, save, **settings):
    """peft's logits with an adapter that changes a lot, which is saved."""
    torch.manual_seed(3)
    net = peft.get_peft_model(_theirs(folder), peft.LoraConfig(r=2, **settings))
    for name, parameter in net.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    net.save_pretrained(str(save))
    return _logits(net.eval())


def _logits(net):
    with torch.no_grad():
        found = net(IDS)
    return found if isinstance(found, torch.Tensor) else found.logits


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_what_peft_makes_of_it(folder, tmp_path, kind):
    want = _make(folder, tmp_path / "theirs", **KINDS[kind])
    found = Qwen2VL.from_pretrained(folder / "ours", device="cpu", adapter=tmp_path / "theirs")
    torch.testing.assert_close(_logits(found), want, rtol=1e-4, atol=1e-5)
    assert not torch.isclose(_logits(Qwen2VL.from_pretrained(folder / "ours", device="cpu")), want, rtol=0.1).all()

    found.save_adapter(tmp_path / "ours")
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours"))
    inner = {name.replace("language_model.", ""): tensor for name, tensor in other.items()}
    assert one.keys() == inner.keys() and all(torch.equal(one[name], inner[name]) for name in one)
    # A language model alone has other names than the whole that the file is for.
    save_file(inner, tmp_path / "ours" / "adapter_model.safetensors")
    path = tmp_path / "ours" / "adapter_config.json"
    path.write_text(path.read_text().replace("language_model.", ""))
    again = peft.PeftModel.from_pretrained(_theirs(folder), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(_logits(again), want, rtol=1e-5, atol=1e-6)

    merged = found.merge_adapter()
    plain = dict(tiny_model(config=tiny_moe_config()).named_parameters())
    assert dict(merged.named_parameters()).keys() == plain.keys()
    torch.testing.assert_close(_logits(merged), want, rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path / "whole")
    assert torch.equal(_logits(Qwen2VL.from_pretrained(tmp_path / "whole", device="cpu")), _logits(merged))


def test_gradients_are_those_of_the_sum(folder, tmp_path):
    """Of each expert's A and B, beside those of the weight to which their product is added."""
    _make(folder, tmp_path, **KINDS["both"])
    model = Qwen2VL.from_pretrained(folder / "ours", device="cpu", adapter=tmp_path)
    wholes = Qwen2VL.from_pretrained(folder / "ours", device="cpu", adapter=tmp_path).merge_adapter()
    wholes.requires_grad_(True)
    for one in (model, wholes):
        one(IDS).square().mean().backward()
    learns = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(learns) == 2 * 2 * 2 and all(".lora_" in name for name in learns)
    scale = 8 / 2
    for layer in (0, 2):
        outer, weights = model.model.layers[layer].mlp.experts, wholes.model.layers[layer].mlp.experts
        for of, wanted in ((outer, weights.down_proj.grad), (outer.base_layer, weights.gate_up_proj.grad)):
            a, b = of.lora_A["default"].weight, of.lora_B["default"].weight
            for e in range(5):
                rows, columns = slice(2 * e, 2 * e + 2), slice(e, None, 5)
                da, db = scale * b[:, columns].T @ wanted[e], scale * wanted[e] @ a[rows].T
                torch.testing.assert_close(a.grad[rows], da, rtol=1e-3, atol=1e-6)
                torch.testing.assert_close(b.grad[:, columns], db, rtol=1e-3, atol=1e-6)


_A = "base_model.model.model.layers.0.mlp.experts.lora_A.weight"


def test_an_older_peft_is_refused(folder, tmp_path, monkeypatch):
    _make(folder, tmp_path, **KINDS["both"])
    monkeypatch.setattr(peft, "__version__", "0.18.1")
    with pytest.raises(CheckpointError, match=r"experts need peft 0\.19\.1 or later, got 0\.18\.1"):
        Qwen2VL.from_pretrained(folder / "ours", device="cpu", adapter=tmp_path)


@pytest.mark.parametrize(
    ("settings", "tensors", "words"),
    [
        (
            {"target_parameters": ["mlp.experts.up_proj"]},
            {},
            "target_parameters name 'mlp.experts.up_proj', and no",
        ),
        ({"target_parameters": "mlp"}, {}, "target_parameters must be a list of names, got 'mlp'"),
        ({"peft_version": "0.19.0"}, {}, "peft 0.19.1 and later write them, .* peft_version is '0.19.0'"),
        ({"peft_version": None}, {}, "peft_version is None"),
        ({"target_parameters": None}, {}, r"experts.lora_A.weight: is no part of LoRA .* as target_parameters says"),
        ({"target_parameters": BOTH}, {}, "experts.lora_A.weight: .* rank and model want floats"),
        (
            {},
            {_A: torch.zeros(2, 32)},
            r"_A.weight: torch.float32 \(2, 32\), rank and model want floats \(10, 32\)",
        ),
        ({}, {_A: None, _A.replace("_A", "_B"): None}, "layers.0.mlp.experts.gate_up_proj, of which .* holds nothing"),
        ({}, {_A.replace("lora", "3.up_proj.lora"): torch.zeros(2, 32)}, "experts have adapters of the stacked kind"),
    ],
)
def test_what_does_not_fit_is_refused(folder, tmp_path, settings, tensors, words):
    _make(folder, tmp_path, target_modules=[], target_parameters=["mlp.experts.gate_up_proj"])
    for name, change in (("adapter_config.json", settings), ("adapter_model.safetensors", tensors)):
        path = tmp_path / name
        if path.suffix == ".json":
            path.write_text(json.dumps(json.loads(path.read_text()) | change))
        else:
            held = load_file(path) | change
            save_file({key: tensor for key, tensor in held.items() if tensor is not None}, path)
    with pytest.raises(CheckpointError, match=words):
        Qwen2VL.from_pretrained(folder / "ours", device="cpu", adapter=tmp_path)
