"""One sitting of the training: from the weights of the last one, with an optimiser that warms up anew, to others.

A step learns from questions, and from what is to be looked at as they are answered (see `examples.small.looking`), from
pictures of which all is known (see `examples.small.seeing`), or from both. A sitting without questions is the tower's
own training. Started by torchrun, every process draws samples of its own, and their gradients are averaged. A sitting
lies in one folder. Killed at any time, it goes on from its last measurement as if nothing had been:

    run.json      what it was begun with
    begin/        the weights that it begins from
    curve.jsonl   a row for each time that it was measured, which decide what is drawn from there on
    model/        the weights when it was measured last, in the released layout, and how they were made so far
    state-*.pt    what else it goes on with, one file a process
"""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from qwen2vl.errors import Qwen2VLError
from qwen2vl.files import read_json, write_json
from qwen2vl.model import Qwen2VL
from qwen2vl.prompt.processor import Processor
from qwen2vl.samples.held_out import evaluate
from qwen2vl.training.config import OptimizerConfig
from qwen2vl.training.optim import Optimizer, lr_factor
from qwen2vl.training.packing import Packer
from qwen2vl.training.step import TrainingStep

from .lessons import Lessons
from .looking import Looking
from .plan import Level, open_levels, shares
from .results import facts_of
from .seeing import LOSSES, Heads, Names, pictures, tokens_of
from .tokenizer import LANGUAGES

T = TypeVar("T")
#: The seed of the held-out samples that decide the order of the lessons; the final figures have another one.
_SEED = 77
#: The names of the files of measurements, of the sittings so far, and of the heads that ask the tower.
CURVE, SITTINGS, HEADS = "curve.jsonl", "sittings.json", "heads.pt"
#: What the losses of attention count beside that of the questions.
ATTENTION = {"named": 0.3, "looks": 0.5, "counts": 1.0}
#: The heads' learning rate in the model's, and how many tokens of pictures are asked at every measurement.
_HEADS, _ASKED = 3.0, 4096


@dataclass(frozen=True)
class Sitting:
    """What a sitting is begun with.

    Attributes:
        begin: what it begins from, for people to read, and no path of one machine.
        steps: how many there are.
        tokens: how many tokens of questions a step of each process has; 0 trains the tower alone.
        pictures: how many tokens of known pictures it has at least, or 0.
        optimizer: "muon" or "adamw", see :class:`qwen2vl.training.optim.Optimizer`.
        lr, end: the highest learning rate, and the share of it that the last step has.
        every: steps between two measurements, each of which writes a checkpoint too.
        count: how many held-out samples of each open level are asked.
        seed: of the samples; another one for every sitting.
        dtype: of weights and activations; masters and moments are in float32. Which one is faster depends on the CPU:
            bfloat16 on AMD's with products of it (Zen 4 and later), float32 on a Xeon with AVX-512, twice as fast.
        dialogues: the share of questions that are several about one picture.
        processes: how many average their gradients.
    """

    begin: str
    steps: int
    tokens: int = 4096
    pictures: int = 0
    optimizer: str = "muon"
    lr: float = 1e-3
    end: float = 0.05
    every: int = 150
    count: int = 24
    seed: int = 1
    dtype: str = "float32"
    dialogues: float = 0.5
    processes: int = 1


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
        Qwen2VLError: there is nothing to learn from, the folder holds a sitting that was begun with something else, or
            torchrun started another number of processes.
    """
    if not (sitting.tokens or sitting.pictures):
        raise Qwen2VLError("tokens, pictures: a step needs one of them, both are 0")
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world != sitting.processes:
        raise Qwen2VLError(f"processes: the sitting wants {sitting.processes}, torchrun started {world}")
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("gloo")
    run = _Run(folder, begin, sitting, before, said)
    if not run.rows:
        run.measure()
    while run.step < sitting.steps:
        run.learn()
        if run.step % sitting.every == 0 or run.step == sitting.steps:
            run.measure()
    if world > 1:
        dist.barrier()  # the others must not find the first one gone
        dist.destroy_process_group()
    return folder / "model"


class _Run:
    """A sitting under way in this process."""

    def __init__(
        self,
        folder: Path,
        begin: Path,
        sitting: Sitting,
        before: Sequence[dict[str, Any]],
        said: Callable[[str], None],
    ) -> None:
        self.folder, self.sitting, self.before, self.said = folder, sitting, list(before), said
        self.rank, self.world = int(os.environ.get("RANK", 0)), sitting.processes
        self._begin()
        self.processor = Processor.from_pretrained(begin)
        self.model = Qwen2VL.from_pretrained(begin, device="cpu", dtype=sitting.dtype).train()
        self.model.requires_grad_(bool(sitting.tokens))
        self.model.visual.requires_grad_(True)
        self.questions, self.looking = TrainingStep(self.model), Looking(self.model)
        self.names = Names(self.processor.tokenizer)
        torch.manual_seed(sitting.seed)
        self.heads = Heads(self.model.config.text.hidden_size, self.names, self.model.head_weight.detach())
        if (begin / HEADS).is_file():
            self.heads.load_state_dict(torch.load(begin / HEADS, weights_only=True), strict=False)  # some may be new
        config = OptimizerConfig(kind=sitting.optimizer, lr=sitting.lr, weight_decay=0.05)
        self.optimizer = Optimizer(self.model.named_parameters(), config, master_weights=True)
        self.of_heads = torch.optim.AdamW(self.heads.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
        self.lessons = Lessons(
            self.processor,
            [],
            seed=sitting.seed,
            max_tokens=max(1, sitting.tokens),
            ahead=max(64, sitting.tokens // 16),
            rank=self.rank,
            world=self.world,
            dialogues=sitting.dialogues,
        )
        self.packer = Packer(
            self.lessons,
            self.model.config,
            max_tokens=max(1, sitting.tokens),
            lookahead=max(64, sitting.tokens // 16),  # more samples than a pack takes
        )
        self.asked = None
        if sitting.pictures:
            rng = np.random.default_rng([_SEED, self.rank])
            self.asked = pictures(self.processor, self.names, rng, _ASKED // self.world, held_out=True)
        self.step = 0
        self.rows: list[dict[str, Any]] = []
        self.losses: defaultdict[str, float] = defaultdict(float)
        self._resume()
        self.begun = time.process_time() - (self.rows[-1]["seconds"] / self.world if self.rows else 0)

    # ------------------------------------------------------------------------------------------------------- learning

    def learn(self) -> None:
        """One step."""
        sitting = self.sitting
        if sitting.tokens:
            pack = next(self.packer)
            with self.looking.watching():
                losses = {"questions": self.questions(pack, 1.0 / max(1, pack.supervised))}
            looked = {one: found for one in pack.sources if one and (found := self.lessons.looked.pop(one, None))}
            self._learn_from(losses | self.looking.losses(pack, looked), ATTENTION)
        if sitting.pictures:
            rng = np.random.default_rng([sitting.seed, self.rank, self.step])
            seen = pictures(self.processor, self.names, rng, sitting.pictures)
            self._learn_from(self.heads(tokens_of(self.model, seen), seen), LOSSES)
        self.optimizer.collect()
        if self.world > 1:
            entries = self.optimizer.entries
            _average([e.gradient if e.master is e.local else e.master.grad for e in entries], self.world)
            _average([parameter.grad for parameter in self.heads.parameters()], self.world)
        factor = lr_factor(self.step, steps=sitting.steps, warmup=min(50, sitting.steps), minimum=sitting.end)
        if not self.optimizer.step(factor).isfinite():
            raise Qwen2VLError(f"step {self.step + 1}: a gradient is not finite: {self.optimizer.not_finite()[:8]}")
        self.of_heads.param_groups[0]["lr"] = _HEADS * factor * sitting.lr
        self.of_heads.step()
        self.of_heads.zero_grad()
        self.step += 1

    def _learn_from(self, losses: Mapping[str, torch.Tensor], weights: Mapping[str, float]) -> None:
        """Add to the gradients, and keep what is told of the losses; one without a weight counts once."""
        torch.stack([weights.get(name, 1.0) * loss for name, loss in losses.items()]).sum().backward()
        for name, loss in losses.items():
            self.losses[name] += float(loss.detach())

    # ------------------------------------------------------------------------------------------------------ measuring

    def measure(self) -> None:
        """Measure what is open and what the tower sees, let it decide what is drawn, and write a checkpoint."""
        self.model.eval()
        row: dict[str, Any] = {"step": self.step}
        errors: dict[Level, float] = {}
        if self.sitting.tokens:
            # No level closes again, nor between two sittings: what is not drawn for some hundred steps is forgotten.
            curves = [row for one in self.before for row in one.get("curve", ())]
            opened = {level for row in [*curves, *self.rows] for level in _levels(row)}
            errors = open_levels(opened, self._error)
            drawn = shares(errors)
            row["drawn"] = self._gathered(self.lessons.drawn)
            row["levels"] = {f"{k} {n}": [round(e, 4), round(drawn[k, n], 4)] for (k, n), e in errors.items()}
        if self.asked is not None:
            with torch.no_grad():
                right = self.heads.right(tokens_of(self.model, self.asked), self.asked)
            row["right"] = {name: round(self._sum(share) / self.world, 4) for name, share in right.items()}
        count = max(1, self.step - (self.rows[-1]["step"] if self.rows else 0))
        row["losses"] = {
            name: round(self._sum(self.losses[name]) / count / self.world, 4)
            for name in sorted({name for names in self._gathered([*self.losses]) for name in names})
        }
        row["seconds"] = round(self._sum(time.process_time() - self.begun))  # of a core
        self.losses.clear()
        self.model.train()
        self.rows.append(row)
        if self.sitting.tokens:
            # What was drawn is taken from the file when a run goes on, so it is what the file holds here, too.
            self.lessons.begin_lap(_levels(row))
        if len(set(self._gathered(sum(float(e.master.double().sum()) for e in self.optimizer.entries)))) > 1:
            raise Qwen2VLError(f"step {self.step}: the weights of the processes have come apart")
        self._save()
        told = [f"{skill} {n} {error:.0%}" for (skill, n), error in errors.items()]
        told += [f"{name} {share:.1%}" for name, share in row.get("right", {}).items()]
        told += [f"loss of {name} {value}" for name, value in row["losses"].items()]
        if self.rank == 0:
            self.said(f"step {self.step}, {row['seconds']} s: " + ", ".join(told))

    def _error(self, level: Level) -> float:
        """The share of held-out samples of a level that are answered wrong; each process asks its own of them."""
        skill, difficulty = level
        count = -(-self.sitting.count // self.world)
        scored = evaluate(
            self.model,
            self.processor,
            skills=(skill,),
            difficulties=(difficulty,),
            count=count,
            seed=_SEED + self.rank,
            languages=LANGUAGES,
            batch_size=count,
        )
        return 1 - self._sum(sum(one.scores["accuracy"] for one in scored)) / (count * self.world)

    def _sum(self, value: float) -> float:
        total = torch.tensor(value, dtype=torch.float64)
        if self.world > 1:
            dist.all_reduce(total)
        return float(total)

    def _gathered(self, value: T) -> list[T]:
        found = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(found, value)
        return found

    # ---------------------------------------------------------------------------------------------------- checkpoints

    def _begin(self) -> None:
        """Write down what the sitting is begun with, or see that the folder's was begun with the same."""
        self.folder.mkdir(parents=True, exist_ok=True)
        wanted, file = asdict(self.sitting), self.folder / "run.json"
        if self.rank == 0:
            if file.is_file() and read_json(file) != wanted:
                raise Qwen2VLError(f"{file}: was begun with {read_json(file)}, now {wanted}; give another folder")
            write_json(file, wanted)

    def _tensors(self) -> dict[str, torch.Tensor]:
        """Everything of the model that changes, which shares storage with it."""
        learned = {entry.name: entry.local for entry in self.optimizer.entries}
        return {**learned, **self.optimizer.state()}

    def _save(self) -> None:
        state: dict[str, Any] = {"step": self.step, "rows": self.rows, "packer": self.packer.state_dict()}
        if self.rank == 0:
            state["tensors"] = self._tensors()
            state["heads"], state["of_heads"] = self.heads.state_dict(), self.of_heads.state_dict()
        file = self.folder / f"state-{self.rank}.pt"
        torch.save(state, file.with_suffix(".new"))
        if self.world > 1:
            dist.barrier()  # so that all are there before the first takes the place of its old one
        file.with_suffix(".new").replace(file)
        if self.rank:
            return
        (self.folder / CURVE).write_text("".join(json.dumps(one) + "\n" for one in self.rows))
        model = self.folder / "model"
        self.model.save_pretrained(model)
        self.processor.save_pretrained(model)
        torch.save(self.heads.state_dict(), model / HEADS)
        write_json(model / SITTINGS, [*self.before, {**asdict(self.sitting), "curve": self.rows}])

    def _resume(self) -> None:
        file = self.folder / f"state-{self.rank}.pt"
        if not file.is_file():
            return
        own = torch.load(file, weights_only=True)
        first = own if self.rank == 0 else torch.load(self.folder / "state-0.pt", weights_only=True)
        if len(set(self._gathered(own["step"]))) > 1:
            raise Qwen2VLError(f"{self.folder}: its processes were cut at different steps; begin the sitting again")
        with torch.no_grad():
            for name, tensor in self._tensors().items():
                tensor.copy_(first["tensors"][name])
        self.heads.load_state_dict(first["heads"])
        self.of_heads.load_state_dict(first["of_heads"])
        self.step, self.rows = own["step"], own["rows"]
        self.lessons.laps = [(row["drawn"][self.rank], _levels(row)) for row in self.rows if "drawn" in row]
        if self.sitting.tokens:
            self.packer.load_state_dict(own["packer"])


def _average(gradients: Sequence[torch.Tensor | None], world: int) -> None:
    """Replace every process's gradients by their means."""
    there = [one for one in gradients if one is not None]
    if not there:
        return
    flat = torch.cat([one.flatten() for one in there])
    dist.all_reduce(flat)
    for one, mean in zip(there, flat.split([one.numel() for one in there]), strict=True):
        one.copy_(mean.view_as(one) / world)


def sittings_of(folder: Path) -> list[dict[str, Any]]:
    """The sittings that made a model, each as a dict of :class:`Sitting` with its measurements under "curve".

    They are beside a model of :func:`train`, and in the header of a file that was shipped.
    """
    if (folder / SITTINGS).is_file():
        return read_json(folder / SITTINGS)
    return facts_of(folder).get("sittings", [])


def _levels(row: dict[str, Any]) -> dict[Level, float]:
    """The levels that a measurement opened, and the share of each."""
    names = {name: name.split() for name in row.get("levels", {})}
    return {(skill, int(n)): row["levels"][name][1] for name, (skill, n) in names.items()}
