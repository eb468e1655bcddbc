"""Attention in CUDA C++ for Hopper on a GPU, against the formula in float64; its launches are proven without one."""

from __future__ import annotations

import math
import random

import pytest
import torch

from qwen2vl_kernels import plan_tiles, use_backend, varlen_attention
from qwen2vl_kernels.core import attention_sm90
from qwen2vl_kernels.core.attention_sm90 import COLUMNS, Sm90Config, configs
from qwen2vl_kernels.core.backends import unavailable
from qwen2vl_kernels.ops.varlen_attention import varlen_attention_ref
from tests.conftest import assert_two_times

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device"),
    pytest.mark.skipif(unavailable("sm90", "cuda") is not None, reason=f"sm90: {unavailable('sm90', 'cuda')}"),
]

DTYPES = [torch.bfloat16, torch.float16]
LENGTHS = [[1], [1, 63, 64, 65], [0, 130, 0], [257, 16, 1], [1000], [512, 513, 95, 96, 97, 191, 192, 193]]


def _pack(lengths, keys=None, heads=4, kv_heads=2, columns=80, dtype=torch.bfloat16, tail=5):
    """Slices of packed projections that end where the allocation ends, NaN in the rows that no segment holds."""

    def projection(lengths, n):
        total = sum(lengths) + tail
        packed = torch.randn(total, n, columns, device="cuda").to(dtype)
        packed[sum(lengths) :] = torch.nan
        return packed, torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)

    packed, cu = projection(lengths, heads + 2 * kv_heads)
    q, k, v = packed.split((heads, kv_heads, kv_heads), 1)
    if keys is None:
        return q, k, v, {"cu_seqlens": cu, "max_seqlen": max(lengths, default=0)}
    packed, cu_k = projection(keys, 2 * kv_heads)
    lengths, keys = max(lengths, default=0), max(keys, default=0)
    bounds = {"cu_seqlens_q": cu, "cu_seqlens_k": cu_k, "max_seqlen_q": lengths, "max_seqlen_k": keys}
    return q, *packed.split((kv_heads, kv_heads), 1), bounds


def _sm90(q, k, v, bounds, **settings):
    return varlen_attention(q, k, v, **bounds, return_lse=True, backend="sm90", **settings)


def _check(q, k, v, bounds, causal, scale=None):
    cu, cu_k = bounds.get("cu_seqlens", bounds.get("cu_seqlens_q")), bounds.get("cu_seqlens_k")
    held, of_keys = int(cu[-1]), int((cu if cu_k is None else cu_k)[-1])
    out, lse = _sm90(q, k, v, bounds, causal=causal, softmax_scale=scale)
    inside, settings = (q[:held], k[:of_keys], v[:of_keys]), (cu, causal, scale, cu_k)
    eager = varlen_attention_ref(*inside, *settings)
    exact, logs = varlen_attention_ref(*(x.double() for x in inside), *settings, return_lse=True)
    assert_two_times(out[:held], eager, exact, 2e-6)
    torch.testing.assert_close(lse[:, :held].double(), logs, rtol=1e-4, atol=1e-4)
    assert not out[held:].any() and (lse[:, held:] == -math.inf).all()
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_ragged_packs(lengths, columns, causal, dtype):
    _check(*_pack(lengths, columns=columns, dtype=dtype), causal)


@pytest.mark.parametrize("heads", [(4, 4), (6, 1), (7, 1), (28, 4)], ids=str)
@pytest.mark.parametrize("columns", [72, 80, 128])
def test_groups(heads, columns):
    _check(*_pack([200, 3, 700], heads=heads[0], kv_heads=heads[1], columns=columns), True, 0.3)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("columns", [72, 80, 128])
def test_keys_of_their_own_number(columns, causal):
    """Rows that see no key, segments without keys, a prompt over what is cached."""
    _check(*_pack([5, 9, 3, 600, 2, 40], [520, 4, 0, 30, 6, 1300], columns=columns), causal)


@pytest.mark.parametrize("columns", COLUMNS)
def test_neighbours_do_not_count(columns):
    """NaN in the segment behind, in the heads beside and before, and where a view begins in the middle of its rows."""
    q, k, v, bounds = _pack([70, 33], columns=columns, tail=0)
    want = _sm90(q, k, v, bounds)[0]
    wide = [torch.full((103, x.shape[1] + 2, columns), torch.nan, dtype=x.dtype, device="cuda") for x in (q, k, v)]
    inside = [w[:, 1:-1].copy_(x) for w, x in zip(wide, (q, k, v), strict=True)]
    assert torch.equal(_sm90(*inside, bounds)[0], want)
    for x in inside:
        x[70:] = torch.nan
    assert torch.equal(_sm90(*inside, bounds)[0][:70], want[:70])


@pytest.mark.parametrize("layout", ["heads first", "one head of many", "off 16 bytes", "rows apart"])
def test_strides(layout):
    q, k, v, bounds = _pack([200, 57], tail=0)
    made = {
        "heads first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        "one head of many": lambda x: x[:, :1],
        "off 16 bytes": lambda x: torch.empty(257, x.shape[1], 88, dtype=x.dtype, device="cuda")[..., 1:81].copy_(x),
        "rows apart": lambda x: torch.empty(514, x.shape[1], 96, dtype=x.dtype, device="cuda")[::2, :, 8:88].copy_(x),
    }[layout]
    given = [made(x) for x in (q, k, v)]
    assert torch.equal(_sm90(*given, bounds)[0], _sm90(*(x.contiguous() for x in given), bounds)[0])


def test_scores_of_ten_thousand():
    q, k, v, bounds = _pack([300, 30], columns=64, tail=0)
    q *= 100
    k *= 100
    out = _check(q, k, v, bounds, False, 1.0)
    assert out.isfinite().all()


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_random_packs(causal):
    """200 of them, of any width, group and dtype; each twice, bit for bit."""
    draw = random.Random(22)
    for _ in range(100):
        lengths = [draw.choice((0, 1, draw.randrange(200), draw.randrange(1500))) for _ in range(draw.randint(1, 8))]
        keys = [n + draw.randrange(700) for n in lengths] if draw.random() < 0.3 else None
        group, kv_heads = draw.choice((1, 2, 6, 7)), draw.randint(1, 3)
        q, k, v, bounds = _pack(
            lengths, keys, group * kv_heads, kv_heads, draw.choice(COLUMNS), draw.choice(DTYPES), draw.randrange(9)
        )
        out = _check(q, k, v, bounds, causal)
        assert torch.equal(_sm90(q, k, v, bounds, causal=causal)[0], out)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("columns", COLUMNS)
def test_a_segment_has_the_same_bits_in_every_pack(columns, causal):
    """Alone, among others, and by a plan that the device made."""
    lengths = [513, 40, 512, 1700, 3]
    q, k, v, bounds = _pack(lengths, columns=columns, tail=0)
    together = _sm90(q, k, v, bounds, causal=causal, invariant=True)
    on_device = _sm90(q, k, v, {"cu_seqlens": bounds["cu_seqlens"].cuda(), "max_seqlen": q.shape[0]}, causal=causal)
    assert all(torch.equal(x, y) for x, y in zip(together, on_device, strict=True))
    cu = bounds["cu_seqlens"].tolist()
    for a, b in zip(cu, cu[1:], strict=False):
        one = {"cu_seqlens": torch.tensor([0, b - a], dtype=torch.int32), "max_seqlen": b - a}
        out, lse = _sm90(q[a:b], k[a:b], v[a:b], one, causal=causal)
        assert torch.equal(out, together[0][a:b]) and torch.equal(lse, together[1][:, a:b])


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("columns", COLUMNS)
def test_both_classes_compute_the_same(columns, causal, monkeypatch):
    """What is short taken as long and the other way round: the bits differ, what they stand for does not."""
    limit, short, long = configs(columns)
    for swapped in ((0, short, long), (2**31 - 1, short, long)):
        monkeypatch.setattr(attention_sm90, "configs", lambda columns, swapped=swapped: swapped)
        _check(*_pack([limit, 30, 700, 1], columns=columns), causal)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("columns", [72, 80, 128])
def test_gradients(columns, compiled):
    q, k, v, bounds = _pack([300, 16, 600], kv_heads=1, columns=columns)
    grad, held = torch.randn_like(q), 916

    def gradients(run, tensors, grad):
        leaves = [x.detach().clone().requires_grad_() for x in tensors]
        return torch.autograd.grad(run(*leaves), leaves, grad)

    run = lambda *x: varlen_attention(*x, **bounds, causal=True, backend="sm90")  # noqa: E731
    if compiled:
        torch._dynamo.reset()
        run = torch.compile(run, fullgraph=True)
    formula = lambda *x: varlen_attention_ref(*x, bounds["cu_seqlens"], True)  # noqa: E731
    got = gradients(run, (q, k, v), grad)
    inside = [x[:held] for x in (q, k, v)]
    eager = gradients(formula, inside, grad[:held])
    exact = gradients(formula, [x.double() for x in inside], grad[:held].double())
    for one, theirs, right in zip(got, eager, exact, strict=True):
        assert not one[held:].any()
        assert_two_times(one[:held], theirs, right, 2e-6)


def test_rope_by_a_pass_of_its_own():
    q, k, v, bounds = _pack([300, 57], tail=0)
    angles = torch.rand(357, 40, device="cuda") * 6
    rope = angles.cos(), angles.sin()
    got = varlen_attention(q, k, v, **bounds, rope=rope, backend="sm90")
    want = varlen_attention(q, k, v, **bounds, rope=rope, backend="triton")
    assert (got - want).abs().max() < 2e-2


def test_a_model_takes_it_by_name():
    q, k, v, bounds = _pack([300, 57], tail=0)
    with use_backend(varlen_attention="sm90"):
        got = varlen_attention(q, k, v, **bounds)
    assert torch.equal(got, _sm90(q, k, v, bounds)[0])


def test_another_device_and_stream():
    """The launch follows the tensors' device and the current stream, and leaves the current device as it was."""
    q, k, v, bounds = _pack([300, 57], tail=0)
    want = _sm90(q, k, v, bounds)[0]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)
        late = [x * 1.0 for x in (q, k, v)]
        got = _sm90(*late, bounds)[0]
    torch.cuda.current_stream().wait_stream(side)
    assert torch.equal(got, want)
    if torch.cuda.device_count() == 1:
        pytest.skip("a second GPU is not there")
    elsewhere = [x.to("cuda:1") for x in (q, k, v)]
    assert torch.equal(_sm90(*elsewhere, bounds)[0].to("cuda:0"), want) and torch.cuda.current_device() == 0


def test_what_was_not_built_is_refused(monkeypatch):
    """A configuration that no build has: an error that says so, not another one's result."""
    monkeypatch.setattr(attention_sm90, "configs", lambda columns: (512, Sm90Config(1, 16), Sm90Config(1, 16)))
    q, k, v, bounds = _pack([30])
    with pytest.raises(RuntimeError, match="attention_forward: launch failed: no such kernel is built or loaded"):
        _sm90(q, k, v, bounds)


def test_offsets_pass_two_to_the_31():
    """Results at the far end of a pack whose elements 32 bits do not count."""
    rows, heads, columns = 2**31 // (28 * 128) + 5000, 28, 128
    q, k = (torch.empty(rows, n, columns, dtype=torch.bfloat16, device="cuda").normal_() for n in (heads, 4))
    plan = plan_tiles(torch.tensor([0, *range(600, rows, 600), rows], dtype=torch.int32), rows, device="cuda")
    boundaries = plan.cu_seqlens
    out = varlen_attention(q, k, k, boundaries, 600, tiles=plan, backend="sm90")
    begin = int(boundaries[-2])
    last = torch.tensor([0, rows - begin], dtype=torch.int32)
    parts = [x[begin:] for x in (q, k, k)]
    eager = varlen_attention_ref(*parts, last)
    assert_two_times(out[begin:], eager, varlen_attention_ref(*(x.double() for x in parts), last), 2e-6)
