"""What a folder that a run resumes from may hold: nothing of it is executed, and what is forged is refused by name."""

import json
import os
import pickle

import pytest
import torch

from qwen2vl import CheckpointError
from qwen2vl.training import checkpoint
from qwen2vl.training.errors import TrainingConfigError
from tests.model.test_saving import file_size_limit
from tests.training import runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return runs.checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def saved_run(folder, tmp_path_factory):
    """The model that a run began from and its output, with a checkpoint of step 1."""
    output = tmp_path_factory.mktemp("saved_run")
    runs.make(folder, output, run={"steps": 1}, optimizer={"warmup_steps": 0}).run()
    return folder, output


class _Trap:
    """Unpickled, it makes a folder."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_resuming_runs_nothing_that_the_folder_holds(folder, tmp_path):
    runs.make(folder, tmp_path / "out", run={"steps": 1}, optimizer={"warmup_steps": 0}).run()
    saved = checkpoint.folder_of(tmp_path / "out", 1)
    name, own, listing = saved / "__0_0.distcp", saved / "rank-00000.pt", saved / "tensors.json"
    assert set(saved.iterdir()) == {name, own, listing, saved / "run.json"}
    trap, listed = tmp_path / "trap", json.loads(listing.read_text())
    data = name.read_bytes()
    (saved / ".metadata").write_bytes(pickle.dumps(_Trap(trap)))
    assert runs.make(folder, tmp_path / "out", resume=True).step == 1, "what nobody reads"
    listing.unlink()
    with pytest.raises(
        TrainingConfigError, match=r"resume: .*\.metadata, of an earlier version, can run code and is not "
    ):
        runs.make(folder, tmp_path / "out", resume=True)
    torch.save(_Trap(trap), name)
    size = name.stat().st_size
    whole = {"file": name.name, "begin": 0, "bytes": size}
    tensors = {key: {**of, "chunks": [{**of["chunks"][0], **whole}]} for key, of in listed["tensors"].items()}
    listing.write_text(json.dumps({"tensors": tensors}))
    with pytest.raises(TrainingConfigError, match=r"resume: .*step-00000001 is damaged or of another model: "):
        runs.make(folder, tmp_path / "out", resume=True)
    name.write_bytes(data)
    listing.write_text(json.dumps(listed))
    torch.save(_Trap(trap), own)
    with pytest.raises(TrainingConfigError, match=r"resume: .*step-00000001 is damaged or of another model: "):
        runs.make(folder, tmp_path / "out", resume=True)
    assert not trap.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda of: of.update(dtype="load"), "is not described as a tensor"),
        (lambda of: of.update(shape=[2**62, 2**62]), "is not described as a tensor"),
        (lambda of: of.update(chunks=[]), "is not described as a tensor"),
        (lambda of: of["chunks"][0].update(file="../../run.json"), "is not described as a tensor"),
        (lambda of: of["chunks"][0].update(file="__7_0.distcp"), "__7_0.distcp: is no file"),
        (lambda of: of["chunks"][0].update(begin=-1), "is not described as a tensor"),
        (lambda of: of["chunks"][0].update(bytes=10**400), "is not described as a tensor"),
        (lambda of: of["chunks"][0].update(bytes=2**40), "__0_0.distcp ends before byte"),
        (lambda of: of.update(chunks=7), "is no list of tensors"),
    ],
)
def test_a_forged_list_of_tensors_is_refused(saved_run, change, message):
    folder, output = saved_run
    path = checkpoint.folder_of(output, 1) / "tensors.json"
    listed = path.read_text()
    data = json.loads(listed)
    change(data["tensors"]["model.model.norm.weight"])
    path.write_text(json.dumps(data))
    try:
        with pytest.raises(TrainingConfigError, match=f"resume: .*{message}"):
            runs.make(folder, output, resume=True)
    finally:
        path.write_text(listed)


def test_a_rank_s_own_state_is_checked(saved_run):
    folder, output = saved_run
    path = checkpoint.folder_of(output, 1) / "rank-00000.pt"
    own = torch.load(path, weights_only=True)
    for forged in ([1], {**own, "data": 3}, {**own, "random": {}}, {**own, "random": {**own["random"], "python": [1]}}):
        torch.save(forged, path)
        with pytest.raises(TrainingConfigError, match=r"resume: .*step-00000001"):
            runs.make(folder, output, resume=True)
    torch.save(own, path)
    assert runs.make(folder, output, resume=True).step == 1


def test_a_full_disk_leaves_the_steps_before(folder, tmp_path):
    trainer = runs.make(folder, tmp_path, run={"steps": 2}, optimizer={"warmup_steps": 0})
    trainer.train_step()
    trainer._save()
    trainer.train_step()
    with file_size_limit(10_000), pytest.raises(CheckpointError, match=r"step-00000002: cannot be written: .*earlier"):
        trainer._save()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    assert runs.make(folder, tmp_path, run={"steps": 2}, resume=True).step == 1
