"""What a run writes down: a CSV line a step, TensorBoard's events and a picture of the loss where asked for."""

from __future__ import annotations

import csv
import importlib.util
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import install_hint
from .errors import TrainingConfigError


@dataclass(frozen=True)
class Record:
    """One step. Rates and ``mfu`` are per second of the step, over all ranks; ``lr_*`` those it was taken with.

    ``epoch``: passes over the data behind it (over the entry that is read the fastest; the mean of the ranks), None
    where the data have no end. ``repeated``: those of its samples that were in the same step of their rank before.
    """

    step: int
    epoch: float | None
    loss: float
    grad_norm: float
    lr_tower: float
    lr_merger: float
    lr_llm: float
    tokens: int
    supervised: int
    samples: int
    repeated: int
    seconds: float
    tokens_per_s: float
    mfu: float | None


def check_extras(*, tensorboard: bool, plot: bool) -> None:
    """Raise :class:`TrainingConfigError` before the run for a log whose package is missing."""
    for wanted, key, package in ((tensorboard, "run.tensorboard", "tensorboard"), (plot, "run.plot", "matplotlib")):
        if wanted and importlib.util.find_spec(package) is None:
            raise TrainingConfigError(f"{key}: needs the package {package}; {install_hint(package)}")


class Logs:
    """``folder/log.csv`` and the rest. Lines of steps from ``start`` on, which a resumed run takes again, are cut."""

    def __init__(self, folder: Path, start: int, *, tensorboard: bool = False, plot: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.plot = folder, plot
        self.path = folder / "log.csv"
        kept = [row for row in read_log(folder) if int(row["step"]) <= start] if start else []
        names = [f.name for f in fields(Record)]
        fresh = self.path.with_name(".log.csv.partial")  # a kill in the middle must not take the old lines away
        with fresh.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(kept)
        os.replace(fresh, self.path)
        self._file = self.path.open("a", newline="", encoding="utf-8")
        self._csv = csv.DictWriter(self._file, names)
        self._board: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)

    def write(self, record: Record) -> None:
        values = asdict(record)
        self._csv.writerow({k: "" if v is None else v for k, v in values.items()})
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                if name != "step" and value is not None:
                    self._board.add_scalar(f"train/{name}", value, record.step)

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()
        if self.plot:
            draw_loss(self.folder)


def read_log(folder: Path) -> list[dict[str, str]]:
    """The lines of ``folder/log.csv``; none where it is absent. A last line that a kill cut short is left out."""
    path = folder / "log.csv"
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if None not in row.values()]


def draw_loss(folder: Path) -> Path | None:
    """``loss.png`` from ``log.csv``: each step, and a mean over a fiftieth of the run, or at least over ten steps or a
    quarter of a short one. None without any line."""
    from matplotlib.figure import Figure

    rows = read_log(folder)
    if not rows:
        return None
    steps, losses = [int(row["step"]) for row in rows], [float(row["loss"]) for row in rows]
    window = max(len(losses) // 50, min(10, len(losses) // 4))
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    marker = "." if len(losses) < 100 else None  # a line through one step is none
    if window > 1:
        means = [sum(losses[max(0, i - window + 1) : i + 1]) / min(window, i + 1) for i in range(len(losses))]
        axes.plot(steps, losses, marker=marker, linewidth=0.8, alpha=0.4, label="step")
        axes.plot(steps, means, linewidth=1.5, label=f"mean of {window} steps")
        axes.legend()
    else:
        axes.plot(steps, losses, marker=marker, linewidth=1.5)
    axes.set_xlabel("step")
    axes.set_ylabel("cross-entropy a supervised token")
    axes.grid(alpha=0.3)
    path = folder / "loss.png"
    figure.savefig(path, dpi=120)
    return path
