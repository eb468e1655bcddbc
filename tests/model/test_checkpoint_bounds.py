"""A checkpoint's files are believed in nothing that costs: sizes, numbers, depth, and what kind of file they are."""

import json
import os

import pytest

from qwen2vl import Processor, Qwen2VL
from qwen2vl.errors import CheckpointError, DataError, MediaError, PromptError
from qwen2vl.files import open_regular, read_json
from qwen2vl.media.sources import open_source
from qwen2vl.training.data.json_files import JsonFiles


@pytest.fixture
def copy(folder, tmp_path):
    """The checkpoint, with another config.json."""

    def write(change):
        config = json.loads((folder / "config.json").read_text())
        change(config)
        for path in folder.iterdir():
            if path.name != "config.json":
                (tmp_path / path.name).symlink_to(path)
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    return write


@pytest.mark.parametrize(
    ("part", "name", "value", "match"),
    [
        ("", "num_hidden_layers", 100_000, "num_hidden_layers must be at most 10000"),
        ("", "num_hidden_layers", 9_000, r"make 90\d\d layers, but the files hold \d+ tensors"),
        ("vision_config", "depth", 9_000, r"make 90\d\d layers, but the files hold \d+ tensors"),
        ("", "vocab_size", 2**62, "vocab_size must be at most"),
        ("", "vocab_size", 2**30, "vocab_size asks for a matrix of"),
        ("", "intermediate_size", 2**30, "intermediate_size asks for a matrix of"),
        ("vision_config", "mlp_ratio", 1e14, "mlp_ratio asks for a matrix of"),
        ("vision_config", "mlp_ratio", 10**400, "vision_config.mlp_ratio must be at most"),
        ("vision_config", "embed_dim", 2**30, "vision_config.embed_dim asks for a matrix of"),
        ("vision_config", "patch_size", 10**9, "vision_config.patch_size must be at most 256"),
        ("vision_config", "patch_size", 256, "vision_config.patch_size asks for a matrix of"),
        ("vision_config", "spatial_merge_size", 32, "spatial_merge_size asks for a matrix of"),
        ("vision_config", "temporal_patch_size", 10**9, "temporal_patch_size must be at most 32"),
        ("", "rms_norm_eps", 10**400, "rms_norm_eps must be at most"),
        ("", "rope_theta", 10**400, "rope_theta must be at most"),
        ("", "max_position_embeddings", 10**400, "max_position_embeddings must be at most"),
        ("", "image_token_id", 10**400, "image_token_id 10+ is outside the vocabulary"),
    ],
)
def test_sizes_are_held_to_the_files_before_a_module_is_built(copy, monkeypatch, part, name, value, match):
    def build(self, config):
        raise AssertionError(f"a model with {name} = {value} was built")

    monkeypatch.setattr(Qwen2VL, "__init__", build)
    where = copy(lambda config: (config[part] if part else config).update({name: value}))
    with pytest.raises(CheckpointError, match=match):
        Qwen2VL.from_pretrained(where)


@pytest.mark.parametrize("text", ["9" * 5000, "[" * 100_000, '{"a":' * 100_000, "", "{" + " " * 1000])
def test_json_that_python_gives_up_on_is_refused(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(CheckpointError, match=r"config.json: cannot be read as JSON"):
        read_json(path)


def test_a_file_without_bound_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("qwen2vl.files.MAX_BYTES", 1 << 20)
    path = tmp_path / "tokenizer.json"
    path.write_text(" " * (1 << 20) + "{}")
    with pytest.raises(CheckpointError, match="wants at most 1 MB"):
        read_json(path)


SPECIAL = ("pipe", "/dev/zero", "/proc/self/mem", "/proc/kmsg")


@pytest.fixture(params=SPECIAL)
def special(request, tmp_path):
    """A file that has no end, or waits for ever, under a name of one's own."""

    def make(name):
        path = tmp_path / name
        if request.param == "pipe":
            os.mkfifo(path)
        elif os.access(request.param, os.R_OK):
            path.unlink(missing_ok=True)
            path.symlink_to(request.param)
        else:
            pytest.skip(f"{request.param} cannot be read here")
        return path

    return make


def test_what_is_no_regular_file_is_refused(special, tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_json(special("config.json"))
    path = special("data.jsonl")
    with pytest.raises(DataError, match=r"not a regular file|holds no record"):
        JsonFiles([str(path)])
    with pytest.raises(MediaError, match=r"not a regular file|is empty"), open_source(path, max_bytes=1000):
        pass


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", "model.safetensors.index.json"])
def test_a_checkpoint_of_such_files_is_refused(folder, tmp_path, special, name):
    for path in folder.iterdir():
        if path.name != name and not (name.endswith("index.json") and path.name == "model.safetensors"):
            (tmp_path / path.name).symlink_to(path)
    special(name)
    with pytest.raises(CheckpointError):
        Processor.from_pretrained(tmp_path)
        Qwen2VL.from_pretrained(tmp_path)


def test_a_regular_file_is_opened_as_ever(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    with open_regular(path) as file:
        assert file.read() == b"abc"
    path.write_bytes(b"")
    with open_regular(path) as file:
        assert file.read() == b""


@pytest.mark.parametrize("value", [10**400, 2**63, float("inf"), float("nan")])
@pytest.mark.parametrize("key", ["max_pixels", "min_pixels", "resized_height"])
def test_numbers_without_bound_in_messages_are_refused(processor, key, value):
    item = {"type": "image", "image": "a.png", key: value} | ({"resized_width": 28} if "resized" in key else {})
    with pytest.raises(PromptError, match=f"{key}: wants a positive int"):
        processor([{"role": "user", "content": [item]}])
    if key != "resized_height":
        with pytest.raises(MediaError, match=f"{key} must be a positive integer"):
            processor([{"role": "user", "content": "a"}], **{key: value})
