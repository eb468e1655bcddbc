"""The whole model against transformers on the same random weights."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from qwen2vl import GenerationConfig, Processor, Qwen2VL, Qwen2VLConfig, generate
from qwen2vl.cache import KVCache
from qwen2vl.demo.checkpoint import small_config, write_random_checkpoint
from qwen2vl_kernels import use_backend
from tests.conftest import assert_two_times, relative_error
from tests.model import oracle

ENDLESS = (10**6,)  # an end id that no model has


def _picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def _user(*content):
    return {
        "role": "user",
        "content": [{"type": "text", "text": c} if isinstance(c, str) else c for c in content],
    }


def _image(*size):
    return {"type": "image", "image": _picture(*size)}


def _video(frames, height, width):
    # A lower limit than the default 100,352 pixels a frame keeps the clips small.
    return {"type": "video", "video": [_picture(height, width, i) for i in range(frames)], "min_pixels": 3136}


CASES = {
    "text": [_user("What is 1 + 1? Ünïcode, 中文.")],
    "image": [_user(_image(224, 224), "Describe the picture.")],
    "five images": [
        _user(*[_image(h, w) for h, w in ((56, 56), (100, 300), (28, 28), (130, 70), (90, 90))], "Compare them.")
    ],
    # 5 frame pairs of 2x2 tokens: time outlasts height and width, where transformers' own positions go wrong.
    "video": [_user(_video(10, 56, 56), "What happens?")],
    "mixed": [_user("First", _image(56, 84), "then", _video(4, 84, 56), "and", _image(56, 56), "so?")],
    "adjacent images": [_user(_image(56, 56), _image(56, 84))],
    "multi-turn": [
        {"role": "system", "content": "Be brief."},
        _user(_image(56, 112), "What is it?"),
        {"role": "assistant", "content": "A picture."},
        _user(_video(3, 56, 56), "And this?"),
    ],
}
BATCH = [CASES["image"], CASES["text"], CASES["mixed"], CASES["video"]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Weights large enough that greedy answers wander instead of repeating one token, and a head of its own."""
    folder = tmp_path_factory.mktemp("checkpoint")
    return write_random_checkpoint(folder, small_config(tie_word_embeddings=False), dtype=torch.float32, std=0.08)


@pytest.fixture(scope="module")
def model(folder):
    return Qwen2VL.from_pretrained(folder, device="cpu")


@pytest.fixture(scope="module")
def theirs(folder):
    return oracle.load(folder)


@pytest.fixture(scope="module")
def processor(folder):
    return Processor.from_pretrained(folder)


@pytest.mark.parametrize("name", CASES)
def test_logits_at_every_position(name, model, theirs, processor):
    inputs = processor(CASES[name])
    with torch.no_grad():
        expected = theirs(**oracle.oracle_inputs(model.config, inputs)).logits
        got = model(**inputs)
        floats = {k: oracle.float_rows(v) if k.startswith("pixel") else v for k, v in inputs.items()}
        from_floats = model(**floats)
        last = model(**inputs, last_only=True)
    torch.testing.assert_close(from_floats, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-4)
    torch.testing.assert_close(last, got[:, -1:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["image", "five images", "video"])
def test_vision_features(name, model, theirs, processor):
    inputs = processor(CASES[name])
    rows, grid = ("pixel_values_videos", "video_grid_thw") if name == "video" else ("pixel_values", "image_grid_thw")
    with torch.no_grad():
        expected = theirs.model.visual(oracle.float_rows(inputs[rows]), grid_thw=inputs[grid]).pooler_output
        got = model.visual(inputs[rows], inputs[grid])
    assert relative_error(got, expected) < 2e-5


@pytest.mark.parametrize("name", CASES)
def test_64_greedy_tokens(name, model, theirs, processor):
    inputs = processor(CASES[name])
    result = generate(model, inputs, config=GenerationConfig(max_new_tokens=64, eos_token_ids=ENDLESS))
    assert result.sequences[0] == oracle.greedy(theirs, model.config, inputs, 64)
    assert len(set(result.sequences[0])) > 8, "a constant answer would prove little"


@pytest.mark.parametrize("name", ["text", "image", "five images"])
def test_transformers_own_generate_agrees(name, model, theirs, processor):
    """Its cache and its position bookkeeping, where its positions are right: no video."""
    inputs = processor(CASES[name])
    ids = inputs["input_ids"]
    extra = {k: inputs[k] for k in ("image_grid_thw",) if k in inputs}
    if "pixel_values" in inputs:
        extra["pixel_values"] = oracle.float_rows(inputs["pixel_values"])
    c = model.config
    out = theirs.generate(
        input_ids=ids,
        attention_mask=inputs["attention_mask"],
        mm_token_type_ids=(ids == c.image_token_id).int(),
        max_new_tokens=64,
        do_sample=False,
        eos_token_id=None,
        suppress_tokens=[c.image_token_id, c.video_token_id, c.vision_token_id],
        **extra,
    )
    result = generate(model, inputs, config=GenerationConfig(max_new_tokens=64, eos_token_ids=ENDLESS))
    assert result.sequences[0] == out[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches(side, model, theirs, processor):
    """Logits equal transformers' at every real token, and every row generates what it generates alone."""
    inputs = processor(BATCH, padding_side=side)
    keep = inputs["attention_mask"].bool()
    assert not keep.all()
    with torch.no_grad():
        got = model(**inputs)
        expected = theirs(**oracle.oracle_inputs(model.config, inputs)).logits
    torch.testing.assert_close(got[keep], expected[keep], rtol=1e-4, atol=2e-4)
    assert torch.count_nonzero(got[~keep]) == 0
    config = GenerationConfig(max_new_tokens=24, eos_token_ids=ENDLESS)
    together = generate(model, inputs, config=config)
    for messages, sequence, length in zip(BATCH, together.sequences, together.prompt_tokens, strict=True):
        alone = processor(messages)
        assert length == alone["input_ids"].shape[1]
        assert sequence == generate(model, alone, config=config).sequences[0]
        assert sequence == oracle.greedy(theirs, model.config, alone, 24)


def test_a_cache_continues_where_it_ends(model, processor):
    """A second turn with a new image on top of a cache equals the whole conversation at once."""
    whole = processor(CASES["multi-turn"])
    ids = whole["input_ids"]
    cut = int((ids[0] == model.config.video_token_id).nonzero()[0]) - 1
    with torch.no_grad():
        expected = model(**whole)
        cache = KVCache(model.config.text, 1, ids.shape[1], device=model.device, dtype=model.dtype)
        first = model(
            ids[:, :cut],
            pixel_values=whole["pixel_values"],
            image_grid_thw=whole["image_grid_thw"],
            cache=cache,
        )
        second = model(
            ids[:, cut:],
            pixel_values_videos=whole["pixel_values_videos"],
            video_grid_thw=whole["video_grid_thw"],
            cache=cache,
        )
    torch.testing.assert_close(torch.cat((first, second), 1), expected, rtol=1e-4, atol=1e-4)


def test_bounding_the_vision_batch_changes_nothing(model, processor, monkeypatch):
    inputs = processor(CASES["five images"] + CASES["video"])
    with torch.no_grad():
        expected = model(**inputs)
        seen = []
        encode = model.visual._encode
        monkeypatch.setattr(model.visual, "_encode", lambda rows, grids: seen.append(len(rows)) or encode(rows, grids))
        monkeypatch.setattr(model, "max_vision_patches", 40)
        got = model(**inputs)
    # Images of 4x4, 8x22, 4x4, 10x4 and 6x6 patches, then a clip of 5 pairs of 4x4, two of which fit into 40.
    assert seen == [16, 176, 16, 40, 36, 32, 32, 16]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_bf16_is_as_close_as_transformers(folder, theirs, processor):
    """Error against float64 at most twice that of transformers in bf16, as chosen and in eager form."""
    ours16, theirs16 = (
        Qwen2VL.from_pretrained(folder, device="cpu", dtype="bfloat16"),
        oracle.load(folder, torch.bfloat16),
    )
    exact_model = Qwen2VL.from_pretrained(folder, device="cpu").double()
    for parameter, rounded in zip(exact_model.parameters(), ours16.parameters(), strict=True):
        parameter.data = rounded.data.double()
    for name in ("image", "mixed"):
        inputs = processor(CASES[name])
        with torch.no_grad():
            floats = {k: oracle.float_rows(v).double() if k.startswith("pixel") else v for k, v in inputs.items()}
            exact = exact_model(**floats)
            eager = theirs16(**oracle.oracle_inputs(ours16.config, inputs)).logits
            assert_two_times(ours16(**inputs), eager, exact, 1e-3)
            with use_backend("eager"):
                assert_two_times(ours16(**inputs), eager, exact, 1e-3)


@pytest.mark.parametrize("size", ["2b"])
def test_true_shapes_with_few_layers(size, tmp_path):
    """The 2B's widths, heads and vocabulary with 2 + 2 layers: 1536 wide, 12/2 heads of 128, 16 vision heads of 80."""
    config = Qwen2VLConfig.preset(size)
    config = replace(config, text=replace(config.text, num_hidden_layers=2), vision=replace(config.vision, depth=2))
    folder = write_random_checkpoint(tmp_path, config, dtype=torch.bfloat16)
    model, theirs = Qwen2VL.from_pretrained(folder, "cpu", torch.float32), oracle.load(folder)
    inputs = Processor.from_pretrained(folder)(CASES["mixed"])
    with torch.no_grad():
        expected = theirs(**oracle.oracle_inputs(model.config, inputs)).logits
        got = model(**inputs)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    result = generate(model, inputs, config=GenerationConfig(max_new_tokens=4, eos_token_ids=ENDLESS))
    assert result.sequences[0] == oracle.greedy(theirs, model.config, inputs, 4)


def test_gradients_match_transformers(model, theirs, processor):
    inputs = processor(CASES["mixed"])
    model.zero_grad()
    theirs.zero_grad()
    try:
        torch.nn.functional.cross_entropy(model(**inputs)[0, :-1], inputs["input_ids"][0, 1:]).backward()
        logits = theirs(**oracle.oracle_inputs(model.config, inputs)).logits
        torch.nn.functional.cross_entropy(logits[0, :-1], inputs["input_ids"][0, 1:]).backward()
        expected = dict(theirs.named_parameters())
        for name, parameter in model.named_parameters():
            path = {"visual": "model.visual", "model": "model.language_model", "lm_head": "lm_head"}
            head, _, rest = name.partition(".")
            assert relative_error(parameter.grad, expected[f"{path[head]}.{rest}"].grad) < 1e-3, name
    finally:
        model.zero_grad()
        theirs.zero_grad()
