"""The cases of the whole tower and of image to tokens, on small models; how a forward is taken apart."""

from __future__ import annotations

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.case import Context, Skip
from benchmarks.cases import e2e, model, tower
from benchmarks.cases._qwen2vl import BY_GRAPH, Ours, by_graph, checkpoint, graph_check
from benchmarks.cases._trace import LAYER, PARTS, trace
from benchmarks.random_checkpoint import small_config
from benchmarks.run import run_case
from qwen2vl import graphs, tower_graph
from qwen2vl.cache import KVCache
from qwen2vl_kernels import rms_norm, use_backend
from qwen2vl_kernels.core import matmul
from tests.conftest import triton_where_it_serves


def tiny() -> nn.Module:
    made = nn.ModuleDict({"attn": nn.ModuleDict({"qkv": nn.Linear(8, 24), "proj": nn.Linear(8, 8)})})
    made["norm1"], made["mlp"] = nn.LayerNorm(8), nn.ModuleDict({"fc1": nn.Linear(8, 16), "fc2": nn.Linear(16, 8)})
    made["merger"] = nn.ModuleDict({"2": nn.Linear(8, 4)})
    return made


def forward(made: nn.Module, x: torch.Tensor) -> torch.Tensor:
    m = dict(made.named_modules())
    q, k, v = m["attn.qkv"](m["norm1"](x)).view(-1, 3, 2, 4).unbind(1)  # (T, H, D)
    q, k = q * 2, k.neg()
    heads = (y.transpose(0, 1) for y in (q, k, v))
    out = F.scaled_dot_product_attention(*heads).transpose(0, 1).reshape(-1, 8)
    x = x + m["attn.proj"](out)
    x = x + m["mlp.fc2"](torch.sigmoid(m["mlp.fc1"](x)))
    return F.gelu(m["merger.2"](x))


def test_operations_are_sorted_by_the_parameters_around_them():
    made, x = tiny(), torch.randn(6, 8)
    with torch.inference_mode():
        found = trace(lambda: forward(made, x), made)
    counts = {part: found.launches[part] for part in PARTS}
    assert counts.pop("attention") >= 1  # the copy after it depends on the version's layout
    assert counts == {
        "linear": 4, "rotary": 2, "norm": 1, "activation": 1, "residual, copies": 2, "patch embedding": 0, "merger": 2,
        "other": 0,
    }  # fmt: skip
    assert set(found.seconds) == {part for part in PARTS if found.launches[part]} and min(found.seconds.values()) > 0
    # Rotary: two of (6, 2, 4) floats, read and written. Activation: (6, 16) likewise. Residual: two read, one written.
    assert found.bytes["rotary"] == 2 * 2 * 48 * 4
    assert found.bytes["activation"] == 2 * 96 * 4
    assert found.bytes["residual, copies"] == 2 * 3 * 48 * 4
    assert found.bytes["norm"] == (2 * 48 + 16) * 4
    assert found.of_layers(found.launches) == sum(found.launches[part] for part in LAYER)


def test_views_in_place_and_given_outputs():
    made, x, y = tiny(), torch.randn(6, 8), torch.empty(6, 8)

    def bytes_of(call) -> int:
        with torch.inference_mode():
            return trace(call, made).bytes["other"]

    assert bytes_of(lambda: x.view(8, 6).t().unsqueeze(0)) == 0
    assert bytes_of(lambda: torch.empty(1000)) == 0
    assert bytes_of(lambda: y.copy_(x)) == 2 * 192
    assert bytes_of(lambda: y.mul_(x)) == 3 * 192
    assert bytes_of(lambda: torch.add(x, x[:1].expand(6, 8), out=y)) == 192 + 32 + 192


def test_a_product_of_converted_weights_is_linear(monkeypatch):
    monkeypatch.setattr(matmul, "slow_on_cpu", lambda dtype: True)
    made, x = tiny().bfloat16(), torch.randn(40, 8).bfloat16()
    fc1 = dict(made.named_modules())["mlp.fc1"]
    with torch.inference_mode():
        found = trace(lambda: matmul.linear(x, fc1.weight, fc1.bias).sigmoid(), made)
    assert found.launches == {"other": 1, "linear": 3, "activation": 2}  # x; weight, bias and product; rounding


def test_triton_kernels_are_seen_beside_the_dispatcher():
    serves = triton_where_it_serves()
    x, weight = torch.randn(4, 16), torch.ones(16)
    made = nn.ParameterDict({"norm1": nn.Parameter(weight)})
    with torch.inference_mode(), use_backend(**serves):
        found = trace(lambda: rms_norm(x, made["norm1"]), made)
    assert found.launches["norm"] >= 1 and found.bytes["norm"] >= 2 * x.nbytes


def test_tower(tmp_path):
    """Its gate holds the patched tower and ours to transformers'."""
    with Context(quick=True, checkpoint_dir=tmp_path) as context:
        result = run_case(tower.CASE, context)
    assert {row["provider"] for row in result["rows"]} == {"ours", tower.PATCHED, tower.STOCK}
    assert sorted(check["name"].split(", 2x")[0] for check in result["gate"]) == sorted(
        f"{dtype} {who}" for dtype in ("float32", "bf16") for who in ("ours", tower.PATCHED)
    )
    metrics = {(row["workload"].split(",")[0], row["metric"]) for row in result["rows"]}
    assert {("tower", "time"), ("seconds by part", "attention"), ("traffic of a layer", "all")} <= metrics
    of_stock = {
        row["metric"]: row["median"]
        for row in result["rows"]
        if row["provider"] == tower.STOCK and row["workload"].startswith("launches")
    }
    assert of_stock["linear"] == 4 and of_stock["norm"] == 2  # qkv, proj, fc1 and fc2; norm1 and norm2


def test_the_tower_by_graph(tmp_path, monkeypatch):
    """Without a GPU it is left out and says why; a stand-in is held to the two-times rule; one that fails costs itself
    alone."""
    with Context(quick=True, checkpoint_dir=tmp_path) as context, torch.inference_mode():
        folder = checkpoint(context, "small", small_config(), torch.float32, 0.1)
        ours = Ours(folder, context.device, torch.float32)
        rows, grid = tower.pack(tower.GATE, context.device)
        with pytest.raises(Skip, match="graphs: wants a model on a CUDA device"):
            by_graph(lambda: ours, rows, grid).ready()
        exact = ours.vision(rows, grid)
        assert not graph_check(ours, rows, grid, exact * 1.01, exact).passed
        monkeypatch.setattr(KVCache, "asynchronous", staticmethod(lambda device: True))
        monkeypatch.setattr(graphs, "new_pool", object)
        monkeypatch.setattr(tower_graph, "capture", lambda run, device, pool: (lambda: None, run()))
        monkeypatch.setattr(tower_graph, "reads_host", lambda backend: False)
        with use_backend(vision_positions="scan"):  # what was captured has seen no picture yet
            check = graph_check(ours, rows, grid, exact * 1.01, exact)
            assert check.provider == BY_GRAPH and not check.passed
            monkeypatch.setattr(tower_graph, "_of_models", weakref.WeakKeyDictionary())
            monkeypatch.setattr(tower_graph, "capture", _run_again)
            assert graph_check(ours, rows, grid, exact * 1.01, exact).passed
            call = by_graph(lambda: ours, rows, grid).ready().call
            assert call is not None and torch.allclose(call(), exact, rtol=1e-4, atol=1e-4)


def _run_again(run, device, pool):
    made = run()
    return lambda: made.copy_(run()), made


def test_transformers_that_fails_takes_nothing_of_ours_away(tmp_path, monkeypatch):
    """The gates of the models hold ours to our own formula then."""

    class Failing:
        def __init__(self, *given, **named):
            raise AttributeError("transformers has changed")

    monkeypatch.setattr(tower, "Transformers", Failing)
    monkeypatch.setattr(model, "Transformers", Failing)
    with Context(quick=True, checkpoint_dir=tmp_path) as context, torch.inference_mode():
        for checks, first in ((tower.gate(context), "float32 ours"), (model.gate(context), "bf16 vision from floats")):
            assert checks[0].name.startswith(first) and all(check.passed for check in checks)
            assert not any(tower.PATCHED in check.name for check in checks)


def test_e2e(tmp_path):
    """Its gate compares the tokens of all three; afterwards transformers is as it was."""
    from transformers.models.qwen2_vl.modeling_qwen2_vl import VisionAttention

    stock = VisionAttention.forward
    with Context(quick=True, checkpoint_dir=tmp_path) as context:
        result = run_case(e2e.CASE, context)
    assert VisionAttention.forward is stock
    assert {row["provider"] for row in result["rows"]} == {"ours", e2e.PATCHED, e2e.STOCK}
    assert {check["name"] for check in result["gate"]} >= {f"float32 tokens, {e2e.PATCHED}", "float32 tokens, ours"}
    rows = {(row["provider"], row["metric"]): row["median"] for row in result["rows"]}
    for who in ("ours", e2e.PATCHED, e2e.STOCK):
        assert 0 < rows[who, "picture to rows"] < rows[who, "first token"]
        assert rows[who, "each token after it"] > 0


def test_the_patched_provider_is_patched_and_the_stock_one_is_not(tmp_path, monkeypatch):
    from transformers.models.qwen2_vl.modeling_qwen2_vl import VisionAttention

    from qwen2vl_kernels.integrations._target import MARK

    seen = []
    monkeypatch.setattr(e2e.TransformersAnswers, "__call__", lambda self, *given: seen.append(VisionAttention.forward))
    with Context(checkpoint_dir=tmp_path) as context:
        folder = checkpoint(context, "small", small_config())
        for declared in e2e._providers(context, folder, e2e.QUICK, torch.bfloat16)[1:]:
            provider = declared.ready()
            assert provider.before is not None and provider.call is not None
            provider.before()
            provider.call()
    assert [bool(getattr(forward, MARK, False)) for forward in seen] == [True, False]
