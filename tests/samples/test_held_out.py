"""Evaluation on generated samples: right answers count, wrong ones do not, and a game is won by playing it."""

import json
import re
from dataclasses import replace

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from benchmarks.random_checkpoint import write_random_checkpoint
from qwen2vl import GenerationConfig, Processor, Qwen2VL, generate
from qwen2vl.cli import app
from qwen2vl.errors import Qwen2VLError
from qwen2vl.samples import LEVELS, SKILLS, play
from qwen2vl.samples import generate as make_sample
from qwen2vl.samples.held_out import _played, averages, evaluate, prompt_of, report, score, size_class

ASKED = [skill for skill in SKILLS if skill != "screen"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_random_checkpoint(tmp_path_factory.mktemp("held-out") / "model", std=0.1, dtype=torch.float32)


@pytest.mark.parametrize("skill", ASKED)
@pytest.mark.parametrize("difficulty", LEVELS)
def test_the_answer_expected_scores_full_and_another_sample_s_does_not(skill, difficulty):
    samples = [make_sample(skill, difficulty, index=n, split="held-out") for n in range(12)]
    for sample in samples:
        right = score(sample, f" {sample.answer}\n")
        assert right.scores["accuracy"] == 1 and right.scores.get("IoU", 1) == 1 and right.scores.get("ANLS", 1) == 1
        assert right.scores.get("edits", 0) == 0 and right.scores.get("relaxed accuracy", 1) == 1
        assert score(sample, "").scores["accuracy"] == 0
        others = [other.answer for other in samples if other.answer != sample.answer]
        wrong = [score(sample, answer).scores["accuracy"] for answer in others]
        assert wrong and sum(wrong) < len(wrong) / 2
        assert prompt_of(sample)[-1]["role"] == "user"


def test_places_are_scored_by_their_area():
    sample = next(s for n in range(99) if len((s := make_sample("point", 4, index=n)).places[0].places) == 2)
    boxes = re.findall(r"<\|box_start\|>.*?<\|box_end\|>", sample.answer)
    assert score(sample, "".join(boxes[::-1])).scores["accuracy"] == 1  # in any order, without the phrase
    half = score(sample, boxes[0]).scores
    assert (half["accuracy"], half["IoU"]) == (0.5, 0.5)
    everywhere = "".join(f"<|box_start|>({x},0),({x + 9},999)<|box_end|>" for x in range(0, 990, 9))
    assert score(sample, everywhere + sample.answer).scores["accuracy"] == 0  # only as many as there are count


def writer_of(turn: str):
    """Plays what a training sample's turn says: what lies between the results, piece by piece."""
    pieces = re.split(r"\n\*RESULT\*: <image>\n\*RETURN\*", turn)

    def write(messages):
        shown = sum(isinstance(item, dict) and "image" in item for m in messages for item in m["content"])
        return pieces[shown - 1]

    return write


@pytest.mark.parametrize("difficulty", LEVELS)
def test_a_game_is_won_by_the_turns_that_training_samples_hold(difficulty):
    """The agent's loop and the samples are of one form."""
    for index in range(4):
        sample = make_sample("screen", difficulty, index=index, split="held-out")
        won, lost = (
            _played(write, play(difficulty, index=index), difficulty)
            for write in (writer_of(sample.answer), lambda messages: "I would rather not.")
        )
        assert won.scores == {"accuracy": 1.0, "actions": sample.answer.count("*FUNCTION*")}, won
        assert lost.scores == {"accuracy": 0.0, "actions": 0.0}
        corner = lambda messages: '*FUNCTION*: Tap *ARGS*: {"point": (0,0)}'  # noqa: E731
        missed = _played(corner, play(difficulty, index=index), difficulty)
        assert missed.scores["accuracy"] == 0 and missed.scores["actions"] > 1


def test_a_model_is_asked_what_the_sample_asks(folder):
    model, processor = Qwen2VL.from_pretrained(folder, device="cpu"), Processor.from_pretrained(folder)
    seen = []
    skills = ["count", "screen"]
    progress = lambda *a: seen.append(a)  # noqa: E731
    found = evaluate(model, processor, skills=skills, difficulties=[1], count=3, batch_size=2, progress=progress)
    assert seen == [(n, 6) for n in range(1, 7)] and [one.skill for one in found] == ["count"] * 3 + ["screen"] * 3
    sample = make_sample("count", 1, index=2, split="held-out")
    inputs = processor(prompt_of(sample))
    config = GenerationConfig.from_model(model, max_new_tokens=96, do_sample=False)
    (ids,) = generate(model, inputs, config=config).sequences
    assert found[2].answer == processor.decode(ids, skip_special_tokens=False).strip()
    for wrong in ({"count": 0}, {"batch_size": True}, {"skills": ["fly"]}, {"difficulties": [9]}):
        with pytest.raises(
            Qwen2VLError, match=next(iter(wrong)).removesuffix("s").replace("difficultie", "difficulty")
        ):
            evaluate(model, processor, **{"skills": ["count"], "difficulties": [0], **wrong})


def test_reports_average_over_their_classes():
    samples = [make_sample("read", level, index=n, split="held-out") for level in (0, 4) for n in range(6)]
    scored = [score(s, s.answer if n % 2 else "") for n, s in enumerate(samples)]
    found = report(scored)
    assert found["by_skill"]["read"]["samples"] == 12 and found["by_skill"]["read"]["accuracy"] == 0.5
    assert [found["by_difficulty"][f"read {level}"]["samples"] for level in (0, 4)] == [6, 6]
    assert sum(row["samples"] for row in found["by_size"].values()) == 12 and len(found["by_size"]) > 1
    assert {one.language for one in scored} == set(found["by_language"])
    assert size_class(scored[0]) == "1 to 4 tokens"
    # Not the mean of the answers' rates: 1 of 1 and 0 of 4 characters are 1 of 5.
    pair = [replace(scored[0], scores={"accuracy": n, "edits": 1 - n, "characters": 1 + 3 * n}) for n in (0, 1)]
    assert averages(pair, lambda one: "x") == {
        "x": {"samples": 2, "accuracy": 0.5, "edits": 0.5, "characters": 2.5, "CER": 0.2}
    }


def test_the_command(folder, tmp_path):
    run = lambda *args: CliRunner().invoke(app, ["eval", "--model", str(folder), *map(str, args)])  # noqa: E731
    picture, lines = tmp_path / "a.png", tmp_path / "a.jsonl"
    few = ("--skill", "count", "--difficulty", 0, "--quick")
    result = run(*few, "--plot", picture, "--answers", lines)
    assert result.exit_code == 0, result.output
    assert "count" in result.stdout and "accuracy" in result.stdout
    assert Image.open(picture).size[0] > 500 and len(lines.read_text("utf-8").splitlines()) == 4
    result = run(*few, "--json")
    assert json.loads(result.stdout)["by_skill"]["count"]["samples"] == 4
    result = run(*few, *few[:4], "--json")  # asked once
    assert json.loads(result.stdout)["by_skill"]["count"]["samples"] == 4
    few = (*few, "--language", "zh", "--answers", tmp_path / "zh.jsonl")
    assert run(*few).exit_code == 0
    held = [json.loads(line) for line in (tmp_path / "zh.jsonl").read_text("utf-8").splitlines()]
    assert [(one["language"], one["languages"]) for one in held] == [("zh", ["zh"])] * 4
    asked = [make_sample("count", 0, index=n, split="held-out", languages=("zh",)) for n in range(4)]
    assert [one["expected"] for one in held] == [one.answer for one in asked]
    assert run(*few, "--json").exit_code == 0  # all are there, and none is asked again
    result = run(*few, "--language", "en")
    assert result.exit_code == 1 and "is no answer to that sample of this run" in result.stderr
    for wrong, message in (
        (("--skill", "fly"), "'fly' is none of"),
        (("--difficulty", 9), "9 is none of 0, 1"),
        (("--language", "xx"), "'xx' is none of en, zh"),
        (("--quick", "--count", 9), "give one of the two"),
        (("--plot", tmp_path / "a.xyz"), "wants .png or .svg"),
        (("--plot", tmp_path / "none" / "a.png"), "no folder"),
        (("--answers", tmp_path / "none" / "a.jsonl"), "no folder"),
    ):
        result = run(*wrong)
        assert result.exit_code == 2 and message in result.output
