"""WebDataset shards: tar files whose neighbouring members with one name, up to its first dot, make a sample.

A shard is searched for its members' headers when its turn comes, and its samples are then read by position: in any
order, from any start. Shards lie on disks, mounted or not, or behind http(s) addresses, which are fetched to a
temporary file for as long as they are read.
"""

from __future__ import annotations

import glob
import itertools
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np

from ...errors import DataError, MediaError
from ...media.options import ANYWHERE, Access
from ...media.sources import open_source
from .entry import DataEntry
from .json_files import Raw, State

MAX_SHARD_BYTES = 64 << 30  # of a shard that has to be fetched
_MAX_HEADER_BYTES = 64 << 10  # what a header is followed by, such as a long name: it is read, and copied, for each
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def expand(paths: Sequence[str]) -> list[str]:
    """Shards in order: ranges `{000..127}` written out, patterns matched against the disk.

    Raises:
        DataError: a range that runs backwards, or a pattern or path without a file.
    """
    found: list[str] = []
    for path in paths:
        for name in _expand_ranges(path):
            if "://" in name:
                found.append(name)
                continue
            matches = [name] if os.path.isfile(name) else sorted(glob.glob(name))
            if not matches:
                raise DataError("no such file, and no file matches", name)
            found += matches
    return found


def _expand_ranges(path: str) -> list[str]:
    pieces = _RANGE.split(path)  # text, first, last, text, first, last, ..., text
    choices: list[list[str]] = [[pieces[0]]]
    for first, last, text in zip(pieces[1::3], pieces[2::3], pieces[3::3], strict=True):
        if int(last) < int(first):
            raise DataError(f"{{{first}..{last}}} runs backwards", path)
        choices += [[str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)], [text]]
    return ["".join(parts) for parts in itertools.product(*choices)]


@dataclass
class _Sample:
    key: str
    members: list[tuple[str, int, int]] = field(default_factory=list)  # extension, offset, size
    error: str = ""


class Shards:
    """Samples of tar files.

    Args:
        paths: see :func:`expand`.
        seed: of the order of shards, and of samples in each; any ints. None reads in the order given.
        access: whether http(s) addresses may be fetched.
        max_bytes: the most of one sample.

    What a forged shard says of itself is not believed: a member must lie in the shard, and what is wrong is a sample
    with an error.

    Raises:
        DataError: no shard, or one that is not there.
    """

    def __init__(
        self,
        paths: Sequence[str],
        *,
        seed: Sequence[int] | None = None,
        access: Access = ANYWHERE,
        max_bytes: int = DataEntry.max_sample_bytes,
    ):
        self.shards = expand(paths)
        self.seed = seed
        self.access = access
        self.max_bytes = max_bytes

    def read(self, consumer: int, consumers: int, epochs: int | None, state: State) -> Iterator[tuple[Raw, State]]:
        """The samples of one of several consumers, each with the state that continues behind it.

        With at least as many shards as consumers each takes every `consumers`-th shard, counted on over the epochs;
        else all read every shard's headers and take every `consumers`-th sample. Either way the samples of one epoch
        are dealt out completely, none twice.

        Args:
            epochs: passes over the shards, None for no end.
            state: {} to begin, or one of those given.

        Raises:
            DataError: the state is of other shards.
        """
        total = len(self.shards)
        if state and state.get("shards") != total:
            raise DataError(f"state: is about {state.get('shards')} shards, but there are {total}", self.shards[0])
        whole = total >= consumers
        visit = state.get("visit", consumer if whole else 0)
        first = state.get("sample", 0)
        passed = state.get("passed", 0)  # samples of the shards before, where samples are dealt out
        while epochs is None or visit < epochs * total:
            epoch, place = divmod(visit, total)
            shard = place
            if self.seed is not None:
                shard = int(np.random.default_rng([*self.seed, epoch]).permutation(total)[place])
            with ExitStack() as stack:
                stream, samples = self._open(self.shards[shard], stack)
                order = np.arange(len(samples))
                if self.seed is not None:
                    order = np.random.default_rng([*self.seed, epoch, shard]).permutation(len(samples))
                for n in range(first, len(samples)):
                    if whole or (passed + n) % consumers == consumer:
                        after = {"visit": visit, "sample": n + 1, "passed": passed, "shards": total}
                        after["samples"] = len(samples)  # of this shard
                        yield _read(stream, self.shards[shard], samples[order[n]], self.max_bytes), after
            passed, first = passed + len(samples), 0
            visit += consumers if whole else 1

    def epoch(self, consumer: int, consumers: int, state: State) -> float:
        """Passes over the shards that lie behind a state of one of several consumers."""
        if not state:
            return 0.0
        total, inside = len(self.shards), state["sample"] / state["samples"]
        if total >= consumers:
            return (state["visit"] - consumer + consumers * inside) / total
        return (state["visit"] + inside) / total

    def _open(self, path: str, stack: ExitStack) -> tuple[BinaryIO | None, list[_Sample]]:
        """The shard's stream and samples; what cannot be read is a sample with an error."""
        try:
            stream = stack.enter_context(open_source(path, max_bytes=MAX_SHARD_BYTES, access=self.access))
        except MediaError as error:
            return None, [_Sample("", error=str(error))]
        samples: list[_Sample] = []
        headers = _Headers(stream)
        try:
            with tarfile.open(fileobj=headers, mode="r:") as archive:  # type: ignore[call-overload]
                for member in archive:
                    if member.isfile():
                        _add(samples, member)
                    headers.check(member)
                    # The archive would keep every header, and shards have many.
                    archive.members = []  # type: ignore[attr-defined]
                headers.check_end(archive.offset)  # type: ignore[attr-defined]
        except Exception as error:  # tarfile trips over what is forged in many ways, RecursionError among them
            # The last sample may be without members that it had.
            samples = samples or [_Sample("")]
            text = str(error) or type(error).__name__
            samples[-1].error = f"is in a damaged tar file, or a compressed one: {text:.200}"
        return stream, samples or [_Sample("", error="holds no sample")]


class _Headers:
    """A shard while its headers are read, in steps that are small and lead forward."""

    def __init__(self, stream: BinaryIO):
        self._stream = stream
        stream.seek(0, os.SEEK_END)
        self._bytes = stream.tell()
        stream.seek(0)
        self._last = -1  # where the header before begins
        self.seek, self.tell = stream.seek, stream.tell

    def read(self, count: int) -> bytes:
        if not 0 <= count <= _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {count} bytes, want at most {_MAX_HEADER_BYTES}")
        return self._stream.read(count)

    def check(self, member: tarfile.TarInfo) -> None:
        """Refuse a member that is not in the shard, or whose header is not behind the header before."""
        if member.offset <= self._last:
            raise tarfile.ReadError(f"the header of {member.name!r:.80} leads back")
        self._last = member.offset
        if member.isfile() and not 0 <= member.size <= self._bytes - member.offset_data and not member.issparse():
            raise tarfile.ReadError(
                f"{member.name!r:.80} breaks off: {member.size} bytes are said to follow, "
                f"{max(0, self._bytes - member.offset_data)} do"
            )

    def check_end(self, offset: int) -> None:
        """Refuse an end that is none: tarfile stops at a header that it cannot read, as at the end."""
        self._stream.seek(offset)
        if any(self._stream.read(tarfile.BLOCKSIZE)):
            raise tarfile.ReadError(f"no header at byte {offset}")


def _add(samples: list[_Sample], member: tarfile.TarInfo) -> None:
    folder, _, base = member.name.rpartition("/")
    stem, dot, extension = base.partition(".")
    key = f"{folder}/{stem}" if folder else stem
    if not samples or samples[-1].key != key:
        samples.append(_Sample(key))
    sample, extension = samples[-1], extension.lower()
    if not dot or not extension:
        sample.error = f"member {member.name!r:.80} wants an extension"
    elif extension in {name for name, _, _ in sample.members}:
        sample.error = f"has two members named {extension!r:.80}"
    elif member.issparse():
        sample.error = f"member {member.name!r:.80} is sparse, want it written in full"
    sample.members.append((extension, member.offset_data, member.size))


def _read(stream: BinaryIO | None, path: str, sample: _Sample, max_bytes: int) -> Raw:
    source = f"{path}:{sample.key:.200}" if sample.key else path
    if sample.error or stream is None:
        return Raw(source, error=sample.error)
    if (total := sum(size for _, _, size in sample.members)) > max_bytes:
        return Raw(source, error=f"has {total} bytes, more than max_sample_bytes, {max_bytes}")
    members: dict[str, bytes] = {}
    for name, offset, size in sample.members:
        try:
            stream.seek(offset)
            data = stream.read(size)
        except OSError as error:
            return Raw(source, error=f"member {name!r} cannot be read: {error.strerror or error}")
        if len(data) < size:
            return Raw(source, error=f"member {name!r} breaks off after {len(data)} of {size} bytes")
        members[name] = data
    return Raw(source, members.pop("json", b""), None, members)
