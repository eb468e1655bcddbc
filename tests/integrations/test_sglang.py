"""The SGLang adapter on a fake of what it touches; ``tests/stacks/sglang_tower.py`` runs the real package."""

from __future__ import annotations

import warnings
from importlib.metadata import entry_points
from types import MappingProxyType, SimpleNamespace

import pytest
import torch
from torch._subclasses import FakeTensorMode

from qwen2vl_kernels import use_backend
from qwen2vl_kernels.integrations import sglang as adapter
from qwen2vl_kernels.integrations import sglang_layers
from qwen2vl_kernels.integrations._patches import PatchWarning
from qwen2vl_kernels.integrations._switch import VARIABLE
from tests.integrations.fakes.sglang import SingletonCache, install_sglang

HEADS, HEAD_DIM = 4, 20
BOUNDS = [0, 12, 12, 40, 44, 44, 44]  # an empty segment, and a tail that repeats the last
ROWS = 48  # four past the end


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.setenv(VARIABLE, "sglang")  # what asks the plugin to act
    adapter._patches.cache_clear()
    with torch.inference_mode():
        yield
    adapter._patches.cache_clear()


@pytest.fixture
def sglang(monkeypatch):
    yield install_sglang(monkeypatch)
    adapter.restore()


@pytest.fixture
def calls(monkeypatch):
    """Names of the ops that were called, in order."""
    seen = []

    def counted(name, op):
        return lambda *args, **kwargs: seen.append(name) or op(*args, **kwargs)

    for name in ("vision_rope", "quick_gelu", "varlen_attention"):
        monkeypatch.setattr(sglang_layers, name, counted(name, getattr(sglang_layers, name)))
    return seen


def inputs(bounds=BOUNDS):
    angles = torch.rand(ROWS, HEAD_DIM // 2) * 6
    tables = tuple(torch.cat((t, t), -1) for t in (angles.cos(), angles.sin()))
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
    return {"x": torch.randn(1, ROWS, HEADS * HEAD_DIM), "cu_seqlens": cu_seqlens, "position_embeddings": tables}


def quiet(call, *args):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return call(*args)


def states(rows=None):
    return {(row.feature, row.label): row.state for row in (adapter.status() if rows is None else rows)}


def of_features(rows=None):
    """The states of each feature's targets, which are one: whole or not at all."""
    found = {}
    for (feature, _), state in states(rows).items():
        found.setdefault(feature, set()).add(state)
    assert all(len(several) == 1 for several in found.values()), found
    return {feature: several.pop() for feature, several in found.items()}


def everything(stack):
    """Every attribute of every module and class of the fake, and its tables."""
    held = {name: dict(vars(module)) for name, module in stack.modules.items()}
    held |= {cls.__name__: dict(vars(cls)) for cls in (stack.QuickGELU, stack.VisionAttention)}
    registry = stack.HookRegistry
    tables = {"backends": stack.vision.QKV_BACKEND_IMPL, "hooks": registry._hooks}
    return held | {name: dict(table) for name, table in tables.items()} | {"patched": dict.fromkeys(registry._patched)}


def identical(before, after):
    return before.keys() == after.keys() and all(
        before[name].keys() == after[name].keys() and all(before[name][k] is after[name][k] for k in before[name])
        for name in before
    )


# ------------------------------------------------------------------------------------------------ results


@pytest.mark.parametrize("eager_rope", [False, True], ids=["rope", "rope in a CUDA graph"])
@pytest.mark.parametrize("features", [adapter.FEATURES, ["vision_rope"], ["vision_attention"]], ids=str)
def test_attention_is_stock_attention(sglang, calls, features, eager_rope):
    sglang.eager_rope = eager_rope
    layer = sglang.VisionAttention(HEADS * HEAD_DIM, HEADS)
    given = inputs()
    want = layer(**given)
    assert calls == []
    quiet(adapter.apply, features)
    patched = sglang.VisionAttention(HEADS * HEAD_DIM, HEADS)
    patched.load_state_dict(layer.state_dict())
    torch.testing.assert_close(patched(**given), want, rtol=0, atol=2e-6)
    expected = {"vision_rope": "vision_rope", "vision_attention": "varlen_attention"}
    assert calls == [expected[feature] for feature in features if feature in expected]


def test_a_users_word_goes_before_our_choice(sglang, monkeypatch):
    adapter.apply(["vision_attention"])
    ours, seen = sglang.VisionAttention(HEADS * HEAD_DIM, HEADS).qkv_backend, []
    monkeypatch.setattr(sglang_layers, "varlen_attention", lambda q, *_, backend, **__: seen.append(backend) or q)
    with FakeTensorMode():
        q = torch.empty(ROWS, HEADS, HEAD_DIM, device="cuda")
        bounds = [torch.empty(4, dtype=torch.int32, device="cuda")]
        ours(q, q, q, bounds, 1, ROWS)
        with use_backend(varlen_attention="torch"):
            ours(q, q, q, bounds, 1, ROWS)
    assert seen == ["triton", None]


@pytest.mark.parametrize("bounds", ["tensor", "int64", "cache", "none", "metadata", "list"])
def test_every_form_of_boundaries(sglang, bounds):
    """What a tower passes: its own, a cache, nothing, prepared ones, or the list and the output of a CUDA graph."""
    adapter.apply(["vision_attention"])
    layer = sglang.VisionAttention(HEADS * HEAD_DIM, HEADS)
    given = inputs()
    whole, cu_seqlens = given.copy(), given["cu_seqlens"]
    layer.qkv_backend_name, ours = "triton_attn", layer.qkv_backend
    layer.qkv_backend = sglang.vision.VisionTritonAttention()
    given |= {"cu_seqlens": None} if bounds == "none" else {}
    want = layer(**given)
    layer.qkv_backend = ours
    prepared = torch.full((ROWS, HEADS, HEAD_DIM), torch.nan)
    given |= {
        "tensor": {},
        "none": {},
        "int64": {"cu_seqlens": cu_seqlens.long()},
        "cache": {"cu_seqlens": SingletonCache(cu_seqlens)},
        "metadata": {"cu_seqlens": None, "forward_metadata": SimpleNamespace(cu_seqlens=cu_seqlens)},
        "list": {"cu_seqlens": [cu_seqlens, cu_seqlens.diff(), 28], "output_ws": prepared},
    }[bounds]
    torch.testing.assert_close(layer(**given), want, rtol=0, atol=2e-6)
    assert bounds != "list" or not prepared.isnan().any()
    assert torch.equal(whole["cu_seqlens"], torch.tensor(BOUNDS, dtype=torch.int32))


def test_q_k_and_v_stay_views_of_the_projection(sglang, monkeypatch):
    adapter.apply()
    layer, seen = sglang.VisionAttention(HEADS * HEAD_DIM, HEADS), []
    forward = layer.qkv_backend.forward
    monkeypatch.setattr(layer.qkv_backend, "forward", lambda **kwargs: seen.append(kwargs) or forward(**kwargs))
    layer(**inputs())
    assert layer.pass_strided_qkv and seen[0]["v"].stride(0) == 3 * HEADS * HEAD_DIM


def test_what_is_no_vision_towers_call_is_left_to_stock(sglang, calls):
    rotary = sglang.rotary.apply_rotary_pos_emb
    text = torch.randn(2, HEADS, 6, HEAD_DIM), torch.randn(2, HEADS, 6, HEAD_DIM), *torch.randn(2, 2, 6, HEAD_DIM)
    rows = torch.randn(6, HEADS, HEAD_DIM), torch.randn(6, HEADS, HEAD_DIM), *torch.randn(2, 1, HEAD_DIM)
    want = [rotary(*text), rotary(*rows)]
    adapter.apply(["vision_rope"])
    for one, given in zip(want, (text, rows), strict=True):
        got = sglang.package.apply_rotary_pos_emb(*given)
        assert all(torch.equal(a, b) for a, b in zip(got, one, strict=True))
    assert calls == []


def test_quick_gelu_of_models_built_from_now_on(sglang, calls):
    x = torch.randn(7, 12)
    old = sglang.QuickGELU()
    want = old(x)
    adapter.apply(["quick_gelu"])
    torch.testing.assert_close(sglang.QuickGELU()(x), want)
    torch.testing.assert_close(sglang.QuickGELU().forward_cuda(x), want)
    assert calls == ["quick_gelu"] * 2
    assert torch.equal(old(x), want) and len(calls) == 2


def test_windows_and_sinks_are_refused(sglang):
    adapter.apply()
    q = torch.randn(3, 8, HEADS, HEAD_DIM)
    backend = sglang.vision.QKV_BACKEND_IMPL["qwen2vl"](head_dim=HEAD_DIM)
    for wrong in ({"window_size": (4, 4)}, {"s_aux": torch.zeros(HEADS)}):
        with pytest.raises(ValueError, match=r"no windows or sinks; set --mm-attention-backend"):
            backend.forward(*q, torch.tensor([0, 8]), 1, 8, **wrong)


# ----------------------------------------------------------------------------------- choice of the backend


@pytest.mark.parametrize(
    ("default", "passed", "server", "head_dim", "chosen"),
    [
        ("triton_attn", None, None, 80, "qwen2vl"),
        ("triton_attn", None, None, 72, "qwen2vl"),
        ("triton_attn", None, None, 64, "triton_attn"),  # a power of two is padded by nobody
        ("triton_attn", None, None, 128, "triton_attn"),
        ("triton_attn", None, None, 320, "triton_attn"),  # too large for our kernel
        ("fa3", None, None, 80, "fa3"),  # Hopper's default
        ("sdpa", None, None, 80, "sdpa"),
        ("fa3", "triton_attn", None, 80, "triton_attn"),  # the model's word
        ("triton_attn", None, "triton_attn", 80, "triton_attn"),  # the user's word
        ("triton_attn", None, "sdpa", 80, "sdpa"),
        ("fa3", None, "qwen2vl", 64, "qwen2vl"),
    ],
)
def test_the_backend_is_chosen_where_the_default_would_pad(sglang, default, passed, server, head_dim, chosen):
    adapter.apply()
    sglang.default, sglang.mm.mm_attention_backend = default, server
    layer = sglang.VisionAttention(2 * head_dim, 2, qkv_backend=passed)
    assert layer.qkv_backend_name == chosen
    assert type(layer.qkv_backend) is sglang.vision.QKV_BACKEND_IMPL[chosen]


# ------------------------------------------------------------------------------------- apply, restore, status


def test_everything_is_put_back(sglang):
    before = everything(sglang)
    rows = quiet(adapter.apply)
    assert len(rows) == 7 and set(of_features(rows).values()) == {"applied"}
    for importer in (sglang.vision, sglang.package):
        assert importer.apply_rotary_pos_emb is sglang.rotary.apply_rotary_pos_emb
    quiet(adapter.restore)
    assert identical(before, everything(sglang))
    assert set(of_features().values()) == {"off"}
    assert set(of_features(quiet(adapter.apply)).values()) == {"applied"}


def test_some_features(sglang):
    adapter.apply(["quick_gelu"])
    assert of_features() == {"vision_rope": "off", "quick_gelu": "applied", "vision_attention": "off"}
    assert "qwen2vl" not in sglang.vision.QKV_BACKEND_IMPL
    adapter.apply()
    assert set(of_features().values()) == {"applied"}


def test_to_apply_twice_changes_nothing(sglang, calls):
    adapter.apply()
    after = everything(sglang)
    quiet(adapter.apply)
    assert identical(after, everything(sglang))
    sglang.VisionAttention(HEADS * HEAD_DIM, HEADS)(**inputs())
    assert calls == ["vision_rope", "varlen_attention"]


@pytest.mark.parametrize("hooks_are_set", [True, False])
def test_a_second_copy_of_the_plugin_registers_nothing_twice(sglang, hooks_are_set):
    before = everything(sglang)
    adapter.plugin()
    if hooks_are_set:
        sglang.HookRegistry.apply_hooks()
    first, after = adapter._patches(), everything(sglang)
    adapter._patches.cache_clear()
    with pytest.warns(PatchWarning, match="already|was hooked by another plugin") as caught:
        rows = adapter.apply()
    assert len(caught) == len(adapter.FEATURES) and set(of_features(rows).values()) == {"skipped"}
    assert identical(after, everything(sglang))
    first.restore()
    assert identical(before, everything(sglang))


def test_restore_before_the_hooks_are_set(sglang):
    before = everything(sglang)
    adapter.plugin()
    quiet(adapter.restore)
    sglang.HookRegistry.apply_hooks()
    assert identical(before, everything(sglang))


def test_hooks_of_others_on_the_same_function_stay(sglang):
    registry, path = sglang.HookRegistry, "sglang.srt.layers.activation.QuickGELU.forward_native"
    registry.register(path, lambda result, *args: result + 100)
    adapter.apply()
    x = torch.randn(3)
    torch.testing.assert_close(sglang.QuickGELU()(x), x * torch.sigmoid(1.702 * x) + 100)
    with pytest.warns(PatchWarning, match=r"QuickGELU\.forward_native was replaced by somebody else") as caught:
        adapter.restore()
    assert len(caught) == 1 and len(registry._hooks[path]) == 2
    torch.testing.assert_close(sglang.QuickGELU()(x), x * torch.sigmoid(1.702 * x) + 100)


def test_restore_leaves_what_somebody_else_has_set_since(sglang, monkeypatch):
    adapter.apply()

    def theirs(self, x):
        return x

    monkeypatch.setattr(sglang.QuickGELU, "forward_native", theirs)
    sglang.vision.STRIDED_QKV_BACKENDS |= {"another"}
    with pytest.warns(PatchWarning) as caught:
        adapter.restore()
    assert sorted(str(w.message).split()[3] for w in caught) == [
        "STRIDED_QKV_BACKENDS",
        "activation.QuickGELU.forward_native",
    ]
    assert sglang.QuickGELU.forward_native is theirs and "another" in sglang.vision.STRIDED_QKV_BACKENDS


def test_a_function_that_another_plugin_has_hooked_leaves_the_feature_alone(sglang):
    path = "sglang.srt.layers.attention.vision.VisionAttention._determine_attention_backend"
    sglang.HookRegistry.register(path, lambda result, *args: result)
    sglang.HookRegistry.apply_hooks()
    with pytest.warns(PatchWarning, match="vision_attention is left off: .*hooked by another plugin before"):
        adapter.apply()
    assert of_features()["vision_attention"] == "skipped" and "qwen2vl" not in sglang.vision.QKV_BACKEND_IMPL


# ------------------------------------------------------------------------------------------- what stands in the way


def test_an_unknown_version_is_loud_and_applied_where_signatures_fit(monkeypatch):
    install_sglang(monkeypatch, version="0.6.0")
    with pytest.warns(PatchWarning, match=r"SGLang: version 0\.6\.0 was never tested, only 0\.5\.23"):
        adapter.apply()
    assert set(of_features().values()) == {"applied"}
    adapter.restore()


def _changed(self, something_new):
    pass


@pytest.mark.parametrize(
    ("owner", "name", "feature"),
    [
        ("rotary", "apply_rotary_pos_emb", "vision_rope"),
        ("rotary", "apply_rotary_pos_emb_native_eager", "vision_rope"),
        ("QuickGELU", "forward_cuda", "quick_gelu"),
        ("QuickGELU", "forward_native", "quick_gelu"),
        ("VisionAttention", "_determine_attention_backend", "vision_attention"),
        ("vision", "resolve_seqlens", "vision_attention"),
        ("triton", "forward", "vision_attention"),
    ],
)
def test_a_changed_signature_leaves_that_feature_whole(sglang, monkeypatch, owner, name, feature):
    sglang.triton = sglang.vision.VisionTritonAttention
    monkeypatch.setattr(getattr(sglang, owner), name, _changed)
    before = everything(sglang)
    with pytest.warns(PatchWarning, match=rf"{feature} is left off: .*something_new") as caught:
        adapter.apply()
    assert len(caught) == 1
    assert of_features() == {f: "skipped" if f == feature else "applied" for f in adapter.FEATURES}
    reasons = [row.reason for row in adapter.status() if row.feature == feature]
    assert sum("something_new" in reason for reason in reasons) == 1
    assert all("something_new" in reason or reason == f"{feature} goes whole or not at all" for reason in reasons)
    adapter.restore()
    assert identical(before, everything(sglang))


@pytest.mark.parametrize(
    ("table", "value", "reason"),
    [
        ("QKV_BACKEND_IMPL", MappingProxyType({}), "QKV_BACKEND_IMPL is a mappingproxy, not a dict"),
        ("QKV_BACKEND_IMPL", {"qwen2vl": object}, "QKV_BACKEND_IMPL holds 'qwen2vl' already"),
        ("STRIDED_QKV_BACKENDS", ["fa3"], "STRIDED_QKV_BACKENDS is a list, not a frozenset"),
    ],
)
def test_tables_of_another_form_are_left_alone(sglang, monkeypatch, table, value, reason):
    monkeypatch.setattr(sglang.vision, table, value)
    with pytest.warns(PatchWarning, match=f"vision_attention is left off: .*{reason}"):
        adapter.apply()
    assert of_features()["vision_attention"] == "skipped" and getattr(sglang.vision, table) is value


@pytest.mark.parametrize("table", ["QKV_BACKEND_IMPL", "STRIDED_QKV_BACKENDS"])
def test_a_table_that_is_gone(sglang, monkeypatch, table):
    monkeypatch.delattr(sglang.vision, table)
    with pytest.warns(PatchWarning, match=f"vision_attention is left off: .*{table}"):
        adapter.apply()
    assert of_features()["vision_attention"] == "skipped"


@pytest.mark.parametrize("name", ["register", "_patched"])
def test_another_registry_leaves_every_feature_alone(sglang, monkeypatch, name):
    monkeypatch.setattr(sglang.HookRegistry, name, None)
    with pytest.warns(PatchWarning, match=rf"needs .*HookRegistry\.{name}, which"):
        adapter.apply()
    assert set(of_features().values()) == {"skipped"}


def test_a_hook_that_sglang_could_not_set_takes_its_feature_off(sglang, monkeypatch):
    """SGLang logs such an error and goes on."""
    apply_hooks = sglang.HookRegistry.apply_hooks.__func__

    def failing(cls):
        apply_hooks(cls)
        cls._patched.discard("sglang.srt.layers.attention.vision.VisionAttention._determine_attention_backend")

    monkeypatch.setattr(sglang.HookRegistry, "apply_hooks", classmethod(failing))
    with pytest.warns(PatchWarning, match="vision_attention is left off: .*could not be hooked"):
        rows = adapter.apply()
    assert of_features(rows)["vision_attention"] == "skipped" and of_features(rows)["quick_gelu"] == "applied"
    assert "qwen2vl" not in sglang.vision.QKV_BACKEND_IMPL and "qwen2vl" not in sglang.vision.STRIDED_QKV_BACKENDS


def test_kill_switch(sglang, monkeypatch):
    monkeypatch.setenv("QWEN2VL_KERNELS_DISABLE", "1")
    before = everything(sglang)
    rows = quiet(adapter.apply)
    assert {row.reason for row in rows} == {"QWEN2VL_KERNELS_DISABLE is set"}
    quiet(adapter.plugin)
    assert identical(before, everything(sglang))


def test_without_sglang_every_target_says_so():
    with pytest.warns(PatchWarning, match="was not found") as caught:
        rows = adapter.apply()
    assert len(rows) == 7 and all("No module named 'sglang'" in row.reason for row in rows)
    assert not any("never tested" in str(w.message) for w in caught)


def test_unknown_feature(sglang):
    with pytest.raises(ValueError, match="there is no feature 'rope'; the features are vision_rope"):
        adapter.apply(["rope"])


@pytest.mark.parametrize("value", [None, "", "vllm:all"])
def test_the_plugin_changes_nothing_until_it_is_switched_on(sglang, monkeypatch, value):
    monkeypatch.delenv(VARIABLE) if value is None else monkeypatch.setenv(VARIABLE, value)
    before = everything(sglang)
    quiet(adapter.plugin)
    sglang.HookRegistry.apply_hooks()
    assert identical(before, everything(sglang)) and set(of_features().values()) == {"off"}


def test_the_plugin_registers_the_features_it_is_asked_for(sglang, monkeypatch):
    monkeypatch.setenv(VARIABLE, "vllm,sglang:quick_gelu,rope")
    with pytest.warns(
        PatchWarning, match="sglang has no feature 'rope'; its features are vision_rope, quick_gelu"
    ) as got:
        adapter.plugin()
    assert len(got) == 1
    assert of_features() == {"vision_rope": "off", "quick_gelu": "applied", "vision_attention": "off"}


def test_the_plugin_is_found_and_registers_for_sglang_to_set(sglang, calls):
    (entry,) = (e for e in entry_points(group="sglang.srt.plugins") if e.name == "qwen2vl_kernels")
    plugin = entry.load()
    for _ in range(2):  # processes may load it again
        quiet(plugin)
    assert set(of_features().values()) == {"applied"} and not sglang.HookRegistry._patched
    sglang.HookRegistry.apply_hooks()
    layer = sglang.VisionAttention(HEADS * HEAD_DIM, HEADS)
    layer(**inputs())
    assert calls == ["vision_rope", "varlen_attention"]
