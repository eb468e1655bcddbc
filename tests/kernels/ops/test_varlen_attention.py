"""varlen_attention, every CPU backend, against a masked softmax in float64 written without segments."""

from functools import partial

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from qwen2vl_kernels import use_backend, varlen_attention
from qwen2vl_kernels.core import attention_choice
from qwen2vl_kernels.ops.varlen_attention import varlen_attention_ref
from tests.conftest import assert_two_times

BACKENDS = ["eager", "sdpa", "blocked"]
LENGTHS = [[1], [1, 63, 64, 65], [0, 130, 0], [257, 16, 1], [33, 33, 33], [], [600]]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _exact(q, k, v, cu, causal, scale=None):
    """One dense (T, T) score matrix with everything outside the own segment masked."""
    q, k, v = q.double(), k.double(), v.double()
    total, group = q.shape[0], q.shape[1] // k.shape[1]
    rows = torch.arange(total)
    segment = torch.bucketize(rows, cu[1:].long(), right=True)
    allowed = (segment[:, None] == segment[None]) & (rows < cu[-1])[:, None] & (rows < cu[-1])[None]
    if causal:
        allowed &= rows[:, None] >= rows[None]
    scores = torch.einsum("ihd,jhd->hij", q, k.repeat_interleave(group, 1))
    scores = scores * (q.shape[-1] ** -0.5 if scale is None else scale)
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1).nan_to_num(0)
    return torch.einsum("hij,jhd->ihd", weights, v.repeat_interleave(group, 1))


def _pack(lengths, heads=4, kv_heads=2, dim=80, dtype=torch.float32, tail=0):
    total = sum(lengths) + tail
    q = torch.randn(total, heads, dim).to(dtype)
    k, v = torch.randn(2, total, kv_heads, dim).to(dtype)
    cu = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    return q, k, v, cu, max(lengths, default=0)


def _assert_eager(eager, exact):
    """The yardstick itself: the result's own rounding, doubled, plus an ulp for the rounded scores and weights of
    16-bit dtypes and for float32's sums over up to 600 keys (4.2e-7 measured)."""
    dtype = eager.dtype
    assert_two_times(eager, exact.to(dtype), exact, max(torch.finfo(dtype).eps, 8 * torch.finfo(torch.float32).eps))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_ragged_packs(lengths, causal, backend):
    for dtype in DTYPES:
        q, k, v, cu, longest = _pack(lengths, dtype=dtype, tail=5)
        got = varlen_attention(q, k, v, cu, longest, causal=causal, backend=backend)
        eager = varlen_attention_ref(q, k, v, cu, causal)
        assert got.dtype == dtype
        exact = _exact(q, k, v, cu, causal)
        _assert_eager(eager, exact)
        assert_two_times(got, eager, exact, 1e-6)
        assert torch.count_nonzero(got[sum(lengths) :]) == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 4, 80), (7, 1, 128), (6, 2, 72), (2, 2, 64)], ids=str)
def test_head_layouts(heads, kv_heads, dim, backend):
    q, k, v, cu, longest = _pack([40, 3], heads, kv_heads, dim)
    for scale in (None, 0.3):
        got = varlen_attention(q, k, v, cu, longest, causal=True, softmax_scale=scale, backend=backend)
        torch.testing.assert_close(got.double(), _exact(q, k, v, cu, True, scale), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_qkv_is_read_in_place(backend):
    qkv = torch.randn(50, 3, 4, 80)
    q, k, v = qkv.unbind(1)
    cu = torch.tensor([0, 20, 50], dtype=torch.int32)
    got = varlen_attention(q, k, v, cu, 30, backend=backend)
    torch.testing.assert_close(got.double(), _exact(q, k, v, cu, False), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_segments_do_not_see_each_other_or_the_tail(backend):
    q, k, v, cu, _ = _pack([5, 7], tail=4)
    clean = varlen_attention(q, k, v, cu, 7, backend=backend)
    for x in (q, k, v):
        x[12:] = float("nan")
    assert torch.equal(varlen_attention(q, k, v, cu, 7, backend=backend), clean)
    for x in (k, v):
        x[:5] = float("nan")
    assert torch.equal(varlen_attention(q, k, v, cu, 7, backend=backend)[5:], clean[5:])


@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("lengths", [[300, 17, 300], [17, 300], [64, 64, 64], [300, 300]], ids=str)
def test_a_segment_is_bitwise_the_same_in_any_pack(lengths, causal, backend):
    """Also as the backend is chosen, whether the pack's longest segment is its own or not, and in equal lengths."""
    for dtype in (torch.bfloat16, torch.float32):
        q, k, v, cu, longest = _pack(lengths, dtype=dtype)
        together = varlen_attention(q, k, v, cu, longest, causal=causal, backend=backend)
        for a, b in zip(cu.tolist(), cu[1:].tolist(), strict=False):
            alone = torch.tensor([0, b - a], dtype=torch.int32)
            got = varlen_attention(q[a:b], k[a:b], v[a:b], alone, b - a, causal=causal, backend=backend)
            assert torch.equal(got, together[a:b])


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_of_ten_thousand_do_not_overflow(backend):
    q, k, v, cu, longest = _pack([9, 4], dim=64)
    q = q / q.norm(dim=-1, keepdim=True) * 1e4 * 8
    k = k / k.norm(dim=-1, keepdim=True)
    got = varlen_attention(q, k, v, cu, longest, backend=backend)
    torch.testing.assert_close(got.double(), _exact(q, k, v, cu, False), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", [6, 300])
def test_float16_products_past_65504_stay_finite(length, backend):
    """Qwen2's key biases: q.k overflows float16 unless it is scaled first."""
    q, k, v, cu, longest = _pack([length], dim=64, dtype=torch.float16)
    q, k = q + 40, k + 40  # q.k is about 64 * 1600 = 102400
    got = varlen_attention(q, k, v, cu, longest, backend=backend)
    # Scores of about 12800 are rounded to multiples of 8, so that weights say little: what is finite is what counts,
    # and that the outputs are averages of the values.
    assert torch.isfinite(got).all()
    assert got.abs().max() <= v.abs().max()
    if backend == "sdpa":  # keeps scores in float32
        exact = _exact(q, k, v, cu, False)
        assert_two_times(got, exact.to(torch.float16), exact, torch.finfo(torch.float16).eps)


def test_gradients():
    q, k, v, cu, longest = _pack([3, 0, 4], 4, 2, 8, torch.float64, tail=1)
    for x in (q, k, v):
        x.requires_grad_()
    for name in ("eager", "sdpa"):
        call = partial(varlen_attention, cu_seqlens=cu, max_seqlen=longest, causal=True, backend=name)
        assert torch.autograd.gradcheck(call, (q, k, v))


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_gradients_of_short_segments_in_16_bits_go_through_float32(dtype, causal, monkeypatch):
    """PyTorch's kernel for these is several times as fast. Long segments keep their own dtype."""
    name = "_scaled_dot_product_flash_attention_for_cpu_backward"
    kernel, used = getattr(torch.ops.aten, name), {}

    def called(grad, *given, **options):
        used[grad.shape[2]] = {x.dtype for x in (grad, *given) if isinstance(x, torch.Tensor)}
        return kernel(grad, *given, **options)

    monkeypatch.setattr(torch.ops.aten, name, called)
    q, k, v, cu, longest = _pack([64, 383, 384], dtype=dtype)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = varlen_attention(*inputs, cu, longest, causal=causal, backend="sdpa")
    weights = torch.randn(out.shape).to(dtype)
    grads = torch.autograd.grad(out, inputs, weights)
    assert used == {
        64: {torch.float32},
        383: {torch.float32},
        384: {dtype, torch.float32},
    }  # the statistics' is the last
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = torch.autograd.grad(_exact(*exact, cu, causal), exact, weights.double())
    eager = torch.autograd.grad(varlen_attention_ref(*inputs, cu, causal), inputs, weights)
    for ours, theirs, true in zip(grads, eager, expected, strict=True):
        assert ours.dtype == dtype
        assert_two_times(ours, theirs, true, 1e-6)


@pytest.mark.parametrize("keys", [None, [5, 40, 0, 60]], ids=["packed", "keys"])
def test_the_backward_of_many_segments_writes_the_gradients_once(keys):
    """As slices, each of the segments took zeros for all rows and their sum: quadratic in a pack of many."""
    lengths = [30, 50, 0, 70]
    q, k, v, cu, longest = _pack(lengths, tail=4)
    split = {"cu_seqlens": cu, "max_seqlen": longest}
    if keys is not None:
        k, v, cu_k, longest_k = _pack(keys)[1:]
        split = {"cu_seqlens_q": cu, "cu_seqlens_k": cu_k, "max_seqlen_q": longest, "max_seqlen_k": longest_k}
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out = varlen_attention(q, k, v, backend="sdpa", **split)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert not [event.key for event in seen.key_averages() if "slice_backward" in event.key]
    expected = varlen_attention(q, k, v, backend="eager", **split)
    for ours, theirs in zip(grads, torch.autograd.grad(expected.sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("vendor", "slow", "name", "other"),
    [
        ("AuthenticAMD", False, "blocked", "sdpa"),
        ("AuthenticAMD", True, "sdpa", "blocked"),
        ("GenuineIntel", False, "sdpa", "blocked"),
        ("", False, "sdpa", "blocked"),
    ],
)
def test_bf16_inference_is_blocked_where_that_measured_faster(monkeypatch, vendor, slow, name, other):
    monkeypatch.setattr(attention_choice, "slow_on_cpu", lambda dtype: slow)
    monkeypatch.setattr(attention_choice, "cpu_vendor", lambda: vendor)
    q, k, v, cu, longest = _pack([300], dtype=torch.bfloat16)
    got, want, not_it = (varlen_attention(q, k, v, cu, longest, backend=b) for b in (None, name, other))
    assert torch.equal(got, want) and not torch.equal(got, not_it)


def test_blocked_refuses_gradients():
    q, k, v, cu, longest = _pack([300], dtype=torch.bfloat16)
    with use_backend("eager"):
        assert torch.equal(varlen_attention(q, k, v, cu, longest), varlen_attention_ref(q, k, v, cu))
    with pytest.raises(ValueError, match="'blocked' has no backward"):
        varlen_attention(q.requires_grad_(), k, v, cu, longest, backend="blocked")


def test_bounds_are_checked():
    q, k, v, _, _ = _pack([8])
    for cu, longest, message in (
        ([0, 9], 9, "cu_seqlens must rise from 0 to at most q's 8 rows, got \\[0, 9\\]"),
        ([1, 8], 8, "cu_seqlens must rise from 0"),
        ([0, 5, 3], 8, "cu_seqlens must rise from 0"),
        ([0, 8], 7, "max_seqlen is 7, but cu_seqlens has a segment of 8 rows"),
        ([], 7, "cu_seqlens must have at least one entry"),
    ):
        with pytest.raises(ValueError, match=message):
            varlen_attention(q, k, v, torch.tensor(cu, dtype=torch.int32), longest)
    with pytest.raises(TypeError, match=r"cu_seqlens must have one of the dtypes int32, got torch.int64"):
        varlen_attention(q, k, v, torch.tensor([0, 8]), 8)
    with pytest.raises(ValueError, match="q's 4 heads must be a multiple of k's 3"):
        varlen_attention(q, torch.randn(8, 3, 80), torch.randn(8, 3, 80), torch.tensor([0, 8]).int(), 8)


@pytest.mark.parametrize("backend", ["eager", "sdpa", None])
@pytest.mark.parametrize("rows", [0, 3])
def test_no_segment_with_rows_still_has_gradients(rows, backend):
    q, k, v = (torch.rand(rows, heads, 8, requires_grad=True) for heads in (2, 1, 1))
    out = varlen_attention(q, k, v, torch.tensor([0, 0], dtype=torch.int32), 0, backend=backend)
    assert out.shape == (rows, 2, 8) and out.grad_fn is not None and not out.any()
    out.sum().backward()
    assert all(x.grad is not None and x.grad.shape == x.shape and not x.grad.any() for x in (q, k, v))
