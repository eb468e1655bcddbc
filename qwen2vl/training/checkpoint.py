"""Checkpoints of a run, written whole or not at all, and the released layout at its end.

    output/checkpoints/step-00000500/      parameters and optimiser of any number of ranks: see storage.py
        rank-00000.pt                      a rank's own: where its data stands, its random generators
        run.json                           the step and how many ranks wrote it; written last

A folder gets its name only when every rank has finished, so the latest one is always complete. Reading one runs nothing
that it holds.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException

from ..adapter import adapted, adapter_parameters, merged_parameters, write_adapter
from ..errors import CheckpointError
from ..files import read_json, write_json
from ..hub import Checkpoint
from ..interrupts import finish_first
from ..model import Qwen2VL
from ..prompt.processor import Processor
from .errors import TrainingConfigError
from .parallel import Parallel, whole
from .storage import TensorReader, TensorWriter

_NAME = re.compile(r"step-(\d{8})")
#: Copied beside exported weights as they are; tokenizer and image settings are written as the processor has them.
_COPIED = ("vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json", "generation_config.json")


def steps_saved(output: Path) -> list[int]:
    """Steps with a complete checkpoint, in order."""
    found = [_NAME.fullmatch(path.name) for path in (output / "checkpoints").glob("step-*")]
    return sorted(int(match[1]) for match in found if match)


def folder_of(output: Path, step: int) -> Path:
    return output / "checkpoints" / f"step-{step:08d}"


def save(
    output: Path,
    step: int,
    tensors: dict[str, Any],
    own: dict[str, Any],
    facts: dict[str, Any],
    parallel: Parallel,
    *,
    keep: int,
) -> Path:
    """Write one checkpoint; all ranks call this together.

    Args:
        tensors: nested dictionaries of tensors, shards (DTensors) or the same on all ranks.
        own: this rank's, of what ``torch.load(weights_only=True)`` reads.
        facts: for run.json.
        keep: the latest checkpoints that stay.

    Raises :class:`CheckpointError` on every rank where one of them cannot write, as on a full disk; earlier steps'
    checkpoints are as they were then.
    """
    final = folder_of(output, step)
    partial = final.with_name(f".{final.name}.partial")
    with finish_first("the checkpoint"):
        if parallel.rank == 0:
            for left in final.parent.glob(".step-*.partial"):  # by a kill
                shutil.rmtree(left, ignore_errors=True)
            partial.mkdir(parents=True)
        parallel.barrier()
        problem = ""
        try:
            with _alone_or_together() as no_dist:
                state_dict_saver.save(tensors, storage_writer=TensorWriter(partial), no_dist=no_dist)
            torch.save({**own, "random": random_state()}, partial / f"rank-{parallel.rank:05d}.pt")
        except (CheckpointException, CheckpointError, OSError, RuntimeError) as error:  # as on a full disk
            problem = _last_line(error)
        problems = parallel.everywhere(problem)
        if parallel.rank == 0 and not any(problems):
            write_json(partial / "run.json", {**facts, "step": step, "world": parallel.world})
            shutil.rmtree(final, ignore_errors=True)
            os.replace(partial, final)
            for old in steps_saved(output)[:-keep]:
                shutil.rmtree(folder_of(output, old), ignore_errors=True)
        elif parallel.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        parallel.barrier()
    if any(problems):
        raise CheckpointError(f"{final}: cannot be written: {next(filter(None, problems))}; earlier steps are there")
    return final


def load(output: Path, step: int, tensors: dict[str, Any], facts: dict[str, Any], parallel: Parallel) -> dict[str, Any]:
    """Fill ``tensors`` in place; returns this rank's ``own``, with "random" for :func:`set_random_state`.

    Raises :class:`TrainingConfigError` when the checkpoint's facts are others or it was written by another number of
    ranks (tensors would fit, but where each rank's data stands could not be told), or when it is damaged.
    """
    folder = folder_of(output, step)
    have = read_json(folder / "run.json")
    if not isinstance(have, dict):
        raise TrainingConfigError(f"resume: {folder / 'run.json'} must hold a JSON object, got {type(have).__name__}")
    have = {"optimizer": "adamw", **have}  # the only one there was when no checkpoint said which
    for key, want in {**facts, "world": parallel.world}.items():
        if have.get(key) != want:
            raise TrainingConfigError(f"resume: {folder} has {key} {have.get(key)!r:.200}, this run has {want!r}")
    try:
        with _alone_or_together() as no_dist:
            state_dict_loader.load(tensors, storage_reader=TensorReader(folder), no_dist=no_dist)
        own = torch.load(folder / f"rank-{parallel.rank:05d}.pt", map_location="cpu", weights_only=True)
        if not isinstance(own, dict) or not own.keys() >= {"data", "random"}:
            raise CheckpointError(f"rank-{parallel.rank:05d}.pt holds no state of data and generators")
        return own
    except (CheckpointException, CheckpointError, OSError, EOFError, RuntimeError, UnpicklingError) as error:
        raise TrainingConfigError(f"resume: {folder} is damaged or of another model: {_last_line(error)}") from error


def _last_line(error: BaseException) -> str:
    """What it was: an exception of torch.distributed.checkpoint lists every rank's traceback."""
    return "".join([line for line in str(error).splitlines() if line.strip()][-1:])[:1000] or repr(error)[:1000]


@contextmanager
def _alone_or_together() -> Iterator[bool]:
    """Whether there is one process only, of which torch warns even when told."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield not dist.is_initialized()


def random_state() -> dict[str, Any]:
    """The state of every generator that data and dropout may draw from."""
    name, keys, *rest = np.random.get_state(legacy=True)
    found = {"python": random.getstate(), "numpy": (name, keys.tolist(), *rest), "torch": torch.get_rng_state()}  # type: ignore[union-attr]
    if torch.cuda.is_initialized():
        found["cuda"] = torch.cuda.get_rng_state()
    return found


def set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def export(
    model: Qwen2VL, folder: Path, parallel: Parallel, *, processor: Checkpoint | None = None, base: str | None = None
) -> None:
    """Write ``model`` in the released layout, adapters merged, with the processor's files; all ranks call this.

    Adapters are written by themselves, too, into the folder ``adapter`` beside it, whose configuration names ``base``.
    Rank 0 holds the whole model on the host meanwhile.
    """
    if adapted(model):
        own = {name: whole(tensor).cpu() for name, tensor in adapter_parameters(model)}
        if parallel.rank == 0:
            write_adapter(model, folder.with_name("adapter"), own, base=base)
    found: dict[str, torch.Tensor] = {}
    for name, tensor in merged_parameters(model):
        full = whole(tensor)
        if parallel.rank == 0:
            found[name] = full.detach().cpu()
    if parallel.rank == 0:
        with torch.device("meta"):
            plain = Qwen2VL(model.config)
        plain.load_state_dict(found, strict=True, assign=True)
        plain.generation_defaults = model.generation_defaults
        plain.save_pretrained(folder)
        if processor is not None and (processor.folder / "tokenizer.json").is_file():
            Processor.from_pretrained(processor).save_pretrained(folder)
            for name in _COPIED:
                if (processor.folder / name).is_file() and not (folder / name).exists():
                    shutil.copyfile(processor.folder / name, folder / name)
    parallel.barrier()
