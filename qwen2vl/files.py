"""Small files of a checkpoint folder: read with a typed error, written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .errors import CheckpointError


def read_json(path: Path) -> Any:
    """The file's content. Raises :class:`CheckpointError` naming the file when it cannot be read or is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error


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
