"""A save that a kill or a full disk cuts short: the checkpoint is the old one or the new one, or it is refused."""

import os
import resource
import shutil
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qwen2vl import CheckpointError, Qwen2VL
from tests.training.samples import tiny_config

SHARDED, SINGLE = 80_000, 10**9


@contextmanager
def file_size_limit(count: int):
    """Writing further than ``count`` bytes into a file fails, as on a full disk, whoever writes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _model(value: float, theta: float = 10_000.0) -> Qwen2VL:
    config = tiny_config()
    config = replace(config, text=replace(config.text, rope_theta=theta))
    model = Qwen2VL.from_config(config, device="cpu", dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data.fill_(value)
    return model


def _held(folder: Path) -> tuple[set[float], float]:
    """The values of all weights of a checkpoint, and the base of its rotary angles."""
    model = Qwen2VL.from_pretrained(folder, device="cpu")
    return {value for p in model.parameters() for value in p.unique().tolist()}, model.config.text.rope_theta


def _killed_at(count: int, save) -> bool:
    """Run ``save`` in a child that ends before its ``count``-th change of the folder; whether it came to it."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    left = count

    def then(change):
        def changed(*args, **options):
            nonlocal left
            left -= 1
            if not left:
                os._exit(9)
            return change(*args, **options)

        return changed

    os.replace, Path.unlink = then(os.replace), then(Path.unlink)
    try:
        save()
    except BaseException:
        os._exit(1)
    os._exit(0)


@pytest.mark.parametrize("theta", [10_000.0, 500.0], ids=["same config", "other config"])
@pytest.mark.parametrize("before", [SINGLE, SHARDED], ids=["single", "sharded"])
@pytest.mark.parametrize("after", [SINGLE, SHARDED], ids=["to single", "to sharded"])
def test_a_killed_save_over_a_checkpoint_never_mixes(tmp_path, before, after, theta):
    old, new = ({1.0}, 10_000.0), ({2.0}, theta)
    _model(1.0).save_pretrained(tmp_path / "old", max_shard_bytes=before)
    _model(2.0, theta).save_pretrained(tmp_path / "new", max_shard_bytes=after)
    files = {path.name for path in (tmp_path / "new").iterdir()}
    model, found, count = _model(2.0, theta), [], 0
    while True:
        count += 1
        folder = shutil.copytree(tmp_path / "old", tmp_path / str(count))
        killed = _killed_at(count, lambda folder=folder: model.save_pretrained(folder, max_shard_bytes=after))
        try:
            found.append(_held(folder))
        except CheckpointError as error:
            found.append(str(error))
        if not killed:
            break
        model.save_pretrained(folder, max_shard_bytes=after)
        assert _held(folder) == new, "saved again, over what the kill left"
        left = {path.name for path in folder.glob("*.safetensors")}
        assert len(left) == len({name for name in files if name.endswith(".safetensors")}), "no shard is left over"
    assert found[0] == old and found[-1] == new
    refused = [one for one in found if isinstance(one, str)]
    assert [one for one in found if one not in (old, new)] == refused, "some tensors of each"
    for text in refused:  # what is of one kind and has one config is never refused
        assert ("disagree" in text and before != after) or ("config.json: no such file" in text and theta != old[1])


@pytest.mark.parametrize("size", [SINGLE, SHARDED], ids=["single", "sharded"])
def test_a_full_disk_leaves_what_was_there(tmp_path, size):
    _model(1.0).save_pretrained(tmp_path, max_shard_bytes=size)
    files = sorted(tmp_path.iterdir())
    model = _model(2.0, 500.0)
    sizes = [path.stat().st_size for path in files if path.suffix == ".safetensors"]
    limit = sizes[0] - 1 if size == SINGLE else max(sizes) - 1  # not the first file that is written
    with file_size_limit(limit), pytest.raises(CheckpointError, match=r"safetensors: cannot be written: .*large"):
        model.save_pretrained(tmp_path, max_shard_bytes=size)
    assert sorted(tmp_path.iterdir()) == files and _held(tmp_path) == ({1.0}, 10_000.0)


def test_shards_are_named_as_usual_and_then_anew(tmp_path):
    model = _model(1.0)
    names = []
    for _ in range(3):
        model.save_pretrained(tmp_path, max_shard_bytes=SHARDED)
        names.append(sorted(path.name for path in tmp_path.glob("*.safetensors")))
    assert names[0][0].startswith("model-00001-of-") and names[1][0].startswith("model-2-00001-of-")
    assert names[2] == names[0] and len(names[1]) == len(names[0]) > 1
