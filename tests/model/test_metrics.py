"""Metrics against hand-made cases, a recursive distance and areas counted by pixels."""

import functools
import math
import random
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2vl.agents.grounding import Box
from qwen2vl.errors import Qwen2VLError
from qwen2vl.evaluation.metrics import (
    anls,
    character_edits,
    character_error_rate,
    edit_distance,
    exact_match,
    iou,
    lenient_relaxed_accuracy,
    match_boxes,
    recall,
    refcoco_accuracy,
    relaxed_accuracy,
)

short = st.text("abé中", max_size=6)
boxes = st.builds(
    lambda x, y, w, h: Box(x, y, x + w, y + h),
    st.integers(0, 12), st.integers(0, 12), st.integers(0, 9), st.integers(0, 9),
)  # fmt: skip


@settings(deadline=None)
@given(short, short)
def test_edit_distance_is_its_recursion(a, b):
    @functools.cache
    def distance(i, j):
        if not i or not j:
            return i or j
        return min(distance(i - 1, j) + 1, distance(i, j - 1) + 1, distance(i - 1, j - 1) + (a[i - 1] != b[j - 1]))

    assert edit_distance(a, b) == edit_distance(b, a) == distance(len(a), len(b))


def test_exact_match():
    assert exact_match(" The  Cat. ", ["dog", "the cat"]) == 1
    assert exact_match("红色。", ["红色"]) == exact_match("ＡＢＣ", ["abc"]) == 1
    assert exact_match("4?!", ["4"]) == exact_match("?", ["?"]) == 1
    for answer, reference in ((".5", "5"), ("?", "!"), ("", "."), ("...no", "no")):
        assert exact_match(answer, [reference]) == 0
    assert exact_match("the cats", ["the cat"]) == exact_match("3.5", ["35"]) == 0
    for wrong in ("the cat", []):
        with pytest.raises(Qwen2VLError, match="references: wants a list"):
            exact_match("the cat", wrong)


@pytest.mark.parametrize("wrong", [None, 5, 0.5, b"5", ["5"]])
def test_what_is_no_text_is_named(wrong):
    """None and numbers come out of tables of answers; none is a crash of another kind, and none is a score."""
    for score in (exact_match, anls, relaxed_accuracy):
        with pytest.raises(Qwen2VLError, match="answer: wants a text, got"):
            score(wrong, ["5"])
        with pytest.raises(Qwen2VLError, match=r"references\[1\]: wants a text, got"):
            score("5", ["5", wrong])
    for score in (exact_match, anls, relaxed_accuracy):
        for references in (None, 5, "5", []):
            with pytest.raises(Qwen2VLError, match="references: wants a list of at least one text, got"):
                score("5", references)  # pyright: ignore[reportArgumentType]
    for score in (character_error_rate, character_edits):
        with pytest.raises(Qwen2VLError, match="answer: wants a text"):
            score(wrong, "5")
        with pytest.raises(Qwen2VLError, match="reference: wants a text"):
            score("5", wrong)
    with pytest.raises(Qwen2VLError, match="b: wants a text"):
        edit_distance("5", wrong)


@pytest.mark.parametrize("wrong", [None, 5, "1234", (1, 2, 3), (1, 2, 3, None), (5, 0, 4, 9), (0, 0, 1, float("nan"))])
def test_what_is_no_box_is_named(wrong):
    good = (0.0, 0.0, 2.5, 1.5)
    for call in (lambda: iou(wrong, good), lambda: iou(good, wrong), lambda: recall([wrong], [good])):
        with pytest.raises(Qwen2VLError, match=r"(a|b|found\[0\])(\[3\])?: wants a (Box|finite number)"):
            call()
    for threshold in (None, "0.5", float("nan"), -1):
        with pytest.raises(Qwen2VLError, match="threshold: wants a finite number"):
            recall([good], [good], threshold=threshold)  # pyright: ignore[reportArgumentType]


def test_character_error_rate():
    assert character_error_rate("kitten", "sitting") == pytest.approx(3 / 7)
    assert character_error_rate("", "abc") == 1 and character_error_rate("abcabc", "abc") == 1
    assert character_error_rate("abcabcabc", "abc") == 2 and character_error_rate("ABC", "abc") == 1
    assert character_error_rate("e\u0301", "é") == 0
    assert (character_error_rate("", ""), character_error_rate("x", " ")) == (0, 1)
    assert character_edits("abcx ", "abc") == (1, 3)


def test_anls_is_that_of_the_benchmark():
    """Values worked out by hand: similarity of the best reference, zero below one half; the paper has zero at it, too,
    and the script that ranks answers has not."""
    assert anls("Paris", ["paris", "Lyon"]) == 1
    assert anls("Pariz", ["Paris"]) == pytest.approx(0.8)
    assert anls("ab", ["abcd"]) == 0.5 and anls("a", ["abcd"]) == 0
    assert anls("10  march", ["10 March"]) == 1 and anls("", [""]) == 1
    assert anls("a", ["abcd"], threshold=0.0) == 0.25
    # Lower case, and nothing that goes beyond it.
    assert anls("Straße 5", ["STRASSE 5"]) == pytest.approx(7 / 9) and anls("ﬁ", ["fi"]) == 0
    # The length is that of the text with all its blanks.
    assert anls("a  bd", ["a bc"]) == pytest.approx(4 / 5) and anls("abd", ["abc      "]) == pytest.approx(8 / 9)


def other_anls(answer, references, threshold):
    """By a table of distances from back to front, each reference by itself."""
    scores = [0.0]
    for reference in references:
        a, b = (" ".join(text.strip().lower().split()) for text in (answer, reference))
        table = {(i, j): len(a) - i + len(b) - j for i in range(len(a) + 1) for j in range(len(b) + 1)}
        for i in reversed(range(len(a))):
            for j in reversed(range(len(b))):
                steps = (table[i + 1, j] + 1, table[i, j + 1] + 1, table[i + 1, j + 1] + (a[i] != b[j]))
                table[i, j] = min(steps)
        longer = max(len(answer.upper()), len(reference.upper()))
        distance = table[0, 0] / longer if longer else 0.0
        scores.append(1 - distance if 1 - distance >= threshold else 0.0)
    return max(scores)


def test_anls_is_the_formula():
    rng, seen = random.Random(3), []
    for _ in range(600):
        references = ["".join(rng.choices("aAbß \nİ1", k=rng.randint(0, 9))) for _ in range(rng.randint(1, 3))]
        near = [rng.choice((c, c, c, c.upper(), "x", "", " ")) for c in rng.choice(references)]
        answer, threshold = "".join(near), rng.choice((0.5, 0.5, 0.0, 0.8))
        got = anls(answer, references, threshold=threshold)
        assert got == pytest.approx(other_anls(answer, references, threshold)), (answer, references)
        seen.append(got)
    assert seen.count(0) > 50 and seen.count(1) > 50 and sum(0 < one < 1 for one in seen) > 200


NUMBERS = (
    *(
        "0",
        "00",
        "0.0",
        "-0",
        "0%",
        "%",
        "",
        " ",
        "1",
        "1.0",
        "100",
        "95",
        "105",
        "106",
        "94.9",
        "-100",
        "1,000",
        "1000",
    ),
    *("1 000", "1_000", "1e3", "1E-2", "$3", "3", "3 ", " 3", "3.", ".5", "50%", "50 %", "0.5", "5%%", "105%"),
    *("nan", "NaN", "inf", "-inf", "Infinity", "1e999", "٣", "½", "Yes", "yes", "Yes.", "YES", "no", "twelve"),
    *("12 million", "Straße", "STRASSE", "İ", "i̇", "3\n", "+3", "--3", "0x10", "2019-20", "(5)", "€4", "4€"),
)


def published_relaxed(answer, reference):
    """Section 5.1 of the paper, written anew, in exact arithmetic on what `float` reads."""

    def number(text):
        stripped = text.rstrip("%")
        try:
            return float(stripped) / (100 if stripped != text else 1)
        except ValueError:
            return None

    a, b = number(answer), number(reference)
    if a is None or b is None or b == 0:
        return float(answer.lower() == reference.lower())
    if not math.isfinite(a) or not math.isfinite(b):
        return 0.0
    return float(abs(Fraction(a) - Fraction(b)) * 20 <= abs(Fraction(b)))


def test_relaxed_accuracy_is_the_published_function():
    """On all pairs of edge cases, and on 500 random pairs of numbers as charts have them."""
    rng = random.Random(0)
    pairs = [(a, b) for a in NUMBERS for b in NUMBERS]
    for _ in range(500):
        value = rng.choice((rng.uniform(-1e4, 1e4), rng.randint(-200, 3000), rng.random()))
        near = value * rng.uniform(0.9, 1.1)
        pairs.append((rng.choice(("{:.2f}", "{:.0f}", "{:,.1f}", "{:.3e}", "{:.1f}%")).format(near), f"{value:.2f}"))
    assert len(pairs) > 3000
    for answer, reference in pairs:
        assert relaxed_accuracy(answer, [reference]) == published_relaxed(answer, reference), (answer, reference)
    for answer, reference in (("1,000", "1000"), ("$3", "3"), ("Yes.", "Yes"), ("0", "0.0")):
        assert relaxed_accuracy(answer, [reference]) == 0 and relaxed_accuracy(answer, ["x", answer.upper()]) == 1
    assert relaxed_accuracy("1e3", ["1000"]) == 1


def test_lenient_relaxed_accuracy():
    for answer, reference, value in (
        ("105", "100", 1), ("95", "100", 1), ("106", "100", 0), ("94.9", "100", 0), ("-100", "100", 0),
        ("12,000", "12000", 1), ("50%", "0.5", 1), ("50", "0.5", 0), ("$3", "3", 1), ("0", "0", 1), ("0.01", "0", 0),
        ("Spain", "spain", 1), ("Spain", "France", 0), ("12", "twelve", 0), (".5", "0.5", 1), ("1,2", "12", 0),
    ):  # fmt: skip
        assert lenient_relaxed_accuracy(answer, [reference]) == value, (answer, reference)
    assert lenient_relaxed_accuracy("7", ["Seven", "7.1"]) == 1


@settings(deadline=None)
@given(boxes, boxes)
def test_iou_is_the_share_of_pixels(a, b):
    cover = [{(x, y) for x in range(c.x1, c.x2) for y in range(c.y1, c.y2)} for c in (a, b)]
    either = cover[0] | cover[1]
    expected = 1.0 if a == b else len(cover[0] & cover[1]) / len(either) if either else 0.0
    assert iou(a, b) == iou(b, a) == pytest.approx(expected)


@settings(deadline=None)
@given(st.lists(boxes, max_size=4), st.lists(boxes, min_size=1, max_size=4))
def test_matching_uses_each_box_once_and_takes_the_best_pair(found, wanted):
    got = match_boxes(found, wanted)
    best = max((iou(f, w) for f in found for w in wanted), default=0.0)
    assert len(got) == len(wanted) and max(got) == best
    assert sum(value > 0 for value in got) <= len(found)
    assert recall(found, wanted) == sum(value >= 0.5 for value in got) / len(wanted)


def test_refcoco_is_decided_in_pixels():
    """As if by areas of pixels: 2,000 boxes around the threshold, whose annotations are no thousandths."""
    rng, flips = random.Random(1), 0
    for _ in range(2000):
        width, height = rng.randint(300, 640), rng.randint(300, 640)
        x, y = rng.uniform(0, width * 0.6), rng.uniform(0, height * 0.6)
        w, h = rng.uniform(8, width * 0.3), rng.uniform(8, height * 0.3)
        wanted = (x, y, x + w, y + h)
        shift = rng.uniform(0.25, 0.42) * w
        found = Box.from_pixels(x + shift, y, x + w + shift, y + h, width=width, height=height)
        fx1, fy1, fx2, fy2 = (
            found.x1 * width / 1000,
            found.y1 * height / 1000,
            found.x2 * width / 1000,
            found.y2 * height / 1000,
        )
        over = max(0.0, min(fx2, x + w) - max(fx1, x)) * max(0.0, min(fy2, y + h) - max(fy1, y))
        share = over / ((fx2 - fx1) * (fy2 - fy1) + w * h - over)
        assert refcoco_accuracy(found, wanted, width=width, height=height) == float(share >= 0.5)
        flips += (iou(found, Box.from_pixels(*wanted, width=width, height=height)) >= 0.5) != (share >= 0.5)
    assert flips > 5  # boxes that rounding decides are among them
    assert refcoco_accuracy(None, (0.0, 0.0, 1.5, 1.5), width=10, height=10) == 0
    with pytest.raises(Qwen2VLError, match="found: wants a Box or None"):
        refcoco_accuracy((1, 2, 3, 4), (0, 0, 1, 1), width=10, height=10)  # pyright: ignore[reportArgumentType]
    with pytest.raises(Qwen2VLError, match="width"):
        refcoco_accuracy(Box(0, 0, 1, 1), (0, 0, 1, 1), width=0, height=10)


def test_recall_counts_a_box_for_one_object_only():
    one, two = Box(0, 0, 100, 100), Box(10, 0, 110, 100)
    assert recall([one], [one, two]) == 0.5 and recall([one, two], [one, two]) == 1
    assert recall([], [one]) == 0
    assert recall([Box(50, 0, 150, 100)], [one]) == 0 and recall([Box(0, 0, 100, 50)], [one]) == 1  # IoU 1/3 and 1/2
    with pytest.raises(Qwen2VLError, match="at least one box"):
        recall([one], [])
