"""Processes over gloo on the CPU: the losses, norms and weights of one process, and no rank left waiting."""

import json
import os
import re
import socket
import subprocess
import sys
from itertools import cycle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qwen2vl.training.packing import Packer
from tests.training import runs
from tests.training.samples import mixed, tiny_moe_config

ROOT = Path(__file__).parents[2]
#: Seconds after which ranks that wait for each other have failed.
PATIENCE = 120


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    """``launch(world, request)``: ``runs.main(request)`` in ``world`` processes, as torchrun would start them."""
    base = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.training.runs"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    server = subprocess.Popen(command, env=base, cwd=ROOT, **pipes)

    def launch(world: int, request: dict) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
        logs = [tmp_path_factory.mktemp("rank") / "log" for _ in range(world)]
        ranks = [
            {"environment": {**place, "RANK": str(n), "LOCAL_RANK": str(n)}, "request": request, "log": str(log)}
            for n, log in enumerate(logs)
        ]
        server.stdin.write(json.dumps([ranks, PATIENCE]) + "\n")
        server.stdin.flush()
        answer = server.stdout.readline()
        assert answer, f"the process that starts ranks ended with {server.wait()}"
        for status, log in zip(json.loads(answer), logs, strict=True):
            assert status == 0, log.read_text()[-3000:]

    yield launch
    server.communicate()  # the end of its input is the end of its work


def one_process(folder, output, stage, data_ranks: int, dataset=mixed, world: int | None = None, **tables):
    """The same packs in one process: those of all data ranks in turn, ``data_ranks`` a step; ``world``: their number
    where each takes several."""
    losses = []
    tables["run"] = {**tables.get("run", {}), "accumulation": data_ranks}
    trainer = runs.make(folder, output, stage, on_step=lambda r: losses.append([r.loss, r.grad_norm]), **tables)
    run = trainer.config.run
    packers = [
        Packer(dataset(rank=r, world=world or data_ranks), trainer.model.config, max_tokens=run.max_tokens,
               lookahead=run.lookahead)
        for r in range(world or data_ranks)
    ]  # fmt: skip
    turns = cycle(packers)
    trainer.packer = type("Turns", (), {"__next__": lambda self: next(next(turns)), "state_dict": lambda self: {}})()
    trainer.run()
    return losses


def compare(
    launch,
    tmp_path,
    world: int,
    stage: str,
    parallel: dict,
    data_ranks: int,
    dataset="mixed",
    tie=True,
    config=None,
    **tables,
):
    folder = runs.checkpoint(tmp_path / "checkpoint", tie, config=config)
    # An eps far above the gradients makes AdamW's steps proportional to them: with the usual one, a gradient that is
    # too large by a factor would not show, and one that is nearly zero would be all rounding.
    tables["optimizer"] = {"eps": 10.0, "lr": 1.0, "lr_tower": 2.0}
    tables["run"] = {"accumulation": 1, "steps": 3, "save_every": 100, **tables.get("run", {})}
    expected = one_process(folder, tmp_path / "one", stage, data_ranks,
                           mixed if dataset == "mixed" else runs.by_rank, **tables)  # fmt: skip
    launch(world, {"folder": str(folder), "output": str(tmp_path / "many"), "stage": stage, "dataset": dataset,
                   "parallel": parallel, **tables})  # fmt: skip
    got = json.loads((tmp_path / "many" / "losses.json").read_text())
    assert len(got) == 3
    torch.testing.assert_close(torch.tensor(got), torch.tensor(expected), rtol=2e-5, atol=0)
    ours, theirs = (load_file(tmp_path / who / "model" / "model.safetensors") for who in ("many", "one"))
    before = load_file(folder / "model.safetensors")
    assert ours.keys() == theirs.keys() == before.keys()
    moved = {name: (theirs[name] - before[name]).norm().item() for name in ours}
    assert any(moved.values())
    for name in ours:
        error = (ours[name] - theirs[name]).norm().item()
        assert error <= 2e-5 * moved[name] + 1e-7 * max(moved.values()), f"{name}: {error} of {moved[name]}"


def test_fsdp_of_two(launch, tmp_path):
    compare(launch, tmp_path, 2, "multimodal", {"mode": "fsdp"}, 2, run={"checkpoint_activations": True})


def test_experts_on_two(launch, tmp_path):
    """Five of them, of which the ranks hold three and two; their balance is the mean over the ranks' packs."""
    compare(launch, tmp_path, 2, "multimodal", {"mode": "fsdp"}, 2, config=tiny_moe_config())


def test_experts_split_in_two(launch, tmp_path):
    """Each rank has three of six, and half of the shared one's columns."""
    config = tiny_moe_config(num_experts=6)
    compare(launch, tmp_path, 2, "multimodal", {"tensor": 2, "mode": "fsdp"}, 1, config=config)


def test_replicas_of_two(launch, tmp_path):
    compare(launch, tmp_path, 2, "multimodal", {"mode": "ddp"}, 2, tie=False)


@pytest.mark.parametrize("mode", ["fsdp", "ddp"])
def test_killed_and_resumed_with_masters_and_accumulation(launch, tmp_path, mode):
    """bfloat16: two ranks, killed after two steps, are bitwise the run that went on; and no pack's gradient is lost."""
    folder = runs.checkpoint(tmp_path / "checkpoint")
    tables = {"run": {"accumulation": 2, "steps": 3}, "model": {"dtype": "bfloat16"}}
    request = {"folder": str(folder), "stage": "multimodal", "parallel": {"mode": mode}, **tables}
    launch(2, {**request, "output": str(tmp_path / "whole")})
    launch(2, {**request, "output": str(tmp_path / "cut"), "stop": 2})
    launch(2, {**request, "output": str(tmp_path / "cut"), "resume": True})
    whole, cut = (json.loads((tmp_path / name / "losses.json").read_text()) for name in ("whole", "cut"))
    assert len(whole) == 3 and cut == whole[2:]
    weights = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "cut")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    one = one_process(folder, tmp_path / "one", "multimodal", 4, world=2, **tables)
    torch.testing.assert_close(torch.tensor(whole), torch.tensor(one), rtol=0.02, atol=0)


def test_ranks_name_the_sample_together(launch, tmp_path):
    folder = runs.checkpoint(tmp_path / "checkpoint")
    request = {"folder": str(folder), "output": str(tmp_path / "out"), "stage": "multimodal", "dataset": "poisoned",
               "parallel": {"mode": "fsdp"}}  # fmt: skip
    launch(2, request)
    for rank in range(2):
        message = (tmp_path / "out" / f"error-{rank}.txt").read_text()
        assert re.match(r"step 1: the loss is not finite in 1 of \d+ samples: memory:5 \(nan\)\. ", message), message


def test_decoder_split_in_two_refuses_samples_that_differ(launch, tmp_path):
    """As where one of the ranks could not read a file: an error on both, and nothing learned from two packs at once."""
    folder = runs.checkpoint(tmp_path / "checkpoint")
    request = {"folder": str(folder), "output": str(tmp_path / "out"), "stage": "multimodal", "dataset": "differing",
               "parallel": {"mode": "fsdp", "tensor": 2}}  # fmt: skip
    launch(2, request)
    messages = [(tmp_path / "out" / f"error-{rank}.txt").read_text() for rank in range(2)]
    assert all("drew different samples" in m and f"rank {n} has memory:" in m for n, m in enumerate(messages)), messages


def test_decoder_split_in_two(launch, tmp_path):
    compare(launch, tmp_path, 2, "multimodal", {"tensor": 2, "mode": "fsdp"}, 1, tie=False)


@pytest.mark.slow
def test_fsdp_of_two_times_decoder_split_in_two(launch, tmp_path):
    compare(launch, tmp_path, 4, "multimodal", {"tensor": 2}, 2, run={"checkpoint_activations": True})


@pytest.mark.parametrize("stage", ["vision", "instruct"])
def test_ranks_with_only_text_and_only_images_do_not_wait_for_each_other(launch, tmp_path, stage):
    compare(launch, tmp_path, 2, stage, {"mode": "fsdp"}, 2, dataset="by_rank")


@pytest.mark.slow
def test_ranks_with_only_text_only_images_and_only_videos(launch, tmp_path):
    compare(launch, tmp_path, 3, "multimodal", {"mode": "fsdp"}, 3, dataset="by_rank")


def test_what_a_rank_says_as_it_fails_is_shown(launch, tmp_path):
    """The ranks of the tests above are forked, and what they print is in files."""
    request = {"folder": str(tmp_path / "nowhere"), "output": str(tmp_path / "out"), "stage": "vision"}
    with pytest.raises(AssertionError, match=r"(?s)Traceback.*nowhere: no such folder"):
        launch(1, request)
