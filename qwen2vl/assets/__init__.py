"""The embedded model, a toy: what ``qwen2vl generate`` and ``qwen2vl chat`` load where no ``--model`` is named.

It comes with the package so that the commands answer at once, without a download and without a GPU. It knows the
generated pictures of `qwen2vl.samples`, on which it was trained, and nothing else: up to six characters, coloured
shapes, short clips and small screens. For photos, documents and videos name a released checkpoint. `python -m
examples.small` in a checkout of the repository is the run that made it.
"""

from __future__ import annotations

from pathlib import Path

from ..errors import CheckpointError

#: What it is and what it is not, for who did not ask for it by name.
NOTICE = (
    "no --model is named: a toy answers, which knows generated pictures of up to six characters, coloured shapes, "
    "short clips and small screens, and nothing else; for photos, documents and videos: "
    "--model Qwen/Qwen2-VL-2B-Instruct"
)

#: Its longest answer where nobody says how long: what it learned to write is shorter, and what it makes of anything
#: else may not end by itself.
MAX_NEW_TOKENS = 96

#: Folder of its checkpoint in the released layout; `Qwen2VL.from_pretrained` and `Processor.from_pretrained` take it.
FOLDER = Path(__file__).resolve().parent / "small"


def folder() -> Path:
    """`FOLDER`, if the checkpoint is there.

    Raises:
        CheckpointError: the checkpoint is missing, as in a copy of the source tree without its data files.
    """
    if not (FOLDER / "config.json").is_file():
        raise CheckpointError(
            f"{FOLDER}: the small model is not in this installation; name another checkpoint with --model, a folder "
            "or a hub id such as Qwen/Qwen2-VL-2B-Instruct, or train it: python -m examples.small"
        )
    return FOLDER
