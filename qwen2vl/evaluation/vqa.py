"""Scores of questions about pictures whose answers are short texts, by answer.

VQA accuracy        TextVQA and VQA: how many of the people who were asked say the same (Antol et al. 2015, section 4;
                    texts processed as by the evaluation server, which TextVQA's numbers are made with)
inclusion           OCRBench, MTVQA: a reference stands anywhere in the answer (Liu et al. 2024, section 3)
VCR                 visual caption restoration: exact match and Jaccard index of the words nearest to the hidden ones
                    (Zhang et al. 2024, section 4.1)
MME                 accuracy and accuracy+ of pairs of yes-no questions (Fu et al. 2023, section 2.1)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from ..errors import Qwen2VLError
from .checks import check_text, check_texts

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBER_WORDS = {"none": "0"} | {word: str(n) for n, word in enumerate(_NUMBERS)}
_ARTICLES = ("a", "an", "the")
_MARKS = ';/[]"{}()=+\\_-><@`!'
# The server's pattern of periods; it hands the flag of Unicode over as the number of periods that go, which is 32.
_PERIOD, _PERIODS = re.compile(r"\.(?!\d)"), 32

#: Contractions as the server writes them. One that comes without an apostrophe, or without one of several, gets it.
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've
o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""


def _spellings() -> dict[str, str]:
    found = {"somebody'd": "somebodyd"}  # as it stands in the server's table
    for word in _CONTRACTIONS.split():
        for n, character in enumerate(word):
            if character == "'":
                found[word[:n] + word[n + 1 :]] = word
    return found


_SPELLINGS = _spellings()


def vqa_text(text: str) -> str:
    """A text as the VQA evaluation server compares it: lower case, number words as digits, without articles and most
    punctuation, contractions with their apostrophes."""
    plain = check_text("text", text).lower().replace(",", "").replace("?", "").replace("'s", " 's")
    plain = plain.strip().replace("\n", " ").replace("\t", " ").strip()
    bare = plain
    for mark in _MARKS:
        beside_blank = f"{mark} " in plain or f" {mark}" in plain
        bare = bare.replace(mark, "" if beside_blank else " ")
    words = [_NUMBER_WORDS.get(word, word) for word in _PERIOD.sub("", bare, count=_PERIODS).lower().split()]
    return " ".join(_SPELLINGS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """The mean over people of min(1, how many of the *others* say the same / 3); all texts as `vqa_text` has them.

    Args:
        references: what each person answered, ten as a rule, the same text as often as it was given.
    """
    given, people = vqa_text(check_text("answer", answer)), check_texts("references", references, least=2)
    same = [vqa_text(reference) == given for reference in people]
    return sum(min(1.0, (sum(same) - one) / 3) for one in same) / len(same)


def inclusion(answer: str, references: Sequence[str], *, formula: bool = False) -> float:
    """1.0 where the answer contains a reference, in lower case and with blanks for line ends.

    Args:
        formula: OCRBench's rule for handwritten formulas (HME100k): cases count, blanks do not.
    """
    check_text("answer", answer)

    def plain(text: str) -> str:
        text = text.strip().replace("\n", " ")
        return text.replace(" ", "") if formula else text.lower()

    return float(any(plain(reference) in plain(answer) for reference in check_texts("references", references)))


@dataclass(frozen=True)
class Restored:
    """How well one hidden text was restored.

    Attributes:
        exact_match: 1.0 where the tokens nearest to the hidden ones are these.
        jaccard: tokens of both by tokens of either, each counted once.
        text: what of the answer is nearest; "" where nothing is.
    """

    exact_match: float
    jaccard: float
    text: str


_REFUSALS = ("I can't", "I cannot", "无法", "抱歉")


def vcr(answer: str, hidden: str, *, tokenize: Callable[[str], Sequence[str]], separator: str = " ") -> Restored:
    """How well an answer restores one hidden text of a caption.

    Of all runs of as many tokens as the hidden text has that share a token with it, the first of those most like it
    (`difflib.SequenceMatcher.ratio`) counts. An answer that refuses, by the benchmark's list of words, scores 0.

    Args:
        hidden: one of the covered texts; the benchmark's score is the mean over all covered texts of all pictures.
        tokenize: words of a text. Published numbers are made with spaCy's en_core_web_sm and zh_core_web_sm:
            ``lambda text: [token.text for token in nlp(text)]``.
        separator: between words, "" for Chinese.
    """
    wanted = list(tokenize(check_text("hidden", hidden)))
    if not wanted:
        raise Qwen2VLError(f"hidden: wants a text with words, got {hidden!r}")
    if any(words in check_text("answer", answer) for words in _REFUSALS) or "sorry" in answer.lower():
        return Restored(0.0, 0.0, "")
    words, best, nearest = list(tokenize(answer)), 0.0, []
    for begin in range(len(words) - len(wanted) + 1):
        run = words[begin : begin + len(wanted)]
        if set(run).isdisjoint(wanted):
            continue
        ratio = SequenceMatcher(None, separator.join(run), hidden).ratio()
        if ratio > best:
            best, nearest = ratio, run
    both, either = set(nearest) & set(wanted), set(nearest) | set(wanted)
    return Restored(float(nearest == wanted), len(both) / len(either), separator.join(nearest))


def yes_or_no(answer: str) -> str | None:
    """ "yes" or "no" where an answer says so in MME's reading, which looks at its first four characters; else None."""
    plain = check_text("answer", answer).lower().strip().replace(".", "")
    if plain in ("y", "n"):
        return "yes" if plain == "y" else "no"
    begin = plain if plain in ("yes", "no") or len(plain) == 1 else plain[:4]
    return "yes" if "yes" in begin else "no" if "no" in begin else None


def mme(answers: Iterable[tuple[str, str, str, str]]) -> dict[str, float]:
    """MME's scores by category, each 0 to 200: accuracy over questions and accuracy+ over pictures, in per cent, added.

    The published score is the sum over the categories.

    Args:
        answers: (category, picture, answer, reference) of every question; a reference is "Yes" or "No", and every
            picture of a category has two questions.

    Raises:
        Qwen2VLError: a picture has not two questions, or a reference is neither of both.
    """
    right: dict[str, dict[str, list[bool]]] = {}
    for category, picture, answer, reference in answers:
        wanted = check_text("reference", reference).strip().lower().rstrip(".")
        if wanted not in ("yes", "no"):
            raise Qwen2VLError(f"reference: wants Yes or No, got {reference!r}")
        right.setdefault(category, {}).setdefault(picture, []).append(yes_or_no(answer) == wanted)
    scores = {}
    for category, pictures in right.items():
        for picture, pair in pictures.items():
            if len(pair) != 2:
                raise Qwen2VLError(f"answers: wants two questions of {picture!r} in {category!r}, got {len(pair)}")
        scores[category] = sum(50 * sum(pair) + 100 * all(pair) for pair in pictures.values()) / len(pictures)
    return scores
