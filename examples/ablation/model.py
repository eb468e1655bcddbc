"""One model of an ablation: trained from nothing, then asked everything."""

from __future__ import annotations

import bisect
import itertools
import statistics
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from qwen2vl.model import Qwen2VL
from qwen2vl.prompt.processor import Processor
from qwen2vl.samples import Sample
from qwen2vl.samples import generate as make_sample
from qwen2vl.samples.source import Generated, raw_sample, read_sample
from qwen2vl.training.config import ModelConfig, OptimizerConfig, RunConfig, TrainingConfig
from qwen2vl.training.example import Example
from qwen2vl.training.packing import IGNORE, Batch, Packer, collate
from qwen2vl.training.trainer import Trainer

from .plan import ABLATIONS, Ablation, Arm, Part

#: How many samples a step has.
BATCH = 32
#: The seed of the samples of evaluation. The seeds of training are those of the models, which count from 1.
EVALUATION_SEED = 1_000_000
_TOKENS = 1 << 20  # more than BATCH samples ever have: a pack is BATCH samples
_LR = 5e-4
_POINTS = 20  # a learning curve has so many points


def one_dimensional(batch: Batch) -> Batch:
    """The batch with positions 0, 1, 2, ... over all tokens of each sample, the same on all three axes: 1-D RoPE."""
    counts = batch.cu_seqlens.diff().tolist()
    along = torch.cat([torch.arange(n) for n in counts])  # (T,)
    return replace(batch, positions=along.expand(3, -1).contiguous())


class Batches:
    """A trainer's packer with the positions of an arm, and a checksum of the samples of every step.

    The checksum leaves the order inside a step out: that depends on how many tokens each sample has in the arm.
    """

    def __init__(self, packer: Packer, arm: Arm) -> None:
        self.packer, self.arm, self.checksum = packer, arm, 0

    def __next__(self) -> Batch:
        batch = next(self.packer)
        self.checksum = zlib.crc32("|".join(sorted(map(str, batch.sources))).encode(), self.checksum)
        return one_dimensional(batch) if self.arm.one_dimensional else batch


@dataclass(frozen=True)
class Job:
    """One model to train and to score, in a process of its own.

    Attributes:
        ablation, arm: the index of the ablation in :data:`ABLATIONS`, and of the arm in its arms.
        seed: the seed of the samples, and of the weights to begin from.
        beginning: the folder of a checkpoint with these weights.
        steps: how many steps it is trained.
        count: how many samples each question is asked with.
    """

    ablation: int
    arm: int
    seed: int
    beginning: str
    steps: int
    count: int


@dataclass(frozen=True)
class Scores:
    """The scores of one class of samples.

    Attributes:
        facts: what a row of the result says of the class beside its name.
        samples: how many there are.
        tokens: the mean number of vision tokens.
        exact: the share of answers that are right in full.
        right: the share of right tokens among all tokens of true answers.
    """

    facts: dict[str, Any]
    samples: int
    tokens: float
    exact: float
    right: float


@dataclass(frozen=True)
class Outcome:
    """What became of a :class:`Job`.

    Attributes:
        scores: name of a class of samples -> its scores.
        losses: the mean loss of each of equal parts of the training, in order.
        seen: a checksum of the samples of every step.
        begun: a checksum of the weights before the first step.
        parameters: how many parameters the model has.
        seconds: how long the training took.
    """

    scores: dict[str, Scores]
    losses: list[float]
    seen: int
    begun: int
    parameters: int
    seconds: float


class Examples:
    """The samples of training as a packer draws them.

    Args:
        course: the parts of the training, in order.
        seed: the seed of the samples.
        samples: how many samples the shares of the parts are of. The last part goes on without an end.
        example: turns a sample into what the model is trained on.
    """

    def __init__(
        self, course: Sequence[Part], *, seed: int, samples: int, example: Callable[[Sample], Example]
    ) -> None:
        self.parts = [Generated((part.skill,), part.levels, seed=[seed]) for part in course]
        shares = itertools.accumulate(part.share for part in course[:-1])
        self.bounds = [round(share * samples) for share in shares]
        self.example, self.next = example, 0

    def sample(self, n: int) -> Sample:
        """Sample n, counted from 0."""
        return self.parts[bisect.bisect_right(self.bounds, n)].sample(n)

    def __iter__(self) -> Iterator[Example]:
        while True:
            self.next += 1
            yield self.example(self.sample(self.next - 1))

    def state_dict(self) -> dict[str, Any]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.next = state["next"]


def prepare(sample: Sample, processor: Processor, size: tuple[int, int] | None = None) -> Example:
    """A sample as training takes it, its pictures resized to `size`, (height, width) in pixels, unless that is None."""
    messages = read_sample(sample)
    if size is not None:
        for item in (item for message in messages for item in message["content"] if "image" in item):
            item["resized_height"], item["resized_width"] = size
    inputs = processor.supervised(messages)
    media = {name: rows for name, rows in inputs.items() if name.startswith(("pixel_values", "image_", "video_"))}
    return Example(inputs["input_ids"][0], inputs["labels"][0], **media, source=raw_sample(sample).source)


@torch.inference_mode()
def right_tokens(model: Qwen2VL, batch: Batch) -> list[tuple[int, int]]:
    """(right, supervised) tokens of every sample: the right ones are what the model ranks first behind true tokens.

    Where all tokens are right, greedy decoding writes exactly the answer, because each of its steps sees what the model
    sees here.
    """
    batch = batch.to(model.device)
    features = model.encode_media(
        batch.pixel_values, batch.image_grid_thw, batch.pixel_values_videos, batch.video_grid_thw
    )
    hidden = model.hidden_states(batch.input_ids, batch.positions, batch.cu_seqlens, features)  # (T, C)
    asked = batch.targets != IGNORE
    right = torch.zeros_like(asked)
    right[asked] = F.linear(hidden[asked], model.head_weight).argmax(-1) == batch.targets[asked]
    counts = batch.cu_seqlens.diff().tolist()
    found = [(int(r.sum()), int(a.sum())) for r, a in zip(right.split(counts), asked.split(counts), strict=True)]
    return [pair for pair, source in zip(found, batch.sources, strict=True) if source is not None]


def train_and_score(job: Job) -> Outcome:
    """Train the model of `job` on one thread and ask it all questions, in a process that does nothing else."""
    torch.set_num_threads(1)
    ablation = ABLATIONS[job.ablation]
    arm = ablation.arms[job.arm]
    processor = Processor.from_pretrained(job.beginning)

    def example(sample: Sample) -> Example:
        return prepare(sample, processor, arm.size)

    config = TrainingConfig(
        RunConfig(
            output=f"{job.beginning}/nothing-is-saved",
            steps=job.steps,
            max_tokens=_TOKENS,
            lookahead=BATCH,
            seed=job.seed,
            loss="full",
            checkpoint_activations=False,
        ),
        ModelConfig(checkpoint=job.beginning, dtype="float32"),
        OptimizerConfig(lr=_LR, warmup_steps=min(50, job.steps), min_lr_ratio=0.2, weight_decay=0.05),
    )
    data = Examples(ablation.course, seed=job.seed, samples=job.steps * BATCH, example=example)
    trainer = Trainer(config, "multimodal", make_dataset=lambda rank, world: data)
    packer = Batches(trainer.packer, arm)
    trainer.packer = packer  # pyright: ignore[reportAttributeAccessIssue]
    weights = [p.detach().cpu() for p in trainer.model.parameters()]
    begun = zlib.crc32(b"".join(w.numpy().tobytes() for w in weights))
    losses, begin = [], time.perf_counter()
    for step in range(1, job.steps + 1):
        losses.append(trainer.train_step().loss)
        if step % 100 == 0:
            mean = statistics.fmean(losses[-100:])
            print(f"{arm.name}, seed {job.seed}: step {step} of {job.steps}, loss {mean:.3f}", file=sys.stderr)
    seconds = time.perf_counter() - begin
    parts = min(_POINTS, job.steps)
    bounds = [job.steps * n // parts for n in range(parts + 1)]
    return Outcome(
        scores=score(trainer.model, ablation, arm, example, job.count),
        losses=[statistics.fmean(losses[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)],
        seen=packer.checksum,
        begun=begun,
        parameters=sum(w.numel() for w in weights),
        seconds=seconds,
    )


def score(
    model: Qwen2VL, ablation: Ablation, arm: Arm, example: Callable[[Sample], Example], count: int
) -> dict[str, Scores]:
    """The scores of every class of samples, with `count` samples of every question of `ablation`."""
    found: dict[str, tuple[dict[str, Any], list[tuple[int, int, int]]]] = {}
    unit = model.config.vision.spatial_merge_size**2
    for question in ablation.questions:
        samples = [
            question.change(
                make_sample(
                    ablation.course[-1].skill,
                    question.level,
                    seed=EVALUATION_SEED,
                    index=n,
                    split=question.split,
                    **question.options,
                )
            )
            for n in range(count)
        ]
        for begin in range(0, count, BATCH):
            some = samples[begin : begin + BATCH]
            examples = [example(sample) for sample in some]
            batch = collate(examples, model.config)
            answers = right_tokens(model, one_dimensional(batch) if arm.one_dimensional else batch)
            for sample, one, (right, asked) in zip(some, examples, answers, strict=True):
                grid = one.image_grid_thw if one.image_grid_thw is not None else one.video_grid_thw
                tokens = 0 if grid is None else int(grid.prod(-1).sum()) // unit
                classes = [ablation.group(sample)]
                if ablation.every is not None and question.split == "held-out":
                    classes.append((ablation.every, {}))
                for name, facts in classes:
                    found.setdefault(name, (facts, []))[1].append((tokens, right, asked))
    return {
        name: Scores(
            facts=facts,
            samples=len(of),
            tokens=statistics.fmean(tokens for tokens, _, _ in of),
            exact=statistics.fmean(right == asked for _, right, asked in of),
            right=sum(right for _, right, _ in of) / sum(asked for *_, asked in of),
        )
        for name, (facts, of) in found.items()
    }
