"""``qwen2vl inspect`` from outside: it shows what ``generate`` does, goes on after a bad file, and draws."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qwen2vl import Processor

SIZES = ("source_size", "resized_size", "grid_thw", "tokens")


@pytest.fixture
def wide(tmp_path):
    """A picture that its EXIF data turn upright, larger than the toy's limit: 900 pixels high and 600 wide."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.effect_noise((900, 600), 50).convert("RGB").save(tmp_path / "turned.jpg", exif=exif)
    return tmp_path / "turned.jpg"


@pytest.mark.parametrize("options", [(), ("--max-pixels", 9000), ("--min-pixels", 90_000), ("--fps", 1)])
@pytest.mark.parametrize("model", [(), ("--model", "model")])
def test_inspect_shows_what_generate_does(run, wide, model, options):
    """With the same options, of the toy, too: sizes in one order, tokens and frames."""
    shown = json.loads(run("inspect", wide, "balloon.mp4", "--json", *model, *options).stdout)
    media = ("--image", wide, "--video", "balloon.mp4")
    done = run("generate", *media, "-p", "x", "-n", 1, "--json", *model, *options)
    assert done.exit_code == 0, done.stderr
    for one, other in zip(shown, json.loads(done.stdout)["media"], strict=True):
        assert one["file"] == other["source"]
        assert {k: one[k] for k in other if k != "source"} == {k: v for k, v in other.items() if k != "source"}
    assert shown[0]["source_size"] == [900, 600]
    assert "600 × 900 pixels (width × height)" in run("inspect", wide, *model).stdout


def test_inspect_takes_the_limits_and_patches_of_a_checkpoint(run, place, wide, tmp_path):
    processor = Processor.from_pretrained("model", max_pixels=20_000, video_max_pixels=3136)
    (tmp_path / "other").mkdir()
    for file in (place / "model").iterdir():
        (tmp_path / "other" / file.name).write_bytes(file.read_bytes())
    processor.save_pretrained(tmp_path / "other")
    (image, video) = json.loads(run("inspect", wide, "balloon.mp4", "--model", tmp_path / "other", "--json").stdout)
    inputs = processor([{"role": "user", "content": [{"type": "image", "image": str(wide)}]}])
    assert image["patches"] == len(inputs["pixel_values"]) and 0 < np.prod(image["resized_size"]) <= 20_000
    assert np.prod(video["resized_size"]) <= 3136


def test_a_bad_file_does_not_hide_the_others(run):
    files = ("missing.png", "day.png", "text.png", "balloon.mp4")
    result = run("inspect", *files, "--json", "--model", "model")
    assert result.exit_code == 1
    reports = json.loads(result.stdout)
    assert [report["file"] for report in reports] == list(files)
    assert ["error" in report for report in reports] == [True, False, True, False]
    assert reports[1]["tokens"] == 6 and "missing.png" in reports[0]["error"]
    lines = result.stderr.splitlines()
    assert len(lines) == 2 and all(line.startswith("error: ") for line in lines)
    assert "missing.png" in lines[0] and "text.png" in lines[1]
    result = run("inspect", *files, "--model", "model")
    assert result.exit_code == 1 and "6, and 2 marks" in result.stdout and "frames kept" in result.stdout


def test_a_quantised_checkpoint_is_named(run, place, tmp_path):
    """By ``inspect`` and by ``info``, which read no weights: there are none."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((place / "model" / name).read_bytes())
    config = json.loads((place / "model" / "config.json").read_text())
    how = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": True}
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": how}))
    said = "gptq int4, groups of 64, act-order"
    for command in (("inspect", "day.png"), ("info",)):
        for model, wanted in ((tmp_path, said), ("model", None)):
            plain, told = (run(*command, "--model", model, *json_) for json_ in ((), ("--json",)))
            assert plain.exit_code == told.exit_code == 0, plain.stderr + told.stderr
            facts = json.loads(told.stdout)
            assert (facts[0] if command[0] == "inspect" else facts)["quantization"] == wanted
            assert (said in (plain.stdout + plain.stderr).replace("\n", " ")) == (wanted is not None)
    assert run("inspect", "day.png", "--model", tmp_path, "--quiet").stderr == ""


def test_without_a_model_inspect_says_whose_sizes_they_are(run):
    result = run("inspect", "day.png")
    assert result.exit_code == 0 and "toy" in result.stderr and "--model" in result.stderr


def test_inspect(run, tmp_path):
    result = run("inspect", "day.png", "balloon.mp4", "--out", tmp_path / "new", "--json")
    assert result.exit_code == 0, result.stderr
    image, video = json.loads(result.stdout)
    assert image["grid_thw"] == [1, 6, 10] and image["tokens"] == 15 and image["patches"] == 60
    assert image["file_bytes"] == Path("day.png").stat().st_size and image["patch_bytes"] == 60 * 588
    assert [Path(p).name for p in image["pictures"]] == ["day-grid.png", "day-positions.png"]
    assert [Path(p).name for p in video["pictures"]] == ["balloon-frames.png", "balloon-positions.png"]
    assert video["frame_times"] == pytest.approx([0, 0.6, 1.3, 1.9])
    sizes = {}
    for path in image["pictures"] + video["pictures"]:
        with Image.open(path) as picture:
            picture.load()
            assert picture.format == "PNG" and len(np.unique(np.asarray(picture).reshape(-1, 3), axis=0)) > 8
            sizes[Path(path).name] = picture.size
    assert sizes["day-grid.png"] == (140 * 4, 84 * 4)  # enlarged by a whole factor, to 560 at least
    assert sizes["day-positions.png"] == (1440, 600)
    text = run("inspect", "day.png", "balloon.mp4").stdout
    for said in ("84 × 56 pixels", "1 × 6 × 10", "15, and 2 marks", "2.00 s at 10.00 frames", "4, at 0.00, 0.60"):
        assert said in text


def test_inspect_options(run, place):
    (small,) = json.loads(run("inspect", "day.png", "--max-pixels", 3136, "--json").stdout)
    assert small["tokens"] <= 4
    (forced,) = json.loads(run("inspect", "balloon.mp4", "--as", "video", "--fps", 5, "--json").stdout)
    assert len(forced["frame_times"]) == 10
    result = run("inspect", "balloon.mp4", "--as", "image")
    assert result.exit_code == 1 and "balloon.mp4" in result.stderr


def test_names_of_files_are_no_formulas(run, place, tmp_path):
    """matplotlib reads what stands between dollars as one, and fails on what is none."""
    for name in ("cost $5$ {x} \\frac.png", "a$b_{$.png"):
        Image.open(place / "day.png").save(tmp_path / name)
        result = run("inspect", tmp_path / name, "--out", tmp_path / "seen")
        assert result.exit_code == 0, result.stderr
    assert len(list((tmp_path / "seen").glob("*-positions.png"))) == 2


def test_pictures_of_files_with_one_stem(run, place, tmp_path):
    (tmp_path / "day.png").write_bytes((place / "a night.jpg").read_bytes())
    reports = json.loads(run("inspect", "day.png", tmp_path / "day.png", "--out", tmp_path, "--json").stdout)
    names = [Path(p).name for report in reports for p in report["pictures"]]
    assert names == ["day-1-grid.png", "day-1-positions.png", "day-2-grid.png", "day-2-positions.png"]


@pytest.mark.parametrize(
    ("files", "names"),
    [
        (["x/a.png", "y/a.png", "a-1.png"], ["a-2", "a-3", "a-1"]),
        (["a-1.png", "x/a.png", "z/a-1.png", "y/a.png"], ["a-1-1", "a-1", "a-1-2", "a-2"]),
        (["x/a.png", "y/a.png", "z/a-1.png", "w/a-1.jpg"], ["a-1", "a-2", "a-1-1", "a-1-2"]),
        (["a.png", "b.png", "A.png"], ["a-1", "b", "A-2"]),
    ],
)
def test_names_of_pictures_are_unique(files, names):
    assert importlib.import_module("qwen2vl.cli.inspect")._names(files) == names


def test_inspect_without_matplotlib(run, tmp_path, monkeypatch):
    """The plot alone is left out, with a word on why."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run("inspect", "day.png", "--out", tmp_path)
    assert result.exit_code == 0 and 'pip install "matplotlib>=3.8"' in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["day-grid.png"]
    assert run("inspect", "day.png", "--model", "model").stderr == ""
