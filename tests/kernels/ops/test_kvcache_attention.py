"""kvcache_attention, every backend, against varlen attention over the whole sequences in float64."""

import pytest
import torch

from qwen2vl_kernels import kvcache_attention, use_backend
from qwen2vl_kernels.core import tile_plan
from qwen2vl_kernels.core.backends import unavailable
from qwen2vl_kernels.ops.kvcache_attention import kvcache_attention_ref
from tests.conftest import DEVICE, assert_two_times

BACKENDS = ["eager", "sdpa", "varlen"]
ON_DEVICE = ["eager", "triton"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _exact(q, k_cache, v_cache, new, total):
    """Row by row, query by query: a softmax over the keys that query may see."""
    group, out, at = q.shape[1] // k_cache.shape[2], [], 0
    for row, (n, seen) in enumerate(zip(new, total, strict=True)):
        for i in range(n):
            keys = k_cache[row, : seen - n + i + 1].double().repeat_interleave(group, 1)  # (s, Hq, D)
            values = v_cache[row, : seen - n + i + 1].double().repeat_interleave(group, 1)
            weights = (torch.einsum("hd,shd->hs", q[at].double(), keys) * q.shape[-1] ** -0.5).softmax(-1)
            out.append(torch.einsum("hs,shd->hd", weights, values))
            at += 1
    return torch.stack(out)


def _inputs(new, total, dtype, heads=6, kv_heads=2, dim=32, capacity=700):
    q = torch.randn(sum(new), heads, dim).to(dtype)
    k, v = torch.randn(2, len(new), capacity, kv_heads, dim).to(dtype)
    for row, seen in enumerate(total):  # what lies behind a row's end must not matter
        k[row, seen:], v[row, seen:] = float("nan"), float("nan")
    return q, k, v


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("new", "total"),
    [([1], [1]), ([1, 1, 1], [3, 70, 9]), ([5, 2], [5, 40]), ([0, 3], [7, 3]), ([600], [650]), ([257, 1], [257, 2])],
    ids=str,
)
def test_against_float64(new, total, dtype, backend):
    q, k, v = _inputs(new, total, dtype)
    exact = _exact(q, k, v, new, total)
    got = kvcache_attention(q, k, v, new, total, backend=backend)
    assert got.dtype == dtype
    # The result's own rounding, doubled, plus: an ulp for the rounded scores and weights of 16-bit dtypes, and the
    # float32 sums over up to 650 keys (2.9e-7 measured).
    floor = max(torch.finfo(dtype).eps, 4 * torch.finfo(torch.float32).eps)
    eager = kvcache_attention_ref(q, k, v, new, total, q.shape[-1] ** -0.5)
    assert_two_times(eager, exact.to(dtype), exact, floor)
    assert_two_times(got, eager, exact, torch.finfo(dtype).eps)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_is_bitwise_the_same_in_any_batch(dtype, backend):
    new, total = [1, 4, 1], [30, 300, 7]
    q, k, v = _inputs(new, total, dtype)
    together = kvcache_attention(q, k, v, new, total, backend=backend)
    for row, part in enumerate(together.split(new)):
        alone = kvcache_attention(
            q.split(new)[row], k[row : row + 1], v[row : row + 1], [new[row]], [total[row]], backend=backend
        )
        assert torch.equal(alone, part)


# --------------------------------------------------------------------------------- one new token, lengths on the device


def _lengths(*values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def _serves(backend):
    if (reason := unavailable(backend, DEVICE)) is not None:
        pytest.skip(f"{backend}: {reason}")


@pytest.mark.parametrize("backend", ON_DEVICE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lengths_on_the_device_against_float64(dtype, backend):
    """Of all sizes, behind which nothing is a number; a row without tokens is zero, and no row sees another's."""
    _serves(backend)
    total = [1, 70, 0, 64, 700, 65, 333]
    q, k, v = _inputs([1] * len(total), total, dtype)
    kept = [row for row, seen in enumerate(total) if seen]
    exact = torch.zeros(q.shape, dtype=torch.float64)
    exact[kept] = _exact(q[kept], k[kept], v[kept], [1] * len(kept), [total[row] for row in kept])
    q, k, v = q.to(DEVICE), k.to(DEVICE), v.to(DEVICE)
    got = kvcache_attention(q, k, v, None, _lengths(*total), backend=backend)
    assert got.dtype == dtype and got[2].count_nonzero() == 0
    eager = kvcache_attention(q, k, v, None, _lengths(*total), backend="eager")
    floor = max(torch.finfo(dtype).eps, 4 * torch.finfo(torch.float32).eps)
    assert_two_times(eager.cpu(), exact.to(dtype), exact, floor)
    assert_two_times(got.cpu(), eager.cpu(), exact, torch.finfo(dtype).eps)


@pytest.mark.parametrize("backend", ON_DEVICE)
def test_lengths_outside_of_the_cache_count_as_its_ends(backend):
    _serves(backend)
    q, k, v = (x.to(DEVICE) for x in _inputs([1, 1], [100, 100], torch.float32, capacity=100))
    got = kvcache_attention(q, k, v, None, _lengths(-3, 2**31 - 1), backend=backend)
    want = kvcache_attention(q, k, v, None, _lengths(0, 100), backend=backend)
    assert torch.equal(got, want) and want[0].count_nonzero() == 0


def test_the_host_reads_no_length():
    """On tensors without memory there is nothing that could be read."""
    q, k, v = (x.to("meta") for x in _inputs([1, 1], [3, 9], torch.bfloat16, capacity=20))
    got = kvcache_attention(q, k, v, None, torch.empty(2, dtype=torch.int32, device="meta"), backend="eager")
    assert got.is_meta and got.shape == q.shape and got.dtype == torch.bfloat16


@pytest.mark.skipif(unavailable("triton", DEVICE) is not None, reason=f"triton: {unavailable('triton', DEVICE)}")
def test_layers_share_the_plan_of_a_prompt(monkeypatch):
    """By our kernels, which work through a plan: it is made once, for boundaries of queries and of keys."""
    made, make = [], tile_plan.make_tiles
    monkeypatch.setattr(tile_plan, "make_tiles", lambda *a: made.append(a[0].tolist()) or make(*a))
    q, k, v = (x.to(DEVICE) for x in _inputs([7], [20], torch.float32))
    with use_backend(varlen_attention="triton"):
        first, second = (kvcache_attention(q, k, v, [7], [20]) for _ in range(2))
    assert torch.equal(first, second) and made == [[0, 7]]
    exact = _exact(q, k, v, [7], [20])
    assert_two_times(first, kvcache_attention(q, k, v, [7], [20], backend="eager"), exact, 4e-7)
