"""Loading and saving: layouts, shards, damage, and what is refused."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.random_checkpoint import small_config, write_random_checkpoint
from qwen2vl import CheckpointError, Qwen2VL, Qwen2VLConfig
from qwen2vl.weights import load_weights
from tests.model.checkpoint_files import IDS, LAYOUTS, logits, rewrite


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def original(request, tmp_path_factory):
    return write_random_checkpoint(
        tmp_path_factory.mktemp("original"), small_config(request.param), dtype=torch.float32, std=0.08
    )


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "checkpoint")


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
    expected = logits(folder)
    model = Qwen2VL.from_pretrained(folder, device="cpu")
    model.save_pretrained(folder, max_shard_bytes=500_000)
    assert not (folder / "model.safetensors").exists()
    assert torch.equal(logits(folder), expected)
    model.save_pretrained(folder)
    assert [p.name for p in folder.glob("*.safetensors*")] == ["model.safetensors"]
    assert torch.equal(logits(folder), expected)


def test_training_does_not_write_to_the_file(folder):
    expected = logits(folder)
    model = Qwen2VL.from_pretrained(folder, device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert torch.equal(logits(folder), expected)


def test_checkpoints_resaved_by_transformers_load(original, tmp_path):
    """The 5.x layout as its own writer makes it."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    from tests.model import oracle

    oracle.load(original).save_pretrained(tmp_path / "resaved")
    config = json.loads((tmp_path / "resaved" / "config.json").read_text())
    assert "text_config" in config and "hidden_size" not in config
    assert torch.equal(logits(tmp_path / "resaved"), logits(original))


@pytest.mark.parametrize("bare", [False, True], ids=["ForConditionalGeneration", "Qwen2VLModel"])
def test_module_paths_of_transformers_as_names(folder, bare):
    expected = logits(folder)

    def rename(tensors):
        for name in list(tensors):
            head, _, rest = name.partition(".")
            new = {"visual": "visual", "model": "language_model"}.get(head)
            if new:
                tensors[f"{'' if bare else 'model.'}{new}.{rest}"] = tensors.pop(name)

    rewrite(folder, rename)
    assert torch.equal(logits(folder), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_says_the_same(layout, folder):
    config = Qwen2VLConfig.from_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(LAYOUTS[layout](config.to_dict())))
    assert Qwen2VLConfig.from_pretrained(folder) == config


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("text", "vision"),
    [
        ({"rms_norm_eps": 1e-5}, {}),
        ({"rope_theta": 5e5}, {}),
        ({"max_position_embeddings": 4096}, {}),
        ({"mrope_section": (10, 11, 11)}, {}),
        ({}, {"rope_theta": 5e3}),
        ({}, {"mlp_ratio": 2.5, "depth": 3, "num_heads": 4}),
        ({"rms_norm_eps": 1e-5, "rope_theta": 5e5, "intermediate_size": 320}, {"rope_theta": 5e3, "patch_size": 16}),
    ],
    ids=str,
)
def test_every_value_is_read_from_every_layout(layout, text, vision):
    config = small_config(False)
    config = replace(config, text=replace(config.text, **text), vision=replace(config.vision, **vision))
    assert Qwen2VLConfig.from_dict(LAYOUTS[layout](config.to_dict())) == config


def test_a_value_that_differs_survives_saving_and_loading(tmp_path):
    """Vision's theta too, which the released layout has no name for."""
    config = small_config(False)
    text = replace(config.text, rms_norm_eps=1e-5, rope_theta=5e5)
    config = replace(config, text=text, vision=replace(config.vision, rope_theta=5e3), torch_dtype="float32")
    model = Qwen2VL.from_config(config, device="cpu")
    model.save_pretrained(tmp_path)
    again = Qwen2VL.from_pretrained(tmp_path, device="cpu")
    assert again.config == config
    with torch.no_grad():
        assert torch.equal(again(IDS), model(IDS))
    (tmp_path / "config.json").write_text(json.dumps(LAYOUTS["nested 5.x"](config.to_dict())))
    assert torch.equal(logits(tmp_path), model(IDS).detach())


def test_dtype_is_converted_and_validated(folder):
    model = Qwen2VL.from_pretrained(folder, device="cpu", dtype="bfloat16")
    stored = load_file(folder / "model.safetensors")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, stored[name].bfloat16())
    with pytest.raises(CheckpointError, match="dtype must be one of float32, bfloat16, float16, got 'int8'"):
        Qwen2VL.from_pretrained(folder, dtype="int8")


@pytest.mark.parametrize("stored", [torch.float16, torch.float64], ids=str)
def test_other_float_types_load(stored, folder):
    # Copies, as safetensors 0.4 maps the file and writes the next into it.
    originals = {name: t.clone() for name, t in load_file(folder / "model.safetensors").items()}
    rewrite(folder, lambda tensors: tensors.update({name: t.to(stored) for name, t in tensors.items()}))
    model = Qwen2VL.from_pretrained(folder, device="cpu", dtype="float32")
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32 and torch.equal(parameter, originals[name].to(stored).float())


def test_loading_leaves_what_is_trained_as_it_was(folder):
    config = Qwen2VLConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = Qwen2VL(config)
    model.visual.requires_grad_(False)
    ignore = ("lm_head.weight",) if config.text.tie_word_embeddings else ()
    load_weights(model, folder, device=torch.device("cpu"), dtype=torch.float32, ignore=ignore)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad != name.startswith("visual."), name
    assert all(p.requires_grad for p in Qwen2VL.from_pretrained(folder, device="cpu").parameters())


@pytest.mark.parametrize(
    "index",
    ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": "gone.safetensors"}}', '{"weight_map": {"a": 5}}', "\xff"],
    ids=ascii,
)
def test_saving_over_a_broken_index(index, folder):
    expected = logits(folder)
    model = Qwen2VL.from_pretrained(folder, device="cpu")
    (folder / "model.safetensors.index.json").write_bytes(index.encode("latin-1"))
    model.save_pretrained(folder)
    assert torch.equal(logits(folder), expected)
    assert [p.name for p in folder.glob("*.safetensors*")] == ["model.safetensors"]


def test_saving_removes_only_its_own_kind_of_file(folder):
    """An index that names a file outside of the folder is not followed there."""
    outside = folder.parent / "precious.safetensors"
    outside.write_bytes(b"x")
    index = {"weight_map": {"a": "../precious.safetensors"}}
    model = Qwen2VL.from_pretrained(folder, device="cpu")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    model.save_pretrained(folder)
    assert outside.exists()


def test_one_error_lists_every_tensor_that_does_not_fit(folder):
    def damage(tensors):
        del tensors["model.norm.weight"]
        tensors["model.layers.7.mlp.up_proj.weight"] = torch.zeros(2)
        tensors["visual.blocks.0.norm1.weight"] = torch.zeros(3)
        tensors["visual.blocks.0.norm1.bias"] = torch.zeros(160, dtype=torch.int32)

    rewrite(folder, damage)
    with pytest.raises(CheckpointError) as caught:
        Qwen2VL.from_pretrained(folder)
    text = str(caught.value)
    assert "4 tensor(s) do not fit" in text
    assert "model.norm.weight: missing" in text
    assert "model.layers.7.mlp.up_proj.weight: unexpected" in text
    assert "visual.blocks.0.norm1.weight: shape (3,), the config wants (160,)" in text
    assert "visual.blocks.0.norm1.bias: dtype I32" in text


def test_stored_inverse_frequencies_and_a_copied_head_are_ignored(folder):
    expected = logits(folder)
    rewrite(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(32)}))
    if tied := Qwen2VLConfig.from_pretrained(folder).text.tie_word_embeddings:
        rewrite(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert torch.equal(logits(folder), expected)
    assert Qwen2VL.from_pretrained(folder, device="cpu").config.text.tie_word_embeddings == tied


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
    (folder / "model.safetensors").unlink()
    text = json.dumps({"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}})
    (folder / "model.safetensors.index.json").write_text(text)


def _index_outside(folder):
    (folder / "model.safetensors").unlink()
    text = json.dumps({"weight_map": {"model.norm.weight": "../../etc/passwd"}})
    (folder / "model.safetensors.index.json").write_text(text)


def _index_garbage(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text("[]")


def _quantised_tensors(folder):
    rewrite(folder, lambda t: t.update({"model.layers.0.mlp.up_proj.qweight": torch.zeros(2, dtype=torch.int32)}))


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


def _vision(**changes):
    def apply(folder):
        config = json.loads((folder / "config.json").read_text())
        config["vision_config"].update(changes)
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
    (_quantised_tensors, "quantised weights that config.json's quantization_config does not tell of"),
    (
        _config(quantization_config={"quant_method": "bitsandbytes"}),
        "quant_method 'bitsandbytes' is not supported; awq, gptq, compressed-tensors, fp8 are",
    ),
    (_config(model_type="llama"), "model_type is 'llama'"),
    (_config(rms_norm_eps=None), "missing rms_norm_eps"),
    (_config(hidden_size="big"), "hidden_size must be a positive integer, got 'big'"),
    (_config(num_attention_heads=3), "hidden_size 256 is no multiple of num_attention_heads 3"),
    (_config(vision_config=None), "vision_config is missing"),
    (_config(use_sliding_window=True), "use_sliding_window"),
    (_config(rope_scaling={"type": "yarn"}), "rope type 'yarn' is not supported"),
    (_config(rope_scaling={"type": "mrope", "mrope_section": [16, 24, 24]}), "mrope_section"),
    (
        _config(rope_scaling={"type": "mrope", "mrope_section": None}),
        "mrope_section must be three non-negative integers, got None",
    ),
    (
        _config(rope_scaling={"type": "mrope", "mrope_section": [8, 12, "12"]}),
        "mrope_section must be three non-negative integers, got .8, 12, '12'",
    ),
    (_config(rope_scaling="mrope"), "rope_scaling must be a JSON object, got 'mrope'"),
    (_config(text_config=[1]), r"text_config must be a JSON object, got \[1\]"),
    (_config(vision_config="none"), "vision_config must be a JSON object, got 'none'"),
    (_config(quantization_config=True), "quantization_config must be a JSON object, got True"),
    (_config(rms_norm_eps="x"), "rms_norm_eps must be a positive number, got 'x'"),
    (_config(rms_norm_eps=True), "rms_norm_eps must be a positive number, got True"),
    (_config(rms_norm_eps=-1e-6), "rms_norm_eps must be a positive number, got -1e-06"),
    (_config(rope_theta=0), "rope_theta must be a positive number, got 0"),
    (_config(rope_theta=float("inf")), "rope_theta must be a positive number, got inf"),
    (_config(num_hidden_layers=2.0), "num_hidden_layers must be a positive integer, got 2.0"),
    (_config(num_hidden_layers=True), "num_hidden_layers must be a positive integer, got True"),
    (_config(torch_dtype="int8"), "dtype must be one of float32, bfloat16, float16, got 'int8'"),
    (_vision(depth="x"), "vision_config.depth must be a positive integer, got 'x'"),
    (_vision(depth=-3), "vision_config.depth must be a positive integer, got -3"),
    (_vision(num_heads=0), "vision_config.num_heads must be a positive integer, got 0"),
    (_vision(num_heads=3), "vision embed_dim 160 over 3 heads must give a multiple of 4"),
    (_vision(hidden_size=128), "vision hidden_size 128 differs from the text's 256"),
    (_vision(in_channels=1), r"in_channels must be 3 \(RGB\), got 1"),
    (_vision(rope_parameters={"rope_theta": 0}), "vision_config.rope_theta must be a positive number, got 0"),
    (_vision(rope_parameters=[1]), "rope_parameters must be a JSON object"),
    (_vision(hidden_act="gelu"), "hidden_act 'silu' / 'gelu' must be 'silu' / 'quick_gelu'"),
    (_config(hidden_act="gelu"), "hidden_act 'gelu' / "),
    (_config(image_token_id=-5), "image_token_id -5 is outside the vocabulary of 512"),
    (_config(image_token_id="5"), "image_token_id '5' is outside the vocabulary of 512"),
    (
        _config(image_token_id=7, video_token_id=7),
        "image_token_id and video_token_id must differ, got 7 twice",
    ),
    (_config(image_token_id=9999), "image_token_id 9999 is outside the vocabulary of 512"),
    (lambda f: (f / "config.json").write_text("{"), "cannot be read as JSON"),
    (lambda f: (f / "config.json").write_text("[]"), "must hold a JSON object"),
    (lambda f: (f / "config.json").unlink(), "no such file"),
    (lambda f: (f / "generation_config.json").write_text("x"), "generation_config.json: cannot be read"),
]


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("left", [0, 7, 300, -1000])
def test_a_file_that_ends_early_is_all_that_is_listed(folder, shards, left):
    """No tensor behind its end is; what does not fit in the files that can be read still is."""
    model = Qwen2VL.from_pretrained(folder, device="cpu")
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    model.save_pretrained(folder, max_shard_bytes=size if shards == 1 else size // 2)
    path, *others = sorted(folder.glob("*.safetensors"))
    assert bool(others) == (shards > 1)
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(CheckpointError) as caught:
        Qwen2VL.from_pretrained(folder)
    _, *listed = str(caught.value).splitlines()
    assert len(listed) == 1 and listed[0].startswith(f"  {path.name}: damaged or truncated: "), caught.value
    if others:
        tensors = load_file(others[0])
        save_file({**tensors, "visual.extra": torch.zeros(2)}, others[0])
        with pytest.raises(CheckpointError, match=f"{path.name}: damaged") as caught:
            Qwen2VL.from_pretrained(folder)
        assert "  visual.extra: unexpected" in str(caught.value) and ": missing" not in str(caught.value)


@pytest.mark.parametrize(("damage", "message"), DAMAGE, ids=[m[:56] for _, m in DAMAGE])
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


def test_files_are_as_readable_as_the_umask_allows(folder, tmp_path):
    """safetensors writes for the owner alone; a checkpoint in a shared folder is for its readers."""
    Qwen2VL.from_pretrained(folder, device="cpu").save_pretrained(tmp_path / "saved", max_shard_bytes=500_000)
    probe = tmp_path / "probe"
    probe.touch()
    assert {path.stat().st_mode for path in (tmp_path / "saved").iterdir()} == {probe.stat().st_mode}
