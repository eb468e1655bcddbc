"""Scores of one answer; an average over answers is what benchmarks report.

exact match         1 where the answer is one of the references, up to case, spaces and what ends a sentence
character error rate    edits from the reference to the answer, by characters of the reference; over several answers,
                    all edits by all characters. 0 is best, and it may pass 1, as no other score does.
ANLS                average normalised Levenshtein similarity of DocVQA (Biten et al. 2019, equation 1), where
                    a similarity of exactly the threshold counts, as in the benchmark's own script
relaxed accuracy    ChartQA (Masry et al. 2022, section 5.1), by the function that its published numbers were made with:
                    numbers within 5 %, other answers equal but for case. `lenient_relaxed_accuracy` reads more.
IoU, recall         of boxes, for grounding
RefCOCO accuracy    IoU of at least 0.5 in pixels of the picture (Yu et al. 2016, section 5)

VQA accuracy, inclusion, VCR's scores and MME's are in `qwen2vl.evaluation.vqa`, multiple choice is in `.choices`, what
agents are measured by in `.calls`, and `.tasks` makes the numbers of whole files.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence

from ..agents.grounding import Box
from ..errors import Qwen2VLError
from .checks import check_box, check_boxes, check_number, check_text, check_texts

_END_MARKS = " .。!！?？"
_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?")


def normalise(text: str) -> str:
    """Text as answers are compared: NFKC, lower case, single spaces, without the marks that end a sentence, unless
    it is nothing else."""
    plain = " ".join(unicodedata.normalize("NFKC", check_text("text", text)).casefold().split())
    return plain.rstrip(_END_MARKS) or plain


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1.0 where the normalised answer is a normalised reference."""
    wanted = {normalise(reference) for reference in check_texts("references", references)}
    return float(normalise(check_text("answer", answer)) in wanted)


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance: the fewest characters inserted, deleted or replaced that make ``b`` of ``a``."""
    check_text("a", a)
    check_text("b", b)
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def character_edits(answer: str, reference: str) -> tuple[int, int]:
    """Edits that make the answer of the reference, and the reference's characters; spaces and case count, both in NFC.
    Over many answers the sum of the first by the sum of the second is their character error rate."""
    texts = check_text("answer", answer), check_text("reference", reference)
    answer, reference = (unicodedata.normalize("NFC", text).strip() for text in texts)
    return edit_distance(reference, answer), len(reference)


def character_error_rate(answer: str, reference: str) -> float:
    """The character error rate of one answer; against an empty reference 0 for an empty answer, else 1."""
    edits, characters = character_edits(answer, reference)
    return edits / characters if characters else float(edits > 0)


def anls(answer: str, references: Sequence[str], *, threshold: float = 0.5) -> float:
    """Similarity to the closest reference, 1 - distance / length of the longer; 0 where it is below ``threshold``.

    As by the benchmark's script, distances are of texts in lower case with single spaces ("ß" is not "ss"), and lengths
    are those of the texts as they came, in upper case.
    """
    best, given = 0.0, _plain(check_text("answer", answer))
    check_number("threshold", threshold)
    for reference in check_texts("references", references):
        longest = max(len(answer.upper()), len(reference.upper()))
        distance = edit_distance(given, _plain(reference))
        best = max(best, 1.0 - distance / longest if longest else 1.0)
    return best if best >= threshold else 0.0


def relaxed_accuracy(answer: str, references: Sequence[str], *, tolerance: float = 0.05) -> float:
    """1.0 where the answer is a number within ``tolerance`` of a reference, or else equal to one but for case.

    Numbers are what Python's ``float`` reads, with per cent signs behind; "1,000" and "$3" are none, and a reference of
    0 is compared as text (Qwen-VL, eval_mm/evaluate_vqa.py; pix2struct, metrics.py).
    """
    given = _float(check_text("answer", answer))
    check_number("tolerance", tolerance)
    for reference in check_texts("references", references):
        wanted = _float(reference)
        if given is None or not wanted:
            right = answer.lower() == reference.lower()
        else:
            right = abs(given - wanted) / abs(wanted) <= tolerance
        if right:
            return 1.0
    return 0.0


def lenient_relaxed_accuracy(answer: str, references: Sequence[str], *, tolerance: float = 0.05) -> float:
    """Relaxed accuracy that reads "12,000", "$3" and "4.5%" as numbers, and compares other answers as `exact_match`
    does. No published number is made with it."""
    given = _number(check_text("answer", answer))
    check_number("tolerance", tolerance)
    for reference in check_texts("references", references):
        wanted = _number(reference)
        if given is not None and wanted is not None:
            if abs(given - wanted) <= tolerance * abs(wanted):
                return 1.0
        elif normalise(answer) == normalise(reference):
            return 1.0
    return 0.0


def iou(a: Box | Sequence[float], b: Box | Sequence[float]) -> float:
    """Area that both boxes cover by the area that either does; 0 for boxes without area that are not the same.

    Args:
        a, b: boxes, or (x1, y1, x2, y2) in any unit that both share, such as pixels, which are not rounded.
    """
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = one, other = check_box("a", a), check_box("b", b)
    if one == other:
        return 1.0
    both = max(0, min(ax2, bx2) - max(ax1, bx1)) * max(0, min(ay2, by2) - max(ay1, by1))
    areas = (ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1)
    return both / (areas - both) if both else 0.0


def match_boxes(found: Sequence[Box | Sequence[float]], wanted: Sequence[Box | Sequence[float]]) -> list[float]:
    """IoU of each wanted box with the one found for it, 0 where none is left: best pairs first, each box once."""
    found, wanted = check_boxes("found", found), check_boxes("wanted", wanted)
    pairs = sorted(((iou(f, w), j, i) for i, f in enumerate(found) for j, w in enumerate(wanted)), reverse=True)
    best, taken = [0.0] * len(wanted), set()
    matched: set[int] = set()
    for value, j, i in pairs:
        if value > 0 and j not in matched and i not in taken:
            best[j] = value
            matched.add(j)
            taken.add(i)
    return best


def recall(
    found: Sequence[Box | Sequence[float]], wanted: Sequence[Box | Sequence[float]], *, threshold: float = 0.5
) -> float:
    """Share of the wanted boxes that were found with an IoU of at least ``threshold``. Raises where none is wanted."""
    check_number("threshold", threshold)
    if not check_boxes("wanted", wanted):
        raise Qwen2VLError("wanted: wants at least one box, got none")
    return sum(value >= threshold for value in match_boxes(found, wanted)) / len(wanted)


def refcoco_accuracy(
    found: Box | None, wanted: Sequence[float], *, width: float, height: float, threshold: float = 0.5
) -> float:
    """1.0 where a model's box has an IoU of at least ``threshold`` with the annotated one.

    Args:
        found: the first box of the answer, in thousandths; None where there is none, which is wrong.
        wanted: the annotation, (x1, y1, x2, y2) in pixels of the picture, never rounded: COCO's (x, y, w, h) is
            (x, y, x + w, y + h).
        width, height: of the picture, in pixels.
    """
    corners = check_box("wanted", wanted)
    check_number("threshold", threshold)
    if found is not None and not isinstance(found, Box):
        raise Qwen2VLError(f"found: wants a Box or None, got {found!r}")
    if found is None:
        return 0.0
    return float(iou(found.to_pixels(width=width, height=height), corners) >= threshold)


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _float(text: str) -> float | None:
    """The number that the published function reads; None for any other text."""
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def _number(text: str) -> float | None:
    """The number that a text is, "12,000", "4.5%" or "$3"; None for any other text."""
    plain = text.strip().rstrip(_END_MARKS).lstrip("$€£¥ ")
    percent = plain.endswith("%")
    plain = plain.removesuffix("%").strip()
    if not plain or not _NUMBER.fullmatch(plain) or not any(c.isdigit() for c in plain):
        return None
    value = float(plain.replace(",", "")) / (100 if percent else 1)
    return value if math.isfinite(value) else None
