"""LoRA adapters: as peft computes them on transformers' model, read and written in its layout, merged, refused."""

import json
import shutil
import sys
import warnings

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from qwen2vl import CheckpointError, Processor, Qwen2VL
from qwen2vl.cli import app
from tests.model import oracle

peft = pytest.importorskip("peft")

#: What is adapted -> the settings of peft that adapt it.
KINDS = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "decoder": {"target_modules": "all", "lora_alpha": 3, "use_rslora": True, "lora_dropout": 0.3},
    "some layers": {"target_modules": ["k_proj", "up_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "tower": {"target_modules": ["q_proj", "qkv", "attn.proj", "fc1", "fc2"]},
    "one layer by name": {"target_modules": ["model.language_model.layers.0.mlp.down_proj"]},
}
_DECODER = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make(folder, save=None, **settings):
    """peft's own model with an adapter that changes a lot, saved into ``save``."""
    if settings.get("target_modules") == "all":
        settings["target_modules"] = _DECODER
    torch.manual_seed(3)
    kind = settings.pop("kind", peft.LoraConfig)
    if kind is peft.LoraConfig:
        settings = {"r": 4, **settings}
    net = peft.get_peft_model(oracle.load(folder), kind(**settings))
    for name, parameter in net.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn_like(parameter)
    if save is not None:
        net.save_pretrained(str(save))
    return net.eval()


@pytest.fixture(scope="module")
def inputs(processor):
    content = [{"type": "image", "image": Image.effect_noise((56, 84), 90)}, {"type": "text", "text": "What is it?"}]
    return processor([{"role": "user", "content": content}])


def theirs(net, config, inputs):
    with torch.no_grad():
        return net(**oracle.oracle_inputs(config, inputs)).logits


def ours(model, inputs):
    with torch.no_grad():
        return model(**inputs)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_what_peft_makes_of_it(folder, model, inputs, tmp_path, kind):
    """Read from peft's files, beside the base and merged; written here, read by peft, and the same tensors."""
    net = make(folder, tmp_path / "theirs", **KINDS[kind])
    want = theirs(net, model.config, inputs)
    assert not torch.isclose(want, ours(model, inputs), rtol=1e-2).all(), "the adapter changes what is answered"
    found = Qwen2VL.from_pretrained(folder, device="cpu", adapter=tmp_path / "theirs")
    assert not found.training
    beside = ours(found, inputs)
    torch.testing.assert_close(beside, want, rtol=1e-4, atol=1e-4)

    found.save_adapter(tmp_path / "ours", base="a/b")
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    with warnings.catch_warnings(record=True) as told:
        again = peft.PeftModel.from_pretrained(oracle.load(folder), str(tmp_path / "ours")).eval()
    assert not [str(one.message) for one in told if "key" in str(one.message)], "none missing, none too many"
    assert again.peft_config["default"].base_model_name_or_path == "a/b"
    torch.testing.assert_close(theirs(again, model.config, inputs), want, rtol=1e-5, atol=1e-5)

    with pytest.raises(CheckpointError, match="the model has an adapter; merge_adapter"):
        found.save_pretrained(tmp_path / "whole")
    assert not (tmp_path / "whole").exists()
    merged = found.merge_adapter()
    assert dict(merged.named_parameters()).keys() == dict(model.named_parameters()).keys()
    torch.testing.assert_close(ours(merged, inputs), beside, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path / "whole")
    whole = Qwen2VL.from_pretrained(tmp_path / "whole", device="cpu")
    assert torch.equal(ours(whole, inputs), ours(merged, inputs))
    with pytest.raises(CheckpointError, match="the model has none"):
        merged.save_adapter(tmp_path / "none")


def test_names_of_older_writers_and_sixteen_bits(folder, model, inputs, tmp_path):
    """transformers before 4.52 has no `language_model`; a base in bfloat16 keeps the adapter's float32, as in peft."""
    make(folder, tmp_path / "a", target_modules=["q_proj", "qkv"])
    want = ours(Qwen2VL.from_pretrained(folder, device="cpu", adapter=tmp_path / "a"), inputs)
    path = tmp_path / "a" / "adapter_model.safetensors"
    old = {"model.model.language_model.": "model.model.", "model.model.visual.": "model.visual."}
    tensors = load_file(path)
    for new, before in old.items():
        tensors = {name.replace(new, before): tensor for name, tensor in tensors.items()}
    save_file(tensors, path)
    assert any(".visual.blocks" in name and "model.visual" in name for name in tensors)
    assert torch.equal(ours(Qwen2VL.from_pretrained(folder, device="cpu", adapter=tmp_path / "a"), inputs), want)
    state = torch.get_rng_state()
    low = Qwen2VL.from_pretrained(folder, device="cpu", dtype="bfloat16", adapter=tmp_path / "a")
    assert torch.equal(torch.get_rng_state(), state), "loading draws nothing"
    kinds = {name.rpartition(".lora_")[1]: parameter.dtype for name, parameter in low.named_parameters()}
    assert kinds == {"": torch.bfloat16, ".lora_": torch.float32}
    assert low.merge_adapter().dtype == torch.bfloat16
    torch.testing.assert_close(ours(low, inputs).float(), want, rtol=0.1, atol=0.3)


UNSUPPORTED = [
    ({"use_dora": True}, "use_dora is True, which is not supported"),
    ({"modules_to_save": ["merger"]}, r"modules_to_save is \['merger'\], which is not supported"),
    ({"bias": "all"}, "bias is 'all', which is not supported"),
    ({"lora_bias": True}, "lora_bias is True"),
    ({"rank_pattern": {"layers.0.self_attn.q_proj": 2}}, "rank_pattern is {'layers.0.self_attn.q_proj': 2}"),
    ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern is {'q_proj': 2}"),
    ({"trainable_token_indices": [5]}, r"trainable_token_indices is \[5\]"),
    ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora', which changes the base's weights"),
    ({"target_modules": ["q_proj", "lm_head"]}, r"lm_head\.lora_A\.weight: is no part of LoRA of a linear layer"),
    ({"target_modules": ["embed_tokens"]}, r"embed_tokens\.lora_embedding_A: is no part of LoRA"),
    ({"target_modules": r".*merger\.mlp\.0"}, r"visual\.merger\.mlp\.0\.lora_A\.weight: is no part of LoRA"),
    ({"kind": "IA3Config", "target_modules": ["k_proj"], "feedforward_modules": []}, "wants a LoRA adapter .* 'IA3'"),
    ({"kind": "LoHaConfig", "r": 2, "target_modules": ["k_proj"]}, "wants a LoRA adapter .* 'LOHA'"),
]


@pytest.mark.parametrize(("settings", "match"), UNSUPPORTED, ids=[match[:40] for _, match in UNSUPPORTED])
def test_kinds_that_are_not_computed_are_refused(folder, tmp_path, settings, match):
    settings = {"target_modules": ["q_proj"], **settings}
    if "kind" in settings:
        settings["kind"] = getattr(peft, settings["kind"])
    make(folder, tmp_path / "a", **settings)
    with pytest.raises(CheckpointError, match=match):
        Qwen2VL.from_pretrained(folder, device="cpu", adapter=tmp_path / "a")


def _config(**changes):
    def apply(path):
        config = json.loads((path / "adapter_config.json").read_text())
        (path / "adapter_config.json").write_text(json.dumps(config | changes))

    return apply


def _tensors(change):
    def apply(path):
        tensors = load_file(path / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, path / "adapter_model.safetensors")

    return apply


def _cut(path):
    path = path / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-50])


def _pickled(path):
    (path / "adapter_model.safetensors").rename(path / "adapter_model.bin")


FIRST = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight"
DAMAGE = [
    (lambda path: (path / "adapter_config.json").unlink(), "holds no adapter_config.json, so it is no adapter"),
    (lambda path: (path / "adapter_config.json").write_text("[]"), r"wants a LoRA adapter .*, got \[\]"),
    (lambda path: (path / "adapter_config.json").write_text("{"), "cannot be read as JSON"),
    (_config(new_kind={"of": "lora"}), "new_kind is {'of': 'lora'}, which is not supported"),
    (_config(r=0), "r must be a positive integer, got 0"),
    (_config(r=3), r"q_proj\.lora_A\.weight: torch\.float32 \(4, 256\), rank and model want floats \(3, 256\)"),
    (_config(lora_alpha="x"), "lora_alpha must be a number, got 'x'"),
    (_config(lora_alpha=10**400), "lora_alpha must be a number, got 1000"),
    (
        _config(target_modules=["q_proj", "o_proj"]),
        r"target_modules name model\.layers\.0\.self_attn\.o_proj, of which",
    ),
    (_tensors(lambda t: t.pop(FIRST)), "model.layers.0.self_attn.q_proj: only lora_B is there"),
    (
        _tensors(lambda t: [t.pop(name) for name in list(t) if "layers.0." in name]),
        r"target_modules name model\.layers\.0\.self_attn\.q_proj",
    ),
    (_tensors(lambda t: t.update({FIRST: torch.zeros(4, 9)})), r"\(4, 9\), rank and model want floats \(4, 256\)"),
    (_tensors(lambda t: t.update({FIRST.replace("layers.0", "layers.9"): t[FIRST].clone()})), "layers.9.*is no part"),
    (_tensors(lambda t: t.clear()), "it holds no tensor"),
    (_cut, "adapter_model.safetensors: damaged or truncated"),
    (_pickled, "adapter_model.bin can run code when read"),
]


@pytest.fixture(scope="module")
def adapter(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("adapter") / "a"
    make(folder, path, target_modules=["q_proj"])
    return path


@pytest.mark.parametrize(("damage", "match"), DAMAGE, ids=[match[:40] for _, match in DAMAGE])
def test_damage(folder, adapter, tmp_path, damage, match):
    shutil.copytree(adapter, tmp_path / "a")
    damage(tmp_path / "a")
    with pytest.raises(CheckpointError, match=match):
        Qwen2VL.from_pretrained(folder, device="cpu", adapter=tmp_path / "a")


def test_one_at_a_time_and_without_peft(folder, adapter, monkeypatch):
    from qwen2vl.adapter import load_adapter

    model = Qwen2VL.from_pretrained(folder, device="cpu", adapter=adapter)
    with pytest.raises(CheckpointError, match="the model has one; merge it"):
        load_adapter(model, adapter)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(model.merge_adapter(), adapter)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(CheckpointError, match="adapter: needs the package peft; pip install"):
        Qwen2VL.from_pretrained(folder, device="cpu", adapter=adapter)


def test_commands(folder, adapter, tmp_path):
    def run(*args, stdin=None):
        return CliRunner().invoke(app, [str(a) for a in args], input=stdin)

    ask = ("--prompt", "hello", "-n", 8)
    plain = run("generate", "--model", folder, *ask)
    beside = run("generate", "--model", folder, "--adapter", adapter, *ask)
    assert beside.exit_code == plain.exit_code == 0 and beside.stdout != plain.stdout, beside.output
    chat = run("chat", "--model", folder, "--adapter", adapter, "-n", 8, stdin="hello\n")
    assert chat.exit_code == 0 and beside.stdout.strip() in chat.stdout
    merged = run("merge", "--model", folder, "--adapter", adapter, "--output", tmp_path / "whole")
    assert merged.exit_code == 0 and merged.stdout == f"{tmp_path / 'whole'}\n", merged.output
    assert run("generate", "--model", tmp_path / "whole", *ask).stdout == beside.stdout
    assert Processor.from_pretrained(tmp_path / "whole").max_pixels == Processor.from_pretrained(folder).max_pixels
    again = run("merge", "--model", folder, "--adapter", adapter, "--output", tmp_path / "whole")
    assert again.exit_code == 2 and "whole is there and not" in " ".join(again.stderr.replace("│", " ").split())
    wrong = run("generate", "--model", folder, "--adapter", folder, *ask)
    assert wrong.exit_code == 1 and "holds no adapter_config.json" in wrong.stderr


def test_a_save_over_another_scale_that_is_cut_short_is_refused(folder, tmp_path, monkeypatch):
    """The tensors are the new ones then, and the old configuration would scale them otherwise."""
    for alpha in (8, 64):
        make(folder, tmp_path / str(alpha), lora_alpha=alpha, target_modules=["q_proj"])
    old, new = (Qwen2VL.from_pretrained(folder, device="cpu", adapter=tmp_path / str(alpha)) for alpha in (8, 64))
    old.save_adapter(tmp_path / "saved")

    def cut(path, data):
        raise KeyboardInterrupt

    monkeypatch.setattr("qwen2vl.adapter.write_json", cut)
    with pytest.raises(KeyboardInterrupt):
        new.save_adapter(tmp_path / "saved")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        Qwen2VL.from_pretrained(folder, device="cpu", adapter=tmp_path / "saved")
