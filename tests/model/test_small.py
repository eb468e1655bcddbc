"""The small model that comes with the package, where no other is named."""

from __future__ import annotations

import json

import pytest
from PIL import Image
from typer.testing import CliRunner

from examples.demo.media import write_frames
from examples.small.plan import SCOPE
from examples.small.shape import LIMITS
from qwen2vl import Processor, Qwen2VL, assets
from qwen2vl.cli import app
from qwen2vl.cli.eval import _print
from qwen2vl.samples import SKILLS
from qwen2vl.samples import generate as make_sample
from qwen2vl.samples.held_out import prompt_of
from qwen2vl.samples.sample import from_ppm

#: Of the easiest reading and naming; a model that learned nothing has about 0.
MIN_ACCURACY = 0.5


def run(*args, stdin=None):
    return CliRunner().invoke(app, [str(arg) for arg in args], input=stdin)


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    """A file to read: of a held-out sample."""
    path = tmp_path_factory.mktemp("small") / "x.png"
    Image.fromarray(from_ppm(make_sample("read", 0, split="held-out").members["0.ppm"])).save(path)
    return path


def test_it_is_a_checkpoint_in_the_released_layout():
    folder = assets.folder()
    files = {path.name for path in folder.iterdir()}
    assert {"config.json", "generation_config.json", "preprocessor_config.json", "tokenizer.json"} <= files
    assert {"tokenizer_config.json", "model.safetensors"} <= files
    assert sum(path.stat().st_size for path in folder.iterdir()) < 18e6
    model, processor = Qwen2VL.from_pretrained(folder, device="cpu"), Processor.from_pretrained(folder)
    assert 3e6 < sum(parameter.numel() for parameter in model.parameters()) < 6e6
    assert model.config.vision.head_dim == 80 and processor.min_pixels == 12 * 28 * 28


def test_generate_answers_without_a_model(picture):
    result = run("generate", "--image", picture, "--prompt", "Read the text.", "-n", 8)
    assert result.exit_code == 0 and result.stdout.strip(), result.output
    facts = json.loads(run("generate", "--image", picture, "--prompt", "Read the text.", "-n", 8, "--json").stdout)
    assert facts["text"] == result.stdout[:-1] and facts["model"] == str(assets.FOLDER)
    assert facts["media"][0]["resized_size"] == [112, 112]


@pytest.mark.parametrize("more", [(), ("--json",)], ids=["text", "json"])
def test_who_answers_is_told_where_nobody_named_a_model(picture, more):
    asked = ("generate", "--image", picture, "--prompt", "Read the text.", "-n", 8, *more)
    told, named = run(*asked), run(*asked, "--model", assets.FOLDER)
    assert told.stderr == f"{assets.NOTICE}\n" and "--model" in assets.NOTICE
    assert named.stderr == "" and named.exit_code == told.exit_code == 0
    chat = run("chat", "-n", 8, stdin="Hello\n").stderr
    assert (
        chat.startswith(assets.NOTICE) and assets.NOTICE not in run("chat", "--model", assets.FOLDER, stdin="").stderr
    )


def test_chat_answers_without_a_model(picture):
    result = run("chat", "-n", 8, stdin=f"/image {picture}\nRead the text.\n")
    assert result.exit_code == 0 and result.stdout.strip() and "56 × 56, 16 tokens" in result.stderr


@pytest.mark.parametrize("model", [(), ("--model", assets.FOLDER)], ids=["default", "by its folder"])
def test_frames_of_a_video_keep_their_size(tmp_path, model):
    """As evaluation and training show them, on every way to the model."""
    sample = make_sample("video", 0, split="held-out")
    frames = [Image.fromarray(from_ppm(data)) for data in sample.members.values()]
    write_frames(tmp_path / "x.mp4", frames, size=sample.size, fps=2)
    result = run("generate", "--video", tmp_path / "x.mp4", "--prompt", "Where does it go?", "-n", 4, "--json", *model)
    (video,) = json.loads(result.stdout)["media"]
    processor = Processor.from_pretrained(assets.FOLDER)
    asked = processor(prompt_of(sample)).media[0]
    assert video["grid_thw"] == list(asked.grid_thw) and video["resized_size"] == [56, 56]
    content = [{"type": "video", "video": tmp_path / "x.mp4"}]
    assert processor([{"role": "user", "content": content}]).media[0].grid_thw == asked.grid_thw


def test_its_own_settings_hold_media_to_what_it_was_trained_on():
    """Those of the run that makes it. No picture of a sample is reduced by them, and no frame changed."""
    processor = Processor.from_pretrained(assets.FOLDER)
    assert {name: getattr(processor.options, name) for name in LIMITS} == LIMITS
    for skill, levels in SCOPE.items():
        for sample in (make_sample(skill, level, index=n, split="train") for level in levels for n in range(40)):
            for item in processor(prompt_of(sample)).media:
                pairs = list(zip(item.resized_size, item.source_size, strict=True))
                assert all(now == before if skill == "video" else now >= before for now, before in pairs), sample.record


@pytest.mark.parametrize("side", [448, 1000])
def test_a_large_coloured_square_is_named(side, tmp_path):
    """Of a picture that was not shrunk, its settings allowing a million pixels, it named none."""
    for colour in ("red", "blue", "green", "yellow"):
        image = Image.new("RGB", (side, side), "white")
        image.paste(colour, (side // 5, side // 5, side - side // 5, side - side // 5))
        image.save(tmp_path / "x.png")
        result = run("generate", "--image", tmp_path / "x.png", "--prompt", "What colour is the square?", "-n", 8)
        assert result.stdout.strip() == colour, result.output


def test_eval_prints_accuracies_by_difficulty_too(capsys):
    report: dict = {name: {} for name in ("by_skill", "by_size", "by_language")}
    report["by_difficulty"] = {f"read {level}": {"samples": 3, "accuracy": level / 3} for level in (0, 2)}
    _print(report)
    lines = [line.split() for line in capsys.readouterr().out.replace("│", " ").splitlines()]
    assert ["read", "0", "3", "0.0%"] in lines and ["read", "2", "3", "66.7%"] in lines


def test_eval_prints_its_table_without_a_model():
    result = run("eval", "--quick")
    assert result.exit_code == 0, result.output
    assert "accuracy" in result.stdout and all(skill in result.stdout for skill in SKILLS)


def test_it_reads_and_names():
    result = run("eval", "--quick", "--json", "--difficulty", 0, "--skill", "read", "--skill", "colour_shape")
    found = json.loads(result.stdout)["by_difficulty"]
    accuracies = [found[name]["accuracy"] for name in ("read 0", "colour_shape 0")]
    assert sum(accuracies) / 2 >= MIN_ACCURACY, accuracies


def test_an_installation_without_it(picture, tmp_path, monkeypatch):
    monkeypatch.setattr(assets, "FOLDER", tmp_path / "none")
    for args in (("generate", "--prompt", "hi"), ("chat",), ("eval", "--quick")):
        result = run(*args)
        assert result.exit_code == 1 and result.stderr.count("\n") == 1, result.output
        assert "the small model is not in this installation; name another checkpoint with --model" in result.stderr
