"""rms_norm, layer_norm and their residual forms against transformers, PyTorch and float64."""

import pytest
import torch
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRMSNorm

from qwen2vl_kernels import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from tests.conftest import assert_two_times, relative_error

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 8), (7, 1536), (2, 3, 80)]


def _exact_layer_norm(x, w, b, eps=1e-6):
    x, w, b = x.double(), w.double(), b.double()
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + eps).sqrt() * w + b


def _exact_rms_norm(x, w, eps=1e-6):
    x, w = x.double(), w.double()
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * w


def _rows(shape, dtype):
    """Rows of ordinary size, then the same so small that eps and the mean square are alike."""
    x = torch.randn(shape).mul(3)
    return torch.cat((x, x * 4e-4)).to(dtype)


def _assert_rounded_once(got, exact, rows):
    """As far from float64 as its rounding to the dtype, and float32's statistics; large and small rows apart."""
    for part in (slice(0, rows), slice(rows, None)):
        rounded = relative_error(exact[part].to(got.dtype), exact[part])
        assert relative_error(got[part], exact[part]) <= 1.05 * rounded + 1.5e-7


@pytest.mark.parametrize("eps", [1e-6, 1e-5], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rms_norm_matches_transformers_and_the_formula(shape, dtype, eps):
    x, w = _rows(shape, dtype), torch.randn(shape[-1]).to(dtype)
    theirs = Qwen2VLRMSNorm(shape[-1], eps=eps)
    theirs.weight.data = w
    got, exact = rms_norm(x, w, eps), _exact_rms_norm(x, w, eps)
    assert got.dtype == dtype
    _assert_rounded_once(got, exact, shape[0])
    assert_two_times(got, theirs(x), exact, 1e-7)
    assert torch.equal(rms_norm(x, w), rms_norm(x, w, 1e-6))
    assert torch.equal(add_rms_norm(x, torch.zeros_like(x), w, eps)[0], got)


@pytest.mark.parametrize("eps", [1e-6, 1e-5], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layer_norm_matches_the_formula(shape, dtype, eps):
    x, w, b = _rows(shape, dtype), torch.randn(shape[-1]).to(dtype), torch.randn(shape[-1]).to(dtype)
    got = layer_norm(x, w, b, eps)
    assert got.dtype == dtype
    _assert_rounded_once(got, _exact_layer_norm(x, w, b, eps), shape[0])
    assert torch.equal(layer_norm(x, w, b), layer_norm(x, w, b, 1e-6))
    assert torch.equal(add_layer_norm(x, torch.zeros_like(x), w, b, eps)[0], got)


def test_a_row_of_zeros_stays_finite():
    x, w = torch.zeros(2, 8), torch.ones(8)
    assert torch.equal(rms_norm(x, w), x) and torch.equal(layer_norm(x, w, w), torch.ones(2, 8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_residual_forms_equal_addition_then_norm(dtype):
    x, r, w, b = (torch.randn(s).to(dtype) for s in ((5, 64), (5, 64), (64,), (64,)))
    normed, total = add_rms_norm(x, r, w)
    assert torch.equal(total, x + r) and torch.equal(normed, rms_norm(x + r, w))
    normed, total = add_layer_norm(x, r, w, b)
    assert torch.equal(total, x + r) and torch.equal(normed, layer_norm(x + r, w, b))


def test_norms_read_strided_rows():
    wide = torch.randn(6, 128)
    x, w, b = wide[:, ::2], torch.randn(64), torch.randn(64)
    assert torch.equal(rms_norm(x, w), rms_norm(x.contiguous(), w))
    torch.testing.assert_close(layer_norm(x, w, b), layer_norm(x.contiguous(), w, b), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("op", [rms_norm, layer_norm, add_rms_norm, add_layer_norm], ids=lambda f: f.__name__)
def test_gradients(op):
    arguments = [torch.randn(3, 8, dtype=torch.float64, requires_grad=True)]
    if op.__name__.startswith("add"):
        arguments.append(torch.randn(3, 8, dtype=torch.float64, requires_grad=True))
    arguments.append(torch.randn(8, dtype=torch.float64, requires_grad=True))
    if "layer" in op.__name__:
        arguments.append(torch.randn(8, dtype=torch.float64, requires_grad=True))
    assert torch.autograd.gradcheck(op, arguments)


def test_no_rows():
    x, w = torch.randn(0, 16), torch.randn(16)
    assert rms_norm(x, w).shape == (0, 16) and layer_norm(x, w, w).shape == (0, 16)
