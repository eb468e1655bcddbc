"""quick_gelu and swiglu against transformers' activations and float64."""

import pytest
import torch
from transformers.activations import ACT2FN

from qwen2vl_kernels import quick_gelu, quick_gelu_, swiglu, swiglu_
from qwen2vl_kernels.ops.quick_gelu import quick_gelu_ref
from qwen2vl_kernels.ops.swiglu import swiglu_ref
from tests.conftest import assert_two_times

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _assert_few_roundings(got, exact):
    """No further from float64 than twice the result's own rounding, in float32 a few roundings of the function."""
    assert_two_times(got, exact.to(got.dtype), exact, 1e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tracked", [False, True], ids=["no-grad", "grad"])
def test_quick_gelu(dtype, tracked):
    x, bias = torch.randn(9, 40).mul(3).to(dtype), torch.randn(40).to(dtype)
    before = x.clone()
    h = x.double()
    exact = h * torch.sigmoid(1.702 * h)
    got = quick_gelu(x.requires_grad_(tracked))
    assert got.dtype == dtype
    _assert_few_roundings(got.detach(), exact)
    assert_two_times(got.detach(), ACT2FN["quick_gelu"](before), exact, 1e-7)
    assert torch.equal(x.detach(), before), "the input must survive"
    h = (before + bias).double()
    exact = h * torch.sigmoid(1.702 * h)
    _assert_few_roundings(quick_gelu(before, bias), exact)
    assert_two_times(quick_gelu(before, bias), ACT2FN["quick_gelu"](before + bias), exact, 1e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tracked", [False, True], ids=["no-grad", "grad"])
def test_swiglu_split_and_packed(dtype, tracked):
    packed = torch.randn(9, 80).mul(3).to(dtype)
    before = packed.clone()
    gate, up = packed[:, :40], packed[:, 40:]
    exact = gate.double() * torch.sigmoid(gate.double()) * up.double()
    eager = ACT2FN["silu"](gate) * up
    packed.requires_grad_(tracked)
    for got in (swiglu(packed[:, :40], packed[:, 40:]), swiglu(packed)):
        assert got.dtype == dtype
        _assert_few_roundings(got.detach(), exact)
        assert_two_times(got.detach(), eager, exact, 1e-7)
    assert torch.equal(packed.detach(), before), "the input must survive"


def test_upcast_rounds_once():
    x, up = torch.randn(50, 64).bfloat16(), torch.randn(50, 64).bfloat16()
    assert torch.equal(quick_gelu_ref(x, upcast=True), quick_gelu_ref(x.float()).bfloat16())
    assert torch.equal(swiglu_ref(x, up, upcast=True), swiglu_ref(x.float(), up.float()).bfloat16())


def test_gradients():
    x, y = (torch.randn(3, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    bias = torch.randn(8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(quick_gelu, (x, bias))
    assert torch.autograd.gradcheck(swiglu, (x, y))
    assert torch.autograd.gradcheck(swiglu, (x,))


def test_in_place_forms_equal_the_others():
    """Row counts below, at and above the pieces they work in; strided rows; refused under autograd."""
    for rows in (0, 1, 51, 52, 300):
        wide = torch.randn(rows, 2, 5120).bfloat16()
        x, up, bias = wide[:, 0], wide[:, 1].clone(), torch.randn(5120).bfloat16()
        expected = quick_gelu(x), swiglu(x, up), quick_gelu(x, bias)
        assert torch.equal(quick_gelu_(x.clone()), expected[0])
        assert torch.equal(quick_gelu_(x.clone(), bias), expected[2])
        assert torch.equal(swiglu_(x.clone(), up), expected[1])
        other = wide[:, 1].clone()
        assert quick_gelu_(x) is x and torch.equal(x, expected[0]) and torch.equal(wide[:, 1], other)
    with pytest.raises(ValueError, match="quick_gelu_: x requires grad"):
        quick_gelu_(torch.randn(2, 4, requires_grad=True))
    with pytest.raises(ValueError, match="swiglu_: up requires grad"):
        swiglu_(torch.randn(2, 4), torch.randn(2, 4, requires_grad=True))
