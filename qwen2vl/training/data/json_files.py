"""JSON and JSONL files, read by position: any order, any start, without holding the file in memory."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...errors import DataError
from ...files import open_regular

_CHUNK_BYTES = 16 << 20
MAX_ARRAY = 2 << 30  # bytes of a file that holds one array
MAX_RECORD = 64 << 20  # bytes; of media a record has the paths alone
State = dict[str, int]


@dataclass(frozen=True)
class Raw:
    """A sample before it is looked into.

    Attributes:
        source: its position, "data.jsonl:17" or "shard-0003.tar:000042".
        text: its JSON, or empty.
        folder: what paths of media start from; None where media are `members`.
        members: a shard's files of the sample, by what follows the first dot of their names, in order; or media that
            are decoded already, as arrays.
        error: why it could not be read at all.
    """

    source: str
    text: bytes = b""
    folder: str | None = None
    members: dict[str, Any] = field(default_factory=dict)
    error: str = ""


class JsonFiles:
    """Samples of one or more files, one of a line or one of an element of a file's array.

    Args:
        paths: files; an array's file is parsed whole once, a file of lines is only searched for line ends. A file
            whose name ends in .jsonl or .ndjson, or whose first character is no `[`, is one of lines.
        media_root: folder for paths of media, by default each file's own.
        seed: of the order, any ints; None reads in the files' order.

    Raises:
        DataError: a file cannot be read, is no UTF-8 where it holds an array, or the array breaks off, with its line.
    """

    def __init__(self, paths: Sequence[str], *, media_root: str | None = None, seed: Sequence[int] | None = None):
        self.paths = [os.path.abspath(path) for path in paths]
        self.names = list(paths)
        self.media_root = media_root
        self.seed = seed
        # For every record the place of its first byte, the place behind its last, and its line, counted from 1.
        self._spans: list[np.ndarray] = []
        for path, name in zip(self.paths, self.names, strict=True):
            try:
                self._spans.append(_index(path, name))
            except OSError as error:
                raise DataError(f"cannot be read: {error.strerror or error}", name) from error
        self._ends = np.cumsum([len(spans) for spans in self._spans])
        if not len(self):
            raise DataError("holds no record", ", ".join(self.names))

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, consumer: int, consumers: int, epochs: int | None, state: State) -> Iterator[tuple[Raw, State]]:
        """The samples of one of several consumers, each with the state that continues behind it.

        Counting goes on over the epochs, `n` samples each: a consumer takes every `consumers`-th, so that the samples
        of one epoch are dealt out completely, none twice, and none goes without where there are fewer than consumers.

        Args:
            epochs: passes over the files, None for no end.
            state: {} to begin, or one of those given.

        Raises:
            DataError: the state is of other files.
        """
        total = len(self)
        if state and state.get("records") != total:
            raise DataError(f"state: is about {state.get('records')} records, but there are {total}", self.names[0])
        files: dict[int, int] = {}
        order, order_epoch = None, -1
        n = state.get("next", consumer)
        try:
            while epochs is None or n < epochs * total:
                epoch, place = divmod(n, total)
                if self.seed is not None and epoch != order_epoch:
                    order = np.random.default_rng([*self.seed, epoch]).permutation(total)
                    order_epoch = epoch
                n += consumers
                index = place if order is None else int(order[place])
                yield self._raw(index, files), {"next": n, "records": total}
        finally:
            for descriptor in files.values():
                os.close(descriptor)

    def epoch(self, consumer: int, consumers: int, state: State) -> float:
        """Passes over the files that lie behind a state of one of several consumers."""
        return (state.get("next", consumer) - consumer) / len(self)

    def _raw(self, index: int, files: dict[int, int]) -> Raw:
        which = int(np.searchsorted(self._ends, index, side="right"))
        start, end, line = self._spans[which][index - int(self._ends[which])].tolist()
        source = f"{self.names[which]}:{line}"
        folder = self.media_root or os.path.dirname(self.paths[which])
        if end - start > MAX_RECORD:
            return Raw(source, error=f"wants a record of at most {MAX_RECORD >> 20} MB, got {end - start} bytes")
        try:
            if which not in files:
                files[which] = os.open(self.paths[which], os.O_RDONLY)
            text = os.pread(files[which], end - start, start)
        except OSError as error:
            return Raw(source, error=f"cannot be read: {error.strerror or error}")
        return Raw(source, text, folder)


def parse_object(text: bytes) -> dict[str, Any]:
    """A record's JSON object. Raises DataError."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise DataError(f"is no JSON: {error}") from None
    if not isinstance(record, dict):
        raise DataError(f"wants a JSON object, got {type(record).__name__}")
    return record


def _index(path: str, name: str) -> np.ndarray:
    """(n, 3) int64: start, end and line of every record."""
    with open_regular(path) as file:
        head = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if head.startswith(b"[") and not path.endswith((".jsonl", ".ndjson")):
        return _index_array(path, name)
    return _index_lines(path)


def _index_lines(path: str) -> np.ndarray:
    """The lines that hold something, found chunk by chunk: empty ones, of which a file may be full, are never held."""
    found: list[np.ndarray] = []
    size, begin, line, last = 0, 0, 1, b"\n"  # bytes read; start and number of the line that goes on; the last byte
    with open_regular(path) as file:
        while chunk := file.read(_CHUNK_BYTES):
            data = np.frombuffer(last + chunk, np.uint8)
            ends = np.flatnonzero(data[1:] == ord("\n")) + size
            found.append(_filled(data, size - 1, np.concatenate([[begin - 1], ends]), line))
            size, last = size + len(chunk), chunk[-1:]
            if len(ends):
                begin, line = int(ends[-1]) + 1, line + len(ends)
        found.append(_filled(np.frombuffer(last, np.uint8), size - 1, np.array([begin - 1, size]), line))
    return np.concatenate(found)


def _filled(data: np.ndarray, offset: int, breaks: np.ndarray, line: int) -> np.ndarray:
    """(n, 3) int64: start, end and number of the lines between neighbouring `breaks`, the first of which is `line`,
    without those that are empty or hold but the first half of a Windows line end.

    `data`: bytes from `offset` on; a line of one byte lies in them."""
    starts, ends = breaks[:-1] + 1, breaks[1:]
    rows = np.flatnonzero(ends > starts)
    single = rows[ends[rows] - starts[rows] == 1]
    rows = np.setdiff1d(rows, single[data[starts[single] - offset] == ord("\r")], assume_unique=True)
    return np.stack([starts[rows], ends[rows], rows + line], 1).astype(np.int64)


def _index_array(path: str, name: str) -> np.ndarray:
    """The elements' places in bytes. They are parsed to find their ends, and dropped."""
    with open_regular(path) as file:
        data = file.read(MAX_ARRAY + 1)
    if len(data) > MAX_ARRAY:
        raise DataError(
            f"wants an array of at most {MAX_ARRAY >> 20} MB, which is held as a whole; write a record a line (.jsonl)",
            name,
        )
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"is no UTF-8 text: {error.reason}", f"{name}:{line}") from None
    del data
    at = text.index("[") + 1
    place = len(text[:at].encode("utf-8"))  # the same in bytes
    line = text.count("\n", 0, at) + 1
    decoder = json.JSONDecoder()
    spans: list[tuple[int, int, int]] = []

    def skip(to: int) -> None:
        nonlocal at, place, line
        passed = text[at:to]
        at, place, line = to, place + len(passed.encode("utf-8")), line + passed.count("\n")

    def space() -> str:
        end = at
        while end < len(text) and text[end] in " \t\r\n":
            end += 1
        skip(end)
        return text[at : at + 1]

    while space() != "]" or spans:
        try:
            _, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise DataError(f"is no JSON array: {error}", f"{name}:{error.lineno}") from None
        except RecursionError:
            raise DataError("is nested too deeply", f"{name}:{line}") from None
        start = (place, line)
        skip(end)
        spans.append((start[0], place, start[1]))
        mark = space()
        if mark == "]":
            break
        if mark != ",":
            raise DataError(f"is no JSON array: wants , or ] and got {mark!r}", f"{name}:{line}")
        skip(at + 1)
    skip(at + 1)
    if rest := space():
        raise DataError(f"goes on behind its array, with {rest!r}", f"{name}:{line}")
    return np.array(spans, dtype=np.int64).reshape(-1, 3)
