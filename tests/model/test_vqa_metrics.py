"""Scores of benchmarks against other writings of their formulas, on edge cases and 500 random ones each."""

import itertools
import random
from difflib import SequenceMatcher

import pytest

from qwen2vl.errors import Qwen2VLError
from qwen2vl.evaluation.vqa import inclusion, mme, vcr, vqa_accuracy, vqa_text, yes_or_no


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("The Cat.", "cat"), ("a an the", ""), ("None", "0"), ("ten dogs", "10 dogs"), ("1,000", "1000"),
        ("3.5", "3.5"), ("end.", "end"), ("dont", "don't"), ("couldntve", "couldntve"), ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"), ("ows'at", "ows'at"), ("'ows'at", "'ow's'at"), ("somebody'd", "somebodyd"),
        ("dog's", "dog 's"), ("it's", "it 's"), ("x/y", "x y"), ("x / y", "x y"), ("semi; colon", "semi colon"),
        ("well-known", "well known"), ("what?", "what"), ("line\nend\t!", "line end"), ("Straße", "straße"),
        ("." * 40, "." * 8), ("", ""), ("itdve", "itdve"), ("it'dve", "it'd've"), ("twas", "'twas"),
    ],
)  # fmt: skip
def test_vqa_texts_are_the_servers(text, wanted):
    """By hand from the server's rules, its 32 periods among them."""
    assert vqa_text(text) == wanted


def test_vqa_accuracy_is_the_mean_over_people_left_out():
    rng, words = random.Random(0), ("yes", "no", "a cat", "Cat", "two", "2", "")
    for _ in range(500):
        people = [rng.choice(words) for _ in range(rng.randint(2, 10))]
        answer = rng.choice(words)
        shares = []
        for others in itertools.combinations(people, len(people) - 1):
            shares.append(min(3, [vqa_text(other) for other in others].count(vqa_text(answer))) / 3)
        assert vqa_accuracy(answer, people) == pytest.approx(sum(shares) / len(shares))
    assert vqa_accuracy("2", ["two"] * 3 + ["x"] * 7) == pytest.approx(0.9)
    for wrong in ("yes", ["yes"], None, ["yes", None]):
        with pytest.raises(Qwen2VLError, match="references"):
            vqa_accuracy("yes", wrong)  # pyright: ignore[reportArgumentType]


def test_inclusion():
    for answer, reference, formula, wanted in (
        ("It says STOP here", "stop", False, 1), ("sto p", "stop", False, 0), ("a\nb", "A B", False, 1),
        (r"\\frac { a } b", r"\\frac{a}b", True, 1), ("X", "x", True, 0), ("X", "x", False, 1), ("", "x", False, 0),
    ):  # fmt: skip
        assert inclusion(answer, ["never", reference], formula=formula) == wanted, (answer, reference)
    with pytest.raises(Qwen2VLError, match="answer: wants a text, got None"):
        inclusion(None, ["x"])  # pyright: ignore[reportArgumentType]


def test_vcr_takes_the_nearest_words():
    rng, words = random.Random(0), ("the", "red", "cat", "sat", "on", "mat", "cats", "reds")
    for _ in range(500):
        hidden = [rng.choice(words) for _ in range(rng.randint(1, 4))]
        said = [rng.choice(words) for _ in range(rng.randint(0, 9))]
        runs = [said[n : n + len(hidden)] for n in range(len(said)) if n + len(hidden) <= len(said)]
        runs = [run for run in runs if any(word in hidden for word in run)]
        best = max(runs, key=lambda r: SequenceMatcher(None, " ".join(r), " ".join(hidden)).ratio(), default=[])
        got = vcr(" ".join(said), " ".join(hidden), tokenize=str.split)
        union = {*best, *hidden}
        shared = [word for word in union if word in best and word in hidden]
        assert (got.exact_match, got.text) == (float(best == hidden), " ".join(best))
        assert got.jaccard == pytest.approx(len(shared) / len(union))
    assert vcr("I cannot read the cat", "the cat", tokenize=str.split).exact_match == 0
    assert vcr("看猫在", "猫在", tokenize=list, separator="").exact_match == 1
    with pytest.raises(Qwen2VLError, match="hidden: wants a text with words"):
        vcr("x", " ", tokenize=str.split)


def test_mme_adds_accuracy_and_accuracy_plus():
    for answer, wanted in (
        ("Yes.", "yes"), ("no", "no"), ("Y", "yes"), ("n", "no"), ("x", None), ("", None), ("Yes, it is", "yes"),
        ("The answer is yes", None), (" Not", "no"), ("maybe", None),
    ):  # fmt: skip
        assert yes_or_no(answer) == wanted, answer
    rng = random.Random(0)
    for _ in range(500):
        pictures, rows = rng.randint(1, 9), []
        for n in range(pictures):
            rows += [("OCR", str(n), rng.choice(("Yes", "no", "hm")), reference) for reference in ("Yes", "No")]
        right = [row[2].lower() == row[3].lower() for row in rows]
        plus = sum(right[2 * n] and right[2 * n + 1] for n in range(pictures)) / pictures
        assert mme(rows)["OCR"] == pytest.approx(100 * sum(right) / len(rows) + 100 * plus)
    assert mme([("a", "1", "Yes", "Yes"), ("a", "1", "no", "No"), ("b", "1", "no", "Yes"), ("b", "1", "no", "No")]) == {
        "a": 200,
        "b": 50,
    }
    with pytest.raises(Qwen2VLError, match="wants two questions"):
        mme([("a", "1", "Yes", "Yes")])
    with pytest.raises(Qwen2VLError, match="reference: wants Yes or No"):
        mme([("a", "1", "Yes", "maybe")])
