"""Loading and saving: layouts, shards, damage, and what is refused."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen2vl import CheckpointError, Qwen2VL, Qwen2VLConfig
from qwen2vl.demo.checkpoint import small_config, write_random_checkpoint
from tests.model import oracle

IDS = torch.arange(10, 40)[None]


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def original(request, tmp_path_factory):
    return write_random_checkpoint(
        tmp_path_factory.mktemp("original"), small_config(request.param), dtype=torch.float32, std=0.08
    )


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "checkpoint")


def _logits(folder, **kwargs):
    with torch.no_grad():
        return Qwen2VL.from_pretrained(folder, device="cpu", **kwargs)(IDS)


def _rewrite(folder, change):
    """Load the single file, let ``change`` edit the dict, write it back."""
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)


def test_save_and_load_are_inverse(folder, tmp_path):
    model = Qwen2VL.from_pretrained(folder, device="cpu")
    model.save_pretrained(tmp_path / "single")
    model.save_pretrained(tmp_path / "sharded", max_shard_bytes=500_000)
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in model.parameters())
    for name in ("single", "sharded"):
        again = Qwen2VL.from_pretrained(tmp_path / name, device="cpu")
        assert again.config == replace(model.config, torch_dtype="float32")
        for (key, a), (other, b) in zip(model.named_parameters(), again.named_parameters(), strict=True):
            assert key == other and torch.equal(a, b)


def test_saving_over_the_files_in_use(folder):
    """Parameters may be maps of the very file that is replaced; shards of an earlier save do not linger."""
    expected = _logits(folder)
    model = Qwen2VL.from_pretrained(folder, device="cpu")
    model.save_pretrained(folder, max_shard_bytes=500_000)
    assert not (folder / "model.safetensors").exists()
    assert torch.equal(_logits(folder), expected)
    model.save_pretrained(folder)
    assert [p.name for p in folder.glob("*.safetensors*")] == ["model.safetensors"]
    assert torch.equal(_logits(folder), expected)


def test_training_does_not_write_to_the_file(folder):
    expected = _logits(folder)
    model = Qwen2VL.from_pretrained(folder, device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert torch.equal(_logits(folder), expected)


def test_checkpoints_resaved_by_transformers_load(original, tmp_path):
    """The 5.x layout as its own writer makes it."""
    oracle.load(original).save_pretrained(tmp_path / "resaved")
    config = json.loads((tmp_path / "resaved" / "config.json").read_text())
    assert "text_config" in config and "hidden_size" not in config
    assert torch.equal(_logits(tmp_path / "resaved"), _logits(original))


@pytest.mark.parametrize("bare", [False, True], ids=["ForConditionalGeneration", "Qwen2VLModel"])
def test_module_paths_of_transformers_as_names(folder, bare):
    expected = _logits(folder)

    def rename(tensors):
        for name in list(tensors):
            head, _, rest = name.partition(".")
            new = {"visual": "visual", "model": "language_model"}.get(head)
            if new:
                tensors[f"{'' if bare else 'model.'}{new}.{rest}"] = tensors.pop(name)

    _rewrite(folder, rename)
    assert torch.equal(_logits(folder), expected)


def test_nested_config_of_transformers_4(original, folder):
    """4.52-4.57: text_config with rope_scaling and the tie flag, vision_config under its own model_type."""
    flat = json.loads((folder / "config.json").read_text())
    text_keys = [k for k in flat if k not in ("architectures", "model_type", "vision_config")]
    nested = {
        "model_type": "qwen2_vl",
        "image_token_id": flat["image_token_id"],
        "video_token_id": flat["video_token_id"],
        "text_config": {k: flat[k] for k in text_keys}
        | {"model_type": "qwen2_vl_text", "rope_scaling": {"rope_type": "default", "type": "default",
           "mrope_section": flat["rope_scaling"]["mrope_section"]}},
        "vision_config": flat["vision_config"] | {"model_type": "qwen2_vl"},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(nested))
    assert Qwen2VLConfig.from_pretrained(folder) == Qwen2VLConfig.from_pretrained(original)


def test_dtype_is_converted_and_validated(folder):
    model = Qwen2VL.from_pretrained(folder, device="cpu", dtype="bfloat16")
    stored = load_file(folder / "model.safetensors")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, stored[name].bfloat16())
    with pytest.raises(CheckpointError, match="dtype must be one of float32, bfloat16, float16, got 'int8'"):
        Qwen2VL.from_pretrained(folder, dtype="int8")


def test_one_error_lists_every_tensor_that_does_not_fit(folder):
    def damage(tensors):
        del tensors["model.norm.weight"]
        tensors["model.layers.7.mlp.up_proj.weight"] = torch.zeros(2)
        tensors["visual.blocks.0.norm1.weight"] = torch.zeros(3)
        tensors["visual.blocks.0.norm1.bias"] = torch.zeros(160, dtype=torch.int32)

    _rewrite(folder, damage)
    with pytest.raises(CheckpointError) as caught:
        Qwen2VL.from_pretrained(folder)
    text = str(caught.value)
    assert "4 tensor(s) do not fit" in text
    assert "model.norm.weight: missing" in text
    assert "model.layers.7.mlp.up_proj.weight: unexpected" in text
    assert "visual.blocks.0.norm1.weight: shape (3,), the config wants (160,)" in text
    assert "visual.blocks.0.norm1.bias: dtype I32" in text


def test_stored_inverse_frequencies_and_a_tied_head_are_ignored(folder):
    expected = _logits(folder)
    _rewrite(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(32)}))
    if Qwen2VLConfig.from_pretrained(folder).text.tie_word_embeddings:
        _rewrite(folder, lambda t: t.update({"lm_head.weight": torch.zeros(512, 256)}))
    assert torch.equal(_logits(folder), expected)


def _truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def _empty(folder):
    (folder / "model.safetensors").write_bytes(b"")


def _pickle(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def _no_weights(folder):
    (folder / "model.safetensors").unlink()


def _missing_shard(folder):
    text = json.dumps({"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}})
    (folder / "model.safetensors.index.json").write_text(text)


def _index_outside(folder):
    text = json.dumps({"weight_map": {"model.norm.weight": "../../etc/passwd"}})
    (folder / "model.safetensors.index.json").write_text(text)


def _index_garbage(folder):
    (folder / "model.safetensors.index.json").write_text("[]")


def _quantised_tensors(folder):
    _rewrite(folder, lambda t: t.update({"model.layers.0.mlp.up_proj.qweight": torch.zeros(2, dtype=torch.int32)}))


def _config(**changes):
    def apply(folder):
        config = json.loads((folder / "config.json").read_text())
        for key, value in changes.items():
            if value is None:
                config.pop(key)
            else:
                config[key] = value
        (folder / "config.json").write_text(json.dumps(config))

    return apply


DAMAGE = [
    (_truncate, "model.safetensors: damaged or truncated"),
    (_empty, "model.safetensors: damaged or truncated"),
    (_pickle, r"only pickle weights \(pytorch_model.bin\)"),
    (_no_weights, "has neither model.safetensors nor"),
    (_missing_shard, "shards named by .* are missing: model-00001-of-00002.safetensors"),
    (_index_outside, "names files outside the folder"),
    (_index_garbage, "is not a safetensors index"),
    (_quantised_tensors, "quantised weights are not supported"),
    (
        _config(quantization_config={"quant_method": "awq"}),
        r"quantised checkpoints \(awq\) are not supported",
    ),
    (_config(model_type="llama"), "model_type is 'llama'"),
    (_config(rms_norm_eps=None), "missing rms_norm_eps"),
    (_config(hidden_size="big"), "hidden_size must be a positive integer, got 'big'"),
    (_config(num_attention_heads=3), "hidden_size 256 is no multiple of num_attention_heads 3"),
    (_config(vision_config=None), "vision_config is missing"),
    (_config(use_sliding_window=True), "use_sliding_window"),
    (_config(rope_scaling={"type": "yarn"}), "rope type 'yarn' is not supported"),
    (_config(rope_scaling={"type": "mrope", "mrope_section": [16, 24, 24]}), "mrope_section"),
    (_config(image_token_id=9999), "image_token_id 9999 is outside the vocabulary of 512"),
    (lambda f: (f / "config.json").write_text("{"), "cannot be read as JSON"),
    (lambda f: (f / "config.json").write_text("[]"), "must hold a JSON object"),
    (lambda f: (f / "config.json").unlink(), "no such file"),
    (lambda f: (f / "generation_config.json").write_text("x"), "generation_config.json: cannot be read"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE, ids=[m[:40] for _, m in DAMAGE])
def test_refusals(damage, message, folder):
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        Qwen2VL.from_pretrained(folder)


def test_names_that_are_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder, and not a hub id"):
        Qwen2VL.from_pretrained(tmp_path / "nothing" / "here")
    with pytest.raises(CheckpointError, match="is a file"):
        (tmp_path / "file").write_text("")
        Qwen2VL.from_pretrained(tmp_path / "file")
    with pytest.raises(CheckpointError, match="some-organisation/some-model: no such folder, and the hub did not"):
        Qwen2VL.from_pretrained("some-organisation/some-model")


def test_progress_counts_every_tensor(folder):
    seen = []
    model = Qwen2VL.from_pretrained(folder, device="cpu", progress=lambda done, total: seen.append((done, total)))
    count = len(list(model.parameters()))
    assert seen == [(i, count) for i in range(1, count + 1)]


@pytest.mark.parametrize(
    ("name", "parameters", "visual"),
    [
        ("2b", 2_208_985_600, 665_271_296),
        ("7b", 8_291_375_616, 675_759_104),
        ("72b", 73_405_560_320, 699_356_672),
    ],
)
def test_presets_have_the_released_sizes_and_cost_no_memory_on_meta(name, parameters, visual):
    model = Qwen2VL.from_config(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert sum(p.numel() for p in model.visual.parameters()) == visual
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert Qwen2VLConfig.from_dict(model.config.to_dict()) == model.config


def test_released_names():
    """The 2B's index as published: 729 tensors, no lm_head."""
    names = dict(Qwen2VL.from_config("2b", device="meta").named_parameters())
    assert len(names) == 729
    assert "lm_head.weight" not in names
    assert names["visual.patch_embed.proj.weight"].shape == (1280, 3, 2, 14, 14)
    assert names["visual.blocks.31.attn.qkv.bias"].shape == (3840,)
    assert names["visual.merger.mlp.2.weight"].shape == (1536, 5120)
    assert names["model.layers.27.self_attn.k_proj.bias"].shape == (256,)


def test_unknown_preset():
    with pytest.raises(CheckpointError, match="preset: '3b' is unknown; the presets are 2b, 7b, 72b"):
        Qwen2VL.from_config("3b")
