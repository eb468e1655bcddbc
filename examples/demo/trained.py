"""The small trained model on held-out generated samples: it reads, names, counts, compares, points, follows, plays.

Nothing is chosen by what comes out: every skill shows the first samples of each difficulty that the model was trained
for. They take the path of a user's own media, from PNG and MP4 files to text.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw
from rich.markup import escape

from qwen2vl import assets
from qwen2vl.agents.function_calls import Call, Result
from qwen2vl.agents.grounding import Grounded, draw_grounding, parse_grounding, parse_point, to_pixels
from qwen2vl.agents.loop import model_writer, run_agent
from qwen2vl.cli.common import printable
from qwen2vl.errors import MediaError
from qwen2vl.generation import GenerationConfig, generate
from qwen2vl.samples import Sample, play
from qwen2vl.samples import generate as make_sample
from qwen2vl.samples.held_out import prompt_of, score
from qwen2vl.samples.sample import from_ppm
from qwen2vl.samples.screen_game import TAP, ScreenGame
from qwen2vl.samples.skills import check_choice

from ..small.plan import SCOPE
from ..small.tokenizer import LANGUAGES
from .media import write_frames
from .sheet import ANSWER, Answered, draw_sheet, enlarge, fitting_scale, verdict
from .steps import console, load, step

if TYPE_CHECKING:
    from qwen2vl.model import Qwen2VL
    from qwen2vl.prompt.processor import Processor

#: Skill -> heading, and how many samples of each difficulty.
_PARTS = {
    "read": ("Reading text, in pictures of several resolutions", 2),
    "colour_shape": ("Naming colours and shapes", 1),
    "count": ("Counting", 1),
    "compare": ("Comparing two pictures", 1),
    "point": ("Pointing at things", 1),
    "video": ("Following a video", 1),
    "screen": ("Playing the screen game, by function calls", 1),
}
_SCALE, _GAME_SCALE = 3, 2  # saved pictures are enlarged, because a person makes out little at 56 x 56 pixels
_NEW_TOKENS = 96
_MAX_ACTIONS = 8
_LONGEST = 120  # characters of an answer are shown
_FPS = 2  # frames a second of the videos that are written: as many as the processor takes


def show(out: Path, *, language: str, seed: int) -> None:
    """Ask the small model samples of every skill, print answers beside truths, and save pictures of both.

    Args:
        out: an existing folder. A PNG for each skill is written to it, and the media that the model is shown to media/.
        language: the language of questions and answers, one of `LANGUAGES`, which the model was trained in.
        seed: the seed of the samples.

    Raises:
        CheckpointError: the small model is not there.
        DataError: an unknown language.
    """
    check_choice(language, LANGUAGES, "language")
    player = _Player(*load(assets.folder()), out, language=language, seed=seed)
    answers: dict[str, list[Answered]] = {}
    for skill, (title, each) in _PARTS.items():
        with step(title):
            found = answers[skill] = []
            for level in sorted(SCOPE[skill]):
                for index in range(each):
                    found.append(player.answer(skill, level, index))
                    _print(found[-1])
            draw_sheet(found).save(out / f"{skill}.png")
    _print_total(answers, player, out)


class _Player:
    """The model, asked about one sample at a time.

    Args:
        out: the demo's folder; media are written to media/ in it.
        language, seed: of the samples.
    """

    def __init__(self, processor: Processor, model: Qwen2VL, out: Path, *, language: str, seed: int):
        self.processor = processor
        self.model = model
        self.out = out
        self.config = GenerationConfig.from_model(model, max_new_tokens=_NEW_TOKENS, do_sample=False)
        self.samples: dict[str, Any] = {"seed": seed, "languages": (language,)}
        self.made: dict[str, int] = {}  # skill -> samples so far
        (out / "media").mkdir(exist_ok=True)

    def answer(self, skill: str, level: int, index: int) -> Answered:
        self.made[skill] = self.made.get(skill, 0) + 1
        if skill == "screen":
            return self._game(play(level, index=index, **self.samples))
        return self._question(make_sample(skill, level, index=index, split="held-out", **self.samples))

    def _question(self, sample: Sample) -> Answered:
        pictures = [Image.fromarray(from_ppm(data)) for data in sample.members.values()]
        (message,) = prompt_of(sample)
        files, content = self._files(sample, pictures, message["content"])
        begin = time.perf_counter()
        inputs = self.processor([{"role": "user", "content": content}])
        (ids,) = generate(self.model, inputs, config=self.config).sequences
        text = self.processor.decode(ids, skip_special_tokens=False)
        seconds = time.perf_counter() - begin
        scored = score(sample, text)
        answer, truth, note = scored.answer, sample.answer, ""
        scale = fitting_scale(pictures, lines=2, most=_SCALE)
        shown = [enlarge(picture, scale) for picture in pictures]
        if sample.skill == "point":
            found = parse_grounding(scored.answer)
            shown = [_draw_places(shown[0], found, sample.places)]
            answer, truth = _places(found) or answer, _places(sample.places)
            note = f"IoU {scored.scores['IoU']:.2f}"
        return Answered(
            shown,
            files,
            content[-1]["text"],
            _short(answer),
            _short(truth),
            scored.scores["accuracy"] == 1,
            [seconds],
            note,
            sample.skill == "point",
        )

    def _files(
        self, sample: Sample, pictures: Sequence[Image.Image], content: Sequence[Mapping[str, Any]]
    ) -> tuple[str, list[dict[str, Any]]]:
        """Write the media; returns their name, and the message's content with files in place of pixels."""
        name = f"media/{sample.skill}-{self.made[sample.skill]}"
        if sample.skill == "video":
            file = self.out / f"{name}.mp4"
            try:
                write_frames(file, pictures, size=sample.size, fps=_FPS)
            except MediaError as error:
                if self.made["video"] == 1:
                    console.print(f"  [yellow]frames as a list: {escape(str(error))}[/]")
                return f"{len(pictures)} frames, {_size(pictures[0])}", [dict(item) for item in content]
            said = f"{name}.mp4, {_size(pictures[0])}"
            return said, [{**item, "video": file} if "video" in item else dict(item) for item in content]
        names = [f"{name}.png"] if len(pictures) == 1 else [f"{name}{letter}.png" for letter in "ab"]
        for picture, one in zip(pictures, names, strict=True):
            picture.save(self.out / one)
        files = iter(names)
        given = [{**item, "image": self.out / next(files)} if "image" in item else dict(item) for item in content]
        return " and ".join(f"{one}, {_size(picture)}" for one, picture in zip(names, pictures, strict=True)), given

    def _game(self, game: ScreenGame) -> Answered:
        write = model_writer(self.model, self.processor, config=self.config)
        seconds: list[float] = []

        def timed(messages: Sequence[Mapping[str, Any]]) -> str:
            begin = time.perf_counter()
            text = write(messages)
            seconds.append(time.perf_counter() - begin)
            return text

        watched = _Watched(game)
        episode = run_agent(timed, watched, max_steps=_MAX_ACTIONS, max_errors=1)
        problem = next((one.error for one in episode.steps if one.error), "")
        screen = enlarge(game.draw(), _GAME_SCALE)
        return Answered(
            [*watched.screens, screen],
            f"game {self.made['screen']}, {_size(screen, _GAME_SCALE)}",
            game.instruction,
            _short("; ".join(watched.said) or " / ".join(one.text for one in episode.steps)),
            "; ".join(f'{task.kind} "{task.text}"' if task.text else f"{task.kind} the field" for task in game.tasks),
            game.success,
            seconds,
            ("won" if game.success else "lost" if game.done else "not finished") + (problem and f": {problem}"),
        )


class _Watched:
    """A game with a spectator: an environment that passes every call on to the game and notes it.

    Attributes:
        screens: the screen before every action, enlarged, with the tap marked.
        said: every action in words, with what it hit.
    """

    def __init__(self, game: ScreenGame):
        self.game = game
        self.actions = game.actions
        self.screens: list[Image.Image] = []
        self.said: list[str] = []

    @property
    def done(self) -> bool:
        return self.game.done

    def reset(self) -> list[dict[str, Any]]:
        return self.game.reset()

    def execute(self, call: Call) -> Result:
        screen, before = enlarge(self.game.draw(), _GAME_SCALE), len(self.game.pressed)
        result = self.game.execute(call)  # a call that it refuses is not played
        if call.name == TAP.name:
            point = parse_point(call.arguments["point"])
            _mark_tap(screen, to_pixels(point, *screen.size))
            hit = [f'"{label}"' if label else "the field" for _, label in self.game.pressed[before:]]
            self.said.append(f"tap ({point[0]},{point[1]}), on {' and '.join(hit) or 'nothing'}")
        else:
            self.said.append(f'type "{call.arguments["text"]}"')
        self.screens.append(screen)
        return result


def _mark_tap(screen: Image.Image, at: tuple[float, float]) -> None:
    draw = ImageDraw.Draw(screen)
    for radius, colour, width in ((13, "white", 5), (12, ANSWER, 3)):
        draw.ellipse([at[0] - radius, at[1] - radius, at[0] + radius, at[1] + radius], outline=colour, width=width)
    draw.ellipse([at[0] - 3, at[1] - 3, at[0] + 3, at[1] + 3], fill=ANSWER, outline="white")


def _short(text: str) -> str:
    """The text on one line, cut to `_LONGEST` characters: a model that goes astray may never stop."""
    line = text.replace("\n", " / ")
    return line if len(line) <= _LONGEST else line[:_LONGEST] + " ..."


def _draw_places(picture: Image.Image, found: Sequence[Grounded], truth: Sequence[Grounded]) -> Image.Image:
    """The picture with answer and truth drawn in, in the two colours of the sheet's legend."""
    # Without phrases, which would cover a small picture. draw_grounding's first two colours are those of the legend.
    both = [Grounded(None, tuple(place for item in items for place in item.places)) for items in (found, truth)]
    return draw_grounding(picture, both, width=3)


def _size(picture: Image.Image, scale: int = 1) -> str:
    return f"{picture.width // scale} × {picture.height // scale}"


def _places(items: Sequence[Grounded]) -> str:
    """Phrases and points in words, without the markup."""
    said = []
    for item in items:
        boxes = " and ".join(",".join(f"({x},{y})" for x, y in place.points) for place in item.places)
        said.append(f"{item.phrase or ''} {boxes}".strip())
    return "; ".join(said)


# ------------------------------------------------------------------------------------------------------------ printing


def _print(one: Answered) -> None:
    colour = "green" if one.right else "red"
    console.print(f"  [dim]{escape(one.name)}[/]  {escape(one.asked)}")
    answer, truth, said = (escape(printable(text)) for text in (one.answer, one.truth, verdict(one)))
    console.print(f"    answer [bold]{answer}[/]   truth {truth}   [{colour}]{said}[/]")


def _print_total(answers: Mapping[str, Sequence[Answered]], player: _Player, out: Path) -> None:
    counts = {skill: (sum(one.right for one in found), len(found)) for skill, found in answers.items()}
    right, total = (sum(numbers) for numbers in zip(*counts.values(), strict=True))
    each = ", ".join(f"{skill} {good} of {number}" for skill, (good, number) in counts.items())
    console.print(f"\n[bold]{right} of {total} right[/]: {each}")
    times = list(_seconds(answers))
    console.print(
        f"An answer, or an action of a game, took {statistics.median(times):.2f} s in the median and "
        f"{max(times):.2f} s at most, on {player.model.device}."
    )
    sheets = ", ".join(f"{skill}.png" for skill in answers)
    console.print(
        f"Pictures with answers and truths: {sheets}; what the model was shown: media/; all in {escape(str(out))}"
    )
    file = escape(str(out / "media" / "read-1.png"))
    console.print(
        "The model is a toy, trained on pictures of this kind alone. To ask it yourself: "
        f'qwen2vl generate --image {file} --prompt "Read the text."'
    )


def _seconds(answers: Mapping[str, Sequence[Answered]]) -> Iterator[float]:
    for found in answers.values():
        for one in found:
            yield from one.seconds
