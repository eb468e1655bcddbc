"""The demo runs as ``make demo`` and ``make check`` run it."""

from __future__ import annotations

import re
import sys

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

import qwen2vl.model
import qwen2vl_kernels
from examples.demo import trained
from examples.demo.__main__ import demo
from examples.demo.media import draw_scene
from qwen2vl import Call, Qwen2VL, assets
from qwen2vl.samples import generate as make_sample
from qwen2vl.samples import play

app = typer.Typer()
app.command()(demo)


#: Skill -> how many answers.
PARTS = {"read": 8, "colour_shape": 4, "count": 4, "compare": 4, "point": 4, "video": 4, "screen": 2}


def test_the_small_model_answers_beside_the_truth(tmp_path):
    result = CliRunner().invoke(app, ["--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    answers = [line for line in result.stdout.splitlines() if line.startswith("    answer ")]
    assert len(answers) == sum(PARTS.values())
    assert all(re.fullmatch(r"    answer .*   truth .+   (right|wrong)( \(.+\))?", line) for line in answers), answers
    right = sum("   right" in line for line in answers)
    assert f"{right} of {len(answers)} right: read " in result.stdout
    for skill, number in PARTS.items():
        assert re.search(rf"{skill} \d+ of {number}\b", result.stdout)
        with Image.open(tmp_path / "out" / f"{skill}.png") as sheet:
            sheet.load()
            assert sheet.width == 1080 and sheet.height > 300
    assert "truth 5   " in result.stdout and "truth white circle (429,446),(911,929)   " in result.stdout
    assert 'truth tap "Sort"   ' in result.stdout
    assert re.search(r"took \d+\.\d\d s in the median and \d+\.\d\d s at most, on cpu", result.stdout)
    media = {path.name for path in (tmp_path / "out" / "media").iterdir()}
    assert {"read-8.png", "compare-4b.png", "point-1.png", "video-4.mp4"} <= media and len(media) == 32


def test_other_samples_and_videos_without_pyav(tmp_path, monkeypatch):
    """The first sample of a skill alone: the seed and the language decide which it is."""
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.setattr(trained, "SCOPE", {"video": (1,)})
    monkeypatch.setattr(trained, "_PARTS", {"video": ("A video", 1)})
    result = CliRunner().invoke(app, ["--out", str(tmp_path), "--language", "zh", "--seed", "3"])
    assert result.exit_code == 0, result.output
    sample = make_sample("video", 1, seed=3, split="held-out", languages=("zh",))
    assert f"truth {sample.answer} " in result.stdout and 'pip install "av>=15"' in result.stdout
    assert f"{len(sample.members)} frames, 56 × 56" in result.stdout and not list((tmp_path / "media").iterdir())


def test_a_game_is_shown_with_its_taps(tmp_path):
    game = play(4, index=1)
    watched = trained._Watched(game)
    watched.reset()
    while not watched.done:
        watched.execute(game.next_call())
    assert game.success and len(watched.screens) == len(watched.said) == 3
    assert watched.said[0].endswith("on the field") and watched.said[1].startswith('type "')
    assert watched.said[2].endswith(f'on "{game.tasks[2].text}"')
    x, y = (2 * v for v in next(c for c in game.screens[0] if c.kind == "field").centre)
    assert watched.screens[0].getpixel((round(x), round(y))) == (0xE6, 0x19, 0x4B)
    watched.game = fresh = play(4, index=1)
    watched.execute(Call("Tap", {"point": (999, 999)}))
    assert watched.said[3] == "tap (999,999), on nothing" and not fresh.done


def test_without_the_small_model(tmp_path, monkeypatch):
    monkeypatch.setattr(assets, "FOLDER", tmp_path / "none")
    result = CliRunner().invoke(app, ["--out", str(tmp_path)])
    assert result.exit_code == 1 and "the small model is not in this installation" in result.stderr


@pytest.mark.parametrize(
    ("options", "code", "named"),
    [
        (["--language", "xx"], 1, "'xx'"),
        (["--language", "ko"], 1, "'en', 'zh'"),
        (["--keep"], 2, "--random or --check"),
    ],
)
def test_options_that_are_refused(tmp_path, options, code, named):
    result = CliRunner().invoke(app, ["--out", str(tmp_path), *options])
    assert result.exit_code == code and named in result.stderr


def test_random_weights(tmp_path):
    result = CliRunner().invoke(app, ["--out", str(tmp_path / "out"), "--random", "--keep"])
    assert result.exit_code == 0, result.output
    for said in ("weights are random", "1 × 32 × 48", "384", "560 × 224", "6 × 20 × 28", "kept: 0.00", "answer's ids"):
        assert said in result.stdout
    made = {path.name for path in (tmp_path / "out").iterdir()}
    assert made == {
        *("day.png", "night.png", "exit.jpg", "balloon.mp4", "checkpoint"),
        *("day-grid.png", "day-positions.png", "balloon-frames.png", "balloon-positions.png"),
    }
    assert Qwen2VL.from_pretrained(tmp_path / "out" / "checkpoint").config.text.vocab_size == 512


def test_random_weights_without_pyav(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    result = CliRunner().invoke(app, ["--out", str(tmp_path), "--random"])
    assert result.exit_code == 0, result.output
    assert "no video" in result.stdout and 'pip install "av>=15"' in result.stdout and "balloon" not in result.stdout


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
