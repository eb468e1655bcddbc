"""rms_norm, layer_norm and their residual forms against transformers, PyTorch and float64."""

import pytest
import torch
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRMSNorm

from qwen2vl_kernels import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from tests.conftest import assert_two_times

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 8), (7, 1536), (2, 3, 80)]


def _exact_layer_norm(x, w, b, eps=1e-6):
    x, w, b = x.double(), w.double(), b.double()
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + eps).sqrt() * w + b


def _exact_rms_norm(x, w, eps=1e-6):
    x, w = x.double(), w.double()
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * w


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rms_norm_matches_transformers_and_the_formula(shape, dtype):
    x, w = torch.randn(shape).mul(3).to(dtype), torch.randn(shape[-1]).to(dtype)
    theirs = Qwen2VLRMSNorm(shape[-1], eps=1e-6)
    theirs.weight.data = w
    got = rms_norm(x, w)
    assert got.dtype == dtype
    assert_two_times(got, theirs(x), _exact_rms_norm(x, w), 1e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layer_norm_matches_pytorch_and_the_formula(shape, dtype):
    x, w, b = (
        torch.randn(shape).mul(3).to(dtype),
        torch.randn(shape[-1]).to(dtype),
        torch.randn(shape[-1]).to(dtype),
    )
    eager = torch.nn.functional.layer_norm(x, shape[-1:], w, b, 1e-6)
    assert_two_times(layer_norm(x, w, b), eager, _exact_layer_norm(x, w, b), 1e-7)


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
