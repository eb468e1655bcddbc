"""What the files of a checkpoint say when they disagree: a head beside its embedding, a single file beside shards."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.random_checkpoint import small_config, write_random_checkpoint
from qwen2vl import CheckpointError, Qwen2VL, Qwen2VLConfig
from tests.model.checkpoint_files import IDS, LAYOUTS, logits, rewrite


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return write_random_checkpoint(tmp_path_factory.mktemp("original"), small_config(), dtype=torch.float32, std=0.08)


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "checkpoint")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shards", [False, True], ids=["single", "sharded"])
@pytest.mark.parametrize("change", ["one value", "all values", "dtype"])
def test_a_head_of_its_own_is_used_whatever_the_config_says(folder, tmp_path, layout, shards, change):
    """As transformers 5.23, which unties the two; saving keeps the head."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    from tests.model import oracle

    def add(tensors):
        head = tensors["model.embed_tokens.weight"].clone()
        if change == "one value":
            head[-1, -1] += 1
        else:
            head = head.flip(0) if change == "all values" else head.flip(0).half()
        tensors["lm_head.weight"] = head

    rewrite(folder, add)
    if shards:
        _shard(folder)
    config = Qwen2VLConfig.from_pretrained(folder).to_dict() | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(LAYOUTS[layout](config)))
    ours = logits(folder)
    with torch.no_grad():
        expected = oracle.load(folder)(IDS).logits
    assert torch.allclose(ours, expected, atol=1e-4)
    model = Qwen2VL.from_pretrained(folder, device="cpu")
    model.save_pretrained(tmp_path / "saved")
    assert not model.config.text.tie_word_embeddings and torch.equal(logits(tmp_path / "saved"), ours)


def _shard(folder, names=("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")):
    """Write the single file as two shards with an index, and remove it."""
    tensors = load_file(folder / "model.safetensors")
    weight_map = {name: names[n % 2] for n, name in enumerate(tensors)}
    for shard in names:
        save_file({name: tensors[name].clone() for name in tensors if weight_map[name] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "model.safetensors").unlink()


def _both(folder, change=lambda tensors: None):
    """A single file, changed, beside the shards of what it was."""
    single = (folder / "model.safetensors").read_bytes()
    _shard(folder)
    (folder / "model.safetensors").write_bytes(single)
    rewrite(folder, change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["model.norm.weight"].add_(1), "model.norm.weight differs"),
        (lambda t: t["visual.blocks.0.attn.qkv.weight"][-1].mul_(-1), "visual.blocks.0.attn.qkv.weight differs"),
        (lambda t: t.pop("model.norm.weight"), "model.norm.weight is in one of them only"),
        (lambda t: t.update({"model.norm.weight": torch.ones(3)}), "model.norm.weight differs"),
    ],
)
def test_a_single_file_and_shards_that_disagree_are_refused(folder, change, message):
    _both(folder, change)
    with pytest.raises(CheckpointError, match=rf"model.safetensors and .*index.json lists disagree \({message}"):
        Qwen2VL.from_pretrained(folder)


def _dead(folder):
    (folder / "model-00002-of-00002.safetensors").unlink()


def _garbage(folder):
    (folder / "model.safetensors.index.json").write_text("[]")


@pytest.mark.parametrize("damage", [lambda folder: None, _dead, _garbage], ids=["copies", "a shard gone", "garbage"])
def test_a_single_file_loads_beside_equal_shards_or_a_dead_index(folder, damage):
    expected = logits(folder)
    _both(folder)
    damage(folder)
    assert torch.equal(logits(folder), expected)


def test_an_index_may_list_the_single_file(folder):
    expected = logits(folder)
    names = load_file(folder / "model.safetensors")
    index = {"weight_map": dict.fromkeys(names, "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(logits(folder), expected)
