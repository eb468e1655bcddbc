"""One sitting of the training: from the weights of the last one, with an optimiser that warms up anew, to others.

A sitting lies in one folder. Killed at any time, it goes on from its last checkpoint as if nothing had been:

    run.json      what it was begun with
    begin/        the weights that it begins from
    curve.jsonl   a row for each time that it was measured, which decide what is drawn from there on
    model/        the weights when it was measured last, in the released layout, and how they were made so far
    log.csv  checkpoints/                    the trainer's own
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qwen2vl.errors import Qwen2VLError
from qwen2vl.files import read_json, write_json
from qwen2vl.prompt.processor import Processor
from qwen2vl.samples.held_out import evaluate
from qwen2vl.training import checkpoint
from qwen2vl.training.config import TrainingConfig
from qwen2vl.training.logs import Record
from qwen2vl.training.trainer import Trainer

from .lessons import Lessons
from .plan import Level, open_levels, shares
from .results import facts_of
from .tokenizer import LANGUAGES

#: The seed of the held-out samples that decide the order of the lessons; the final figures have another one.
_SEED = 77
#: The names of the files of measurements, and of the sittings so far.
CURVE, SITTINGS = "curve.jsonl", "sittings.json"


@dataclass(frozen=True)
class Sitting:
    """What a sitting is begun with.

    Attributes:
        begin: what it begins from, for people to read, and no path of one machine.
        steps: how many there are.
        tokens: how many a step has.
        optimizer: "muon" or "adamw", see :class:`qwen2vl.training.optim.Optimizer`.
        lr, end: the highest learning rate, and the share of it that the last step has.
        every: steps between two measurements, each of which writes a checkpoint too.
        count: how many held-out samples of each open level are asked.
        seed: of the samples; another one for every sitting.
    """

    begin: str
    steps: int
    tokens: int = 4096
    optimizer: str = "muon"
    lr: float = 1e-3
    end: float = 0.05
    every: int = 150
    count: int = 24
    seed: int = 1


def train(
    folder: Path,
    begin: Path,
    sitting: Sitting,
    *,
    before: Sequence[dict[str, Any]] = (),
    said: Callable[[str], None] = print,
) -> Path:
    """Run a sitting, or the rest of it; returns the folder of its model.

    Args:
        folder: the sitting's own.
        begin: the checkpoint to begin from. A sitting that has been begun must be given the same.
        before: the sittings before it, see :func:`sittings_of`.
        said: called with a line about every measurement.

    Raises:
        Qwen2VLError: the folder holds a sitting that was begun with something else, or what training raises.
    """
    folder.mkdir(parents=True, exist_ok=True)
    wanted, file = asdict(sitting), folder / "run.json"
    if file.is_file() and read_json(file) != wanted:
        raise Qwen2VLError(f"{file}: was begun with {read_json(file)}, now {wanted}; give another folder")
    write_json(file, wanted)
    saved = checkpoint.steps_saved(folder)
    rows = _rows(folder, saved[-1] if saved else 0)
    earlier = [row for one in before for row in one.get("curve", ())]
    processor = Processor.from_pretrained(begin)
    lessons = Lessons(processor, [_lap(row) for row in rows], seed=sitting.seed, max_tokens=sitting.tokens)
    begun = time.process_time() - (rows[-1]["seconds"] if rows else 0)

    def measured(record: Record | None = None) -> None:
        """Measure what is open, and let it decide what is drawn."""
        step = 0 if record is None else record.step
        if step % sitting.every and step != sitting.steps:
            return
        # No level closes again, nor between two sittings: what is not drawn for some hundred steps is forgotten.
        opened = {level for row in [*earlier, *rows] for level in _lap(row)[1]}
        errors = open_levels(opened, lambda level: _error(trainer, processor, level, sitting.count))
        drawn = shares(errors)
        lessons.begin_lap(drawn)
        row = {
            "step": step,
            "drawn": lessons.drawn,
            "seconds": round(time.process_time() - begun),  # of a core
            "levels": {f"{skill} {n}": [round(e, 4), round(drawn[skill, n], 4)] for (skill, n), e in errors.items()},
        }
        # What was drawn is taken from the file when a run goes on, so it is what the file holds here, too.
        lessons.laps[-1] = _lap(row)
        rows.append(row)
        (folder / CURVE).write_text("".join(json.dumps(one) + "\n" for one in rows))
        checkpoint.export(trainer.model, folder / "model", trainer.parallel, processor=trainer.source)
        write_json(folder / "model" / SITTINGS, [*before, {**wanted, "curve": rows}])
        said(f"step {step}: " + ", ".join(f"{skill} {n} {error:.0%}" for (skill, n), error in errors.items()))

    trainer = Trainer(
        TrainingConfig.from_dict(_config(sitting, folder, begin)),
        "multimodal",
        make_dataset=lambda rank, world: lessons,
        resume=True,
        on_step=measured,
    )
    if not rows:
        measured()
    trainer.run()
    return folder / "model"


def sittings_of(folder: Path) -> list[dict[str, Any]]:
    """The sittings that made a model, each as a dict of :class:`Sitting` with its measurements under "curve".

    They are beside a model of :func:`train`, and in the header of a file that was shipped.
    """
    if (folder / SITTINGS).is_file():
        return read_json(folder / SITTINGS)
    return facts_of(folder).get("sittings", [])


def _config(sitting: Sitting, folder: Path, begin: Path) -> dict[str, Any]:
    return {
        # On a CPU without matrix units float32 is faster than bfloat16, twice as fast on a Xeon with AVX-512.
        "model": {"checkpoint": str(begin), "dtype": "float32"},
        "run": {
            "output": str(folder),
            "steps": sitting.steps,
            "max_tokens": sitting.tokens,
            "lookahead": max(64, sitting.tokens // 16),  # more samples than a pack takes
            "seed": sitting.seed,
            "save_every": sitting.every,
            "keep": 1,
            "checkpoint_activations": False,
        },
        "optimizer": {
            "kind": sitting.optimizer,
            "lr": sitting.lr,
            "warmup_steps": min(50, sitting.steps),
            "min_lr_ratio": sitting.end,
            "weight_decay": 0.05,
        },
    }


def _rows(folder: Path, step: int) -> list[dict[str, Any]]:
    """The measurements up to a step: what was measured behind the last checkpoint is measured again."""
    file = folder / CURVE
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    return [row for row in rows if row["step"] <= step]


def _lap(row: dict[str, Any]) -> tuple[int, dict[Level, float]]:
    names = {name: name.split() for name in row["levels"]}
    return row["drawn"], {(skill, int(n)): row["levels"][name][1] for name, (skill, n) in names.items()}


def _error(trainer: Trainer, processor: Processor, level: Level, count: int) -> float:
    """The share of held-out samples of a level that are answered wrong."""
    skill, difficulty = level
    model = trainer.model
    state = torch.get_rng_state()
    model.eval()
    try:
        scored = evaluate(
            model,
            processor,
            skills=(skill,),
            difficulties=(difficulty,),
            count=count,
            seed=_SEED,
            languages=LANGUAGES,
            batch_size=count,
        )
    finally:
        model.train()
        torch.set_rng_state(state)
    return 1 - sum(one.scores["accuracy"] for one in scored) / count
