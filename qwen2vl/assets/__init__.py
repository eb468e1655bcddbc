"""The small model that comes with the package: its shape, how it is trained, and where it lies."""

from __future__ import annotations

from pathlib import Path

from ..errors import CheckpointError

#: Folder of its checkpoint, in the released layout; `Qwen2VL.from_pretrained` and `Processor.from_pretrained` take it.
FOLDER = Path(__file__).resolve().parent / "small"
#: Least area of a video frame that it was trained on, a token; the usual least is 128.
MIN_FRAME_PIXELS = 28 * 28


def folder() -> Path:
    """`FOLDER`, where the checkpoint is there.

    Raises:
        CheckpointError: it is not, as in a source tree that was copied without it.
    """
    if not (FOLDER / "config.json").is_file():
        raise CheckpointError(
            f"{FOLDER}: the small model is not in this installation; name another checkpoint with --model, a folder "
            "or a hub id such as Qwen/Qwen2-VL-2B-Instruct, or train it: python -m examples.small"
        )
    return FOLDER
