"""``qwen2vl convert``: a checkpoint with its decoder quantised."""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .common import QuietOption, load, notes, progress_bar
from .merge import check_output

if TYPE_CHECKING:
    from ..prompt.inputs import Inputs
    from ..prompt.processor import Processor

#: Lines of --calibrate that are read: AWQ's authors take as many texts.
_CALIBRATION = 128


class Form(StrEnum):
    """Choices of --to."""

    awq = "awq"
    gptq_int4 = "gptq-int4"
    gptq_int8 = "gptq-int8"
    fp8 = "fp8"


def convert(
    model: Annotated[str, typer.Option("--model", "-m", metavar="FOLDER|ID", help="A checkpoint in 16 or 32 bits.")],
    to: Annotated[Form, typer.Option("--to", help="Layout: those of the official releases, or compressed-tensors'.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="A new or empty folder.")],
    group_size: Annotated[
        int, typer.Option(help="Columns that share a scale, a multiple of 32, or -1 for whole rows; not of fp8.")
    ] = 128,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            exists=True,
            dir_okay=False,
            help="With --to awq: conversations as generate's --jsonl has them, the first 128 of them.",
        ),
    ] = None,
    quiet: QuietOption = False,
) -> None:
    """Write a checkpoint whose decoder is quantised, each weight to what is nearest to it.

    With --calibrate, channels that carry large activations in these conversations are scaled up before, by AWQ's
    search, and what they are read from is scaled down: norms, the rows of v_proj with its bias, and those of up_proj.
    Conversations like those that the model will have are best, pictures and answers included. The tower, the embedding
    and the head stay as they are.
    """
    if calibrate is not None and to is not Form.awq:
        raise typer.BadParameter(
            f"is of --to awq, which has scales to choose, got {to.value}", param_hint="--calibrate"
        )
    notes.quiet = quiet
    check_output(output)
    loaded, processor = load(
        model,
        device="cpu",
        dtype=None,
        min_pixels=None,
        max_pixels=None,
        allow_remote=False,
        max_vision_patches=None,
        base=None if calibrate is None else calibrate.absolute().parent,
    )
    from ..quantising import quantise

    with progress_bar("quantising layers") as report:
        given = None if calibrate is None else _conversations(calibrate, processor)
        quantise(loaded, to.value, group_size, report, calibration=given)
    loaded.save_pretrained(output)
    processor.save_pretrained(output)
    print(output)


def _conversations(source: Path, processor: Processor) -> Iterator[Inputs]:
    """The first lines of a file as the model reads them, answers included where a line has some."""
    from ..errors import MediaError, PromptError
    from .lines import read_conversations

    with progress_bar("reading conversations") as report:
        for n, (where, messages) in enumerate(read_conversations(source, _CALIBRATION)):
            answered = bool(messages) and isinstance(messages[-1], dict) and messages[-1].get("role") == "assistant"
            report(n, _CALIBRATION)
            try:
                yield processor(messages, add_generation_prompt=not answered)
            except (MediaError, PromptError) as error:
                raise type(error)(f"{where}: {error}") from error
