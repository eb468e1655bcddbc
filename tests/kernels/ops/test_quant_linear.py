"""Products with quantised weights: every form against float64, what reaches which sum, gradients, refusals."""

import pytest
import torch
import torch.nn.functional as F

from qwen2vl_kernels import quant_linear, use_backend
from qwen2vl_kernels.core import native, quant_native
from qwen2vl_kernels.core.quant_layout import (
    FP8,
    dequantize,
    pack_columns,
    pack_zeros,
    unpack_columns,
    unpack_zeros,
)
from tests.conftest import assert_two_times

KERNELS = native.cpu().quant_kernels()
BACKENDS = ["eager", "native", "triton"]
#: name -> (bits, rows of a block, columns of a block, whether zero points are given)
FORMS = {
    "int4, zeros": (4, 1, 64, True),
    "int4, groups of 32": (4, 1, 32, False),
    "int4, whole rows": (4, 1, 10**6, True),
    "int8": (8, 1, 128, False),
    "int8, zeros": (8, 1, 32, True),
    "fp8, tensor": (0, 10**6, 10**6, False),
    "fp8, rows": (0, 1, 10**6, False),
    "fp8, blocks": (0, 16, 64, False),
}


def weight_of(form, outputs, columns, seed=0, scale_dtype=torch.float16):
    """``(weight, scales, zeros, block)`` with values of about one, and the values in float64."""
    bits, block_n, block_k, with_zeros = FORMS[form]
    block = (min(block_n, outputs), min(block_k, columns))
    groups = -(-columns // block[1])
    generator = torch.Generator().manual_seed(seed)
    scales = torch.rand(-(-outputs // block[0]), groups, generator=generator) + 0.5
    if bits == 0:
        values = torch.randn(outputs, columns, generator=generator).to(FP8)
        q, zeros, weight = values.double(), None, values
    else:
        scales = scales / (1 << (bits - 1))
        integers = torch.randint(0, 1 << bits, (outputs, columns), generator=generator).byte()
        points = torch.randint(0, 1 << bits, (outputs, groups), generator=generator).byte()
        zero = points if with_zeros else torch.full_like(points, 1 << (bits - 1))
        of_column = torch.arange(columns) // block[1]
        q = integers.double() - zero.double()[:, of_column]
        zeros, weight = pack_zeros(points, bits) if with_zeros else None, pack_columns(integers, bits)
    scales = scales.to(scale_dtype)
    of_row, of_column = torch.arange(outputs) // block[0], torch.arange(columns) // block[1]
    exact = q * scales.double()[of_row][:, of_column]
    return (weight, scales, zeros, block), exact


@pytest.mark.parametrize("bits", [4, 8])
def test_what_is_packed_comes_back(bits):
    q = torch.randint(0, 1 << bits, (5, 96)).byte()
    zeros = torch.randint(0, 1 << bits, (5, 3)).byte()
    packed = pack_columns(q, bits)
    assert packed.shape == (5, 12 * bits) and torch.equal(unpack_columns(packed, bits), q)
    assert torch.equal(unpack_zeros(pack_zeros(zeros, bits), bits, 3), zeros)
    if bits == 4:  # byte j of 32 columns holds columns j and j + 16
        assert packed[2, 16 + 5] == q[2, 32 + 5] + 16 * q[2, 32 + 21]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
def test_products_are_those_of_float64(form, backend, dtype):
    (weight, scales, zeros, block), exact = weight_of(form, 37, 192)
    bias = torch.randn(37).to(dtype)
    few = 3 if dtype == torch.float32 and backend == "triton" else 19  # row by row there
    for rows, given in ((1, None), (1, bias), (5, bias), (few, bias)):
        x = torch.randn(2, rows, 192).to(dtype)[1]
        got = quant_linear(x, weight, scales, zeros, given, block=block, backend=backend)
        wanted = F.linear(x.double(), exact, None if given is None else given.double())
        reference = F.linear(x, exact.to(dtype), given)
        assert got.dtype == dtype and got.shape == (rows, 37)
        assert_two_times(got, reference, wanted, 2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_last_group_may_be_shorter(backend):
    (weight, scales, zeros, block), exact = weight_of("int4, zeros", 6, 160)
    assert scales.shape[1] == 3
    for rows in (1, 3, 40):
        x = torch.randn(rows, 160)
        got = quant_linear(x, weight, scales, zeros, block=block, backend=backend)
        assert_two_times(got, F.linear(x, exact.float()), F.linear(x.double(), exact), 2e-6)


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", range(len(KERNELS)), ids=KERNELS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("columns", [224, 256])  # the second one a multiple of 64, as products of bf16 want of int4
def test_every_instruction_set(columns, form, kernel, scale_dtype):
    (weight, scales, zeros, block), exact = weight_of(form, 13, columns, scale_dtype=scale_dtype)
    views, sizes = quant_native.views(weight, scales, zeros), (13, columns, *block)
    for dtype in (torch.float32, torch.bfloat16):
        values = torch.full((13, columns + 6), float("nan"), dtype=dtype)
        native.cpu().quant_values(*views, native.view(values[:, :columns]), sizes, (2, kernel))
        assert values[:, columns:].isnan().all()
        assert torch.equal(values[:, :columns], dequantize(weight, scales, zeros, block, dtype, columns))
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 1e-6)):
        x, bias = torch.randn(7, columns + 6).to(dtype)[:, 3 : columns + 3], torch.randn(13).to(dtype)
        for given in (None, bias):
            y = torch.full((7, 15), float("nan"), dtype=dtype)
            operands = [native.view(one) for one in (x, given, y[:, :13])]
            native.cpu().quant_linear(*views, *operands, 7, sizes, (2, kernel))
            assert y[:, 13:].isnan().all()
            precise = F.linear(x.double(), exact, None if given is None else given.double())
            once = F.linear(x.float(), exact.float(), None if given is None else given.float()).to(dtype)
            assert_two_times(y[:, :13], once, precise, tolerance)


@pytest.mark.parametrize("kernel", range(len(KERNELS)), ids=KERNELS)
def test_all_numbers_of_eight_bits_and_scales_of_sixteen(kernel):
    """Subnormal ones, the largest, and what is no number, as PyTorch reads them."""
    weight = torch.arange(256).byte().view(8, 32).view(FP8)
    halves = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    for numbers, scales, rows in (
        (weight, torch.ones(8, 1), 8),
        (torch.full((1 << 16, 32), 1.0).to(FP8), halves.unsqueeze(1), 1 << 16),
    ):
        values = torch.empty(rows, 32)
        sizes = (rows, 32, 1, 32)
        native.cpu().quant_values(*quant_native.views(numbers, scales, None), native.view(values), sizes, (1, kernel))
        wanted = numbers.float() * scales.float()
        assert torch.equal(values.isnan(), wanted.isnan()) and torch.equal(values.nan_to_num(7), wanted.nan_to_num(7))
    scales, x = torch.ones(8, 1), torch.eye(32).bfloat16()  # each number by itself, and 0 times the others
    y = torch.empty(32, 8).bfloat16()
    views = [*quant_native.views(weight, scales, None), *map(native.view, (x, None, y))]
    native.cpu().quant_linear(*views, 32, (8, 32, 1, 32), (1, kernel))
    numbers = weight.float()
    none = numbers.isnan().any(1)
    assert none.sum() == 2 and y[:, none].isnan().all() and torch.equal(y[:, ~none].float(), numbers[~none].T)


@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize("form", ["int4, zeros", "int8", "fp8, blocks"])
def test_bits_do_not_depend_on_other_rows_or_threads(form, backend):
    (weight, scales, zeros, block), _ = weight_of(form, 48, 1088)
    x = torch.randn(40, 1088).bfloat16()

    def run(rows):
        return quant_linear(x[rows], weight, scales, zeros, block=block, backend=backend)

    few, many = run(slice(0, 16)), run(slice(0, 40))
    assert torch.equal(run(slice(3, 8)), few[3:8]) and torch.equal(run(slice(2, 30)), many[2:30])
    if backend == "native":
        assert torch.equal(run(slice(3, 4)), few[3:4])
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(3)
            assert torch.equal(run(slice(0, 16)), few)
        finally:
            torch.set_num_threads(threads)
    else:
        assert torch.equal(run(slice(7, 8)), run(slice(7, 8)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_no_number_reaches_its_own_sums_alone(backend):
    (weight, scales, zeros, block), _ = weight_of("fp8, rows", 7, 64)
    weight[2, 33] = float("nan")
    for rows in (1, 4, 20):
        x = torch.randn(rows, 64)
        x[-1, 5] = float("inf")
        got = quant_linear(x, weight, scales, zeros, block=block, backend=backend)
        assert got[:, 2].isnan().all() and not got[:-1, [0, 1, 3, 4, 5, 6]].isnan().any()
        assert not got[-1, [0, 1, 3, 4, 5, 6]].isfinite().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_columns_in_another_order(backend):
    (weight, scales, zeros, block), exact = weight_of("int4, zeros", 9, 128)
    order = torch.randperm(128)
    x = torch.randn(2, 3, 128)
    got = quant_linear(x, weight, scales, zeros, block=block, order=order.int(), backend=backend)
    plain = torch.empty_like(exact)
    plain[:, order] = exact
    torch.testing.assert_close(got, F.linear(x, plain.float()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_columns_that_fill_blocks_up(backend):
    """The weight has more columns than x: those of zeros meet some column of x and count for nothing."""
    (weight, scales, zeros, block), exact = weight_of("int4, zeros", 9, 128)
    q = unpack_columns(weight, 4)
    filled = torch.arange(128) % 64 >= 50
    points = unpack_zeros(zeros, 4, 2).repeat_interleave(64, 1)
    weight = pack_columns(torch.where(filled, points, q), 4)
    order = torch.zeros(128, dtype=torch.int64)
    order[~filled] = torch.randperm(100)
    x = torch.randn(3, 100, requires_grad=True)
    got = quant_linear(x, weight, scales, zeros, block=block, order=order, backend=backend)
    plain = torch.empty(9, 100, dtype=exact.dtype)
    plain[:, order[~filled]] = exact[:, ~filled]
    torch.testing.assert_close(got, F.linear(x, plain.float()), rtol=1e-5, atol=1e-5)
    got.sum().backward()
    torch.testing.assert_close(x.grad, plain.sum(0).float().expand(3, 100), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["int4, zeros", "int8", "fp8, blocks"])
def test_gradients_reach_x_and_bias(form, backend):
    (weight, scales, zeros, block), exact = weight_of(form, 10, 96)
    order = torch.randperm(96)
    x, bias = torch.randn(2, 3, 96, requires_grad=True), torch.randn(10, requires_grad=True)
    y = quant_linear(x, weight, scales, zeros, bias, block=block, order=order, backend=backend)
    dy = torch.randn_like(y)
    y.backward(dy)
    dx = torch.zeros(2, 3, 96)
    dx[..., order] = dy @ exact.float()
    torch.testing.assert_close(x.grad, dx, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(bias.grad, dy.sum((0, 1)), rtol=1e-5, atol=1e-5)


def test_many_rows_hold_some_of_the_values_at_a_time(monkeypatch):
    (weight, scales, zeros, block), _ = weight_of("fp8, blocks", 100, 64)
    x = torch.randn(17, 64)
    whole = quant_linear(x, weight, scales, zeros, block=block, backend="native")
    seen = []
    real = quant_native.native_values
    monkeypatch.setattr(quant_native, "native_values", lambda *given: seen.append(given[0].shape[0]) or real(*given))
    monkeypatch.setattr(quant_native, "HELD", 64 * 40)
    part = quant_linear(x, weight, scales, zeros, block=block, backend="native")
    assert seen == [32, 32, 32, 4]  # whole blocks of 16 rows
    torch.testing.assert_close(part, whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_strides_of_single_elements_and_of_no_rows(dtype):
    (weight, scales, zeros, block), _ = weight_of("int4, zeros", 1, 64)
    x, bias = torch.randn(3, 64).to(dtype), torch.randn(5).to(dtype)[::5]
    got = quant_linear(x, weight, scales, zeros, bias, block=block, backend="native")
    assert torch.equal(got, quant_linear(x, weight, scales, zeros, bias.clone(), block=block, backend="native"))
    nothing = torch.zeros(4, 128).to(dtype)[:, ::2][:0]
    assert quant_linear(nothing, weight, scales, zeros, block=block, backend="native").shape == (0, 1)


def test_nothing_and_autocast():
    (weight, scales, zeros, block), _ = weight_of("int4, zeros", 9, 64)
    for backend in BACKENDS:
        given = {"block": block, "backend": backend}
        assert quant_linear(torch.randn(2, 0, 64), weight, scales, zeros, **given).shape == (2, 0, 9)
        x, bias = torch.randn(3, 64), torch.randn(9)
        with torch.autocast("cpu", torch.bfloat16):
            got = quant_linear(x, weight, scales, zeros, bias, **given)
        wanted = quant_linear(x.bfloat16(), weight, scales, zeros, bias.bfloat16(), **given)
        assert got.dtype == torch.bfloat16 and torch.equal(got, wanted)
    with use_backend("eager"):
        assert quant_linear(x, weight, scales, zeros, block=block).dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": torch.zeros(2, 48)}, ValueError, "K must be a multiple of 32, got 48"),
        ({"x": torch.zeros(2, 128, dtype=torch.int32)}, TypeError, "x must have one of the dtypes"),
        ({"weight": torch.zeros(9, 33).byte()}, ValueError, "weight must have K = 128 bytes a row.*got 33"),
        ({"weight": torch.zeros(9, 64)}, TypeError, "weight must have one of the dtypes"),
        ({"weight": torch.zeros(9, 64).to(FP8)}, ValueError, "weight must have K = 128 bytes"),
        ({"scales": torch.zeros(9, 3)}, ValueError, r"scales must have shape \(9, 2\)"),
        ({"scales": torch.zeros(9, 2).int()}, TypeError, "scales must have one of the dtypes"),
        ({"zeros": torch.zeros(9, 2).byte()}, ValueError, r"zeros must have shape \(N, 1\)"),
        ({"bias": torch.zeros(8)}, ValueError, r"bias must have shape \(N\) with N=9"),
        ({"bias": torch.zeros(9).half()}, TypeError, "bias must have dtype torch.float32"),
        ({"block": (1, 48)}, ValueError, "block must have a multiple of 32 columns"),
        ({"block": (2, 64)}, ValueError, "block of integers must have 1 row, got 2"),
        ({"block": (0, 64)}, ValueError, "block must be two positive sizes"),
        ({"order": torch.arange(127)}, ValueError, "order must have K = 128 entries or more, got 127"),
        ({"order": torch.arange(144) % 128}, ValueError, "K must be a multiple of 32, got 144"),
        ({"order": torch.arange(160) % 128}, ValueError, "weight must have K = 160 bytes a row.*got 64"),
        ({"order": torch.zeros(128)}, TypeError, "order must have one of the dtypes"),
    ],
)
def test_refusals(change, error, words):
    (weight, scales, zeros, block), _ = weight_of("int4, zeros", 9, 128)
    given = {"x": torch.zeros(2, 128), "weight": weight, "scales": scales, "zeros": zeros, "block": block} | change
    with pytest.raises(error, match=f"quant_linear: {words}"):
        quant_linear(**given)


def test_zeros_are_for_integers():
    (weight, scales, _, block), _ = weight_of("fp8, rows", 9, 128)
    with pytest.raises(ValueError, match="zeros are for integers"):
        quant_linear(torch.zeros(2, 128), weight, scales, torch.zeros(9, 1).byte(), block=block)
