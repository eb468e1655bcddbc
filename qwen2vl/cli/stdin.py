"""Standard input, which stands for the one prompt or file that is named -."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

from ..errors import MediaError
from .ranks import follows

_MAX_PROMPT = 64 << 20  # characters; what a conversation may have is for the processor to say


def check_stdin(given: Sequence[str]) -> None:
    """A usage error where more than one of what was given is -, as standard input can be read once."""
    if given.count("-") > 1:
        raise typer.BadParameter("stands for stdin, which can be read once; it was given more often", param_hint="-")


def read_stdin() -> bytes:
    """All of standard input, for a file. Raises MediaError where it is empty, or more than a video may have."""
    from ..media.video import MAX_VIDEO_BYTES

    data = sys.stdin.buffer.read(MAX_VIDEO_BYTES + 1)
    if not data:
        raise MediaError("stdin is empty")
    if len(data) > MAX_VIDEO_BYTES:
        raise MediaError(f"stdin has more than {MAX_VIDEO_BYTES} bytes")
    return data


def read_prompt() -> str:
    """All of standard input, for --prompt; a usage error where it is empty or without end. Of torchrun's processes,
    which share it, the first one reads."""
    if follows():
        return "-"
    prompt = sys.stdin.read(_MAX_PROMPT + 1)
    if len(prompt) > _MAX_PROMPT:
        raise typer.BadParameter(f"stdin has more than {_MAX_PROMPT} characters", param_hint="--prompt")
    if not prompt.strip():
        raise typer.BadParameter("stdin is empty", param_hint="--prompt")
    return prompt.strip()
