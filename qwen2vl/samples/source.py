"""Generated samples as training data: what `format = "generated"` reads in the place of files.

`qwen2vl.training.data` imports this module when an entry names the format.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ..errors import DataError
from ..training.data.entry import DataEntry
from ..training.data.json_files import Raw, State
from ..training.data.records import read_record
from .sample import Sample, from_ppm
from .skills import Split, generate
from .words import LANGUAGES


class Generated:
    """An endless row of samples of some skills and difficulties, each equally likely.

    Sample n is the same for every consumer: n decides its skill and difficulty, and is its index.

    Args:
        skills, difficulties, split, languages: see `qwen2vl.samples.skills.generate`.
        seed: whole numbers not below 0.
        samples: how many make an epoch; with None there are no epochs.
    """

    def __init__(
        self,
        skills: Sequence[str],
        difficulties: Sequence[int] = (0,),
        *,
        seed: Sequence[int] = (0,),
        split: Split = "train",
        languages: Sequence[str] = tuple(LANGUAGES),
        samples: int | None = None,
    ):
        self.choices = [(skill, difficulty) for skill in skills for difficulty in difficulties]
        self.seed = list(seed)
        self.split: Split = split
        self.languages = tuple(languages)
        self.samples = samples

    def read(self, consumer: int, consumers: int, epochs: int | None, state: State) -> Iterator[tuple[Raw, State]]:
        """The share of one of several consumers: every `consumers`-th sample, with the state to continue behind it.

        Args:
            epochs: end after so many times `samples`; with None there is no end.
            state: {} to begin, or a state that came with a sample.

        Raises:
            DataError: epochs without `samples` would never end.
        """
        if epochs is not None and self.samples is None:
            raise DataError("samples: wants a number, or epochs never end")
        n = state.get("next", consumer)
        while epochs is None or self.samples is None or n < epochs * self.samples:
            raw = raw_sample(self.sample(n))
            n += consumers
            yield raw, {"next": n}

    def epoch(self, consumer: int, consumers: int, state: State) -> float | None:
        """Epochs that lie behind a state of one of several consumers; None where there are none."""
        return None if self.samples is None else (state.get("next", consumer) - consumer) / self.samples

    def sample(self, n: int) -> Sample:
        """Sample n, counted from 0."""
        rng = np.random.default_rng([*self.seed, n])
        skill, difficulty = self.choices[int(rng.integers(len(self.choices)))]
        return generate(skill, difficulty, seed=self.seed, index=n, split=self.split, languages=self.languages)


def raw_sample(sample: Sample) -> Raw:
    """The sample as a shard would give it, with pixels in place of image files: decoding costs more than drawing."""
    source = f"generated:{sample.skill}-{sample.difficulty}:{sample.split}:{sample.index}"
    record = json.dumps(sample.record, ensure_ascii=False).encode("utf-8")
    return Raw(source, record, None, {name: from_ppm(data) for name, data in sample.members.items()})


def read_sample(sample: Sample) -> list[dict[str, Any]]:
    """The sample's messages, the assistant's included, as training reads them.

    `Processor.supervised` takes them; `Processor` itself takes those before the last one, for a model to answer.
    """
    _, messages = read_record(raw_sample(sample), DataEntry(sample.skill, "generated"))
    return messages
