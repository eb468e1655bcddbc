"""What an answer to a multiple-choice question chooses, by the functions that published numbers are made with.

MMBench             the rule of VLMEvalKit as it stood in 2024 (vlmeval/utils/matching_util.py, "exact matching": no
                    judge is asked what an unclear answer means). Its leaderboards, with the paper's numbers, take it
                    for MMStar, AI2D and RealWorldQA as well; EgoSchema's server takes numbers, and has no rule.
MMMU                its own script (MMMU-Benchmark, eval/eval_utils.py), open questions included
Video-MME           its own script (`extract_characters_regex`)
MVBench             its own script (`check_ans`), with the check of VLMEvalKit that an answer names an option at all
"""

from __future__ import annotations

import random
import re
import string
from collections.abc import Mapping, Sequence

from ..errors import Qwen2VLError
from .checks import check_text, check_texts

_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_BLANKED = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))


def check_options(options: object) -> dict[str, str]:
    """``options`` if they map capital letters to texts, at least two; a list of texts gets the letters from A."""
    if isinstance(options, Sequence) and not isinstance(options, (str, bytes)) and len(options) <= 26:
        options = dict(zip(string.ascii_uppercase, options, strict=False))
    if not isinstance(options, Mapping) or len(options) < 2:
        raise Qwen2VLError(f"options: wants 2 to 26, by letter or as a list, got {options!r}")
    for letter, text in options.items():
        if not isinstance(letter, str) or len(letter) != 1 or letter not in string.ascii_uppercase:
            raise Qwen2VLError(f"options: wants capital letters, got {letter!r}")
        check_text(f"options[{letter!r}]", text)
    return dict(options)


def mmbench_choice(answer: str, options: Mapping[str, str]) -> str | None:
    """The letter of the option that an answer chooses; None where it chooses none, or more than one.

    "(A)", "A.", "The answer is A": the one letter that stands as a word, brackets and most punctuation being blanks.
    Where no letter stands so, or several, the one option whose text stands in the answer, in any case.
    """
    given, named = check_text("answer", answer), check_options(options)
    words = given.translate(_BLANKED).split()
    letters = [letter for letter in named if letter in words]
    if any(refusal in given for refusal in _REFUSALS) or (not letters and "Z" in words):  # Z is "none of them" there
        return None
    if len(letters) == 1:
        return letters[0]
    said = [letter for letter, text in named.items() if text.lower() in given.lower()]
    return said[0] if len(said) == 1 else None


def mmmu_choice(answer: str, options: Mapping[str, str], *, chance: random.Random | None = None) -> str | None:
    """The letter of the option that an answer chooses, by MMMU's script: the last that stands in it as "(A)", else the
    last between blanks, else, in an answer of more than five words, the option whose text stands last.

    Args:
        chance: what draws an option where the answer has none, as the script does (`random.Random(42)` for a whole file
            in its order gives what it gives). Default: None is returned, which is wrong.
    """
    plain, named = check_text("answer", answer), check_options(options)
    for mark in ",.!?;:'":
        plain = plain.strip(mark)
    plain = f" {plain} "
    for form in ("({})", " {} "):
        places = {letter: plain.rfind(form.format(letter)) for letter in named}
        if max(places.values()) >= 0:
            return max(places, key=lambda letter: places[letter])
    if len(plain.split()) > 5:
        lower = plain.lower()
        places = {letter: lower.rfind(text.lower()) for letter, text in named.items()}
        if max(places.values()) >= 0:
            return max(places, key=lambda letter: places[letter])
    return None if chance is None else chance.choice(list(named))


_KEYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_MMMU_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)


def mmmu_open(answer: str, references: Sequence[str]) -> float:
    """1.0 where an answer to one of MMMU's open questions is right, by MMMU's script.

    Of each line of the answer what follows the last "is ", "answer ", "so " ... counts, and the numbers in that; where
    no line has such a word, the whole answer. A reference that is a number is right where it is one of these, rounded
    to two decimals; another is right where it stands in one of them, in lower case.
    """
    given = check_text("answer", answer).strip().strip(".").lower()
    lines, tails = given.split("\n"), []
    for n, line in enumerate(lines):
        tail = ""
        for key in (*_KEYS, "=") if n == len(lines) - 1 else _KEYS:
            if key in line:
                after = line.split(key)[-1].strip()
                if not tail or len(after) < len(tail):
                    tail = after
        if tail and tail not in (":", ",", ".", "!", "?", ";", "'"):
            tails.append(tail)
    tails = tails or [given]
    said = tails + [number for tail in tails for pattern in _MMMU_NUMBERS for number in pattern.findall(tail)]
    values = [value for text in said for value in _mmmu_values(text)]
    wanted = [value for text in check_texts("references", references) for value in _mmmu_values(text)]
    return float(any(_mmmu_equal(value, one) for value in values for one in wanted))


def _mmmu_equal(value: str | float, wanted: str | float) -> bool:
    if isinstance(value, str):
        return isinstance(wanted, str) and wanted in value
    return value == wanted


def _mmmu_values(text: str) -> list[str] | list[float]:
    """The number that a text is, or the text in lower case; of one character, with a blank on either side."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        lower = text.lower()
        return [f" {lower}", f"{lower} "] if len(lower) == 1 else [lower]


def video_mme_choice(answer: str) -> str | None:
    """The first of the letters A, B, C and D anywhere in an answer, by Video-MME's script; None where none is.

    In "Best answer: C" that is B: of the beginnings that the script passes over, those with a capital B are joined by a
    missing comma and never match, and the others have none of the four letters. The published number is the share of
    right ones among the answers that have a letter.
    """
    found = re.search("[ABCD]", check_text("answer", answer))
    return found[0] if found else None


def mvbench_accuracy(answer: str, reference: str) -> float:
    """1.0 where the first word of an answer names the right option, by MVBench's script, in lower case.

    The word, without periods, must stand in the reference's option, or the option in the word; a word without any of
    the letters a to g is wrong. (In the script's first form it is compared, too, and an empty answer is right.)

    Args:
        reference: "(A) text of the option".
    """
    word = check_text("answer", answer).lower().split(" ")[0]
    option = check_text("reference", reference).lower().split(" ")[0]
    if not re.fullmatch(r"\([a-z]\)", option):
        raise Qwen2VLError(f"reference: wants an option and its text, such as '(A) a cat', got {reference!r}")
    return float(bool(re.search("[a-g]", word)) and (word.replace(".", "") in option or option in word))
