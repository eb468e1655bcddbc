"""--limit: what pictures, videos and prompts may cost, where the limits of `Limits` are too low or too high."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from ..errors import Qwen2VLError

LimitOption = Annotated[
    list[str] | None,
    typer.Option(
        "--limit",
        metavar="NAME=N",
        help="Another limit than the default: max_source_pixels, max_decoded_pixels, max_item_tokens, max_item_frames, "
        "max_prompt_tokens, max_call_tokens, max_characters, video_timeout (seconds); may be repeated.",
        rich_help_panel="Media",
    ),
]


_RAISE = re.compile(r"raise (?:limits\.)?(max_[a-z_]+|video_timeout)\b")


def in_flags(message: str) -> str:
    """A message of the package in the words of the command line."""
    return _RAISE.sub(r"give --limit \1=N", message).replace("pass allow_remote=True", "give --allow-remote")


def read_limits(given: Sequence[str] | None) -> dict[str, Any]:
    """The keywords of the processor for what --limit was given; a usage error for what is none."""
    from ..prompt.limits import limit_keywords

    values: dict[str, Any] = {}
    for one in given or ():
        name, _, number = one.partition("=")
        try:
            values[name] = float(number) if name == "video_timeout" else int(number)
        except ValueError:  # one of thousands of digits, too
            raise typer.BadParameter(f"wants NAME=N, got {one[:100]!r}", param_hint="--limit") from None
    try:
        return limit_keywords(values)
    except Qwen2VLError as error:
        raise typer.BadParameter(str(error), param_hint="--limit") from None
