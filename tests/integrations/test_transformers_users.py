"""Single things that users of a patched transformers ran into; what they do to whole models is in the matrix."""

from __future__ import annotations

import copy
import gc
import importlib
import io
import warnings
from types import MethodType
from typing import Any

import pytest
import torch
from torch import nn

from qwen2vl_kernels.integrations import transformers as adapter

from ..kernels.ops.mrope_layouts import IMAGE
from .tiny_models import FAMILIES, LEFT_OFF, TOKEN_TYPES, VERSION, VERSION_5, model, prompt

#: float32 through some layers: two orders of the same sums differ by less, relative to the largest value.
ROUNDING = 1e-5
NAMES = {"Qwen2VL": "qwen2_vl", "Qwen2_5_VL": "qwen2_5_vl", "Qwen3VL": "qwen3_vl"}


@pytest.fixture(autouse=True)
def restored():
    adapter.restore()
    with warnings.catch_warnings():
        warnings.simplefilter("error", adapter.PatchWarning)
        for feature in LEFT_OFF:
            warnings.filterwarnings("ignore", f".* {feature} is left off", adapter.PatchWarning)
        yield
        adapter.restore()


def _source(family: str) -> Any:
    name = NAMES[family]
    return importlib.import_module(f"transformers.models.{name}.modeling_{name}")


def _logits(net: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """At the tokens that are not padding."""
    net.model.rope_deltas = None  # stock keeps those of the batch before
    with torch.no_grad():
        return net(**inputs).logits[inputs["attention_mask"].bool()]


def _close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=ROUNDING * float(want.abs().max()))


def _classes(net: nn.Module) -> list[type]:
    return [type(module) for module in net.modules()]


# ---------------------------------------------------------------------------------------------- copies


def test_copies_of_a_patched_model_are_patched_and_restored():
    net, inputs = model("Qwen2VL"), prompt("Qwen2VL")
    classes, want = _classes(net), _logits(net, inputs)
    adapter.apply(net)
    copies = [copy.deepcopy(net), copy.deepcopy(copy.deepcopy(net))]
    assert all(_classes(one) == _classes(net) != classes for one in copies)
    gc.collect()  # the copy that was copied
    applied = [row.label for row in adapter.status() if row.state == "applied"]
    assert "PatchEmbed.forward of one object (3)" in applied
    assert adapter.apply(copies[0]) == adapter.status(), "a copy is patched already, and nobody is warned"
    _close(_logits(copies[1], inputs), want)
    adapter.restore()
    assert all(_classes(one) == classes for one in (net, *copies))
    assert torch.equal(_logits(copies[1], inputs), want)


def test_a_saved_model_is_stocks():
    net, inputs = model("Qwen2VL"), prompt("Qwen2VL")
    classes, want = _classes(net), _logits(net, inputs)
    adapter.apply(net)
    kept = io.BytesIO()
    torch.save(net, kept)
    assert b"qwen2vl_kernels" not in kept.getvalue()
    kept.seek(0)
    loaded = torch.load(kept, weights_only=False)
    assert _classes(loaded) == classes and torch.equal(_logits(loaded, inputs), want)


def _replica(module: nn.Module, scale: float) -> Any:
    """As ``nn.DataParallel`` makes them for each device, with weights that differ."""
    made: Any = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        made._modules[name] = None if child is None else _replica(child, scale)
    weights = {name: p if p is None else nn.Parameter(p.detach() * scale) for name, p in module._parameters.items()}
    made._parameters = weights  # there they are no parameters, for lack of which transformers' models do not run
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_replicas_run_their_own_weights(family):
    net, inputs = model(family), prompt(family)
    wants = [_logits(_replica(net, scale), inputs) for scale in (1.0, 1.1)]
    adapter.apply(net)
    for scale, want in zip((1.0, 1.1), wants, strict=True):
        _close(_logits(_replica(net, scale), inputs), want)


# ------------------------------------------------------------------------------------- others' code


def test_an_attention_of_the_users_is_left_alone():
    source = _source("Qwen2VL")

    class Attention(source.Qwen2VLAttention):  # type: ignore[name-defined]
        def forward(self, *args, **kwargs):
            out, weights = super().forward(*args, **kwargs)
            return out * 2, weights

    net, inputs = model("Qwen2VL"), prompt("Qwen2VL")
    layers = net.model.language_model.layers
    layers[0].self_attn.__class__ = Attention
    layers[1].mlp.forward = MethodType(lambda self, x: self.down_proj(self.up_proj(x)), layers[1].mlp)
    want = _logits(net, inputs)
    with pytest.warns(adapter.PatchWarning, match="leaves alone what runs other code") as told:
        rows = adapter.apply(net)
    assert sum("leaves alone" in str(one.message) for one in told) == 2, "one for mrope, one for activation"
    skipped = [row for row in rows if row.state == "skipped" and row.feature.split(": ")[1] not in LEFT_OFF]
    left = {row.label: row.reason for row in skipped}
    assert left.keys() == {"Attention.forward of one object", "Qwen2MLP.forward of one object"}
    assert left["Attention.forward of one object"] == f"runs code of {__name__}, which is left alone"
    _close(_logits(net, inputs), want)
    adapter.restore()
    adapter.apply()  # the subclass calls the class's
    _close(_logits(net, inputs), want)


def test_classes_that_another_package_put_there_are_left_alone(monkeypatch):
    """As after ``apply_liger_kernel_to_qwen2_vl()``: classes that other models share, and functions."""
    source = _source("Qwen2VL")
    rms = "Qwen2VLRMSNorm" if VERSION >= (5, 2) else "Qwen2RMSNorm"

    class ForGemma(nn.Module):
        def __init__(self, width, eps=1e-6):
            super().__init__()
            self.weight, self.variance_epsilon = nn.Parameter(torch.zeros(width)), eps

        def forward(self, hidden_states):
            return nn.functional.rms_norm(hidden_states, self.weight.shape, 1 + self.weight, self.variance_epsilon)

    class Gated(source.Qwen2MLP):  # type: ignore[name-defined]
        def __init__(self, config):
            super().__init__(config)
            del self.act_fn

        def forward(self, x):
            return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))

    monkeypatch.setattr(source, rms, ForGemma)
    monkeypatch.setattr(source, "Qwen2MLP", Gated)
    monkeypatch.setattr(source, "apply_rotary_pos_emb_vision", lambda q, k, cos, sin: (q, k))
    forwards = [vars(cls)["forward"] for cls in (ForGemma, Gated)]
    net, inputs = model("Qwen2VL"), prompt("Qwen2VL")
    want = _logits(net, inputs)
    adapter._patches_of.cache_clear()  # a set looks its classes up once
    with pytest.warns(adapter.PatchWarning) as told:
        rows = adapter.apply(features=[f for f in adapter.FEATURES if f != "vision_attention"])
    skipped = {row.feature for row in rows if row.state == "skipped"}
    features = {name for name in skipped if name.split(": ")[1] not in LEFT_OFF}
    assert features == {"qwen2_vl: activation", "qwen2_vl: vision_rope"} | (
        {"qwen2_vl: norm"} if VERSION >= (5, 2) else set()
    )
    assert len(told) == len(skipped)
    assert any(row.reason == f"is {__name__}.{Gated.__qualname__}, which somebody put there" for row in rows)
    assert [vars(cls)["forward"] for cls in (ForGemma, Gated)] == forwards
    _close(_logits(net, inputs), want)
    adapter.restore()
    adapter._patches_of.cache_clear()


class _Centred(nn.LayerNorm):
    """Has what an RMSNorm has, and is none."""

    variance_epsilon = 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_a_norm_of_another_kind_keeps_its_formula(family):
    net, inputs = model(family), prompt(family)
    for block in net.model.visual.blocks:
        block.norm2 = _Centred(block.norm2.weight.shape[0])
    want = _logits(net, inputs)
    for which in (None, net):
        adapter.apply(which)
        _close(_logits(net, inputs), want)
        assert {(row.state, row.reason) for row in adapter.status(net) if row.label.startswith("model.visual.bl")} == {
            ("stock", "norm2: hooked, or not transformers' own")
        }
        adapter.restore()


@pytest.mark.parametrize("change", ["longer", "other activation", "tanh", "wrapped"])
def test_a_merger_of_other_layers_keeps_its_formula(change):
    net, inputs = model("Qwen2VL"), prompt("Qwen2VL")
    merger = net.model.visual.merger
    if change == "longer":
        merger.mlp.append(nn.Linear(64, 64))
    elif change == "wrapped":
        merger.mlp = nn.Sequential(merger.mlp, nn.LayerNorm(64))
    else:
        merger.mlp[1] = nn.GELU(approximate="tanh") if change == "tanh" else nn.SiLU()
    want = _logits(net, inputs)
    for which in (None, net):
        adapter.apply(which)
        _close(_logits(net, inputs), want)
        adapter.restore()


# --------------------------------------------------------------------------------------------- hooks


@pytest.mark.parametrize("name", ["merger.mlp", "merger.mlp.1", "blocks.0.norm1", "patch_embed.proj"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "every"])
def test_status_says_what_runs_as_it_is(name, kind):
    net, inputs, calls = model("Qwen2VL"), prompt("Qwen2VL"), []
    adapter.apply()
    assert not [row for row in adapter.status(net) if row.state == "stock"]
    part = net.model.visual.get_submodule(name)
    if kind == "every":
        hook = nn.modules.module.register_module_forward_hook(lambda module, *_: calls.append(module))
    else:
        hook = getattr(part, f"register_{kind}_hook")(lambda module, *_: calls.append(module))
    rows = [row for row in adapter.status(net) if row.state == "stock"]
    net(**inputs).logits.sum().backward()
    hook.remove()
    assert part in calls
    if kind != "every":
        outer = {"merger": "merger", "blocks": "blocks.0", "patch_embed": "patch_embed"}[name.split(".")[0]]
        assert [(row.label, row.reason) for row in rows] == [
            (f"model.visual.{outer}", f"{name.removeprefix(f'{outer}.')}: hooked, or not transformers' own")
        ]


# --------------------------------------------------------------------------------- rotary embedding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_rotary_embedding_answers_as_stocks(family, dtype):
    """However it is called: transformers' own tests give it a number in x's place, and the same positions for all."""
    rotary = model(family).model.language_model.rotary_emb
    for shape, positions in (
        ((2, 5, 64), (3, 2, 5)),
        ((1,), (3, 1, 5)),
        *([((1,), (1, 5))] if VERSION >= (5, 19) else []),
    ):
        adapter.restore()
        x, positions = torch.randn(shape, dtype=dtype), torch.randint(0, 99, positions)
        want = rotary(x, positions)
        adapter.apply()
        got = rotary(x, positions)
        cos, sin = got
        assert len(got) == 2 and got[0] is not sin
        for one, other, stock in zip((cos, sin), (got[0], got[1]), want, strict=True):
            assert one.dtype == stock.dtype and torch.equal(one, stock) and torch.equal(other, stock)


@pytest.mark.parametrize("family", FAMILIES)
def test_sequences_that_share_their_positions(family):
    net = model(family).model.language_model
    given = {"inputs_embeds": torch.randn(2, 5, 64), "position_ids": torch.randint(0, 99, (3, 1, 5))}
    want = net(**given).last_hidden_state
    adapter.apply()
    _close(net(**given).last_hidden_state, want)


def test_casts_reach_tables_and_no_frequencies():
    """FSDP casts the tensors that a layer is called with, accelerate moves them."""
    from torch.distributed.utils import _apply_to_tensors

    rotary = model("Qwen2VL").model.language_model.rotary_emb
    x, positions = torch.randn(2, 5, 64), torch.randint(0, 99, (3, 2, 5))
    want = rotary(x, positions)
    adapter.apply()
    got = rotary(x, positions)
    cast = _apply_to_tensors(lambda t: t.bfloat16() if t.is_floating_point() else t, {"angles": got})["angles"]
    for low in (cast, got.to(torch.bfloat16)):
        assert low.of_rows(x)[1] is got.of_rows(x)[1] and low.of_rows(x)[1].dtype == torch.float32
        assert all(torch.equal(one, stock.bfloat16()) for one, stock in zip(low, want, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_attention_of_stocks_reads_tables(family):
    """Beside a rotary embedding of ours: hooked ones keep stock's forward, of a class of its own or not."""
    net, inputs = model(family), prompt(family)
    want = _logits(net, inputs)
    for layer in net.model.language_model.layers:
        layer.self_attn.forward = MethodType(type(layer.self_attn).forward, layer.self_attn)
    adapter.apply(features=["mrope"])
    _close(_logits(net, inputs), want)


@pytest.mark.parametrize("section", [[4, 6, 6], [0, 9, 1], [8, 8, 8], [6, 0, 2]])
def test_interleaved_sections_are_cut_as_stock_cuts_them(section):
    rope = {"rope_type": "default", "mrope_section": section}
    changes = {"rope_parameters": {**rope, "rope_theta": 1e4}} if VERSION_5 else {"rope_scaling": rope}
    net, inputs = model("Qwen3VL", **changes), prompt("Qwen3VL")
    want = _logits(net, inputs)
    adapter.apply()
    _close(_logits(net, inputs), want)


# ---------------------------------------------------------------------------------------- positions


def _positions(net: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw", "attention_mask")
    return net.model.get_rope_index(**{name: inputs[name] for name in names if name in inputs})


@pytest.mark.parametrize("hidden", ["all", "first", "last"])
@pytest.mark.parametrize("family", ["Qwen2VL", "Qwen3VL"])
def test_images_that_the_mask_hides(family, hidden):
    net, inputs = model(family), prompt(family, ((("image", 1, 4, 4), ("image", 1, 4, 4), ("image", 1, 4, 4)),))
    images = (inputs["input_ids"][0] == IMAGE).nonzero().flatten()
    inputs["attention_mask"][0, {"all": images, "first": images[:4], "last": images[-4:]}[hidden]] = 0
    want = _positions(net, inputs)
    adapter.apply(features=["positions"])
    for got, stock in zip(_positions(net, inputs), want, strict=True):
        assert torch.equal(got, stock)


@pytest.mark.skipif(not TOKEN_TYPES, reason="needs transformers 5.3, the first with token types")
@pytest.mark.parametrize("family", ["Qwen2VL", "Qwen3VL"])
def test_placeholders_of_type_text_are_text(family):
    """What sampling may emit: a placeholder in an answer, beside the prompt's image."""
    net, inputs = model(family), prompt(family, ((("image", 1, 4, 4),),))
    for name, tokens in (("input_ids", [7, IMAGE, 8]), ("mm_token_type_ids", [0] * 3), ("attention_mask", [1] * 3)):
        inputs[name] = torch.cat([inputs[name], torch.tensor([tokens], dtype=inputs[name].dtype)], 1)
    want = _positions(net, inputs)
    adapter.apply(features=["positions"])
    for got, stock in zip(_positions(net, inputs), want, strict=True):
        assert got.dtype == stock.dtype and torch.equal(got, stock)


# ------------------------------------------------------------------------------------------- export


class _Part(nn.Module):
    def __init__(self, part: nn.Module, **settings: Any) -> None:
        super().__init__()
        self.part, self.settings = part, settings

    def forward(self, x: torch.Tensor) -> Any:
        return self.part(x, **self.settings)


def _parts(family: str) -> dict[str, tuple[nn.Module, torch.Tensor]]:
    net, states = model(family), torch.randn(1, 4, 64)
    tower, language = net.model.visual, net.model.language_model
    layer, angles = language.layers[0], language.rotary_emb(states, torch.arange(4).expand(3, 1, 4))
    width = tower.blocks[0].norm1.weight.shape[0]
    tables = torch.randn(2, 8, width // 4).repeat(1, 1, 2).unbind()  # (T, D), of equal halves
    bounds = {"cu_seqlens": torch.tensor([0, 8], dtype=torch.int32), "position_embeddings": tables}
    return {
        "block": (_Part(tower.blocks[0], **bounds), torch.randn(8, width)),
        "patch_embed": (tower.patch_embed, torch.randn(8, 1176)),
        "merger": (tower.merger, torch.randn(8, width)),
        "layer": (_Part(layer, position_embeddings=angles), states),
        "mlp": (layer.mlp, states),
        "norm": (layer.input_layernorm, states),
    }


def _tensor(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("family", FAMILIES)
def test_exports_are_stocks(family):
    """A program without an operator that needs this package, with stock's results."""
    adapter.apply()
    for name, (part, x) in _parts(family).items():
        with torch.no_grad():
            want = _tensor(part(x))
            program = torch.export.export(part, (x,), strict=False)
            called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
            assert called and not [op for op in called if "qwen2vl" in op], name
            _close(_tensor(program.module()(x)), want)
            traced = torch.jit.trace(part, (x,))
            assert not [node.kind() for node in traced.inlined_graph.nodes() if "qwen2vl" in node.kind()]
            _close(_tensor(traced(x)), want)
