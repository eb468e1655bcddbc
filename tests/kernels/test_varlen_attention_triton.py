"""The Triton attention kernels, forward and backward, against the eager formula and a dense softmax in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen2vl_kernels import varlen_attention
from qwen2vl_kernels._attention import column_blocks, launch_backward, launch_forward
from qwen2vl_kernels._backend import unavailable
from qwen2vl_kernels._tiles import make_tiles, tiles
from qwen2vl_kernels.ops.varlen_attention import varlen_attention_ref
from tests.conftest import DEVICE, assert_two_times

from .poison import poisoned  # noqa: F401

if (reason := unavailable("triton", DEVICE)) is not None:
    pytest.skip(f"triton: {reason}", allow_module_level=True)
pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LENGTHS = [[1], [1, 63, 64, 65], [0, 130, 0], [257, 16, 1]]


def _pack(lengths, heads=2, kv_heads=1, columns=80, v_columns=None, dtype=torch.float32, tail=0):
    """q, k and v as slices of one packed projection; rows that no segment holds are NaN."""
    total = sum(lengths) + tail
    v_columns = v_columns or columns
    packed = torch.randn(total, heads + 2 * kv_heads, max(columns, v_columns), device=DEVICE).to(dtype)
    packed[sum(lengths) :] = torch.nan
    q, k, v = packed.split((heads, kv_heads, kv_heads), 1)
    cu = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    return q[..., :columns], k[..., :columns], v[..., :v_columns], cu, max(lengths, default=0)


def _results(run, q, k, v, grad):
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out = run(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def _check(q, k, v, cu, longest, causal, scale=None, floor=2e-6):
    held = int(cu[-1])
    grad = torch.randn(q.shape[0], q.shape[1], v.shape[2], device=DEVICE).to(q.dtype)
    run = lambda q, k, v: varlen_attention(  # noqa: E731
        q, k, v, cu, longest, causal=causal, softmax_scale=scale, backend="triton"
    )
    ref = lambda q, k, v: varlen_attention_ref(q, k, v, cu, causal, scale)  # noqa: E731
    got = _results(run, q, k, v, grad)
    inside = [x[:held] for x in (q, k, v)]
    eager = _results(ref, *inside, grad[:held])
    exact = _results(ref, *(x.double() for x in inside), grad[:held].double())
    for one, theirs, right in zip(got, eager, exact, strict=True):
        assert one.dtype == theirs.dtype and torch.count_nonzero(one[held:]) == 0
        if right.any():
            assert_two_times(one[:held], theirs, right, floor)
        else:  # of one key: the probability is 1 whatever the score, and its gradient what rounding leaves
            assert one[:held].abs().max() <= 8 * torch.finfo(q.dtype).eps
    with torch.no_grad():
        assert torch.equal(run(q, k, v), got[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_ragged_packs(lengths, causal, dtype):
    _check(*_pack(lengths, dtype=dtype, tail=5), causal)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("columns", [8, 16, 24, 64, 72, 80, 96, 128])
def test_head_dims(columns, causal):
    _check(*_pack([33, 7, 40], columns=columns, dtype=torch.bfloat16), causal)


@pytest.mark.parametrize("shape", [(4, 4, 16, 16), (6, 2, 16, 40), (5, 1, 40, 16)], ids=str)
def test_heads_and_widths(shape):
    heads, kv_heads, columns, v_columns = shape
    _check(*_pack([20, 45], heads, kv_heads, columns, v_columns), True, scale=0.3)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]], ids=str)
@pytest.mark.parametrize("tail", [0, 3])
def test_no_segments(lengths, tail):
    q, k, v, cu, longest = _pack(lengths, tail=tail)
    run = lambda q, k, v: varlen_attention(q, k, v, cu, longest, backend="triton")  # noqa: E731
    results = _results(run, q, k, v, torch.ones(tail, 2, 80, device=DEVICE))
    assert [len(r) for r in results] == [tail] * 4 and not any(r.any() for r in results)


def test_scores_of_ten_thousand():
    q, k, v, cu, longest = _pack([70, 30], columns=16, dtype=torch.bfloat16)
    q *= 100
    k *= 100
    out = varlen_attention(q, k, v, cu, longest, softmax_scale=1.0, backend="triton")
    exact = varlen_attention_ref(q.double(), k.double(), v.double(), cu, False, 1.0)
    assert out.isfinite().all()
    assert_two_times(out, varlen_attention_ref(q, k, v, cu, False, 1.0), exact, 1e-6)


def test_boundaries_on_the_device_and_segments_in_any_number():
    q, k, v, cu, longest = _pack([5, 0, 0, 17, 3], columns=16, tail=2)
    want = varlen_attention(q, k, v, cu, longest, backend="triton")
    assert torch.equal(varlen_attention(q, k, v, cu.to(DEVICE), longest, backend="triton"), want)
    padded = torch.cat((cu, cu[-1:].expand(6)))  # as for a CUDA graph
    assert torch.equal(varlen_attention(q, k, v, padded, longest, backend="triton"), want)
    cu[1:4] = 9  # written to: the tiles are made again
    again = varlen_attention(q, k, v, cu, 17, backend="triton")
    torch.testing.assert_close(again[:25], varlen_attention_ref(q, k, v, cu)[:25], rtol=0, atol=1e-5)


@given(lengths=st.lists(st.integers(0, 200), max_size=12), tail=st.integers(0, 40), rows=st.sampled_from([1, 32, 128]))
def test_tiles_cover_every_row_once(lengths, tail, rows):
    cu = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    made = tiles(cu, rows, sum(lengths) + tail, torch.device("cpu")).tolist()
    bounds = cu.tolist()
    segments = {(a, b) for a, b in zip(bounds, bounds[1:], strict=False) if b > a}
    seen, sizes = [], []
    for first, begin, end in made:
        if end > begin:
            assert (begin, end) in segments and (first - begin) % rows == 0
            seen += range(first, min(first + rows, end))
            sizes.append(end - begin)
    assert sorted(seen) == list(range(sum(lengths))) and sizes == sorted(sizes, reverse=True)
    assert len(made) == len(sizes) == sum(-(-n // rows) for n in lengths)
    on_device = make_tiles(cu, rows, sum(lengths) + tail, exact=False).tolist()
    assert on_device[: len(made)] == made and all(tile == [0, 0, 0] for tile in on_device[len(made) :])
    assert len(on_device) <= (sum(lengths) + tail) // rows + len(lengths)


def test_tiles_are_made_once_for_all_layers():
    cu = torch.tensor([0, 40, 90], dtype=torch.int32)
    first = tiles(cu, 32, 90, torch.device("cpu"))
    assert tiles(cu, 32, 90, torch.device("cpu")) is first
    assert tiles(cu, 16, 90, torch.device("cpu")) is not first
    with torch.inference_mode():
        tiles(torch.tensor([0, 3], dtype=torch.int32), 32, 3, torch.device("cpu"))


def test_column_blocks():
    blocks = {d: column_blocks(d) for d in (8, 16, 64, 72, 80, 96, 112, 128, 256)}
    assert blocks == {
        8: (16, 0), 16: (16, 0), 64: (64, 0), 72: (64, 16), 80: (64, 16), 96: (64, 32), 112: (64, 64), 128: (128, 0),
        256: (256, 0),
    }  # fmt: skip


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_deterministic_and_the_same_in_every_pack(causal):
    q, k, v, cu, longest = _pack([70, 133, 12], columns=80, dtype=torch.bfloat16)
    grad = torch.randn_like(q)
    run = lambda q, k, v, cu: varlen_attention(q, k, v, cu, longest, causal=causal, backend="triton")  # noqa: E731
    first, second = (_results(lambda *a: run(*a, cu), q, k, v, grad) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    rows = slice(70, 203)
    alone = torch.tensor([0, 133], dtype=torch.int32)
    part = _results(lambda *a: run(*a, alone), q[rows], k[rows], v[rows], grad[rows])
    for one, two in zip(part, first, strict=True):
        assert torch.equal(one, two[rows])


def test_gradcheck():
    q, k, v, cu, longest = _pack([1, 3], heads=2, kv_heads=1, columns=2)
    leaves = [x.double().detach().clone().requires_grad_() for x in (q, k, v)]
    for causal in (False, True):
        run = lambda *a, c=causal: varlen_attention(*a, cu, longest, causal=c, backend="triton")  # noqa: E731
        assert torch.autograd.gradcheck(run, leaves)


def test_strided_gradients_of_the_output():
    q, k, v, cu, _ = _pack([30, 9], columns=16)
    out, lse = launch_forward(q, k, v, cu, False, 0.25)
    grad = torch.randn(16, 2, 39, device=DEVICE).permute(2, 1, 0)
    for one, two in zip(
        launch_backward(grad, q, k, v, out, lse, cu, False, 0.25),
        launch_backward(grad.contiguous(), q, k, v, out, lse, cu, False, 0.25),
        strict=True,
    ):
        assert torch.equal(one, two)


def test_opcheck():
    q, k, v, cu, _ = _pack([5, 3], columns=16)
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(torch.ops.qwen2vl.attention_forward.default, (*leaves, cu.to(DEVICE), True, 0.25))


def test_windows_are_another_cu_seqlens():
    """Qwen2.5-VL's tower attends inside windows: the same call with their bounds, here against a dense mask."""
    q, k, v, _, _ = _pack([48], columns=32)
    windows = torch.tensor([0, 16, 32, 40, 48], dtype=torch.int32)
    got = varlen_attention(q, k, v, windows, 16, backend="triton")
    rows = torch.arange(48, device=DEVICE)
    window = torch.bucketize(rows, windows[1:].to(DEVICE), right=True)
    mask = window[:, None] == window[None]
    heads_first = [x.transpose(0, 1).expand(2, -1, -1) for x in (q, k, v)]
    want = torch.nn.functional.scaled_dot_product_attention(*heads_first, attn_mask=mask)
    torch.testing.assert_close(got, want.transpose(0, 1), rtol=1e-5, atol=1e-5)
