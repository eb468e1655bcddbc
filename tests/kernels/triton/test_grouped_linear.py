"""The Triton kernels of grouped products and of the sort before them, against the loop over groups and float64."""

from __future__ import annotations

import pytest
import torch

from qwen2vl_kernels import group_by_expert, grouped_linear
from qwen2vl_kernels.core.backends import unavailable
from qwen2vl_kernels.ops.grouped_linear import group_by_expert_ref, grouped_linear_ref
from tests.conftest import DEVICE, assert_two_times
from tests.kernels.poison import poisoned  # noqa: F401

if (reason := unavailable("triton", DEVICE)) is not None:
    pytest.skip(f"triton: {reason}", allow_module_level=True)
pytestmark = pytest.mark.usefixtures("poisoned")

#: Rows of each group, and rows behind all of them: ragged, empty in every place, all in one, more than a tile, none.
COUNTS = {
    "ragged": ([3, 1, 0, 40, 5], 0),
    "empty ends": ([0, 0, 7, 0], 0),
    "one has all": ([0, 131, 0], 0),
    "rows of no group": ([2, 0, 3], 4),
    "no rows in groups": ([0, 0], 3),
    "no rows": ([0, 0], 0),
    "one group": ([17], 0),
}


def _bounds(counts: list[int]) -> torch.Tensor:
    return torch.tensor([0, *counts]).cumsum(0).int().to(DEVICE)


def _operands(counts, behind, dtype, columns=24, depth=40):
    x = torch.randn(sum(counts) + behind, depth, device=DEVICE).to(dtype)
    return x, torch.randn(len(counts), columns, depth, device=DEVICE).to(dtype), _bounds(counts)


def _forward_and_backward(op, x, weight, bounds, grad, **options):
    x, weight = (t.detach().requires_grad_() for t in (x, weight))
    y = op(x, weight, bounds, **options)
    return [y.detach(), *torch.autograd.grad(y, (x, weight), grad)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", COUNTS)
def test_forward_and_backward(name, dtype):
    x, weight, bounds = _operands(*COUNTS[name], dtype)
    grad = torch.randn(x.shape[0], weight.shape[1], device=DEVICE).to(dtype)
    got = _forward_and_backward(grouped_linear, x, weight, bounds, grad, backend="triton")
    eager = _forward_and_backward(grouped_linear_ref, x, weight, bounds, grad)
    exact = _forward_and_backward(grouped_linear_ref, x.double(), weight.double(), bounds, grad.double())
    for one, theirs, right in zip(got, eager, exact, strict=True):
        assert one.dtype == dtype
        assert_two_times(one, theirs, right, 5e-7)
    inside = int(bounds[-1])
    assert not got[0][inside:].any() and not got[1][inside:].any()
    empty = [g for g, count in enumerate(COUNTS[name][0]) if not count]
    assert not got[2][empty].any()
    with torch.no_grad():
        assert torch.equal(grouped_linear(x, weight, bounds, backend="triton"), got[0])


def test_the_reference_is_the_formula():
    x, weight, bounds = _operands(*COUNTS["rows of no group"], torch.float64)
    got = grouped_linear_ref(x, weight, bounds)
    for m, group in enumerate([0, 0, 2, 2, 2]):
        torch.testing.assert_close(got[m], weight[group] @ x[m])
    assert not got[5:].any()
    low = grouped_linear_ref(x.bfloat16(), weight.bfloat16(), bounds, upcast=True)
    assert torch.equal(low, grouped_linear_ref(x.bfloat16().float(), weight.bfloat16().float(), bounds).bfloat16())


def test_strided_operands_and_widths_of_several_tiles():
    """Rows and matrices in wider buffers, columns two apart, a gradient expanded from one row; bounds two apart."""
    wide, matrices = torch.randn(11, 3, 70, device=DEVICE), torch.randn(2, 90, 35, device=DEVICE)
    bounds = _bounds([2, 2, 3, 4])[::2]
    grad = torch.randn(45, device=DEVICE).expand(11, 45)
    for x in (wide[:, 1, :35], wide[:, 1, ::2]):
        for weight in (matrices[:, ::2], matrices.mT.contiguous().mT[:, ::2]):
            results = [
                _forward_and_backward(grouped_linear, x, weight, bounds, grad, backend=b) for b in ("triton", "eager")
            ]
            for got, want in zip(*results, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-5)


def test_float64():
    """The reference's derivatives are those of finite differences, and the kernels' are the reference's."""
    x, weight, bounds = _operands([2, 0, 3], 1, torch.float64, 3, 5)
    given = x.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: grouped_linear(x, w, bounds, backend="eager"), given)
    grad = torch.randn(6, 3, dtype=torch.float64, device=DEVICE)
    results = [_forward_and_backward(grouped_linear, x, weight, bounds, grad, backend=b) for b in ("triton", "eager")]
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)


def test_deterministic_and_the_same_in_every_pack():
    """A group's rows, and its matrix' gradient, have the same bits alone, among others and behind others."""
    x, weight, bounds = _operands([150, 0, 9, 70], 0, torch.bfloat16)
    grad = torch.randn(x.shape[0], weight.shape[1], device=DEVICE).bfloat16()
    first, second = (_forward_and_backward(grouped_linear, x, weight, bounds, grad, backend="triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    rows = slice(150, 159)
    alone = _forward_and_backward(grouped_linear, x[rows], weight, _bounds([0, 0, 9, 0]), grad[rows], backend="triton")
    assert torch.equal(alone[0], first[0][rows]) and torch.equal(alone[1], first[1][rows])
    assert torch.equal(alone[2][2], first[2][2])
    one = grouped_linear(x[155:156], weight, _bounds([0, 0, 1, 0]), backend="triton")
    assert torch.equal(one, first[0][155:156])


def test_bounds_that_leave_the_rows_are_cut():
    """On a GPU nobody reads them on the host before the kernels do."""
    from qwen2vl_kernels.triton.grouped_gemm import launch_rows, launch_weight

    x, weight, _ = _operands([4, 4], 0, torch.float32)
    bad = torch.tensor([-3, 5, 10**6], dtype=torch.int32, device=DEVICE)
    want = grouped_linear_ref(x, weight, _bounds([5, 3]))
    torch.testing.assert_close(launch_rows(x, weight, bad), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(launch_weight(x, x, bad)[1], x[5:].T @ x[5:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("tokens", "chosen", "experts"), [(1, 2, 4), (90, 4, 60), (300, 1, 3), (0, 2, 5), (9, 2, 700)])
def test_sort(tokens, chosen, experts):
    """Ids beyond the experts, too; blocks of entries for which the groups allow few."""
    picked = torch.randint(-1, experts + 2, (tokens, chosen), device=DEVICE)
    order, places, bounds = group_by_expert(picked, experts, backend="triton")
    for got, want in zip((order, places, bounds), group_by_expert_ref(picked, experts), strict=True):
        assert got.dtype == want.dtype and torch.equal(got, want)
    flat = [e if 0 <= e < experts else experts for e in picked.flatten().tolist()]
    assert order.tolist() == sorted(range(len(flat)), key=flat.__getitem__)
    assert torch.equal(order[places], torch.arange(len(flat), device=DEVICE))
    assert bounds.tolist() == [sum(e < g for e in flat) for g in range(experts + 1)]
    if tokens == 90:
        spread = picked.int()[:, [0, 2]]
        assert torch.equal(group_by_expert(spread, experts, backend="triton")[0], group_by_expert_ref(spread, 60)[0])


def test_opcheck():
    x, weight, bounds = _operands([2, 0, 3], 1, torch.float32, 3, 5)
    given = x.requires_grad_(), weight.requires_grad_(), bounds
    for triton in (False, True):
        torch.library.opcheck(torch.ops.qwen2vl.grouped_linear_forward.default, (*given, triton))
    experts = torch.tensor([[0, 2], [2, 1]], device=DEVICE)
    torch.library.opcheck(torch.ops.qwen2vl.group_by_expert_forward.default, (experts, 3))


def test_second_derivatives_raise():
    x, weight, bounds = _operands([2, 3], 0, torch.float32, 3, 5)
    y = grouped_linear(x.requires_grad_(), weight, bounds, backend="triton")
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="grouped_linear: its gradients have no derivatives"):
        grad.sum().backward()
