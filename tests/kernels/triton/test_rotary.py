"""The Triton rotary kernels against the eager formulas: layouts, dtypes, forms and sources of angles."""

from __future__ import annotations

import pytest
import torch

from qwen2vl_kernels import mrope, mrope_, vision_rope, vision_rope_, vision_rope_qkv_, vision_rope_tables
from qwen2vl_kernels.core.backends import unavailable
from qwen2vl_kernels.ops.mrope import mrope_ref
from qwen2vl_kernels.ops.vision_rope import vision_rope_ref, vision_rope_tables_ref
from qwen2vl_kernels.triton.rotary import launch_rotation
from tests.conftest import DEVICE, assert_two_times

if (reason := unavailable("triton", DEVICE)) is not None:
    pytest.skip(f"triton: {reason}", allow_module_level=True)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _close(got, eager, exact):
    """Twice the eager formula's own error, and an ulp or two of float32 for the order of its operations."""
    assert got.dtype == eager.dtype
    assert_two_times(got, eager, exact, 3e-7)


def _qk(tokens, heads, kv_heads, columns, dtype):
    """Two slices of one wide projection: strided tokens."""
    packed = torch.randn(tokens, heads + 2 * kv_heads, columns, device=DEVICE).to(dtype)
    return packed[:, :heads], packed[:, heads : heads + kv_heads]


def _inv_freq(pairs):
    return 1e6 ** -(torch.arange(pairs, device=DEVICE) / pairs)


MROPE = [
    (37, 6, 2, 128, (16, 24, 24), False),
    (1, 12, 2, 128, (16, 24, 24), False),
    (19, 3, 3, 128, (24, 20, 20), True),
    (9, 2, 1, 80, (8, 12, 12), False),  # 64 of 80 columns
    (5, 1, 1, 16, (0, 5, 3), False),
    (7, 9, 1, 24, (4, 0, 0), False),  # one axis, 8 of 24 columns
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", MROPE, ids=str)
def test_mrope(shape, dtype):
    tokens, heads, kv_heads, columns, section, interleaved = shape
    q, k = _qk(tokens, heads, kv_heads, columns, dtype)
    positions = torch.randint(0, 130_000, (tokens, 3), device=DEVICE).T  # strided the other way
    inv_freq = _inv_freq(sum(section))
    settings = {"section": section, "interleaved": interleaved}
    eager = mrope_ref(q, k, positions, inv_freq, **settings)
    # From float32's angles: what their own rounding costs is the formula's, not the kernel's.
    table = (torch.arange(130_000, device=DEVICE)[:, None] * inv_freq).double()
    exact = mrope_ref(
        q.double(), k.double(), positions, None, **settings, cos_sin_cache=torch.cat((table.cos(), table.sin()), 1)
    )
    got = mrope(q, k, positions.int(), inv_freq, **settings, backend="triton")
    for one in zip(got, eager, exact, strict=True):
        _close(*one)
    before = q._base.clone()
    q_in, _ = mrope_(q, k, positions, inv_freq, **settings, backend="triton")
    assert q_in is q and torch.equal(q, got[0]) and torch.equal(k, got[1])
    assert torch.equal(q._base[:, heads + kv_heads :], before[:, heads + kv_heads :])  # v beside them is untouched


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
def test_mrope_from_a_cache(dtype, interleaved):
    q, k = _qk(21, 4, 2, 32, torch.bfloat16)
    inv_freq = _inv_freq(12)
    table = torch.arange(50, device=DEVICE)[:, None] * inv_freq
    cos_sin_cache = torch.cat((table.cos(), table.sin()), 1).to(dtype)
    positions, section = torch.randint(0, 50, (3, 21), device=DEVICE), (4, 4, 4)
    settings = {"interleaved": interleaved, "cos_sin_cache": cos_sin_cache}
    eager = mrope_ref(q, k, positions, None, section, **settings)
    exact = mrope_ref(q.double(), k.double(), positions, None, section, interleaved, cos_sin_cache.double())
    for one in zip(mrope(q, k, positions, None, section, **settings, backend="triton"), eager, exact, strict=True):
        _close(*one)
    # Beyond either end the nearest row is read: nothing outside of the table is.
    ends = mrope(q, k, positions.clamp(0, 0) - 3, None, section, **settings, backend="triton")
    far = mrope(q, k, positions.clamp(50, 50) + 10**6, None, section, **settings, backend="triton")
    for got, row in ((ends, 0), (far, 49)):
        at = torch.full_like(positions, row)
        want = mrope(q, k, at, None, section, **settings, backend="triton")
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [64, 72, 80, 96, 128])
def test_vision_rope(columns, dtype):
    qkv = torch.randn(23, 3, 2, columns, device=DEVICE).to(dtype)
    angles = torch.rand(23, columns // 2, device=DEVICE) * 6
    q, k, v = (part.clone() for part in qkv.unbind(1))
    for tables in ((angles.cos(), angles.sin()), (angles.cos().half(), angles.sin().half())):
        eager = vision_rope_ref(q, k, *tables)
        exact = vision_rope_ref(q.double(), k.double(), *(table.double() for table in tables))
        got = vision_rope(q, k, *tables, backend="triton")
        for one in zip(got, eager, exact, strict=True):
            _close(*one)
    assert vision_rope_qkv_(qkv, *tables, backend="triton") is qkv
    vision_rope_(q, k, *tables, backend="triton")
    assert torch.equal(qkv, torch.stack((*got, v), 1)) and torch.equal(torch.stack((q, k)), torch.stack(got))


def test_vision_rope_reads_strided_tables_and_partial_heads():
    q, k = _qk(11, 3, 3, 48, torch.float32)
    wide = torch.rand(11, 64, device=DEVICE)
    for cos, sin in (
        (wide[:, :16], wide[:, 16:32]),
        (wide[:, ::4], wide[:, 1::4]),
        (wide.T[:11, :16].T[:11], wide[:, :11]),
    ):
        eager = vision_rope_ref(q, k, cos, sin)
        exact = vision_rope_ref(q.double(), k.double(), cos.double(), sin.double())
        for one in zip(vision_rope(q, k, cos, sin, backend="triton"), eager, exact, strict=True):
            _close(*one)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_tables(dtype):
    positions = torch.randint(0, 1000, (2, 45), device=DEVICE).to(dtype).T
    inv_freq = _inv_freq(20)
    exact = [t.double() for t in vision_rope_tables_ref(positions, inv_freq)]
    for got, want in zip(vision_rope_tables(positions, inv_freq, backend="triton"), exact, strict=True):
        assert got.shape == (45, 40) and got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-7)


def test_angles_of_every_size():
    """As near to float64's cosine as float32's own, up to the longest contexts."""
    tokens = 4096
    positions = torch.cat((torch.arange(2048), torch.randint(2048, 131_072, (2048,)))).to(DEVICE).expand(3, tokens)
    q = torch.zeros(tokens, 1, 128, device=DEVICE)
    q[..., :64] = 1
    inv_freq = _inv_freq(64)
    turned, _ = mrope(q, q, positions, inv_freq, (64, 0, 0), backend="triton")
    angle = (positions[0][:, None] * inv_freq).double()
    assert (turned[:, 0].double() - torch.cat((angle.cos(), angle.sin()), 1)).abs().max() < 1.5e-7


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradients(interleaved):
    q = torch.randn(2, 2, 18, dtype=torch.float64, device=DEVICE, requires_grad=True)
    k = torch.randn(2, 1, 18, dtype=torch.float64, device=DEVICE, requires_grad=True)
    positions, inv_freq = torch.randint(0, 9, (3, 2), device=DEVICE), _inv_freq(8).double()
    run = lambda q, k: mrope(q, k, positions, inv_freq, (4, 2, 2), interleaved=interleaved, backend="triton")  # noqa: E731
    assert torch.autograd.gradcheck(run, (q, k))


def test_gradients_of_tables():
    q = torch.randn(2, 2, 18, dtype=torch.float64, device=DEVICE, requires_grad=True)
    k = torch.randn(2, 1, 18, dtype=torch.float64, device=DEVICE, requires_grad=True)
    cos, sin = torch.randn(2, 2, 8, dtype=torch.float64, device=DEVICE)
    assert torch.autograd.gradcheck(lambda q, k: vision_rope(q, k, cos, sin, backend="triton"), (q, k))


def test_gradients_of_one_output_and_of_strided_grads():
    q, k = (x.detach().requires_grad_() for x in _qk(6, 3, 2, 16, torch.bfloat16))
    positions, inv_freq, weight = (
        torch.randint(0, 99, (3, 6), device=DEVICE),
        _inv_freq(8),
        torch.randn(16, 3, 6, device=DEVICE),
    )
    grads = []
    for backend in ("triton", "eager"):
        q_out, _ = mrope(q, k, positions, inv_freq, (2, 3, 3), backend=backend)
        grads.append(torch.autograd.grad((q_out * weight.permute(2, 1, 0)).sum(), (q, k), allow_unused=True))
    torch.testing.assert_close(grads[0][0], grads[1][0])
    assert grads[0][1] is None or not grads[0][1].any()


def test_tables_that_require_grad_go_to_the_formula():
    q, k = _qk(3, 2, 2, 8, torch.float32)
    cos, sin = torch.rand(2, 3, 4, device=DEVICE)
    cos.requires_grad_()
    with pytest.raises(ValueError, match="cos and sin must not require grad with backend 'triton'"):
        vision_rope(q, k, cos, sin, backend="triton")
    vision_rope(q, k, cos, sin)[0].sum().backward()
    assert cos.grad is not None


@pytest.mark.parametrize("shape", [(0, 2, 1), (3, 0, 2), (3, 2, 0)])
def test_nothing_to_turn(shape):
    tokens, heads, kv_heads = shape
    q, k = _qk(tokens, heads, kv_heads, 16, torch.float32)
    positions = torch.randint(0, 9, (3, tokens), device=DEVICE)
    got = mrope(q, k, positions, _inv_freq(8), (2, 3, 3), backend="triton")
    for one, want in zip(got, mrope_ref(q, k, positions, _inv_freq(8), (2, 3, 3)), strict=True):
        torch.testing.assert_close(one, want, rtol=0, atol=1e-6)


def test_every_output_is_written_and_nothing_beside_it():
    q, k = _qk(13, 3, 2, 24, torch.float32)
    outputs = [torch.full((15, heads + 2, 40), torch.nan, device=DEVICE) for heads in (3, 2)]
    views = [outputs[n][1:14, 1 : 1 + heads, 8:32] for n, heads in enumerate((3, 2))]
    positions = torch.randint(0, 99, (3, 13), device=DEVICE)
    launch_rotation(q, k, views[0], views[1], positions, _inv_freq(8), section=(2, 3, 3))
    for view, whole, x in zip(views, outputs, (q, k), strict=True):
        assert view.isfinite().all() and whole.isfinite().sum() == x.numel()


def test_a_token_is_the_same_in_every_pack():
    q, k = _qk(40, 3, 2, 128, torch.bfloat16)
    positions, inv_freq = torch.randint(0, 5000, (3, 40), device=DEVICE), _inv_freq(64)
    whole = mrope(q, k, positions, inv_freq, (16, 24, 24), backend="triton")
    part = mrope(q[7:8], k[7:8], positions[:, 7:8], inv_freq, (16, 24, 24), backend="triton")
    assert torch.equal(whole[0][7:8], part[0]) and torch.equal(whole[1][7:8], part[1])


def test_opcheck():
    q, k = (x.contiguous().requires_grad_() for x in _qk(5, 2, 1, 16, torch.float32))
    positions, inv_freq = torch.randint(0, 9, (3, 5), device=DEVICE), _inv_freq(8)
    angles = (positions, inv_freq, None, None, [2, 3, 3], False, False)
    torch.library.opcheck(torch.ops.qwen2vl.rotate.default, (q, k, *angles))
    torch.library.opcheck(torch.ops.qwen2vl.rotate_.default, (q.detach().clone(), k.detach().clone(), *angles))
    torch.library.opcheck(torch.ops.qwen2vl.rope_tables.default, (positions[:2].T, inv_freq))
