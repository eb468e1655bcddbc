"""Generated samples as a source of training data: shares, resuming, mixing, and tables that are wrong."""

import json
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
from PIL import Image
from torch.utils.data import DataLoader
from typer.testing import CliRunner

from examples.small.shape import write_beginning
from qwen2vl.cli import app
from qwen2vl.errors import DataError
from qwen2vl.samples import LEVELS, SKILLS
from qwen2vl.samples.source import Generated, raw_sample
from qwen2vl.training.config import TrainingConfig
from qwen2vl.training.data import build_dataset
from tests.training.data_files import chat, make_processor, taught, write_jsonl

ROOT = Path(__file__).parents[2]
COUNT = {"path": "count", "format": "generated", "difficulty": [0, 1]}


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return make_processor(tmp_path_factory.mktemp("tokenizer"))


def build(processor, *entries, **options):
    return build_dataset(list(entries), processor, **{"max_tokens": 2000, "max_bad": 0, "threads": 0, **options})


def sources(examples):
    return [example.source for example in examples]


@pytest.mark.parametrize("world", [1, 3])
def test_ranks_share_all_samples(processor, world):
    entry = {**COUNT, "samples": 20}
    whole = sources(build(processor, entry, seed=3, epochs=2))
    parts = [sources(build(processor, entry, seed=3, rank=r, world=world, epochs=2)) for r in range(world)]
    assert len(set(whole)) == 40
    assert sorted(source for part in parts for source in part) == sorted(whole)
    assert [whole[r::world] for r in range(world)] == parts


def test_workers_of_a_loader_share_too(processor):
    data = build(processor, {**COUNT, "samples": 9}, epochs=1)
    found = list(DataLoader(data, batch_size=None, num_workers=2))
    assert sorted(sources(found)) == sorted(sources(build(processor, {**COUNT, "samples": 9}, epochs=1)))


def test_resuming_equals_going_on(processor, tmp_path):
    file = {"path": str(write_jsonl(tmp_path / "a.jsonl", [chat(n) for n in range(5)])), "format": "conversations"}

    def make(threads=0):
        return build(processor, {**COUNT, "path": ["count", "read"], "weight": 2}, file, seed=5, threads=threads)

    whole = sources(islice(make(), 30))
    assert 18 <= sum(source.startswith("generated:") for source in whole) <= 22
    for cut in (0, 1, 13, 24):
        data = make(2)
        assert sources(islice(iter(data), cut)) == whole[:cut]
        again = make()
        again.load_state_dict(json.loads(json.dumps(data.state_dict())))
        assert sources(islice(again, 30 - cut)) == whole[cut:]


def test_equal_seeds_give_equal_examples_and_others_differ(processor):
    def some(**options):
        return [example.pixel_values.sum().item() for example in islice(build(processor, COUNT, **options), 8)]

    assert some(seed=1) == some(seed=1) != some(seed=2)
    one = {**COUNT, "difficulty": 0}
    two = build(processor, one, one, seed=1)  # each entry has samples of its own
    first, second = islice(two, 2)
    assert first.source == second.source and first.pixel_values.tolist() != second.pixel_values.tolist()


def test_a_state_is_of_one_difficulty_and_split(processor):
    state = build(processor, COUNT).state_dict()
    for change in ({"difficulty": 2}, {"split": "held-out"}, {"samples": 7}):
        with pytest.raises(DataError, match=r"state\.entries"):
            build(processor, {**COUNT, **change}).load_state_dict(state)


def test_skills_and_difficulties_come_equally_often():
    source = Generated(("read", "count"), (0, 3), seed=(1,))
    found = Counter((s.skill, s.difficulty) for s in map(source.sample, range(400)))
    assert set(found) == {(skill, level) for skill in ("read", "count") for level in (0, 3)}
    assert min(found.values()) > 70


def test_every_skill_gives_tokens_to_learn(processor):
    entry = {"path": list(SKILLS), "format": "generated", "difficulty": list(LEVELS), "samples": 105}
    for example in build(processor, entry, epochs=1):
        text = taught(processor, example)
        assert text.endswith("<|im_end|>") and len(text) > len("<|im_end|>")
        assert (example.pixel_values_videos is not None) == (":video-" in example.source)
        assert ("*FUNCTION*" in text) == (":screen-" in example.source)
        assert ("<|box_start|>" in text or "<|quad_start|>" in text) == (":point-" in example.source)


def test_frames_keep_their_own_size(processor):
    (example,) = build(processor, {"path": "video", "format": "generated", "samples": 1}, epochs=1)
    assert example.video_grid_thw.tolist() == [[2, 4, 4]]  # 4 frames of 56 x 56


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"path": "sing"}, r"data\[0\]\.path: wants one of 'read', .* got 'sing'"),
        ({"path": ["count", "sing"]}, r"data\[0\]\.path: wants one of .* got 'sing'"),
        ({"difficulty": 5}, r"data\[0\]\.difficulty: wants one or several of 0, 1, 2, 3, 4, got 5"),
        ({"difficulty": []}, r"data\[0\]\.difficulty: wants one or several"),
        ({"difficulty": True}, r"data\[0\]\.difficulty: wants one or several"),
        ({"split": "dev"}, r"data\[0\]\.split: wants one of 'train', 'held-out', got 'dev'"),
        ({"languages": "en"}, r"data\[0\]\.languages: wants a list of some of 'en'"),
        ({"samples": 0}, r"data\[0\]\.samples: wants an int of at least 1"),
        ({"media_root": "x"}, r"data\[0\]\.media_root: is not taken with format 'generated'"),
        ({"agent": "paper"}, r"data\[0\]\.agent: is not taken with format 'generated'"),
        ({"format": "sharegpt"}, r"data\[0\]\.difficulty: is not taken with format 'sharegpt'"),
    ],
)
def test_tables_that_say_nothing_readable(processor, change, match):
    with pytest.raises(DataError, match=match):
        build(processor, {**COUNT, **change})


def test_epochs_want_an_end(processor):
    with pytest.raises(DataError, match=r"data\[0\]\.samples: is missing"):
        build(processor, COUNT, epochs=1)
    with pytest.raises(DataError, match="samples: wants a number"):
        next(Generated(("read",)).read(0, 1, 1, {}))


def test_skills_are_no_paths_of_a_configuration_file(tmp_path):
    tables = {"run": {"output": "out", "steps": 1}, "model": {"config": "2b"}, "data": [dict(COUNT)]}
    assert TrainingConfig.from_dict(tables, folder=tmp_path).data[0]["path"] == "count"


def test_a_raw_sample_names_its_origin():
    raw = raw_sample(Generated(("read",), (2,), seed=(1, 0), split="held-out").sample(11))
    assert raw.source == "generated:read-2:held-out:11" and raw.folder is None and list(raw.members) == ["0.ppm"]


def test_the_command_trains_on_them_with_their_own_tokenizer(tmp_path):
    """One step from a configuration file that names skills: images, agents' turns and clips."""
    write_beginning(tmp_path / "model", seed=0)
    (tmp_path / "run.toml").write_text(
        '[run]\noutput = "out"\nsteps = 1\nmax_tokens = 1200\nlookahead = 6\n'
        '[model]\ncheckpoint = "model"\ndtype = "float32"\n'
        '[[data]]\nformat = "generated"\npath = ["read", "point", "screen"]\n'
        '[[data]]\nformat = "generated"\npath = "video"\ndifficulty = 1\nlanguages = ["zh"]\n'
    )
    result = CliRunner().invoke(app, ["train", "--stage", "multimodal", "--config", str(tmp_path / "run.toml")])
    assert result.exit_code == 0, result.output
    assert "samples used, none skipped" in result.stderr and (tmp_path / "out" / "model" / "config.json").is_file()


def test_sheets_to_look_at(tmp_path):
    command = [sys.executable, "-m", "qwen2vl.samples", "--out", str(tmp_path), "--count", "2", "--timed", "2"]
    options = {"cwd": ROOT, "capture_output": True, "text": True, "env": {"PYTHONPATH": str(ROOT)}}
    result = subprocess.run(command, **options)
    assert result.returncode == 0 and "samples/s" in result.stdout, result.stderr
    for skill in SKILLS:
        said = (tmp_path / f"{skill}.txt").read_text(encoding="utf-8").splitlines()
        assert [line.split("\t")[0] for line in said] == [f"{level}.{n}" for level in LEVELS for n in range(2)]
        assert Image.open(tmp_path / f"{skill}.png").height > len(LEVELS) * 56
    wrong = subprocess.run(
        [*command, "--split", "dev"], cwd=ROOT, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}
    )
    assert wrong.returncode == 1 and "split: wants one of" in wrong.stderr
