"""Grouped products with quantised weights outside of Triton: the loops, devices without values, compilers, refusals."""

import pytest
import torch
import torch.nn.functional as F

from qwen2vl_kernels import BackendError, grouped_quant_linear, use_backend
from qwen2vl_kernels.core.quant_layout import FP8
from qwen2vl_kernels.ops.grouped_quant_linear import grouped_quant_linear_ref
from tests.conftest import assert_two_times
from tests.kernels.ops.test_quant_linear import FORMS, weight_of

BOUNDS = torch.tensor([0, 2, 2, 22, 23], dtype=torch.int32)


def _operands(form, dtype=torch.float32, rows=24, columns=192):
    """x of four groups with few, no, many rows and one, and a row behind them; weights; their values in float64."""
    found = [weight_of(form, 37, columns, seed) for seed in range(4)]
    weight, scales, zeros, block = zip(*(one for one, _ in found), strict=True)
    stacked = torch.stack([one.view(torch.uint8) for one in weight]).view(weight[0].dtype)
    given = {"zeros": None if zeros[0] is None else torch.stack(zeros), "block": block[0]}
    x = torch.randn(rows, columns).to(dtype)
    return (x, stacked, torch.stack(scales)), given, torch.stack([exact for _, exact in found])


def _group_of(bounds, rows):
    return [int((bounds[1:] <= m).sum()) for m in range(rows)]


def _precise(x, exact, order=None):
    y = torch.zeros(x.shape[0], exact.shape[1], dtype=torch.float64)
    for m, g in enumerate(_group_of(BOUNDS, x.shape[0])):
        if g < len(exact):
            y[m] = exact[g] @ (x[m] if order is None else x[m][order[g]]).double()
    return y


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("backend", ["native", "eager"])
@pytest.mark.parametrize("form", FORMS)
def test_products_are_those_of_float64(form, backend, dtype):
    operands, given, exact = _operands(form, dtype)
    got = grouped_quant_linear(*operands, BOUNDS, **given, backend=backend)
    reference = torch.zeros(24, 37, dtype=dtype)
    for g, (begin, end) in enumerate(zip(BOUNDS[:-1], BOUNDS[1:], strict=True)):
        reference[begin:end] = F.linear(operands[0][begin:end], exact[g].to(dtype))
    assert got.dtype == dtype and not got[23:].any()
    assert_two_times(got, reference, _precise(operands[0], exact), 2e-6)


@pytest.mark.parametrize("backend", ["native", "eager"])
@pytest.mark.parametrize("form", ["int4, zeros", "fp8, blocks"])
def test_gradients_and_orders_of_columns(form, backend):
    (x, *rest), given, exact = _operands(form)
    order = torch.stack([torch.randperm(192) for _ in range(4)])
    x.requires_grad_()
    y = grouped_quant_linear(x, *rest, BOUNDS, **given, order=order, backend=backend)
    torch.testing.assert_close(y.detach(), _precise(x.detach(), exact, order).float(), rtol=1e-4, atol=1e-4)
    dy = torch.randn_like(y)
    y.backward(dy)
    want = torch.zeros(24, 192)
    for m, g in enumerate(_group_of(BOUNDS, 23)):
        want[m, order[g]] = dy[m] @ exact[g].float()
    torch.testing.assert_close(x.grad, want, rtol=1e-4, atol=1e-4)


def test_float64_is_the_formula_and_upcast_is_float32():
    (x, *rest), given, exact = _operands("int4, zeros", torch.float64, columns=64)
    got = grouped_quant_linear(x, *rest, BOUNDS, **given)
    torch.testing.assert_close(got, _precise(x, exact), rtol=1e-12, atol=1e-12)
    few = torch.tensor([0, 1, 1, 2, 2], dtype=torch.int32)
    small = x[:3].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: grouped_quant_linear(x, *rest, few, **given), small)
    assert torch.autograd.gradgradcheck(lambda x: grouped_quant_linear(x, *rest, few, **given), small)
    low = x.detach().bfloat16()
    want = grouped_quant_linear_ref(low.float(), *rest, BOUNDS, **given).bfloat16()
    assert torch.equal(grouped_quant_linear_ref(low, *rest, BOUNDS, **given, upcast=True), want)


@pytest.mark.parametrize("backend", ["native", "eager"])
def test_only_weights_that_are_met_are_read(backend):
    """What the other groups hold is no number."""
    (x, weight, scales), given, _ = _operands("int8")
    want = grouped_quant_linear(x, weight, scales, BOUNDS, **given, backend=backend)
    scales[1] = float("nan")
    assert torch.equal(grouped_quant_linear(x, weight, scales, BOUNDS, **given, backend=backend), want)


@pytest.mark.parametrize("backend", ["native", "eager"])
def test_nothing(backend):
    (x, *rest), given, _ = _operands("int4, zeros")
    nowhere = torch.zeros(5, dtype=torch.int32)
    for some in (x[:0], x[:3]):
        some = some.clone().requires_grad_()
        y = grouped_quant_linear(some, *rest, nowhere, **given, backend=backend)
        assert y.shape == (len(some), 37) and not y.any()
        y.sum().backward()
        assert not some.grad.any()


def test_shapes_on_the_meta_device():
    operands, given, _ = _operands("int4, zeros")
    x, weight, scales, bounds, zeros = (t.to("meta") for t in (*operands, BOUNDS, given["zeros"]))
    assert grouped_quant_linear(x, weight, scales, bounds, zeros, block=given["block"]).shape == (24, 37)


def test_autocast_is_that_of_a_linear_layer():
    (x, *rest), given, _ = _operands("fp8, blocks")
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        got = grouped_quant_linear(x, *rest, BOUNDS, **given)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, grouped_quant_linear(x.bfloat16(), *rest, BOUNDS, **given))
    got.float().sum().backward()
    assert x.grad.dtype == torch.float32


@pytest.mark.parametrize("backend", ["native", "eager"])
def test_compiled_with_its_backward_for_any_bounds(backend):
    """One graph, in which the loop over groups is one op."""
    torch._dynamo.reset()
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    (x, *rest), given, _ = _operands("int4, zeros")
    x.requires_grad_()
    call = lambda x, b: grouped_quant_linear(x, *rest, b, **given).square().sum()  # noqa: E731
    with use_backend(grouped_quant_linear=backend):
        run = torch.compile(call, fullgraph=True, backend=keep)
        for bounds in (BOUNDS, torch.tensor([0, 0, 5, 8, 24], dtype=torch.int32)):
            got = torch.autograd.grad(run(x, bounds), x)
            torch.testing.assert_close(got, torch.autograd.grad(call(x, bounds), x))
    assert len(graphs) == 1


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": torch.zeros(24, 48)}, ValueError, "K must be a multiple of 32, got 48"),
        ({"x": torch.zeros(192)}, ValueError, r"x must have shape \(M, K\)"),
        ({"x": torch.zeros(24, 192).int()}, TypeError, "x must have one of the dtypes"),
        ({"x": torch.zeros(20, 192)}, ValueError, r"bounds must rise from 0 to at most the 20 rows of x, got \[0, 2"),
        ({"weight": torch.zeros(37, 96).byte()}, ValueError, r"weight must have shape \(G, N, bytes\)"),
        ({"weight": torch.zeros(4, 37, 95).byte()}, ValueError, "weight must have K = 192 bytes a row.*got 95"),
        ({"weight": torch.zeros(4, 37, 96).to(FP8)}, ValueError, "weight must have K = 192 bytes"),
        (
            {"weight": torch.zeros(4, 0, 96).byte(), "scales": torch.zeros(4, 0, 3), "zeros": None},
            ValueError,
            "weight must have a group and a row at least",
        ),
        ({"weight": torch.zeros(4, 37, 192).byte()[..., ::2]}, ValueError, "weight must be contiguous in its last"),
        ({"scales": torch.zeros(3, 37, 3)}, ValueError, r"scales must have shape \(G, 37, 3\) with G=4"),
        ({"scales": torch.zeros(4, 37, 2)}, ValueError, r"scales must have shape \(G, 37, 3\)"),
        ({"zeros": torch.zeros(4, 37, 3).byte()}, ValueError, r"zeros must have shape \(G, N, 2\)"),
        ({"bounds": BOUNDS.long()}, TypeError, "bounds must have one of the dtypes int32"),
        ({"bounds": BOUNDS[:-1]}, ValueError, r"bounds must have shape \(5\), got \(4,\)"),
        ({"bounds": BOUNDS.flip(0)}, ValueError, "bounds must rise from 0"),
        ({"block": (1, 48)}, ValueError, "block must have a multiple of 32 columns"),
        ({"block": (2, 64)}, ValueError, "block of integers must have 1 row, got 2"),
        ({"order": torch.arange(192)}, ValueError, r"order must have shape \(G, 192\)"),
        ({"order": torch.zeros(4, 192)}, TypeError, "order must have one of the dtypes"),
        ({"backend": "cuda"}, BackendError, "backend 'cuda' does not serve cpu tensors"),
    ],
)
def test_refusals(change, error, words):
    (x, weight, scales), given, _ = _operands("int4, zeros")
    given = {"x": x, "weight": weight, "scales": scales, "bounds": BOUNDS, **given} | change
    with pytest.raises(error, match=f"grouped_quant_linear: {words}"):
        grouped_quant_linear(**given)


def test_float64_is_for_the_formula():
    (x, *rest), given, _ = _operands("int8", torch.float64)
    with pytest.raises(TypeError, match=r"x must have one of .* for backend 'native', got torch.float64"):
        grouped_quant_linear(x, *rest, BOUNDS, **given, backend="native")
