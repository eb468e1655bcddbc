"""mrope and vision_rope against transformers' functions and complex-number rotation in float64."""

import pytest
import torch
from transformers import Qwen2VLConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import (
    Qwen2VLRotaryEmbedding,
    apply_rotary_pos_emb,
    apply_rotary_pos_emb_vision,
)

from qwen2vl_kernels import mrope, mrope_, vision_rope, vision_rope_, vision_rope_qkv_, vision_rope_tables
from qwen2vl_kernels.core.backends import unavailable
from tests.conftest import DEVICE, assert_two_times, relative_error

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _turn(x, angles):
    """Rotation as multiplication by exp(i angle), float64, independent of the cos/sin form."""
    x, half = x.double(), angles.shape[-1]
    z = torch.complex(x[..., :half], x[..., half : 2 * half]) * torch.polar(torch.ones(()).double(), angles)[:, None]
    return torch.cat((z.real, z.imag, x[..., 2 * half :]), -1)


def _assert_rounded_once(got, exact, floor):
    """As far from float64 as its rounding to the dtype: cosines and rotation must be float32 for 16-bit inputs."""
    rounded = relative_error(exact.to(got.dtype), exact)
    assert relative_error(got, exact) <= 1.02 * rounded + floor


def _axis_of_pair(section, interleaved):
    t, h, w = section
    if not interleaved:
        return [0] * t + [1] * h + [2] * w
    return [j % 3 if (j % 3 == 1 and j < 3 * h) or (j % 3 == 2 and j < 3 * w) else 0 for j in range(t + h + w)]


def _angles(positions, inv_freq, section, interleaved=False):
    axes = _axis_of_pair(section, interleaved)
    return torch.stack([positions[a].double() * inv_freq[j].double() for j, a in enumerate(axes)], -1)


def _inputs(tokens=11, heads=6, kv_heads=2, dim=128, dtype=torch.float32):
    q, k = torch.randn(tokens, heads, dim).to(dtype), torch.randn(tokens, kv_heads, dim).to(dtype)
    positions = torch.randint(0, 3000, (3, tokens))
    inv_freq = 1.0 / 1e6 ** (torch.arange(0, dim, 2).float() / dim)  # in transformers' order of operations
    return q, k, positions, inv_freq


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mrope_matches_transformers(dtype):
    q, k, positions, inv_freq = _inputs(dtype=dtype)
    config = Qwen2VLConfig(
        text_config={
            "hidden_size": 768,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        }
    )
    rotary = Qwen2VLRotaryEmbedding(config.text_config)
    cos, sin = rotary(q, positions[:, None])
    theirs = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
    angles = _angles(positions, inv_freq, (16, 24, 24))
    for got, their, x in zip(mrope(q, k, positions, inv_freq, (16, 24, 24)), theirs, (q, k), strict=True):
        assert got.dtype == dtype
        # The floor is float32's rounding of angles up to 3000 radians, most of which are far smaller (6e-6 measured).
        _assert_rounded_once(got, _turn(x, angles), 2e-5)
        assert_two_times(got, their[0].transpose(0, 1), _turn(x, angles), 2e-5)
        if dtype == torch.float32:
            torch.testing.assert_close(got, their[0].transpose(0, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("section", "interleaved", "dim"),
    [((16, 24, 24), False, 128), ((24, 20, 20), True, 128), ((0, 5, 3), False, 16), ((8, 12, 12), False, 80)],
    ids=str,
)
def test_mrope_sections(section, interleaved, dim):
    """Chunked, interleaved (Qwen3-VL), an empty axis, and partial rotary: 64 of 80 columns."""
    q, k, positions, _ = _inputs(dim=dim)
    pairs = sum(section)
    inv_freq = 1e4 ** -(torch.arange(pairs).float() / pairs)
    q_out, k_out = mrope(q, k, positions, inv_freq, section, interleaved=interleaved)
    angles = _angles(positions, inv_freq, section, interleaved)
    _assert_rounded_once(q_out, _turn(q, angles), 5e-5)
    _assert_rounded_once(k_out, _turn(k, angles), 5e-5)
    assert torch.equal(q_out[..., 2 * pairs :], q[..., 2 * pairs :])


def test_equal_axes_are_plain_rope():
    q, k, positions, inv_freq = _inputs()
    flat = positions[:1].expand(3, -1)
    a = mrope(q, k, flat, inv_freq, (16, 24, 24))
    b = mrope(q, k, flat, inv_freq, (64, 0, 0))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_mrope_reads_packed_projections_in_place():
    """q and k as strided views of one projection; the in-place form writes through the views and nowhere else."""
    qkv = torch.randn(11, 10, 128)
    q, k, v = qkv.split([6, 2, 2], 1)
    _, _, positions, inv_freq = _inputs()
    expected = mrope(q.clone(), k.clone(), positions, inv_freq, (16, 24, 24))
    v_before = v.clone()
    got = mrope_(q, k, positions.int(), inv_freq, (16, 24, 24))
    assert got[0] is q and torch.equal(q, expected[0]) and torch.equal(k, expected[1]) and torch.equal(v, v_before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [64, 72, 80, 128])
def test_vision_rope_matches_transformers(dtype, dim):
    q, k = torch.randn(9, 4, dim).to(dtype), torch.randn(9, 4, dim).to(dtype)
    positions = torch.randint(0, 200, (9, 2))
    inv_freq = 1e4 ** -(torch.arange(0, dim // 2, 2).float() / (dim // 2))
    cos, sin = vision_rope_tables(positions, inv_freq)
    full = (torch.cat((cos, cos), -1), torch.cat((sin, sin), -1))
    theirs = apply_rotary_pos_emb_vision(q, k, *full)
    angles = torch.cat([positions[:, i, None].double() * inv_freq.double() for i in (0, 1)], -1)
    for got, their, x in zip(vision_rope(q, k, cos, sin), theirs, (q, k), strict=True):
        assert got.dtype == dtype
        _assert_rounded_once(got, _turn(x, angles), 2e-6)
        assert_two_times(got, their, _turn(x, angles), 2e-6)


def test_vision_rope_in_place_forms_agree():
    qkv = torch.randn(9, 3, 4, 80).bfloat16()
    angles = torch.rand(9, 40) * 6
    cos, sin = angles.cos().half(), angles.sin().half()
    q, k, v = (x.clone() for x in qkv.unbind(1))
    expected = vision_rope(q, k, cos, sin)
    assert vision_rope_qkv_(qkv, cos, sin) is qkv
    vision_rope_(q, k, cos, sin)
    for got in (qkv[:, :2], torch.stack((q, k), 1)):
        assert torch.equal(got, torch.stack(expected, 1))
    assert torch.equal(qkv[:, 2], v)


def test_in_place_is_refused_under_autograd():
    q, k, positions, inv_freq = _inputs()
    with pytest.raises(ValueError, match=r"mrope_: q requires grad"):
        mrope_(q.requires_grad_(), k, positions, inv_freq, (16, 24, 24))
    with pytest.raises(ValueError, match=r"vision_rope_qkv_: qkv requires grad"):
        vision_rope_qkv_(torch.randn(2, 3, 2, 8, requires_grad=True), torch.ones(2, 4), torch.zeros(2, 4))
    with torch.no_grad():
        mrope_(q, k, positions, inv_freq, (16, 24, 24))


def test_gradients():
    q, k, positions, inv_freq = _inputs(3, 4, 2, 16)
    q, k = q.double().requires_grad_(), k.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda q, k: mrope(q, k, positions, inv_freq.double(), (2, 3, 3)), (q, k))
    cos, sin = torch.randn(2, 3, 8).double()
    assert torch.autograd.gradcheck(lambda q, k: vision_rope(q, k, cos, sin), (q, k))


def test_no_tokens():
    q, k, _, inv_freq = _inputs(0)
    q_out, k_out = mrope(q, k, torch.zeros(3, 0, dtype=torch.int64), inv_freq, (16, 24, 24))
    assert q_out.shape == (0, 6, 128) and k_out.shape == (0, 2, 128)


def _served_by_vllm(q, k, positions, cache, section, interleaved):
    """M-RoPE as vLLM's ``MRotaryEmbedding`` states it: rows of a table of cosines and sines, an axis at a time."""
    cos, sin = cache[positions].chunk(2, -1)  # (3, T, R/2) each

    def of_axes(table):
        if not interleaved:
            return torch.cat([part[axis] for axis, part in enumerate(table.split(section, -1))], -1)
        made = table[0].clone()
        for axis in (1, 2):
            places = slice(axis, 3 * section[axis], 3)
            made[:, places] = table[axis][:, places]
        return made

    cos, sin = of_axes(cos).unsqueeze(1), of_axes(sin).unsqueeze(1)
    results = []
    for x in (q, k):
        rotated, rest = x[..., : cache.shape[1]], x[..., cache.shape[1] :]
        first, second = rotated.chunk(2, -1)
        results.append(torch.cat((first * cos - second * sin, second * cos + first * sin, rest), -1))
    return results


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("tokens", [1, 11, 300])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "columns", "theta", "section", "interleaved"),
    [
        (12, 2, 128, 128, 1e6, (16, 24, 24), False),  # Qwen2-VL 2B
        (28, 4, 128, 128, 1e6, (16, 24, 24), False),  # Qwen2-VL and Qwen2.5-VL 7B
        (64, 8, 128, 128, 1e6, (16, 24, 24), False),  # 72B
        (32, 8, 128, 128, 5e6, (24, 20, 20), True),  # Qwen3-VL 4B and 8B
        (16, 2, 256, 64, 1e7, (11, 11, 10), True),  # a quarter of the columns is rotated
    ],
)
def test_vllms_formula(heads, kv_heads, dim, columns, theta, section, interleaved, tokens, ranks, dtype, backend):
    if backend == "triton":
        if (reason := unavailable("triton", DEVICE)) is not None:
            pytest.skip(reason)
        if DEVICE == "cpu" and (tokens > 11 or heads > 28):
            pytest.skip("interpreted, other sizes show what this one would")
    device = DEVICE if backend == "triton" else "cpu"
    angles = torch.outer(torch.arange(4096.0), theta ** (-torch.arange(0, columns, 2) / columns))
    cache = torch.cat((angles.cos(), angles.sin()), 1).to(device, dtype)
    positions = torch.randint(0, 4096, (3, tokens), device=device)
    q, k = (torch.randn(tokens, n // ranks, dim, device=device).to(dtype) for n in (heads, kv_heads))
    settings = list(section), interleaved
    got = mrope(q, k, positions, None, settings[0], interleaved=interleaved, cos_sin_cache=cache, backend=backend)
    eager = _served_by_vllm(q, k, positions, cache, *settings)
    exact = _served_by_vllm(q.double(), k.double(), positions, cache.double(), *settings)
    for one, theirs, right in zip(got, eager, exact, strict=True):
        assert one.dtype == dtype
        assert_two_times(one, theirs, right, torch.finfo(dtype).eps)
