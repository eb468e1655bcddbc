"""kvcache_attention, every backend, against varlen attention over the whole sequences in float64."""

import pytest
import torch

from qwen2vl_kernels import append_kv, kvcache_attention, use_backend
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


def _paged(k, v, total, page_size):
    """The same rows in pages of one pool, in any order, the rest of it NaN; what the table holds behind a row means
    nothing."""
    rows, capacity = k.shape[:2]
    blocks = -(-capacity // page_size)
    order = torch.randperm(rows * blocks + 5)[: rows * blocks].view(rows, blocks)
    pools = []
    for cache in (k, v):
        # Heads before slots, and a page more between any two.
        pool = torch.full((rows * blocks + 5, 2, cache.shape[2], page_size, cache.shape[3]), float("nan"))
        pool = pool.to(cache.dtype)[:, 1].transpose(1, 2)
        for row, seen in enumerate(total):
            for at in range(seen):
                pool[order[row, at // page_size], at % page_size] = cache[row, at]
        pools.append(pool.to(DEVICE))
    table = torch.full((rows, blocks + 1), -(2**31), dtype=torch.int32)[:, 1:]
    for row, seen in enumerate(total):
        used = -(-seen // page_size)
        table[row, :used] = order[row, :used]
    return *pools, table.to(DEVICE)


@pytest.mark.parametrize("page_size", [16, 64, 48, 7])
@pytest.mark.parametrize("backend", ON_DEVICE)
def test_a_paged_cache_against_float64(page_size, backend):
    _serves(backend)
    total = [1, 70, 0, 64, 200, 65]
    q, k, v = _inputs([1] * len(total), total, torch.bfloat16, capacity=200)
    kept = [row for row, seen in enumerate(total) if seen]
    exact = torch.zeros(q.shape, dtype=torch.float64)
    exact[kept] = _exact(q[kept], k[kept], v[kept], [1] * len(kept), [total[row] for row in kept])
    pages, values, table = _paged(k, v, total, page_size)
    got = kvcache_attention(q.to(DEVICE), pages, values, None, _lengths(*total), block_table=table, backend=backend)
    whole = [x.to(DEVICE) for x in (q, k, v)]
    eager = kvcache_attention(*whole, None, _lengths(*total), backend="eager")
    assert got[2].count_nonzero() == 0
    assert_two_times(got.cpu(), eager.cpu(), exact, torch.finfo(torch.bfloat16).eps)
    if backend == "triton" and 200 % page_size == 0:
        assert torch.equal(got, kvcache_attention(*whole, None, _lengths(*total), backend=backend)), "the same splits"


@pytest.mark.parametrize("backend", ON_DEVICE)
def test_what_append_kv_stores_in_pages_is_found_there(backend):
    """By rows that share their first page, whose ends lie in it, at its end and behind it."""
    _serves(backend)
    table = torch.tensor([[3, 0], [3, 4], [3, 1]], dtype=torch.int32, device=DEVICE)
    k_cache, v_cache = torch.full((2, 5, 8, 2, 16), float("nan"), device=DEVICE)
    lengths = _lengths(5, 8, 13)
    k, v = torch.randn(2, 13, 2, 16, device=DEVICE)
    places = [(0, at) for at in range(8)] + [(2, at) for at in range(8, 13)]
    slots = torch.stack([table[row, at // 8] * 8 + at % 8 for row, at in places])
    append_kv(k, v, k_cache, v_cache, slots, backend=backend)
    q = torch.randn(3, 4, 16, device=DEVICE)
    got = kvcache_attention(q, k_cache, v_cache, None, lengths, block_table=table, backend=backend)
    contiguous = (x[None].expand(3, -1, -1, -1) for x in (k, v))
    want = kvcache_attention(q, *contiguous, None, lengths, backend="eager")
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_a_paged_cache_passes_opcheck():
    q, k, v = _inputs([1, 1], [3, 20], torch.float32, capacity=20)
    pages, values, table = (x.cpu() for x in _paged(k, v, [3, 20], 8))
    arguments = q, pages.nan_to_num(), values.nan_to_num(), _lengths(3, 20).cpu(), 0.3, "eager", table
    torch.library.opcheck(torch.ops.qwen2vl.kvcache_attention_decode.default, arguments)


def test_the_host_reads_no_length():
    """On tensors without memory there is nothing that could be read."""
    q, k, v = (x.to("meta") for x in _inputs([1, 1], [3, 9], torch.bfloat16, capacity=20))
    lengths, table = (torch.empty(s, dtype=torch.int32, device="meta") for s in ((2,), (2, 4)))
    got = kvcache_attention(q, k, v, None, lengths, backend="eager")
    assert kvcache_attention(q, k, v, None, lengths, block_table=table, backend="eager").is_meta
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
