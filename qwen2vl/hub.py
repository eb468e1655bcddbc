"""From the name of a model to a folder on disk and to the configuration in it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from .config import Qwen2VLConfig
from .errors import CheckpointError
from .files import read_json

#: The files that a checkpoint consists of here. Pickle files are never asked for.
_TEXT_FILES = ["*.json", "*.txt", "*.jinja"]
_WEIGHT_FILES = ["*.safetensors"]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that has been found, so that whoever loads several parts of it looks for it once.

    ``Qwen2VL.from_pretrained`` and ``Processor.from_pretrained`` take it in place of a name.
    """

    folder: Path

    @classmethod
    def find(cls, name_or_path: str | os.PathLike[str] | Checkpoint, *, with_weights: bool = True) -> Checkpoint:
        """The checkpoint that :func:`resolve` finds, or the one given. Raises what :func:`resolve` raises."""
        if isinstance(name_or_path, Checkpoint):
            return name_or_path
        return cls(resolve(name_or_path, with_weights=with_weights))

    @cached_property
    def config(self) -> Qwen2VLConfig:
        """Its config.json, read at the first use. Raises what :meth:`Qwen2VLConfig.from_pretrained` raises."""
        return Qwen2VLConfig.from_pretrained(self.folder)

    @property
    def generation_defaults(self) -> dict:
        """Its generation_config.json, empty where there is none. Raises :class:`CheckpointError` for anything else."""
        path = self.folder / "generation_config.json"
        defaults = read_json(path) if path.is_file() else {}
        if not isinstance(defaults, dict):
            raise CheckpointError(f"{path}: must hold a JSON object, got {type(defaults).__name__}")
        return defaults


def resolve(name_or_path: str | os.PathLike[str], *, with_weights: bool = True) -> Path:
    """The folder of a checkpoint: a local folder as it is, ``"org/name"`` through huggingface_hub's cache.

    ``with_weights``: also fetch the weights from the hub; a processor needs only the small files.

    Raises :class:`CheckpointError` when there is no such folder and the hub has or reaches no such repository.
    """
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{folder}: is a file; give the checkpoint's folder")
    name = os.fspath(name_or_path)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(f"{name}: no such folder, and not a hub id of the form 'organisation/model'")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=_TEXT_FILES + (_WEIGHT_FILES if with_weights else [])))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(f"{name}: no such folder, and the hub did not give it: {error}") from error
