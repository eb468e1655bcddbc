"""The small model: its shape and plan, the command that trains it, and the file that is shipped."""

import hashlib
import json
import shutil
from collections import Counter
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from typer.testing import CliRunner

from benchmarks.byte_tokenizer import write_byte_tokenizer
from examples.small import plan, results
from examples.small.__main__ import app
from examples.small.lessons import Lessons
from examples.small.plan import REHEARSAL, SCOPE, SEED, WEIGHTS, open_levels, shares
from examples.small.results import GOALS, Goal, behind, error_rate, facts_of, mean, table
from examples.small.shape import write_beginning
from examples.small.sitting import CURVE, Sitting, sittings_of, train
from qwen2vl import assets
from qwen2vl.config import Qwen2VLConfig
from qwen2vl.errors import CheckpointError, DataError, Qwen2VLError
from qwen2vl.model import Qwen2VL
from qwen2vl.prompt.processor import Processor
from qwen2vl.prompt.tokenizer import CONTROL_TOKENS, Tokenizer
from qwen2vl.samples import held_out
from qwen2vl.samples.skills import DATA_VERSION
from tests.examples.cut import Killed, killed_at

SCOPE_LEVELS = [(skill, n) for skill, levels in SCOPE.items() for n in levels]


def test_equal_seeds_write_equal_bytes(beginning, tmp_path):
    write_beginning(tmp_path / "again", seed=SEED)
    write_beginning(tmp_path / "other", seed=SEED + 1)
    sums = [
        {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
        for folder in (beginning, tmp_path / "again", tmp_path / "other")
    ]
    assert sums[0] == sums[1]
    assert {name for name in sums[0] if sums[0][name] != sums[2][name]} == {"model.safetensors"}


def test_the_shape_is_qwen2_vls_own(beginning):
    config = Qwen2VLConfig.from_pretrained(beginning)
    assert config.vision.head_dim == 80 and config.vision.spatial_merge_size == 2
    assert config.text.num_key_value_heads < config.text.num_attention_heads
    assert len(config.text.mrope_section) == 3 and min(config.text.mrope_section) > 0
    tokenizer = Processor.from_pretrained(beginning).tokenizer
    for token in CONTROL_TOKENS:
        assert tokenizer.decode([tokenizer.id(token)], skip_special_tokens=False) == token


def test_weights_of_another_vocabulary_are_taken(beginning, tmp_path):
    """A token begins as the mean of those that spell it in the other vocabulary, all else as it is."""
    write_byte_tokenizer(tmp_path / "bytes")
    shutil.copytree(beginning, tmp_path / "source")
    for file in (tmp_path / "bytes").iterdir():
        shutil.copy(file, tmp_path / "source")
    write_beginning(tmp_path / "taken", seed=5, source=tmp_path / "source")
    source, taken = (Qwen2VL.from_pretrained(tmp_path / name, device="cpu") for name in ("source", "taken"))
    for (name, ours), theirs in zip(taken.named_parameters(), source.parameters(), strict=True):
        assert "embed_tokens" in name or torch.equal(ours, theirs), name
    rows, other = (dict(model.named_parameters())["model.embed_tokens.weight"] for model in (taken, source))
    tokenizer, spelled = (Tokenizer.from_pretrained(tmp_path / name) for name in ("taken", "source"))
    for word in (" circle", "Q", "形"):
        (ours,) = tokenizer.encode_plain(word)
        theirs = spelled.encode_plain(word)
        assert len(theirs) == {" circle": 7, "Q": 1, "形": 3}[word]
        assert torch.equal(rows[ours], other[theirs].mean(0))
    for token in CONTROL_TOKENS:
        assert torch.equal(rows[tokenizer.id(token)], other[spelled.id(token)])


def test_weights_of_another_shape_are_refused(beginning, tmp_path):
    write_beginning(tmp_path / "deep", seed=0, depth=1, layers=1)
    with pytest.raises(CheckpointError, match=r"visual\.blocks\.1\..* is missing"):
        write_beginning(tmp_path / "taken", seed=0, source=tmp_path / "deep")


# ----------------------------------------------------------------------------------------------------- the curriculum


def test_large_letters_come_alone_until_they_are_read():
    asked = []

    def error(level):
        asked.append(level)
        return 0.3

    assert open_levels([], error) == {("read", 0): 0.3} and asked == [("read", 0)]


def test_what_is_answered_opens_the_next_level():
    wrong = {("read", 0): 0.1, ("read", 1): 0.29, ("read", 2): 0.31, ("count", 0): 0.0, ("screen", 0): 0.0}
    found = open_levels([], lambda level: wrong.get(level, 0.9))
    assert [n for skill, n in found if skill == "read"] == [0, 1, 2]
    assert [n for skill, n in found if skill == "count"] == [0, 1]
    assert [n for skill, n in found if skill == "screen"] == [0, 1]  # there are no more
    assert {skill for skill, _ in found} == set(SCOPE) and all(n in SCOPE[skill] for skill, n in found)
    again = open_levels(found, lambda level: 1.0)
    assert again.keys() == found.keys()  # none closes
    assert open_levels(SCOPE_LEVELS, lambda level: 0.0).keys() == set(SCOPE_LEVELS)
    assert open_levels([("read", 4), ("sing", 0)], lambda level: 1.0).keys() == {("read", 0)}  # in no scope any more


def test_what_is_wrong_more_often_is_drawn_more_often():
    drawn = shares({("read", 0): 0.0, ("read", 1): 0.5, ("count", 0): 0.5})
    assert sum(drawn.values()) == pytest.approx(1)
    assert drawn["read", 1] / drawn["read", 0] == pytest.approx((REHEARSAL + 0.5) / REHEARSAL)
    assert drawn["read", 1] / drawn["count", 0] == pytest.approx(WEIGHTS["read"] / WEIGHTS["count"])


def test_laps_are_drawn_in_their_shares_and_resumed_exactly(beginning):
    """Cut before, at and behind the beginning of a lap."""
    processor = Processor.from_pretrained(beginning)
    first, second = {("read", 0): 0.5, ("count", 0): 0.5}, {("video", 0): 0.75, ("count", 0): 0.25}

    def lessons():
        return Lessons(processor, [(0, first), (6, second)], seed=3, max_tokens=999, ahead=2)

    def given(data, count):
        return [(example.source, example.input_ids.tolist()) for example in islice(data, count)]

    whole = given(lessons(), 14)
    kinds = [source.split(":")[1] for source, _ in whole]
    assert Counter(kinds[:6]) == {"read-0": 3, "count-0": 3} and Counter(kinds[6:]) == {"video-0": 6, "count-0": 2}
    for cut in (0, 5, 6, 7):
        before, after = lessons(), lessons()
        assert given(before, cut) == whole[:cut]
        after.load_state_dict(before.state_dict())
        assert given(after, 14 - cut) == whole[cut:]
    grown = Lessons(processor, [(0, first)], seed=3, max_tokens=999, ahead=2)
    draws = iter(grown)
    assert given(draws, 6) == whole[:6]
    grown.begin_lap(second)
    assert given(draws, 8) == whole[6:]
    with pytest.raises(DataError, match=r"state\.lap: is 1, but there are 1 laps"):
        Lessons(processor, [(0, first)], seed=3, max_tokens=9).load_state_dict(grown.state_dict())


# --------------------------------------------------------------------------------------------------------- sittings


def test_a_sitting_goes_on_as_if_it_had_not_been_cut(beginning, tmp_path, monkeypatch):
    """Killed behind a measurement, whose row is there but whose checkpoint is not."""
    monkeypatch.setattr(held_out, "_MAX_NEW_TOKENS", 2)
    monkeypatch.setattr(plan, "OPENING", 1.1)
    monkeypatch.setattr(plan, "SCOPE", {"read": (0,), "count": (0,)})
    sitting = Sitting("x", 3, tokens=512, every=1, count=2)
    train(tmp_path / "whole", beginning, sitting, said=lambda line: None)

    with pytest.raises(Killed):
        train(tmp_path / "cut", beginning, sitting, said=killed_at(2))
    assert [row["step"] for row in curve(tmp_path / "cut")] == [0, 1, 2]
    before = [{"begin": "y"}]
    train(tmp_path / "cut", beginning, sitting, before=before, said=lambda line: None)
    whole, cut = curve(tmp_path / "whole"), curve(tmp_path / "cut")
    assert [row | {"seconds": 0} for row in whole] == [row | {"seconds": 0} for row in cut]
    assert [row["step"] for row in whole] == [0, 1, 2, 3] and list(whole[0]["levels"]) == ["read 0", "count 0"]
    models = [tmp_path / name / "model" / "model.safetensors" for name in ("whole", "cut")]
    assert models[0].read_bytes() == models[1].read_bytes()
    assert sittings_of(tmp_path / "cut" / "model") == [*before, {**asdict(sitting), "curve": cut}]
    with pytest.raises(Qwen2VLError, match=r"run\.json: was begun with .*; give another folder"):
        train(tmp_path / "cut", beginning, replace(sitting, steps=4))


def test_what_an_earlier_sitting_opened_stays_open(beginning, tmp_path, monkeypatch):
    """However wrong it is: what is not drawn for a while is forgotten."""
    monkeypatch.setattr(held_out, "_MAX_NEW_TOKENS", 2)
    monkeypatch.setattr(plan, "OPENING", -1.0)
    rows = [{"drawn": 0, "levels": {"read 0": [0.1, 0.5], name: [0.9, 0.5]}} for name in ("count 1", "video 0")]
    before = [{"begin": "y"}, *({"begin": "z", "curve": [row]} for row in rows)]
    sitting = Sitting("x", 1, tokens=512, count=1)
    train(tmp_path / "s", beginning, sitting, before=before, said=lambda line: None)
    assert set(curve(tmp_path / "s")[0]["levels"]) == {"read 0", "count 1", "video 0"}


def curve(folder):
    return [json.loads(line) for line in (folder / CURVE).read_text().splitlines()]


def test_the_commands_train_and_ship(tmp_path, monkeypatch):
    """A second sitting begins from the first one's file, with other samples, and its file tells of both."""
    monkeypatch.setattr(held_out, "_MAX_NEW_TOKENS", 2)
    monkeypatch.setattr(results, "SCOPE", {"read": (0,)})
    monkeypatch.setattr(results, "GOALS", (Goal("reading", error_rate("read", (0,)), 0.05, least=False),))

    def run(*arguments):
        result = CliRunner().invoke(app, list(map(str, arguments)))
        assert result.exit_code == 0, result.output
        return Path(result.stdout.strip())

    model = run("train", "--output", tmp_path / "1", "--steps", 1, "--threads", 1)
    shipped = run("ship", model, "--output", tmp_path / "a", "--count", 2, "--processes", 1)
    model = run("train", "--output", tmp_path / "2", "--from", shipped, "--steps", 1, "--threads", 1)
    shipped = run("ship", model, "--output", tmp_path / "b", "--count", 2, "--processes", 1)
    told = facts_of(shipped)
    assert [one["begin"] for one in told["sittings"]] == ["random", f"{tmp_path.name}/a"]
    assert [one["seed"] for one in told["sittings"]] == [SEED, SEED + 1]
    assert [row["step"] for row in told["sittings"][1]["curve"]] == [0, 1]
    assert told["data_version"] == DATA_VERSION and told["results"]["by_skill"]["read"]["samples"] == 2
    assert "| reading |" in table(told)
    ours, theirs = Qwen2VL.from_pretrained(shipped, device="cpu"), Qwen2VL.from_pretrained(model, device="cpu")
    assert ours.dtype == torch.bfloat16
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, other.bfloat16()), name
    missing = CliRunner().invoke(app, ["train", "--output", str(tmp_path / "3"), "--from", str(tmp_path / "none")])
    assert missing.exit_code == 1 and "none" in missing.stderr


def test_goals_are_means_over_difficulties_and_edits_by_characters():
    rows = {
        "read 0": {"accuracy": 1.0, "edits": 0.0, "characters": 1.0, "samples": 10},
        "read 1": {"accuracy": 0.9, "edits": 0.2, "characters": 3.0, "samples": 30},
    }
    languages = {"en": {"accuracy": 0.75}, "zh": {"accuracy": 0.5}}
    results = {"by_difficulty": rows, "by_language": languages}
    goal = Goal("reading", error_rate("read", (0, 1)), 0.08, least=False)
    assert goal.value(results) == pytest.approx(0.06) and goal.reached(results)
    assert not replace(goal, least=True).reached(results)
    assert mean("read", (0, 1))(results) == pytest.approx(0.925) and behind("zh", "en")(results) == 0.25


# -------------------------------------------------------------------------------------------- the file that is shipped


def test_the_shipped_file_says_what_made_it_and_can_be_gone_on_from(beginning):
    told = facts_of(assets.FOLDER)
    assert told["sittings"] == sittings_of(assets.FOLDER) and told["sittings"][-1]["curve"]
    assert (told["data_version"], len(told["typefaces"]) > 1) == (DATA_VERSION, True)
    assert min(row["samples"] for row in told["results"]["by_skill"].values()) >= 1000
    assert set(told["goals"]) == {goal.name for goal in GOALS}
    for goal in GOALS:
        assert told["goals"][goal.name]["value"] == pytest.approx(goal.value(told["results"]))
    assert (assets.FOLDER / "tokenizer.json").read_bytes() == (beginning / "tokenizer.json").read_bytes()
    config, own = Qwen2VLConfig.from_pretrained(assets.FOLDER), Qwen2VLConfig.from_pretrained(beginning)
    assert (config.text, config.vision) == (own.text, own.vision)


def test_the_docs_say_what_the_shipped_file_does():
    page = (Path(__file__).parents[2] / "docs" / "model.md").read_text(encoding="utf-8")
    assert table(facts_of(assets.FOLDER)) in page


def test_the_shipped_file_is_small_and_of_bfloat16():
    path = assets.FOLDER / "model.safetensors"
    assert path.stat().st_size <= 12e6
    with safe_open(path, "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118


def test_transformers_reads_the_shipped_file_as_we_do():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model = Qwen2VL.from_pretrained(assets.FOLDER, device="cpu", dtype="float32")
    other = transformers.Qwen2VLForConditionalGeneration.from_pretrained(assets.FOLDER, dtype=torch.float32).eval()
    ids = torch.tensor([Processor.from_pretrained(assets.FOLDER).tokenizer.encode_plain("Read the text: 读出文字。")])
    with torch.inference_mode():
        ours, theirs = model(input_ids=ids)[0], other(input_ids=ids).logits[0]
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()
