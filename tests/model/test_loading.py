"""A checkpoint is looked for once and its config.json read once, whatever is loaded of it together."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import qwen2vl.hub
from benchmarks.random_checkpoint import write_random_checkpoint
from qwen2vl import CheckpointError, Processor, Qwen2VL, Qwen2VLConfig
from qwen2vl.cli import app
from qwen2vl.hub import Checkpoint
from qwen2vl.training.config import TrainingConfig
from qwen2vl.training.trainer import Trainer
from tests.training.data_files import chat, write_jsonl


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_random_checkpoint(tmp_path_factory.mktemp("loading") / "model", std=0.1, dtype=torch.float32)


@pytest.fixture
def counts(monkeypatch):
    """How often a checkpoint was looked for and each config.json read, by name."""
    seen: dict[str, list[str]] = {"resolve": [], "config": []}
    resolve, read = qwen2vl.hub.resolve, Qwen2VLConfig.from_pretrained.__func__

    def counted_resolve(name, **options):
        seen["resolve"].append(str(name))
        return resolve(name, **options)

    def counted_read(cls, path):
        seen["config"].append(str(path))
        return read(cls, path)

    monkeypatch.setattr(qwen2vl.hub, "resolve", counted_resolve)
    monkeypatch.setattr(Qwen2VLConfig, "from_pretrained", classmethod(counted_read))
    return seen


def test_the_command_line_finds_a_checkpoint_once(folder, counts):
    result = CliRunner().invoke(app, ["generate", "--model", str(folder), "-p", "Hi", "-n", "2", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert counts == {"resolve": [str(folder)], "config": [str(folder)]}


def test_lmms_eval_finds_a_checkpoint_once(folder, counts):
    from qwen2vl.evaluation.lmms_eval import ChatModel

    model = ChatModel(str(folder), device="cpu", max_pixels=3136, fps=1.0)
    assert (model.processor.min_pixels, model.processor.max_pixels, model.processor.options.fps) == (3136, 3136, 1.0)
    assert counts == {"resolve": [str(folder)], "config": [str(folder)]}


def test_a_training_run_finds_a_checkpoint_once(folder, counts, tmp_path):
    """From reading to export; a processor of its own is a second one."""
    path = str(write_jsonl(tmp_path / "a.jsonl", [chat(n) for n in range(5)]))
    own = write_random_checkpoint(tmp_path / "own", dtype=torch.float32)
    for name, processor in (("one", None), ("two", str(own))):
        for seen in counts.values():
            seen.clear()
        tables = {
            "model": {"checkpoint": str(folder), "dtype": "float32", "processor": processor},
            "run": {"output": str(tmp_path / name), "steps": 1, "max_tokens": 200, "checkpoint_activations": False},
            "data": [{"path": path, "format": "conversations"}],
        }
        tables["model"] = {key: value for key, value in tables["model"].items() if value is not None}
        Trainer(TrainingConfig.from_dict(tables), "instruct").run()
        expected = [str(folder)] if processor is None else [str(folder), processor]
        assert counts == {"resolve": expected, "config": expected}
        assert (tmp_path / name / "model" / "tokenizer.json").is_file()


def test_a_found_checkpoint_stands_for_its_name(folder, tmp_path):
    found = Checkpoint.find(folder)
    assert Checkpoint.find(found) is found and found.folder == Path(folder)
    assert Qwen2VL.from_pretrained(found, device="cpu").config == found.config
    messages = [{"role": "user", "content": "Hi"}]
    ids = [Processor.from_pretrained(one)(messages)["input_ids"] for one in (found, folder)]
    assert torch.equal(*ids)
    with pytest.raises(CheckpointError, match="no such folder"):
        Checkpoint.find(tmp_path / "none" / "here")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "other"}))
    with pytest.raises(CheckpointError, match="model_type is 'other'"):
        _ = Checkpoint.find(tmp_path).config
