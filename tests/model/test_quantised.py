"""Quantised checkpoints, written here by their formats' definitions: what is read, kept, computed and refused."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.random_checkpoint import small_config, write_random_checkpoint
from qwen2vl import CheckpointError, Qwen2VL
from qwen2vl.quantization import QuantLinear, quantised
from qwen2vl.training.config import ModelConfig
from qwen2vl.training.stages import build_model, refuse_training
from tests.model import oracle
from tests.model.checkpoint_files import IDS, logits, rewrite

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm",
       "modules_to_not_convert": ["visual"]}  # fmt: skip
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False, "sym": True}
CHANNELS = {
    "quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["re:.*visual.*", "lm_head"],
    "config_groups": {"group_0": {"targets": ["Linear"], "input_activations": {"num_bits": 8, "dynamic": True},
        "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}}},
}  # fmt: skip


def _weights_of(strategy, **more):
    group = CHANNELS["config_groups"]["group_0"]
    weights = {**group["weights"], "strategy": strategy, **more}
    return {**CHANNELS, "config_groups": {"group_0": {**group, "weights": weights}}}


FORMATS = {
    "awq": AWQ,
    "awq, whole rows": {**AWQ, "group_size": -1},
    "gptq int4": GPTQ,
    "gptq int4 zeros": {**GPTQ, "sym": False},
    "gptq int8": {**GPTQ, "bits": 8, "group_size": 128},
    "gptq int8, whole rows": {**GPTQ, "bits": 8, "group_size": -1},
    "gptq v2": {**GPTQ, "sym": False, "checkpoint_format": "gptq_v2"},
    "gptq by gptqmodel": {**GPTQ, "sym": False, "meta": {"quantizer": ["gptqmodel:1.4.0"]}},
    "gptq act-order": {**GPTQ, "desc_act": True, "sym": False},
    "fp8 rows": CHANNELS,
    "fp8 tensors": _weights_of("tensor"),
    "fp8 blocks": _weights_of("block", block_structure=[48, 64]),
    "fp8 tensors by transformers": {"quant_method": "fp8", "weight_block_size": None},
    "fp8 fine-grained": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
}


def words(q, bits):
    """``(R, C)`` integers, 32 / bits neighbours of a row in a word, the first one lowest."""
    each = 32 // bits
    q = np.asarray(q, dtype=np.uint64).reshape(q.shape[0], -1, each)
    packed = sum(q[:, :, i] << np.uint64(bits * i) for i in range(each))
    return torch.from_numpy(packed.astype(np.uint32).view(np.int32).copy())


def write_layer(weight, how, seed):
    """What a file stores of a weight, and the values that it then has, in float64."""
    outputs, columns = weight.shape
    method, random = how["quant_method"], np.random.default_rng(seed)
    if method in ("compressed-tensors", "fp8"):
        name, (rows, width) = "weight_scale_inv", how.get("weight_block_size") or (outputs, columns)
        if method == "compressed-tensors":
            weights = how["config_groups"]["group_0"]["weights"]
            sizes = {"channel": (1, columns), "tensor": (outputs, columns), "block": weights.get("block_structure")}
            name, (rows, width) = "weight_scale", sizes[weights["strategy"]]
        scale = torch.empty(-(-outputs // rows), -(-columns // width))
        for i in range(scale.shape[0]):
            for j in range(scale.shape[1]):
                scale[i, j] = weight[i * rows : i * rows + rows, j * width : j * width + width].abs().max() / 448
        of = scale.repeat_interleave(rows, 0)[:outputs].repeat_interleave(width, 1)[:, :columns]
        q = (weight / of).to(torch.float8_e4m3fn)
        stored = {"weight": q, name: scale.reshape(()) if scale.numel() == 1 and method != "fp8" else scale}
        if method == "compressed-tensors":
            stored["input_scale"] = torch.tensor([0.5])
        return stored, q.double() * of.double()
    bits, group = how["bits"], how["group_size"] if how["group_size"] > 0 else columns
    g_idx = np.arange(columns) // group
    if how.get("desc_act"):
        g_idx = random.permutation(g_idx)
    groups, top = g_idx.max() + 1, 2**bits - 1
    q = np.zeros((outputs, columns), dtype=np.int64)
    zeros, scales = np.zeros((outputs, groups), dtype=np.int64), np.zeros((outputs, groups))
    w = weight.double().numpy()
    for g in range(groups):
        part = w[:, g_idx == g]
        low, high = part.min(1), part.max(1)
        if how.get("sym"):
            scales[:, g] = np.abs(part).max(1) / (top // 2)
            zeros[:, g] = top // 2 + 1
        else:
            scales[:, g] = (high - low) / top
            zeros[:, g] = np.clip(np.rint(-low / scales[:, g]), 0, top)
            # Which has a form in the second format, and in the first by a writer whose form is known.
            zeros[:3, g] = 0 if how.get("checkpoint_format") == "gptq_v2" or "meta" in how else zeros[:3, g]
        scales = scales.astype(np.float16).astype(np.float64)
        points = np.rint(part / scales[:, g : g + 1]) + zeros[:, g : g + 1]
        q[:, g_idx == g] = np.clip(points, 0, top)
    values = (q - zeros[:, g_idx]) * scales[:, g_idx]
    half = torch.from_numpy(scales.T.copy()).half()
    if method == "awq":
        order = np.arange(outputs).reshape(-1, 8)[:, [0, 2, 4, 6, 1, 3, 5, 7]].reshape(-1)
        stored = {"qweight": words(q.T[:, order], 4), "qzeros": words(zeros.T[:, order], 4), "scales": half}
    else:
        less = 0 if how.get("checkpoint_format") == "gptq_v2" else sum(1 << at for at in range(0, 32, bits))
        stored = {
            "qweight": words(q, bits).T.contiguous(),
            "qzeros": (words(zeros.T, bits).long() - less).int(),  # whole words, of which none borrows but by 0
            "scales": half,
            "g_idx": torch.from_numpy(g_idx.astype(np.int32)),
        }
    return stored, torch.from_numpy(values)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    return write_random_checkpoint(folder, small_config(), dtype=torch.float32, std=0.08)


def quantise(plain, folder, how, tower=False, kept=()):
    """``(the checkpoint, one with the same values in float32)``, every linear layer of the decoder quantised but for
    those ``kept``, routers and the gates of shared experts."""
    for name in ("quantised", "values"):
        shutil.copytree(plain, folder / name)
    stored, values = (load_file(plain / "model.safetensors") for _ in range(2))
    ends = ("_proj.weight", ".qkv.weight", ".proj.weight", ".fc1.weight", ".fc2.weight") if tower else ("_proj.weight",)
    parts_of = ("model.layers.", "visual.blocks.")
    names = [key.removesuffix(".weight") for key in stored if key.startswith(parts_of) and key.endswith(ends)]
    for seed, name in enumerate(name for name in names if name not in kept):
        weight = stored.pop(f"{name}.weight")
        parts, exact = write_layer(weight, how, seed)
        stored |= {f"{name}.{suffix}": tensor for suffix, tensor in parts.items()}
        values[f"{name}.weight"] = exact.float()
    save_file(stored, folder / "quantised" / "model.safetensors")
    save_file(values, folder / "values" / "model.safetensors")
    path = folder / "quantised" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": how}))
    return folder / "quantised", folder / "values"


@pytest.fixture(scope="module")
def int4(plain, tmp_path_factory):
    return quantise(plain, tmp_path_factory.mktemp("int4"), FORMATS["gptq act-order"])


def assert_same_files(*folders):
    before, after = (load_file(path / "model.safetensors") for path in folders)
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        same = after[key].view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else after[key]
        tensor = tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor
        assert tensor.shape == same.shape and tensor.dtype == same.dtype and torch.equal(tensor, same), key


@pytest.mark.parametrize("name", FORMATS)
def test_it_answers_as_its_values_and_is_saved_as_it_was(plain, tmp_path, name):
    folder, values = quantise(plain, tmp_path, FORMATS[name])
    torch.testing.assert_close(logits(folder), logits(values), rtol=2e-4, atol=2e-4)
    model = Qwen2VL.from_pretrained(folder, device="cpu")
    layers = quantised(model)
    assert len(layers) == 14 and all(name.startswith("model.layers.") for name in layers)
    one = layers["model.layers.0.self_attn.k_proj"]
    assert (one.zeros is None) == (name in ("gptq int4", "gptq int8", "gptq int8, whole rows") or "fp8" in name)
    assert (one.order is None) == (name != "gptq act-order")

    model.save_pretrained(tmp_path / "again")
    assert_same_files(folder, tmp_path / "again")
    for path in (folder, tmp_path / "again"):
        assert json.loads((path / "config.json").read_text())["quantization_config"] == FORMATS[name]


def test_the_towers_blocks_may_be_quantised(plain, tmp_path):
    folder, values = quantise(plain, tmp_path, FORMATS["fp8 rows"], tower=True)
    models = [Qwen2VL.from_pretrained(path, device="cpu") for path in (folder, values)]
    assert any(name.startswith("visual.blocks.") for name in quantised(models[0]))
    pixels, grid = torch.randint(0, 256, (16, 1176), dtype=torch.uint8), torch.tensor([[1, 4, 4]])
    with torch.no_grad():
        one, other = (model.encode_media(pixels, grid)[0] for model in models)
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_memory_and_casts(int4):
    """Weights stay in their bits, whatever dtype the model gets, and take no more than in the file."""
    folder, _ = int4
    stored = load_file(folder / "model.safetensors")
    model = Qwen2VL.from_pretrained(folder, device="cpu", dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    name = "model.layers.1.mlp.down_proj"
    layer = quantised(model)[name]
    held = sum(p.nbytes for p in layer.parameters())
    assert held <= sum(tensor.nbytes for key, tensor in stored.items() if key.startswith(f"{name}."))
    before = [p.clone() for p in layer.parameters()]
    attention = quantised(model)["model.layers.1.self_attn.q_proj"]
    model.to(torch.float32).to(torch.float16).float()
    assert attention.bias is not None and attention.bias.dtype == torch.float32
    after = list(layer.parameters())
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert layer.scales.dtype == torch.float16 and not any(p.requires_grad for p in after)
    assert "gptq int4, groups of 64, act-order" in repr(layer)


def test_biases_of_zeros_are_no_biases(int4, tmp_path):
    folder = shutil.copytree(int4[0], tmp_path / "copy")
    expected, name = logits(folder), "model.layers.0.mlp.up_proj.bias"
    rewrite(folder, lambda tensors: tensors.update({name: torch.zeros(512).half()}))
    assert torch.equal(logits(folder), expected)
    rewrite(folder, lambda tensors: tensors.update({name: torch.full((512,), 0.5).half()}))
    with pytest.raises(CheckpointError, match=f"{name}: unexpected, and not zero"):
        logits(folder)


def test_group_indices_of_zeros_mean_order(plain, tmp_path):
    """As some writers leave them where nothing is out of order."""
    folder, values = quantise(plain, tmp_path, FORMATS["gptq int4"])
    rewrite(folder, lambda tensors: [t.zero_() for name, t in tensors.items() if name.endswith("g_idx")])
    torch.testing.assert_close(logits(folder), logits(values), rtol=2e-4, atol=2e-4)


def test_zero_points_of_symmetric_weights_may_be_stored_as_they_are(plain, tmp_path):
    """In the first format, which has them less one, by some writers; where weights need not be symmetric, they are."""
    folder, values = quantise(plain, tmp_path, FORMATS["gptq int4"])
    eights = int(np.uint32(0x88888888).view(np.int32))
    rewrite(folder, lambda tensors: [t.fill_(eights) for name, t in tensors.items() if name.endswith("qzeros")])
    torch.testing.assert_close(logits(folder), logits(values), rtol=2e-4, atol=2e-4)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["sym"] = False
    path.write_text(json.dumps(config))
    assert not torch.allclose(logits(folder), logits(values), rtol=2e-2, atol=2e-2)


def test_adapters_learn_over_it_and_are_not_merged(int4, tmp_path):
    pytest.importorskip("peft", reason="peft is not installed")
    from qwen2vl.adapter import LoraShape, add_layers

    model, values = (Qwen2VL.from_pretrained(path, device="cpu") for path in int4)
    names = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
    for one in (model, values):
        torch.manual_seed(3)
        add_layers(one, names, LoraShape(rank=4, alpha=8))
        for name, parameter in one.named_parameters():
            if ".lora_B." in name:
                torch.nn.init.normal_(parameter, std=0.1)
        one(IDS).square().mean().backward()
    grads = [{n: p.grad for n, p in one.named_parameters() if p.grad is not None} for one in (model, values)]
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) == 4
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-3, atol=1e-4)
    model.save_adapter(tmp_path / "adapter")
    again = Qwen2VL.from_pretrained(int4[0], device="cpu", adapter=tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(again(IDS), model(IDS))
    with pytest.raises(CheckpointError, match=r"is quantised .*rounded to its few values"):
        again.merge_adapter()


def test_no_training_of_it(int4):
    with pytest.raises(CheckpointError, match=r"is quantised .gptq int4, groups of 64, act-order., .*no gradients"):
        build_model(ModelConfig(checkpoint=str(int4[0])))
    refuse_training(Qwen2VL.from_pretrained(int4[1], device="cpu"))


def _with(name, change):
    return lambda tensors: tensors.update({name: change(tensors[name])})


def _without(name):
    return lambda tensors: tensors.pop(name)


_Q = "model.layers.0.mlp.gate_proj"
TENSORS = [
    (_without(f"{_Q}.scales"), f"{_Q}.scales: missing"),
    (_without(f"{_Q}.qzeros"), f"{_Q}.qzeros: missing"),
    (_without(f"{_Q}.qweight"), f"{_Q}.weight: missing|does not tell of"),
    (
        _with(f"{_Q}.qweight", lambda t: t[:-1].clone()),
        rf"{_Q}.qweight: shape \(31, 512\), the config wants \(32, 512\)",
    ),
    (_with(f"{_Q}.qzeros", lambda t: t.T.contiguous()), rf"{_Q}.qzeros: shape \(64, 4\), the config wants \(4, 64\)"),
    (_with(f"{_Q}.qweight", lambda t: t.long()), f"{_Q}.qweight: dtype I64 is not I32"),
    (_with(f"{_Q}.scales", lambda t: t.int()), f"{_Q}.scales: dtype I32 is not F32 or F16 or BF16"),
    (_with(f"{_Q}.scales", lambda t: t / 0), f"{_Q}.scales: some are no finite numbers"),
    (_with(f"{_Q}.qzeros", lambda t: t | 15), f"{_Q}.qzeros: hold 15, a zero point of 0 less one"),
    (_with(f"{_Q}.g_idx", lambda t: t + 1), f"{_Q}.g_idx: must name each of 4 groups 64 times"),
    (_with(f"{_Q}.g_idx", lambda t: -t), f"{_Q}.g_idx: must name each of 4 groups 64 times"),
    (lambda t: t.update({"visual.merger.mlp.0.qweight": torch.zeros(1)}), "visual.merger.mlp.0: is quantised, and no"),
    (lambda t: t.update({"lm_head.qweight": torch.zeros(1)}), "lm_head: is quantised, and no linear layer"),
    (lambda t: t.update({f"{_Q}.weight": torch.zeros(512, 256)}), f"{_Q}.weight: unexpected"),
]


@pytest.mark.parametrize(("change", "words"), TENSORS)
def test_tensors_that_do_not_fit(int4, tmp_path, change, words):
    folder = shutil.copytree(int4[0], tmp_path / "copy")
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=words):
        Qwen2VL.from_pretrained(folder, device="cpu")


CONFIGS = [
    ({"quant_method": "bitsandbytes"}, "quant_method 'bitsandbytes' is not supported; awq, gptq"),
    ({"quant_method": ["awq"]}, r"quant_method \['awq'\] is not supported"),
    ({"bits": 3}, "bits must be 4 or 8 for gptq, got 3"),
    ({"bits": True}, "bits must be 4 or 8 for gptq, got True"),
    ({"group_size": 48}, "group_size must be -1 or a multiple of 32, got 48"),
    ({"group_size": 0}, "group_size must be -1 or a multiple of 32, got 0"),
    ({"group_size": "128"}, "group_size must be -1 or a multiple of 32, got '128'"),
    ({"checkpoint_format": "marlin"}, "checkpoint_format 'marlin' is not supported"),
    ({"dynamic": {"x": {}}}, "dynamic, other settings for some layers, is not supported"),
    ({"desc_act": "no"}, "desc_act must be true or false, got 'no'"),
    ({"desc_act": False}, "g_idx: columns are out of their order, but desc_act is false"),
    ({"bits": 8}, r"qweight: shape \(32, 256\), the config wants \(64, 256\)"),
    ({"group_size": 128}, "the config wants"),
    ({**AWQ, "bits": 8}, "bits must be 4 for awq, got 8"),
    ({**AWQ, "version": "gemv"}, "AWQ's version 'gemv' is not supported"),
    ({**AWQ, "zero_point": False}, "AWQ without zero_point is not supported"),
    (CHANNELS, "says compressed-tensors fp8, rows, but no layer in the files is quantised so"),
    ({**CHANNELS, "format": "pack-quantized"}, "of format 'pack-quantized' are not supported"),
    ({**CHANNELS, "config_groups": {}}, "config_groups must be one group that has weights"),
    (_weights_of("channel", num_bits=4), "weights must be symmetric floats of 8 bits"),
    (_weights_of("group"), "strategy 'group' is not supported"),
    (_weights_of("block", block_structure=[128, 100]), "block_structure must be two sizes, columns a multiple of 32"),
    ({"quant_method": "fp8"}, "weight_block_size must be two sizes"),
    ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt 'e5m2' is not supported"),
]


@pytest.mark.parametrize(("changes", "words"), CONFIGS)
def test_configs_that_do_not_fit(int4, tmp_path, changes, words):
    folder = shutil.copytree(int4[0], tmp_path / "copy")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= changes
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=words):
        Qwen2VL.from_pretrained(folder, device="cpu")


def test_sizes_that_cannot_be_quantised(plain, tmp_path):
    folder, _ = quantise(plain, tmp_path, FORMATS["gptq int4"])
    rewrite(folder, lambda t: t.update({"visual.blocks.0.mlp.fc1.qweight": torch.zeros(20, 636, dtype=torch.int32)}))
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["vision_config"]["mlp_ratio"] = 3.975  # 636 rows, no multiple of the eight in a word
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"visual.blocks.0.mlp.fc1: cannot be gptq int4.*636 rows of 160"):
        Qwen2VL.from_pretrained(folder, device="cpu")


def test_progress_counts_layers(int4):
    seen = []
    model = Qwen2VL.from_pretrained(int4[0], device="cpu", progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == list(range(1, seen[-1][1] + 1)) and len({total for _, total in seen}) == 1
    assert isinstance(model.get_submodule(_Q), QuantLinear)


@pytest.mark.parametrize("name", ["fp8 fine-grained", "fp8 tensors by transformers"])
def test_transformers_reads_the_same_from_fp8(plain, tmp_path, name):
    """By its own code, which has no kernels for a CPU and makes 16-bit or 32-bit weights of it."""
    how = FORMATS[name] | {"modules_to_not_convert": ["model.visual", "visual", "lm_head"]}
    folder, _ = quantise(plain, tmp_path, how)
    theirs = oracle.load(folder)
    weight = theirs.model.language_model.layers[1].mlp.down_proj.weight
    assert weight.dtype == torch.float32 and not torch.equal(weight, torch.ones_like(weight))
    with torch.no_grad():
        torch.testing.assert_close(logits(folder), theirs(IDS).logits, rtol=2e-4, atol=2e-4)
