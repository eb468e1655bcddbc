"""append_kv against a walk over the tokens with mrope's formula, in contiguous and paged caches."""

from __future__ import annotations

import pytest
import torch

from qwen2vl_kernels import append_kv
from qwen2vl_kernels.core.backends import unavailable
from qwen2vl_kernels.ops.mrope import mrope_ref
from tests.conftest import DEVICE

SECTION = (3, 3, 2)  # of 16 columns
BACKENDS = [
    "eager",
    pytest.param("triton", marks=pytest.mark.skipif(unavailable("triton", DEVICE) is not None, reason="no Triton")),
]


def _inputs(tokens=11, q_heads=5, heads=2, columns=16, v_columns=16, dtype=torch.float32):
    """Strided as projections and packed buffers are."""
    packed = torch.randn(tokens, q_heads + 2 * heads, max(columns, v_columns), device=DEVICE).to(dtype)
    q, k, v = packed[..., :columns].split((q_heads, heads, heads), 1)
    v = packed[:, q_heads + heads :, :v_columns]
    positions = torch.randint(0, 500, (3, tokens), device=DEVICE)
    inv_freq = 1e4 ** -(torch.arange(8, device=DEVICE) / 8)
    return q, k, v, {"positions": positions, "inv_freq": inv_freq, "section": SECTION}


def _cache(blocks, block_size, heads, columns, dtype, layout="plain"):
    """Poisoned, so that what is not written shows."""
    if layout == "plain":
        return torch.full((blocks, block_size, heads, columns), torch.nan, dtype=dtype, device=DEVICE)
    # k and v of a block side by side, as one vLLM layout has them: blocks are not one run of slots.
    return torch.full((blocks, 2, block_size, heads, columns), torch.nan, dtype=dtype, device=DEVICE)[:, 1]


def _expected(cache, slots, rows):
    made = cache.clone()
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            made[slot // cache.shape[1], slot % cache.shape[1]] = rows[token]
    return made


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["plain", "side by side"])
def test_rotates_and_stores(dtype, layout, backend):
    q, k, v, angles = _inputs(dtype=dtype)
    q_want, k_want = mrope_ref(q, k, *angles.values())
    k_before, v_before = k.clone(), v.clone()
    k_cache, v_cache = (_cache(4, 8, 2, 16, dtype, layout) for _ in range(2))
    slots = torch.tensor([9, 30, -1, 0, 7, 8, 31, -5, 16, 3, 12], device=DEVICE)
    wanted = _expected(k_cache, slots, k_want), _expected(v_cache, slots, v)
    append_kv(k, v, k_cache, v_cache, slots, q=q, **angles, backend=backend)
    for got, want in ((q, q_want), (k_cache, wanted[0])):
        torch.testing.assert_close(got, want, rtol=1e-2 if dtype != torch.float32 else 0, atol=1e-6, equal_nan=True)
    assert torch.equal(v_cache.nan_to_num(7), wanted[1].nan_to_num(7))
    assert torch.equal(k, k_before) and torch.equal(v, v_before)
    append_kv(k, v, k_cache, v_cache, slots, overwrite_k=True, **angles, backend=backend)
    torch.testing.assert_close(k, k_want, rtol=1e-2 if dtype != torch.float32 else 0, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_stores_alone(backend):
    """Ready keys, values of another width, int32 slots with a stride, a head_dim that is no power of two."""
    _, k, v, _ = _inputs(columns=24, v_columns=12, heads=3)
    k_cache, v_cache = _cache(2, 16, 3, 24, torch.float32), _cache(2, 16, 3, 12, torch.float32)
    slots = torch.randperm(32, device=DEVICE)[:22].int()[::2]
    wanted = _expected(k_cache, slots, k), _expected(v_cache, slots, v)
    append_kv(k, v, k_cache, v_cache, slots, backend=backend)
    for got, want in zip((k_cache, v_cache), wanted, strict=True):
        assert torch.equal(got.nan_to_num(7), want.nan_to_num(7))


@pytest.mark.parametrize("backend", BACKENDS)
def test_partial_rotation_from_a_cache(backend):
    """16 of 24 columns turn, by cosines and sines read by position; the others are stored as they are."""
    q, k, v, angles = _inputs(columns=24)
    table = torch.arange(500, device=DEVICE)[:, None] * angles["inv_freq"]
    cos_sin_cache = torch.cat((table.cos(), table.sin()), 1).half()
    settings = (angles["positions"], None, SECTION, False, cos_sin_cache)
    _, k_want = mrope_ref(q, k, *settings)
    k_cache, v_cache = _cache(1, 20, 2, 24, torch.float32), _cache(1, 20, 2, 16, torch.float32)
    slots = torch.arange(11, device=DEVICE) + 4
    wanted = _expected(k_cache, slots, k_want)
    angles |= {"inv_freq": None, "cos_sin_cache": cos_sin_cache}
    append_kv(k, v, k_cache, v_cache, slots, **angles, backend=backend)
    torch.testing.assert_close(k_cache, wanted, rtol=0, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens(backend):
    q, k, v, angles = _inputs(tokens=0)
    cache = _cache(1, 4, 2, 16, torch.float32)
    append_kv(
        k, v, cache, cache.clone(), torch.zeros(0, dtype=torch.int64, device=DEVICE), q=q, **angles, backend=backend
    )
    assert cache.isnan().all()


def test_refusals():
    q, k, v, angles = (x.cpu() if isinstance(x, torch.Tensor) else x for x in _inputs())
    angles = {name: x.cpu() if isinstance(x, torch.Tensor) else x for name, x in angles.items()}
    cache, slots = torch.zeros(2, 8, 2, 16), torch.arange(11)

    def refuses(message, error=ValueError, **changed):
        given = {
            "k": k,
            "v": v,
            "k_cache": cache,
            "v_cache": cache.clone(),
            "slots": slots,
            "q": q,
            **angles,
            **changed,
        }
        with pytest.raises(error, match=message):
            append_kv(**given)

    refuses(
        r"k_cache must have shape \(blocks, block_size, Hk, D\) with Hk=2, D=16, got \(16, 2, 16\)",
        k_cache=cache.flatten(0, 1),
    )
    refuses("v_cache must have shape", v_cache=torch.zeros(2, 9, 2, 16))
    refuses("v_cache must have dtype torch.float32, got torch.float16", TypeError, v_cache=cache.half())
    refuses("k_cache must be contiguous in its last dimension", k_cache=torch.zeros(2, 8, 2, 32)[..., ::2])
    refuses("slots must have one of the dtypes int64, int32", TypeError, slots=slots.short())
    refuses(r"slots must have shape \(T\) with T=11, got \(10,\)", slots=slots[1:])
    refuses("slots must be below 16, the cache's number of slots, got 16", slots=slots + 6)
    refuses("positions must be given with q", positions=None)
    refuses("positions must be given with inv_freq", positions=None, q=None)
    refuses("inv_freq and cos_sin_cache: one must be given, got neither", inv_freq=None)
    refuses(r"section \(1, 2, 3\) must sum to inv_freq's 8 pairs", section=(1, 2, 3))
    refuses("k requires grad and is overwritten", k=k.clone().requires_grad_())
    with pytest.raises(ValueError, match="positions must be given with overwrite_k"):
        append_kv(k, v, cache, cache.clone(), slots, overwrite_k=True)
    assert not cache.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    q, k, v, angles = _inputs()
    caches = [torch.zeros(2, 8, 2, 16, device=DEVICE) for _ in range(2)]
    slots = torch.arange(11, device=DEVICE)
    tensors = (k.clone(), v.clone(), *caches, slots, q.clone(), angles["positions"], angles["inv_freq"])
    arguments = (*tensors, list(SECTION), False, None, True, backend)
    torch.library.opcheck(torch.ops.qwen2vl.append_kv.default, arguments)
