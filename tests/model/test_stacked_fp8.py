"""Experts stacked in fp8, as transformers' FP8Experts holds them: what is read, by how many ranks, and refused."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import FineGrainedFP8Config, Qwen2MoeConfig
from transformers.integrations import finegrained_fp8

from qwen2vl import CheckpointError, Qwen2VL
from qwen2vl.parallel import bytes_per_rank
from qwen2vl.quantization import quantised
from qwen2vl.stacked_fp8 import part_of
from tests.model.checkpoint_files import logits, rewrite
from tests.model.rank_memory import OneOfRanks
from tests.model.test_quantised import FORMATS, assert_same_files, quantise
from tests.model.test_quantised_experts import experts  # noqa: F401

_PREFIX = "model.layers.0.mlp.experts"
_HOW = FORMATS["fp8 fine-grained"]
_STACKS = ("gate_up_proj", "down_proj")


def stack(folder, ends=(".weight", ".weight_scale_inv")):
    """Put the experts of a checkpoint, which lie apart, together as transformers' converter of Qwen2-MoE does."""

    def change(tensors):
        for end in ends:
            one = lambda e, part, end=end: tensors.pop(f"{_PREFIX}.{e}.{part}_proj{end}")  # noqa: E731
            name = end.removeprefix(".weight")
            both = [torch.cat([one(e, "gate"), one(e, "up")]) for e in range(4)]
            tensors[f"{_PREFIX}.gate_up_proj{name}"] = torch.stack(both)
            tensors[f"{_PREFIX}.down_proj{name}"] = torch.stack([one(e, "down") for e in range(4)])

    rewrite(folder, change)
    return folder


@pytest.fixture(scope="module")
def apart(experts, tmp_path_factory):  # noqa: F811
    """``(experts one by one in fp8, the same values in float32)``."""
    return quantise(experts, tmp_path_factory.mktemp("apart"), _HOW)


@pytest.fixture(scope="module")
def stacked(apart, tmp_path_factory):
    return stack(shutil.copytree(apart[0], tmp_path_factory.mktemp("stacked") / "folder"))


def test_names_and_shapes_are_those_of_transformers(stacked):
    _compare_with_transformers(stacked, (128, 128))


def test_scales_of_tensors(experts, tmp_path):  # noqa: F811
    folder, values = quantise(experts, tmp_path, FORMATS["fp8 tensors by transformers"])
    wanted = logits(folder)
    _compare_with_transformers(stack(folder), None)
    assert torch.equal(logits(folder), wanted)
    torch.testing.assert_close(wanted, logits(values), rtol=2e-4, atol=2e-4)


def _compare_with_transformers(folder, block):
    config = Qwen2MoeConfig(hidden_size=256, moe_intermediate_size=128, num_experts=4)
    with torch.device("meta"):
        theirs = finegrained_fp8.FP8Experts(config, block_size=block)
    tensors = load_file(folder / "model.safetensors")
    ours = {name.removeprefix(f"{_PREFIX}."): t for name, t in tensors.items() if name.startswith(f"{_PREFIX}.")}
    wanted = {name: (one.shape, one.dtype) for name, one in theirs.named_parameters()}
    assert {name: (one.shape, one.dtype) for name, one in ours.items()} == wanted


def test_it_answers_as_experts_that_lie_apart(apart, stacked, tmp_path):
    """And as its values; it is saved with experts one by one, as those in 16 bits are."""
    assert torch.equal(logits(stacked), logits(apart[0]))
    torch.testing.assert_close(logits(stacked), logits(apart[1]), rtol=2e-4, atol=2e-4)
    model = Qwen2VL.from_pretrained(stacked, device="cpu")
    assert len(quantised(model)) == 14 + 3 * 4
    model.save_pretrained(tmp_path / "again")
    assert_same_files(apart[0], tmp_path / "again")


def test_what_transformers_quantises_is_read_as_it_reads_it(experts, tmp_path):  # noqa: F811
    """Stacks made by its own operation of a model's experts, beside the values that its reverse makes of them."""
    config = FineGrainedFP8Config(weight_block_size=(128, 128))
    to_fp8 = finegrained_fp8.Fp8Quantize(SimpleNamespace(quantization_config=config))
    folders = [shutil.copytree(experts, tmp_path / name) for name in ("theirs", "values")]
    for folder in folders:
        stack(folder, (".weight",))
    stored, values = (load_file(folder / "model.safetensors") for folder in folders)
    for name in _STACKS:
        key = f"{_PREFIX}.{name}"
        made = to_fp8.convert({key: stored[key]})
        stored |= made
        values[key] = to_fp8.reverse_op._dequantize_one(made[key], made[f"{key}_scale_inv"], torch.float32)
    for folder, tensors in zip(folders, (stored, values), strict=True):
        save_file(tensors, folder / "model.safetensors")
    path = folders[0] / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": config.to_dict()}))
    torch.testing.assert_close(logits(folders[0]), logits(folders[1]), rtol=2e-4, atol=2e-4)


def test_one_stack_may_be_of_floats(apart, stacked, tmp_path):
    folder = shutil.copytree(stacked, tmp_path / "mixed")
    values = load_file(apart[1] / "model.safetensors")
    down = torch.stack([values[f"{_PREFIX}.{e}.down_proj.weight"] for e in range(4)])

    def change(tensors):
        del tensors[f"{_PREFIX}.down_proj_scale_inv"]
        tensors[f"{_PREFIX}.down_proj"] = down

    rewrite(folder, change)
    assert len(quantised(Qwen2VL.from_pretrained(folder, device="cpu"))) == 14 + 2 * 4
    torch.testing.assert_close(logits(folder), logits(apart[1]), rtol=2e-4, atol=2e-4)


def test_a_rank_reads_its_own_experts(experts, tmp_path):  # noqa: F811
    """Of four experts two for each of two ranks, which read the whole tensors' bits."""
    folder, _ = quantise(experts, tmp_path, _HOW | {"weight_block_size": [32, 32]})
    tensors = load_file(stack(folder) / "model.safetensors")
    reckoned = bytes_per_rank(Qwen2VL.from_pretrained(folder, device="cpu"), 2)
    for rank in range(2):
        model = Qwen2VL.from_pretrained(folder, parallel=OneOfRanks(rank, 2))
        assert reckoned[rank] == sum(p.nbytes for p in model.parameters())
        layers = {name: layer for name, layer in quantised(model).items() if name.startswith(_PREFIX)}
        assert len(layers) == 2 * 3
        for name, layer in layers.items():
            _, expert, part = name.rsplit(".", 2)
            assert int(expert) in (2 * rank, 2 * rank + 1)
            key = f"{_PREFIX}.{'down_proj' if part == 'down_proj' else 'gate_up_proj'}"
            for end, got in (("", layer.weight), ("_scale_inv", layer.scales)):
                of = tensors[key + end][int(expert)]
                rows = of.chunk(1 if part == "down_proj" else 2)[int(part == "up_proj")]
                assert torch.equal(got, rows.view(got.dtype))


def _with(name, change):
    return lambda t: t.update({f"{_PREFIX}.{name}": change(t[f"{_PREFIX}.{name}"])})


DAMAGE = [
    (lambda t: t.pop(f"{_PREFIX}.gate_up_proj_scale_inv"), "experts.gate_up_proj_scale_inv: missing"),
    (lambda t: t.pop(f"{_PREFIX}.down_proj"), "experts.0.down_proj.weight: missing"),
    (
        _with("gate_up_proj", lambda t: t[:3].clone()),
        r"experts.gate_up_proj: shape \(3, 256, 256\), the config wants \(4, 256, 256\)",
    ),
    (
        _with("down_proj", lambda t: t.mT.contiguous()),
        r"experts.down_proj: shape \(4, 128, 256\), the config wants \(4, 256, 128\)",
    ),
    (
        _with("gate_up_proj_scale_inv", lambda t: t[:, :1].clone()),
        r"experts.gate_up_proj_scale_inv: shape \(4, 1, 2\), the config wants \(4, 2, 2\)",
    ),
    (_with("down_proj_scale_inv", lambda t: t.int()), "experts.down_proj_scale_inv: dtype I32 is not F32"),
    (_with("down_proj_scale_inv", lambda t: t / 0), "experts.0.down_proj.weight_scale_inv: some are no finite"),
    (
        lambda t: t.update({f"{_PREFIX}.2.up_proj.weight": torch.zeros(128, 256)}),
        "experts.2.up_proj.weight: unexpected",
    ),
    (
        lambda t: t.update({f"{_PREFIX}.gate_up_proj_activation_scale": torch.ones(4)}),
        "experts.gate_up_proj_activation_scale: unexpected",
    ),
]


@pytest.mark.parametrize(("change", "words"), DAMAGE)
def test_stacks_that_do_not_fit(stacked, tmp_path, change, words):
    folder = shutil.copytree(stacked, tmp_path / "copy")
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=words):
        Qwen2VL.from_pretrained(folder, device="cpu")


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (None, r"experts.gate_up_proj: dtype F8_E4M3 is no float type"),
        (_HOW | {"weight_block_size": [96, 128]}, r"gate_up_proj: cannot be fp8 fp8, blocks of 96 x 128: .* 128 each"),
        (FORMATS["fp8 blocks"], r"experts.gate_up_proj: dtype F8_E4M3 is no float type"),
    ],
)
def test_configs_that_do_not_fit_stacks(stacked, tmp_path, how, words):
    folder = shutil.copytree(stacked, tmp_path / "copy")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]
    path.write_text(json.dumps(config if how is None else config | {"quantization_config": how}))
    with pytest.raises(CheckpointError, match=words):
        Qwen2VL.from_pretrained(folder, device="cpu")


def test_names():
    assert part_of("model.layers.3.mlp.experts.7.up_proj.weight_scale_inv") == (
        "model.layers.3.mlp.experts.gate_up_proj", "model.layers.3.mlp.experts.gate_up_proj_scale_inv", 7, 1, 2
    )  # fmt: skip
    for other in ("mlp.experts.7.up_proj.weight_scale", "mlp.experts.07.up_proj.weight", "mlp.shared_expert.up_proj"):
        assert part_of(f"model.layers.3.{other}") is None
