"""From the name of a model to a folder on disk."""

from __future__ import annotations

from pathlib import Path

from .errors import CheckpointError

#: What a checkpoint consists of here. Pickle files are never asked for.
_TEXT_FILES = ["*.json", "*.txt", "*.jinja"]
_WEIGHT_FILES = ["*.safetensors"]


def resolve(name_or_path: str | Path, *, with_weights: bool = True) -> Path:
    """The folder of a checkpoint: a local folder as it is, ``"org/name"`` through huggingface_hub's cache.

    ``with_weights``: also fetch the weights from the hub; a processor needs only the small files.

    Raises :class:`CheckpointError` when there is no such folder and the hub has or reaches no such repository.
    """
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{folder}: is a file; give the checkpoint's folder")
    name = str(name_or_path)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(f"{name}: no such folder, and not a hub id of the form 'organisation/model'")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=_TEXT_FILES + (_WEIGHT_FILES if with_weights else [])))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(f"{name}: no such folder, and the hub did not give it: {error}") from error
