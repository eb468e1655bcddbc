"""The Triton kernel of grouped products with quantised weights, against the loop over groups and float64."""

from __future__ import annotations

import pytest
import torch

from qwen2vl_kernels import grouped_quant_linear
from qwen2vl_kernels.core.backends import unavailable
from qwen2vl_kernels.core.launching import target_of
from qwen2vl_kernels.ops.grouped_quant_linear import grouped_quant_linear_ref
from qwen2vl_kernels.triton.grouped_quant import config
from tests.conftest import DEVICE, assert_two_times
from tests.kernels.ops.test_quant_linear import FORMS, weight_of
from tests.kernels.poison import poisoned  # noqa: F401
from tests.kernels.triton.test_grouped_linear import COUNTS

if (reason := unavailable("triton", DEVICE)) is not None:
    pytest.skip(f"triton: {reason}", allow_module_level=True)
pytestmark = pytest.mark.usefixtures("poisoned")


def bounds_of(counts):
    return torch.tensor([0, *counts]).cumsum(0).int().to(DEVICE)


def operands(form, counts, behind, dtype=torch.bfloat16, outputs=37, columns=192):
    """``(x, (weight, scales), bounds, {zeros, block})`` and the weights' values in float64."""
    found = [weight_of(form, outputs, columns, seed) for seed in range(len(counts))]
    weight, scales, zeros = (
        None if parts[0] is None else torch.stack([p.view(torch.uint8) if p.dtype.itemsize == 1 else p for p in parts])
        for parts in list(zip(*(one for one, _ in found), strict=True))[:3]
    )
    weight = weight.view(found[0][0][0].dtype).to(DEVICE)
    x = torch.randn(sum(counts) + behind, columns, device=DEVICE).to(dtype)
    given = {"zeros": None if zeros is None else zeros.to(DEVICE), "block": found[0][0][3]}
    return x, (weight, scales.to(DEVICE)), bounds_of(counts), given, torch.stack([e for _, e in found]).to(DEVICE)


def precise(x, exact, bounds, order=None):
    """Row after row, in float64."""
    y = x.new_zeros(x.shape[0], exact.shape[1], dtype=torch.float64)
    ends = bounds.tolist()
    for g, (begin, end) in enumerate(zip(ends[:-1], ends[1:], strict=True)):
        for m in range(begin, end):
            row = x[m].double()
            y[m] = exact[g] @ (row if order is None else row[order[g]])
    return y


def forward_and_backward(op, x, matrices, bounds, grad, **given):
    x = x.detach().requires_grad_()
    y = op(x, *matrices, bounds, **given)
    return [y.detach(), *torch.autograd.grad(y, x, grad)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_every_form(form, dtype):
    """In small tiles and in large ones, of groups with none to many rows."""
    for height, counts, behind in ((16, [3, 1, 0, 40, 5], 2), (64, [0, 70, 3], 1)):
        x, matrices, bounds, given, exact = operands(form, counts, behind, dtype)
        assert config(len(x), len(counts), 64, target_of(x.device)).block_m == height
        got = grouped_quant_linear(x, *matrices, bounds, **given, backend="triton")
        reference = grouped_quant_linear_ref(x, *matrices, bounds, **given)
        assert got.dtype == dtype and got.shape == (x.shape[0], 37)
        assert_two_times(got, reference, precise(x, exact, bounds), 2e-6)
        assert not got[sum(counts) :].any()


@pytest.mark.parametrize("form", ["int4, zeros", "int8", "fp8, blocks"])
@pytest.mark.parametrize("name", COUNTS)
def test_every_packing_forward_and_backward(name, form):
    counts, behind = COUNTS[name]
    x, matrices, bounds, given, exact = operands(form, counts, behind)
    grad = torch.randn(x.shape[0], 37, device=DEVICE).bfloat16()
    got = forward_and_backward(grouped_quant_linear, x, matrices, bounds, grad, **given, backend="triton")
    eager = forward_and_backward(grouped_quant_linear_ref, x, matrices, bounds, grad, **given)
    right = [precise(x, exact, bounds), precise(grad, exact.mT, bounds)]
    for one, theirs, want in zip(got, eager, right, strict=True):
        assert one.dtype == torch.bfloat16
        assert_two_times(one, theirs, want, 2e-6)
        assert not one[int(bounds[-1]) :].any()


@pytest.mark.parametrize("columns", [192, 160])  # the second one with a last group that is shorter
def test_orders_of_columns(columns):
    x, matrices, bounds, given, exact = operands("int4, zeros", [5, 0, 20], 1, columns=columns)
    order = torch.stack([torch.randperm(columns) for _ in range(3)]).to(DEVICE)
    plain = torch.stack([one[:, o.argsort()] for one, o in zip(exact, order, strict=True)])
    grad = torch.randn(x.shape[0], 37, device=DEVICE).bfloat16()
    right = [precise(x, exact, bounds, order), precise(grad, plain.mT, bounds)]
    for kind in (torch.int32, torch.int64):
        given["order"] = order.to(kind)
        got = forward_and_backward(grouped_quant_linear, x, matrices, bounds, grad, **given, backend="triton")
        eager = forward_and_backward(grouped_quant_linear_ref, x, matrices, bounds, grad, **given)
        for one, theirs, want in zip(got, eager, right, strict=True):
            assert_two_times(one, theirs, want, 2e-6)


@pytest.mark.parametrize("form", ["int4, zeros", "fp8, blocks"])
def test_strided_operands(form):
    """Rows, columns, matrices and their rows, scales, zeros and bounds in wider buffers."""
    x, (weight, scales), bounds, given, _ = operands(form, [5, 0, 20], 1)
    want = grouped_quant_linear(x, weight, scales, bounds, **given, backend="triton")

    def wider(tensor, dim):
        made = torch.full_like(tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor, 77)
        made = torch.stack([made.view(tensor.dtype), made.view(tensor.dtype)], dim + 1).flatten(dim, dim + 1)
        part = made[(slice(None),) * dim + (slice(None, None, 2),)]
        part.view(torch.uint8).copy_(tensor.view(torch.uint8)) if dim < tensor.ndim - 1 else part.copy_(tensor)
        assert part.stride() != tensor.stride()
        return part

    for dim in (0, 1):
        assert torch.equal(
            grouped_quant_linear(
                wider(x, dim), wider(weight, dim), wider(scales, dim), wider(bounds, 0), backend="triton",
                zeros=None if given["zeros"] is None else wider(given["zeros"], dim), block=given["block"],
            ),
            want,
        )  # fmt: skip


@pytest.mark.parametrize("form", ["int4, zeros", "int8", "fp8, blocks"])
def test_deterministic_and_the_same_in_every_pack(form):
    """A row has the same bits alone, among others and behind others, in tiles of one size."""
    for counts in ([9, 0, 14, 3], [150, 0, 9, 70]):
        x, matrices, bounds, given, _ = operands(form, counts, 0)
        given["backend"] = "triton"
        first, second = (grouped_quant_linear(x, *matrices, bounds, **given) for _ in range(2))
        assert torch.equal(first, second)
        others = x.clone()
        begin = counts[0]
        others[:begin] = 3.0
        apart = slice(begin, begin + counts[2])
        assert torch.equal(grouped_quant_linear(others, *matrices, bounds, **given)[apart], first[apart])
    few = grouped_quant_linear(x[150:159], *matrices, bounds_of([0, 0, 9, 0]), **given)
    one = grouped_quant_linear(x[155:156], *matrices, bounds_of([0, 0, 1, 0]), **given)
    assert torch.equal(one, few[5:6])


def test_what_is_no_number_reaches_its_own_rows_alone():
    x, (weight, scales), bounds, given, _ = operands("fp8, rows", [4, 0, 3], 2)
    weight[0, 2, 33] = weight[1, :, 5] = float("nan")
    x[5, 7] = float("inf")
    x[7:] = float("nan")
    got = grouped_quant_linear(x, weight, scales, bounds, **given, backend="triton")
    assert got[:4, 2].isnan().all() and not got[:4, 3:].isnan().any()
    assert got[[4, 6]].isfinite().all() and not got[5].isfinite().any() and not got[7:].any()


def test_what_leaves_rows_and_columns_is_cut():
    """Nobody reads bounds and orders of a GPU on the host before the kernel does."""
    from qwen2vl_kernels.triton.grouped_quant import launch_grouped_quant

    x, matrices, _, given, _ = operands("int8", [4, 4], 0)
    bad = torch.tensor([-3, 5, 10**6], dtype=torch.int32, device=DEVICE)
    order = torch.arange(192, device=DEVICE).repeat(2, 1)
    cut = order.clone()
    order[0, 0], order[1, -1], cut[0, 0], cut[1, -1] = -(10**12), 10**12, 0, 191
    got = launch_grouped_quant(x, *matrices, bad, None, order, given["block"])
    want = grouped_quant_linear_ref(x, *matrices, bounds_of([5, 3]), **given, order=cut)
    torch.testing.assert_close(got, want, rtol=2**-7, atol=2**-5)


def test_opcheck_and_second_derivatives():
    x, (weight, scales), bounds, given, _ = operands("int4, zeros", [2, 0, 3], 1)
    x.requires_grad_()
    tensors = (x, weight, scales, bounds, given["zeros"], None, *given["block"])
    for backend in ("triton", "eager"):
        torch.library.opcheck(torch.ops.qwen2vl.grouped_quant_linear_forward.default, (*tensors, backend))
    y = grouped_quant_linear(x, weight, scales, bounds, **given, backend="triton")
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="grouped_quant_linear: its gradients have no derivatives"):
        grad.sum().backward()


def test_float32_is_refused_by_name():
    x, matrices, bounds, given, _ = operands("int8", [2, 3], 0, torch.float32)
    with pytest.raises(TypeError, match="x must have one of the dtypes bfloat16, float16 for backend 'triton', got"):
        grouped_quant_linear(x, *matrices, bounds, **given, backend="triton")
