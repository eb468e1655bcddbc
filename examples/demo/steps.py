"""What both kinds of demo use: headings with times, and loading a checkpoint."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    from qwen2vl.model import Qwen2VL
    from qwen2vl.prompt.processor import Processor

console = Console(highlight=False, soft_wrap=True)


@contextmanager
def step(title: str) -> Iterator[None]:
    """A heading, and after its lines the time they took."""
    console.print(f"\n[bold]{title}[/]")
    begin = time.perf_counter()
    yield
    console.print(f"  [dim]{time.perf_counter() - begin:.2f} s[/]")


def load(folder: Path, device: str | None = None) -> tuple[Processor, Qwen2VL]:
    """Processor and model of a checkpoint, and a line on what it is; `device` None: a GPU if there is one."""
    from qwen2vl.model import Qwen2VL
    from qwen2vl.prompt.processor import Processor

    with step("Loading"):
        processor = Processor.from_pretrained(folder)
        model = Qwen2VL.from_pretrained(folder, device=device)
        parameters = sum(p.numel() for p in model.parameters())
        console.print(f"  {parameters / 1e6:.1f} million parameters, {model.dtype} on {model.device}")
    return processor, model
