"""get_rope_index in transformers' place: equal to 5.23 where that is right, to the goldens of 4.57, in generate()."""

from __future__ import annotations

import json
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel

from qwen2vl_kernels.integrations.transformers import get_rope_index

from ..kernels.ops.mrope_layouts import IMAGE, PAD, VIDEO, batches, expected_batch, grids, token_ids

GOLDEN = json.loads((Path(__file__).resolve().parent.parent / "golden" / "mrope_positions.json").read_text())
VISION_START, VISION_END = 5, 6
VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
pytestmark = pytest.mark.skipif(VERSION == (5, 2), reason="get_rope_index is not for transformers 5.2")
NEW = VERSION >= (5, 3)  # which conventions the version at hand has itself


def _owner(merge_size: int = 2, image: int = IMAGE, video: int = VIDEO) -> Any:
    """What the function reads of a model; stock's own method runs on it too."""
    vision = SimpleNamespace(spatial_merge_size=merge_size)
    owner = SimpleNamespace(config=SimpleNamespace(image_token_id=image, video_token_id=video, vision_config=vision))
    if NEW:
        owner.get_vision_position_ids = MethodType(Qwen2VLModel.get_vision_position_ids, owner)
    return owner


def _golden(case) -> Any:
    owner = _owner(GOLDEN["spatial_merge_size"], GOLDEN["ids"]["image_pad"], GOLDEN["ids"]["video_pad"])
    names = ("image_grid_thw", "video_grid_thw", "attention_mask")
    found = (None if case[name] is None else torch.tensor(case[name]) for name in names)
    return owner, torch.tensor(case["input_ids"]), *found


def _types(ids: torch.Tensor, image: int = IMAGE, video: int = VIDEO) -> torch.Tensor:
    return (ids == image).int() + 2 * (ids == video).int()


@pytest.fixture
def version_4(monkeypatch):
    monkeypatch.setattr("transformers.__version__", "4.57.6")


@pytest.fixture(params=["5.0.0", "5.1.0"])
def early_5(request, monkeypatch):
    """Versions that have the conventions of 4.x."""
    monkeypatch.setattr("transformers.__version__", request.param)


@pytest.fixture
def version_5(monkeypatch):
    """The conventions of 5.3 and later, whatever is installed."""
    if not NEW:
        monkeypatch.setattr("transformers.__version__", "5.23.0")


# ---------------------------------------------------------------------------------------------- results


@pytest.mark.parametrize("case", GOLDEN["cases"].values(), ids=GOLDEN["cases"])
def test_golden_of_4_57(case, version_4):
    """Positions, what pad slots hold, and deltas, as 4.57 returned them; by position and by name."""
    owner, ids, image, video, mask = _golden(case)
    for got in (
        get_rope_index(owner, ids, image, video, mask),
        get_rope_index(owner, input_ids=ids, image_grid_thw=image, video_grid_thw=video, attention_mask=mask),
    ):
        assert got[0].tolist() == case["position_ids"]
        assert got[1].tolist() == case["rope_deltas"]


def test_golden_of_4_57_in_early_5(early_5):
    for case in GOLDEN["cases"].values():
        got = get_rope_index(*_golden(case))
        assert (got[0].tolist(), got[1].tolist()) == (case["position_ids"], case["rope_deltas"])


@pytest.mark.parametrize("case", GOLDEN["cases"].values(), ids=GOLDEN["cases"])
def test_golden_in_the_conventions_of_5(case, version_5):
    owner, ids, image, video, mask = _golden(case)
    types = _types(ids, owner.config.image_token_id, owner.config.video_token_id)
    positions, delta = get_rope_index(owner, ids, types, image, video, mask, second_per_grid_ts=None)
    expected = torch.tensor(case["position_ids"]) * mask
    assert torch.equal(positions, expected)
    assert torch.equal(delta, expected.amax((0, 2))[:, None] + 1 - mask.sum(1, keepdim=True))


@pytest.mark.skipif(not NEW, reason="needs transformers 5.3; the results of 4.57 are the goldens")
@given(batch=batches())
def test_equal_to_transformers_without_videos(batch):
    """Any padding; text stands between images (5.x takes two that touch for one), and no row is empty (it fails)."""
    sequences, merge_size, mask = batch
    left = bool(mask.shape[1] and not mask[0, 0])
    sequences = [
        [("text", 1), *(p for part in parts if part[0] != "video" for p in (part, ("text", 1)))] for parts in sequences
    ]
    lengths = torch.tensor([[len(token_ids(parts))] for parts in sequences])
    slots = torch.arange(int(lengths.max()) + 2)
    mask = slots >= len(slots) - lengths if left else slots < lengths
    ids = expected_batch(sequences, mask)[0]
    owner, image = _owner(merge_size), grids(sequences, "image", merge_size)
    for padding in (mask, mask.long()):
        inputs: dict[str, Any] = {"input_ids": ids, "mm_token_type_ids": _types(ids), "image_grid_thw": image}
        inputs["attention_mask"] = padding
        theirs = Qwen2VLModel.get_rope_index(owner, **inputs)
        for got, expected in zip(get_rope_index(owner, **inputs), theirs, strict=True):
            assert got.dtype == expected.dtype and torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.usefixtures("version_5")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # a version stays the same for all examples
@given(batch=batches())
def test_paper_rule_with_videos(batch, dtype):
    sequences, merge_size, mask = batch
    ids, positions, delta = expected_batch(sequences, mask)
    image, video = (grids(sequences, name, merge_size) for name in ("image", "video"))
    got = get_rope_index(_owner(merge_size), ids.to(dtype), _types(ids), image, video, mask)
    assert got[0].dtype == dtype and torch.equal(got[0].long(), positions) and torch.equal(got[1], delta[:, None])


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"image_grid_thw": torch.tensor([[1, 2, 2]])},  # with inputs_embeds in the place of ids
        {"input_ids": torch.tensor([[1, 1, 1, IMAGE, 1], [1, IMAGE, VIDEO, 1, 1]])},  # as sampled, without a picture
    ],
    ids=list,
)
def test_text_alone_without_ids_or_grids_in_4(version_4, given):
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    positions, delta = get_rope_index(_owner(), attention_mask=mask, **given)
    assert positions.tolist() == [[[1, 1, 0, 1, 2], [0, 1, 2, 3, 4]]] * 3
    assert delta.tolist() == [[-2], [0]]
    if not NEW:
        (owner := _owner()).config.vision_start_token_id = VISION_START
        theirs = Qwen2VLModel.get_rope_index(owner, attention_mask=mask, **given)
        assert torch.equal(positions, theirs[0]) and torch.equal(delta, theirs[1])


# ---------------------------------------------------------------------------------------------- refusals


def test_mismatches_and_wrong_calls_are_refused(monkeypatch, version_5):
    owner, ids = _owner(), torch.tensor([[1, IMAGE, 1]])
    one = torch.tensor([[1, 2, 2]])
    with pytest.raises(ValueError, match="one more image placeholder"):
        get_rope_index(owner, ids, _types(ids))
    with pytest.raises(ValueError, match="placeholders for only 1 of them"):
        get_rope_index(owner, ids, _types(ids), one.repeat(2, 1))
    with pytest.raises(TypeError, match="input_ids must be a tensor, got None"):
        get_rope_index(owner, image_grid_thw=one, attention_mask=torch.ones(1, 3))
    with pytest.raises(TypeError, match="got input_ids twice"):
        get_rope_index(owner, ids, input_ids=ids)
    with pytest.raises(TypeError, match="takes 5 positional arguments, got 6"):
        get_rope_index(owner, ids, None, one, None, None, None)
    monkeypatch.setattr("transformers.__version__", "5.2.0")
    with pytest.raises(RuntimeError, match=r"any version but 5.2, got 5.2.0"):
        get_rope_index(owner, ids, one)


# ------------------------------------------------------------------------------------------- whole model


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    text = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "vocab_size": 100, "max_position_embeddings": 512}
    text |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": PAD}
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3]}
    text |= (
        {"rope_parameters": rope | {"rope_theta": 1e4}}
        if VERSION >= (5, 0)
        else {"rope_scaling": rope, "rope_theta": 1e4}
    )
    config = Qwen2VLConfig(
        text_config=text,
        vision_config={"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )
    model = Qwen2VLForConditionalGeneration(config).eval()
    for parameter in model.parameters():  # wide enough that answers wander and depend on positions
        torch.nn.init.normal_(parameter, std=0.15)
    return model


def _prompt():
    """Two rows, the shorter padded on the left: one image, and two images of other shapes."""
    shapes = [[(4, 6)], [(8, 4), (2, 2)]]
    rows = [
        [t for gh, gw in row for t in (11, VISION_START, *[IMAGE] * (gh * gw // 4), VISION_END, 12)] for row in shapes
    ]
    width = max(map(len, rows))
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    grid = torch.tensor([[1, gh, gw] for row in shapes for gh, gw in row])
    pixels = torch.randn(int(grid.prod(1).sum()), 1176, generator=torch.Generator().manual_seed(1))
    inputs = {
        "input_ids": ids,
        "attention_mask": (ids != PAD).long(),
        "pixel_values": pixels,
        "image_grid_thw": grid,
    }
    return inputs | ({"mm_token_type_ids": _types(ids)} if NEW else {})


@pytest.mark.parametrize("beams", [1, 2])
def test_generate_gives_the_same_tokens(model, monkeypatch, beams):
    options = {"max_new_tokens": 12, "do_sample": False, "num_beams": beams, "pad_token_id": PAD}
    stock = model.generate(**_prompt(), **options)
    calls = []

    def bound(self, *args, **kwargs):
        calls.append(get_rope_index(self, *args, **kwargs))
        return calls[-1]

    monkeypatch.setattr(model.model, "get_rope_index", MethodType(bound, model.model), raising=False)
    assert torch.equal(model.generate(**_prompt(), **options), stock)
    assert len(calls) == 1, "the positions of a prompt are built once"
    assert len(set(stock[0, -12:].tolist())) > 3, "an answer of one token shows nothing"


def test_class_patch_and_forward(model, monkeypatch):
    with torch.no_grad():
        model.model.rope_deltas = None
        stock = model(**_prompt()).logits
        monkeypatch.setattr(Qwen2VLModel, "get_rope_index", get_rope_index)
        model.model.rope_deltas = None
        assert torch.equal(model(**_prompt()).logits, stock)
