"""A small float32 checkpoint and what loads from it, once for each file, and a folder for the command line; a file with
other needs overrides them."""

import json

import pytest
import torch
from typer.testing import CliRunner

from benchmarks.random_checkpoint import small_config, write_random_checkpoint
from examples.demo.media import draw_scene, write_video
from qwen2vl import Processor, Qwen2VL
from qwen2vl.cli import app


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Weights large enough that greedy answers wander instead of repeating one token, and a head of its own."""
    folder = tmp_path_factory.mktemp("checkpoint")
    return write_random_checkpoint(folder, small_config(tie_word_embeddings=False), dtype=torch.float32, std=0.08)


@pytest.fixture(scope="module")
def model(folder):
    return Qwen2VL.from_pretrained(folder, device="cpu")


@pytest.fixture(scope="module")
def processor(folder):
    return Processor.from_pretrained(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a checkpoint, two images and a video."""
    folder = tmp_path_factory.mktemp("cli")
    write_random_checkpoint(
        folder / "model", small_config(tie_word_embeddings=False), std=0.1, dtype=torch.float32, seed=1
    )
    path = folder / "model" / "generation_config.json"
    # No id that the model can choose, so that answers are as long as asked for.
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": [999]}))
    draw_scene(84, 56).save(folder / "day.png")
    draw_scene(60, 120, night=True).save(folder / "a night.jpg")
    write_video(folder / "balloon.mp4", width=64, height=48, seconds=2, fps=10)
    (folder / "text.png").write_text("no picture at all")
    return folder


@pytest.fixture
def run(place, monkeypatch):
    """Runs the command line in that folder."""
    monkeypatch.chdir(place)

    def call(*args, stdin=None):
        return CliRunner().invoke(app, [str(a) for a in args], input=stdin)

    return call
