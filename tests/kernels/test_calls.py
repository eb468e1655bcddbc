"""From a public function to the launch of its kernel are at most three calls: a reader follows them in a minute."""

import sys

import pytest
import torch

import qwen2vl_kernels as K
from qwen2vl_kernels.core import launching

BF16 = torch.bfloat16
CU = torch.tensor([0, 20, 20, 35], dtype=torch.int32)
POSITIONS, INV_FREQ, SECTION = torch.arange(111).view(3, 37), torch.rand(64), (16, 24, 24)
TABLE, GRID = torch.rand(37, 40), torch.tensor([[1, 4, 6], [3, 2, 2]])


def _x(*shape):
    return torch.zeros(shape, dtype=BF16)


def _attention(**settings):
    q, k, v = _x(37, 2, 80), _x(37, 1, 80), _x(37, 1, 80)
    return K.varlen_attention(q, k, v, CU, 20, backend="triton", **settings)


def _append(**settings):
    k, caches = _x(37, 2, 128), [_x(3, 16, 2, 128) for _ in range(2)]
    return K.append_kv(k, k, *caches, torch.arange(37), backend="triton", **settings)


def _linear_cross_entropy():
    return K.linear_cross_entropy(_x(5, 64), _x(9, 64), torch.arange(5), backend="triton")


def _decode():
    caches = [_x(3, 90, 2, 128) for _ in range(2)]
    lengths = torch.tensor([37, 0, 90], dtype=torch.int32)
    return K.kvcache_attention(_x(3, 6, 128), *caches, None, lengths, backend="triton")


def _step():
    q, k, caches = _x(3, 6, 128), _x(3, 2, 128), [_x(3, 90, 2, 128) for _ in range(2)]
    lengths, arrived = torch.tensor([37, 0, 90], dtype=torch.int32), torch.zeros(3, 2, dtype=torch.int32)
    return K.decode_attention_(q, k, k, *caches, lengths, POSITIONS[0, :3], INV_FREQ, arrived, backend="triton")


def _quant_linear(rows):
    weight, scales = torch.zeros(9, 64, dtype=torch.uint8), torch.ones(9, 2)
    return K.quant_linear(_x(rows, 128), weight, scales, block=(1, 64), backend="triton")


def _grouped_quant_linear():
    weight, scales = torch.zeros(3, 9, 64, dtype=torch.uint8), torch.ones(3, 9, 2)
    return K.grouped_quant_linear(_x(35, 128).bfloat16(), weight, scales, CU, block=(1, 64), backend="triton")


MERGER = [_x(*s) for s in ((1280,), (1280,), (128, 5120), (128,), (72, 128), (72,))]
#: (name of the public function, a call of it, the calls to its launches that were counted when this was written)
CALLS = [
    ("rms_norm", lambda: K.rms_norm(_x(5, 64), _x(64), backend="triton"), {3}),
    ("add_rms_norm", lambda: K.add_rms_norm(_x(5, 64), _x(5, 64), _x(64), backend="triton"), {3}),
    ("layer_norm", lambda: K.layer_norm(_x(5, 64), _x(64), _x(64), backend="triton"), {3}),
    ("add_layer_norm", lambda: K.add_layer_norm(_x(5, 64), _x(5, 64), _x(64), _x(64), backend="triton"), {3}),
    ("quick_gelu", lambda: K.quick_gelu(_x(5, 64), _x(64), backend="triton"), {3}),
    ("quick_gelu_", lambda: K.quick_gelu_(_x(5, 4, 64).transpose(0, 1), backend="triton"), {3}),
    ("swiglu", lambda: K.swiglu(_x(5, 64), backend="triton"), {3}),
    ("swiglu_", lambda: K.swiglu_(_x(5, 64), _x(5, 64), backend="triton"), {3}),
    ("mrope", lambda: K.mrope(_x(37, 3, 128), _x(37, 2, 128), POSITIONS, INV_FREQ, SECTION, backend="triton"), {3}),
    ("mrope_", lambda: K.mrope_(_x(37, 3, 128), _x(37, 2, 128), POSITIONS, INV_FREQ, SECTION, backend="triton"), {3}),
    ("vision_rope", lambda: K.vision_rope(_x(37, 2, 80), _x(37, 2, 80), TABLE, TABLE, backend="triton"), {3}),
    ("vision_rope_", lambda: K.vision_rope_(_x(37, 2, 80), _x(37, 2, 80), TABLE, TABLE, backend="triton"), {3}),
    ("vision_rope_qkv_", lambda: K.vision_rope_qkv_(_x(37, 3, 2, 80), TABLE, TABLE, backend="triton"), {3}),
    ("vision_rope_tables", lambda: K.vision_rope_tables(POSITIONS[:2].T, INV_FREQ[:20], backend="triton"), {3}),
    ("append_kv", _append, {2}),
    ("append_kv", lambda: _append(q=_x(37, 3, 128), positions=POSITIONS, inv_freq=INV_FREQ, section=SECTION), {2}),
    ("patch_embed", lambda: K.patch_embed(_x(37, 588), _x(72, 588), _x(72), backend="triton"), {3}),
    ("patch_merge", lambda: K.patch_merge(_x(36, 1280), *MERGER, order="raster", grid_thw=GRID, backend="triton"), {3}),
    ("quant_linear", lambda: _quant_linear(1), {3}),
    ("quant_linear", lambda: _quant_linear(40), {3}),
    ("linear_cross_entropy", _linear_cross_entropy, {3}),
    ("kvcache_attention", _decode, {3}),
    ("decode_attention_", _step, {3}),
    ("rms_norm_linear", lambda: K.rms_norm_linear(_x(3, 64), _x(64), [_x(9, 64)], backend="triton"), {3}),
    ("rms_norm_swiglu", lambda: K.rms_norm_swiglu(_x(3, 64), _x(64), _x(9, 64), _x(9, 64), backend="triton"), {3}),
    ("linear_add_", lambda: K.linear_add_(_x(3, 9), _x(3, 64), _x(9, 64), backend="triton"), {3}),
    ("sample_tokens_", lambda: K.sample_tokens_(_x(3, 99), torch.rand(3).double(), top_k=5, backend="triton"), {3}),
    ("grouped_linear", lambda: K.grouped_linear(_x(35, 64), _x(3, 9, 64), CU, backend="triton"), {2}),
    ("grouped_quant_linear", _grouped_quant_linear, {3}),
    ("group_by_expert", lambda: K.group_by_expert(POSITIONS, 4, backend="triton"), {2}),
    ("varlen_attention", _attention, {2}),
    ("varlen_attention", lambda: _attention(rope=(TABLE, TABLE)), {2}),  # rotated on the way in
    ("varlen_attention", lambda: _attention(rope=(TABLE, TABLE), tiles=K.plan_tiles(CU, 37, padded=True)), {2, 3}),
]


@pytest.mark.parametrize(("name", "call", "known"), CALLS, ids=[f"{n} {c[0]}" for n, c in enumerate(CALLS)])
def test_calls_to_the_launch(name, call, known, monkeypatch):
    if (reason := launching.reason("cpu")) is not None:
        pytest.skip(reason)
    public, found = getattr(K, name).__code__, []

    def count(*_, **__):
        frame, calls = sys._getframe(1), 1
        while frame.f_code is not public:
            frame, calls = frame.f_back, calls + 1
        found.append(calls)

    for module in [m for m in sys.modules.values() if getattr(m, "launch", None) is launching.launch]:
        monkeypatch.setattr(module, "launch", count)
    with torch.no_grad():
        call()
    assert found and max(found) <= 3, found
    assert set(found) == known, "better than what is written here: write it down"
