"""Mixtures of experts beside transformers' Qwen2-MoE and Qwen3-VL-MoE, in every arithmetic that both have."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM, Qwen3VLMoeTextConfig
from transformers.models.qwen2_moe import modeling_qwen2_moe
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextSparseMoeBlock
from transformers.utils import logging

from qwen2vl import CheckpointError, Conversation, GenerationConfig, Qwen2VL, Qwen2VLConfig, generate
from qwen2vl.cache import KVCache
from qwen2vl.graphs import unfit
from qwen2vl.moe import SparseMoE, load_balancing_loss
from qwen2vl.moe_config import MoEConfig
from qwen2vl.quantising import quantise
from qwen2vl.quantization import quantised
from qwen2vl.speed import step_bytes
from qwen2vl.training.flops import layer_matrices, layer_parameters, parameters
from qwen2vl.training.stages import load_qwen2
from qwen2vl_kernels import use_backend
from tests.conftest import relative_error, triton_where_it_serves
from tests.model.checkpoint_files import rewrite
from tests.training.samples import tiny_model, tiny_moe_config

EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
IDS = torch.tensor([[3, 17, 41, 8, 8, 29, 50, 3, 12, 33, 5, 44]])


@pytest.fixture
def exact(monkeypatch):
    """transformers' router and norms in the dtype of the model, where they round to float32."""
    monkeypatch.setattr(torch, "float", torch.float64)
    norm = lambda self, x: torch.nn.functional.rms_norm(x, x.shape[-1:], self.weight, self.variance_epsilon)  # noqa: E731
    monkeypatch.setattr(modeling_qwen2_moe.Qwen2MoeRMSNorm, "forward", norm)


def _block(normed: bool, shared: int) -> SparseMoE:
    block = SparseMoE(32, MoEConfig(**EXPERTS, norm_topk_prob=normed, shared_expert_intermediate_size=shared))
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return block.double()


def _theirs(kind: str, normed: bool):
    if kind == "qwen3_vl":
        return Qwen3VLMoeTextSparseMoeBlock(Qwen3VLMoeTextConfig(**EXPERTS, hidden_size=32)).double()
    config = Qwen2MoeConfig(**EXPERTS, hidden_size=32, shared_expert_intermediate_size=40, norm_topk_prob=normed)
    return Qwen2MoeSparseMoeBlock(config).double()


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize(("kind", "normed"), [("qwen2", False), ("qwen2", True), ("qwen3_vl", True)])
def test_a_block_and_its_gradients_equal_those_of_transformers(kind, normed, backend, exact):
    if backend == "triton":
        triton_where_it_serves()
    ours, theirs = _block(normed, 40 if kind == "qwen2" else 0), _theirs(kind, normed)
    theirs.load_state_dict(ours.state_dict(), strict=True)  # names are theirs
    x, grad = torch.randn(2, 1, 13, 32, dtype=torch.float64)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    with use_backend(grouped_linear=backend, group_by_expert=backend):
        got, logits = ours(inputs[0][0])
        torch.autograd.backward(got, grad[0])
    want = theirs(inputs[1])
    torch.autograd.backward(want, grad)
    assert relative_error(got, want[0]) < 1e-14 and logits.shape == (13, 5)
    assert relative_error(inputs[0].grad, inputs[1].grad) < 1e-13
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert relative_error(parameter.grad, expected[name].grad) < 1e-13, name


def test_the_router_computes_in_float32():
    """As transformers' does: bf16 would tie experts that float32 tells apart."""
    ours, theirs = _block(True, 40).bfloat16(), _theirs("qwen2", True).bfloat16()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(1, 200, 32).bfloat16()
    with torch.no_grad():
        got, want = ours(x[0])[0], theirs(x)[0]
    torch.testing.assert_close(got, want, rtol=0, atol=2**-6 * want.abs().max().item())


def text_config(model: Qwen2VL) -> dict:
    """What Qwen2-MoE's config.json says of the same language model."""
    flat = model.config.to_dict()
    vision = ("vision_config", "rope_scaling", "architectures")
    return {k: v for k, v in flat.items() if k not in vision} | {"model_type": "qwen2_moe"}


def _load_theirs(folder, dtype=torch.float64):
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    ways = {"attn_implementation": "eager", "experts_implementation": "eager"}
    return Qwen2MoeForCausalLM.from_pretrained(folder, dtype=dtype, **ways)


def test_a_text_model_equals_qwen2_moe(tmp_path, exact):
    """Logits, the load-balancing loss and every gradient, of weights that we saved and transformers loaded."""
    model = tiny_model(config=tiny_moe_config())
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(text_config(model)))
    theirs, model = _load_theirs(tmp_path), model.double()
    cu_seqlens, positions = torch.tensor([0, 12], dtype=torch.int32), torch.arange(12).expand(3, -1)
    router_logits = []
    hidden = model.hidden_states(IDS[0], positions, cu_seqlens, router_logits=router_logits)
    logits = hidden @ model.head_weight.T
    want = theirs(IDS, output_router_logits=True, labels=IDS)
    assert relative_error(logits, want.logits[0]) < 1e-7  # transformers' rotary arithmetic is float32
    aux = load_balancing_loss(router_logits, 2)
    assert len(router_logits) == 2 and relative_error(aux, want.aux_loss) < 2e-7  # theirs is float32
    loss = torch.nn.functional.cross_entropy(logits[:-1], IDS[0, 1:]) + 0.5 * aux
    loss.backward()
    want.loss.backward()
    assert relative_error(loss, want.loss) < 2e-7
    ours = {name: p for name, p in model.named_parameters() if not name.startswith("visual.")}
    expected = dict(theirs.named_parameters())
    assert ours.keys() == expected.keys()
    for name, parameter in ours.items():
        assert relative_error(parameter.grad, expected[name].grad) < 1e-6, name


def test_balanced_routers_have_the_least_loss():
    even = torch.eye(4).mul(50).repeat(3, 1)
    torch.testing.assert_close(load_balancing_loss([even, even], 1), torch.tensor(1.0))
    torch.testing.assert_close(load_balancing_loss([torch.zeros(3, 4)], 4), torch.tensor(4.0))
    torch.testing.assert_close(load_balancing_loss([even[:1].repeat(9, 1)], 1), torch.tensor(4.0))


def test_greedy_tokens_are_those_of_whole_forwards():
    """Two prompts of different lengths in a cache, whose rows meet experts together."""
    model = tiny_model(config=tiny_moe_config(norm_topk_prob=True)).eval()
    config = GenerationConfig(max_new_tokens=6, eos_token_ids=(10**6,))
    with torch.no_grad():
        mask = torch.tensor([[1] * 12, [0] * 5 + [1] * 7])
        ids = torch.cat((IDS, IDS.roll(3, 1)))
        got = generate(model, {"input_ids": ids, "attention_mask": mask}, config=config).sequences
        for row, begin in ((0, 0), (1, 5)):
            known = ids[row, begin:].tolist()
            for token in got[row]:
                last = model(torch.tensor([known]), last_only=True)[0, 0]
                last[[57, 60, 61]] = -torch.inf  # what no answer holds
                assert token == last.argmax().item()
                known.append(token)


def test_a_conversation_keeps_its_cache():
    model, conversation = tiny_model(config=tiny_moe_config()).eval(), Conversation()
    config = GenerationConfig(max_new_tokens=2, eos_token_ids=(10**6,))
    for ids, kept in ((IDS[:, :8], 0), (IDS, 8)):
        got = generate(model, {"input_ids": ids}, config=config, conversation=conversation)
        assert got.cached_tokens == [kept]
        assert got.sequences == generate(model, {"input_ids": ids}, config=config).sequences


def test_a_token_is_the_same_in_every_pack():
    model = tiny_model(config=tiny_moe_config()).eval()
    with torch.no_grad():
        alone = model(IDS[:, :7])
        ids, mask = torch.cat((IDS, IDS.flip(1))), torch.tensor([[1] * 7 + [0] * 5, [1] * 12])
        torch.testing.assert_close(model(ids, mask)[:1, :7], alone, rtol=1e-5, atol=1e-5)


def test_a_fused_step_is_not_for_experts(monkeypatch):
    """The five launches of a dense layer; and a graph wants products that read nothing on the host."""
    model = tiny_model(config=tiny_moe_config(), dtype=torch.bfloat16).eval()
    monkeypatch.setattr("qwen2vl.text.resolve", lambda *a: "triton")
    monkeypatch.setattr("qwen2vl.text.fused", lambda *a: True)
    x = torch.zeros(2, 32, dtype=torch.bfloat16)
    with torch.no_grad():
        assert not model.model.steps(x) and tiny_model(dtype=torch.bfloat16).model.steps(x)
    monkeypatch.setattr(KVCache, "asynchronous", staticmethod(lambda device: True))
    triton = triton_where_it_serves()
    assert "read on the host" in unfit(model, model.model) and not unfit(model, model.visual)
    with use_backend(**triton):
        assert not unfit(model, model.model)


# ---------------------------------------------------------------------------------------------------------------- files


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    model = tiny_model(config=tiny_moe_config())
    model.save_pretrained(folder, max_shard_bytes=10**9)
    return model, folder


@pytest.fixture
def folder(saved, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((saved[1] / name).read_bytes())
    return tmp_path


def _assert_same(one, other):
    theirs = dict(other.named_parameters())
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, theirs[name]), name


def test_files_hold_every_expert_apart(saved, tmp_path):
    model, folder = saved
    loaded = Qwen2VL.from_pretrained(folder, device="cpu")
    assert loaded.config == model.config
    _assert_same(loaded, model)
    prefix, names = "model.layers.2.mlp.", []
    rewrite(folder, lambda tensors: names.extend(tensors))
    want = {f"experts.{e}.{p}_proj.weight" for e in range(5) for p in ("gate", "up", "down")}
    want |= {f"shared_expert.{p}_proj.weight" for p in ("gate", "up", "down")}
    want |= {"gate.weight", "shared_expert_gate.weight"}
    assert {name.removeprefix(prefix) for name in names if name.startswith(prefix)} == want
    model.save_pretrained(tmp_path, max_shard_bytes=20_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    _assert_same(Qwen2VL.from_pretrained(tmp_path, device="cpu"), model)
    half = Qwen2VL.from_pretrained(folder, device="cpu", dtype="bfloat16")
    _assert_same(half, tiny_model(config=tiny_moe_config(), dtype=torch.bfloat16))
    half.save_pretrained(folder.parent / "half")
    _assert_same(Qwen2VL.from_pretrained(folder.parent / "half", device="cpu"), half)


def _stack(tensors, layer, transposed=False):
    """The form in which transformers 5 holds a layer's experts."""
    prefix = f"model.layers.{layer}.mlp.experts."
    take = lambda name: torch.stack([tensors.pop(f"{prefix}{e}.{name}_proj.weight") for e in range(5)])  # noqa: E731
    gate_up, down = torch.cat((take("gate"), take("up")), 1), take("down")
    tensors[f"{prefix}gate_up_proj"] = gate_up.mT.contiguous() if transposed else gate_up
    tensors[f"{prefix}down_proj"] = down.mT.contiguous() if transposed else down


def test_stacked_experts_are_read(saved, folder):
    rewrite(folder, lambda tensors: _stack(tensors, 2))
    _assert_same(Qwen2VL.from_pretrained(folder, device="cpu"), saved[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.0.mlp.experts.3.up_proj.weight"), r"experts.3.up_proj.weight: missing"),
        (lambda t: t.update({"model.layers.0.mlp.experts.5.up_proj.weight": torch.zeros(24, 32)}), "5.up_.*unexpected"),
        (lambda t: t.pop("model.layers.2.mlp.gate.weight"), "layers.2.mlp.gate.weight: missing"),
        (lambda t: _stack(t, 0, transposed=True), r"gate_up_proj: shape \(5, 32, 48\), the config wants \(5, 48, 32\)"),
        (
            lambda t: t.update({"model.layers.0.mlp.experts.down_proj": torch.zeros(5, 32, 24)}),
            r"experts.0.down_proj.weight: unexpected",
        ),
    ],
)
def test_experts_that_do_not_fit_are_named(folder, change, message):
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=message):
        Qwen2VL.from_pretrained(folder, device="cpu")


def test_qwen2_moe_is_where_training_may_begin(saved, tmp_path):
    """Weights that transformers saved, and a config that says another thing than the model's."""
    model = saved[0]
    (tmp_path / "ours").mkdir()
    model.save_pretrained(tmp_path / "ours")
    (tmp_path / "ours" / "config.json").write_text(json.dumps(text_config(model)))
    _load_theirs(tmp_path / "ours", torch.float32).save_pretrained(tmp_path / "theirs")
    begun = Qwen2VL.from_config(model.config, device="meta", dtype="float32")
    load_qwen2(begun, tmp_path / "theirs")
    _assert_same(begun.model, model.model)
    text = model.config.text
    other = replace(model.config, text=replace(text, moe=replace(text.moe, norm_topk_prob=True)))
    with pytest.raises(CheckpointError, match="norm_topk_prob False, the model has True"):
        load_qwen2(Qwen2VL.from_config(other, device="meta", dtype="float32"), tmp_path / "theirs")
    with pytest.raises(CheckpointError, match=r"model_type 'qwen2'\), got 'qwen2_moe'"):
        load_qwen2(tiny_model(), tmp_path / "theirs")


# --------------------------------------------------------------------------------------------------------------- config


def _stated(**changes):
    flat = {**tiny_moe_config().to_dict(), **changes}
    return {key: value for key, value in flat.items() if value != "absent"}


def test_configs_round_trip_and_dense_ones_stay_as_they_are():
    config = tiny_moe_config()
    assert Qwen2VLConfig.from_dict(config.to_dict()) == config
    assert config.to_dict()["model_type"] == "qwen2_vl_moe"  # which what knows only dense decoders refuses
    assert [config.text.experts(i) is not None for i in range(3)] == [True, False, True]
    nested = _stated()
    keys = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob", "mlp_only_layers")
    nested["text_config"] = {key: nested.pop(key) for key in keys}
    assert Qwen2VLConfig.from_dict(nested) == config
    read = Qwen2VLConfig.from_dict(_stated(mlp_only_layers=None, decoder_sparse_step=2)).text
    assert [read.experts(i) is not None for i in range(3)] == [False, True, False]
    dense = Qwen2VLConfig.from_dict(_stated(model_type="qwen2_vl", num_experts=0))
    assert dense.text.moe is None and not {"num_experts", "norm_topk_prob"} & dense.to_dict().keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": "absent"}, "num_experts_per_tok is there and num_experts is missing"),
        ({"num_experts": 0}, "model_type is 'qwen2_vl_moe', and num_experts is missing or 0"),
        ({"num_experts": -1}, "num_experts must be an integer from 1"),
        ({"num_experts": True}, "num_experts must be an integer from 1"),
        ({"num_experts": 10**5}, "num_experts must be at most 10000"),
        ({"num_experts_per_tok": 6}, "num_experts_per_tok 6 must be at most num_experts 5"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok must be an integer from 1"),
        ({"moe_intermediate_size": 2.5}, "moe_intermediate_size must be an integer from 1"),
        ({"moe_intermediate_size": "absent"}, "missing: moe_intermediate_size"),
        ({"norm_topk_prob": "absent"}, "missing: norm_topk_prob"),
        ({"norm_topk_prob": 1}, "norm_topk_prob must be true or false, got 1"),
        ({"shared_expert_intermediate_size": -4}, "shared_expert_intermediate_size must be an integer from 0"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step must be an integer from 1"),
        ({"decoder_sparse_step": 9}, "num_experts is 5, but decoder_sparse_step 9 .* leave no layer of 3"),
        ({"mlp_only_layers": [3]}, "mlp_only_layers names layer 3, num_hidden_layers is 3"),
        ({"mlp_only_layers": [0, "1"]}, "mlp_only_layers must be a list of layers"),
        ({"mlp_only_layers": 1}, "mlp_only_layers must be a list of layers, got 1"),
        ({"router_aux_loss_coef": -1}, "router_aux_loss_coef must be a number from 0"),
        ({"router_aux_loss_coef": float("nan")}, "router_aux_loss_coef must be a number from 0"),
        ({"num_local_experts": 8}, "num_local_experts is not supported"),
    ],
)
def test_configs_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(CheckpointError, match=message):
        Qwen2VLConfig.from_dict(_stated(**changes))


def test_the_keys_of_a_file_are_no_config_of_experts():
    config = tiny_moe_config()
    with pytest.raises(CheckpointError, match=r"moe must be a MoEConfig or None, got \{'num_experts': 5"):
        replace(config.text, moe=config.text.moe.to_dict())


def test_sizes_that_the_files_cannot_hold_are_refused(folder):
    for key in ("num_experts", "shared_expert_intermediate_size"):
        (folder / "config.json").write_text(json.dumps(_stated(**{key: 9999})))
        with pytest.raises(CheckpointError, match=f"{key} asks for a matrix of"):
            Qwen2VL.from_pretrained(folder, device="cpu")
    # No layer is dense, and what the width of a dense one would be says nothing.
    config = tiny_moe_config(mlp_only_layers=())
    config = replace(config, text=replace(config.text, intermediate_size=10**9))
    Qwen2VL.from_config(tiny_moe_config(mlp_only_layers=()), device="cpu").save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    assert Qwen2VL.from_pretrained(folder, device="cpu").config == config


# --------------------------------------------------------------------------------------------------------------- counts


def test_parameters_and_the_matrices_that_a_token_meets(saved):
    model, config = saved[0], saved[0].config
    llm = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("visual."))
    assert parameters(config)["llm"] == llm
    for i, layer in enumerate(model.model.layers):
        assert layer_parameters(config, i) == sum(p.numel() for p in layer.parameters())
        matrices = {name: p.numel() for name, p in layer.named_parameters() if p.ndim > 1}
        met = sum(n * 2 // 5 if ".experts." in name else n for name, n in matrices.items())
        assert layer_matrices(config, i) == met
    read = sum(4 * layer_matrices(config, i) for i in range(3))
    one_dimensional = sum(p.nbytes for p in model.model.parameters() if p.ndim == 1)
    assert step_bytes(model, 0) == read + one_dimensional + model.head_weight.nbytes


@pytest.mark.parametrize("form", ["awq", "gptq-int8", "fp8"])
def test_experts_are_rounded_one_by_one(tmp_path, form):
    """To what is nearest, and read again; routers and gates keep their bits."""
    config = tiny_moe_config(moe_intermediate_size=64, shared_expert_intermediate_size=64)
    config = replace(config, text=replace(config.text, intermediate_size=64))
    model, exact = tiny_model(config=config), tiny_model(config=config)
    quantise(model, form, 32).save_pretrained(tmp_path)
    read = Qwen2VL.from_pretrained(tmp_path, device="cpu")
    assert "model.layers.2.mlp.experts.4.down_proj" in quantised(read) and read.config == model.config
    with torch.no_grad():
        assert torch.equal(read(IDS), model(IDS))
    told = json.dumps(read.config.to_dict()["quantization_config"])
    for name in ("gate", "shared_expert_gate"):
        path = f"model.layers.0.mlp.{name}"
        assert torch.equal(read.get_submodule(path).weight, exact.get_submodule(path).weight) and f'"{path}"' in told
    unit = torch.eye(64)
    for layer in (0, 2):
        for e, stacked in enumerate(exact.model.layers[layer].mlp.experts.down_proj):
            rounded = quantised(read)[f"model.layers.{layer}.mlp.experts.{e}.down_proj"](unit).T
            assert 0 < relative_error(rounded, stacked) < {"awq": 0.15, "gptq-int8": 0.01, "fp8": 0.05}[form]


def test_experts_are_not_calibrated():
    with pytest.raises(CheckpointError, match="calibration: wants a dense model"):
        quantise(tiny_model(config=tiny_moe_config(moe_intermediate_size=64)), "awq", 32, calibration=[])
