"""Scores of whole files of questions: what a line has beside its prompt, and how answers become the number of a table.

A line has "answer" (one reference) or "answers" (several), and what its metric reads beside them; with "category" the
scores are given by category, too. A question that could not be asked counts as an empty answer.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..agents.function_calls import Call
from ..agents.grounding import Box
from ..errors import Qwen2VLError
from .calls import Matched, match_aitz, match_calls, read_calls
from .checks import check_box, check_number, check_text, check_texts
from .choices import check_options, mmbench_choice, mmmu_choice, mmmu_open, mvbench_accuracy, video_mme_choice
from .metrics import anls, character_edits, exact_match, lenient_relaxed_accuracy, refcoco_accuracy, relaxed_accuracy
from .vqa import inclusion, mme, vcr, vqa_accuracy, yes_or_no

Row = Mapping[str, Any]
Scores = Mapping[str, float | None]

_COMMON = ("answer", "answers", "category")


@dataclass(frozen=True)
class Metric:
    """A number of a table.

    Attributes:
        score: of a line's keys, an answer, and what is drawn by chance, the scores of the answer; None is left out of
            the mean. Raises Qwen2VLError where the line is wrong, whatever the answer is.
        keys: what of a line it reads beside "answer", "answers" and "category".
        report: of lines and their scores, the numbers of the whole file; default: the mean of every score.
    """

    score: Callable[[Row, Mapping[str, Any], random.Random], Scores]
    keys: tuple[str, ...] = ()
    report: Callable[[Sequence[Row], Sequence[Scores]], dict[str, float]] | None = None


def metric_keys(metric: str) -> tuple[str, ...]:
    """The keys of a line that belong to a metric and not to the prompt. Raises Qwen2VLError for an unknown metric."""
    return _COMMON + _metric(metric).keys


def check_row(metric: str, row: Row) -> None:
    """Raise Qwen2VLError where a line's keys are none that answers can be scored by."""
    _metric(metric).score(row, {"text": ""}, random.Random(0))
    if row.get("category") is not None:
        check_text("category", row["category"])


def score_answers(metric: str, rows: Sequence[Row], answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The numbers of a file.

    Args:
        metric: a name of `METRICS`.
        rows: what each line has under `metric_keys`.
        answers: for each line {"text"}, with "boxes" where the answer has some, or {"error"}.

    Returns:
        {"scores": of the whole, "by_category": by category where lines have one, "each": of every line}.

    Raises:
        Qwen2VLError: there is no such metric, there are not as many answers as lines, or a line is wrong.
    """
    chosen, chance = _metric(metric), random.Random(42)  # MMMU's seed
    if len(rows) != len(answers) or not rows:
        raise Qwen2VLError(f"answers: wants one for each of at least one line, got {len(answers)} for {len(rows)}")
    each = [
        chosen.score(row, answer if "error" not in answer else {"text": ""}, chance)
        for row, answer in zip(rows, answers, strict=True)
    ]
    report = chosen.report or _means
    categories: dict[str, list[int]] = defaultdict(list)
    for n, row in enumerate(rows):
        if row.get("category") is not None:
            categories[row["category"]].append(n)
    found: dict[str, Any] = {"scores": report(rows, each)}
    if categories:
        found["by_category"] = {
            name: {"questions": len(places), **report([rows[n] for n in places], [each[n] for n in places])}
            for name, places in categories.items()
        }
    return found | {"each": each}


def _metric(name: str) -> Metric:
    if name not in METRICS:
        raise Qwen2VLError(f"metric: wants one of {', '.join(METRICS)}, got {name!r}")
    return METRICS[name]


def _means(_: Sequence[Row], each: Sequence[Scores]) -> dict[str, float]:
    """The mean of each score over those that have it; 0 where none has."""
    found = {}
    for name in each[0]:
        values = [value for scores in each if (value := scores[name]) is not None]
        found[name] = sum(values) / len(values) if values else 0.0
    return found


def _references(row: Row) -> list[str]:
    if ("answer" in row) == ("answers" in row):
        raise Qwen2VLError("answer: wants one of answer and answers")
    return check_texts("answers", row["answers"]) if "answers" in row else [check_text("answer", row["answer"])]


def _by_text(name: str, function: Callable[[str, Sequence[str]], float]) -> Metric:
    return Metric(lambda row, answer, _: {name: function(answer["text"], _references(row))})


def _inclusion(row: Row, answer: Row, _: random.Random) -> Scores:
    formula = row.get("formula", False)
    if not isinstance(formula, bool):
        raise Qwen2VLError(f"formula: wants true or false, got {formula!r}")
    return {"accuracy": inclusion(answer["text"], _references(row), formula=formula)}


def _edits(row: Row, answer: Row, _: random.Random) -> Scores:
    edits, characters = character_edits(answer["text"], check_text("answer", row.get("answer")))
    return {"edits": edits, "characters": characters}


def _error_rate(_: Sequence[Row], each: Sequence[Scores]) -> dict[str, float]:
    edits, characters = (sum(scores[name] or 0 for scores in each) for name in ("edits", "characters"))
    if not characters:
        raise Qwen2VLError("answer: wants characters in at least one line, got none")
    return {"character error rate": edits / characters}


def _letter(row: Row, options: Mapping[str, str]) -> str:
    if check_text("answer", row.get("answer")) not in options:
        raise Qwen2VLError(f"answer: wants one of {', '.join(options)}, got {row['answer']!r}")
    return row["answer"]


def _mmbench(row: Row, answer: Row, _: random.Random) -> Scores:
    options = check_options(row.get("options"))
    chosen = mmbench_choice(answer["text"], options)
    return {"accuracy": float(chosen == _letter(row, options)), "answered": float(chosen is not None)}


def _circular(rows: Sequence[Row], each: Sequence[Scores]) -> dict[str, float]:
    """Lines of one group, the rotations of a question's options, are right together or not at all."""
    groups: dict[Any, list[float]] = defaultdict(list)
    for n, (row, scores) in enumerate(zip(rows, each, strict=True)):
        groups[("line", n) if row.get("group") is None else ("group", repr(row["group"]))].append(
            scores["accuracy"] or 0.0
        )
    return {"accuracy": sum(map(min, groups.values())) / len(groups), "answered": _means(rows, each)["answered"]}


def _mmmu(row: Row, answer: Row, chance: random.Random) -> Scores:
    if row.get("options") is None:
        return {"accuracy": mmmu_open(answer["text"], _references(row)), "answered": 1.0}
    options = check_options(row["options"])
    wanted, chosen = _letter(row, options), mmmu_choice(answer["text"], options)
    drawn = chosen or mmmu_choice(answer["text"], options, chance=chance)
    return {"accuracy": float(drawn == wanted), "answered": float(chosen is not None)}


def _video_mme(row: Row, answer: Row, _: random.Random) -> Scores:
    wanted, chosen = _letter(row, dict.fromkeys("ABCD", "")), video_mme_choice(answer["text"])
    return {
        "accuracy": None if chosen is None else float(chosen == wanted),
        "answered": float(chosen is not None),
    }


def _mvbench(row: Row, answer: Row, _: random.Random) -> Scores:
    return {"accuracy": mvbench_accuracy(answer["text"], check_text("answer", row.get("answer")))}


def _mme(row: Row, answer: Row, _: random.Random) -> Scores:
    wanted = check_text("answer", row.get("answer")).strip().lower()
    if wanted not in ("yes", "no"):
        raise Qwen2VLError(f"answer: wants Yes or No, got {row['answer']!r}")
    check_text("group", row.get("group"))
    return {"right": float(yes_or_no(answer["text"]) == wanted)}


def _mme_score(rows: Sequence[Row], each: Sequence[Scores]) -> dict[str, float]:
    """The sum over categories."""
    answers = []
    for row, scores in zip(rows, each, strict=True):
        said = row["answer"] if scores["right"] else ""
        answers.append((row.get("category") or "", row["group"], said, row["answer"]))
    return {"score": sum(mme(answers).values())}


def _vcr(row: Row, answer: Row, _: random.Random) -> Scores:
    language = row.get("language", "en")
    if language not in ("en", "zh"):
        raise Qwen2VLError(f"language: wants en or zh, got {language!r}")
    hidden, tokenize = _references(row), _tokenizer(language)
    found = [vcr(answer["text"], text, tokenize=tokenize, separator=" " if language == "en" else "") for text in hidden]
    return {
        "exact match": sum(one.exact_match for one in found),
        "Jaccard index": sum(one.jaccard for one in found),
        "texts": len(found),
    }


def _vcr_means(_: Sequence[Row], each: Sequence[Scores]) -> dict[str, float]:
    """Over all hidden texts of all pictures."""
    texts = sum(scores["texts"] or 0 for scores in each)
    return {name: sum(scores[name] or 0 for scores in each) / texts for name in ("exact match", "Jaccard index")}


_PIPELINES: dict[str, Any] = {}


def _tokenizer(language: str) -> Callable[[str], list[str]]:
    """spaCy's words of a text, by the model that VCR's numbers are made with."""
    name = {"en": "en_core_web_sm", "zh": "zh_core_web_sm"}[language]
    if name not in _PIPELINES:
        try:
            import spacy  # pyright: ignore[reportMissingImports]

            _PIPELINES[name] = spacy.load(name)
        except (ImportError, OSError) as error:
            raise Qwen2VLError(f"vcr: needs spaCy and its model {name}: {error}") from error
    return lambda text: [token.text for token in _PIPELINES[name](text)]


def _refcoco(row: Row, answer: Row, _: random.Random) -> Scores:
    width, height = (check_number(name, row.get(name), low=1) for name in ("width", "height"))
    points = next((box["points"] for box in answer.get("boxes", ()) if len(box["points"]) == 2), None)
    found = None if points is None else Box.from_points([tuple(point) for point in points])
    wanted = check_box("answer", row.get("answer"))
    return {"accuracy": refcoco_accuracy(found, wanted, width=width, height=height)}


def _style(row: Row, default: str) -> Any:
    style = row.get("style", default)
    if style not in ("qwen", "paper"):
        raise Qwen2VLError(f"style: wants qwen or paper, got {style!r}")
    return style


def _function_calls(row: Row, answer: Row, _: random.Random) -> Scores:
    wanted = row.get("answer")
    if not isinstance(wanted, list) or not all(
        isinstance(one, Mapping) and isinstance(one.get("name"), str) and isinstance(one.get("arguments"), Mapping)
        for one in wanted
    ):
        raise Qwen2VLError(f"answer: wants a list of calls, each with name and arguments, got {wanted!r}")
    calls = [Call(one["name"], dict(one["arguments"])) for one in wanted]
    return _matched(match_calls(read_calls(answer["text"], _style(row, "qwen")), calls))


def _aitz(row: Row, answer: Row, _: random.Random) -> Scores:
    width, height = (check_number(name, row.get(name), low=1) for name in ("width", "height"))
    calls = read_calls(answer["text"], _style(row, "paper"))
    return _matched(match_aitz(calls[0] if calls else None, row, width=width, height=height))


def _matched(found: Matched) -> Scores:
    return {"type match": found.type_match, "exact match": found.exact_match}


_STEP = ("coat_action_desc", "result_action_text", "result_touch_yx", "ui_positions")

METRICS: dict[str, Metric] = {
    "exact_match": _by_text("accuracy", exact_match),
    "anls": _by_text("ANLS", anls),
    "relaxed_accuracy": _by_text("accuracy", relaxed_accuracy),
    "lenient_relaxed_accuracy": _by_text("accuracy", lenient_relaxed_accuracy),
    "character_error_rate": Metric(_edits, (), _error_rate),
    "vqa_accuracy": _by_text("accuracy", vqa_accuracy),
    "inclusion": Metric(_inclusion, ("formula",)),
    "mmbench": Metric(_mmbench, ("options", "group"), _circular),
    "mmmu": Metric(_mmmu, ("options",)),
    "video_mme": Metric(_video_mme),
    "mvbench": Metric(_mvbench),
    "mme": Metric(_mme, ("group",), _mme_score),
    "vcr": Metric(_vcr, ("language",), _vcr_means),
    "refcoco": Metric(_refcoco, ("width", "height")),
    "function_calls": Metric(_function_calls, ("style",)),
    "aitz": Metric(_aitz, (*_STEP, "width", "height", "style")),
}
