"""The grammar of ``QWEN2VL_KERNELS``, and what is said of words that mean nothing."""

from __future__ import annotations

import importlib
import re
import warnings

import pytest

from qwen2vl_kernels.integrations._patches import SWITCH, PatchWarning
from qwen2vl_kernels.integrations._switch import STACKS, VARIABLE, parse, requested, setting

DEFAULT, ALL = STACKS["vllm"].default, STACKS["vllm"].features
SGLANG = STACKS["sglang"].default


@pytest.mark.parametrize(
    ("value", "asked"),
    [
        ("", {}),
        (" , ", {}),
        ("vllm", {"vllm": DEFAULT}),
        ("sglang,vllm", {"sglang": SGLANG, "vllm": DEFAULT}),
        (" VLLM , SGLang,", {"vllm": DEFAULT, "sglang": SGLANG}),
        ("vllm:vision_rope", {"vllm": ("vision_rope",)}),
        ("vllm:mrope,vision_rope", {"vllm": ("vision_rope", "mrope")}),  # in the adapter's order
        ("vllm: default, mrope ,sglang", {"vllm": (*DEFAULT, "mrope"), "sglang": SGLANG}),
        ("vllm:mrope,sglang:quick_gelu,vision_rope", {"vllm": ("mrope",), "sglang": ("vision_rope", "quick_gelu")}),
        ("vllm:mrope,vllm:quick_gelu", {"vllm": ("quick_gelu", "mrope")}),
        ("vllm,vllm:mrope", {"vllm": (*DEFAULT, "mrope")}),
        ("vllm:all", {"vllm": ALL}),
        ("transformers", {"transformers": STACKS["transformers"].default}),
        ("transformers:default,loss", {"transformers": STACKS["transformers"].features}),
        ("transformers:norm,mrope,vllm", {"transformers": ("mrope", "norm"), "vllm": DEFAULT}),
    ],
)
def test_values_and_what_they_ask_for(value, asked):
    assert parse(value) == (asked, [])


@pytest.mark.parametrize(
    ("value", "asked", "faults"),
    [
        (
            "vlm",
            {},
            ["there is no stack 'vlm'; the stacks are vllm, sglang, transformers, and features follow a colon, as in "],
        ),
        ("1", {}, ["there is no stack '1'; the stacks are vllm, sglang"]),
        ("vllm,mrope", {"vllm": DEFAULT}, ["there is no stack 'mrope'; .*as in vllm:default,mrope"]),
        (
            "vlm:vision_rope,mrope,sglang",
            {"sglang": SGLANG},
            ["there is no stack 'vlm'; the stacks are vllm, sglang, transformers$"],
        ),
        (
            "vllm:rope,mrope",
            {"vllm": ("mrope",)},
            ["vllm has no feature 'rope'; its features are vision_rope, quick_gelu, vision_attention, mrope, default"],
        ),
        (
            "vllm:mrope,sglng",
            {"vllm": ("mrope",)},
            ["vllm has no feature 'sglng'; .* and the stacks are vllm, sglang, transformers$"],
        ),
        ("sglang:mrope", {}, ["sglang has no feature 'mrope'; its features are vision_rope, quick_gelu, vision_att"]),
        ("vllm:", {}, ["vllm has no feature ''"]),
        ("one,two:three", {}, ["there is no stack 'one'", "there is no stack 'two'"]),
    ],
)
def test_words_that_mean_nothing_are_named_and_the_others_count(value, asked, faults):
    found, said = parse(value)
    assert found == asked and len(said) == len(faults)
    for fault, start in zip(said, faults, strict=True):
        assert re.match(start, fault), fault


def test_the_environment_is_asked(monkeypatch):
    monkeypatch.delenv(SWITCH, raising=False)
    monkeypatch.delenv(VARIABLE, raising=False)
    assert requested("vllm") == ()
    monkeypatch.setenv(VARIABLE, "vllm,nothing")
    with pytest.warns(PatchWarning, match=r"^QWEN2VL_KERNELS=vllm,nothing: there is no stack 'nothing'.*is ignored$"):
        assert requested("vllm") == DEFAULT
    with pytest.warns(PatchWarning):
        assert requested("sglang") == ()
    monkeypatch.setenv(SWITCH, "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert requested("vllm") == ()


@pytest.mark.parametrize("stack", STACKS)
def test_settings_say_what_they_switch_on(stack):
    known = STACKS[stack]
    adapter = importlib.import_module(f"qwen2vl_kernels.integrations.{stack}")
    assert (known.default, known.features) == (adapter.DEFAULT, adapter.FEATURES)
    for features in dict.fromkeys((known.default, known.features, known.features[1:], known.features[:1])):
        variable, _, value = setting(stack, features).partition("=")
        assert variable == VARIABLE and parse(value) == ({stack: features}, [])
