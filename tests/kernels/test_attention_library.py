"""varlen_attention by others' kernels: what they are asked for, and what is closed that they leave open.

Their kernels run on GPUs; here functions of their signatures stand for them, which check what they get and answer with
the formula, with NaN in the rows that nobody writes.
"""

from __future__ import annotations

import importlib
import types

import pytest
import torch

from qwen2vl_kernels import BackendError, _attention_library, varlen_attention
from qwen2vl_kernels._backend import unavailable
from qwen2vl_kernels.ops.varlen_attention import varlen_attention_ref
from tests.conftest import assert_two_times


@pytest.fixture
def pack():
    q = torch.randn(17, 3, 4, 80).bfloat16()
    q, k, v = q[:, 0], q[:, 1, :2], q[:, 2, :2]
    return q, k, v, torch.tensor([0, 9, 9, 14], dtype=torch.int32)


def _answer(q, k, v, bounds, causal, scale):
    assert q.stride(0) == 960 and bounds.dtype == torch.int32  # read in place
    out = varlen_attention_ref(q, k, v, bounds, causal, scale)
    out[int(bounds[-1]) :] = torch.nan
    return out


def _check(run, pack, causal, scale):
    q, k, v, cu = pack
    for bounds in (cu, cu.clone().to("cpu")):
        got = run(q, k, v, bounds, 9, causal, scale)
        assert torch.equal(got, varlen_attention_ref(q, k, v, cu, causal, scale))


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("version", ["2.10", "2.13"])
def test_torch_varlen(pack, version, causal, monkeypatch):
    module = importlib.import_module("torch.nn.attention.varlen")

    def older(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
        assert max_q == max_k == 9 and cu_seq_q is cu_seq_k and key.shape[1] == query.shape[1]  # no grouped heads
        out = varlen_attention_ref(query, key, value, cu_seq_q, is_causal)
        out[int(cu_seq_q[-1]) :] = torch.nan
        return out

    def newer(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
        enable_gqa=False,
    ):  # fmt: skip
        assert max_q == max_k == 9 and enable_gqa and window_size in ((-1, -1), (-1, 0))
        return _answer(query, key, value, cu_seq_q, window_size == (-1, 0), scale)

    monkeypatch.setattr(module, "varlen_attn", older if version == "2.10" else newer)
    _check(_attention_library.torch_varlen, pack, causal, 80**-0.5)
    if version == "2.10":
        with pytest.raises(ValueError, match=r"takes no softmax_scale but 0.11\d+, got 0.5"):
            _attention_library.torch_varlen(*pack, 9, causal, 0.5)
    else:
        _check(_attention_library.torch_varlen, pack, causal, 0.5)


@pytest.mark.parametrize("returns", ["out", "out and lse"])
def test_flash_takes_the_newest_that_runs_here(pack, returns, monkeypatch):
    calls = []

    def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, softmax_scale=None, causal=False):
        calls.append((max_q, max_k))
        out = _answer(q, k, v, cu_seqlens_q, causal, softmax_scale)
        return out if returns == "out" else (out, None)

    def modules(capability):
        _attention_library.flash_function.cache_clear()
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)

    def importing(name):
        if name == "flash_attn.cute":
            raise ImportError("No module named 'flash_attn.cute'")
        return types.SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func, name=name)

    monkeypatch.setattr(_attention_library, "importlib", types.SimpleNamespace(import_module=importing))
    try:
        modules((9, 0))
        _check(_attention_library.flash_varlen, pack, True, 0.3)
        assert calls == [(9, 9)] * 2 and _attention_library.flash_reason() is None
        modules((7, 5))
        reason = _attention_library.flash_reason()
        assert reason is not None and "flash_attn.cute: No module named" in reason
        assert "flash_attn: it needs a GPU of capability 8.0, this one has 7.5" in reason
    finally:
        _attention_library.flash_function.cache_clear()


def test_they_refuse_other_dtypes_and_widths():
    for columns, dtype, reason in (
        (80, torch.float32, "it takes bfloat16 and float16, got torch.float32"),
        (81, torch.bfloat16, "a multiple of 8 up to 256, got 81 and 81"),
        (264, torch.bfloat16, "a multiple of 8 up to 256, got 264 and 264"),
    ):
        x = torch.empty(3, 2, columns, dtype=dtype)
        assert reason in (_attention_library.shape_reason(x, x) or "")
    x = torch.empty(3, 2, 80, dtype=torch.bfloat16)
    assert _attention_library.shape_reason(x, x) is None
    with pytest.raises(BackendError, match="backend 'flash' does not serve cpu tensors; these do: sdpa, blocked"):
        varlen_attention(x, x, x, torch.tensor([0, 3]).int(), 3, backend="flash")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["torch", "flash"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_on_a_gpu(backend, causal):
    if not torch.cuda.is_available():
        pytest.skip("PyTorch sees no CUDA device")
    if (reason := unavailable(backend, "cuda")) is not None:
        pytest.skip(f"{backend}: {reason}")
    qkv = torch.randn(400, 3, 4, 80, device="cuda").bfloat16()
    cu = torch.tensor([0, 130, 130, 390], dtype=torch.int32)
    leaves = [x.detach().clone().requires_grad_() for x in qkv.unbind(1)]
    results = []
    for call, inputs in (
        (lambda *a: varlen_attention(*a, cu.cuda(), 260, causal=causal, backend=backend), leaves),
        (lambda *a: varlen_attention_ref(*a, cu, causal), leaves),
        (lambda *a: varlen_attention_ref(*a, cu, causal), [x.detach().double().requires_grad_() for x in leaves]),
    ):
        out = call(*inputs)
        assert not out[390:].any()
        results.append((out, *torch.autograd.grad(out, inputs, torch.ones_like(out))))
    for got, eager, exact in zip(*results, strict=True):
        assert_two_times(got, eager, exact, 2e-6)
