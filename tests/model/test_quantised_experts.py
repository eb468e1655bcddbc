"""Quantised experts, which files hold one by one as Qwen's releases do: together where they are alike, or apart."""

import gc
import json
from dataclasses import replace

import pytest
import torch
from transformers import Qwen2MoeForCausalLM

from benchmarks.random_checkpoint import small_config, write_random_checkpoint
from qwen2vl import CheckpointError, MoEConfig, Qwen2VL, weights
from qwen2vl.cache import KVCache
from qwen2vl.graphs import unfit
from qwen2vl.layers import Linear
from qwen2vl.moe import SeparateExperts
from qwen2vl.quantised_experts import QuantExperts, QuantStack
from qwen2vl.quantization import Quantization, QuantLinear, parameter_count, quantised
from qwen2vl.speed import step_bytes
from qwen2vl_kernels import use_backend
from qwen2vl_kernels.core.backends import unavailable
from tests.conftest import assert_two_times
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
    assert isinstance(model.model.layers[0].mlp.experts, SeparateExperts)
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


def _loaded(folder, **given):
    return Qwen2VL.from_pretrained(folder, device="cpu", **given)


#: Formats of which experts are alike, one with blocks larger than a matrix; in "fp8 blocks" these hold gate and up.
ALIKE = {name: how for name, how in FORMATS.items() if name not in ("fp8 blocks", "gptq act-order")}
ALIKE["fp8, blocks of all rows and more"] = {"quant_method": "fp8", "weight_block_size": [256, 64]}


@pytest.mark.parametrize("name", ALIKE)
def test_experts_quantised_alike_lie_together(experts, tmp_path, name):
    """They answer as their values, keep their bits through casts, and are saved one by one as they were."""
    folder, values = quantise(experts, tmp_path, ALIKE[name])
    model = _loaded(folder)
    together = model.model.layers[0].mlp.experts
    assert isinstance(together, QuantExperts)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS), logits(values), rtol=2e-4, atol=2e-4)
    assert len(quantised(model)) == 14 + 3 * 4
    assert parameter_count(model) == parameter_count(_loaded(values))
    model.save_pretrained(tmp_path / "again")
    assert_same_files(folder, tmp_path / "again")
    before = [p.clone() for p in together.parameters()]
    model.half()
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(before, together.parameters(), strict=True))


def test_experts_that_are_not_alike_stay_apart(experts, tmp_path):
    """Blocks that would hold gate and up, other orders of columns for the two, other dtypes of scales."""
    for name in ("fp8 blocks", "gptq act-order", "awq"):
        folder, _ = quantise(experts, tmp_path / name, FORMATS[name])
        if name == "awq":
            rewrite(folder, lambda t: t.update({_SCALES: t[_SCALES].float()}))
        assert isinstance(_loaded(folder).model.layers[0].mlp.experts, SeparateExperts)


_SCALES = f"{_ONE}.2.up_proj.scales"


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_one_order_of_columns_for_gate_and_up(experts, tmp_path, backend):
    """As GPTQ chooses it, by what both are multiplied with."""
    folder, values = quantise(experts, tmp_path, FORMATS["gptq act-order"])

    def same(tensors):
        for name in [name for name in tensors if name.startswith(_ONE) and ".up_proj." in name]:
            tensors[name] = tensors[name.replace(".up_proj.", ".gate_proj.")].clone()

    for one in (folder, values):
        rewrite(one, same)
    model = _loaded(folder, dtype="bfloat16")
    together = model.model.layers[0].mlp.experts
    assert isinstance(together, QuantExperts) and together.gate_up_proj.order is not None
    if backend == "triton" and (reason := unavailable("triton", "cpu")) is not None:
        pytest.skip(f"triton: {reason}")
    with torch.no_grad(), use_backend(grouped_quant_linear=backend):
        got = model(IDS)
    assert_two_times(got, logits(values, dtype="bfloat16"), logits(values), 1e-3)
    _loaded(folder).save_pretrained(tmp_path / "again")
    assert_same_files(folder, tmp_path / "again")


def test_a_stack_is_what_its_layers_are():
    """Of which some have zero points and an order of columns, and others none; and it is read as views of it."""
    how = Quantization.from_dict(FORMATS["gptq act-order"] | {"group_size": 32})
    generator = torch.Generator().manual_seed(1)
    layers = []
    for n in range(6):
        layer = QuantLinear(Linear(64, 16, bias=False), how)
        layer.set("weight", torch.randint(0, 256, (16, 32), generator=generator).byte())
        layer.set("scales", torch.rand(16, 2, generator=generator).half())
        layer.set("zeros", torch.randint(0, 256, (16, 1), generator=generator).byte() if n % 3 else None)
        layer.set("order", torch.randperm(64, generator=generator).int() if n > 3 else None)
        layers.append(layer)
    layers[5].set("order", layers[4].order)
    stack = QuantStack([layers[0:2], layers[2:4], layers[4:6]])
    x, bounds = torch.randn(7, 64), torch.tensor([0, 2, 2, 7], dtype=torch.int32)
    got = stack(x, bounds)
    for n, rows in ((0, slice(0, 2)), (2, slice(2, 7))):
        for part in range(2):
            want = layers[2 * n + part](x[rows])
            torch.testing.assert_close(got[rows, 16 * part : 16 * part + 16], want)
            assert torch.equal(stack.layer(n, part)(x[rows]), want)
    assert stack.layer(1, 0).weight.data_ptr() == stack.weight[1].data_ptr()


def test_experts_of_one_layer_at_a_time_lie_twice_in_memory(tmp_path, monkeypatch):
    """Those that lay apart are gone before the next layer's are read."""
    config = small_config(tie_word_embeddings=False)
    moe = MoEConfig(4, 2, 128, False)
    config = replace(config, text=replace(config.text, moe=moe, num_hidden_layers=3))
    folder, _ = quantise(
        write_random_checkpoint(tmp_path / "plain", config, dtype=torch.float32), tmp_path, ALIKE["awq"]
    )
    held, real = [], weights.put_together

    def counted(mlp):
        gc.collect()
        inner = [one for one in gc.get_objects() if type(one) is QuantLinear and one.in_features == 128]
        held.append(sum(not one.weight.is_meta for one in inner))
        return real(mlp)

    monkeypatch.setattr(weights, "put_together", counted)
    _loaded(folder)
    assert held == [4, 4, 4]


def test_only_experts_with_tokens_are_read(experts, tmp_path, monkeypatch):
    folder, _ = quantise(experts, tmp_path, FORMATS["fp8 rows"])
    model = _loaded(folder)
    together = model.model.layers[0].mlp.experts
    picked = []
    together.register_forward_pre_hook(lambda _, given: picked.append(set(given[2].flatten().tolist())))
    with torch.no_grad():
        before = model(IDS[:, :1])
        others = sorted({0, 1, 2, 3} - picked[0])
        assert len(others) == 2
        for stack in (together.gate_up_proj, together.down_proj):
            stack.scales[others] = float("nan")
        assert torch.equal(model(IDS[:, :1]), before)
    held = sum(p.nbytes for p in (*model.model.layers.parameters(), *model.model.norm.parameters()))
    routed = sum(p.nbytes for p in together.parameters())
    assert step_bytes(model, 0) == held - routed // 2 + model.head_weight.nbytes


def test_when_a_step_may_be_captured(experts, tmp_path, monkeypatch):
    """Not while the host reads who has tokens, as experts that are not alike, and all loops, want it."""
    monkeypatch.setattr(KVCache, "asynchronous", staticmethod(lambda device: True))
    monkeypatch.setattr("qwen2vl.graphs.resolve", lambda op, device, asked: served[op])
    for name, kind in (("awq", QuantExperts), ("fp8 blocks", SeparateExperts)):
        model = _loaded(quantise(experts, tmp_path / name, FORMATS[name])[0])
        assert isinstance(model.model.layers[0].mlp.experts, kind)
        for backend in ("eager", "native", "triton"):
            served = {"grouped_linear": "eager", "grouped_quant_linear": backend}
            free = backend == "triton" and kind is QuantExperts
            assert ("read on the host" in unfit(model, model.model)) != free and not unfit(model, model.visual)


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
