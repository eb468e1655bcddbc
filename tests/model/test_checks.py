"""What a call of the model is given, checked once and before anything runs; and that decoding checks nothing."""

import numpy as np
import pytest
import torch

import qwen2vl.checks
import qwen2vl.generation
import qwen2vl.model
import qwen2vl.vision
from qwen2vl import ContextLengthError, GenerationConfig, PromptError, generate
from qwen2vl.cache import KVCache
from qwen2vl.checks import check_patches, check_placeholders
from qwen2vl.config import VisionConfig

IMAGE, VIDEO = 1, 2  # placeholder ids
VISION = VisionConfig(hidden_size=8)


@pytest.fixture(scope="module")
def inputs(processor):
    image = np.random.default_rng(0).integers(0, 256, (56, 84, 3), dtype=np.uint8)
    return processor([{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "Hi"}]}])


# ---- placeholders against grids ----


def check(ids, image=None, video=None, mask=None):
    """Rows of ids against the grids of images and videos, as a call of the model checks them."""
    ids = torch.tensor(ids)
    kept = torch.ones_like(ids) if mask is None else torch.tensor(mask)
    packed, counts = ids[kept.bool()], kept.sum(1).tolist()
    for kind, token, grids in (("image", IMAGE, image), ("video", VIDEO, video)):
        media = (
            None if grids is None else check_patches(VISION, None, torch.tensor(grids), kind, kind, f"{kind}_grid_thw")
        )
        check_placeholders(kind, packed == token, counts, media, 2)


def test_placeholders_that_fit():
    check(
        [[0, 1, 1, 0, 2, 2, 2, 2, 0, 1], [1, 0, 0, 0, 0, 0, 0, 0, 0, 0]],
        [[1, 2, 4], [1, 2, 2], [1, 2, 2]],
        [[2, 4, 2]],
    )
    check([[0, 3, 0]])
    # What is padded away counts for nothing, and parts no run.
    check([[1, 0, 1, 1], [1, 1, 0, 0]], [[1, 2, 6], [1, 2, 2]], mask=[[1, 0, 1, 1], [0, 1, 1, 1]])


@pytest.mark.parametrize(
    ("ids", "image", "video", "match"),
    [
        ([[0, 1, 0]], None, None, r"^image_grid_thw: wants 1, .* got 0"),
        ([[0, 0, 0]], [[1, 2, 2]], None, r"^image_grid_thw: wants 0, .* got 1"),
        ([[0, 1, 1]], [[1, 2, 2], [1, 2, 2]], None, r"^image_grid_thw: wants 1, .* got 2"),
        ([[0, 2, 0]], [[1, 2, 2]], None, r"^image_grid_thw: wants 0"),
        (
            [[1, 0, 1, 1]],
            [[1, 2, 2], [1, 2, 6]],
            None,
            r"^image_grid_thw\[1\]: \(1, 2, 6\) .* the 2 placeholders",
        ),
        ([[0, 2, 2]], None, [[3, 2, 2]], r"^video_grid_thw\[0\]: \(3, 2, 2\)"),
        ([[0, 2, 2]], None, [[2, 1, 4]], r"^video_grid_thw\[0\]"),
        ([[0, 1], [1, 0]], [[1, 2, 4]], None, r"^image_grid_thw: wants 2"),  # rows are sequences of their own
    ],
)
def test_placeholders_that_do_not_fit(ids, image, video, match):
    with pytest.raises(PromptError, match=match):
        check(ids, image, video)


def test_the_tower_checks_what_it_is_given_alone(model, inputs):
    pixels, grid = inputs["pixel_values"], inputs["image_grid_thw"]
    for arguments, message in (
        ((pixels,), "pixel_values and grid_thw must be given together"),
        ((pixels, grid[:0]), r"grid_thw must have shape \(items, 3\) with items >= 1, got \(0, 3\)"),
        ((pixels, grid[0]), r"grid_thw must have shape \(items, 3\)"),
        ((pixels, torch.tensor([[1, 3, 8]])), r"grid_thw\[0\] must hold .* divisible by 2, got \(1, 3, 8\)"),
        ((pixels[:-1], grid), r"pixel_values must have shape \(24, 1176\)"),
    ):
        with pytest.raises(PromptError, match=message):
            model.visual(*arguments)


def test_truncated_inputs_are_found(model, inputs):
    cut = {name: inputs[name][:, :-12] for name in ("input_ids", "attention_mask")}
    assert 0 < (cut["input_ids"] == model.config.image_token_id).sum() < 6
    with pytest.raises(PromptError, match=r"^image_grid_thw\[0\]: "):
        model(**{**inputs, **cut})
    with pytest.raises(PromptError, match=r"^image_grid_thw\[0\]: "):
        generate(model, {**inputs, **cut})


# ---- before anything runs ----


@pytest.fixture
def nothing_runs(model, monkeypatch):
    """The tower, the embedding and the decoder fail the test that calls them."""
    for name, module in {"tower": model.visual, "embedding": model.model.embed_tokens, "decoder": model.model}.items():
        monkeypatch.setattr(module, "forward", lambda *a, name=name, **k: pytest.fail(f"the {name} ran"))


def test_features_are_checked_before_anything_runs(model, inputs, nothing_runs):
    width = model.config.text.hidden_size
    right = torch.zeros(6, width)
    prompt = {name: inputs[name] for name in ("input_ids", "attention_mask", "image_grid_thw")}
    cases = [
        (
            (torch.zeros(6, width + 1), None),
            rf"features of images must be floats of shape \(6, {width}\), got .* \(6, ",
        ),
        ((torch.zeros(6, 2 * width), None), "features of images must be floats of shape"),  # enough values, all wrong
        ((torch.zeros(3, 2, width), None), "features of images must be floats of shape"),
        ((torch.zeros(()), None), "features of images must be floats of shape"),
        ((right.long(), None), "features of images must be floats .*, got torch.int64"),
        ((right[:5], None), "input_ids has 6 image placeholders, the images given make 5 tokens"),
        ((None, None), "input_ids has 6 image placeholders, the images given make 0 tokens"),
        ((right, right), "input_ids has 0 video placeholders, the videos given make 6 tokens"),
        ((right,), "features must be a pair, those of images and those of videos, got 1"),
    ]
    for features, message in cases:
        with pytest.raises(PromptError, match=message):
            model(**prompt, features=features)
    with pytest.raises(PromptError, match="image_grid_thw: wants 1"):
        model(prompt["input_ids"], features=(right, None))
    positions = torch.zeros(3, *prompt["input_ids"].shape, dtype=torch.int64)
    with pytest.raises(PromptError, match="input_ids has 6 image placeholders, the images given make 5 tokens"):
        model(prompt["input_ids"], position_ids=positions, features=(right[:5], None))


def test_counts_and_grids_are_checked_before_anything_runs(model, inputs, nothing_runs):
    """By a call as by generate, which refuses at its own call."""
    ids = inputs["input_ids"]
    cases = [
        ({**inputs, "pixel_values": inputs["pixel_values"][:-1]}, r"pixel_values must have shape \(24, 1176\)"),
        ({**inputs, "image_grid_thw": torch.tensor([[1, 6, 4], [1, 0, 2]])}, r"image_grid_thw\[1\] must hold positive"),
        ({**inputs, "input_ids": ids.clone().index_fill_(1, torch.tensor(0), 600)}, r"must be in \[0, 512\), got 600"),
        ({**inputs, "attention_mask": torch.zeros_like(ids)}, "every sequence needs at least one token"),
        ({"input_ids": ids}, "input_ids has 6 image placeholders, the images given make 0 tokens"),
    ]
    for arguments, message in cases:
        with pytest.raises(PromptError, match=message):
            model(**arguments)
        with pytest.raises(PromptError, match=message):
            generate(model, arguments)
    cache = KVCache(model.config.text, 1, ids.shape[1] - 1, device=model.device, dtype=model.dtype)
    with torch.no_grad(), pytest.raises(ContextLengthError, match=f"{ids.shape[1]} are needed"):
        model(**inputs, cache=cache)
    assert cache.lengths == [0]


def test_features_take_the_place_of_pixels(model, inputs):
    """In a call, with positions in the place of grids, and in generate."""
    grid, ids = inputs["image_grid_thw"], inputs["input_ids"]
    config = GenerationConfig(max_new_tokens=5, eos_token_ids=(10**6,))
    with torch.no_grad():
        features = model.encode_media(inputs["pixel_values"], grid)
        expected = model(**inputs)
        assert torch.equal(model(ids, image_grid_thw=grid, features=features), expected)
        positions = model._positions(qwen2vl.checks.check_call(model.config, **inputs), None)[0]
        assert torch.equal(model(ids, position_ids=positions.unsqueeze(1), features=features), expected)
    given = {"input_ids": ids, "image_grid_thw": grid, "features": features}
    assert generate(model, given, config=config).sequences == generate(model, inputs, config=config).sequences


def test_a_prompt_is_checked_once(model, inputs, monkeypatch):
    """A prompt by one check of each kind, whatever follows; decoding by none."""
    seen = []
    for name in ("check_media", "check_patches", "check_placeholders", "check_features"):
        check = getattr(qwen2vl.checks, name)
        spy = lambda *a, name=name, check=check, **k: seen.append(name) or check(*a, **k)  # noqa: E731
        for module in (qwen2vl.checks, qwen2vl.model, qwen2vl.vision):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, spy)
    once = ["check_media", "check_patches", "check_placeholders", "check_placeholders"]  # of images, of videos
    generate(model, inputs, config=GenerationConfig(max_new_tokens=6, eos_token_ids=(10**6,)))
    assert seen == once
    seen.clear()
    with torch.no_grad():
        model(**inputs)
    assert seen == once


# ---- decoding ----


def test_a_step_equals_a_call_on_a_warm_cache(model, processor):
    """Bit for bit, of a ragged batch."""
    batch = processor([[{"role": "user", "content": text}] for text in ("a", "Tell me more than that, please.")])
    caches = [KVCache(model.config.text, 2, 64, device=model.device, dtype=model.dtype) for _ in range(2)]
    with torch.no_grad():
        for cache in caches:
            model(**batch, cache=cache)
        for ids in ([[5], [6]], [[7], [8]]):
            called = model(torch.tensor(ids), cache=caches[0], last_only=True)
            assert torch.equal(model.step(torch.tensor(ids), caches[1]), called)
    assert caches[0].lengths == caches[1].lengths
    assert torch.equal(caches[0].next_position, caches[1].next_position)


def test_decoding_checks_nothing_and_reads_nothing_back(model, inputs, monkeypatch):
    """In every step of generate no check runs, and no tensor gives a number or a copy to the host."""
    steps, step = [], model.step

    def refuse(what):
        return lambda *a, **k: pytest.fail(f"a step calls {what}")

    def watched(ids, cache):
        with monkeypatch.context() as patch:
            for module in (qwen2vl.checks, qwen2vl.generation, qwen2vl.model, qwen2vl.vision):
                for name in dir(module):
                    if name.startswith("check_"):
                        patch.setattr(module, name, refuse(name))
            for name in ("item", "tolist", "numpy", "cpu", "nonzero", "__int__", "__bool__", "__float__", "__index__"):
                patch.setattr(torch.Tensor, name, refuse(name))
            # The ops work on the host here, and what they read there comes from no device.
            patch.setattr(model.model, "forward", lambda hidden, pack: hidden)
            steps.append(tuple(ids.shape))
            return step(ids, cache)

    monkeypatch.setattr(model, "step", watched)
    generate(model, inputs, config=GenerationConfig(max_new_tokens=4, eos_token_ids=(10**6,)))
    assert steps == [(1, 1)] * 3
