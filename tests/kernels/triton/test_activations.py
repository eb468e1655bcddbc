"""The Triton activation kernels, forward and backward, against the eager formulas and float64."""

from __future__ import annotations

import pytest
import torch

from qwen2vl_kernels import quick_gelu, quick_gelu_, swiglu, swiglu_
from qwen2vl_kernels.core.backends import unavailable
from qwen2vl_kernels.ops.quick_gelu import quick_gelu_ref
from qwen2vl_kernels.ops.swiglu import swiglu_ref
from tests.conftest import DEVICE, assert_two_times
from tests.kernels.poison import poisoned  # noqa: F401

if (reason := unavailable("triton", DEVICE)) is not None:
    pytest.skip(f"triton: {reason}", allow_module_level=True)
pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 8), (7, 81), (2, 3, 1040), (300, 16), (0, 8)]


def _quick_gelu(shape, dtype):
    return [torch.randn(shape, device=DEVICE).mul(4).to(dtype)]


def _quick_gelu_bias(shape, dtype):
    return [*_quick_gelu(shape, dtype), torch.randn(shape[-1], device=DEVICE).to(dtype)]


def _swiglu(shape, dtype):
    return [torch.randn(shape, device=DEVICE).mul(4).to(dtype) for _ in range(2)]


def _swiglu_packed(shape, dtype):
    return [torch.randn((*shape[:-1], 2 * shape[-1]), device=DEVICE).mul(4).to(dtype)]


CASES = [
    (quick_gelu, quick_gelu_ref, _quick_gelu),
    (quick_gelu, quick_gelu_ref, _quick_gelu_bias),
    (swiglu, swiglu_ref, _swiglu),
    (swiglu, swiglu_ref, _swiglu_packed),
]
all_cases = pytest.mark.parametrize(("op", "ref", "make"), CASES, ids=[make.__name__[1:] for _, _, make in CASES])


def _forward_and_backward(op, arguments, grad, **options):
    arguments = [t.detach().clone().requires_grad_() for t in arguments]
    output = op(*arguments, **options)
    return [output.detach(), *torch.autograd.grad(output, arguments, grad)]


@all_cases
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_backward(op, ref, make, shape, dtype):
    arguments, grad = make(shape, dtype), torch.randn(shape, device=DEVICE).to(dtype)
    got = _forward_and_backward(op, arguments, grad, backend="triton")
    eager = _forward_and_backward(ref, arguments, grad)
    exact = _forward_and_backward(ref, [a.double() for a in arguments], grad.double())
    for one, theirs, right in zip(got, eager, exact, strict=True):
        assert one.dtype == dtype
        assert_two_times(one, theirs, right, 5e-7)
    with torch.no_grad():
        assert torch.equal(op(*arguments, backend="triton"), got[0])


@all_cases
def test_extremes(op, ref, make):
    """Infinities and values whose exponentials leave float32 give what the formula gives."""
    values = torch.tensor([0.0, -0.0, 1e4, -1e4, 88.7, -88.7, 60000.0, torch.inf, torch.nan], device=DEVICE)
    arguments = [a.copy_(values.repeat(a.numel() // 9).view(a.shape)) for a in make((2, 9), torch.float32)]
    got, want = op(*arguments, backend="triton"), ref(*(a.double() for a in arguments))
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-30, equal_nan=True)


@all_cases
def test_strided(op, ref, make):
    """Columns two apart in rows of a wider buffer; gradients expanded from one row."""
    arguments = make((5, 24), torch.float32)
    wide = torch.randn(5, 3, 2 * arguments[0].shape[-1], device=DEVICE)
    arguments[0] = wide[:, 1, ::2].requires_grad_()
    grad = torch.randn(24, device=DEVICE).expand(5, 24)
    results = []
    for backend in ("triton", "eager"):
        output = op(*arguments, backend=backend)
        results.append([output, *torch.autograd.grad(output, arguments[:1], grad)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place(dtype):
    buffer = torch.randn(4, 3, 2, 40, device=DEVICE).to(dtype)
    up, bias = torch.randn(4, 3, 40, device=DEVICE).to(dtype), torch.randn(40, device=DEVICE).to(dtype)
    for x in (buffer[:, :, 0], buffer[:, :, 0].transpose(0, 1)):  # rows at one stride; rows that no stride walks
        other, other_up = buffer[:, :, 1].clone(), up if x.shape == up.shape else up.transpose(0, 1)
        expected = quick_gelu(x, bias, backend="triton")
        assert quick_gelu_(x, bias, backend="triton") is x and torch.equal(x, expected)
        expected = swiglu(x, other_up, backend="triton")
        assert swiglu_(x, other_up, backend="triton") is x and torch.equal(x, expected)
        assert torch.equal(buffer[:, :, 1], other)
    empty = torch.zeros(0, 8, device=DEVICE)
    assert quick_gelu_(empty, backend="triton").shape == (0, 8) and swiglu_(empty, empty, backend="triton") is empty


@all_cases
def test_gradcheck(op, ref, make):
    arguments = [torch.randn_like(a, dtype=torch.float64).requires_grad_() for a in make((3, 6), torch.float32)]
    assert torch.autograd.gradcheck(lambda *a: op(*a, backend="triton"), arguments)


@all_cases
def test_deterministic_and_the_same_in_every_pack(op, ref, make):
    arguments, grad = make((500, 24), torch.bfloat16), torch.randn(500, 24, device=DEVICE).bfloat16()
    first, second = (_forward_and_backward(op, arguments, grad, backend="triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    rows = slice(100, 117)
    part = [a[rows] if a.ndim == 2 else a for a in arguments]
    got = _forward_and_backward(op, part, grad[rows], backend="triton")
    for one, two in zip(got, first, strict=True):
        if two.ndim == 2:  # the bias' gradient is a sum over rows
            assert torch.equal(one, two[rows])


def test_opcheck():
    x, bias = (torch.randn(*shape, device=DEVICE, requires_grad=True) for shape in ((5, 12), (12,)))
    for b in (None, bias):
        torch.library.opcheck(torch.ops.qwen2vl.quick_gelu_forward.default, (x, b))
        torch.library.opcheck(
            torch.ops.qwen2vl.quick_gelu_forward_.default, (x.detach().clone(), None if b is None else b.detach())
        )
    up = torch.randn(5, 12, device=DEVICE, requires_grad=True)
    torch.library.opcheck(torch.ops.qwen2vl.swiglu_forward.default, (x, up))
    torch.library.opcheck(torch.ops.qwen2vl.swiglu_forward.default, (x, None))
    torch.library.opcheck(torch.ops.qwen2vl.swiglu_forward_.default, (x.detach().clone(), up.detach()))
