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
    for variable in ("QWEN2VL_KERNELS_DISABLE", "VLLM_PLUGINS", "SGLANG_PLUGINS"):
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


def test_transformers():
    forward = modeling_qwen2_vl.VisionAttention.forward
    facts = report("--stack", "transformers")
    assert facts["stack"] == "transformers" and facts["version"] == transformers.__version__
    assert facts["kill_switch"] == {"variable": "QWEN2VL_KERNELS_DISABLE", "value": None}
    assert facts["plugins"] is None and facts["warnings"] == []
    assert states(facts)["qwen2_vl: vision_attention"] == "applied"
    assert modeling_qwen2_vl.VisionAttention.forward is forward, "a report leaves nothing applied"
    text = run("--stack", "transformers")
    assert "VisionAttention.forward" in text and "QWEN2VL_KERNELS_DISABLE: not set" in text


@pytest.mark.parametrize("name", ["vllm", "sglang"])
def test_servers(servers, name):
    facts = report("--stack", name)
    expected = {"vllm": ("0.33.0", ["0.33"]), "sglang": ("0.5.23", ["0.5.23"])}[name]
    assert (facts["version"], facts["tested"]) == expected
    assert facts["plugins"] and all(plugin["loaded"] for plugin in facts["plugins"])
    opt_in = dict.fromkeys(("vision_attention", "mrope"), "off") if name == "vllm" else {"vision_attention": "applied"}
    assert states(facts) == {"vision_rope": "applied", "quick_gelu": "applied"} | opt_in
    assert servers["vllm"].registry == {} and "qwen2vl" not in servers["sglang"].vision.QKV_BACKEND_IMPL
    text = run("--stack", name)
    assert "plugins: qwen2vl_kernels" in text and "vision_rope" in text and "applied" in text


def test_plugins_that_the_server_is_told_to_load(servers, monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "qwen2vl_kernels_mrope")
    servers["vllm"].envs.VLLM_PLUGINS = ["qwen2vl_kernels_mrope"]
    facts = report("--stack", "vllm")
    assert {p["name"]: p["loaded"] for p in facts["plugins"]} == {
        "qwen2vl_kernels": False,
        "qwen2vl_kernels_attention": False,
        "qwen2vl_kernels_mrope": True,
    }
    assert states(facts)["mrope"] == "applied" and states(facts)["vision_rope"] == "off"
    text = run("--stack", "vllm")
    assert "qwen2vl_kernels (not loaded)" in text and "VLLM_PLUGINS: qwen2vl_kernels_mrope" in text
    monkeypatch.setenv("SGLANG_PLUGINS", "another")
    assert set(states(report("--stack", "sglang")).values()) == {"off"}


@pytest.mark.parametrize("name", ["transformers", "vllm", "sglang"])
def test_kill_switch(servers, monkeypatch, name):
    monkeypatch.setenv("QWEN2VL_KERNELS_DISABLE", "1")
    facts = report("--stack", name)
    assert facts["kill_switch"]["value"] == "1"
    reasons = {(t["state"], t["reason"]) for t in facts["targets"] if t["state"] != "off"}
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


def test_a_stack_that_cannot_be_imported(monkeypatch):
    monkeypatch.setattr(stack, "installed_version", lambda package: "1.0")
    monkeypatch.setitem(sys.modules, "vllm", None)
    code, message = failure("--stack", "vllm")
    assert code == 1 and message.startswith("error: --stack vllm: vllm 1.0 cannot be imported: ")


def test_another_name_is_a_usage_error():
    code, message = failure("--stack", "tensorrt")
    assert code == 2 and "'transformers', 'vllm', 'sglang'" in message
