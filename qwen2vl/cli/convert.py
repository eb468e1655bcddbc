"""``qwen2vl convert``: a checkpoint with its decoder quantised."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from .common import QuietOption, load, notes, progress_bar
from .merge import check_output


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
    quiet: QuietOption = False,
) -> None:
    """Write a checkpoint whose decoder is quantised, each weight to what is nearest to it.

    The tower, the embedding, the head, norms and biases stay as they are.
    """
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
    )
    from ..quantising import quantise

    with progress_bar("quantising layers") as report:
        quantise(loaded, to.value, group_size, report)
    loaded.save_pretrained(output)
    processor.save_pretrained(output)
    print(output)
