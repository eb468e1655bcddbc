"""The Triton attention kernels, forward and backward, against the eager formula and a dense softmax in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen2vl_kernels import plan_tiles, varlen_attention
from qwen2vl_kernels.core.backends import unavailable
from qwen2vl_kernels.core.launching import Target
from qwen2vl_kernels.core.rotation import rotate
from qwen2vl_kernels.core.tile_plan import make_tiles, plan_for
from qwen2vl_kernels.ops.varlen_attention import varlen_attention_ref
from qwen2vl_kernels.triton import attention_forward
from qwen2vl_kernels.triton.attention_backward import launch_backward
from qwen2vl_kernels.triton.attention_forward import forward_config, launch_forward
from qwen2vl_kernels.triton.attention_head import column_blocks
from tests.conftest import DEVICE, assert_two_times
from tests.kernels.poison import poisoned  # noqa: F401

if (reason := unavailable("triton", DEVICE)) is not None:
    pytest.skip(f"triton: {reason}", allow_module_level=True)
pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LENGTHS = [[1], [1, 63, 64, 65], [0, 130, 0]]
#: Beyond two of the largest tiles, which are those of 16-bit numbers: 128 rows.
LONG = [257, 16, 1]


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


@pytest.mark.parametrize(
    "dtype",
    [pytest.param(dtype, marks=[pytest.mark.long] * (dtype != torch.bfloat16)) for dtype in DTYPES],
    ids=str,
)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_segments_of_several_tiles(causal, dtype):
    _check(*_pack(LONG, dtype=dtype, tail=5), causal)


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
    made = plan_tiles(cu, sum(lengths) + tail).tiles(rows).tolist()
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
    device = torch.device("cpu")
    plan = plan_for(cu, 90, device)
    assert plan_for(cu, 90, device) is plan and plan_for(cu, 91, device) is not plan
    assert plan.tiles(32) is plan.tiles(32) and plan.tiles(16) is not plan.tiles(32)
    cu[1] = 41
    assert plan_for(cu, 90, device) is not plan
    with torch.inference_mode():
        plan_for(torch.tensor([0, 3], dtype=torch.int32), 3, device).tiles(32)


def test_a_plan_serves_every_call_and_takes_other_boundaries_in_place():
    q, k, v, cu, longest = _pack([70, 5, 20], columns=16, tail=5)
    want = varlen_attention(q, k, v, cu, longest, backend="triton")
    plan = plan_tiles(cu.clone(), 100, device=DEVICE, padded=True)
    assert torch.equal(varlen_attention(q, k, v, cu, longest, tiles=plan, backend="triton"), want)
    places = [plan.tiles(32).data_ptr(), plan.tiles(128).data_ptr()]
    other = torch.tensor([0, 10, 10, 95], dtype=torch.int32)
    assert plan.update_(other) is plan and places == [plan.tiles(32).data_ptr(), plan.tiles(128).data_ptr()]
    got = varlen_attention(q, k, v, other, 85, tiles=plan, backend="triton")
    assert torch.equal(got, varlen_attention(q, k, v, other, 85, backend="triton")) and not torch.equal(got, want)


def test_plans_refuse_what_does_not_fit():
    q, k, v, cu, longest = _pack([7, 3], columns=16)
    plan = plan_tiles(cu, 10, device=DEVICE)
    with pytest.raises(ValueError, match="the plan must be padded to take other boundaries"):
        plan.update_(cu)
    with pytest.raises(ValueError, match=r"tiles are planned for 10 rows, but q has 9"):
        varlen_attention(q[:9], k[:9], v[:9], torch.tensor([0, 7, 9]).int(), 7, tiles=plan, backend="triton")
    with pytest.raises(ValueError, match=r"tiles are planned for 2 segments, but cu_seqlens has 1"):
        varlen_attention(q, k, v, cu[::2].contiguous(), 10, tiles=plan, backend="triton")
    with pytest.raises(TypeError, match="tiles must be a TilePlan, got Tensor"):
        varlen_attention(q, k, v, cu, longest, tiles=plan.tiles(16), backend="triton")
    with pytest.raises(ValueError, match=r"cu_seqlens must rise from 0 to at most q's 9 rows, got \[0, 7, 10\]"):
        plan_tiles(cu, 9)


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


def test_a_short_segment_is_the_same_among_long_ones():
    """Where no segment is longer than half a tile, the tile is halved: the bits stay."""
    assert forward_config(torch.bfloat16, 80, 64, Target("cuda", 90)).block_m == 64
    assert forward_config(torch.bfloat16, 80, 65, Target("cuda", 90)).block_m == 128
    q, k, v, cu, longest = _pack([64, 20, 90], dtype=torch.bfloat16)
    together = varlen_attention(q, k, v, cu, longest, backend="triton")
    short = varlen_attention(q[:84], k[:84], v[:84], cu[:3].clone(), 64, backend="triton")
    assert torch.equal(short, together[:84])


@pytest.mark.parametrize(
    ("causal", "heads", "lengths"), [(False, 1, [1, 3]), (True, 2, [1, 2])], ids=["full", "causal"]
)
def test_gradcheck(causal, heads, lengths):
    q, k, v, cu, longest = _pack(lengths, heads=heads, kv_heads=1, columns=2)
    leaves = [x.double().detach().clone().requires_grad_() for x in (q, k, v)]
    run = lambda *a: varlen_attention(*a, cu, longest, causal=causal, backend="triton")  # noqa: E731
    assert torch.autograd.gradcheck(run, leaves)


def test_strided_gradients_of_the_output():
    q, k, v, cu, _ = _pack([30, 9], columns=16)
    plan = plan_tiles(cu, 39, device=DEVICE)
    out, lse = launch_forward(q, k, v, plan, 30, False, 0.25)
    grad = torch.randn(16, 2, 39, device=DEVICE).permute(2, 1, 0)
    for one, two in zip(
        launch_backward(grad, q, k, v, out, lse, plan, False, 0.25),
        launch_backward(grad.contiguous(), q, k, v, out, lse, plan, False, 0.25),
        strict=True,
    ):
        assert torch.equal(one, two)


@pytest.mark.parametrize("with_lse", [False, True])
def test_opcheck(with_lse):
    q, k, v, cu, _ = _pack([5, 3], columns=16)
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    arguments = (*leaves, cu.to(DEVICE), None, None, None, 5, 5, True, 0.25, True, with_lse, "triton")
    torch.library.opcheck(torch.ops.qwen2vl.varlen_attention.default, arguments)


def _angles(total, pairs):
    angles = torch.rand(total, pairs, device=DEVICE) * 6
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("columns", "causal"), [(16, True), (64, False), (72, True), (80, False), (80, True)])
def test_rotary_tables_fused_and_in_a_pass_of_their_own(columns, causal, dtype, monkeypatch):
    """Both ways give the same bits, and the two-times rule holds against the formula on rotated rows."""
    q, k, v, cu, longest = _pack([33, 70, 5], 2, 1, columns, dtype=dtype, tail=3)
    cos, sin = _angles(q.shape[0], columns // 2)
    grad, held = torch.randn_like(q), slice(0, 108)
    inside = [x[held] for x in (q, k, v)]
    kept = [x.clone() for x in inside]

    def run(q, k, v):
        return varlen_attention(q, k, v, cu, longest, causal=causal, rope=(cos, sin), backend="triton")

    def formula(q, k, v):
        tables = [x[held].to(torch.promote_types(q.dtype, torch.float32)) for x in (cos, sin)]
        return varlen_attention_ref(rotate(q, *tables), rotate(k, *tables), v, cu, causal)

    fused = _results(run, q, k, v, grad)
    with torch.no_grad():
        assert torch.equal(run(q, k, v), fused[0])
    monkeypatch.setattr(attention_forward, "FUSED_ROPE_MAX_SEQLEN", 0)
    apart = _results(run, q, k, v, grad)
    assert all(torch.equal(one, two) for one, two in zip(inside, kept, strict=True))  # what was given is as it was
    assert all(torch.equal(one, two) for one, two in zip(fused, apart, strict=True))
    eager = _results(formula, *inside, grad[held])
    exact = _results(formula, *(x.double() for x in inside), grad[held].double())
    for results in (fused, apart):
        for got, theirs, right in zip(results, eager, exact, strict=True):
            assert torch.count_nonzero(got[108:]) == 0
            assert_two_times(got[held], theirs, right, 2e-6)


def test_rope_by_every_backend_is_the_same_turn():
    q, k, v, cu, longest = _pack([300, 9], columns=80)
    tables = _angles(309, 40)
    want = varlen_attention(rotate(q, *tables), rotate(k, *tables), v, cu, longest, backend="eager")
    for backend in ("eager", "sdpa", "triton", None):
        with torch.no_grad():
            got = varlen_attention(q, k, v, cu, longest, rope=tables, backend=backend)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    for rope, message in (
        (tables[0], r"rope must be a pair of tensors \(cos, sin\), got Tensor"),
        ((tables[0][:, :20], tables[1]), r"rope's cos must have shape \(T, 40\) with T=309, got \(309, 20\)"),
        ((tables[0], tables[1].clone().requires_grad_()), "rope's sin must not require grad"),
    ):
        with pytest.raises(ValueError, match=message):
            varlen_attention(q, k, v, cu, longest, rope=rope)


def test_gradcheck_of_the_turned_form():
    q, k, v, cu, longest = _pack([1, 2], heads=1, kv_heads=1, columns=4)
    leaves = [x.double().detach().clone().requires_grad_() for x in (q, k, v)]
    tables = tuple(x.double() for x in _angles(3, 2))
    run = lambda *a: varlen_attention(*a, cu, longest, causal=True, rope=tables, backend="triton")  # noqa: E731
    assert torch.autograd.gradcheck(run, leaves)


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


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="PyTorch sees no CUDA device: 200 packs are for compiled kernels")
@pytest.mark.parametrize("seed", range(200))
def test_random_packs(seed):
    generator = torch.Generator().manual_seed(seed)
    pick = lambda *choices: choices[int(torch.randint(len(choices), (), generator=generator))]  # noqa: E731
    lengths = [pick(0, 1, 63, 64, 65, 127, 130, 256, 257, 700) for _ in range(pick(1, 2, 5, 9))]
    heads, kv_heads = pick((2, 2), (4, 1), (7, 1), (6, 2))
    pack = _pack(
        lengths, heads, kv_heads, pick(64, 72, 80, 96, 128), dtype=pick(torch.bfloat16, torch.float16), tail=pick(0, 5)
    )
    _check(*pack, causal=pick(False, True))


@pytest.mark.parametrize("write", ["numpy", "data", "in place"])
def test_boundaries_that_were_rewritten_are_planned_again(write):
    q, k, v, cu, _ = _pack([9, 4, 3], columns=16)
    cu = cu.cpu().clone()
    run = lambda bounds: varlen_attention(q, k, v, bounds, 16, backend="triton")  # noqa: E731
    before, other = run(cu), torch.tensor([0, 2, 11, 16], dtype=torch.int32)
    if write == "numpy":
        cu.numpy()[:] = other.numpy()
    elif write == "data":
        cu.data[:] = other
    else:
        cu.copy_(other)
    after = run(cu)
    assert torch.equal(after, run(other)) and not torch.equal(after, before)
