"""transformers' own models on these kernels: equal to stock, in all the ways in which they are called.

Runs with whichever transformers is installed, 4.57 or 5. What stock does is the oracle throughout.
"""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from qwen2vl_kernels import use_backend
from qwen2vl_kernels.integrations import transformers as adapter

from ..conftest import assert_two_times, relative_error, triton_where_it_serves
from ..kernels.mrope_layouts import IMAGE, PAD, VIDEO
from .tiny_models import FAMILIES, VERSION_5, WITH_VIDEO, model, prompt

#: float32 through some layers: two orders of the same sums differ by less, relative to the largest value.
ROUNDING = 1e-5


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    """Every test starts and ends with stock's code, and no warning of ours goes unnoticed."""
    monkeypatch.delenv("QWEN2VL_KERNELS_DISABLE", raising=False)
    adapter.restore()
    with warnings.catch_warnings():
        warnings.simplefilter("error", adapter.PatchWarning)
        yield
        adapter.restore()


def _logits(net: Any, inputs: dict[str, Any], **options: Any) -> torch.Tensor:
    """At the tokens that are not padding."""
    net.model.rope_deltas = None  # stock keeps those of the batch before
    with torch.no_grad():
        logits = net(**inputs, **options).logits
    return logits[inputs["attention_mask"].bool()]


def _gradients(net: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    net.model.rope_deltas = None
    net.zero_grad()
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    loss = net(**inputs, labels=labels).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def _assert_same_gradients(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], rounding: float) -> None:
    assert got.keys() == want.keys()
    largest = max(float(g.norm()) for g in want.values())
    for name, gradient in want.items():  # one that is nothing but rounding (of a key's bias) is held to the largest
        error = (got[name] - gradient).norm() / max(float(gradient.norm()), 1e-3 * largest)
        assert error < rounding, f"{name}: {error:.2g}"


def _close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=ROUNDING * float(want.abs().max()))


def _without_positions() -> list[str]:
    """Where there is a video, stock's positions stand, so that the rest can be compared."""
    return [feature for feature in adapter.FEATURES if feature != "positions"]


# ------------------------------------------------------------------------------------------ equal to stock


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_of_a_padded_batch(family, side):
    net, inputs = model(family), prompt(family, side=side)
    want, (loss, gradients) = _logits(net, inputs), _gradients(net, inputs)
    adapter.apply()
    _close(_logits(net, inputs), want)
    got_loss, got = _gradients(net, inputs)
    _close(got_loss, loss)
    _assert_same_gradients(got, gradients, ROUNDING)


@pytest.mark.parametrize("family", FAMILIES)
def test_video_and_image(family):
    net, inputs = model(family), prompt(family, WITH_VIDEO)
    want = _logits(net, inputs)
    adapter.apply(features=_without_positions())
    _close(_logits(net, inputs), want)


@pytest.mark.parametrize("feature", [f for f in adapter.FEATURES if f != "image_processor"])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_feature_alone(family, feature):
    """Alone, a feature works between stock's functions, and changes what it is about and no other."""
    net, inputs = model(family), prompt(family)
    want = _logits(net, inputs)
    rows = adapter.apply(features=[feature])
    assert {row.feature.rpartition(" ")[2] for row in rows if row.state == "applied"} == {feature}
    _close(_logits(net, inputs), want)
    _assert_same_gradients(_gradients(net, inputs)[1], _stock_gradients(net, inputs), ROUNDING)


def _stock_gradients(net: Any, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    adapter.restore()
    return _gradients(net, inputs)[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_by_the_two_times_rule(family):
    rows = ((("image", 1, 16, 18), ("image", 1, 2, 6)),)  # 300 patches: blocked attention and idle rows
    exact = _logits(model(family), prompt(family, rows))
    low, inputs = model(family, torch.bfloat16), prompt(family, rows, dtype=torch.bfloat16)
    stock = _logits(low, inputs)
    adapter.apply()
    got = _logits(low, inputs)
    assert not torch.equal(got, stock), "in bf16 the kernels round differently: nothing was replaced"
    assert_two_times(got, stock, exact, 1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_in_triton(family):
    """Forward and backward on the kernels themselves, interpreted where there is no GPU."""
    backends = triton_where_it_serves()
    net, inputs = model(family, num_hidden_layers=1), prompt(family, ((("image", 1, 2, 4),), (("image", 1, 2, 2),)))
    net.model.visual.blocks = net.model.visual.blocks[:2]
    want, (_, gradients) = _logits(net, inputs), _gradients(net, inputs)
    adapter.apply()
    with use_backend(**backends):
        _close(_logits(net, inputs), want)
        _assert_same_gradients(_gradients(net, inputs)[1], gradients, 1e-4)


# ------------------------------------------------------------------------------ as transformers calls them


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"cache_implementation": "static"}, {"use_cache": False}])
@pytest.mark.parametrize("family", FAMILIES)
def test_generate(family, options):
    net, inputs = model(family, std=0.2), prompt(family)  # wide, so that answers wander
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": PAD, "suppress_tokens": [IMAGE, VIDEO], **options}
    want = net.generate(**inputs, **settings)
    adapter.apply()
    assert torch.equal(net.generate(**inputs, **settings), want)
    assert len(set(want[0, -6:].tolist())) > 2, "an answer of one token shows nothing"


@pytest.mark.parametrize("family", FAMILIES)
def test_training_steps_with_checkpointed_layers(family):
    """Loss and weights after two steps of AdamW, activations recomputed in the backward."""

    def train(patched: bool) -> tuple[list[float], torch.Tensor]:
        net, inputs, losses = model(family).train(), prompt(family), []
        net.gradient_checkpointing_enable({"use_reentrant": False})
        if patched:
            adapter.apply(net)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, eps=1e-2)  # eps: no step out of rounding alone
        for _ in range(2):
            loss, _ = _gradients(net, inputs)
            losses.append(float(loss))
            optimizer.step()
        return losses, torch.cat([p.detach().flatten() for p in net.parameters()])

    (want, want_weights), (got, got_weights) = train(False), train(True)
    assert want[1] < want[0] and got == pytest.approx(want, rel=ROUNDING)
    assert relative_error(got_weights, want_weights) < ROUNDING


@pytest.mark.parametrize("family", FAMILIES)
def test_frozen_tower_trains_the_rest(family):
    """The tower then runs in place although gradients are on."""
    net, inputs = model(family), prompt(family)
    net.model.visual.requires_grad_(False)
    _, want = _gradients(net, inputs)
    adapter.apply()
    _assert_same_gradients(_gradients(net, inputs)[1], want, ROUNDING)


@pytest.mark.parametrize("family", FAMILIES)
def test_autocast(family):
    """Mixed dtypes inside of a module go stock's way; the rest stays as exact as stock."""
    net, inputs = model(family), prompt(family)
    exact = _logits(net, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        stock = _logits(net, inputs)
        _, want = _gradients(net, inputs)
        adapter.apply()
        assert_two_times(_logits(net, inputs), stock, exact, 1e-3)
        _, got = _gradients(net, inputs)
    assert got.keys() == want.keys() and all(g.isfinite().all() for g in got.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_compiled(family):
    """Tower blocks and decoder layers in one graph each, as stock's; the whole call equal to the plain one."""
    net, inputs = model(family), prompt(family)
    want = _logits(net, inputs)
    adapter.apply()
    torch._dynamo.reset()
    for layers in (net.model.visual.blocks, net.model.language_model.layers):
        for layer in layers:
            layer.compile(fullgraph=True, backend="aot_eager", dynamic=False)
    _close(_logits(net, inputs, use_cache=False), want)
    loss, gradients = _gradients(net, inputs)
    assert loss.isfinite() and all(g.isfinite().all() for g in gradients.values())


# --------------------------------------------------------------------------- before, after, on one of many


@pytest.mark.parametrize("family", FAMILIES)
def test_before_instantiation(family):
    want = _logits(model(family), prompt(family))
    adapter.apply()
    _close(_logits(model(family), prompt(family)), want)


@pytest.mark.parametrize("family", FAMILIES)
def test_on_one_model(family, monkeypatch):
    """One model's own modules and nothing else: not another model, not the classes."""
    one, other, inputs = model(family), model(family), prompt(family)
    want, attributes = _logits(one, inputs), _attributes(family)
    before = [dict(vars(module)) for module in one.modules()]
    rows = adapter.apply(one)
    mine = [row for row in rows if "of one object" in row.label]
    assert {row.state for row in mine} == {"applied"} and {row.state for row in rows if row not in mine} <= {"off"}
    had = {row.feature.split()[-1] for row in mine}
    lacking = {"vision_rope", "image_processor"} | ({"merger", "positions"} if family == "Qwen2_5_VL" else set())
    assert had == set(adapter.FEATURES) - lacking
    assert adapter.apply(one) == rows, "twice is once"
    _close(_logits(one, inputs), want)
    _same(attributes, _attributes(family))
    assert not [m for m in other.modules() if "forward" in vars(m)]
    assert [m for m in one.modules() if "forward" in vars(m)]
    _assert_same_gradients(_gradients(one, inputs)[1], _gradients(other, inputs)[1], ROUNDING)
    adapter.restore()
    one.model.rope_deltas = None
    for held, module in zip(before, one.modules(), strict=True):
        now = vars(module)
        assert held.keys() == now.keys() and all(held[name] is now[name] for name in held if name != "rope_deltas")


def _attributes(family: str) -> list[dict[str, Any]]:
    """Everything that the family's modules and their classes hold."""
    name = {"Qwen2VL": "qwen2_vl", "Qwen2_5_VL": "qwen2_5_vl", "Qwen3VL": "qwen3_vl"}[family]
    pixels = "image_processing_pil_qwen2_vl" if VERSION_5 else "image_processing_qwen2_vl"
    paths = (f"{name}.modeling_{name}", "qwen2.modeling_qwen2", f"qwen2_vl.{pixels}")
    modules = [importlib.import_module(f"transformers.models.{path}") for path in paths]
    classes = [c for m in modules for c in vars(m).values() if isinstance(c, type) and "transformers" in c.__module__]
    return [dict(vars(owner)) for owner in (*modules, *classes, nn.LayerNorm, nn.Linear, nn.Conv3d, nn.Module)]


def _same(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> None:
    for a, b in zip(before, after, strict=True):
        assert a.keys() == b.keys() and all(a[name] is b[name] for name in a)


@pytest.mark.parametrize("family", FAMILIES)
def test_restore_leaves_every_attribute_as_it_was(family):
    before = _attributes(family)
    rows = adapter.apply()
    assert {row.state for row in rows} == {"applied"}, [row for row in rows if row.state != "applied"]
    with pytest.raises(AssertionError):
        _same(before, _attributes(family))
    adapter.restore()
    _same(before, _attributes(family))
    assert {row.state for row in adapter.status()} == {"off"}
