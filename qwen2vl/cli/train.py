"""``qwen2vl train``: one stage of training, in one process or as each of torchrun's."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .. import interrupts
from ..errors import CheckpointError, Qwen2VLError
from .common import stderr
from .ranks import rank, tells_of_another

if TYPE_CHECKING:
    from ..training.config import TrainingConfig
    from ..training.logs import Record
    from ..training.trainer import Trainer

_LINE_EVERY_SECONDS = 10.0  # where no terminal shows a bar


class Stage(StrEnum):
    """Choices of --stage, those of qwen2vl.training.stages.STAGES, which would load PyTorch to be asked."""

    vision = "vision"
    multimodal = "multimodal"
    instruct = "instruct"


def train(
    stage: Annotated[
        Stage,
        typer.Option(
            "--stage",
            "-s",
            help="vision: the tower and merger learn. multimodal: everything. instruct: the language model.",
        ),
    ],
    config: Annotated[
        Path, typer.Option("--config", "-c", metavar="FILE", help="TOML file of the run, see docs/training.md.")
    ],
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the run's latest checkpoint; begin where there is none.")
    ] = False,
) -> None:
    """Train one stage: checkpoints, log.csv and, at the end, the model in the released layout go to run.output.

    On several devices: torchrun --nproc-per-node 8 -m qwen2vl train ...
    """
    from ..training.config import TrainingConfig
    from ..training.errors import NonFiniteLossError, TrainingConfigError

    try:
        _train(TrainingConfig.from_toml(config), stage.value, resume)
    except (TrainingConfigError, NonFiniteLossError, CheckpointError) as error:
        # Every rank raises these, and one of them says so. Files may differ between machines, so that there one rank
        # on each machine speaks.
        if int(os.environ.get("LOCAL_RANK", 0)) if isinstance(error, CheckpointError) else rank():
            raise typer.Exit(1) from None
        raise


def _train(config: TrainingConfig, stage: str, resume: bool) -> None:
    import torch

    from ..training.checkpoint import steps_saved
    from ..training.trainer import Trainer

    output = Path(config.run.output)

    def interrupted() -> str:
        saved = steps_saved(output)
        then = f"step {saved[-1]} is saved; --resume goes on from it" if saved else "no step was saved yet"
        return f"interrupted: {then}"

    if rank() == 0:
        interrupts.describe_end(interrupted)
    try:
        with _progress(config) if rank() == 0 else nullcontext() as on_step:
            trainer = Trainer(config, stage, resume=resume, on_step=on_step)
            if rank() == 0:
                _announce(trainer)
            trainer.run()
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise Qwen2VLError(
            "out of memory: lower run.max_tokens (and raise run.accumulation), keep run.checkpoint_activations, "
            "or shard over more devices"
        ) from error
    except RuntimeError as error:
        if tells_of_another(error):
            raise Qwen2VLError(f"rank {rank()}: another rank stopped ({str(error).splitlines()[0]})") from error
        raise
    parallel = trainer.parallel
    reports = parallel.gather([trainer.packer.dataset.report.summary()])  # type: ignore[attr-defined]
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if parallel.rank == 0:
        for number, report in enumerate(reports):
            stderr.print(f"data{f' of rank {number}' if len(reports) > 1 else ''}: {report}", markup=False)
        print(output / "model")


def _announce(trainer: Trainer) -> None:
    """In one line, what is about to happen."""
    from ..training.stages import PARTS

    learning = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in trainer.model.parameters())
    parts = ", ".join(part for part in PARTS if part in trainer.trained)
    p = trainer.parallel
    split = f", tensor {p.tensor}" if p.tensor > 1 else ""
    where = p.device.type if p.mode == "none" else f"{p.world} x {p.device.type} ({p.mode}{split})"
    run = trainer.config.run
    ends, told = (f"{run.steps}", "run.steps") if run.epochs is None else (f"epoch {run.epochs:g}", "run.epochs")
    left = f"steps {trainer.step + 1} to {ends}"
    if trainer.finished:
        left = f"no step left: step {trainer.step} is saved, and {told} is {ends}; the model is exported again"
    stderr.print(
        f"{trainer.stage}: {learning:,} of {total:,} parameters learn ({parts}) on {where}, {left}", markup=False
    )


@contextmanager
def _progress(config: TrainingConfig) -> Iterator[Callable[[Record], None]]:
    """A callback for every step: a bar on a terminal, elsewhere a line every few seconds and at the end, on stderr."""
    run = config.run
    of = "" if run.steps is None else f"/{run.steps}"
    if not stderr.is_terminal:
        last = 0.0

        def line(record: Record) -> None:
            nonlocal last
            ended = record.step == run.steps or (run.epochs is not None and (record.epoch or 0.0) >= run.epochs)
            if time.monotonic() - last >= _LINE_EVERY_SECONDS or ended:
                last = time.monotonic()
                stderr.print(f"step {record.step}{of}  {describe(record)}")

        yield line
        return
    # A bar counts steps, or the passes over the data.
    columns = (TextColumn("{task.description}"), BarColumn(), *((MofNCompleteColumn(),) if of else ()))
    columns = (*columns, TimeRemainingColumn())
    with Progress(*columns, console=stderr) as bar:
        task = bar.add_task("loading ...", total=run.steps or run.epochs)

        def draw(record: Record) -> None:
            done = record.step if of else record.epoch or 0.0
            bar.update(task, completed=done, description=describe(record))

        yield draw


def describe(record: Record) -> str:
    """Loss and speed of one step, and the passes over the data so far."""
    mfu = "" if record.mfu is None else f"  MFU {record.mfu:.1%}"
    epoch = "" if record.epoch is None else f"  epoch {record.epoch:.2f}"
    return f"loss {record.loss:.4f}  norm {record.grad_norm:.3g}  {record.tokens_per_s:,.0f} tokens/s{mfu}{epoch}"
