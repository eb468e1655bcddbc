"""Files that others name: small ones of a checkpoint folder, read with a typed error, written whole or not at all."""

from __future__ import annotations

import io
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError

from . import interrupts
from .errors import CheckpointError

MAX_BYTES = 256 << 20  # of a file that is read whole; a tokenizer.json has some 10 MB


def read_json(path: Path) -> Any:
    """The file's content. Raises :class:`CheckpointError` naming the file when it cannot be read or is no JSON."""
    text = read_text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # a ValueError too for a number of thousands of digits
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error


def read_text(path: Path) -> str:
    """The UTF-8 text of a file. Raises :class:`CheckpointError` naming it when it cannot be read or passes
    `MAX_BYTES`."""
    try:
        with open_regular(path) as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise CheckpointError(f"{path}: wants at most {MAX_BYTES >> 20} MB, and has more")
        return data.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error


def open_regular(path: str | os.PathLike[str], *, update: bool = False) -> BinaryIO:
    """A file for reading, with ``update`` for writing, too, if it is a regular one: a pipe may wait for ever, and a
    device have no end.

    One of 0 bytes is empty, whatever else /proc would make up or wait for. Raises OSError.
    """
    access = os.O_RDWR if update else os.O_RDONLY
    descriptor = os.open(path, access | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode) and (status.st_size or update):
        return os.fdopen(descriptor, "r+b" if update else "rb")
    os.close(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(None, "is not a regular file", os.fspath(path))
    return io.BytesIO()


def write_json(path: Path, data: Any) -> None:
    """Write ``data``, indented, through :func:`write_whole`."""
    write_text(path, json.dumps(data, ensure_ascii=False, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text through :func:`write_whole`."""
    write_whole(path, lambda scratch: scratch.write_bytes(text.encode("utf-8")))


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """``write`` a file beside ``path`` and move it there, so that readers, maps of the old file included, see no half.

    It is on the disk before it has its name. The file gets the permissions that the umask allows, whatever ``write``
    chose (safetensors: the owner alone). Raises :class:`CheckpointError` naming ``path`` when it cannot be written, as
    on a full disk; what was there is there then.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with interrupts.scratch(scratch):
            scratch.touch()
            mode = scratch.stat().st_mode
            write(scratch)
            scratch.chmod(mode)
            with scratch.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(scratch, path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be written: {error}") from error
    finally:
        scratch.unlink(missing_ok=True)


def withdraw_json(path: Path, data: Any) -> None:
    """Remove the JSON file at ``path`` unless it holds ``data``, before what belongs with ``data`` is put beside it.

    Where the writing of ``data`` is not reached a file is missing then, and nothing old is read with what is new.
    """
    try:
        same = read_json(path) == json.loads(json.dumps(data))
    except CheckpointError:
        same = False
    if not same:
        path.unlink(missing_ok=True)
