"""The Triton kernel of linear_cross_entropy against PyTorch's operations and float64."""

from __future__ import annotations

import pytest
import torch

from qwen2vl_kernels import linear_cross_entropy
from qwen2vl_kernels.core.backends import unavailable
from qwen2vl_kernels.ops.linear_cross_entropy import _rows_in_torch
from qwen2vl_kernels.triton import cross_entropy
from qwen2vl_kernels.triton.cross_entropy import launch_rows
from tests.conftest import DEVICE, assert_two_times
from tests.kernels.poison import poisoned  # noqa: F401

if (reason := unavailable("triton", DEVICE)) is not None:
    pytest.skip(f"triton: {reason}", allow_module_level=True)
pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
#: (rows, vocabulary): one of each, less than a block, a block and a bit, several blocks whose last is nearly empty.
SHAPES = [(1, 1), (3, 37), (5, 8200), (2, 16385)]


def _rows(rows, vocabulary, dtype=torch.float32, scale=3.0):
    target = torch.randint(0, vocabulary, (rows,))
    target[1::3] = -100
    return (torch.randn(rows, vocabulary) * scale).to(dtype).to(DEVICE), target.to(DEVICE)


def _run(rows_of, logits, target, scale=None, smoothing=0.0, gradient=True):
    wide = torch.promote_types(logits.dtype, torch.float32)
    loss = torch.empty(logits.shape[0], dtype=wide, device=logits.device)
    return loss, rows_of(logits.clone(), target, scale, loss, -100, smoothing, gradient)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_and_gradient_of_rows(shape, dtype, smoothing):
    logits, target = _rows(shape[0], shape[1], dtype)
    scale = torch.rand(shape[0], device=DEVICE) + 0.5
    exact = _run(_rows_in_torch, logits.double(), target, scale.double(), smoothing)
    eager = _run(_rows_in_torch, logits, target, scale, smoothing)
    got = _run(launch_rows, logits, target, scale, smoothing)
    for one, theirs, right in zip(got, eager, exact, strict=True):
        assert one.dtype == theirs.dtype
        assert_two_times(one, theirs, right, 5e-7)
    ignored = target == -100
    assert (got[0][ignored] == 0).all() and (got[1][ignored] == 0).all()
    alone, _ = _run(launch_rows, logits, target, None, smoothing, gradient=False)
    assert torch.equal(alone, got[0]), "the gradient and its scale change nothing about the loss"


def test_logits_that_nothing_but_the_largest_keeps_from_overflowing():
    """The largest comes last, first, after whole blocks of minus infinity; one row knows one column only."""
    logits, _ = _rows(5, 20_000, scale=1.0)
    logits[0, -1], logits[1, 0] = 500.0, 500.0
    logits[2, :17_000] = -torch.inf
    logits[3] = -torch.inf
    logits[3, 18_000] = -3.0
    logits[4] += 1e4
    target = torch.tensor([19_999, 7, 19_000, 18_000, 5], device=DEVICE)
    got, want = (_run(f, logits, target, None, 0.0) for f in (launch_rows, _rows_in_torch))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
    assert got[0][3] == 0 and (got[1][3] == 0).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_logit_that_is_no_number_makes_its_row_nan(bad):
    logits, target = _rows(3, 9000)
    target[1] = 5
    logits[1, 8500] = bad
    loss, d = _run(launch_rows, logits, target)
    assert loss.isnan().tolist() == [False, True, False] and d.isnan().any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_targets_beyond_the_vocabulary_make_their_rows_nan(smoothing):
    """Nobody reads them on the host; nothing outside of the row is read for them."""
    logits, _ = _rows(5, 100)
    target = torch.tensor([99, 100, -1, -100, 2**40], device=DEVICE)
    loss, d = _run(launch_rows, logits, target, None, smoothing)
    assert loss.isnan().tolist() == d.isnan().all(1).tolist() == [False, True, True, False, True]


def test_rows_of_a_wider_buffer():
    logits, target = _rows(4, 300)
    buffer = torch.full((4, 333), 7.0, device=DEVICE)
    buffer[:, :300] = logits
    loss, want = _run(launch_rows, logits, target)
    again = torch.empty_like(loss)
    launch_rows(buffer[:, :300], target, None, again, -100, 0.0, True)
    assert torch.equal(buffer[:, :300], want) and torch.equal(again, loss) and (buffer[:, 300:] == 7).all()


def test_a_row_is_the_same_in_every_chunk():
    logits, target = _rows(9, 500, torch.bfloat16)
    first, second = (_run(launch_rows, logits, target) for _ in range(2))
    part = _run(launch_rows, logits[4:7], target[4:7])
    for a, b, c in zip(first, second, part, strict=True):
        assert torch.equal(a, b) and torch.equal(a[4:7], c)


# ------------------------------------------------------------------------------------------------- the whole op


def _inputs(dtype=torch.float32, rows=13, width=16, vocabulary=90):
    made = [torch.randn(*s, device=DEVICE) for s in ((rows, width), (vocabulary, width), (vocabulary,))]
    return [x.to(dtype).requires_grad_() for x in made], _rows(rows, vocabulary)[1]


def _results(inputs, target, **given):
    hidden, weight, bias = inputs
    loss = linear_cross_entropy(hidden, weight, target, bias, **given)
    above = torch.linspace(0.3, 2.0, loss.numel(), dtype=loss.dtype, device=DEVICE).view(loss.shape)
    return [loss.detach(), *torch.autograd.grad(loss, inputs, above)]


@pytest.mark.parametrize("backend", ["triton", "chunked"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_and_backward(dtype, reduction, backend):
    """Of PyTorch's operations too, whose products on a GPU are others than on a CPU."""
    inputs, target = _inputs(dtype)
    given = {"reduction": reduction, "label_smoothing": 0.1, "chunk_rows": 4}
    exact = _results([x.detach().double().requires_grad_() for x in inputs], target, **given, backend="eager")
    eager = _results(inputs, target, **given, backend="eager")
    got = _results(inputs, target, **given, backend=backend)
    for one, theirs, right in zip(got, eager, exact, strict=True):
        assert one.dtype == theirs.dtype
        assert_two_times(one, theirs, right, 1e-6)
    with torch.no_grad():
        hidden, weight, bias = inputs
        assert torch.equal(linear_cross_entropy(hidden, weight, target, bias, **given, backend=backend), got[0])


@pytest.mark.parametrize("backend", ["triton", "chunked"])
def test_a_target_that_names_no_column(backend):
    """Refused where the host may read it, NaN in all that it touches elsewhere."""
    (hidden, weight, bias), target = _inputs()
    target[4] = 90
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match=r"target must be in \[0, 90\) or ignore_index = -100, got 90"):
            linear_cross_entropy(hidden, weight, target, bias, backend=backend)
        return
    loss, dhidden, dweight, _ = _results((hidden, weight, bias), target, backend=backend)
    assert loss.isnan() and dweight.isnan().all()
    assert dhidden.isnan().all(1).tolist() == [n == 4 for n in range(13)]


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(reduction):
    inputs, target = _inputs(torch.float32, 5, 3, 7)
    inputs = [x.detach().double().requires_grad_() for x in inputs]
    given = {"reduction": reduction, "label_smoothing": 0.2, "chunk_rows": 2, "backend": "triton"}
    assert torch.autograd.gradcheck(lambda h, w, b: linear_cross_entropy(h, w, target, b, **given), inputs)


def test_no_rows():
    inputs, target = _inputs(rows=0)
    for result in _results(inputs, target, reduction="sum", backend="triton"):
        assert not result.any()


def test_opcheck():
    (hidden, weight, bias), target = _inputs()
    some = ("test_schema", "test_autograd_registration", "test_faketensor")  # as in the test of the op
    arguments = (hidden, weight, target, bias, -100, "sum", 0.1, 4, True, [True] * 3)
    torch.library.opcheck(torch.ops.qwen2vl.linear_cross_entropy_forward.default, arguments, test_utils=some)


def test_a_block_is_a_power_of_two_that_covers_small_vocabularies():
    from qwen2vl_kernels.core.launching import Target

    for columns, dtype, want in ((1, torch.float32, 1), (37, torch.bfloat16, 64), (151_936, torch.bfloat16, 8192)):
        assert cross_entropy.config(columns, dtype, Target("cuda", 90)).block_n == want
    assert cross_entropy.config(151_936, torch.float32, Target("hip", 0)) == cross_entropy.RowTile(4096, 8)
