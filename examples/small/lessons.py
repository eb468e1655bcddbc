"""Training data in laps: every lap has proportions of its own, which come from what was measured before it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from qwen2vl.errors import DataError
from qwen2vl.prompt.processor import Messages, Processor
from qwen2vl.prompt.tokenizer import Tokenizer
from qwen2vl.samples.draws import Draws
from qwen2vl.training.data import TrainingData, build_dataset
from qwen2vl.training.example import Example

from .dialogues import dialogue
from .looking import Gaze, gazes
from .plan import Level, entries
from .tokenizer import LANGUAGES

#: The seeds of a run's laps begin at so many times its own, so that no two laps of any runs draw the same samples.
_LAPS = 10_000


class Lessons:
    """A stream of examples for :class:`qwen2vl.training.trainer.Trainer`, resumed exactly wherever it is cut.

    Attributes:
        laps: for each lap the number of examples before it, and the share of every level in it. A run that is resumed
            is given those that it had; :meth:`begin_lap` adds one.
        dialogues: the share of examples that are none of these, but dialogues.
        drawn: the number of examples that were given so far.
        looked: source of a dialogue -> what its tokens look at. Who learns from it takes it out.
    """

    def __init__(
        self,
        processor: Processor,
        laps: Sequence[tuple[int, Mapping[Level, float]]],
        *,
        seed: int,
        max_tokens: int,
        ahead: int = 64,
        rank: int = 0,
        world: int = 1,
        dialogues: float = 0.0,
    ):
        self.processor = processor
        self.laps: list[tuple[int, Mapping[Level, float]]] = list(laps)
        self.seed = seed
        self.max_tokens = max_tokens
        self.ahead = ahead
        self.rank, self.world, self.dialogues = rank, world, dialogues
        self._texts = texts_of(processor.tokenizer)
        self.drawn = 0
        self.looked: dict[str, list[Gaze]] = {}
        self._lap = 0
        self._data: TrainingData | None = None

    def begin_lap(self, drawn: Mapping[Level, float]) -> None:
        """Give the next examples in other proportions."""
        self.laps.append((self.drawn, drawn))

    def __iter__(self) -> Iterator[Example]:
        while True:
            ahead = [n for n, (first, _) in enumerate(self.laps) if first <= self.drawn]
            if self._data is None or ahead[-1] != self._lap:
                self._lap, self._data = ahead[-1], self._of_lap(ahead[-1])
            samples = iter(self._data)
            while self._lap + 1 == len(self.laps) or self.laps[self._lap + 1][0] > self.drawn:
                example = self._dialogue() or next(samples, None)
                if example is None:
                    raise DataError("lessons: the data ended, which generated samples never do")
                self.drawn += 1
                yield in_hundredths(example, self._texts)

    def _dialogue(self) -> Example | None:
        """The next example where it is one of the dialogues, which depend on its number and on nothing else."""
        rng = np.random.default_rng([self.seed, self.rank, self.drawn])
        if not self.dialogues or rng.random() >= self.dialogues:
            return None
        messages, looks = dialogue(Draws(rng, languages=LANGUAGES))
        source = f"dialogue:{self.rank}:{self.drawn}"
        example = example_of(self.processor, messages, source)
        self.looked[source] = gazes(example, looks, self._texts)
        return example

    def _of_lap(self, lap: int) -> TrainingData:
        return build_dataset(
            entries(self.laps[lap][1]),
            self.processor,
            seed=_LAPS * self.seed + lap,
            rank=self.rank,
            world=self.world,
            max_tokens=self.max_tokens,
            max_bad=0,
            threads=1,
            ahead=self.ahead,
        )

    def state_dict(self) -> dict[str, Any]:
        """The place behind the last example given."""
        return {
            "drawn": self.drawn,
            "lap": self._lap,
            "data": None if self._data is None else self._data.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was called.

        Raises:
            DataError: the state is of a lap that is not there.
        """
        if state["lap"] >= len(self.laps):
            raise DataError(f"state.lap: is {state['lap']}, but there are {len(self.laps)} laps")
        self.drawn, self._lap, self._data = state["drawn"], state["lap"], None
        if state["data"] is not None:
            self._data = self._of_lap(self._lap)
            self._data.load_state_dict(state["data"])


def example_of(processor: Processor, messages: Messages, source: str = "") -> Example:
    """What a conversation about pictures teaches."""
    inputs = processor.supervised(messages)
    media = {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}
    return Example(inputs["input_ids"][0], inputs["labels"][0], **media, source=source)


def texts_of(tokenizer: Tokenizer) -> list[str]:
    """What each token of the vocabulary stands for."""
    return [tokenizer.decode([token], skip_special_tokens=False) for token in range(tokenizer.backend.get_vocab_size())]


def in_hundredths(example: Example, texts: Sequence[str]) -> Example:
    """The example with a 5 as the last digit of every coordinate that it teaches; 1000 stays as it is.

    A coordinate is a few hundredths wrong at best, so that the last digit is noise: most of what the gradient of a box
    would say, and nothing that could be learned.

    Args:
        texts: what :func:`texts_of` says of the tokenizer.
    """
    ids, labels, first = example.input_ids.clone(), example.labels.clone(), -1
    for n, text in enumerate([texts[int(token)] for token in ids]):
        if text.isascii() and text.isdigit():
            first = n if first < 0 else first
            continue
        taught = first > 0 and labels[first] >= 0 and n - first < 4 and text.startswith((",", ")"))
        if taught and texts[int(ids[first - 1])].endswith(("(", ",")):
            ids[n - 1] = labels[n - 1] = texts.index("5")
        first = -1
    return replace(example, input_ids=ids, labels=labels)
