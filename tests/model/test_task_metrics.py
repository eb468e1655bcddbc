"""`qwen2vl eval`: files of questions scored by every metric, and answers that are gone on with after a kill."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from qwen2vl.agents.answers import locate
from qwen2vl.agents.function_calls import Call, render_call
from qwen2vl.cli import lines
from qwen2vl.cli.common import describe_places
from qwen2vl.errors import Qwen2VLError
from qwen2vl.evaluation import tasks
from qwen2vl.evaluation.tasks import METRICS, check_row, metric_keys, score_answers
from qwen2vl.samples import held_out

TWO = {"A": "a cat", "B": "a dog"}
STEP = {"result_touch_yx": [0.5, 0.5], "ui_positions": [], "width": 100, "height": 200}
BOX = [{"label": None, "points": [[100, 100], [500, 500]], "pixels": None, "media": None}]
#: (lines and their answers, what they score by hand), by metric.
BY_HAND = {
    "exact_match": ([({"answer": "cat"}, "Cat."), ({"answers": ["a", "b"]}, "c")], {"accuracy": 0.5}),
    "anls": ([({"answers": ["ab", "abcd"]}, "abcx"), ({"answer": "x"}, "x")], {"ANLS": 0.875}),
    "relaxed_accuracy": ([({"answer": "100"}, "104"), ({"answer": "1,000"}, "1000")], {"accuracy": 0.5}),
    "lenient_relaxed_accuracy": ([({"answer": "1,000"}, "1000")], {"accuracy": 1}),
    "character_error_rate": ([({"answer": "abcd"}, "abc"), ({"answer": "x"}, "")], {"character error rate": 0.4}),
    "vqa_accuracy": ([({"answers": ["two"] * 3 + ["x"] * 7}, "2")], {"accuracy": 0.9}),
    "inclusion": ([({"answer": "X"}, "an x"), ({"answer": "X", "formula": True}, "an x")], {"accuracy": 0.5}),
    "mmbench": (
        [
            ({"options": TWO, "answer": "A", "group": 1}, "(A)"),
            ({"options": TWO, "answer": "B", "group": 1}, "neither"),
            ({"options": ["x", "y"], "answer": "B", "group": 2}, "The answer is B"),
            ({"options": TWO, "answer": "A"}, "a cat"),
        ],
        {"accuracy": 2 / 3, "answered": 0.75},  # a question is right in all rotations of its options
    ),
    "mmmu": (
        [({"options": TWO, "answer": "B"}, "(B)"), ({"answers": ["5", "6"]}, "so 5"), ({"answer": "7"}, "8")],
        {"accuracy": 2 / 3, "answered": 1},
    ),
    "video_mme": (
        [({"answer": "C"}, "C."), ({"answer": "D"}, "A"), ({"answer": "A"}, "none")],
        {"accuracy": 0.5, "answered": 2 / 3},
    ),
    "mvbench": ([({"answer": "(A) a cat"}, "(A) a cat"), ({"answer": "(B) a dog"}, "")], {"accuracy": 0.5}),
    "mme": (
        [
            ({"answer": "Yes", "group": "1", "category": "OCR"}, "Yes"),
            ({"answer": "No", "group": "1", "category": "OCR"}, "no."),
            ({"answer": "Yes", "group": "1", "category": "count"}, "yes"),
            ({"answer": "No", "group": "1", "category": "count"}, "Yes"),
        ],
        {"score": 250},
    ),
    "vcr": (
        [({"answers": ["red cat", "mat"]}, "a red cat sat"), ({"answer": "sat", "language": "en"}, "sat")],
        {"exact match": 2 / 3, "Jaccard index": 2 / 3},
    ),
    "refcoco": (
        [
            ({"answer": [1.5, 1.0, 5.0, 5.0], "width": 10, "height": 10}, {"text": "", "boxes": BOX}),
            ({"answer": [6.0, 6.0, 9.5, 9.0], "width": 10, "height": 10}, {"text": "", "boxes": BOX}),
            ({"answer": [1, 1, 5, 5], "width": 10, "height": 10}, "none"),
        ],
        {"accuracy": 1 / 3},
    ),
    "function_calls": (
        [
            ({"answer": [{"name": "go", "arguments": {"x": 1}}]}, render_call(Call("go", {"x": 1.0}))),
            ({"answer": [{"name": "go", "arguments": {}}]}, render_call(Call("go", {"x": 1}))),
            ({"answer": [], "style": "paper"}, render_call(Call("go", {}), "paper")),
        ],
        {"type match": 2 / 3, "exact match": 1 / 3},
    ),
    "aitz": (
        [
            ({"coat_action_desc": "click it", **STEP}, '*FUNCTION*: Tap *ARGS*: {"point": (510,500)}'),
            ({"coat_action_desc": "scroll up", **STEP}, '*FUNCTION*: scroll *ARGS*: {"direction": "down"}'),
        ],
        {"type match": 1, "exact match": 0.5},
    ),
}


@pytest.fixture(autouse=True)
def words(monkeypatch):
    """spaCy by a stand-in: its words are those between blanks."""
    nlp = lambda text: [SimpleNamespace(text=word) for word in text.split()]  # noqa: E731
    monkeypatch.setitem(sys.modules, "spacy", SimpleNamespace(load=lambda name: nlp))
    monkeypatch.setattr(tasks, "_PIPELINES", {})


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_scores_a_file(metric):
    pairs, wanted = BY_HAND[metric]
    rows = [row for row, _ in pairs]
    answers = [answer if isinstance(answer, dict) else {"text": answer} for _, answer in pairs]
    for row in rows:
        check_row(metric, row)
        assert row.keys() <= set(metric_keys(metric))
    found = score_answers(metric, rows, answers)
    assert found["scores"] == pytest.approx(wanted) and len(found["each"]) == len(rows)
    assert ("by_category" in found) == (metric == "mme")


def test_scores_by_category_and_of_what_was_not_answered():
    rows = [{"answer": "1", "category": name} for name in "aab"]
    found = score_answers("exact_match", rows, [{"text": "1"}, {"error": "no picture"}, {"text": "1"}])
    assert found["scores"] == {"accuracy": pytest.approx(2 / 3)} and [one["accuracy"] for one in found["each"]] == [
        1,
        0,
        1,
    ]
    assert found["by_category"] == {"a": {"questions": 2, "accuracy": 0.5}, "b": {"questions": 1, "accuracy": 1}}
    mme = BY_HAND["mme"][0]
    found = score_answers("mme", [row for row, _ in mme], [{"text": text} for _, text in mme])
    assert found["by_category"] == {"OCR": {"questions": 2, "score": 200}, "count": {"questions": 2, "score": 50}}


def test_boxes_are_scored_as_a_file_of_answers_has_them():
    """A quadrilateral is none, and the first box counts."""
    text = "<|quad_start|>(0,0),(9,0),(9,9),(0,9)<|quad_end|><|box_start|>(100,100),(500,500)<|box_end|>"
    written = json.loads(json.dumps({"text": "", "boxes": describe_places(locate(text, []))}))
    row = {"answer": [1.5, 1.0, 5.0, 5.0], "width": 10, "height": 10}
    assert score_answers("refcoco", [row], [written])["scores"] == {"accuracy": 1}


def test_mmmu_draws_what_its_script_draws():
    """Its generator is seeded with 42, and answers that choose nothing draw in the order of the file."""
    import random

    rows = [{"options": TWO, "answer": "A"}] * 40
    texts = ["?", "(A)", "(B)", "hm"] * 10
    found = score_answers("mmmu", rows, [{"text": text} for text in texts])
    chance = random.Random(42)
    right = [text == "(A)" if text.startswith("(") else chance.choice("AB") == "A" for text in texts]
    assert [one["accuracy"] for one in found["each"]] == right and found["scores"]["answered"] == 0.5


@pytest.mark.parametrize(
    ("metric", "row", "message"),
    [
        ("exact_match", {}, "answer: wants one of answer and answers"),
        ("anls", {"answer": 5}, "answer: wants a text"),
        ("anls", {"answers": []}, "answers: wants a list of at least one text"),
        ("exact_match", {"answer": "x", "category": 3}, "category: wants a text"),
        ("vqa_accuracy", {"answer": "x"}, "references: wants a list of at least 2 texts"),
        ("mmbench", {"options": TWO, "answer": "C"}, "answer: wants one of A, B"),
        ("mmbench", {"answer": "A"}, "options: wants 2 to 26"),
        ("mmmu", {"options": TWO, "answer": ["A"]}, "answer: wants a text"),
        ("video_mme", {"answer": "E"}, "answer: wants one of A, B, C, D"),
        ("mvbench", {"answer": "A"}, "wants an option and its text"),
        ("mme", {"answer": "maybe", "group": "1"}, "answer: wants Yes or No"),
        ("mme", {"answer": "Yes"}, "group: wants a text"),
        ("inclusion", {"answer": "x", "formula": 1}, "formula: wants true or false"),
        ("vcr", {"answer": "x", "language": "de"}, "language: wants en or zh"),
        ("refcoco", {"answer": [5, 0, 1, 1], "width": 9, "height": 9}, "answer: wants a Box or"),
        ("refcoco", {"answer": [0, 0, 1, 1], "width": 9}, "height: wants a finite number"),
        ("function_calls", {"answer": "go"}, "answer: wants a list of calls"),
        ("function_calls", {"answer": [], "style": "odd"}, "style: wants qwen or paper"),
        ("aitz", {"coat_action_desc": "wave", **STEP}, "coat_action_desc"),
        ("bleu", {}, "metric: wants one of exact_match"),
    ],
)
def test_a_line_that_cannot_be_scored_is_named(metric, row, message):
    with pytest.raises(Qwen2VLError, match=message):
        check_row(metric, row)


def test_vcr_says_that_spacy_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(Qwen2VLError, match="vcr: needs spaCy and its model zh_core_web_sm"):
        check_row("vcr", {"answer": "猫", "language": "zh"})


# --------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def task(tmp_path):
    """A folder with pictures and questions, whose paths begin there."""
    folder = tmp_path / "set"
    folder.mkdir()
    Image.new("RGB", (56, 56), "red").save(folder / "red.png")
    rows = [
        {"image": "red.png", "prompt": f"Which colour, {n}?", "answer": "red", "category": "ab"[n % 2], "id": n}
        for n in range(6)
    ]
    (folder / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "task.jsonl"


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


ASKED = ("--model", "model", "-n", 3, "--json")


def test_a_file_is_asked_scored_and_gone_on_with(run, task, tmp_path, monkeypatch):
    out, seen = tmp_path / "answers.jsonl", []
    whole = lines.generate_all

    def counted(model, processor, conversations, **more):
        seen.append(more["first"])
        return whole(model, processor, conversations, **more)

    monkeypatch.setattr(lines, "generate_all", counted)
    result = run("eval", "--task", task, "--metric", "anls", *ASKED, "--answers", out)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["questions"], report["errors"], report["metric"]) == (6, 0, "anls")
    held = read(out)
    assert [line["id"] for line in held] == list(range(6)) and all("text" in line for line in held)
    # A kill left two answers and a part of the third: four are asked, and they are the same.
    text = out.read_text()
    out.write_text(text[: len("".join(line + "\n" for line in text.splitlines()[:2])) + 9])
    again = run("eval", "--task", task, "--metric", "anls", *ASKED, "--answers", out)
    assert json.loads(again.stdout) == report and read(out) == held
    # The same answers by another metric: nothing is asked; and what they say is what is scored.
    out.write_text("".join(json.dumps({**line, "text": "red" if line["index"] < 3 else "x"}) + "\n" for line in held))
    report = json.loads(run("eval", "--task", task, "--metric", "exact_match", *ASKED, "--answers", out).stdout)
    assert report["scores"] == {"accuracy": 0.5} and seen == [0, 2, 6]
    assert [report["by_category"][name]["accuracy"] for name in "ab"] == pytest.approx([2 / 3, 1 / 3])
    table = run("eval", "--task", task, "--metric", "exact_match", "--model", "model", "-n", 3, "--answers", out)
    assert "0.6667" in table.stdout and "accuracy" in table.stdout and table.exit_code == 0


def test_a_question_that_fails_is_counted(run, task, tmp_path):
    task.write_text(task.read_text() + json.dumps({"image": "gone.png", "prompt": "?", "answer": "red"}) + "\n")
    result = run("eval", "--task", task, "--metric", "exact_match", *ASKED)
    report = json.loads(result.stdout)
    assert result.exit_code == 1 and (report["errors"], report["questions"]) == (1, 7)
    assert "1 of 7 questions have an error" in result.stderr


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"prompt": "?"}, "task.jsonl:7: answer: wants one of"),
        ({"prompt": "?", "answer": "x", "imges": ["red.png"]}, "task.jsonl:7: wants messages, prompt"),
        ({"answer": "x"}, "task.jsonl:7: wants messages or a prompt"),
        ([{"role": "user", "content": "?"}], "task.jsonl:7: answer: wants one of"),
    ],
)
def test_a_bad_line_is_told_before_the_first_answer(run, task, tmp_path, line, message):
    task.write_text(task.read_text() + json.dumps(line) + "\n")
    out = tmp_path / "answers.jsonl"
    result = run("eval", "--task", task, "--metric", "exact_match", *ASKED, "--answers", out)
    assert result.exit_code == 1 and message in result.stderr and not out.exists()


def test_pairs_that_are_missing_are_told_before_the_first_answer(run, task, tmp_path):
    task.write_text(json.dumps({"prompt": "?", "answer": "Yes", "group": "1"}) + "\n")
    out = tmp_path / "answers.jsonl"
    result = run("eval", "--task", task, "--metric", "mme", *ASKED, "--answers", out)
    assert result.exit_code == 1 and "wants two questions of '1'" in result.stderr and not out.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--metric", "anls"), "wants --task"),
        (("--batch-tokens", 9), "wants --task"),
        (("--task", "TASK"), "wants one of exact_match"),
        (("--task", "TASK", "--metric", "bleu"), "got 'bleu'"),
        (("--task", "TASK", "--metric", "anls", "--skill", "read"), "does not go with --task"),
        (("--task", "TASK", "--metric", "anls", "--quick"), "does not go with --task"),
        (("--task", "TASK", "--metric", "anls", "--seed", 0), "does not go with --task"),
        (("--task", "TASK", "--metric", "anls", "--answers", "TASK"), "is the file of the questions"),
    ],
)
def test_options_that_do_not_go_together(run, task, options, message):
    result = run("eval", *(task if option == "TASK" else option for option in options))
    assert result.exit_code == 2 and message in " ".join(result.stderr.replace("│", " ").split())


def test_answers_to_generated_samples_are_gone_on_with(run, tmp_path, monkeypatch):
    asked = (
        "eval",
        "--model",
        "model",
        "--skill",
        "count",
        "--skill",
        "screen",
        "--difficulty",
        1,
        "--count",
        3,
        "--json",
    )
    out, seen = tmp_path / "answers.jsonl", []
    score, played = held_out.score, held_out._played
    monkeypatch.setattr(held_out, "score", lambda *a: seen.append("count") or score(*a))
    monkeypatch.setattr(held_out, "_played", lambda *a: seen.append("screen") or played(*a))
    whole = run(*asked, "--answers", out)
    assert whole.exit_code == 0, whole.output
    text = out.read_text()
    held = read(out)
    assert [(line["skill"], line["index"], line["seed"]) for line in held] == [
        (skill, n, 0) for skill in ("count", "screen") for n in range(3)
    ]
    for kept, wanted in ((2, ["count"] + ["screen"] * 3), (4, ["screen"] * 2), (6, [])):
        seen.clear()
        part = "".join(line + "\n" for line in text.splitlines()[:kept])
        out.write_text(part + ('{"skill": "cou' if kept < 6 else ""))
        again = run(*asked, "--answers", out, "--batch-size", 2)
        assert again.exit_code == 0 and json.loads(again.stdout) == json.loads(whole.stdout)
        assert seen == wanted and out.read_text() == text
    for other in (("--seed", 1), ("--count", 2), ("--difficulty", 2)):
        result = run(*asked, *other, "--answers", out)
        assert result.exit_code == 1 and "is no answer to that sample of this run" in result.stderr
        assert out.read_text() == text
    for wrong in ("[]\n", "{}\n", '"x"\n', "{broken\n"):
        out.write_text(wrong)
        assert "line 1 is no answer" in run(*asked, "--answers", out).stderr and out.read_text() == wrong


def test_the_page_on_evaluation_has_every_metric_with_its_keys():
    page = Path(__file__).parents[2] / "docs" / "evaluation.md"
    rows = re.findall(r"^\| `(\w+)` \| [^|]* \| ([^|]*)\|$", page.read_text(encoding="utf-8"), re.MULTILINE)
    told = {name: set(re.findall(r"`(\w+)`", keys)) for name, keys in rows}
    assert told == {name: set(metric.keys) for name, metric in METRICS.items()}
