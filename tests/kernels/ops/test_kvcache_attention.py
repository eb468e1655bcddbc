"""kvcache_attention, every backend, against varlen attention over the whole sequences in float64."""

import pytest
import torch

from qwen2vl_kernels import kvcache_attention
from qwen2vl_kernels.ops.kvcache_attention import kvcache_attention_ref
from tests.conftest import assert_two_times

BACKENDS = ["eager", "sdpa", "varlen"]


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
