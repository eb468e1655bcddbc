"""linear_cross_entropy in chunks against the formula in float64, PyTorch's own, and what is asked of every op."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from qwen2vl_kernels import linear_cross_entropy
from qwen2vl_kernels.ops import linear_cross_entropy as op
from tests.conftest import assert_two_times

BACKENDS = ["chunked", "eager"]
REDUCTIONS = ["mean", "sum", "none"]


def _inputs(shape=(23,), width=6, vocabulary=37, dtype=torch.float64, ignored=0.4):
    """hidden, weight, bias that require grad, and a target."""
    made = [torch.randn(*s, dtype=torch.float64) for s in ((*shape, width), (vocabulary, width), (vocabulary,))]
    target = torch.randint(0, vocabulary, shape)
    target[torch.rand(shape) < ignored] = -100
    return *[x.to(dtype).requires_grad_() for x in made], target


def _by_formula(hidden, weight, bias, target, smoothing, reduction):
    """Row by row, written as a mixture of log-probabilities; the gradients by autograd."""
    losses = []
    for row, y in zip(hidden.reshape(-1, hidden.shape[-1]), target.flatten().tolist(), strict=True):
        scores = weight @ row + bias
        logs = scores - scores.exp().sum().log()
        losses.append(-(1 - smoothing) * logs[y] - smoothing * logs.mean() if y >= 0 else 0 * logs.sum())
    rows = torch.stack(losses)
    if reduction == "none":
        return rows.view(target.shape)
    return rows.sum() / (int((target >= 0).sum()) if reduction == "mean" else 1)


def _upstream(loss):
    """What comes from above: a number, or another one for every row."""
    return torch.linspace(0.3, 2.0, loss.numel(), dtype=loss.dtype).view(loss.shape)


def _results(loss, inputs):
    return [loss.detach(), *torch.autograd.grad(loss, inputs, _upstream(loss))]


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("rows", [1, 4, 5, None])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_loss_and_gradients_of_the_formula(reduction, rows, smoothing):
    *inputs, target = _inputs((2, 11))
    hidden, weight, bias = inputs
    want = _results(_by_formula(hidden, weight, bias, target, smoothing, reduction), inputs)
    given = {"reduction": reduction, "label_smoothing": smoothing, "chunk_rows": rows}
    got = _results(linear_cross_entropy(hidden, weight, target, bias, **given), inputs)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert (got[1][target == -100] == 0).all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_no_worse_than_all_logits_at_once(dtype, reduction):
    """The gradient of the weight over ten chunks, too: its sum does not lose the later ones."""
    *inputs, target = _inputs((300,), 32, 50, dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    results = []
    for given, backend in ((exact, "eager"), (inputs, "eager"), (inputs, "chunked")):
        hidden, weight, bias = given
        loss = linear_cross_entropy(hidden, weight, target, bias, reduction=reduction, chunk_rows=32, backend=backend)
        assert loss.dtype == (torch.float64 if given is exact else torch.float32)
        results.append(_results(loss, given))
    for right, eager, got in zip(*results, strict=True):
        assert_two_times(got, eager, right, 1e-6)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck(reduction):
    hidden, weight, bias, target = _inputs((5,), 3, 7)
    call = lambda *x: linear_cross_entropy(  # noqa: E731
        x[0], x[1], target, x[2], reduction=reduction, label_smoothing=0.2, chunk_rows=2
    )
    assert torch.autograd.gradcheck(call, (hidden, weight, bias))


def test_float16_does_not_overflow_where_the_mean_does_not():
    """A sum over 3000 rows of one target is beyond float16, its mean is not; nor is what a loss scale lifts above 0."""
    hidden = torch.full((3000, 4), 30.0, dtype=torch.float16, requires_grad=True)
    weight = torch.zeros(8, 4, dtype=torch.float16, requires_grad=True)
    target = torch.zeros(3000, dtype=torch.int64)
    results = [
        torch.autograd.grad(linear_cross_entropy(hidden, weight, target, backend=b) * 2**10, (hidden, weight))
        for b in BACKENDS
    ]
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)
    assert results[0][1].isfinite().all() and results[0][1][0, 0] < -1e4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [0, 3])
def test_nothing_that_counts(rows, backend):
    """As PyTorch has it: the mean of nothing is NaN, its gradients are zeros, so that an optimizer does no harm."""
    hidden, weight = torch.randn(rows, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    target = torch.full((rows,), -100)
    for reduction in REDUCTIONS:
        loss = linear_cross_entropy(hidden, weight, target, reduction=reduction, backend=backend)
        grads = torch.autograd.grad(loss.sum(), (hidden, weight))
        assert all((g == 0).all() and g.shape == x.shape for g, x in zip(grads, (hidden, weight), strict=True))
        assert (
            loss.isnan()
            if reduction == "mean"
            else (loss == 0).all() and loss.numel() == (rows if reduction == "none" else 1)
        )


def test_one_row_and_no_row_dimension():
    hidden, weight = torch.randn(4), torch.randn(9, 4)
    for reduction in REDUCTIONS:
        got = linear_cross_entropy(hidden, weight, torch.tensor(3), reduction=reduction)
        torch.testing.assert_close(got, F.cross_entropy(weight @ hidden, torch.tensor(3)))


def test_a_column_can_be_ignored():
    hidden, weight, bias, _ = _inputs()
    target = torch.arange(23) % 5
    for reduction in REDUCTIONS:
        got, want = (
            linear_cross_entropy(hidden, weight, target, bias, ignore_index=3, reduction=reduction, backend=backend)
            for backend in BACKENDS
        )
        torch.testing.assert_close(got, want)


def test_what_requires_no_grad_gets_none():
    *inputs, target = _inputs()
    want = torch.autograd.grad(linear_cross_entropy(inputs[0], inputs[1], target, inputs[2]), inputs)
    for reduction in REDUCTIONS:
        for n in range(3):
            given = [x if k == n else x.detach() for k, x in enumerate(inputs)]
            loss = linear_cross_entropy(given[0], given[1], target, given[2], reduction=reduction)
            loss = loss.sum() / (1 if reduction == "mean" else (target >= 0).sum())
            torch.testing.assert_close(torch.autograd.grad(loss, given[n])[0], want[n])
    with torch.no_grad():
        assert not linear_cross_entropy(inputs[0], inputs[1], target).requires_grad


def test_shapes_on_the_meta_device():
    """Also inside of an autocast for the device that the weights will lie on."""
    hidden, weight = torch.empty(2, 3, 4, device="meta", requires_grad=True), torch.empty(9, 4, device="meta")
    target = torch.empty(2, 3, dtype=torch.int64, device="meta")
    with torch.autocast("cpu", torch.bfloat16):
        for reduction in REDUCTIONS:
            loss = linear_cross_entropy(hidden, weight, target, reduction=reduction)
            assert loss.shape == (target.shape if reduction == "none" else ()) and loss.dtype == torch.float32
            assert torch.autograd.grad(loss.sum(), hidden)[0].shape == hidden.shape


def test_strided_inputs():
    """Rows of a wider buffer, columns two apart, a batch that was turned, a weight that is a transpose."""
    wide, target = torch.randn(7, 3, 12, dtype=torch.float64), torch.randint(0, 9, (3, 7))
    hidden, weight = wide[..., ::2].transpose(0, 1).requires_grad_(), torch.randn(6, 9, dtype=torch.float64).T
    weight.requires_grad_()
    results = [
        _results(
            linear_cross_entropy(hidden, weight, target.T.contiguous().T, backend=b, chunk_rows=4), (hidden, weight)
        )
        for b in BACKENDS
    ]
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


def test_the_same_bits_every_time():
    *inputs, target = _inputs((60,), 16, 40, torch.bfloat16)
    first, second = (
        _results(linear_cross_entropy(inputs[0], inputs[1], target, inputs[2], chunk_rows=16), inputs) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_ignored_rows_may_hold_anything():
    hidden, weight, _, target = _inputs()
    broken = hidden.detach().masked_fill((target < 0)[:, None], torch.nan).requires_grad_()
    results = [_results(linear_cross_entropy(h, weight, target), (h, weight)) for h in (hidden, broken)]
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


def test_a_minus_infinite_bias_takes_columns_out():
    hidden, weight, bias, _ = _inputs(vocabulary=9)
    closed = bias.detach().clone()
    closed[:4] = -torch.inf
    target = torch.randint(4, 9, (23,))
    got = linear_cross_entropy(hidden, weight, target, closed)
    torch.testing.assert_close(got, linear_cross_entropy(hidden, weight[4:], target - 4, bias[4:]))
    assert linear_cross_entropy(hidden, weight, target * 0, closed) == torch.inf


# ------------------------------------------------------------------------------------------------- autograd


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_kept_graph_gives_the_same_gradients_again(reduction):
    *inputs, target = _inputs()
    loss = linear_cross_entropy(inputs[0], inputs[1], target, inputs[2], reduction=reduction).sum() * 0.37
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    second = torch.autograd.grad(loss, inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivatives_raise(reduction, which):
    *inputs, target = _inputs()
    loss = linear_cross_entropy(inputs[0], inputs[1], target, reduction=reduction).sum()
    (grad,) = torch.autograd.grad(loss, inputs[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="linear_cross_entropy: its gradients have no derivatives"):
        torch.autograd.grad(loss + grad.square().sum(), inputs[which])


def test_transforms_and_tangents_raise():
    hidden, weight, _, target = _inputs()
    hidden, weight = hidden.detach(), weight.detach()
    with pytest.raises(NotImplementedError, match=r"no transform of torch\.func"):
        torch.func.grad(lambda h: linear_cross_entropy(h, weight, target))(hidden)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(hidden, torch.ones_like(hidden))
        with pytest.raises(NotImplementedError, match="forward-mode"):
            linear_cross_entropy(dual, weight, target)
    want = torch.func.grad(lambda h: F.cross_entropy(h @ weight.T, target))(hidden)
    got = torch.func.grad(lambda h: linear_cross_entropy(h, weight, target, backend="eager"))(hidden)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_factor_from_above_keeps_its_precision(dtype):
    """Multiplied in float32 and rounded once: a third in bf16 would make every gradient 0.2 % too small."""
    *inputs, target = _inputs((9,), 8, 20, dtype)
    loss = linear_cross_entropy(inputs[0], inputs[1], target, reduction="sum")
    ones = torch.autograd.grad(loss, inputs[0], retain_graph=True)[0]
    got = torch.autograd.grad(loss / 3, inputs[0])[0]
    assert torch.equal(got, (ones.float() * torch.tensor(1.0).div(3)).to(dtype))


def test_autocast_is_that_of_a_linear_layer():
    """The products in its dtype, the loss in float32, the gradients in the inputs'; also where dtypes differ."""
    hidden, weight, bias, target = _inputs(dtype=torch.float32)
    inputs = [hidden, weight, bias]
    with torch.autocast("cpu", torch.bfloat16):
        stock = F.cross_entropy(F.linear(hidden, weight, bias).float(), target)
        loss = linear_cross_entropy(hidden, weight, target, bias)
        mixed = linear_cross_entropy(hidden.bfloat16(), weight, target, bias)
    got, want = torch.autograd.grad(loss, inputs), torch.autograd.grad(stock, inputs)
    torch.testing.assert_close(loss, stock)
    assert torch.equal(loss, mixed) and loss.dtype == torch.float32
    exact = torch.autograd.grad(F.cross_entropy(F.linear(*(x.double() for x in inputs)), target), inputs)
    for a, b, c in zip(got, want, exact, strict=True):
        assert a.dtype == torch.float32
        assert_two_times(a, b, c, 1e-6)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_with_its_backward(reduction, dynamic):
    torch._dynamo.reset()
    hidden, weight, bias, target = _inputs(dtype=torch.float32)

    def loss(y, h, w, b):
        return linear_cross_entropy(h, w, y, b, reduction=reduction, label_smoothing=0.1).sum() * 3

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (23, 17):
        inputs = [hidden[:rows].detach().requires_grad_(), weight, bias]
        want, got = (torch.autograd.grad(f(target[:rows], *inputs), inputs) for f in (loss, compiled))
        torch.testing.assert_close(got, want)


def test_checkpointed():
    """Recomputed in the backward, by either kind of checkpointing."""
    *inputs, target = _inputs()
    want = torch.autograd.grad(linear_cross_entropy(inputs[0], inputs[1], target, inputs[2]), inputs)
    for reentrant in (False, True):
        run = lambda h, w, b: linear_cross_entropy(h, w, target, b)  # noqa: E731
        loss = checkpoint(run, *inputs, use_reentrant=reentrant)
        loss.backward()
        for x, g in zip(inputs, want, strict=True):
            assert x.grad is not None and torch.equal(x.grad, g)
            x.grad = None


def test_opcheck():
    """Its gradients are outputs that belong to its backward, which scales them in place: AOT's comparison of outputs is
    made of the whole op instead, where nobody sees them."""
    hidden, weight, bias, target = _inputs((7,), dtype=torch.float32)
    some = ("test_schema", "test_autograd_registration", "test_faketensor")
    for reduction in REDUCTIONS:
        for wants in ([True, True, True], [False, True, False]):
            arguments = (hidden, weight, target, bias, -100, reduction, 0.1, 3, False, wants)
            torch.library.opcheck(torch.ops.qwen2vl.linear_cross_entropy_forward.default, arguments, test_utils=some)
        whole = torch.ops.qwen2vl.linear_cross_entropy.default
        torch.library.opcheck(whole, (hidden, weight, target, bias), {"reduction": reduction})
    arguments = (
        torch.ones(7),
        hidden.detach(),
        weight.detach(),
        target,
        bias.detach(),
        -100,
        0.1,
        3,
        False,
        [True] * 3,
    )
    torch.library.opcheck(torch.ops.qwen2vl.linear_cross_entropy_backward.default, arguments)


# -------------------------------------------------------------------------------------------- chunks, memory


def test_logits_exist_for_a_chunk_at_a_time(monkeypatch):
    rows, linear = [], F.linear
    monkeypatch.setattr(F, "linear", lambda x, *rest: (rows.append(x.shape[0]), linear(x, *rest))[1])
    hidden, weight, _, target = _inputs((64,), ignored=0)
    linear_cross_entropy(hidden, weight, target, chunk_rows=10).backward()
    assert rows == [10] * 6 + [4], "the gradients are made on the way"
    rows.clear()
    target[:24] = -100
    linear_cross_entropy(hidden, weight, target, chunk_rows=10, reduction="none").sum().backward()
    assert rows == [10] * 8, "forward and backward; ignored rows meet no weight"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_chunks_are_even_and_of_about_the_best_size(device):
    best = {"cpu": op._ROWS_ON_CPU, "cuda": op._ROWS}[device]
    for rows in (1, 7, 100, 255, 257, 1000, 1024, 1100, 1535, 1537, 5000, 8192, 100_003):
        size = op.chunk_size(rows, 151_936, device)
        chunks = -(-rows // size)
        assert 1 <= size <= min(rows, 1.5 * best + 8)
        assert rows < best or size >= best / 1.5
        assert rows - size * (chunks - 1) >= size - 8 * chunks, "no short one at the end"
    assert op.chunk_size(4096, 1 << 24, device) == 16 and op.chunk_size(0, 100, device) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_of_products_in_pieces(dtype, monkeypatch):
    """Where a product of 16-bit numbers is summed in float32, by columns of the vocabulary."""
    monkeypatch.setattr(op, "_PIECE", 40)
    monkeypatch.setattr(op, "slow_on_cpu", lambda dtype: True)
    total, d, h = torch.randn(37, 6), torch.randn(11, 37).to(dtype), torch.randn(11, 6).to(dtype)
    want = total + d.float().T @ h.float()
    op._add_product(total, d, h)
    torch.testing.assert_close(total, want)


# ------------------------------------------------------------------------------------------------- refusals


def test_a_sharded_weight_is_refused():
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    hidden, weight, _, target = _inputs(dtype=torch.float32)
    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        sharded = DTensor.from_local(weight.detach(), DeviceMesh("cpu", [0, 1]), [Shard(0)])
        with pytest.raises(TypeError, match="weight must be whole, got a sharded DTensor; call inside the module"):
            linear_cross_entropy(hidden, sharded, target)
    finally:
        torch.distributed.destroy_process_group()
    with pytest.raises(ValueError, match=r"weight must have shape \(V, C\) with C=6, got \(222,\)"):  # FSDP1's
        linear_cross_entropy(hidden, weight.flatten(), target)


def test_targets_beyond_the_vocabulary_are_refused_when_compiled_too():
    torch._dynamo.reset()
    hidden, weight, _, target = _inputs(dtype=torch.float32)
    target[3] = 37
    call = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match=r"target must be in \[0, 37\) or ignore_index = -100, got 37"):
        call(hidden, weight, target)


@pytest.mark.parametrize("gradient", [False, True])
def test_what_a_gpu_does_with_them(gradient):
    """Nobody reads them on the host there: NaN, in the loss and in the gradient of the row, and in no other row."""
    target, loss = torch.tensor([3, -100, 9, -1, 0]), torch.empty(5)
    d = op._rows_in_torch(torch.randn(5, 9), target, None, loss, -100, 0.1, gradient)
    assert loss.isnan().tolist() == [False, False, True, True, False] and loss[1] == 0
    if gradient:
        assert d.isnan().all(1).tolist() == loss.isnan().tolist() and (d[1] == 0).all()
        assert d[[0, 1, 4]].isfinite().all()
