"""Whole runs on the tiny model, for tests of the loop; ``python -m tests.training.runs`` forks ranks of several.

A rank is forked from a process that has imported what ranks import, which takes several times as long as their work.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from dataclasses import replace
from pathlib import Path

import torch

from qwen2vl.errors import Qwen2VLError
from qwen2vl.training.config import TrainingConfig
from qwen2vl.training.trainer import Trainer
from tests.training.samples import InMemory, make_example, mixed, tiny_model


def checkpoint(folder: Path, tie: bool = True, **options) -> Path:
    tiny_model(tie, **options).save_pretrained(folder)
    return folder


def settings(folder: Path, output: Path, **tables) -> dict:
    """Tables of a short run that saves at every step; ``tables`` are laid over them."""
    found = {
        "model": {"checkpoint": str(folder), "dtype": "float32"},
        "run": {"output": str(output), "steps": 4, "max_tokens": 48, "accumulation": 2, "lookahead": 6,
                "save_every": 1, "keep": 100, "checkpoint_activations": False},
        "optimizer": {"lr": 1e-2, "lr_tower": 5e-3, "warmup_steps": 1},
    }  # fmt: skip
    for name, table in tables.items():
        found[name] = {**found.get(name, {}), **table}
    return found


def make(folder, output, stage="multimodal", *, dataset=mixed, resume=False, on_step=None, **tables) -> Trainer:
    config = TrainingConfig.from_dict(settings(folder, output, **tables))
    make_dataset = lambda rank, world: dataset(rank=rank, world=world)  # noqa: E731
    return Trainer(config, stage, make_dataset=make_dataset, resume=resume, on_step=on_step)


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def by_rank(rank: int = 0, world: int = 1) -> InMemory:
    """Only text on the first rank, images on the second, videos on the third."""
    kind = ("text", "image", "video")[rank % 3]
    return InMemory([make_example(i, kind, 8 + i % 5) for i in range(12)])


def poisoned(rank: int = 0, world: int = 1) -> InMemory:
    """Sample 5, which the second of two ranks reads, has an image that is not finite; several packs a step."""
    examples = [make_example(i, "image", 6 + i % 3) for i in range(10)]
    rows = [torch.randn(e.pixel_values.shape[0], 1176) for e in examples]
    rows[5][3, 7] = float("inf")
    return InMemory([replace(e, pixel_values=r) for e, r in zip(examples, rows, strict=True)], rank, world)


def differing(rank: int = 0, world: int = 1) -> InMemory:
    """On the second process of all, whatever its data rank, a sample is missing."""
    examples = [make_example(i) for i in range(12)]
    return InMemory(examples[int(os.environ["RANK"]) :], rank, world)


def main(request: dict) -> None:
    """Train and leave the losses, and the exported weights, under ``request["output"]``; or this rank's error."""
    from qwen2vl_kernels import use_backend

    torch.set_num_threads(1)
    sets = {"mixed": mixed, "by_rank": by_rank, "poisoned": poisoned, "differing": differing}
    dataset = sets[request.pop("dataset", "mixed")]
    stop = request.pop("stop", None)
    losses: list[float] = []
    with use_backend("eager"):
        trainer = make(dataset=dataset, on_step=lambda r: losses.append([r.loss, r.grad_norm]), **request)
        if stop is None:
            try:
                trainer.run()
            except Qwen2VLError as error:
                Path(request["output"], f"error-{trainer.parallel.rank}.txt").write_text(str(error))
        else:  # as a kill after that many steps leaves it
            while trainer.step < stop:
                trainer.train_step()
                trainer._save()
    if trainer.parallel.rank == 0:
        Path(request["output"], "losses.json").write_text(json.dumps(losses))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def rank(environment: dict, request: dict, log: str) -> int:
    """The id of a process that is one rank, and writes what it says into ``log``."""
    if pid := os.fork():
        return pid
    status = 1
    try:
        with open(log, "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.environ.update(environment)
        main(request)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def serve() -> None:
    """A line of JSON for every launch: what :func:`rank` takes of each of its ranks, and the seconds that all have.
    The answer is a line with their exit statuses."""
    for line in sys.stdin:
        ranks, patience = json.loads(line)
        assert len(os.listdir("/proc/self/task")) == 1, "a lock that another thread holds would stay locked in a fork"
        pids = [rank(**one) for one in ranks]

        def end(*_, pids=pids) -> None:
            for pid in pids:
                os.kill(pid, signal.SIGKILL)  # also of those that have ended, which are waited for below

        signal.signal(signal.SIGALRM, end)
        signal.alarm(patience)
        ended = [os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT) for pid in pids]
        signal.alarm(0)
        for pid in pids:
            os.waitpid(pid, 0)
        print(json.dumps([one.si_status for one in ended]), flush=True)


if __name__ == "__main__":
    import torch.distributed.fsdp
    import torch.distributed.tensor.parallel

    serve()
