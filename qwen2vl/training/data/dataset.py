"""A mixture of sets of samples as one stream of examples: deterministic, split over ranks and workers, resumable."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch.utils.data import IterableDataset, get_worker_info

from ...errors import MAX_SOURCE, DataError, MediaError, Qwen2VLError, readable
from ...media.options import Access
from ...prompt.processor import IGNORED, Processor
from ..example import Example
from .entry import DataEntry, Format, check_count
from .json_files import JsonFiles, Raw, State
from .records import read_record
from .report import DataReport, Problem
from .shards import Shards, expand

if TYPE_CHECKING:
    from ...samples.source import Generated

logger = logging.getLogger("qwen2vl.training.data")
MAX_BAD_IN_A_ROW = 1000


def build_dataset(
    entries: Sequence[Mapping[str, Any]],
    processor: Processor,
    *,
    seed: int = 0,
    rank: int = 0,
    world: int = 1,
    max_tokens: int,
    epochs: int | None = None,
    max_bad: int | None = 100,
    threads: int = 2,
    ahead: int | None = None,
) -> TrainingData:
    """The data set that the tables of a configuration file describe.

    Args:
        entries: tables with the keys of :class:`DataEntry`, at least `path` and `format`.
        processor: what samples are tokenised and their media are preprocessed with.
        seed: of all orders. rank, world: which share of the samples this process reads, of how many.
        max_tokens: samples with more are reported and skipped; nothing is ever cut.
        epochs: passes over every entry, None for no end.
        max_bad: so many positions may turn out malformed, or their media unreadable, before reading stops with an
            error; 0 raises at the first, None never does for their number.
        threads: that prepare samples ahead; 0 prepares each when it is asked for. Results do not depend on it. Workers
            of a DataLoader prepare by themselves.
        ahead: samples that the threads may prepare before they are asked for; default two a thread.

    Raises:
        DataError: naming the entry and key that is wrong, or the file that is missing or cannot be read.
    """
    if not isinstance(entries, (list, tuple)) or not entries:
        raise DataError(f"data: wants a list of at least one table, got {entries!r}")
    read = [DataEntry.from_config(entry, f"data[{n}]") for n, entry in enumerate(entries)]
    return TrainingData(
        read,
        processor,
        seed=seed,
        rank=rank,
        world=world,
        max_tokens=max_tokens,
        epochs=epochs,
        max_bad=max_bad,
        threads=threads,
        ahead=ahead,
    )


def read_examples(
    path: str,
    processor: Processor,
    *,
    format: Format = "conversations",
    max_tokens: int = 32768,
    max_bad: int | None = 0,
    **options: Any,
) -> Iterator[Example]:
    """The examples of one set, once and in order.

    Args:
        options: further keys of :class:`DataEntry`.

    Raises:
        DataError: with the position of the sample; see :func:`build_dataset`, whose arguments the others are.
    """
    entry = {"path": path, "format": format, "shuffle": False, **options}
    return iter(build_dataset([entry], processor, max_tokens=max_tokens, epochs=1, max_bad=max_bad, threads=0))


class TrainingData(IterableDataset[Example]):
    """A stream of examples; see :func:`build_dataset`, which makes one from tables.

    Entries are drawn in the proportions of their weights, as evenly as whole samples allow and in the same sequence on
    every rank; with `epochs` an entry that is used up drops out. What is drawn depends on the arguments alone: not on
    threads, nor on which samples turn out to be bad.

    Iterating goes on where the last iteration was left, and `state_dict` is about the examples that were given: one
    loaded into an equal data set gives the next one. Under a DataLoader with workers, each worker reads a share of its
    own; the state is then in the workers, where torchdata's StatefulDataLoader finds it. With `num_workers=0` and
    `threads` the state is here.

    Attributes:
        report: what was used and what was skipped, and why.
    """

    def __init__(
        self,
        entries: Sequence[DataEntry],
        processor: Processor,
        *,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        max_tokens: int,
        epochs: int | None = None,
        max_bad: int | None = 100,
        threads: int = 2,
        ahead: int | None = None,
    ):
        super().__init__()
        self.entries = tuple(entries)
        self.processor = processor
        self.seed = check_count(seed, "seed", least=0)
        self.world = check_count(world, "world")
        self.rank = check_count(rank, "rank", least=0)
        if rank >= world:
            raise DataError(f"rank: wants less than world = {world}, got {rank}")
        self.max_tokens = check_count(max_tokens, "max_tokens")
        self.epochs = None if epochs is None else check_count(epochs, "epochs")
        self.max_bad = None if max_bad is None else check_count(max_bad, "max_bad", least=0)
        self.threads = check_count(threads, "threads", least=0)
        self.ahead = 2 * threads if ahead is None else check_count(ahead, "ahead")
        self.report = DataReport()
        self._sources = [self._source(n, entry) for n, entry in enumerate(self.entries)]
        # Where the reader of each entry stands, and how often the entry was drawn.
        self._states: list[State] = [{} for _ in self.entries]
        self._drawn = [0] * len(self.entries)
        self._consumers = (rank, world)  # whose states these are

    def _source(self, n: int, entry: DataEntry) -> JsonFiles | Shards | Generated:
        if entry.format == "generated":
            from ...samples.source import Generated  # only who asks for generated samples loads them

            if self.epochs is not None and entry.samples is None:
                raise DataError(
                    f"data[{n}].samples: is missing: with epochs an entry of generated samples needs an end"
                )
            options: dict[str, Any] = {"split": entry.split, "samples": entry.samples}
            if entry.languages is not None:
                options["languages"] = entry.languages
            return Generated(entry.paths, entry.difficulty, seed=[self.seed, n], **options)
        seed = [self.seed, n] if entry.shuffle else None
        if entry.format == "webdataset":
            # Where files may lie is said of what samples name, and the configuration names the shards.
            access = Access(remote=self.processor.access.remote)
            return Shards(entry.paths, seed=seed, access=access, max_bytes=entry.max_sample_bytes)
        return JsonFiles(expand(entry.paths), media_root=entry.media_root, seed=seed)

    def __iter__(self) -> Generator[Example, None, None]:
        worker = get_worker_info()
        consumer, consumers = self.rank, self.world
        if worker is not None:
            consumer, consumers = consumer * worker.num_workers + worker.id, consumers * worker.num_workers
        if (consumer, consumers) != self._consumers:
            if any(self._states):
                raise DataError(
                    f"state: is about part {self._consumers[0]} of {self._consumers[1]}, but this is part {consumer} "
                    f"of {consumers}; load a state inside of the workers, or read with num_workers=0"
                )
            self._consumers = (consumer, consumers)
        failed = [0] * len(self.entries)  # in a row
        planned = self._plan(consumer, consumers)
        for n, state, outcome in _ahead(planned, self._prepare, self.threads if worker is None else 0, self.ahead):
            self._states[n] = state
            self._drawn[n] += 1
            if isinstance(outcome, Example):
                failed[n] = 0
                self.report.used += 1
                yield outcome
                continue
            failed[n] += 1
            self._count(outcome)
            if failed[n] == MAX_BAD_IN_A_ROW:
                raise DataError(
                    f"{failed[n]} samples in a row could not be used, the last one {outcome.reason}: {outcome.message}",
                    ", ".join(self.entries[n].paths),
                )

    def _plan(self, consumer: int, consumers: int) -> Iterator[tuple[int, State, Raw]]:
        """The samples in order: entry, the entry's state behind it, the sample unprepared."""
        readers = [
            source.read(consumer, consumers, self.epochs, state)
            for source, state in zip(self._sources, self._states, strict=True)
        ]
        drawn = list(self._drawn)
        live = set(range(len(readers)))
        while live:
            # The share that lags most comes next (Webster's rule): each is within a sample or two of its weight.
            n = min(live, key=lambda i: ((drawn[i] + 0.5) / self.entries[i].weight, i))
            found = next(readers[n], None)
            if found is None:
                live.remove(n)
                continue
            drawn[n] += 1
            yield n, found[1], found[0]

    def _prepare(self, n: int, raw: Raw) -> Example | Problem:
        """The example of a sample, or what is wrong with it."""
        source = readable(raw.source, MAX_SOURCE)
        if raw.error:
            return Problem(raw.source, "media", readable(f"{source}: {raw.error}"))
        try:
            return self._example(self.entries[n], raw)
        except _TooLong as error:
            return Problem(raw.source, "too long", f"{source}: {error}")
        except MediaError as error:
            return Problem(raw.source, "media", f"{source}: {error}")
        except Qwen2VLError as error:
            return Problem(raw.source, "malformed", f"{source}: {error}")
        except Exception as error:
            raise RuntimeError(readable(f"{source}: {type(error).__name__}: {error}")) from error

    def _example(self, entry: DataEntry, raw: Raw) -> Example:
        # With roots the processor says what may be opened; else a record names files of its own folder.
        anywhere = self.processor.access.roots is not None
        kind, content = read_record(raw, entry, self.processor.default_system_prompt, anywhere=anywhere)
        if kind == "conversation":
            inputs = self.processor.supervised(content, add_vision_id=entry.add_vision_id, **entry.options)
        else:
            inputs = self.processor.supervised_document(content, **entry.options)
        ids, labels = inputs["input_ids"][0], inputs["labels"][0]
        if len(ids) > self.max_tokens:
            raise _TooLong(f"has {len(ids)} tokens, more than max_tokens = {self.max_tokens}")
        if not bool((labels[1:] != IGNORED).any()):
            raise DataError("has nothing to learn: no text of an assistant")
        media = {
            name: tensor for name, tensor in inputs.items() if name.startswith(("pixel_values", "image_", "video_"))
        }
        return Example(ids, labels, **media, source=raw.source)

    def _count(self, problem: Problem) -> None:
        if self.report.add(problem):
            logger.warning("sample skipped (%s): %s", problem.reason, problem.message)
        if self.max_bad is not None and self.report.bad > self.max_bad:
            text = problem.message.removeprefix(f"{readable(problem.source, MAX_SOURCE)}: ")
            if self.max_bad:
                text += f" (this is bad sample {self.report.bad}, and max_bad is {self.max_bad})"
            raise DataError(text, problem.source)

    @cached_property
    def _identity(self) -> dict[str, Any]:
        """What must be equal for a state to mean the same; weights and preprocessing may change, and so may the folder
        that all files are in."""
        entries = []
        for entry in self.entries:
            kept = {
                "path": [self._below(entry, path) for path in entry.paths],
                "format": entry.format,
                "shuffle": entry.shuffle,
            }
            if entry.format == "generated":
                kept |= {"difficulty": list(entry.difficulty), "split": entry.split, "samples": entry.samples}
                if entry.languages is not None:  # states of before there was a choice hold none
                    kept["languages"] = list(entry.languages)
            entries.append(kept)
        return {"seed": self.seed, "entries": entries}

    @cached_property
    def _folder(self) -> str:
        """The deepest folder that all local files are below; "" where there are none."""
        local = [path for entry in self.entries for path in entry.paths if _is_local(entry, path)]
        return os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in local]) if local else ""

    def _below(self, entry: DataEntry, path: str) -> str:
        return os.path.relpath(os.path.abspath(path), self._folder) if _is_local(entry, path) else path

    def state_dict(self) -> dict[str, Any]:
        """The place behind the last example given, as JSON can hold it."""
        return {
            **self._identity,
            "folder": self._folder,
            "part": list(self._consumers),
            "states": [dict(state) for state in self._states],
            "drawn": list(self._drawn),
            "report": self.report.state_dict(),
        }

    def epoch(self, state: Mapping[str, Any] | None = None) -> float | None:
        """Passes that lie behind a state, by default the present one, over the entry that is read the fastest.

        None where no entry has an end.
        """
        states = self._states if state is None else state["states"]
        passed = [source.epoch(*self._consumers, one) for source, one in zip(self._sources, states, strict=True)]
        return max((one for one in passed if one is not None), default=None)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on behind the example that `state_dict` was called after. An iteration under way does not notice.

        Raises:
            DataError: the state is of other entries, another seed or another rank, or of none.
        """
        for key, own in self._identity.items():
            if key not in state or state[key] != own:
                raise DataError(f"state.{key}: is {_short(state.get(key))}, but this data set has {_short(own)}")
        worker = get_worker_info()
        if worker is None and list(state["part"]) != [self.rank, self.world]:
            raise DataError(
                f"state.part: is (rank, world) = {tuple(state['part'])}, but this is {(self.rank, self.world)}"
            )
        self._consumers = (state["part"][0], state["part"][1])
        self._states = [dict(one) for one in state["states"]]
        self._drawn = list(state["drawn"])
        self.report.load_state_dict(state["report"], moved=(state["folder"], self._folder))


def _is_local(entry: DataEntry, path: str) -> bool:
    return entry.format != "generated" and "://" not in path


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 300 else f"{text[:300]}..."


class _TooLong(DataError):
    """A sample has more tokens than allowed."""


def _ahead(
    planned: Iterable[tuple[int, State, Raw]], prepare: Callable[[int, Raw], Any], threads: int, ahead: int
) -> Iterator[tuple[int, State, Any]]:
    """Each sample prepared, in order, up to ``ahead`` of them before they are asked for."""
    if threads == 0:
        for n, state, raw in planned:
            yield n, state, prepare(n, raw)
        return
    waiting: deque[tuple[int, State, Future[Any]]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="qwen2vl-data")
    try:
        for n, state, raw in planned:
            waiting.append((n, state, pool.submit(prepare, n, raw)))
            if len(waiting) > ahead:
                n, state, future = waiting.popleft()
                yield n, state, future.result()
        while waiting:
            n, state, future = waiting.popleft()
            yield n, state, future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
