"""Tensors of a run's checkpoints: torch.distributed.checkpoint's files, listed in JSON in the place of its pickle.

    __0_0.distcp      tensors that rank 0 wrote, each as ``torch.save`` writes it
    tensors.json      {"tensors": {name: {"dtype", "shape", "chunks": [offsets, shape, file, begin, bytes]}}}

PyTorch's own list, ``.metadata``, is unpickled without restriction, and an entry of it that is no tensor is, too. Here
there are tensors alone, which ``torch.load(weights_only=True)`` reads, so that nothing that a folder holds is run.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from ..errors import CheckpointError
from ..files import read_json, write_json

LIST_NAME = "tensors.json"
_FILE = re.compile(r"__\d+_\d+\.distcp")


class TensorWriter(FileSystemWriter):
    """Writes tensors, and their list when every rank has written its own."""

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        where = {result.index: result.storage_data for rank in results for result in rank}
        tensors: dict[str, Any] = {}
        for name, of in metadata.state_dict_metadata.items():
            if not isinstance(of, TensorStorageMetadata):
                raise TypeError(f"tensors: {name} must be a tensor")
            tensors[name] = {
                "dtype": str(of.properties.dtype).removeprefix("torch."),
                "shape": list(of.size),
                "chunks": [_entry(chunk, where[MetadataIndex(name, chunk.offsets)]) for chunk in of.chunks],
            }
        write_json(Path(self.path) / LIST_NAME, {"tensors": tensors})


def _entry(chunk: ChunkStorageMetadata, info: _StorageInfo) -> dict[str, Any]:
    place = {"file": info.relative_path, "begin": info.offset, "bytes": info.length}
    return {"offsets": list(chunk.offsets), "shape": list(chunk.sizes), **place}


class TensorReader(FileSystemReader):
    """Reads what :class:`TensorWriter` wrote."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The list. Raises :class:`CheckpointError` where it is missing, damaged or names what the folder lacks."""
        path = Path(self.path) / LIST_NAME
        if not path.exists() and path.with_name(".metadata").exists():
            raise CheckpointError(f"{path}: is missing; .metadata, of an earlier version, can run code and is not read")
        held: dict[str, Any] = {}
        where: dict[MetadataIndex, _StorageInfo] = {}
        sizes: dict[str, int] = {}
        for name, dtype, shape, chunks in _tensors(path):
            found: list[ChunkStorageMetadata] = []
            for offsets, extent, file, begin, count in chunks:
                if file not in sizes:
                    sizes[file] = _size(path.with_name(file))
                if begin + count > sizes[file]:
                    raise CheckpointError(f"{path}: {name}: {file} ends before byte {begin + count}")
                found.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(extent)))
                where[MetadataIndex(name, offsets)] = _StorageInfo(file, begin, count)
            held[name] = TensorStorageMetadata(TensorProperties(dtype), torch.Size(shape), found)
        return Metadata(held, storage_data=where, storage_meta=StorageMeta(load_id=self.load_id))


_Chunk = tuple[list[int], list[int], str, int, int]


def _tensors(path: Path) -> Iterator[tuple[str, torch.dtype, list[int], list[_Chunk]]]:
    """Every tensor of the list, checked: its chunks lie in it and hold as many values as it does."""
    data = read_json(path)
    try:
        for name, of in data["tensors"].items():
            dtype, shape = getattr(torch, of["dtype"], None), of["shape"]
            chunks = [(c["offsets"], c["shape"], c["file"], c["begin"], c["bytes"]) for c in of["chunks"]]
            fits = isinstance(dtype, torch.dtype) and _counts(shape)
            for offsets, extent, file, begin, count in chunks:
                fits = fits and _counts(offsets) and _counts(extent) and _counts([begin, count])
                fits = fits and len(offsets) == len(extent) == len(shape)
                fits = fits and all(o + e <= s for o, e, s in zip(offsets, extent, shape, strict=True))
                fits = fits and _FILE.fullmatch(file) is not None
            if not fits or sum(math.prod(extent) for _, extent, *_ in chunks) != math.prod(shape):
                raise CheckpointError(f"{path}: {name!r:.80} is not described as a tensor")
            yield name, dtype, shape, chunks  # type: ignore[misc]
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: is no list of tensors: {error!r:.200}") from error


def _counts(values: Any) -> bool:
    """Whether these are numbers of things in memory."""
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def _size(file: Path) -> int:
    """Bytes of a file of tensors, which must be one, whatever a link leads to."""
    if not file.is_file() or file.is_symlink():
        raise CheckpointError(f"{file}: is no file")
    return file.stat().st_size
