"""``use_backend("eager")`` is the reference model: the formulas alone, in prefill, decoding and a resumed chunk."""

import copy

import pytest
import torch

from benchmarks.random_checkpoint import small_config
from qwen2vl import GenerationConfig, Qwen2VL, generate
from qwen2vl_kernels import use_backend
from qwen2vl_kernels.core.attention_choice import OURS
from qwen2vl_kernels.core.attention_peers import FLASH, PEERS
from qwen2vl_kernels.core.backends import PREFERENCE
from qwen2vl_kernels.ops import kvcache_attention, varlen_attention
from tests.conftest import assert_two_times, triton_where_it_serves
from tests.kernels import sm90_stand_in


@pytest.fixture(scope="module")
def model():
    return Qwen2VL.from_config(small_config(), device="cpu", dtype="float32", std=0.1)


def test_eager_runs_the_references_only(model, monkeypatch):
    inputs = {"input_ids": torch.randint(0, 400, (2, 30))}
    config = GenerationConfig(max_new_tokens=12, eos_token_ids=(10**6,))
    expected = generate(model, inputs, config=config).sequences

    def refuse(*_arguments, **_options):
        pytest.fail("a fused attention ran under use_backend('eager')")

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", refuse)
    with use_backend("eager"):
        assert generate(model, inputs, config=config).sequences == expected
    with pytest.raises(pytest.fail.Exception):
        generate(model, inputs, config=config)  # without the switch it would have been used


@pytest.mark.parametrize("module", [varlen_attention, kvcache_attention], ids=lambda m: m.__name__.split(".")[-1])
def test_every_table_entry_has_an_implementation(module):
    op = module.__name__.split(".")[-1]
    implemented = set(module._BACKENDS)
    if op == "varlen_attention":  # ours and others' are called by themselves; "flash" is one of its modules
        implemented |= {*OURS, *PEERS}
        modules = {flash.module for flash in FLASH}
        assert modules <= implemented
        implemented = implemented - modules | {"flash"}
    assert {name for row in PREFERENCE[op].values() for name in row} == implemented
    if op == "kvcache_attention":
        assert {n for row in PREFERENCE["kvcache_attention_decode"].values() for n in row} == set(module._DECODE)


def _image_prompt(config):
    """Two rows, each with text around an image of 4 by 6 patches, one padded."""
    image = [config.image_token_id] * 6
    rows = [[5, 6, config.vision_start_token_id, *image, 7, 8, 9], [3, config.vision_start_token_id, *image, 4]]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    patches = torch.randint(0, 256, (48, 588), dtype=torch.uint8)
    grid = torch.tensor([[1, 4, 6], [1, 4, 6]])
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": patches, "image_grid_thw": grid}


def _logits_and_gradients(model, inputs):
    model.zero_grad()
    with torch.enable_grad():
        logits = model(**inputs)
        kept = logits[inputs["attention_mask"].bool()]
        kept.square().mean().backward()
    return {"logits": kept.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_triton_is_the_eager_model(model):
    """Logits and every gradient of a tiny model with every Triton kernel that there is, against the formulas."""
    inputs = _image_prompt(model.config)
    for parameter in model.parameters():
        parameter.requires_grad_()
    try:
        with use_backend("eager"):
            eager = _logits_and_gradients(model, inputs)
            exact = _logits_and_gradients(copy.deepcopy(model).double(), inputs)
        with use_backend(**triton_where_it_serves()):
            got = _logits_and_gradients(model, inputs)
    finally:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None
    assert got.keys() == eager.keys() and len(got) > 30
    for name, value in got.items():
        assert_two_times(value, eager[name], exact[name], 1e-6)


def test_hoppers_attention_in_tower_and_decoder(monkeypatch):
    """In bfloat16 with a stand-in for the extension and Triton's backward: what a GPU's tensors would be told."""
    triton = triton_where_it_serves()
    model = Qwen2VL.from_config(small_config(), device="cpu", dtype="bfloat16", std=0.1)
    inputs = _image_prompt(model.config)
    for parameter in model.parameters():
        parameter.requires_grad_()
    with use_backend("eager"):
        eager = _logits_and_gradients(model, inputs)
        exact = _logits_and_gradients(copy.deepcopy(model).double(), inputs)
    extension = sm90_stand_in.install(monkeypatch)
    monkeypatch.setattr(varlen_attention, "chosen", lambda *_, **__: "sm90")
    with use_backend(**{**dict.fromkeys(PREFERENCE, "eager"), "vision_rope": triton["vision_rope"]}):
        got = _logits_and_gradients(model, inputs)
    assert len(extension.launches) == 2 + 2, "a launch a layer of each"
    assert got.keys() == eager.keys() and len(got) > 30
    for name, value in got.items():
        assert_two_times(value, eager[name], exact[name], 1e-6)


def test_triton_generates_the_same_tokens(model):
    config = GenerationConfig(max_new_tokens=4, eos_token_ids=(10**6,))
    inputs = _image_prompt(model.config)
    expected = generate(model, inputs, config=config).sequences
    with use_backend(**triton_where_it_serves()):
        assert generate(model, inputs, config=config).sequences == expected
