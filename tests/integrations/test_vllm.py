"""The vLLM adapter on a fake of what it touches; the real package is in ``make test-stacks``."""

from __future__ import annotations

import warnings
from importlib.metadata import entry_points

import pytest
import torch
from torch._subclasses import FakeTensorMode

from qwen2vl_kernels import use_backend
from qwen2vl_kernels.integrations import vllm as adapter
from qwen2vl_kernels.integrations import vllm_layers
from qwen2vl_kernels.integrations._patches import PatchWarning
from qwen2vl_kernels.integrations._switch import VARIABLE
from tests.integrations.fakes.vllm import install_vllm

HEADS, HEAD_DIM = 4, 20
BOUNDS = [0, 12, 12, 40, 44, 44, 44]  # an empty segment, and a tail that repeats the last
ROWS = 48  # four past the end


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    adapter._patches.cache_clear()
    with torch.inference_mode():
        yield
    adapter._patches.cache_clear()


@pytest.fixture
def vllm(monkeypatch):
    yield install_vllm(monkeypatch)
    adapter.restore()


def inputs():
    angles = torch.rand(ROWS, HEAD_DIM // 2) * 6
    return torch.randn(ROWS, 1, HEADS * HEAD_DIM), torch.tensor(BOUNDS, dtype=torch.int32), angles.cos(), angles.sin()


def quiet(call, *args):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return call(*args)


def states(rows=None):
    return {row.feature: row.state for row in (adapter.status() if rows is None else rows)}


@pytest.mark.parametrize("features", [adapter.DEFAULT, adapter.FEATURES], ids=["default", "all"])
@pytest.mark.parametrize("max_seqlen", [None, 0, torch.tensor(4096)], ids=["none", "zero", "oversized"])
def test_attention_is_stock_attention(vllm, features, max_seqlen):
    layer = vllm.Qwen2VisionAttention(HEADS * HEAD_DIM, HEADS)
    given = inputs()
    want = layer(*given)
    quiet(adapter.apply, features)
    patched = vllm.Qwen2VisionAttention(HEADS * HEAD_DIM, HEADS)
    patched.load_state_dict(layer.state_dict())
    torch.testing.assert_close(patched(*given, max_seqlen), want, rtol=0, atol=2e-6)


@pytest.mark.parametrize("rank", [0, 1])
def test_attention_of_a_rank(vllm, rank):
    layer = vllm.Qwen2VisionAttention(HEADS * HEAD_DIM, HEADS, tp_size=2, tp_rank=rank)
    given = inputs()
    want = layer(*given)
    adapter.apply()
    torch.testing.assert_close(layer(*given), want, rtol=0, atol=2e-6)


def test_q_and_k_are_views_of_the_projection_where_the_backend_reads_strides(vllm):
    adapter.apply()
    layer = vllm.Qwen2VisionAttention(HEADS * HEAD_DIM, HEADS)
    layer(*inputs())
    q, k, v = layer.attn.seen.pop()
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()
    layer.attn.attn_backend.name = "FLASHINFER"  # its boundaries count the elements of contiguous q and k
    layer(*inputs())
    q, k, v = layer.attn.seen.pop()
    assert q.is_contiguous() and k.is_contiguous() and v.stride(1) == 3 * HEADS * HEAD_DIM


def test_quick_gelu_is_ours_although_custom_ops_are_off(vllm):
    x = torch.randn(7, 12)
    want = vllm.QuickGELU()(x)
    assert adapter.apply() and type(vllm.QuickGELU()) is vllm.registry["QuickGELU"]
    module = vllm.QuickGELU()
    assert module._forward_method.__name__ == "forward_cuda" and isinstance(module, vllm.QuickGELU)
    torch.testing.assert_close(module(x), want)
    vllm.settings.custom_ops.append("-quick_gelu")  # the user's word
    assert vllm.QuickGELU()._forward_method.__name__ == "forward_native"


def test_encoder_attention_zeroes_rows_past_the_end_and_leaves_other_backends_alone(vllm):
    adapter.apply(["vision_attention"])
    layer = vllm.MMEncoderAttention(HEADS, HEAD_DIM)
    q, k, v = torch.randn(3, 1, ROWS, HEADS * HEAD_DIM).unbind()
    out = layer(q, k, v, torch.tensor(BOUNDS, dtype=torch.int32))
    assert out.shape == q.shape and not out[:, BOUNDS[-1] :].any() and layer.seen == []
    layer(q, k, v)
    layer(q[:, :5], k, v)  # no self-attention
    layer.attn_backend.name = "FLASHINFER"
    layer(q, k, v, torch.tensor(BOUNDS, dtype=torch.int32))
    assert len(layer.seen) == 2


def test_encoder_attention_of_a_batch_without_boundaries(vllm):
    adapter.apply(["vision_attention"])
    q, k, v = torch.randn(3, 2, 6, HEADS, HEAD_DIM).unbind()
    got = vllm.MMEncoderAttention(HEADS, HEAD_DIM)(q, k, v)
    want = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6)


def test_a_longest_segment_is_not_read_in_compiled_code(vllm):
    """vLLM compiles its vision blocks without graph breaks, and hands on a tensor."""
    adapter.apply(["vision_attention"])
    layer = vllm.MMEncoderAttention(HEADS, HEAD_DIM)
    q, k, v = torch.randn(3, 1, ROWS, HEADS, HEAD_DIM)
    cu_seqlens, longest = torch.tensor(BOUNDS, dtype=torch.int32), torch.tensor(28)
    torch._dynamo.reset()
    compiled = torch.compile(layer.forward_cuda, fullgraph=True, backend="eager")
    want = layer.forward_cuda(q, k, v, cu_seqlens, longest)
    torch.testing.assert_close(compiled(q, k, v, cu_seqlens, longest), want)


def test_which_backend_serves_where_the_longest_segment_is_not_known(vllm, monkeypatch):
    adapter.apply(["vision_attention"])
    layer, seen = vllm.MMEncoderAttention(HEADS, HEAD_DIM), []
    monkeypatch.setattr(vllm_layers, "varlen_attention", lambda q, *_, backend, **__: seen.append(backend) or q)
    with FakeTensorMode():
        q = torch.empty(1, ROWS, HEADS, HEAD_DIM, device="cuda")
        cu_seqlens = torch.empty(4, dtype=torch.int32, device="cuda")
        for longest in (None, torch.empty((), device="cuda"), 28):
            layer.forward_cuda(q, q, q, cu_seqlens, longest)
        with use_backend(varlen_attention="torch"):
            layer.forward_cuda(q, q, q, cu_seqlens, None)
    assert seen == ["triton", "triton", None, None]


def test_mrope_works_in_the_packed_projection(vllm):
    section, tokens = [2, 4, 4], 9
    angles = torch.arange(64)[:, None] * 1e3 ** (-torch.arange(10) / 10)
    cache = torch.cat((angles.cos(), angles.sin()), -1)
    qkv = torch.randn(tokens, (HEADS + 4) * 20)
    q, k, _ = qkv.split((HEADS * 20, 2 * 20, 2 * 20), -1)
    positions = torch.randint(0, 64, (3, tokens))
    want = vllm.MRotaryEmbedding(20, cache, section)(positions, q, k)
    adapter.apply(["mrope"])
    module = vllm.MRotaryEmbedding(20, cache, section)
    text = module(positions[0], q.clone(), k.clone())  # one row of positions: vLLM's own way
    torch.testing.assert_close(text, module.forward_native(positions[:1].expand(3, -1), q, k))
    got = module(positions, q, k)
    torch.testing.assert_close(got, want)
    assert got[0].data_ptr() == qkv.data_ptr()


def test_everything_is_put_back(vllm):
    forward = vllm.Qwen2VisionAttention.forward
    adapter.apply(adapter.FEATURES)
    assert set(states().values()) == {"applied"} and len(vllm.registry) == 3
    assert vllm.Qwen2VisionAttention.forward is not forward
    adapter.restore()
    assert vllm.Qwen2VisionAttention.forward is forward and vllm.registry == {}
    assert set(states().values()) == {"off"}
    assert set(states(adapter.apply()).values()) == {"applied", "off"}


def test_to_apply_twice_changes_nothing(vllm):
    adapter.apply()
    forward, registered = vllm.Qwen2VisionAttention.forward, dict(vllm.registry)
    quiet(adapter.apply)
    assert vllm.Qwen2VisionAttention.forward is forward and vllm.registry == registered


def test_a_second_copy_of_the_plugin_registers_nothing_twice(vllm):
    adapter.apply(adapter.FEATURES)
    first = adapter._patches()
    adapter._patches.cache_clear()
    with (
        pytest.warns(PatchWarning, match="vision_rope is left off: .*is patched already"),
        pytest.warns(PatchWarning, match="in its place already"),
    ):
        rows = adapter.apply(adapter.FEATURES)
    assert {row.state for row in rows} == {"skipped"}
    first.restore()
    assert vllm.registry == {}


def test_an_unknown_version_is_loud_and_applied_where_signatures_fit(monkeypatch):
    vllm = install_vllm(monkeypatch, version="0.34.1")
    with pytest.warns(PatchWarning, match=r"vLLM: version 0\.34\.1 was never tested, only 0\.33"):
        adapter.apply()
    assert states()["quick_gelu"] == "applied" and "QuickGELU" in vllm.registry
    adapter.restore()


@pytest.mark.parametrize(
    ("owner", "name", "feature"),
    [
        ("Qwen2VisionAttention", "forward", "vision_rope"),
        ("Qwen2VisionAttention", "split_qkv", "vision_rope"),
        ("QuickGELU", "forward_cuda", "quick_gelu"),
        ("MMEncoderAttention", "forward_cuda", "vision_attention"),
        ("MRotaryEmbedding", "forward_cuda", "mrope"),
    ],
)
def test_a_changed_signature_leaves_that_feature_alone(vllm, monkeypatch, owner, name, feature):
    def changed(self, something_new):
        pass

    monkeypatch.setattr(getattr(vllm, owner), name, changed)
    with pytest.warns(PatchWarning, match=rf"{feature} is left off: .*something_new"):
        adapter.apply(adapter.FEATURES)
    assert states() == {f: "skipped" if f == feature else "applied" for f in adapter.FEATURES}
    assert getattr(getattr(vllm, owner), name) is changed and len(vllm.registry) == 3 - (feature != "vision_rope")


def test_another_way_to_register_leaves_classes_alone(vllm, monkeypatch):
    monkeypatch.setattr(vllm.CustomOp, "register_oot", classmethod(lambda cls, name: None))
    with pytest.warns(PatchWarning, match=r"needs .*CustomOp\.register_oot, which takes"):
        adapter.apply()
    assert states()["quick_gelu"] == "skipped" and states()["vision_rope"] == "applied"


def test_a_platform_without_kernels_is_left_alone(monkeypatch):
    vllm = install_vllm(monkeypatch, platform="tpu")
    with pytest.warns(PatchWarning, match="runs on tpu"):
        adapter.apply(adapter.FEATURES)
    assert set(states().values()) == {"skipped"} and vllm.registry == {}


def test_kill_switch(vllm, monkeypatch):
    monkeypatch.setenv("QWEN2VL_KERNELS_DISABLE", "1")
    forward = vllm.Qwen2VisionAttention.forward
    rows = quiet(adapter.apply, adapter.FEATURES)
    assert {row.reason for row in rows} == {"QWEN2VL_KERNELS_DISABLE is set"}
    assert vllm.Qwen2VisionAttention.forward is forward and vllm.registry == {}


def test_without_vllm_every_target_says_so():
    with pytest.warns(PatchWarning, match="was not found") as caught:
        rows = adapter.apply(adapter.FEATURES)
    assert len(rows) == 4 and all("No module named 'vllm'" in row.reason for row in rows)
    assert not any("never tested" in str(w.message) for w in caught)


def test_unknown_feature(vllm):
    with pytest.raises(ValueError, match="there is no feature 'rope'; the features are vision_rope"):
        adapter.apply(["rope"])


def test_the_plugin_is_found_and_changes_nothing_until_it_is_switched_on(vllm, monkeypatch):
    ours = [e for e in entry_points(group="vllm.general_plugins") if e.name.startswith("qwen2vl_kernels")]
    assert [(entry.name, entry.value) for entry in ours] == [
        ("qwen2vl_kernels", "qwen2vl_kernels.integrations.vllm:plugin")
    ]
    plugin, forward = ours[0].load(), vllm.Qwen2VisionAttention.forward
    for value in (None, "", "sglang", "sglang:all"):
        if value is not None:
            monkeypatch.setenv(VARIABLE, value)
        quiet(plugin)
        assert vllm.registry == {} and vllm.Qwen2VisionAttention.forward is forward
        assert set(states().values()) == {"off"}


@pytest.mark.parametrize(
    ("value", "on"),
    [
        ("vllm", adapter.DEFAULT),
        ("sglang, VLLM", adapter.DEFAULT),
        ("vllm:default,mrope", (*adapter.DEFAULT, "mrope")),
        ("vllm:mrope,sglang", ("mrope",)),
        ("vllm:all", adapter.FEATURES),
    ],
)
def test_the_plugin_applies_what_it_is_asked_for(vllm, monkeypatch, value, on):
    monkeypatch.setenv(VARIABLE, value)
    for _ in range(2):  # processes may load it again
        quiet(adapter.plugin)
    assert states() == {feature: "applied" if feature in on else "off" for feature in adapter.FEATURES}


def test_the_kill_switch_goes_before_the_plugins_switch(vllm, monkeypatch):
    monkeypatch.setenv(VARIABLE, "vllm:all,rope")
    monkeypatch.setenv("QWEN2VL_KERNELS_DISABLE", "1")
    quiet(adapter.plugin)
    assert set(states().values()) == {"off"} and vllm.registry == {}


def test_what_the_plugin_does_not_know_is_a_warning(vllm, monkeypatch):
    monkeypatch.setenv(VARIABLE, "vllm:rope,mrope")
    with pytest.warns(PatchWarning, match="^QWEN2VL_KERNELS=vllm:rope,mrope: vllm has no feature 'rope'") as caught:
        adapter.plugin()
    assert len(caught) == 1
    assert {feature for feature, state in states().items() if state == "applied"} == {"mrope"}
