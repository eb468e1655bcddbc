"""AdamW with masters, groups, clipping and the schedule, beside PyTorch's own parts and plain formulas."""

import math

import pytest
import torch
from torch import nn

from qwen2vl.training.config import OptimizerConfig
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
