"""varlen_attention where keys have boundaries of their own, and the logs of its sums, every backend against float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from qwen2vl_kernels import BackendError, plan_tiles, varlen_attention
from qwen2vl_kernels.core.attention_choice import Call, choose, entry_of
from qwen2vl_kernels.core.attention_peers import _cudnn_shape, why_not
from qwen2vl_kernels.core.backends import unavailable
from qwen2vl_kernels.ops import varlen_attention as op
from qwen2vl_kernels.ops.varlen_attention import varlen_attention_ref
from tests.conftest import DEVICE, assert_two_times
from tests.kernels.poison import poisoned  # noqa: F401

pytestmark = pytest.mark.usefixtures("poisoned")
#: Queries and keys of each segment: a turn over a past, no past, a first token, more queries than keys, none of either.
SEGMENTS = [(5, 70), (40, 40), (1, 33), (9, 4), (0, 6), (6, 0), (130, 200)]
BACKENDS = ["eager", "sdpa", "blocked", "triton"]


def _pack(segments, heads=4, kv_heads=2, columns=16, v_columns=None, dtype=torch.float32, tail=3, device="cpu"):
    """q, k, v and boundaries; rows that no segment holds are NaN."""
    rows, keys = (sum(pair[i] for pair in segments) for i in (0, 1))
    q = torch.randn(rows + tail, heads, columns, device=device).to(dtype)
    k = torch.randn(keys + tail, kv_heads, columns, device=device).to(dtype)
    v = torch.randn(keys + tail, kv_heads, v_columns or columns, device=device).to(dtype)
    for x, held in ((q, rows), (k, keys), (v, keys)):
        x[held:] = torch.nan
    bounds = [torch.tensor([0, *(pair[i] for pair in segments)]).cumsum(0, dtype=torch.int32) for i in (0, 1)]
    return q, k, v, _named(*bounds, *(max((pair[i] for pair in segments), default=0) for i in (0, 1)))


def _named(of_queries, of_keys, most_q, most_k):
    return {"cu_seqlens_q": of_queries, "cu_seqlens_k": of_keys, "max_seqlen_q": most_q, "max_seqlen_k": most_k}


def _exact(q, k, v, bounds, causal):
    """Query by query in float64: a softmax over the keys that it sees, and the log of its sum."""
    out = torch.zeros(q.shape[0], q.shape[1], v.shape[2], dtype=torch.float64, device=q.device)
    lse = torch.full((q.shape[1], q.shape[0]), -math.inf, dtype=torch.float64, device=q.device)
    group, of_queries, of_keys = q.shape[1] // k.shape[1], *(bounds[f"cu_seqlens_{x}"].tolist() for x in "qk")
    for a, b, c, d in zip(of_queries, of_queries[1:], of_keys, of_keys[1:], strict=False):
        for row in range(a, b):
            end = d - (b - 1 - row) if causal else d
            if end <= c:
                continue
            keys, values = (x[c:end].double().repeat_interleave(group, 1) for x in (k, v))
            scores = torch.einsum("hd,shd->hs", q[row].double(), keys) * q.shape[2] ** -0.5
            out[row], lse[:, row] = torch.einsum("hs,shd->hd", scores.softmax(-1), values), scores.logsumexp(-1)
    return out, lse


def _served(backend, dtype=torch.float32):
    device = DEVICE if backend == "triton" else "cpu"
    if (reason := unavailable(backend, device)) is not None:
        pytest.skip(f"{backend}: {reason}")
    return device


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forward_and_logs(backend, causal, dtype):
    q, k, v, bounds = _pack(SEGMENTS, dtype=dtype, device=_served(backend))
    exact, logs = _exact(q, k, v, bounds, causal)
    eager = varlen_attention_ref(q, k, v, bounds["cu_seqlens_q"], causal, None, bounds["cu_seqlens_k"])
    got = varlen_attention(q, k, v, **bounds, causal=causal, backend=backend)
    assert got.dtype == dtype and torch.equal(got[191:], torch.zeros_like(got[191:]))
    assert_two_times(got, eager, exact, 2 * torch.finfo(dtype).eps)
    blind = logs[0] == -math.inf
    assert not got[blind].any() and blind.sum() == 3 + 6 + (5 if causal else 0)
    if backend == "blocked":
        with pytest.raises(BackendError, match="return_lse: it keeps no logs of the sums for such a call"):
            varlen_attention(q, k, v, **bounds, causal=causal, return_lse=True, backend=backend)
        return
    again, lse = varlen_attention(q, k, v, **bounds, causal=causal, return_lse=True, backend=backend)
    assert torch.equal(again, got) if backend != "sdpa" else True
    assert_two_times(again, eager, exact, 2 * torch.finfo(dtype).eps)
    assert lse.shape == logs.shape and lse.dtype == torch.float32 and torch.equal(lse == -math.inf, logs == -math.inf)
    rough = 1e-5 if dtype == torch.float32 else 0.02  # the formula rounds scores of bf16
    torch.testing.assert_close(lse.double(), logs, rtol=rough, atol=rough)


@pytest.mark.parametrize("backend", ["eager", "sdpa", "triton"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients(backend, causal, dtype):
    q, k, v, bounds = _pack([*SEGMENTS[:-1], (33, 70)], dtype=dtype, columns=24, device=_served(backend), tail=2)
    grad = torch.randn(q.shape[0], 4, 24, device=q.device).to(dtype)
    settings = bounds["cu_seqlens_q"], causal, None, bounds["cu_seqlens_k"]

    def gradients(run, *tensors):
        leaves = [x.detach().nan_to_num().requires_grad_() for x in tensors]
        return torch.autograd.grad(run(*leaves), leaves, grad.to(leaves[0].dtype))

    formula = lambda q, k, v: varlen_attention_ref(q, k, v, *settings)  # noqa: E731
    got = gradients(lambda *x: varlen_attention(*x, **bounds, causal=causal, backend=backend), q, k, v)
    eager, exact = gradients(formula, q, k, v), gradients(formula, *(x.double() for x in (q, k, v)))
    for one, theirs, right in zip(got, eager, exact, strict=True):
        assert_two_times(one, theirs, right, 4 * torch.finfo(dtype).eps)
        assert not one[-2:].any()


def test_the_formula_is_pytorchs_lower_right_mask():
    q, k, v, bounds = _pack([(7, 20)], heads=2, tail=0)
    batch = [x.transpose(0, 1)[None] for x in (q, k, v)]
    want = F.scaled_dot_product_attention(*batch, attn_mask=causal_lower_right(7, 20))[0].transpose(0, 1)
    for backend in ("eager", "sdpa"):
        got = varlen_attention(q, k, v, **bounds, causal=True, backend=backend)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["sdpa", "blocked", "triton"])
def test_equal_boundaries_are_a_packed_sequence_bit_for_bit(backend):
    q, k, v, bounds = _pack([(40, 40), (300, 300), (7, 7)], dtype=torch.bfloat16, device=_served(backend))
    cu = bounds["cu_seqlens_q"]
    for causal in (False, True):
        packed = varlen_attention(q, k, v, cu, 300, causal=causal, backend=backend)
        assert torch.equal(varlen_attention(q, k, v, **bounds, causal=causal, backend=backend), packed)


@pytest.mark.parametrize("backend", ["sdpa", "blocked", "triton"])
def test_a_segment_is_the_same_in_every_pack(backend):
    q, k, v, bounds = _pack([(5, 70), (270, 300), (12, 30)], dtype=torch.bfloat16, device=_served(backend))
    together = varlen_attention(q, k, v, **bounds, causal=True, backend=backend)
    one = _named(*(torch.tensor([0, n], dtype=torch.int32) for n in (270, 300)), 270, 300)
    alone = varlen_attention(q[5:275], k[70:370], v[70:370], **one, causal=True, backend=backend)
    assert torch.equal(alone, together[5:275])


@pytest.mark.parametrize(("queries", "past", "calls"), [(40, 1, 1), (40, 10, 1), (40, 11, 2), (3, 70, 2)])
@pytest.mark.parametrize("return_lse", [False, True])
def test_a_short_past_is_no_call_of_its_own(queries, past, calls, return_lse, monkeypatch):
    """On a CPU: beside many queries it gets queries of its own, whose results nobody sees."""
    kernel, count = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, []
    q, k, v, bounds = _pack([(queries, queries + past)], tail=0)
    exact = _exact(q, k, v, bounds, True)
    monkeypatch.setattr(
        torch.ops.aten,
        "_scaled_dot_product_flash_attention_for_cpu",
        lambda *a, **b: count.append(1) or kernel(*a, **b),
    )
    got = varlen_attention(q, k, v, **bounds, causal=True, backend="sdpa", return_lse=return_lse)
    for one, wanted in zip(got if return_lse else (got,), exact, strict=False):
        torch.testing.assert_close(one.double(), wanted, rtol=1e-5, atol=1e-5)
    assert len(count) == calls


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_logs_have_gradients(backend):
    """Two halves of the keys, added up by the logs of their sums, have the gradients of all keys at once."""
    device = _served(backend)
    q, k, v, bounds = _pack([(3, 8), (2, 6)], heads=2, kv_heads=1, columns=8, tail=0, device=device)
    q, k, v = (x.double() for x in (q, k, v))
    grad = torch.randn_like(q)

    def whole(q, k, v):
        return varlen_attention(q, k, v, **bounds, backend=backend)

    def halves(q, k, v):
        parts = []
        for keys, of_keys in ((slice(0, 4), [0, 4, 4]), (slice(4, 14), [0, 4, 10])):
            given = _named(bounds["cu_seqlens_q"], torch.tensor(of_keys, dtype=torch.int32), 3, 6)
            parts.append(varlen_attention(q, k[keys], v[keys], **given, return_lse=True, backend=backend))
        (one, lse), (two, lse_two) = parts
        total = torch.logaddexp(lse, lse_two)
        weights = [(x - total).exp().t().unsqueeze(-1) for x in (lse, lse_two)]
        return one * weights[0] + two * weights[1]

    got, want = (
        torch.autograd.grad(run(*leaves), leaves, grad)
        for run in (halves, whole)
        for leaves in [[x.detach().clone().requires_grad_() for x in (q, k, v)]]
    )
    for one, two in zip(got, want, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_gradcheck(causal):
    device = _served("triton")
    q, k, v, bounds = _pack([(2, 3), (2, 1)], heads=2, kv_heads=1, columns=2, tail=0, device=device)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]

    def run(*tensors):
        out, lse = varlen_attention(*tensors, **bounds, causal=causal, return_lse=True, backend="triton")
        return out, lse.clamp_min(-100)  # a difference of two infinities is no number

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("backend", ["sdpa", "eager", "triton"])
@pytest.mark.parametrize("gradients", [False, True])
def test_in_compiled_code(backend, gradients):
    q, k, v, bounds = _pack([(5, 9), (3, 3)], columns=16, tail=0, device=_served(backend))
    leaves = [x.requires_grad_(gradients) for x in (q, k, v)]
    with_lse = not (gradients and backend == "sdpa")

    def run(q, k, v):
        got = varlen_attention(q, k, v, **bounds, causal=True, return_lse=with_lse, backend=backend)
        return got if with_lse else (got,)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(*leaves)
    plain = run(*leaves)
    for one, two in zip(compiled, plain, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
    if gradients:
        grads = [torch.autograd.grad(sum(x.square().sum() for x in out), leaves) for out in (compiled, plain)]
        for one, two in zip(*grads, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("split", [False, True])
def test_the_plan_that_was_given_serves_forward_and_backward(split):
    """Whatever the boundaries beside it hold, then or later: with gradients, too."""
    device = _served("triton")
    segments = [(5, 9), (3, 4), (6, 2)] if split else [(5, 5), (3, 3), (6, 6)]
    q, k, v, bounds = _pack(segments, tail=0, device=device)
    other = [(5, 2), (2, 9), (7, 4)] if split else [(5, 5), (2, 2), (7, 7)]
    stale = _pack(other, tail=0)[3]
    if not split:
        bounds, stale = ({"cu_seqlens": x["cu_seqlens_q"], "max_seqlen": 7} for x in (bounds, stale))
    named = {"cu_seqlens_k": bounds["cu_seqlens_k"], "total_k": 15} if split else {}
    first = next(iter(bounds.values()))
    plan = plan_tiles(first, 14, **named, device=device)

    def results(given, tiles, after=lambda: None):
        leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        out = varlen_attention(*leaves, **given, causal=True, tiles=tiles, backend="triton")
        after()
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    want = results({k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in bounds.items()}, None)
    for given, after in ((stale, lambda: None), (bounds, first.zero_)):
        got = results({**given, **{k: max(9, v) for k, v in given.items() if isinstance(v, int)}}, plan, after)
        assert all(torch.equal(one, two) for one, two in zip(got, want, strict=True))


def test_a_padded_plan_takes_other_boundaries():
    device = _served("triton")
    q, k, v, bounds = _pack([(5, 9), (3, 4)], tail=0, device=device)
    plan = plan_tiles(
        bounds["cu_seqlens_q"], 8, cu_seqlens_k=bounds["cu_seqlens_k"], total_k=13, device=device, padded=True
    )
    varlen_attention(q, k, v, **bounds, tiles=plan, backend="triton")
    other = _named(*(torch.tensor(b, dtype=torch.int32) for b in ([0, 2, 8], [0, 13, 13])), 8, 13)
    plan.update_(other["cu_seqlens_q"], other["cu_seqlens_k"])
    got = varlen_attention(q, k, v, **other, tiles=plan, causal=True, backend="triton")
    assert torch.equal(got, varlen_attention(q, k, v, **other, causal=True, backend="triton"))
    with pytest.raises(ValueError, match="cu_seqlens_k must be given if and only if the plan's keys have boundaries"):
        plan.update_(other["cu_seqlens_q"])


def test_what_does_not_fit_is_refused():
    q, k, v, bounds = _pack([(5, 9), (3, 4)], tail=0)
    cu = bounds["cu_seqlens_q"]
    for given, error, message in (
        ({}, TypeError, "takes either cu_seqlens and max_seqlen, or cu_seqlens_q, .* got none of them"),
        ({"cu_seqlens_q": cu, "max_seqlen_q": 5}, TypeError, "got cu_seqlens_q, max_seqlen_q"),
        ({**bounds, "max_seqlen": 9}, TypeError, "got max_seqlen, cu_seqlens_q, cu_seqlens_k"),
        (
            {**bounds, "cu_seqlens_k": cu[:2]},
            ValueError,
            r"cu_seqlens_k must have shape \(S\+1\) with S\+1=3, got \(2,\)",
        ),
        ({**bounds, "cu_seqlens_k": cu + 6}, ValueError, "cu_seqlens_k must rise from 0 to at most k's 13 rows"),
        ({**bounds, "max_seqlen_k": 8}, ValueError, "max_seqlen_k is 8, but cu_seqlens_k has a segment of 9 rows"),
        ({**bounds, "max_seqlen_q": -1}, ValueError, "max_seqlen_q must be a non-negative int, got -1"),
        ({**bounds, "rope": (q[:, 0, :8], q[:, 0, :8])}, ValueError, "rope is for packed sequences"),
        (
            {"cu_seqlens": cu, "max_seqlen": 5},
            ValueError,
            r"k must have shape \(T, Hk, D\) with T=8, D=16, got \(13, 2",
        ),
        (
            {**bounds, "tiles": plan_tiles(cu, 8)},
            ValueError,
            "tiles are planned for no keys with boundaries of their own",
        ),
    ):
        with pytest.raises(error, match=message):
            varlen_attention(q, k, v, **given)
    with pytest.raises(ValueError, match="cu_seqlens_k and total_k must be given together"):
        plan_tiles(cu, 8, cu_seqlens_k=cu)
    with pytest.raises(BackendError, match="return_lse: its backward takes no gradient of them"):
        varlen_attention(q.requires_grad_(), k, v, **bounds, return_lse=True, backend="sdpa")


def test_who_serves_such_calls():
    call = Call("cuda", 90, torch.bfloat16, 80, 80, rows=1024)
    assert entry_of(call) is not None and entry_of(Call(**{**vars(call), "split": True})) is None, "never measured"
    split = Call(**{**vars(call), "split": True})
    assert _cudnn_shape(split) == "nobody has tried it where keys have boundaries of their own"
    asked = Call(**{**vars(call), "statistics": True, "gradients": True})
    assert "return_lse" in (why_not("torch", asked) or "")
    on_cpu = Call("cpu", 0, torch.bfloat16, 80, 80, statistics=True)
    assert choose(on_cpu).backend == "sdpa" and choose(Call(**{**vars(on_cpu), "gradients": True})).backend == "eager"


def test_autocast_is_pytorchs_for_matrix_products():
    q, k, v, bounds = _pack([(5, 9), (3, 4)], tail=2)
    for tail in (0, 2):  # rows behind the last segment do not widen the result
        given = [x[: x.shape[0] - 2 + tail] for x in (q, k, v)]
        for backend in (None, "eager"):
            run = lambda *x, backend=backend: varlen_attention(*x, **bounds, backend=backend)  # noqa: E731
            with torch.autocast("cpu", torch.bfloat16):
                plain = run(*given)
                torch._dynamo.reset()
                compiled = torch.compile(run, fullgraph=True, backend="eager")(*given)
                want = F.scaled_dot_product_attention(*(x[None] for x in (q, q, q)))
                assert run(*(x.double() for x in given)).dtype == torch.float64
            assert plain.dtype == compiled.dtype == want.dtype == torch.bfloat16
            assert torch.equal(plain, run(*(x.bfloat16() for x in given))) and torch.equal(plain, compiled)


def test_others_kernels_are_given_both_boundaries_and_their_logs_are_read():
    """PyTorch's operators by stand-ins: FlashAttention 2 says plus infinity for the log of a row that sees no key."""
    q, k, v, bounds = _pack([(5, 9), (3, 1), (2, 6)], dtype=torch.float64, tail=2)
    of_queries, of_keys, most_q, most_k = bounds.values()
    seen = []

    def forward(q, k, v, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, **named):
        seen.append((cum_seq_q.tolist(), cum_seq_k.tolist(), max_q, max_k))
        out, lse = varlen_attention_ref(q, k, v, cum_seq_q, is_causal, named["scale"], cum_seq_k, return_lse=True)
        out[10:] = torch.nan
        lse = lse.masked_fill(lse == -math.inf, math.inf).float().contiguous()
        lse[:, 10:] = torch.nan
        empty = torch.empty(0)
        return out, lse, empty, empty, empty

    def backward(grad, q, k, v, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, *_, **__):
        seen.append((cum_seq_q.tolist(), cum_seq_k.tolist(), max_q, max_k))
        return tuple(torch.full_like(x, torch.nan) for x in (q, k, v))

    library = torch.library.Library("aten", "IMPL")
    try:
        library.impl("_flash_attention_forward", forward, "CPU")
        library.impl("_flash_attention_backward", backward, "CPU")
        settings = of_queries, of_keys, None, None, most_q, most_k, True, 0.25, False
        out, lse = torch.ops.qwen2vl.varlen_attention(q, k, v, *settings, True, "torch")
        logs = op._natural("torch", lse, q, of_queries)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        again, _ = torch.ops.qwen2vl.varlen_attention(*leaves, *settings, False, "torch")
        dq, dk, _ = torch.autograd.grad(again.sum(), leaves)
    finally:
        library._destroy()
    want, exact = varlen_attention_ref(q, k, v, of_queries, True, 0.25, of_keys, return_lse=True)
    torch.testing.assert_close(out, want.detach(), rtol=0, atol=0)
    torch.testing.assert_close(logs, exact.float().detach(), rtol=1e-6, atol=1e-6)
    assert seen == [([0, 5, 8, 10], [0, 9, 10, 16], 5, 9)] * 3
    assert not dq[10:].any() and dq[:10].isnan().all() and not dk[16:].any() and dk[:16].isnan().all()
