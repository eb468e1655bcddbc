"""Chunked linear cross-entropy against the formula in float64, its memory, and its refusals."""

import pytest
import torch

from qwen2vl.training.errors import TrainingConfigError
from qwen2vl.training.loss import sample_losses, summed_loss
from tests.conftest import assert_two_times


def _inputs(tokens=23, width=6, vocabulary=37, dtype=torch.float64):
    hidden, weight = torch.randn(tokens, width, dtype=dtype), torch.randn(vocabulary, width, dtype=dtype)
    targets = torch.randint(0, vocabulary, (tokens,))
    targets[torch.rand(tokens) < 0.4] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def _by_formula(hidden, weight, targets):
    """Row by row in float64; gradients by autograd through log(sum(exp))."""
    total = hidden.new_zeros(())
    for row, target in zip(hidden, targets.tolist(), strict=True):
        if target >= 0:
            scores = weight @ row
            total = total + scores.exp().sum().log() - scores[target]
    return total


@pytest.mark.parametrize("rows", [1, 4, 5, 100])
def test_loss_and_gradients_in_float64(rows):
    hidden, weight, targets = _inputs()
    expected = _by_formula(hidden, weight, targets) * 0.3
    wanted = torch.autograd.grad(2 * expected, (hidden, weight))
    loss = summed_loss(hidden, weight, targets, scale=0.3, chunk_rows=rows)
    got = torch.autograd.grad(2 * loss, (hidden, weight))
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert (got[0][targets == -100] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_no_worse_than_full_logits(dtype):
    hidden, weight, targets = _inputs(300, 32, 50, dtype)
    exact_in = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    results = []
    for inputs, kind in ((exact_in, "full"), ((hidden, weight), "full"), ((hidden, weight), "chunked")):
        loss = summed_loss(*inputs, targets, scale=0.01, kind=kind, chunk_rows=32)
        results.append((loss.detach(), *torch.autograd.grad(loss, inputs)))
    for exact, eager, got in zip(*results, strict=True):
        assert_two_times(got, eager, exact, 1e-6)


def test_a_frozen_head_and_frozen_states():
    hidden, weight, targets = _inputs()
    summed_loss(hidden, weight.detach(), targets).backward()
    expected, hidden.grad = hidden.grad, None
    summed_loss(hidden, weight, targets).backward()
    assert torch.equal(hidden.grad, expected)
    with torch.no_grad():
        loss = summed_loss(hidden, weight, targets)
    assert not loss.requires_grad and torch.allclose(loss, _by_formula(hidden, weight, targets))


def test_a_graph_that_is_kept_gives_the_same_gradients_again():
    """They were made in the forward, and the last backward scales them in their place."""
    hidden, weight, targets = _inputs()
    loss = summed_loss(hidden, weight, targets, scale=0.3)
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    for a, b in zip(torch.autograd.grad(loss, (hidden, weight)), first, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_nothing_supervised_is_zero_with_zero_gradients():
    hidden, weight, targets = _inputs()
    loss = summed_loss(hidden, weight, torch.full_like(targets, -100))
    loss.backward()
    assert loss == 0 and (hidden.grad == 0).all() and (weight.grad == 0).all()


def test_logits_never_exist_whole(monkeypatch):
    rows, linear = [], torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, *rest: (rows.append(x.shape[0]), linear(x, *rest))[1])
    hidden, weight = torch.randn(64, 8, requires_grad=True), torch.randn(997, 8, requires_grad=True)
    targets = torch.randint(0, 997, (64,))
    summed_loss(hidden, weight, targets, chunk_rows=10).backward()
    assert rows == [10] * 6 + [4]
    rows.clear()
    summed_loss(hidden, weight, targets, kind="full").backward()
    assert rows == [64]


def test_losses_by_sample():
    hidden, weight, targets = _inputs()
    bounds = torch.tensor([0, 5, 6, 23], dtype=torch.int32)
    got = sample_losses(hidden, weight, targets, bounds, chunk_rows=4)
    expected = [_by_formula(hidden[a:b], weight, targets[a:b]) for a, b in ((0, 5), (5, 6), (6, 23))]
    torch.testing.assert_close(got, torch.stack(expected).detach())


def test_refusals():
    hidden, weight, targets = _inputs()
    with pytest.raises(TrainingConfigError, match="loss: must be one of chunked, liger, full, got 'fast'"):
        summed_loss(hidden, weight, targets, kind="fast")
    with pytest.raises(TrainingConfigError, match="loss: 'liger' runs on CUDA, the model is on cpu"):
        summed_loss(hidden, weight, targets, kind="liger")
    with pytest.raises(ValueError, match=r"weight must have shape \(V, C\) with V=37, C=6, got \(37, 5\)"):
        summed_loss(hidden, weight[:, :5], targets)
    with pytest.raises(TypeError, match=r"target must have one of the dtypes int64, got torch\.int32"):
        summed_loss(hidden, weight, targets.int())
    with pytest.raises(TypeError, match="weight must have dtype torch\\.float64, got torch\\.float32"):
        summed_loss(hidden, weight.float(), targets)
    with pytest.raises(ValueError, match="chunk_rows must be positive, got 0"):
        summed_loss(hidden, weight, targets, chunk_rows=0)
