"""transformers' own models on these kernels: equal to stock, in all the ways in which they are called.

Runs with whichever transformers is installed, 4.57 to 5.24. What stock does is the oracle throughout.
"""

from __future__ import annotations

import importlib
import warnings
from types import MethodType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import DynamicCache

from qwen2vl_kernels import BackendError, plan_tiles, use_backend
from qwen2vl_kernels.core import tile_plan
from qwen2vl_kernels.integrations import transformers as adapter
from qwen2vl_kernels.integrations import transformers_attention

from ..conftest import assert_two_times, relative_error, triton_where_it_serves
from ..kernels.ops.mrope_layouts import IMAGE, PAD, VIDEO
from .tiny_models import FAMILIES, LEFT_OFF, ROWS, TOKEN_TYPES, VERSION, VERSION_5, WITH_VIDEO, model, prompt

#: float32 through some layers: two orders of the same sums differ by less, relative to the largest value.
ROUNDING = 1e-5

needs_positions = pytest.mark.skipif("positions" in LEFT_OFF, reason="no positions are replaced in this version")


def _needs_videos_of(family: str) -> None:
    if family == "Qwen3VL" and VERSION == (5, 3):
        pytest.skip("transformers 5.3 fails on a video for Qwen3-VL: it has no grid for its second frame pair")


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    """Every test starts and ends with stock's code, and no warning of ours goes unnoticed."""
    monkeypatch.delenv("QWEN2VL_KERNELS_DISABLE", raising=False)
    adapter.restore()
    with warnings.catch_warnings():
        warnings.simplefilter("error", adapter.PatchWarning)
        for feature in LEFT_OFF:
            warnings.filterwarnings("ignore", f".*: {feature} is left off", adapter.PatchWarning)
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
    return [feature for feature in adapter.DEFAULT if feature != "positions"]


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
    _needs_videos_of(family)
    net, inputs = model(family), prompt(family, WITH_VIDEO)
    want = _logits(net, inputs)
    adapter.apply(features=_without_positions())
    _close(_logits(net, inputs), want)


@pytest.mark.parametrize("feature", [f for f in adapter.DEFAULT if f not in {"image_processor", *LEFT_OFF}])
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


@pytest.mark.parametrize("family", FAMILIES)
def test_in_inference_mode_all_layers_share_their_tiles(family, monkeypatch):
    made = []
    make = tile_plan.make_tiles
    monkeypatch.setattr(tile_plan, "make_tiles", lambda *a, **given: made.append(a[0]) or make(*a, **given))
    net, inputs = model(family, num_hidden_layers=1), prompt(family, ((("image", 1, 2, 4),), (("image", 1, 2, 2),)))
    net.model.visual.blocks = net.model.visual.blocks[:2]
    adapter.apply()
    with torch.inference_mode(), use_backend(**triton_where_it_serves()):
        net(**inputs)
    assert 1 <= len(made) == len({id(x) for x in made})


# ------------------------------------------------------------------------------ as transformers calls them


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"cache_implementation": "static"}, {"use_cache": False}])
@pytest.mark.parametrize("family", FAMILIES)
def test_generate(family, options):
    net, inputs = model(family, std=0.2), prompt(family)  # wide, so that answers wander
    settings = {
        "max_new_tokens": 6,
        "do_sample": False,
        "pad_token_id": PAD,
        "suppress_tokens": [IMAGE, VIDEO],
        **options,
    }
    want = net.generate(**inputs, **settings)
    adapter.apply()
    assert torch.equal(net.generate(**inputs, **settings), want)
    assert len(set(want[0, -6:].tolist())) > 2, "an answer of one token shows nothing"


@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_attentions_and_hidden_states(family):
    """Versions differ in how they record what layers return; each model is a new one, as some leave traces in it."""

    def recorded() -> tuple[torch.Tensor, ...]:
        net = model(family)
        net.set_attn_implementation("eager")
        with torch.no_grad():
            out = net(**prompt(family, (ROWS[1],)), output_attentions=True, output_hidden_states=True)
        return (*out.attentions, *out.hidden_states)

    want = recorded()
    adapter.apply()
    got = recorded()
    assert len(got) == len(want) == 5
    for mine, theirs in zip(got, want, strict=True):
        _close(mine, theirs)


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
    before, classes = [dict(vars(module)) for module in one.modules()], _classes(one)
    rows = adapter.apply(one)
    mine = [row for row in rows if "of one object" in row.label and row.feature.split()[-1] not in LEFT_OFF]
    others = {row.state for row in rows if row not in mine and row.feature.split()[-1] not in LEFT_OFF}
    assert {row.state for row in mine} == {"applied"} and others <= {"off"}
    had = {row.feature.split()[-1] for row in mine}
    lacking = {"vision_rope", "image_processor"} | ({"merger", "positions"} if family == "Qwen2_5_VL" else set())
    assert had == set(adapter.DEFAULT) - lacking - LEFT_OFF
    assert adapter.apply(one) == rows, "twice is once"
    _close(_logits(one, inputs), want)
    _same(attributes, _attributes(family))
    assert _classes(other) == classes != _classes(one)
    assert [str(cls) for cls in _classes(one)] == [str(cls) for cls in classes], "what is printed or saved is as before"
    _assert_same_gradients(_gradients(one, inputs)[1], _gradients(other, inputs)[1], ROUNDING)
    adapter.restore()
    assert _classes(one) == classes
    one.model.rope_deltas = None
    for held, module in zip(before, one.modules(), strict=True):
        now = vars(module)
        assert held.keys() == now.keys() and all(held[name] is now[name] for name in held if name != "rope_deltas")


def _classes(net: nn.Module) -> list[type]:
    return [type(module) for module in net.modules()]


def _attributes(family: str) -> list[dict[str, Any]]:
    """Everything that the family's modules and their classes hold."""
    name = {"Qwen2VL": "qwen2_vl", "Qwen2_5_VL": "qwen2_5_vl", "Qwen3VL": "qwen3_vl"}[family]
    pixels = "image_processing_pil_qwen2_vl" if VERSION >= (5, 4) else "image_processing_qwen2_vl"
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
    rows = [row for row in adapter.apply() if row.feature.rpartition(" ")[2] in set(adapter.DEFAULT) - LEFT_OFF]
    assert {row.state for row in rows} == {"applied"}, [row for row in rows if row.state != "applied"]
    with pytest.raises(AssertionError):
        _same(before, _attributes(family))
    adapter.restore()
    _same(before, _attributes(family))
    assert {row.state for row in adapter.status()} == {"off"}


# --------------------------------------------------------------------------------------------- positions


@needs_positions
def test_positions_after_a_long_video():
    """The text after a video of more frame pairs than rows and columns: the paper's rule, and the decoding goes on."""
    net, inputs = model("Qwen2VL"), prompt("Qwen2VL", WITH_VIDEO)
    names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw", "attention_mask")
    arguments = {name: inputs[name] for name in names if name in inputs}
    stock, _ = net.model.get_rope_index(**arguments)
    adapter.apply(features=["positions"])
    got, delta = net.model.get_rope_index(**arguments)
    video = (inputs["input_ids"][0] == VIDEO).nonzero().flatten()
    start, after = int(got[0, 0, video[0]]), int(video[-1]) + 1
    assert got[:, 0, after].tolist() == [start + 5] * 3, "5 frame pairs of 1 x 2 tokens"
    assert int(delta) == int(got.max()) + 1 - inputs["input_ids"].shape[1]
    if TOKEN_TYPES:
        assert stock[:, 0, after].tolist() == [start + 2] * 3, "what is mended here is mended there: drop the feature"
    else:
        assert torch.equal(stock, got)


@needs_positions
@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_of_qwen3_are_stocks(side):
    """Timestamps stand between the frame pairs of a video, each of which counts for itself."""
    _needs_videos_of("Qwen3VL")
    net, inputs = model("Qwen3VL"), prompt("Qwen3VL", (*WITH_VIDEO, ROWS[0]), side=side)
    names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw", "attention_mask")
    arguments = {name: inputs[name] for name in names if name in inputs}
    stock = net.model.get_rope_index(**arguments)
    adapter.apply(features=["positions"])
    for got, want in zip(net.model.get_rope_index(**arguments), stock, strict=True):
        assert got.dtype == want.dtype and torch.equal(got, want)


def test_image_processor_gives_the_same_bytes(monkeypatch):
    if VERSION >= (5, 4):
        from transformers import Qwen2VLImageProcessorPil as Processor
    else:
        from transformers import Qwen2VLImageProcessor as Processor
    from qwen2vl_kernels.integrations import image_preprocess

    if VERSION == (5, 4):
        pytest.importorskip("torchvision", reason="transformers 5.4 has no image processor without torchvision")
    processor, calls = Processor(), []
    images = [np.random.default_rng(0).integers(0, 256, (50, 90, 3), dtype=np.uint8), Image.new("L", (70, 40), 99)]
    want = processor(images, return_tensors="pt")
    adapter.apply(features=["image_processor"])
    run = image_preprocess._patches
    monkeypatch.setattr(image_preprocess, "_patches", lambda *a, **k: (calls.append(1), run(*a, **k))[1])
    got = processor(images, return_tensors="pt")
    assert calls and torch.equal(got["pixel_values"], want["pixel_values"])
    assert torch.equal(torch.as_tensor(got["image_grid_thw"]), torch.as_tensor(want["image_grid_thw"]))
    nearest = {"resample": 0, "return_tensors": "pt"}  # what the kernel does not do is left to stock's code
    theirs = processor(images, **nearest)["pixel_values"]
    adapter.restore()
    assert torch.equal(theirs, processor(images, **nearest)["pixel_values"])


# ------------------------------------------------------------------------------------------- in the way


@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_run_and_see_what_they_would(family):
    """On norms, projections and linear layers whose parameters the kernels would read, or whose outputs overwrite."""
    net, inputs, seen = model(family), prompt(family), {}
    watched = [
        name for name, module in net.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv3d, nn.LayerNorm)) or type(module).__name__.endswith("RMSNorm")
    ]  # fmt: skip
    for name in watched:
        keep = lambda module, args, output, name=name: seen.__setitem__(name, output)  # noqa: E731
        net.get_submodule(name).register_forward_hook(keep)
    logits, want = _logits(net, inputs), {name: output.clone() for name, output in seen.items()}
    seen.clear()
    adapter.apply()
    _close(_logits(net, inputs), logits)
    assert seen.keys() == want.keys() == set(watched)
    for name, output in seen.items():
        _close(output, want[name])


class _Adapter(nn.Module):
    """A linear layer with something added, as LoRA has it; has no weight of its own."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.added = base, nn.Linear(base.in_features, base.out_features, dtype=base.weight.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.added(x)


@pytest.mark.parametrize("family", FAMILIES)
def test_adapted_linear_layers(family):
    net, inputs = model(family), prompt(family)
    for parent in list(net.modules()):
        if not isinstance(parent, _Adapter):
            for name, child in list(parent.named_children()):
                if type(child) is nn.Linear:
                    setattr(parent, name, _Adapter(child))
    want, (_, gradients) = _logits(net, inputs), _gradients(net, inputs)
    adapter.apply()
    _close(_logits(net, inputs), want)
    _assert_same_gradients(_gradients(net, inputs)[1], gradients, ROUNDING)


def test_scaled_rotary_embeddings_stay_stocks():
    rope = {"rope_type": "linear", "factor": 4.0, "mrope_section": [2, 3, 3]}
    changes = {"rope_parameters": {**rope, "rope_theta": 1e4}} if VERSION_5 else {"rope_scaling": rope}
    net, inputs = model("Qwen2VL", **changes), prompt("Qwen2VL")
    want = _logits(net, inputs)
    adapter.apply(features=["mrope"])
    _close(_logits(net, inputs), want)


def test_attention_takes_tables_that_somebody_else_made():
    net, inputs = model("Qwen2VL"), prompt("Qwen2VL")
    want = _logits(net, inputs)
    rotary = net.model.language_model.rotary_emb
    stock = type(rotary).forward
    adapter.apply(features=["mrope"])
    rotary.forward = MethodType(stock, rotary)
    _close(_logits(net, inputs), want)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_by_the_name_that_it_had(family):
    """Stock takes it with a warning; as one more keyword that nobody reads, it would be silently left empty."""
    old = "past_key_values" if VERSION >= (5, 24) else "past_key_value"
    if (5, 0) <= VERSION < (5, 24):
        pytest.skip("in this version it has one name")
    net, x = model(family), torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(2))
    text = net.model.language_model

    def run() -> tuple[torch.Tensor, int]:
        cache, positions = DynamicCache(), torch.arange(3).expand(3, 1, -1)
        given = {"position_embeddings": text.rotary_emb(x, positions), "attention_mask": None, old: cache}
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            out = text.layers[0].self_attn(x, cache_position=torch.arange(3), **given)[0]
        return out, cache.get_seq_length()

    want, length = run()
    assert length == 3
    adapter.apply(features=["mrope"])
    got, length = run()
    _close(got, want)
    assert length == 3


# -------------------------------------------------------------------------------------------- refusals


@needs_positions
def test_a_changed_signature_is_reported_and_the_rest_applied(monkeypatch):
    from transformers.models.qwen2_vl import modeling_qwen2_vl as source

    def forward(self, hidden_states, cu_seqlens, something_new, **kwargs):
        raise AssertionError

    monkeypatch.setattr(source.VisionAttention, "forward", forward)
    with pytest.warns(adapter.PatchWarning, match="qwen2_vl: vision_attention is left off: .*something_new"):
        rows = adapter.apply()
    skipped = {row.feature for row in rows if row.state == "skipped"}
    assert skipped == {"qwen2_vl: vision_attention"} and source.VisionAttention.forward is forward


@needs_positions
def test_a_missing_class_is_reported(monkeypatch):
    from transformers.models.qwen2_vl import modeling_qwen2_vl as source

    adapter._patches_of.cache_clear()  # a set looks its classes up once
    monkeypatch.delattr(source, "PatchMerger")
    with pytest.warns(adapter.PatchWarning, match="qwen2_vl: merger is left off: .*was not found"):
        rows = adapter.apply()
    assert {row.feature for row in rows if row.state == "skipped"} == {"qwen2_vl: merger"}


@pytest.mark.skipif((5, 0) <= VERSION < (5, 4), reason="classes of later versions have other names")
@pytest.mark.parametrize("version", ["5.99.0", "4.50.0", "6.0.0.dev0"] if VERSION_5 else ["4.58.0", "4.50.0"])
def test_an_unknown_version_warns(monkeypatch, version):
    """It goes by signatures: those of another major version do not fit, and are left alone."""
    monkeypatch.setattr("transformers.__version__", version)
    before = _attributes("Qwen2VL")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rows = adapter.apply()
    assert f"version {version} was never tested, only 4.57, 5.0, 5.1, " in str(caught[0].message)
    same_major = (int(version[0]) >= 5) == VERSION_5
    assert ("skipped" in {row.state for row in rows}) != same_major
    adapter.restore()
    _same(before, _attributes("Qwen2VL"))


def test_the_switch_leaves_everything(monkeypatch):
    monkeypatch.setenv("QWEN2VL_KERNELS_DISABLE", "1")
    before, net = _attributes("Qwen2VL"), model("Qwen2VL")
    for rows in (adapter.apply(), adapter.apply(net)):
        assert {(row.state, row.reason) for row in rows} == {("skipped", "QWEN2VL_KERNELS_DISABLE is set")}
    _same(before, _attributes("Qwen2VL"))
    assert _classes(net) == _classes(model("Qwen2VL"))


def test_one_model_after_the_classes_is_patched_already():
    net, inputs = model("Qwen2VL"), prompt("Qwen2VL")
    want = _logits(net, inputs)
    adapter.apply()
    with pytest.warns(adapter.PatchWarning, match="is patched already"):
        adapter.apply(net)
    assert _classes(net) == _classes(model("Qwen2VL"))
    _close(_logits(net, inputs), want)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="there is no feature 'rope'; the features are mrope, vision_rope"):
        adapter.apply(features=["norm", "rope"])
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got dict"):
        adapter.apply({})
    with pytest.raises(ValueError, match="Linear contains no Qwen2-VL"):
        adapter.apply(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="has nothing for 'vision_rope'; it has"):
        adapter.apply(model("Qwen2VL"), features=["norm", "vision_rope"])
    assert "applied" not in {row.state for row in adapter.status()}


class _OnDevice:
    """Boundaries on a GPU, as far as they are looked at; counts how often the host waits for them."""

    dtype, device, is_cuda, shape, _version, waits = torch.int32, torch.device("cuda", 0), True, (4,), 0, 0
    held = (0, 9, 9, 30)

    def __init__(self, inference=False):
        self.is_inference = lambda: inference

    def cpu(self):
        self.waits += 1
        return torch.tensor(self.held, dtype=torch.int32)


@pytest.fixture
def device(monkeypatch):
    """Says what is chosen for tensors on a GPU, and whether they are captured or compiled."""
    state = SimpleNamespace(chosen="torch", captured=False, compiled=False, cannot=False)

    def chosen(*_, backend=None, **__):
        if backend == "triton" and state.cannot:
            raise BackendError("too wide")
        return backend or state.chosen

    monkeypatch.setattr(transformers_attention, "chosen", chosen)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.captured)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: state.compiled)
    return state


def _qkv(gradients=False):
    return [SimpleNamespace(shape=(40, 2, 80), is_cuda=True, requires_grad=gradients) for _ in range(3)]


@pytest.mark.parametrize("inference", [False, True], ids=["ordinary", "inference"])
def test_boundaries_are_read_once_a_forward_and_only_for_others_kernels(device, inference):
    cu_seqlens: Any = _OnDevice(inference)
    layers = [object() for _ in range(3)]

    def forward():
        for layer in layers:
            shared = transformers_attention._shared(cu_seqlens, layer)
            read, longest, backend = transformers_attention.bounds(shared, cu_seqlens, None, *_qkv())
            if device.chosen == "triton":
                assert (read, longest, backend) == (cu_seqlens, 40, None)
            else:
                assert read.tolist() == list(cu_seqlens.held) and longest == max(read.diff()) and backend is None

    device.chosen = "triton"
    forward()
    assert cu_seqlens.waits == 0
    for device.chosen in ("torch", "fa3_fwd_interface", "sdpa"):
        forward()
    assert cu_seqlens.waits == (3 if inference else 1), "of inference tensors no forward knows what another read"
    cu_seqlens._version, cu_seqlens.held = 1, (0, 3, 9, 30)
    forward()
    assert cu_seqlens.waits == (4 if inference else 2), "they were written to"


def test_what_transformers_says_is_not_read(device):
    cu_seqlens: Any = _OnDevice()
    for device.compiled in (False, True):
        assert transformers_attention.bounds({}, cu_seqlens, 21, *_qkv()) == (cu_seqlens, 21, None)
    assert cu_seqlens.waits == 0


@pytest.mark.parametrize("how", ["captured", "compiled"])
def test_boundaries_that_nobody_may_read(device, how):
    """All rows are a bound for which others' kernels would launch programs in every segment."""
    setattr(device, how, True)
    cu_seqlens: Any = _OnDevice()

    def backend(gradients=False):
        read, longest, backend = transformers_attention.bounds({}, cu_seqlens, None, *_qkv(gradients))
        assert read is cu_seqlens and longest == 40 and cu_seqlens.waits == 0
        return backend

    assert backend() == "triton"
    with torch.no_grad():
        assert backend(gradients=True) == "triton"
    assert backend(gradients=True) is None, "ours was measured slower there"
    with use_backend(varlen_attention="torch"):
        assert backend() is None
    device.cannot = True
    assert backend() is None
    device.cannot, cu_seqlens.shape = False, (2,)
    assert backend() is None, "one segment has all rows"


def test_plans_of_inference_tensors_are_of_one_forward(monkeypatch):
    monkeypatch.setattr(transformers_attention, "reads_host", lambda backend: False)
    layers = [object() for _ in range(2)]
    q = torch.randn(9, 2, 8)
    with torch.inference_mode():
        cu_seqlens = torch.tensor([0, 2, 9], dtype=torch.int32)

        def forward():
            plans = []
            for layer in layers:
                shared = transformers_attention._shared(cu_seqlens, layer)
                plans.append(transformers_attention._tiles(shared, cu_seqlens, 9, None, q, q, q))
            assert plans[0] is plans[1]
            return plans[0].tiles(4).tolist()

        before = forward()
        cu_seqlens.copy_(torch.tensor([0, 6, 9]))
        after = forward()
    assert before != after == plan_tiles(torch.tensor([0, 6, 9], dtype=torch.int32), 9).tiles(4).tolist()
