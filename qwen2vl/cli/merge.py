"""``qwen2vl merge``: a checkpoint and an adapter as one checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import DTypeOption, load


def merge(
    model: Annotated[
        str, typer.Option("--model", "-m", metavar="FOLDER|ID", help="The checkpoint that the adapter was trained on.")
    ],
    adapter: Annotated[str, typer.Option("--adapter", metavar="FOLDER|ID", help="LoRA adapter in peft's layout.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="A new or empty folder.")],
    dtype: DTypeOption = None,
) -> None:
    """Write a checkpoint with a LoRA adapter added to its weights, in the released layout."""
    check_output(output)
    loaded, processor = load(
        model,
        device="cpu",
        dtype=dtype,
        min_pixels=None,
        max_pixels=None,
        allow_remote=False,
        max_vision_patches=None,
        adapter=adapter,
    )
    loaded.merge_adapter().save_pretrained(output)
    processor.save_pretrained(output)
    print(output)


def check_output(output: Path) -> None:
    """Refuse a folder that holds anything."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise typer.BadParameter(f"{output} is there and not an empty folder", param_hint="--output")
