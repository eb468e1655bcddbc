"""The demo runs as ``make demo`` and ``make check`` run it."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

import qwen2vl.model
import qwen2vl_kernels
from qwen2vl import Qwen2VL
from qwen2vl.demo.__main__ import demo
from qwen2vl.demo.media import draw_scene

app = typer.Typer()
app.command()(demo)


def test_demo(tmp_path):
    result = CliRunner().invoke(app, ["--out", str(tmp_path / "out"), "--keep"])
    assert result.exit_code == 0, result.output
    for said in ("weights are random", "1 × 32 × 48", "384", "560 × 224", "6 × 20 × 28", "kept: 0.00", "answer's ids"):
        assert said in result.stdout
    made = {path.name for path in (tmp_path / "out").iterdir()}
    assert made == {
        *("day.png", "night.png", "exit.jpg", "balloon.mp4", "checkpoint"),
        *("day-grid.png", "day-positions.png", "balloon-frames.png", "balloon-positions.png"),
    }
    assert Qwen2VL.from_pretrained(tmp_path / "out" / "checkpoint").config.text.vocab_size == 512


def test_demo_without_pyav(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    result = CliRunner().invoke(app, ["--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "no video" in result.stdout and "qwen2vl[video]" in result.stdout and "balloon" not in result.stdout


def test_check_finds_equality(tmp_path):
    pytest.importorskip("transformers")
    result = CliRunner().invoke(app, ["--out", str(tmp_path), "--check"])
    assert result.exit_code == 0, result.output
    assert result.stdout.count("64 of 64 equal") == 3
    assert "ours for the prompt with a video" in result.stdout


def test_check_finds_wrong_positions(tmp_path, monkeypatch):
    """Ours may not reach both sides: with images a mistake in them shows, and transformers is not given any."""
    pytest.importorskip("transformers")
    right = qwen2vl_kernels.mrope_positions

    def wrong(*args, **kwargs):
        positions, delta = right(*args, **kwargs)
        return positions.roll(1, 0), delta  # the axes in another order

    for module in (qwen2vl_kernels, qwen2vl.model):
        monkeypatch.setattr(module, "mrope_positions", wrong)
    result = CliRunner().invoke(app, ["--out", str(tmp_path), "--check"])
    assert result.exit_code == 1
    assert "not equal to transformers: One photo, Several images" in result.stderr


def test_night_tree_leaves_the_windows_free():
    """A narrow picture, where the tree once stood before the house."""
    lit = (np.asarray(draw_scene(308, 448, night=True)) == (255, 214, 120)).all(-1)
    door = 308 // 3
    assert lit[:, door:].sum() > 0.9 * lit[:, :door].sum() > 200


def test_check_finds_a_difference(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    load = Qwen2VL.from_pretrained

    def loads_wrongly(*args, **kwargs):
        model = load(*args, **kwargs)
        next(model.visual.parameters()).data *= 1.01
        return model

    monkeypatch.setattr(Qwen2VL, "from_pretrained", loads_wrongly)
    result = CliRunner().invoke(app, ["--out", str(tmp_path), "--check"])
    assert result.exit_code == 1 and "not equal to transformers" in result.stderr
