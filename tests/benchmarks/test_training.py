"""The training case: what it counts, that its gate turns red, and the whole command once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import report
from benchmarks.case import Context, Provider, Workload
from benchmarks.cases import _loss, _training, train
from benchmarks.random_checkpoint import small_config, write_random_checkpoint
from benchmarks.run import run_case
from qwen2vl.training.flops import layer_matrices
from qwen2vl.training.packing import collate

ROOT = Path(__file__).resolve().parents[2]


def test_the_model_has_the_proportions_it_claims():
    from qwen2vl import Qwen2VLConfig

    got, real = _training.train_config(), Qwen2VLConfig.preset("2b")
    assert (got.text.head_dim, got.vision.head_dim) == (real.text.head_dim, real.vision.head_dim) == (128, 80)

    def head(c):
        return c.text.vocab_size * c.text.hidden_size / (c.text.num_hidden_layers * layer_matrices(c))

    assert head(got) == pytest.approx(head(real), rel=0.01)


def test_samples_are_the_mix_and_the_same_every_time():
    config = _training.train_config()
    samples = _training.make_samples(config, 40)
    again = _training.make_samples(config, 40)
    assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(samples, again, strict=True))
    grids = [None if e.image_grid_thw is None else tuple(e.image_grid_thw[0, 1:].tolist()) for e in samples]
    for kind in _training.MIX:
        share = sum(k.share for k in _training.MIX if k.grid == kind.grid)
        assert grids.count(kind.grid) == pytest.approx(share * 40, abs=1)
    collate(samples, config)  # every field fits the others
    assert min(e.tokens for e in samples) * 8 < max(e.tokens for e in samples)
    assert _training.padded_tokens([samples[:2]]) == 2 * max(e.tokens for e in samples[:2])


def test_training_lowers_the_loss_alike_on_both_sides(tmp_path):
    """Several updates at a rate that shows: the trajectories are the same, and go down."""
    folder = write_random_checkpoint(tmp_path, small_config(), dtype=torch.float32, std=0.1)
    found = []
    for kind in _training.SIDES.values():
        side = kind(folder, torch.device("cpu"), torch.float32)
        side.optimizer.peaks = dict.fromkeys(side.optimizer.peaks, 1e-3)
        steps = [side.prepare(_training.make_samples(side.config, 4, _training.SMALL_MIX))] * 4
        found.append(_training.train(side, steps))
    torch.testing.assert_close(*found, rtol=1e-4, atol=0)
    assert found[0][-1] < 0.95 * found[0][0]


def test_the_gate_is_red_for_another_loss(monkeypatch):
    """Were ours to learn from one token less, it would show."""
    real = _training.Ours.loss

    def wrong(self, samples):
        samples = [*samples[:-1], type(samples[-1])(**{**vars(samples[-1]), "labels": samples[-1].labels.clone()})]
        samples[-1].labels[-1] = -100
        return real(self, samples)

    with Context(quick=True) as context, torch.inference_mode():
        assert all(check.passed for check in train.gate(context))
        monkeypatch.setattr(_training.Ours, "loss", wrong)
        assert not all(check.passed for check in train.gate(context))


def test_rates_of_tokens_are_shown():
    from benchmarks.case import Case, Check

    workload = Workload(
        "a pass",
        [Provider("ours", lambda: torch.ones(64, 64) @ torch.ones(64, 64))],
        gate=lambda outputs: [Check("none", 0, 0)],
        per_call=500,
        unit="token",
        flops=1e3,
    )
    (row,) = run_case(Case("tiny", "", lambda context: iter([workload])), Context(quick=True))["rows"]
    assert row["units_per_s"] == pytest.approx(1 / row["median"])
    assert report.row_cells(row)[5] == f"{row['units_per_s']:,.0f} tokens/s"


def test_train_by_command(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "run", "train", "--quick", "--rounds", "1", "--out", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    assert "tokens/s" in done.stdout
    written = json.loads((tmp_path / "train.json").read_text())
    rows = {(row["provider"], row["metric"]) for row in written["rows"]}
    assert {("ours", "time"), ("transformers", "time"), ("ours", "peak"), ("transformers", "peak")} <= rows
    assert {("chunked", "seconds"), ("full logits", "peak over the inputs")} <= rows
    assert all(row["median"] > 0 for row in written["rows"])
    assert any("gradients of step" in check["name"] for check in written["gate"])
    assert {skip["provider"] for skip in written["skipped"]} <= {"Liger", "triton", "torch.linear_cross_entropy"}
    moved = {row["provider"]: row["median"] for row in written["rows"] if "bf16 on a GPU, counted" in row["workload"]}
    assert moved["triton"] < moved["chunked"] and moved["triton"] < moved["full logits"]


def test_bytes_that_the_loss_moves():
    """The kernel's logits are written once, read twice, overwritten and read by two products: six times two bytes."""
    wide = _loss.counted_bytes("triton", 8192, 1536, 151_936, 2, "cuda") - 151_936 * 1536 * (8 * 12 + 6 + 4)
    assert wide == 6 * 2 * 8192 * 151_936
    float32 = _loss.counted_bytes("full", 100, 8, 50, 4, "cpu")
    assert float32 == 100 * 50 * (4 + 8 + 4 + 12 + 8) + 50 * 8 * 12
