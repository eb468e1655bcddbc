"""What answers choose, against other writings of the published rules, on edge cases and 500 random answers each."""

import random
import re
from typing import Any

import pytest

from qwen2vl.errors import Qwen2VLError
from qwen2vl.evaluation.choices import mmbench_choice, mmmu_choice, mmmu_open, mvbench_accuracy, video_mme_choice

OPTIONS = {"A": "a red Cat", "B": "dog", "C": "3 cm", "D": "red"}
PIECES = (
    "A", "B", "C", "D", "E", "Z", "(A)", "(B)", "(D)", "B.", "C:", "[D]", "a", "b", "the", "The answer is", "Answer:",
    "dog", "Red", "a red cat", "3 CM", "cm", "Because", "None", "\n", ",", "!", "It's", "so", "'", ".", "**A**",
    "I can't process this file.", "Cannot determine the answer", "Abel", "CD", "BMW", "option", "picture shows",
    "A and B", "A red",
)  # fmt: skip


def answers(seed):
    rng = random.Random(seed)
    lines = [rng.choice(("", " ")).join(rng.choices(PIECES, k=rng.randint(1, 9))) for _ in range(500)]
    return ["", " ", *PIECES, "The answer is A", "A cat, so B", "Answer: (C) dog", "it is a dog", *lines]


def other_mmbench(answer, options):
    """By pattern: what stands between blanks and the marks that count as blanks."""
    if re.search(r"I can't process this file\.|Cannot determine the answer", answer):
        return None
    edge = r"[\s.()\[\],:;!*#{}]"
    alone = [c for c in "ABCDEZ" if re.search(rf"(?<!\S){c}(?!\S)", re.sub(edge, " ", answer))]
    named = [c for c in alone if c in options]
    if len(named) == 1:
        return named[0]
    if not named and "Z" in alone:
        return None
    texts = {c for c in options if answer.casefold().count(options[c].casefold())}
    return texts.pop() if len(texts) == 1 else None


def test_mmbench_takes_the_one_letter_or_the_one_text():
    taken = [mmbench_choice(answer, OPTIONS) for answer in answers(0)]
    assert taken == [other_mmbench(answer, OPTIONS) for answer in answers(0)]
    assert {None, *"ABCD"} == set(taken)
    for answer, wanted in (
        ("(A)", "A"), ("The answer is A", "A"), ("B. dog", "B"), ("**C**", "C"), ("It is a dog.", "B"), ("A dog", "A"),
        ("A or B", None), ("A, B: dog", "B"), ("Z", None), ("Z dog", None), ("a red cat", None), ("", None),
    ):  # fmt: skip
        assert mmbench_choice(answer, OPTIONS) == wanted, answer


def other_mmmu(answer, options):
    """By position: every mention with its place, the last of the first kind that has any."""
    for mark in (",", ".", "!", "?", ";", ":", "'"):
        answer = re.sub(rf"^{re.escape(mark)}+|{re.escape(mark)}+$", "", answer) if answer.strip(mark) else ""
    text = f" {answer} "
    kinds = [rf"\(({'|'.join(options)})\)", rf"(?<= )({'|'.join(options)})(?= )"]
    for kind in kinds:
        if said := re.findall(kind, text):
            return said[-1]
    places = []
    if len(text.split()) > 5:
        for letter, name in options.items():
            found = re.finditer(f"(?={re.escape(name.lower())})", text.lower())
            places += [(match.start(), -ord(letter), letter) for match in found]
    return max(places)[2] if places else None


def test_mmmu_takes_the_last_mention_or_draws():
    taken = [mmmu_choice(answer, OPTIONS) for answer in answers(1)]
    assert taken == [other_mmmu(answer, OPTIONS) for answer in answers(1)]
    assert {None, *"ABCD"} == set(taken)
    for answer, wanted in (
        ("A", "A"), ("(B).", "B"), ("A, no: (B)", "B"), ("not A but B", "B"), ("(A) then (B) then (A)", "A"),
        ("B.", "B"), ("B. dog", None), ("it is the dog, I would say", "B"), ("it is the dog", None), ("", None),
        ("a thing that is a red cat there", "D"),
    ):  # fmt: skip
        assert mmmu_choice(answer, OPTIONS) == wanted, answer
    mine, theirs = random.Random(42), random.Random(42)
    drawn = [mmmu_choice("?", OPTIONS, chance=mine) for _ in range(20)]
    assert drawn == [theirs.choice(["A", "B", "C", "D"]) for _ in range(20)] and len(set(drawn)) == 4
    assert mmmu_choice("(C)", OPTIONS, chance=mine) == "C"


OPEN = (
    "is ", "so ", "answer ", "=", "the result is 5", "24.5", "1,000", "1e3", "-3", ".5", "5.", "x", "blue", "Blue",
    "\n", " ", ". ", ":", "therefore ", "it could be blue", "12cm", "3,4", "10,000.25", "0.333333", "final answer 7",
)  # fmt: skip


def other_open(answer, references):
    """Line by line, with a stack of what may be the answer; and numbers by one scan each."""

    def values(text):
        try:
            return {round(float(text.strip().replace(",", "")), 2)}
        except ValueError:
            low = text.strip().lower()
            return {" " + low, low + " "} if len(low) == 1 else {low}

    said, lines = [], answer.strip().strip(".").lower().splitlines(keepends=False) or [""]
    for n, line in enumerate(lines):
        words = ["could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result "]
        ends = [line.rpartition(word)[2].strip() for word in words + ["="] * (n + 1 == len(lines)) if word in line]
        best = ""
        for end in ends:
            best = end if not best or len(end) < len(best) else best
        if best and best not in list(":,.!?;'"):
            said.append(best)
    said = said or [answer.strip().strip(".").lower()]
    parts = list(said)
    for text in said:
        parts += [m[0] for m in re.finditer(r"-?\b\d{1,3}(,\d{3})+\b", text)]
        parts += [m[0] for m in re.finditer(r"-?\d+(\.\d+)?[eE][+-]?\d+", text)]
        parts += [m[0] for m in re.finditer(r"-?(\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])", text)]
    found = set().union(*map(values, parts))
    wanted = set().union(*map(values, references))
    numbers = {one for one in found if isinstance(one, float)} & {one for one in wanted if isinstance(one, float)}
    texts = [one for one in found if isinstance(one, str)]
    return float(bool(numbers) or any(w in t for w in wanted if isinstance(w, str) for t in texts))


def test_mmmu_open_questions():
    rng, seen = random.Random(2), []
    for _ in range(700):
        answer = "".join(rng.choices(OPEN, k=rng.randint(0, 7)))
        references = rng.sample(("5", "24.5", "1000", "blue", "x", "-3", "0.33", "7", "12cm"), rng.randint(1, 3))
        got = mmmu_open(answer, references)
        assert got == other_open(answer, references), (answer, references)
        seen.append(got)
    assert 100 < sum(seen) < 600
    for answer, references, wanted in (
        ("1,000", ["1000.0"], 1), ("0.333", ["0.33"], 1), ("so blue\nso red", ["red"], 1),
        ("It is blueish", ["blue"], 1), ("blue is not", ["blue"], 0), ("x = 3", ["3"], 1), ("15", ["5"], 0),
        ("b", ["B"], 1), ("abc", ["b"], 0), ("", ["x"], 0),
    ):  # fmt: skip
        assert mmmu_open(answer, references) == wanted, answer


def test_video_mme_takes_the_first_letter():
    beginnings = ("The best answer is", "The correct answer is", "The answer is", "The answer")
    for answer in answers(3):
        rest = answer.strip()
        for beginning in beginnings:  # those of the script that can match
            rest = "".join(rest.split(beginning))
        letters = [c for c in rest if c in "ABCD"]
        wanted = None if len(rest.split()) > 10 and not letters else next(iter(letters), None)
        assert video_mme_choice(answer) == wanted, answer
    for answer, wanted in (("(C)", "C"), ("The answer is D.", "D"), ("Best answer: C", "B"), ("e", None), ("", None)):
        assert video_mme_choice(answer) == wanted


def test_mvbench_compares_the_first_word():
    rng = random.Random(4)
    words = (
        "(A)", "A", "a.", "(b", "B)", "(C) x", "c", "(", "", "Option A", "the (A)", "x", "a) b)", "(A)(B)", "Ab",
        "..",
    )  # fmt: skip
    seen = []
    for _ in range(500):
        answer, reference = rng.choice(words) + rng.choice(("", " dog", ".", "\n")), f"({rng.choice('ABC')}) a dog."
        first, _, _ = answer.lower().partition(" ")
        option = reference[:3].lower()
        inside = first.replace(".", "") in [option[i:j] for i in range(3) for j in range(i, 4)]
        wanted = not set(first).isdisjoint("abcdefg") and (inside or first.count(option) > 0)
        assert mvbench_accuracy(answer, reference) == wanted, (answer, reference)
        seen.append(wanted)
    assert 50 < sum(seen) < 450
    assert mvbench_accuracy("", "(A) a") == mvbench_accuracy("(", "(A) a") == 0  # right in the script's first form


@pytest.mark.parametrize(
    "wrong", [None, "AB", {"A": "x"}, {"A": "x", "b": "y"}, {"A": "x", "B": 3}, ["x"], ["x"] * 27, 5]
)
def test_what_are_no_options_is_named(wrong):
    wrong_answer: Any = None
    for function in (mmbench_choice, mmmu_choice):
        with pytest.raises(Qwen2VLError, match="options"):
            function("A", wrong)
        with pytest.raises(Qwen2VLError, match="answer: wants a text"):
            function(wrong_answer, OPTIONS)
    assert mmbench_choice("B", ["x", "y"]) == "B"  # pyright: ignore[reportArgumentType]
    with pytest.raises(Qwen2VLError, match="reference: wants an option"):
        mvbench_accuracy("(A)", "A dog")
