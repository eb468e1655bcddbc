"""The loop: packs in, steps out, the same whatever the number of ranks and wherever it was cut and resumed."""

from __future__ import annotations

import logging
import math
import time
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import DataError, Qwen2VLError
from ..hub import Checkpoint
from . import checkpoint
from .config import TrainingConfig
from .errors import NonFiniteLossError, TrainingConfigError
from .flops import training_flops, work_of
from .logs import Logs, Record, check_extras
from .loss import check_kind
from .optim import Optimizer, lr_factor
from .packing import Batch, Dataset, Packer
from .parallel import Parallel, distribute, start, wrap_blocks
from .stages import add_lora, build_model, freeze, part_of
from .step import TrainingStep

if TYPE_CHECKING:
    from .data.dataset import TrainingData

logger = logging.getLogger("qwen2vl.training")

#: Called on rank 0 after every step.
OnStep = Callable[[Record], None]
#: Makes the dataset of ``data_rank`` among ``data_size``.
MakeDataset = Callable[[int, int], Dataset]


def read_dataset(config: TrainingConfig, rank: int, world: int, source: Checkpoint | None = None) -> TrainingData:
    """The dataset that ``config.data`` describes, read with the processor of ``config.model``.

    ``source``: the checkpoint of that processor, where it has been found.
    """
    from ..prompt.limits import limit_keywords
    from ..prompt.processor import Processor
    from .data import build_dataset

    if not config.data:
        raise TrainingConfigError("data: no entry; a run needs at least one [[data]] table")
    source = source or processor_checkpoint(config)
    if source is None:
        raise TrainingConfigError("model.processor: is missing; with model.config a run needs a Qwen2-VL processor")
    run = config.run
    return build_dataset(
        config.data,
        Processor.from_pretrained(source, allow_remote=run.allow_remote, **limit_keywords(config.limits)),
        seed=run.seed,
        rank=rank,
        world=world,
        max_tokens=run.max_tokens,
        max_bad=run.max_bad,
        threads=run.data_threads,
        ahead=max(run.lookahead, 2 * run.data_threads),  # while the device works, the next packs get ready
    )


def processor_checkpoint(config: TrainingConfig, model: Checkpoint | None = None) -> Checkpoint | None:
    """The checkpoint whose processor is used: ``model``, which the weights come from, where none is named for it."""
    name = config.model.processor or (None if model is not None else config.model.checkpoint)
    return model if name is None else Checkpoint.find(name, with_weights=False)


class Trainer:
    """One stage of training.

    Args:
        config, stage: what ``qwen2vl train`` reads.
        make_dataset: instead of ``config.data``, called with this process's rank and number among those that draw
            different data.
        resume: go on from the latest checkpoint under ``config.run.output``; without one, begin.
        on_step: see :data:`OnStep`.

    Raises :class:`TrainingConfigError` before anything is trained, also where the output holds a run and ``resume`` is
    not given. :meth:`run` raises :class:`NonFiniteLossError` and :class:`DataError`.
    """

    def __init__(
        self,
        config: TrainingConfig,
        stage: str,
        *,
        make_dataset: MakeDataset | None = None,
        resume: bool = False,
        on_step: OnStep | None = None,
    ) -> None:
        run = config.run
        self.config, self.stage, self.on_step = config, stage, on_step
        self.output = Path(run.output)
        check_extras(tensorboard=run.tensorboard, plot=run.plot)
        saved = checkpoint.steps_saved(self.output)
        if saved and not resume:
            raise TrainingConfigError(
                f"run.output: {self.output} holds a run of {saved[-1]} steps; resume it or move it"
            )

        torch.manual_seed(run.seed)
        begin = None if config.model.checkpoint is None else Checkpoint.find(config.model.checkpoint)
        model = build_model(config.model, seed=run.seed, checkpoint=begin)
        self.source = processor_checkpoint(config, begin)
        freeze(model, stage)
        if config.lora is not None:
            add_lora(model, config.lora, stage)
        self.parallel: Parallel = start(config.parallel, model.config)
        check_kind(run.loss, self.parallel.device)
        self.model = model
        wrap_blocks(model, checkpoint_activations=run.checkpoint_activations, compiled=run.compile)
        self.step_module: nn.Module = distribute(TrainingStep(model, loss=run.loss), self.parallel)
        self.optimizer = Optimizer(
            model.named_parameters(), config.optimizer, master_weights=config.model.master_weights
        )
        self.trained = {part_of(e.name) for e in self.optimizer.entries}
        make = make_dataset or (lambda rank, world: read_dataset(config, rank, world, self.source))
        dataset = make(self.parallel.data_rank, self.parallel.data_size)
        self.packer = Packer(dataset, model.config, max_tokens=run.max_tokens, lookahead=run.lookahead)
        # Ranks that split a decoder layer must drop the same values; the others need not.
        torch.manual_seed(run.seed + 1 + self.parallel.data_rank)
        self.step = 0
        if resume and saved:
            self._load(saved[-1])
        self.epoch = self._mean_epoch()
        if run.epochs is not None and self.epoch is None:
            raise TrainingConfigError(
                "run.epochs: the data have no end; give run.steps, or samples of what is generated"
            )
        self._repeats_told = False

    # ----------------------------------------------------------------------------------------------------------- loop

    def run(self) -> None:
        """Train to the last step, saving on the way and at the end; then export to ``output/model``, and adapters
        by themselves to ``output/adapter``."""
        run, logs = self.config.run, None
        if self.parallel.rank == 0:
            logs = Logs(self.output, self.step, tensorboard=run.tensorboard, plot=run.plot)
        try:
            while not self.finished:
                record = self.train_step()
                if logs is not None:
                    logs.write(record)
                    if self.on_step is not None:
                        self.on_step(record)
                if self.step % run.save_every == 0 or self.finished:
                    self._save()
        finally:
            if logs is not None:
                logs.close()
        checkpoint.export(
            self.model,
            self.output / "model",
            self.parallel,
            processor=self.source,
            base=self.config.model.checkpoint,
        )

    @property
    def finished(self) -> bool:
        """Whether the run has all its steps, or passes over the data, behind it."""
        run = self.config.run
        return self.step >= run.steps if run.steps is not None else (self.epoch or 0.0) >= (run.epochs or 0.0)

    def train_step(self) -> Record:
        """One update from ``accumulation`` packs of every rank: the mean over all their supervised tokens."""
        begin = time.perf_counter()
        config, parallel = self.config, self.parallel
        packs = [next(self.packer) for _ in range(config.run.accumulation)]
        self._check_agreement(packs)
        works = [work_of(pack) for pack in packs]
        sources = [source for pack in packs for source in pack.sources if source]
        tokens, supervised, samples, repeated, flops = parallel.sum(
            sum(w.tokens for w in works),
            sum(w.supervised for w in works),
            sum(source is not None for pack in packs for source in pack.sources),
            len(sources) - len(set(sources)),
            sum(training_flops(self.model.config, w, self.trained, adapters=config.lora is not None) for w in works),
        )
        # Ranks' gradients are averaged, so each takes its loss times their number.
        scale = parallel.data_size / max(1.0, supervised)
        total = torch.zeros((), dtype=torch.float64, device=parallel.device)
        for i, pack in enumerate(packs):
            with self._synchronised(last=i == len(packs) - 1):
                loss = self.step_module(pack.to(parallel.device), scale, 1 / len(packs))
                loss.backward()
            self.optimizer.collect()
            total += loss.detach()
        (mean,) = (x / parallel.data_size for x in parallel.sum(total.item()))
        if not math.isfinite(mean):
            self._blame(packs)
        factor = lr_factor(
            self.step,
            steps=config.run.steps,
            warmup=config.optimizer.warmup_steps,
            minimum=config.optimizer.min_lr_ratio,
            passed=(self.epoch or 0.0) / (config.run.epochs or 1.0),
        )
        norm = self.optimizer.step(factor).item()
        if not math.isfinite(norm):
            self._blame_gradients(packs, mean)
        self.step += 1
        self.epoch = self._mean_epoch()
        if repeated and not self._repeats_told and parallel.rank == 0:
            self._repeats_told = True
            logger.warning(
                "step %d: %d of its %d samples were in it before, as the data were begun again within the step; "
                "a step takes run.accumulation packs of run.max_tokens",
                self.step,
                repeated,
                samples,
            )
        seconds = time.perf_counter() - begin
        peak = config.run.peak_tflops
        return Record(
            step=self.step,
            epoch=self.epoch,
            loss=mean,
            grad_norm=norm,
            **{f"lr_{part}": factor * rate if part in self.trained else 0.0
               for part, rate in self.optimizer.peaks.items()},
            tokens=int(tokens),
            supervised=int(supervised),
            samples=int(samples),
            repeated=int(repeated),
            seconds=seconds,
            tokens_per_s=tokens / seconds,
            mfu=None if peak is None else flops / seconds / (peak * 1e12 * parallel.world),
        )  # fmt: skip

    def _mean_epoch(self) -> float | None:
        """Of all ranks, so that they end in the same step; None where what gives the packs counts no passes."""
        count = getattr(self.packer, "epoch", None)
        epoch = None if count is None else count()
        (total,) = self.parallel.sum(math.nan if epoch is None else epoch)
        return None if math.isnan(total) else total / self.parallel.data_size

    def _synchronised(self, last: bool):
        """Plain replicas exchange gradients once a step, unless the optimiser takes them over after every pack."""
        module = self.step_module
        if isinstance(module, nn.parallel.DistributedDataParallel) and not last and not self.optimizer.collects:
            return module.no_sync()
        return nullcontext()

    def _blame(self, packs: list[Batch]) -> None:
        """Every rank runs its packs once more, each sample's loss apart, and all name what they found."""
        found: list[str] = []
        count = 0
        with torch.no_grad():
            for pack in packs:
                losses = self.step_module(pack.to(self.parallel.device), by_sample=True)
                named = [(s, x) for s, x in zip(pack.sources, losses.tolist(), strict=True) if s is not None]
                count += len(named)
                found += [f"{source} ({loss})" for source, loss in named if not math.isfinite(loss)]
        found, (samples,) = self.parallel.gather(found), self.parallel.sum(count)
        where = f"step {self.step + 1}: the loss is not finite"
        if not found:
            raise NonFiniteLossError(f"{where}, but every sample's is when computed alone: the sum overflows")
        hint = "; all of them are, so the weights are likely not finite" if len(found) == int(samples) else ""
        raise NonFiniteLossError(
            f"{where} in {len(found)} of {int(samples)} samples: {_listed(found)}{hint}. "
            "No weight was changed in this step"
        )

    def _blame_gradients(self, packs: list[Batch], loss: float) -> None:
        """The loss was finite and its gradient is not, which no single sample need be to blame for."""
        sources = self.parallel.gather([str(s) for pack in packs for s in pack.sources if s is not None])
        names = sorted(set(self.parallel.gather(self.optimizer.not_finite())))
        raise NonFiniteLossError(
            f"step {self.step + 1}: the loss is {loss:.6g}, but its gradient is not finite in {len(names)} parameters "
            f"({_listed(names)}), from {len(sources)} samples ({_listed(sources)}). No weight was changed in this step"
        )

    def _check_agreement(self, packs: list[Batch]) -> None:
        """Ranks that split the decoder's layers each read the same data; where one could not, all must stop."""
        text = "|".join(f"{source}:{pack.tokens}" for pack in packs for source in pack.sources)
        if not self.parallel.agree(zlib.crc32(text.encode())):
            sources = [str(s) for pack in packs for s in pack.sources if s is not None]
            raise DataError(
                f"step {self.step + 1}: ranks that split the decoder drew different samples, as where one of them "
                f"could not read a file; rank {self.parallel.rank} has {_listed(sources)}"
            )

    # ---------------------------------------------------------------------------------------------------- checkpoints

    def _tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        """What changes. The rest is read again from where the run began."""
        learns = {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}
        return {"model": learns, "optimizer": self.optimizer.state()}

    def _facts(self) -> dict[str, Any]:
        """What a checkpoint must have in common with the run that resumes from it."""
        model, lora = self.config.model, self.config.lora
        shape = None if lora is None else [lora.rank, sorted(lora.targets), lora.tower, *(["experts"] * lora.experts)]
        return {
            "stage": self.stage,
            "dtype": model.dtype,
            "master_weights": model.master_weights,
            "lora": shape,
            "optimizer": self.config.optimizer.kind,
        }

    def _save(self) -> None:
        checkpoint.save(
            self.output,
            self.step,
            self._tensors(),
            {"data": self.packer.state_dict()},
            self._facts(),
            self.parallel,
            keep=self.config.run.keep,
        )

    def _load(self, step: int) -> None:
        own = checkpoint.load(self.output, step, self._tensors(), self._facts(), self.parallel)
        try:
            self.packer.load_state_dict(own["data"])
            checkpoint.set_random_state(own["random"])  # drawing the waiting samples again may have used some
        except Qwen2VLError:
            raise
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            folder = checkpoint.folder_of(self.output, step)
            raise TrainingConfigError(
                f"resume: {folder} holds no state of these data and generators: {error!r:.200}"
            ) from error
        self.step = step


def _listed(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
