"""Samples of `qwen2vl.samples` as a source beside files: split over ranks and workers, resumed by a number."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ...errors import DataError
from ...samples.sample import Sample, from_ppm
from ...samples.skills import Split, generate
from .entry import DataEntry
from .json_files import Raw, State
from .records import read_record


class Generated:
    """Samples of some skills and difficulties, each drawn equally often.

    Sample n is the same whoever reads it: its skill and difficulty are drawn by n, and n is its index.

    Args:
        skills, difficulties: see `qwen2vl.samples.skills.generate`.
        seed: any ints.
        samples: how many make an epoch; None: it never ends.
    """

    def __init__(
        self,
        skills: Sequence[str],
        difficulties: Sequence[int] = (0,),
        *,
        seed: Sequence[int] = (0,),
        split: Split = "train",
        samples: int | None = None,
    ):
        self.choices = [(skill, difficulty) for skill in skills for difficulty in difficulties]
        self.seed = list(seed)
        self.split: Split = split
        self.samples = samples

    def read(self, consumer: int, consumers: int, epochs: int | None, state: State) -> Iterator[tuple[Raw, State]]:
        """The samples of one of several consumers, every `consumers`-th, each with the state that continues behind it.

        Args:
            epochs: times `samples` of them, None for no end.
            state: {} to begin, or one of those given.
        """
        if epochs is not None and self.samples is None:
            raise DataError("samples: wants a number, or epochs never end")
        n = state.get("next", consumer)
        while epochs is None or self.samples is None or n < epochs * self.samples:
            raw = raw_sample(self.sample(n))
            n += consumers
            yield raw, {"next": n}

    def sample(self, n: int) -> Sample:
        """Sample n, counted from 0."""
        rng = np.random.default_rng([*self.seed, n])
        skill, difficulty = self.choices[int(rng.integers(len(self.choices)))]
        return generate(skill, difficulty, seed=self.seed, index=n, split=self.split)


def raw_sample(sample: Sample) -> Raw:
    """The sample as a shard would give it, except that its pictures are pixels: decoding costs more than drawing."""
    source = f"generated:{sample.skill}-{sample.difficulty}:{sample.split}:{sample.index}"
    record = json.dumps(sample.record, ensure_ascii=False).encode("utf-8")
    return Raw(source, record, None, {name: from_ppm(data) for name, data in sample.members.items()})


def read_sample(sample: Sample) -> list[dict[str, Any]]:
    """Its messages, the assistant's included, as training reads them: `Processor.supervised` takes them, and without
    the last one, `Processor` itself, for a model to answer."""
    _, messages = read_record(raw_sample(sample), DataEntry(sample.skill, "generated"))
    return messages
