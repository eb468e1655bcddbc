"""Files that a command line or a run names and that are none: pipes, devices, and what has no end."""

import json
import os

import pytest
from typer.testing import CliRunner

from qwen2vl.cli import app
from qwen2vl.errors import DataError
from qwen2vl.training.config import TrainingConfig
from qwen2vl.training.data import json_files
from qwen2vl.training.errors import TrainingConfigError

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")

ASKED = {"prompt": "hi", "answer": "ho"}
COMMANDS = {
    "prompts": ("generate", "--jsonl", "{}", "--out", "new.jsonl"),
    "answers": ("generate", "--jsonl", "asked.jsonl", "--out", "{}"),
    "questions": ("eval", "--task", "{}", "--metric", "exact_match"),
    "answers to questions": ("eval", "--task", "asked.jsonl", "--metric", "exact_match", "--answers", "{}"),
    "answers to samples": ("eval", "--quick", "--skill", "count", "--answers", "{}"),
    "a run": ("train", "--stage", "instruct", "--config", "{}"),
}


@pytest.mark.parametrize("what", COMMANDS)
@pytest.mark.parametrize("given", ["pipe", "/dev/zero"])
def test_what_is_no_file_is_refused(what, given, tmp_path, monkeypatch):
    """Not waited for, and not read to its end."""
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    (tmp_path / "asked.jsonl").write_text(json.dumps(ASKED) + "\n")
    result = CliRunner().invoke(app, [part.format(given) for part in COMMANDS[what]])
    assert result.exit_code == 1 and f"{given}: " in result.stderr, result.output
    assert "is not a regular file" in result.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [("[" * 100_000, "cannot be read as TOML"), (f"[run]\nsteps = {'9' * 5000}", "cannot be read as TOML"),
     ("a\0b", "cannot be read as TOML")],
)  # fmt: skip
def test_a_run_of_no_toml(text, message, tmp_path):
    (tmp_path / "run.toml").write_text(text)
    with pytest.raises(TrainingConfigError, match=message):
        TrainingConfig.from_toml(tmp_path / "run.toml")


def test_an_array_without_bound_is_refused_by_its_size(tmp_path, monkeypatch):
    monkeypatch.setattr(json_files, "MAX_ARRAY", 1000)
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"text": "x" * 100}] * 5))
    assert len(json_files.JsonFiles([str(path)])) == 5
    path.write_text(json.dumps([{"text": "x" * 100}] * 50))
    with pytest.raises(DataError, match="an array of at most 0 MB, which is held as a whole; write a record a line"):
        json_files.JsonFiles([str(path)])
