"""What a model makes of held-out samples, by skill, difficulty, size and language: the measure of ``qwen2vl eval``.

Every skill has one score that counts as its accuracy:

    read, compare, colour_shape, count, video    exact match, in which upper and lower case are the same
    point        recall at an IoU of 0.5; no more of the model's boxes count than there are boxes to find
    screen       games that the model wins by its own play

Some skills have further scores: "read" the edits, the characters, the character error rate that these make, and ANLS;
"count" the relaxed accuracy; "point" the mean IoU, in which a quadrilateral counts by its bounding box; "screen" the
number of actions of an episode.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..agents.grounding import Box, Grounded, parse_grounding
from ..agents.loop import model_writer, run_agent
from ..errors import Qwen2VLError
from ..evaluation.metrics import anls, character_edits, exact_match, lenient_relaxed_accuracy, match_boxes, recall
from ..generation import GenerationConfig, generate
from .sample import Sample
from .screen_game import ScreenGame
from .skills import LEVELS, SKILLS, play
from .skills import generate as make_sample
from .source import read_sample
from .words import LANGUAGES

if TYPE_CHECKING:
    from ..model import Qwen2VL
    from ..prompt.processor import Processor

#: The upper bounds of the classes of picture size, in tokens of one picture.
SIZES = (4, 8, 16)
_MAX_NEW_TOKENS = 96
_MAX_ACTIONS = 8


@dataclass(frozen=True)
class Scored:
    """One sample, what the model made of it, and its scores; "accuracy" is always among them."""

    skill: str
    difficulty: int
    language: str
    size: tuple[int, int]  # width, height in pixels
    prompt: str
    expected: str
    answer: str
    scores: Mapping[str, float]

    @property
    def tokens(self) -> int:
        """How many tokens one of the pictures is, at least 1."""
        return max(1, round(self.size[0] / 28) * round(self.size[1] / 28))


def evaluate(
    model: Qwen2VL,
    processor: Processor,
    *,
    skills: Sequence[str] = tuple(SKILLS),
    difficulties: Sequence[int] = LEVELS,
    count: int = 50,
    seed: int = 0,
    languages: Sequence[str] = tuple(LANGUAGES),
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
    known: Sequence[Scored] = (),
    on_scored: Callable[[Scored], None] | None = None,
) -> list[Scored]:
    """Ask a model ``count`` held-out samples of every skill and difficulty, and decode its answers greedily.

    Args:
        skills, difficulties, seed, languages: which samples, see `qwen2vl.samples.generate`.
        batch_size: how many samples are answered at once.
        progress: called after every sample with (samples done, samples in all).
        known: the first of them, as an earlier call with the same arguments scored them; they are not asked again.
        on_scored: called with every other sample when it has been answered.

    Raises:
        Qwen2VLError: an unknown skill or difficulty, or a count that is not positive.
    """
    for name, value in (("count", count), ("batch_size", batch_size)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise Qwen2VLError(f"{name}: wants a positive integer, got {value!r}")
    total, found = len(skills) * len(difficulties) * count, list(known)
    if len(found) > total:
        raise Qwen2VLError(f"known: wants at most {total} samples, got {len(found)}")
    for n, (skill, difficulty) in enumerate(product(skills, difficulties)):
        begin = min(max(len(known) - n * count, 0), count)
        asked = {"seed": seed, "languages": languages}
        for one in _ask(model, processor, skill, difficulty, range(begin, count), asked, batch_size):
            found.append(one)
            if on_scored is not None:
                on_scored(one)
            if progress is not None:
                progress(len(found), total)
    return found


def _ask(
    model: Qwen2VL,
    processor: Processor,
    skill: str,
    difficulty: int,
    which: range,
    asked: dict[str, Any],
    batch_size: int,
) -> Iterator[Scored]:
    indices = iter(which)
    config = GenerationConfig.from_model(model, max_new_tokens=_MAX_NEW_TOKENS, do_sample=False)
    if skill == "screen":
        write = model_writer(model, processor, style="paper", config=config)
        for index in indices:
            yield _played(write, play(difficulty, index=index, **asked), difficulty)
        return
    while batch := list(islice(indices, batch_size)):
        samples = [make_sample(skill, difficulty, index=index, split="held-out", **asked) for index in batch]
        inputs = processor([prompt_of(sample) for sample in samples])
        result = generate(model, inputs, config=config)
        for sample, ids in zip(samples, result.sequences, strict=True):
            yield score(sample, processor.decode(ids, skip_special_tokens=False))


def prompt_of(sample: Sample) -> list[dict[str, Any]]:
    """The messages of a sample that come before the answer."""
    return read_sample(sample)[:-1]


def score(sample: Sample, answer: str) -> Scored:
    """Score an answer, decoded with its special tokens, by what was drawn."""
    text = answer.strip()
    if sample.skill == "point":
        wanted = [box for item in sample.places for box in _boxes(item)]
        found = [box for item in parse_grounding(text) for box in _boxes(item)]
        found = found[: len(wanted)]  # so that guessing more boxes gains nothing
        scores = {"accuracy": recall(found, wanted), "IoU": sum(match_boxes(found, wanted)) / len(wanted)}
    else:
        scores = {"accuracy": exact_match(text, [sample.answer])}
    if sample.skill == "read":
        edits, characters = character_edits(text, sample.answer)
        scores |= {"edits": edits, "characters": characters, "ANLS": anls(text, [sample.answer])}
    if sample.skill == "count":
        scores["relaxed accuracy"] = lenient_relaxed_accuracy(text, [sample.answer])
    prompt = sample.record["messages"][0]["content"]
    asked = (sample.skill, sample.difficulty, sample.language, sample.size, prompt)
    return Scored(*asked, sample.answer, text, scores)


def _played(write: Callable[..., str], game: ScreenGame, difficulty: int) -> Scored:
    """Let the model play a game to its end, or to the limit of actions."""
    episode = run_agent(write, game, style="paper", max_steps=_MAX_ACTIONS, max_errors=1)
    wanted = "; ".join(f"{task.kind} {task.text}".strip() for task in game.tasks)
    scores = {"accuracy": float(game.success), "actions": float(sum(len(step.calls) for step in episode.steps))}
    written = "\n".join(step.text for step in episode.steps)
    return Scored("screen", difficulty, game.language, game.size, game.instruction, wanted, written, scores)


def _boxes(item: Grounded) -> Iterator[Box]:
    """The bounding boxes of an item's places."""
    for place in item.places:
        xs, ys = zip(*place.points, strict=True)
        yield Box(min(xs), min(ys), max(xs), max(ys))


# -------------------------------------------------------------------------------------------------------------- reports


def averages(scored: Iterable[Scored], by: Callable[[Scored], Any]) -> dict[Any, dict[str, float]]:
    """Class of samples -> the mean of every score, and "samples", their number; in the order in which classes appear.

    "CER", the character error rate, is all edits of a class divided by all its characters.
    """
    sums: dict[Any, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for one in scored:
        for name, value in one.scores.items():
            sums[by(one)][name].append(value)
    found = {}
    for key, values in sums.items():
        found[key] = {"samples": len(values["accuracy"]), **{name: sum(v) / len(v) for name, v in values.items()}}
        if characters := sum(values.get("characters", ())):
            found[key]["CER"] = sum(values["edits"]) / characters
    return found


def size_class(one: Scored) -> str:
    """The name of the size class of a sample's pictures, such as "5 to 8 tokens"."""
    low = 0
    for high in SIZES:
        if one.tokens <= high:
            return f"{low + 1} to {high} tokens"
        low = high
    return f"{low + 1} tokens or more"


def report(scored: Sequence[Scored]) -> dict[str, Any]:
    """Averages by skill, by skill and difficulty, by skill and size, and by language, as JSON can hold them."""
    order = list(SKILLS)
    scored = sorted(scored, key=lambda one: (order.index(one.skill), one.difficulty))
    by_size = sorted(scored, key=lambda one: (order.index(one.skill), one.tokens))
    return {
        "by_skill": averages(scored, lambda one: one.skill),
        "by_difficulty": averages(scored, lambda one: f"{one.skill} {one.difficulty}"),
        "by_size": averages(by_size, lambda one: f"{one.skill}, {size_class(one)}"),
        "by_language": averages(sorted(scored, key=lambda one: one.language), lambda one: one.language),
    }


def draw(scored: Sequence[Scored], path: Path) -> None:
    """Draw the accuracy of each skill by difficulty and by picture size into a file. Needs matplotlib."""
    from matplotlib.figure import Figure

    skills = [skill for skill in SKILLS if any(one.skill == skill for one in scored)]
    figure = Figure(figsize=(11, 1.2 + 0.5 * len(skills)), layout="constrained")
    classes = [f"{a} to {b} tokens" for a, b in zip((1, *(s + 1 for s in SIZES)), SIZES, strict=False)]
    panels = (
        ("difficulty", [str(level) for level in LEVELS], lambda one: str(one.difficulty)),
        ("tokens of a picture", [*classes, f"{SIZES[-1] + 1} tokens or more"], size_class),
    )
    for axes, (title, columns, of) in zip(figure.subplots(1, 2, sharey=True), panels, strict=True):
        found = averages(scored, lambda one, of=of: (one.skill, of(one)))
        cells = [
            [found.get((skill, column), {}).get("accuracy", float("nan")) for column in columns] for skill in skills
        ]
        axes.imshow(cells, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        for y, row in enumerate(cells):
            for x, value in enumerate(row):
                if value == value:
                    axes.text(x, y, f"{value:.0%}", ha="center", va="center", color="white" if value < 0.7 else "black")
        axes.set_xticks(range(len(columns)), [c.replace(" tokens", "") for c in columns])
        axes.set_yticks(range(len(skills)), skills)
        axes.set_xlabel(title)
    figure.suptitle(f"accuracy on {len(scored)} held-out samples")
    figure.savefig(path, dpi=120)
