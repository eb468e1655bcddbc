"""The Triton norm kernels, forward and backward, against the eager formulas and float64."""

from __future__ import annotations

import pytest
import torch

from qwen2vl_kernels import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from qwen2vl_kernels.core.backends import unavailable
from qwen2vl_kernels.ops.layer_norm import add_layer_norm_ref, layer_norm_ref
from qwen2vl_kernels.ops.rms_norm import add_rms_norm_ref, rms_norm_ref
from tests.conftest import DEVICE, assert_two_times
from tests.kernels.poison import poisoned  # noqa: F401

if (reason := unavailable("triton", DEVICE)) is not None:
    pytest.skip(f"triton: {reason}", allow_module_level=True)
pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 8), (5, 81), (3, 1280), (2, 3, 80), (9, 1536), (1100, 16)]
PAIRS = [(rms_norm, rms_norm_ref), (layer_norm, layer_norm_ref)]
ADDED = [(add_rms_norm, add_rms_norm_ref), (add_layer_norm, add_layer_norm_ref)]


def _arguments(op, shape, dtype):
    """Rows of ordinary size and rows so small that eps counts, far from zero on average."""
    x = torch.randn(shape, device=DEVICE) * 3 + 1
    x[:1] *= 4e-4
    residual = [torch.randn(shape, device=DEVICE)] if op.__name__.startswith("add") else []
    weights = [torch.randn(shape[-1], device=DEVICE) for _ in range(1 + ("layer" in op.__name__))]
    return [t.to(dtype).requires_grad_() for t in (x, *residual, *weights)]


def _tuple(outputs):
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _forward_and_backward(op, arguments, grads, **options):
    arguments = [t.detach().clone().requires_grad_() for t in arguments]
    outputs = _tuple(op(*arguments, **options))
    return [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, arguments, grads)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("op", "ref"), PAIRS + ADDED, ids=lambda f: f.__name__)
def test_forward_and_backward(op, ref, shape, dtype):
    arguments = _arguments(op, shape, dtype)
    count = 2 if op.__name__.startswith("add") else 1
    grads = tuple(torch.randn(shape, device=DEVICE).to(dtype) for _ in range(count))
    got = _forward_and_backward(op, arguments, grads, backend="triton")
    eager = _forward_and_backward(ref, arguments, grads)
    if count == 2:  # the sum is rounded first, and what follows is of the rounded one
        assert torch.equal(got[1], eager[1])
        total = [eager[1].double(), torch.zeros_like(eager[1]).double(), *(a.double() for a in arguments[2:])]
    else:
        total = [a.double() for a in arguments]
    exact = _forward_and_backward(ref, total, tuple(g.double() for g in grads))
    for one, theirs, right in zip(got, eager, exact, strict=True):
        assert one.dtype == theirs.dtype
        assert_two_times(one, theirs, right, 5e-7)
    # Without autograd, where no statistics are kept: the same bits.
    with torch.no_grad():
        for one, two in zip(_tuple(op(*arguments, backend="triton")), got[:count], strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize(("op", "ref"), PAIRS + ADDED, ids=lambda f: f.__name__)
def test_strided_rows_and_gradients(op, ref):
    """Columns two apart, rows of a wider buffer, gradients expanded from one row."""
    arguments = _arguments(op, (6, 40), torch.float32)
    arguments[0] = torch.randn(6, 3, 80, device=DEVICE)[:, 1, ::2].requires_grad_()
    grads = torch.randn(40, device=DEVICE).expand(6, 40)
    results = []
    for options in ({"backend": "triton"}, {"backend": "eager"}):
        first = _tuple(op(*arguments, **options))[0]
        results.append([first, *torch.autograd.grad(first, arguments, grads)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("op", [f for f, _ in PAIRS + ADDED], ids=lambda f: f.__name__)
def test_gradcheck(op):
    arguments = [t.double().detach().requires_grad_() for t in _arguments(op, (3, 10), torch.float32)]
    arguments[0] = torch.randn(3, 10, dtype=torch.float64, device=DEVICE, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *a: op(*a, backend="triton"), arguments)


@pytest.mark.parametrize("op", [f for f, _ in ADDED], ids=lambda f: f.__name__)
def test_gradient_of_the_sum_alone(op):
    arguments = _arguments(op, (3, 10), torch.float32)
    _, total = op(*arguments, backend="triton")
    grads = torch.autograd.grad(total.sum(), arguments[:2])
    assert all(torch.equal(g, torch.ones_like(g)) for g in grads)


@pytest.mark.parametrize("op", [f for f, _ in PAIRS + ADDED], ids=lambda f: f.__name__)
def test_deterministic_and_the_same_in_every_pack(op):
    arguments = _arguments(op, (600, 24), torch.bfloat16)
    added = op.__name__.startswith("add")
    grads = tuple(torch.randn(600, 24, device=DEVICE).bfloat16() for _ in range(1 + added))
    first, second = (_forward_and_backward(op, arguments, grads, backend="triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    rows = slice(100, 117)
    part = [a[rows] if a.ndim == 2 else a for a in arguments]
    got = _forward_and_backward(op, part, tuple(g[rows] for g in grads), backend="triton")
    whole = 2 + 2 * added  # outputs and input gradients; the weights' are sums over rows
    for one, two in zip(got[:whole], first[:whole], strict=True):
        assert torch.equal(one, two[rows])


@pytest.mark.parametrize("op", [f for f, _ in PAIRS + ADDED], ids=lambda f: f.__name__)
def test_no_rows(op):
    arguments = _arguments(op, (0, 12), torch.float32)
    grads = tuple(torch.zeros(0, 12, device=DEVICE) for _ in range(1 + op.__name__.startswith("add")))
    results = _forward_and_backward(op, arguments, grads, backend="triton")
    assert all(not r.any() for r in results)


def test_opcheck():
    x, weight = (
        torch.randn(5, 12, device=DEVICE, requires_grad=True),
        torch.randn(12, device=DEVICE, requires_grad=True),
    )
    for arguments in (
        (x, None, weight, None, 1e-6, False, None),
        (x, x.detach(), weight, weight.detach(), 1e-6, True, None),
    ):
        torch.library.opcheck(torch.ops.qwen2vl.norm_forward.default, arguments)
