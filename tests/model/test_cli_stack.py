"""``qwen2vl info --stack``: the patch report of every adapter."""

from __future__ import annotations

import json
import sys
import warnings

import pytest
import transformers
from transformers.models.qwen2_vl import modeling_qwen2_vl
from typer.testing import CliRunner

from qwen2vl.cli import app, stack
from qwen2vl_kernels.integrations import sglang, vllm
from tests.integrations.fakes.sglang import install_sglang
from tests.integrations.fakes.vllm import install_vllm


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    for variable in ("QWEN2VL_KERNELS", "QWEN2VL_KERNELS_DISABLE", "VLLM_PLUGINS", "SGLANG_PLUGINS"):
        monkeypatch.delenv(variable, raising=False)
    for adapter in (vllm, sglang):
        adapter._patches.cache_clear()
    yield
    for adapter in (vllm, sglang):
        adapter._patches.cache_clear()


@pytest.fixture
def servers(monkeypatch):
    """Stand-ins of both, which have no distribution to ask for a version."""
    versions = {"vllm": "0.33.0", "sglang": "0.5.23"}
    found = stack.installed_version
    monkeypatch.setattr(stack, "installed_version", lambda name: versions.get(name) or found(name))
    return {"vllm": install_vllm(monkeypatch), "sglang": install_sglang(monkeypatch)}


def run(*args):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what is wrong is part of the report
        result = CliRunner().invoke(app, ["info", *args])
    assert result.exit_code == 0, result.output
    return result.stdout


def report(*args):
    return json.loads(run("--json", *args))


def states(facts):
    return {target["feature"]: target["state"] for target in facts["targets"]}


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """A site-packages with the line that Python runs as it starts."""
    monkeypatch.setattr(stack.site, "getsitepackages", lambda: [str(tmp_path)])
    (tmp_path / "qwen2vl_kernels.pth").write_text("")


def test_transformers(installed):
    forward = modeling_qwen2_vl.VisionAttention.forward
    facts = report("--stack", "transformers")
    assert facts["stack"] == "transformers" and facts["version"] == transformers.__version__
    assert facts["kill_switch"] == {"variable": "QWEN2VL_KERNELS_DISABLE", "value": None}
    assert [p["name"] for p in facts["plugins"]] == ["qwen2vl_kernels.pth"] and facts["warnings"] == []
    assert facts["switch"]["value"] is None and facts["switch"]["on"] == []
    assert states(facts)["qwen2_vl: vision_attention"] == "off"
    assert modeling_qwen2_vl.VisionAttention.forward is forward, "a report leaves nothing applied"
    text = run("--stack", "transformers")
    assert "VisionAttention.forward" in text and "QWEN2VL_KERNELS_DISABLE: not set" in text
    assert "plugin: qwen2vl_kernels.pth\n" in text and "QWEN2VL_KERNELS: not set" in text
    assert "off: QWEN2VL_KERNELS=transformers in the environment of any command switches on mrope, vision_rope" in text
    assert "so does qwen2vl_kernels.integrations.transformers.apply() in a program" in text


def test_transformers_switched_on(installed, monkeypatch):
    monkeypatch.setenv("QWEN2VL_KERNELS", "transformers:norm,activation")
    facts = report("--stack", "transformers")
    on = {feature for feature, state in states(facts).items() if state == "on"}
    families = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
    assert on == {f"{family}: {feature}" for family in families for feature in ("norm", "activation")}
    assert facts["switch"]["on"] == ["norm", "activation"] and states(facts)["qwen2_vl: merger"] == "off"
    monkeypatch.setenv("QWEN2VL_KERNELS", "transformers")
    found = states(report("--stack", "transformers"))
    assert {feature for feature, state in found.items() if state != "on"} == {f"{family}: loss" for family in families}


def test_transformers_where_no_start_of_python_has_our_line(monkeypatch, tmp_path):
    monkeypatch.setattr(stack.site, "getsitepackages", lambda: [str(tmp_path)])
    monkeypatch.setattr(stack.site, "ENABLE_USER_SITE", False)
    monkeypatch.setenv("QWEN2VL_KERNELS", "transformers")
    facts = report("--stack", "transformers")
    assert facts["plugins"] == [] and set(states(facts).values()) == {"off"}
    text = run("--stack", "transformers")
    assert "plugin: none found: no qwen2vl_kernels.pth in site-packages" in text and "call apply()" in text


@pytest.mark.parametrize("name", ["vllm", "sglang"])
def test_servers_are_as_they_were_until_they_are_switched_on(servers, monkeypatch, name):
    facts = report("--stack", name)
    expected = {"vllm": ("0.33.0", ["0.33"]), "sglang": ("0.5.23", ["0.5.23"])}[name]
    assert (facts["version"], facts["tested"]) == expected
    assert [(p["name"], p["loaded"]) for p in facts["plugins"]] == [("qwen2vl_kernels", True)]
    more = ("mrope",) if name == "vllm" else ()
    assert states(facts) == dict.fromkeys(("vision_rope", "quick_gelu", "vision_attention", *more), "off")
    assert facts["switch"]["on"] == [] and facts["switch"]["settings"][0] == f"QWEN2VL_KERNELS={name}"
    text = run("--stack", name)
    assert "plugin: qwen2vl_kernels" in text and "QWEN2VL_KERNELS: not set" in text and "vision_rope" in text
    assert f"off: QWEN2VL_KERNELS={name} in the environment of the server switches on vision_rope, quick_gelu" in text
    assert ("QWEN2VL_KERNELS=vllm:all switches on everything" in text) == (name == "vllm")

    monkeypatch.setenv("QWEN2VL_KERNELS", f"another:feature,{name}")
    facts = report("--stack", name)
    on = {"vision_attention": "off", "mrope": "off"} if name == "vllm" else {"vision_attention": "on"}
    assert states(facts) == {"vision_rope": "on", "quick_gelu": "on"} | on
    assert facts["switch"]["value"] == f"another:feature,{name}"
    assert facts["switch"]["on"] == [feature for feature, state in states(facts).items() if state == "on"]
    (warning,) = facts["warnings"]
    assert "there is no stack 'another'; the stacks are vllm, sglang, transformers" in warning
    assert servers["vllm"].registry == {} and "qwen2vl" not in servers["sglang"].vision.QKV_BACKEND_IMPL
    assert f"QWEN2VL_KERNELS: another:feature,{name}" in run("--stack", name)


def test_the_value_of_another_stack_switches_nothing_on(servers, monkeypatch):
    monkeypatch.setenv("QWEN2VL_KERNELS", "vllm:all")
    assert set(states(report("--stack", "vllm")).values()) == {"on"}
    assert set(states(report("--stack", "sglang")).values()) == {"off"}


@pytest.mark.parametrize("name", ["vllm", "sglang"])
def test_plugins_that_the_server_is_told_to_load(servers, monkeypatch, name):
    variable = f"{name.upper()}_PLUGINS"
    monkeypatch.setenv("QWEN2VL_KERNELS", name)
    monkeypatch.setenv(variable, "another")
    facts = report("--stack", name)
    assert {p["name"]: p["loaded"] for p in facts["plugins"]} == {"qwen2vl_kernels": False}
    assert set(states(facts).values()) == {"off"} and facts["switch"]["on"] == []
    text = run("--stack", name)
    assert "qwen2vl_kernels (not loaded)" in text and f"{variable}: another" in text
    monkeypatch.setenv(variable, "another, qwen2vl_kernels")
    assert states(report("--stack", name))["vision_rope"] == "on"
    monkeypatch.setenv(variable, "")  # of nothing vLLM loads nothing, and SGLang all
    assert states(report("--stack", name))["vision_rope"] == ("off" if name == "vllm" else "on")


@pytest.mark.parametrize("name", ["transformers", "vllm", "sglang"])
def test_kill_switch(servers, monkeypatch, name):
    monkeypatch.setenv("QWEN2VL_KERNELS_DISABLE", "1")
    monkeypatch.setenv("QWEN2VL_KERNELS", "vllm,sglang")
    facts = report("--stack", name)
    assert facts["kill_switch"]["value"] == "1" and (name == "transformers" or facts["switch"]["on"] == [])
    reasons = {(t["state"], t["reason"]) for t in facts["targets"]}
    assert reasons == {("skipped", "QWEN2VL_KERNELS_DISABLE is set")}
    assert "QWEN2VL_KERNELS_DISABLE: 1" in run("--stack", name)


def test_what_is_skipped_says_why(servers, monkeypatch):
    monkeypatch.setattr(servers["vllm"].QuickGELU, "forward_cuda", lambda self, something_new: None)
    facts = report("--stack", "vllm")
    (row,) = (t for t in facts["targets"] if t["feature"] == "quick_gelu")
    assert row["state"] == "skipped" and "something_new" in row["reason"]
    assert any("quick_gelu is left off" in warning for warning in facts["warnings"])
    assert "something_new" in run("--stack", "vllm").replace("\n", "")


def failure(*args):
    result = CliRunner().invoke(app, ["info", *args])
    assert result.stdout == ""
    return result.exit_code, " ".join(result.stderr.replace("│", " ").split())  # usage errors stand in a box


@pytest.mark.parametrize("options", [[], ["--json"]])
@pytest.mark.parametrize("name", ["transformers", "vllm", "sglang"])
def test_a_stack_that_is_not_installed(monkeypatch, name, options):
    monkeypatch.setattr(stack, "installed_version", lambda package: None)
    assert failure("--stack", name, *options) == (
        1,
        f"error: --stack {name}: {name} is not installed beside this package",
    )


def test_a_stack_that_cannot_be_imported(monkeypatch, tmp_path):
    monkeypatch.setattr(stack, "installed_version", lambda package: "1.0")
    monkeypatch.setitem(sys.modules, "vllm", None)
    code, message = failure("--stack", "vllm")
    assert code == 1 and message.startswith("error: --stack vllm: vllm 1.0 cannot be imported: ")
    monkeypatch.delitem(sys.modules, "vllm")
    (tmp_path / "vllm.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    code, message = failure("--stack", "vllm")
    assert code == 1 and message.endswith("cannot be imported: operator torchvision::nms does not exist")


def test_another_name_is_a_usage_error():
    code, message = failure("--stack", "tensorrt")
    assert code == 2 and "'transformers', 'vllm', 'sglang'" in message
