"""AdamW and Muon with masters, groups, clipping and the schedule, beside PyTorch's own parts and plain formulas."""

import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from qwen2vl.training.config import OptimizerConfig
from qwen2vl.training.errors import TrainingConfigError
from qwen2vl.training.optim import Optimizer, lr_factor


def test_schedule_by_hand():
    factors = [lr_factor(s, steps=8, warmup=3, minimum=0.1) for s in range(8)]
    assert factors[:3] == [1 / 3, 2 / 3, 1]
    cosine = [0.1 + 0.9 * (1 + math.cos(math.pi * i / 6)) / 2 for i in range(1, 6)]
    assert factors[3:] == pytest.approx(cosine)
    assert lr_factor(8, steps=8, warmup=3, minimum=0.1) == pytest.approx(0.1)
    assert [lr_factor(s, steps=2, warmup=2, minimum=0.0) for s in range(2)] == [0.5, 1]
    assert lr_factor(0, steps=1, warmup=0, minimum=0.0) == pytest.approx(0.5)


def _parameters(dtype):
    torch.manual_seed(1)
    names = ("visual.blocks.0.w", "visual.blocks.0.b", "visual.merger.w", "model.layers.0.w", "model.norm.weight")
    shapes = ((4, 3), (3,), (2, 5), (6, 2), (7,))
    return {n: nn.Parameter(torch.randn(s).to(dtype)) for n, s in zip(names, shapes, strict=True)}


CONFIG = OptimizerConfig(lr=0.01, lr_tower=0.02, lr_merger=0.0, weight_decay=0.3, clip=0.5)


def _oracle(parameters):
    """PyTorch's AdamW with a group for each parameter, and its clipping."""
    rates = {"visual.blocks": 0.02, "visual.merger": 0.0}
    groups = [
        {"params": [p], "lr": next((r for k, r in rates.items() if n.startswith(k)), 0.01),
         "weight_decay": 0.3 if p.ndim > 1 else 0.0}
        for n, p in parameters.items()
    ]  # fmt: skip
    return torch.optim.AdamW(groups, betas=CONFIG.betas, eps=CONFIG.eps, foreach=False)


def test_float32_is_pytorchs():
    ours, theirs = _parameters(torch.float32), _parameters(torch.float32)
    optimizer, oracle = Optimizer(ours.items(), CONFIG, master_weights=True), _oracle(theirs)
    for _ in range(3):
        for p, q in zip(ours.values(), theirs.values(), strict=True):
            p.grad = torch.randn(p.shape)
            q.grad = p.grad.clone()
        expected = nn.utils.clip_grad_norm_(theirs.values(), 0.5)
        oracle.step()
        torch.testing.assert_close(optimizer.step(1.0), expected)
        assert all(p.grad is None for p in ours.values())
    for p, q in zip(ours.values(), theirs.values(), strict=True):
        torch.testing.assert_close(p, q)
    assert torch.equal(ours["visual.merger.w"], _parameters(torch.float32)["visual.merger.w"]), "a rate of zero"


def test_muon_moves_the_matrices_of_layers_and_adamw_the_rest():
    """A step of each of Muon's two matrices is orthogonal, times the rate and 0.2 times the root of its longer side."""
    config = replace(CONFIG, kind="muon")
    ours, theirs = _parameters(torch.float32), _parameters(torch.float32)
    optimizer, oracle = Optimizer(ours.items(), config, master_weights=True), _oracle(theirs)
    muons = {"visual.blocks.0.w": 0.02, "model.layers.0.w": 0.01}
    muon = torch.optim.Muon(
        [{"params": [theirs[name]], "lr": lr} for name, lr in muons.items()],
        weight_decay=0.3,
        adjust_lr_fn="match_rms_adamw",
    )
    oracle.param_groups = [g for g in oracle.param_groups if not any(g["params"][0] is theirs[n] for n in muons)]
    for _ in range(3):
        for p, q in zip(ours.values(), theirs.values(), strict=True):
            p.grad = torch.randn(p.shape)
            q.grad = p.grad.clone()
        nn.utils.clip_grad_norm_(theirs.values(), 0.5)
        oracle.step()
        muon.step()
        optimizer.step(1.0)
    for name, p in ours.items():
        torch.testing.assert_close(p, theirs[name], msg=name)
    state = optimizer.state()
    assert {name for name in state if name.endswith("momentum_buffer")} == {f"{name}.momentum_buffer" for name in muons}
    assert not any(f"{name}.exp_avg" in state for name in muons) and "visual.merger.w.exp_avg" in state
    begin = {name: p.detach().clone() for name, p in _parameters(torch.float32).items()}
    fresh = _parameters(torch.float32)
    optimizer = Optimizer(fresh.items(), replace(config, weight_decay=0.0), master_weights=True)
    for p in fresh.values():
        p.grad = torch.randn(p.shape)
    optimizer.step(0.5)
    for name, lr in muons.items():
        moved = (begin[name] - fresh[name].detach()) / (0.5 * lr * 0.2 * math.sqrt(max(fresh[name].shape)))
        lengths = torch.linalg.svdvals(moved)
        assert ((lengths > 0.6) & (lengths < 1.3)).all(), lengths


def test_muon_refuses_a_part_of_a_matrix():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        parameters = _parameters(torch.float32)
        whole = parameters["model.layers.0.w"].detach()
        sharded = distribute_tensor(whole, init_device_mesh("cpu", (1,)), [Shard(0)])
        parameters["model.layers.0.w"] = nn.Parameter(sharded)
        with pytest.raises(TrainingConfigError, match=r"optimizer\.kind: muon .* model\.layers\.0\.w is sharded"):
            Optimizer(parameters.items(), replace(CONFIG, kind="muon"), master_weights=True)
        assert Optimizer(parameters.items(), CONFIG, master_weights=True).entries
    finally:
        dist.destroy_process_group()


def test_masters_follow_float32_and_weights_are_their_rounding():
    """Gradients of three backwards add up in float32; in bfloat16 256 + 1 + 1 would stay 256."""
    config = OptimizerConfig(lr=1e-4, weight_decay=0.0, clip=None)
    ours = _parameters(torch.bfloat16)
    exact = {n: nn.Parameter(p.detach().float()) for n, p in ours.items()}
    optimizer = Optimizer(ours.items(), config, master_weights=True)
    oracle = torch.optim.AdamW(exact.values(), lr=1e-4, betas=config.betas, eps=config.eps, weight_decay=0.0)
    for _ in range(5):
        for q in exact.values():
            q.grad = torch.zeros_like(q)
        for value in (256.0, 1.0, 1.0):
            for p, q in zip(ours.values(), exact.values(), strict=True):
                p.grad = torch.full_like(p, value)
                q.grad += value
            optimizer.collect()
        assert optimizer.entries[0].master.grad.flatten()[0] == 258
        oracle.step()
        optimizer.step(1.0)
    for entry in optimizer.entries:
        torch.testing.assert_close(entry.master, exact[entry.name].detach(), rtol=0, atol=0)
        assert torch.equal(entry.parameter.detach(), exact[entry.name].detach().bfloat16())


def test_pure_bfloat16_keeps_no_copy():
    optimizer = Optimizer(_parameters(torch.bfloat16).items(), CONFIG, master_weights=False)
    assert not optimizer.collects and all(e.master is e.local for e in optimizer.entries)
    state = optimizer.state()
    assert not any(name.endswith("master") for name in state)
    assert state["model.layers.0.w.exp_avg"].dtype == torch.bfloat16


def test_what_is_frozen_has_no_state():
    parameters = _parameters(torch.bfloat16)
    parameters["visual.blocks.0.w"].requires_grad_(False)
    names = {name.rpartition(".")[0] for name in Optimizer(parameters.items(), CONFIG, master_weights=True).state()}
    assert names == set(parameters) - {"visual.blocks.0.w"}
