"""The whole model against transformers on the same random weights."""

import functools
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.random_checkpoint import small_config, write_random_checkpoint
from qwen2vl import GenerationConfig, Processor, Qwen2VL, Qwen2VLConfig, generate
from qwen2vl.cache import KVCache
from qwen2vl_kernels import use_backend
from tests.conftest import assert_two_times, relative_error
from tests.model import oracle

ENDLESS = (10**6,)  # an end id that no model has
SIXTY_FOUR = GenerationConfig(max_new_tokens=64, eos_token_ids=ENDLESS)


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
BATCH = ["image", "text", "mixed", "video"]


@pytest.fixture(scope="module")
def theirs(folder):
    return oracle.load(folder)


@pytest.fixture(scope="module")
def answers(model, theirs, processor):
    """transformers' first 64 greedy tokens for a case, worked out once."""
    return functools.cache(lambda name: oracle.greedy(theirs, model.config, processor(CASES[name]), 64))


@pytest.mark.parametrize("name", CASES)
def test_logits_at_every_position(name, model, theirs, processor):
    inputs = processor(CASES[name])
    with torch.no_grad():
        expected = theirs(**oracle.oracle_inputs(model.config, inputs)).logits
        got = model(**inputs)
        floats = {k: oracle.float_rows(v) if k.startswith("pixel") else v for k, v in inputs.items()}
        from_floats = model(**floats)
        last = model(**inputs, last_only=True)
    # Logits are up to 6; 9e-6 was measured. Folding the normalisation into the weights rounds once more for uint8.
    torch.testing.assert_close(from_floats, expected, rtol=0, atol=3e-5)
    torch.testing.assert_close(got, expected, rtol=0, atol=5e-5)
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
def test_64_greedy_tokens(name, model, processor, answers):
    result = generate(model, processor(CASES[name]), config=SIXTY_FOUR)
    assert result.sequences[0] == answers(name)
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
    result = generate(model, inputs, config=SIXTY_FOUR)
    assert result.sequences[0] == out[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches(side, model, theirs, processor, answers):
    """Logits equal transformers' at every real token, and every row generates what it generates alone."""
    inputs = processor([CASES[name] for name in BATCH], padding_side=side)
    keep = inputs["attention_mask"].bool()
    assert not keep.all()
    with torch.no_grad():
        got = model(**inputs)
        expected = theirs(**oracle.oracle_inputs(model.config, inputs)).logits
    torch.testing.assert_close(got[keep], expected[keep], rtol=0, atol=5e-5)
    assert torch.count_nonzero(got[~keep]) == 0
    together = generate(model, inputs, config=SIXTY_FOUR)
    for name, sequence, length in zip(BATCH, together.sequences, together.prompt_tokens, strict=True):
        alone = processor(CASES[name])
        assert length == alone["input_ids"].shape[1]
        assert sequence == generate(model, alone, config=SIXTY_FOUR).sequences[0]
        assert sequence == answers(name)


@pytest.mark.parametrize("backend", [None, "sdpa", "eager"])
def test_a_bf16_batch_generates_what_its_rows_generate_alone(backend, folder, processor):
    """Bit for bit, however different the lengths: attention must not be chosen by a row's neighbours."""
    model = Qwen2VL.from_pretrained(folder, device="cpu", dtype="bfloat16")
    long = " ".join(f"{i * i} is {i} squared" for i in range(60))
    prompts = [[_user("Hi there, you")], [_user(long)], [_user(_image(56, 56), "what")], [_user("Go on now")]]
    config = GenerationConfig(max_new_tokens=32, eos_token_ids=ENDLESS)
    with nullcontext() if backend is None else use_backend(varlen_attention=backend, kvcache_attention=backend):
        together = generate(model, processor(prompts), config=config).sequences
        alone = [generate(model, processor(prompt), config=config).sequences[0] for prompt in prompts]
    assert together == alone
    assert all(len(set(sequence)) > 8 for sequence in alone)


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
    torch.testing.assert_close(torch.cat((first, second), 1), expected, rtol=0, atol=3e-5)


def _padded(rows, side):
    """Rows of ids as a padded batch and its mask."""
    width = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), width, dtype=torch.int64)
    for at, row in enumerate(rows):
        part = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[at, part], mask[at, part] = row, 1
    return ids, mask


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_ragged_batch_continues_its_caches(side, model, processor):
    """Rows cut at different lengths, of which one has had an image; both get a new one, then plain tokens."""
    conversations = [
        [_user(_image(84, 140), "hello you there"), {"role": "assistant", "content": "ok"}, _user(_image(56, 84), "?")],
        [_user("hi"), {"role": "assistant", "content": "well, " * 9}, _user("and", _image(84, 112), "what is it?")],
    ]
    extra = [[5, 6, 7], [8, 9, 10]]
    whole = [processor(conversation) for conversation in conversations]
    ids = [w["input_ids"][0] for w in whole]
    starts = [(row == model.config.vision_start_token_id).nonzero().flatten().tolist() for row in ids]
    cuts = [starts[0][1] - 2, starts[1][0] - 20]
    assert [w["image_grid_thw"].tolist() for w in whole] == [[[1, 6, 10], [1, 4, 6]], [[1, 6, 8]]]
    with torch.no_grad():
        expected = []
        for w, tail in zip(whole, extra, strict=True):
            longer = torch.cat((w["input_ids"], torch.tensor([tail])), 1)
            expected.append(model(longer, pixel_values=w["pixel_values"], image_grid_thw=w["image_grid_thw"])[0])
        cache = KVCache(model.config.text, 2, 200, device=model.device, dtype=model.dtype)
        ids1, mask1 = _padded([row[:cut] for row, cut in zip(ids, cuts, strict=True)], side)
        pixels, grids = whole[0]["pixel_values"], whole[0]["image_grid_thw"]
        first = model(ids1, mask1, pixel_values=pixels[:60], image_grid_thw=grids[:1], cache=cache)
        assert cache.lengths == cuts
        ids2, mask2 = _padded([row[cut:] for row, cut in zip(ids, cuts, strict=True)], side)
        second = model(
            ids2,
            mask2,
            pixel_values=torch.cat((pixels[60:], whole[1]["pixel_values"])),
            image_grid_thw=torch.cat((grids[1:], whole[1]["image_grid_thw"])),
            cache=cache,
        )
        assert cache.lengths == list(map(len, ids)) and len(set(cache.next_position.tolist())) == 2
        third = [model(torch.tensor(extra)[:, at], cache=cache) for at in (slice(0, 1), slice(1, 3))]
    for row in (0, 1):
        got = [first[row][mask1[row].bool()], second[row][mask2[row].bool()], *(part[row] for part in third)]
        torch.testing.assert_close(torch.cat(got), expected[row], rtol=0, atol=3e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_given_positions_are_used_and_continued(side, model, processor):
    """Positions that the caller gives: the logits are as with our own, and the cache continues after each row's."""
    inputs = processor([CASES["image"], CASES["text"], CASES["video"]], padding_side=side)
    mask = inputs["attention_mask"]
    positions = oracle.oracle_inputs(model.config, inputs)["position_ids"].masked_fill(mask == 0, 900)
    caches = [KVCache(model.config.text, 3, 300, device=model.device, dtype=model.dtype) for _ in range(3)]
    step = torch.tensor([[5, 6], [7, 8], [9, 10]])
    with torch.no_grad():
        expected = [model(**inputs, cache=caches[0]), model(step, cache=caches[0])]
        got = [model(**inputs, position_ids=positions, cache=caches[1]), model(step, cache=caches[1])]
        far = [model(**inputs, position_ids=positions + 100, cache=caches[2]), model(step, cache=caches[2])]
    following = [int(positions[:, row][:, mask[row].bool()].max()) + 1 for row in range(3)]
    assert len(set(following)) == 3
    assert caches[0].next_position.tolist() == [f + 2 for f in following]
    assert caches[1].next_position.tolist() == [f + 2 for f in following]
    assert caches[2].next_position.tolist() == [f + 102 for f in following]
    for a, b, c in zip(expected, got, far, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(c, a, rtol=0, atol=5e-5)  # only differences of positions count
    for axis in range(3):  # whichever axis is furthest
        ahead = positions + 7 * (torch.arange(3) == axis)[:, None, None]
        cache = KVCache(model.config.text, 3, 300, device=model.device, dtype=model.dtype)
        with torch.no_grad():
            model(**inputs, position_ids=ahead, cache=cache)
        assert cache.next_position.tolist() == [f + 7 for f in following]


def test_bounding_the_vision_batch_changes_nothing(model, processor, monkeypatch):
    inputs = processor(CASES["five images"] + CASES["video"])
    with torch.no_grad():
        expected = model(**inputs)
        seen = []
        encode = model.visual.encode
        monkeypatch.setattr(
            model.visual, "encode", lambda kinds, grids: seen.append(sum(map(len, kinds))) or encode(kinds, grids)
        )
        monkeypatch.setattr(model, "max_vision_patches", 40)
        got = model(**inputs)
    # Images of 4x4, 8x22, 4x4, 10x4 and 6x6 patches, then a clip of 5 pairs of 4x4, two of which fit into 40.
    assert seen == [16, 176, 16, 40, 36, 32, 32, 16]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_one_frame_of_a_still_image_stands_for_both(model, processor):
    """588 and 1176 bytes a patch mean the same; floats and clips always have both frames."""
    inputs = processor(CASES["five images"])
    pixels, grid = inputs["pixel_values"], inputs["image_grid_thw"]
    twice = pixels.view(-1, 3, 1, 196).expand(-1, 3, 2, 196).flatten(1)
    with torch.no_grad():
        one, two = model.visual(pixels, grid), model.visual(twice, grid)
        floats = model.visual(oracle.float_rows(pixels), grid)
        mixed = model.visual([twice, pixels], [grid, grid])
    assert relative_error(one, two) < 1e-6 and relative_error(one, floats) < 1e-5
    assert relative_error(mixed, torch.cat((two, one))) < 1e-6
    for wrong, wrong_grid in ((pixels.float(), grid), (pixels, grid * torch.tensor([2, 1, 1]))):
        with pytest.raises(ValueError, match=r"pixel_values must have shape .* got \(284, 588\)"):
            model.visual(wrong[:284], wrong_grid)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits_are_as_close_as_transformers(folder, theirs, processor, dtype):
    """Error against float64 at most twice that of transformers in that dtype, as chosen and in eager form."""
    ours16, theirs16 = Qwen2VL.from_pretrained(folder, device="cpu", dtype=dtype), oracle.load(folder, dtype)
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
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    result = generate(model, inputs, config=GenerationConfig(max_new_tokens=16, eos_token_ids=ENDLESS))
    assert result.sequences[0] == oracle.greedy(theirs, model.config, inputs, 16)


def test_other_norm_eps_and_thetas(tmp_path):
    """Values that no released checkpoint has, in the layouts that this package and transformers write."""
    config = small_config(tie_word_embeddings=False)
    text = replace(config.text, rms_norm_eps=1e-5, rope_theta=5e5)
    config = replace(config, text=text, vision=replace(config.vision, rope_theta=5e3))
    folder = write_random_checkpoint(tmp_path / "ours", config, dtype=torch.float32, std=0.08)
    theirs = oracle.load(folder)
    theirs.save_pretrained(tmp_path / "theirs")
    assert theirs.config.text_config.rms_norm_eps == 1e-5
    assert theirs.config.text_config.rope_parameters["rope_theta"] == 5e5
    assert theirs.config.vision_config.rope_parameters["rope_theta"] == 5e3
    inputs = Processor.from_pretrained(folder)(CASES["mixed"])
    for path in (folder, tmp_path / "theirs"):
        model = Qwen2VL.from_pretrained(path, device="cpu")
        with torch.no_grad():
            expected = theirs(**oracle.oracle_inputs(model.config, inputs)).logits
            torch.testing.assert_close(model(**inputs), expected, rtol=0, atol=5e-5)


def test_vision_norms_add_their_eps(folder, processor):
    """With a residual stream so small that eps and its variance are alike, in every norm of the tower."""
    ours, theirs = Qwen2VL.from_pretrained(folder, device="cpu"), oracle.load(folder)
    inputs = processor(CASES["image"])
    with torch.no_grad():
        for tower in (ours.visual, theirs.model.visual):
            for name, parameter in tower.named_parameters():
                if name.endswith(("patch_embed.proj.weight", "attn.proj.weight", "mlp.fc2.weight")):
                    parameter.mul_(1e-3)
        expected = theirs.model.visual(
            oracle.float_rows(inputs["pixel_values"]), grid_thw=inputs["image_grid_thw"]
        ).pooler_output
        got = ours.visual(inputs["pixel_values"], inputs["image_grid_thw"])
    assert relative_error(got, expected) < 2e-5


def _frequencies(theta, width):
    return theta ** -(torch.arange(0, width, 2).double() / width)


def _angle_models(folder):
    """Ours turned to bf16, transformers' in bf16, and transformers' in float32 with the same rounded weights."""
    ours = Qwen2VL.from_pretrained(folder, device="cpu").to(torch.bfloat16)
    return ours, oracle.load(folder, torch.bfloat16), oracle.load(folder, torch.bfloat16).float()


def test_text_angles_stay_float32_in_a_bf16_model(folder):
    """At positions in the thousands: an inverse frequency of bf16's eight bits would be radians off."""
    ours, theirs, exact = _angle_models(folder)
    ids = torch.randint(10, 300, (1, 48))
    steps = torch.randint(1, 120, (3, 48)).cumsum(1)[:, None]  # about 60 apart: an offset alone cancels out
    assert steps.max() >= 2000
    inv_freq = ours.model.inv_freq(torch.device("cpu"))
    assert inv_freq.dtype == torch.float32
    assert relative_error(inv_freq, _frequencies(ours.config.text.rope_theta, ours.config.text.head_dim)) < 1e-7
    with torch.no_grad():
        expected = exact(input_ids=ids, position_ids=steps).logits
        eager = theirs(input_ids=ids, position_ids=steps).logits
        near = exact(input_ids=ids, position_ids=steps // 100).logits
        assert_two_times(ours(ids, position_ids=steps), eager, expected, 1e-3)
    assert relative_error(eager, expected) < 0.03 < 0.3 < relative_error(near, expected), "the positions matter"


def test_vision_angles_stay_float32_in_a_bf16_model(folder):
    ours, theirs, exact = _angle_models(folder)
    pixels, grid = torch.randint(0, 256, (1200, 1176), dtype=torch.uint8), torch.tensor([[1, 2, 600]])
    inv_freq = ours.visual.inv_freq(torch.device("cpu"))
    assert inv_freq.dtype == torch.float32
    assert (
        relative_error(inv_freq, _frequencies(ours.config.vision.rope_theta, ours.config.vision.head_dim // 2)) < 1e-7
    )
    floats = oracle.float_rows(pixels)
    with torch.no_grad():
        for tower in (ours.visual, theirs.model.visual, exact.model.visual):
            for block in tower.blocks:
                # Larger queries and keys, without which attention is too even for angles to matter.
                block.attn.qkv.weight[: 2 * block.attn.qkv.in_features].mul_(4)
        expected = exact.model.visual(floats, grid_thw=grid).pooler_output
        eager = theirs.model.visual(floats, grid_thw=grid).pooler_output
        turned = exact.model.visual(floats, grid_thw=grid[:, [0, 2, 1]]).pooler_output
        assert_two_times(ours.visual(pixels, grid), eager, expected, 1e-3)
    assert relative_error(eager, expected) < 0.03 < 0.3 < relative_error(turned, expected), "the positions matter"


@pytest.mark.parametrize("case", ["text", "image", "mixed"])
def test_gradients_match_transformers(case, model, theirs, processor):
    inputs = processor(CASES[case])
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
            want = expected[f"{path[head]}.{rest}"].grad
            if want is None:  # a text reaches no vision weight
                assert parameter.grad is None and head == "visual" and case == "text", name
            else:
                assert relative_error(parameter.grad, want) < 1e-5, name
    finally:
        model.zero_grad()
        theirs.zero_grad()
