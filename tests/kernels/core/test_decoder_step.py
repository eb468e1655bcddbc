"""A step of decoding on the CPU: every instruction set against float64, what is written and read, and what bits are."""

import pytest
import torch
import torch.nn.functional as F

from qwen2vl_kernels import rms_norm_linear
from qwen2vl_kernels.core import native
from qwen2vl_kernels.ops.decode_attention import decode_attention_ref
from qwen2vl_kernels.ops.few_rows import rms_norm_linear_ref, rms_norm_swiglu_ref
from tests.conftest import assert_two_times

KERNELS, PRODUCTS = native.cpu().step_kernels(), native.cpu().few_rows_kernels()
EPS = torch.finfo(torch.bfloat16).eps
CAPACITY = 1100


def test_the_portable_form_is_always_there():
    assert KERNELS[-1] == "portable" and len(set(KERNELS)) == len(KERNELS)


# ------------------------------------------------------------------------------------------------------------ attention


def operands(lengths, heads, kv_heads, columns, *, seed=0):
    """q, k, v as views of one projection, caches that are NaN where no row holds a token, positions, frequencies."""
    generator, batch = torch.Generator().manual_seed(seed), len(lengths)
    packed = torch.randn(batch, heads + 2 * kv_heads, columns, generator=generator).bfloat16()
    q, k, v = packed.split([heads, kv_heads, kv_heads], 1)
    caches = torch.full((2, batch, kv_heads, CAPACITY, columns), float("nan")).bfloat16()
    for row, length in enumerate(lengths):
        if 1 < length <= CAPACITY:
            held = torch.randn(2, kv_heads, length - 1, columns, generator=generator)
            caches[:, row, :, : length - 1] = held.bfloat16()
    positions = torch.randint(0, 40_000, (batch,), generator=generator)
    inv_freq = torch.rand(columns // 2, generator=generator)
    seqlens = torch.tensor(lengths, dtype=torch.int32)
    return [q, k, v, *(one.transpose(1, 2) for one in caches), seqlens, positions, inv_freq]


def attention(q, k, v, k_cache, v_cache, seqlens, positions, inv_freq, *, scale=0.3, kernel=0, threads=1):
    """By that kernel, into a poisoned result."""
    out = torch.full(q.shape, float("nan")).bfloat16()
    strides = [*(n for one in (q, k, v) for n in one.stride()[:2]), *k_cache.stride()[:3], *v_cache.stride()[:3]]
    sizes = (*q.shape[:2], k.shape[1], q.shape[2], k_cache.shape[1])
    small = map(native.view, (seqlens, positions, inv_freq))
    tensors = [one.data_ptr() for one in (q, k, v, k_cache, v_cache)]
    native.cpu().decode_attention(tensors, strides, *small, out.data_ptr(), sizes, scale, (threads, kernel))
    return out


def copied(given):
    return [one.clone() for one in given]


@pytest.mark.parametrize("kernel", range(len(KERNELS)), ids=KERNELS)
@pytest.mark.parametrize(("heads", "kv_heads", "columns"), [(12, 2, 128), (15, 1, 48), (7, 7, 16)])
def test_attention_is_that_of_float64(kernel, heads, kv_heads, columns):
    """A first token, splits of 512 keys full, begun and three of them, the whole cache; rows that hold nothing."""
    given = operands([1, 512, 513, CAPACITY, 17, 0, CAPACITY + 1, -3], heads, kv_heads, columns)
    for cache in given[3:5]:
        cache[5:] = 7
    eager, before = copied(given), copied(given)
    exact = [one.double() if one.dtype == torch.bfloat16 else one for one in copied(given)]
    arrived = torch.zeros(8, kv_heads, dtype=torch.int32)
    wanted, precise = (decode_attention_ref(*them, arrived, 0.3) for them in (eager, exact))
    got = attention(*given, kernel=kernel, threads=2)
    assert_two_times(got, wanted, precise, EPS)
    assert got[5:].count_nonzero() == 0
    for ours, theirs in zip(given[3:5], eager[3:5], strict=True):
        assert torch.equal(ours.nan_to_num(5), theirs.nan_to_num(5)), "keys rotated, and nothing else written"
    for ours, theirs in zip([*given[:3], *given[5:]], [*before[:3], *before[5:]], strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kernel", range(len(KERNELS)), ids=KERNELS)
def test_bits_of_a_row_depend_neither_on_the_rows_beside_nor_on_threads(kernel):
    given = operands([700, CAPACITY, 64], 6, 2, 64)
    together = attention(*copied(given), kernel=kernel)
    assert torch.equal(attention(*copied(given), kernel=kernel, threads=5), together)
    for row in range(3):
        alone = [one[row : row + 1].clone() for one in given[:7]]
        assert torch.equal(attention(*alone, given[7], kernel=kernel), together[row : row + 1])


@pytest.mark.parametrize("kernel", range(len(KERNELS)), ids=KERNELS)
def test_scores_far_apart(kernel):
    """Scores of thousands: the largest alone counts, nothing overflows; a later split may hold it, or none may."""
    given = operands([600, 600, 600], 2, 1, 16)
    q, k, k_cache = given[0], given[1], given[3]
    q[:], k[:], given[7][:] = 30, -30, 0
    k_cache[:, :599] = -30
    k_cache[0, 3], k_cache[1, 590] = 30, 30
    got = attention(*given)
    for row, key in ((0, 3), (1, 590)):
        assert torch.equal(got[row], given[4][row, key].expand(2, -1))
    mean = given[4][2, :600].double().mean(0)
    torch.testing.assert_close(got[2].double(), mean.expand(2, -1), atol=1e-3, rtol=0.01)


@pytest.mark.parametrize("kernel", range(len(KERNELS)), ids=KERNELS)
def test_a_split_without_any_weight(kernel):
    """All of its scores minus infinity; the other split has all the weight."""
    given = operands([600], 2, 1, 16)
    q, k_cache = given[0], given[3]
    q[:], given[7][:] = 3e38, 0
    k_cache[:, :512], k_cache[:, 512:], given[1][:] = -3e38, 1e-30, 1e-30
    got = attention(*given, kernel=kernel)
    mean = torch.cat([given[4][0, 512:599], given[2]]).double().mean(0)
    torch.testing.assert_close(got[0].double(), mean.expand(2, -1), atol=1e-2, rtol=0.01)


def test_positions_of_32_bits_and_strided_lengths():
    given = operands([5, 90], 2, 2, 32)
    wanted = attention(*copied(given))
    given[6] = given[6].int()
    given[5] = torch.tensor([5, -1, 90, -1], dtype=torch.int32)[::2]
    assert torch.equal(attention(*given), wanted)


# ------------------------------------------------------------------------------------------------------------- products


def _rows(*shape, scale=1.0, seed=0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).bfloat16()


@pytest.mark.parametrize("kernel", range(len(KERNELS)), ids=KERNELS)
@pytest.mark.parametrize(("rows", "width", "outputs"), [(1, 96, 700), (3, 40, 17), (8, 776, 33)])
def test_the_gated_activation(kernel, rows, width, outputs):
    """Strided rows and weights, a poisoned result with room behind its rows, pieces of all sizes."""
    x, norm = _rows(rows, width + 8, seed=1)[:, 3 : 3 + width], _rows(width, seed=2)
    gate, up = (_rows(outputs, width + 5, scale=width**-0.5 * 2, seed=s)[:, 5:] for s in (3, 4))
    y = torch.full((rows, outputs + 3), float("nan")).bfloat16()
    views = [native.view(one) for one in (gate, up, y[:, :outputs])]
    sizes = (rows, outputs, width)
    for product in range(len(PRODUCTS)):
        options = (2, product, kernel)
        native.cpu().rms_norm_swiglu(native.view(x), native.view(norm), 0.1, *views, sizes, options)
        exact = rms_norm_swiglu_ref(*(one.double() for one in (x, norm, gate, up)), 0.1)
        assert_two_times(y[:, :outputs], rms_norm_swiglu_ref(x, norm, gate, up, 0.1), exact, EPS)
        assert y[:, outputs:].isnan().all()


@pytest.mark.parametrize("kernel", range(len(KERNELS)), ids=KERNELS)
def test_the_activation_of_any_number(kernel):
    """Every bf16: silu in float32, rounded once; infinities and what is no number as PyTorch has them."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    for up in (1.0, -3.0):
        # A norm that leaves a row of one column as it is is not to be had: the columns say 1 and the weights the rest.
        x, norm = torch.ones(1, 1).bfloat16(), torch.ones(1).bfloat16()
        gate, ups, y = values[:, None].clone(), torch.full((2**16, 1), up).bfloat16(), torch.empty(1, 2**16).bfloat16()
        views = map(native.view, (gate, ups, y))
        native.cpu().rms_norm_swiglu(
            native.view(x), native.view(norm), 0.0, *views, (1, 2**16, 1), (1, len(PRODUCTS) - 1, kernel)
        )
        exact = F.silu(values.double()) * up
        wanted = (F.silu(values.float()) * up).bfloat16()
        assert torch.equal(y[0].isnan(), wanted.isnan())
        finite = wanted.isfinite()
        assert torch.equal(y[0][~finite].nan_to_num(1), wanted[~finite].nan_to_num(1))
        assert_two_times(y[0][finite], wanted[finite], exact[finite], 1e-30)


@pytest.mark.parametrize("kernel", range(len(PRODUCTS)), ids=PRODUCTS)
def test_products_side_by_side(kernel):
    """Three weights of other heights, one without a bias, into poisoned rows; the sum is added to what was there."""
    x, norm = _rows(5, 200, scale=7, seed=5), _rows(200, seed=6)
    weights = [_rows(n, 200, scale=0.1, seed=n) for n in (300, 1, 40)]
    biases = [_rows(300, seed=7), None, _rows(40, seed=8)]
    y = torch.full((5, 350), float("nan")).bfloat16()
    counts = [one.shape[0] for one in weights]
    views = ([native.view(one) for one in given] for given in (weights, biases))
    native.cpu().rms_norm_linear(
        native.view(x), native.view(norm), 1e-6, *views, counts, native.view(y[:, :341]), (5, 200), (3, kernel)
    )
    double = [[None if b is None else b.double() for b in biases], 1e-6]
    exact = rms_norm_linear_ref(x.double(), norm.double(), [one.double() for one in weights], *double)
    assert_two_times(y[:, :341], rms_norm_linear_ref(x, norm, weights, biases, 1e-6), exact, EPS)
    assert y[:, 341:].isnan().all()

    total, product = _rows(5, 300, seed=9), F.linear(x, weights[0])
    ours = total.clone()
    native.cpu().linear_add(*map(native.view, (ours, x, weights[0])), (5, 300, 200), (3, kernel))
    assert_two_times(ours, total + product, total.double() + F.linear(x.double(), weights[0].double()), EPS)


def test_products_of_nothing():
    x, norm = torch.empty(0, 32).bfloat16(), torch.ones(32).bfloat16()
    assert rms_norm_linear(x, norm, [_rows(4, 32)]).shape == (0, 4)
    assert rms_norm_linear(_rows(2, 32), norm, [_rows(4, 32)[:0], _rows(4, 32)]).shape == (2, 4)


def test_what_cannot_be_is_refused():
    x, norm, weight = _rows(1, 32), torch.ones(32).bfloat16(), _rows(4, 32)
    y, views = torch.empty(1, 4).bfloat16(), [native.view(x), native.view(norm), 1e-6]
    one = [[native.view(weight)], [native.view(None)], [4], native.view(y)]
    linear = native.cpu().rms_norm_linear
    linear(*views, *one, (1, 32), (1, 0))
    with pytest.raises(ValueError, match="no such kernel"):
        linear(*views, *one, (1, 32), (1, len(PRODUCTS)))
    with pytest.raises(ValueError, match="negative"):
        linear(*views, *one, (-1, 32), (1, 0))
    with pytest.raises(ValueError, match="one to three weights"):
        linear(*views, [], [], [], native.view(y), (1, 32), (1, 0))
    with pytest.raises(ValueError, match="x: wants rows of elements of two bytes"):
        linear(native.view(x.float()), *views[1:], *one, (1, 32), (1, 0))
    given = operands([3], 2, 1, 24)
    with pytest.raises(ValueError, match="columns must be a multiple of 16"):
        attention(*given)
