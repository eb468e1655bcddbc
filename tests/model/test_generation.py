"""Choosing tokens, stopping, streaming, limits, and what a wrong call to the model says."""

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from qwen2vl import ContextLengthError, GenerationConfig, Processor, PromptError, Qwen2VL, generate, stream
from qwen2vl.cache import KVCache
from qwen2vl.demo.checkpoint import small_config, write_random_checkpoint
from qwen2vl.generation import _Chooser

ENDLESS = (10**6,)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_random_checkpoint(
        tmp_path_factory.mktemp("checkpoint"), small_config(False), dtype=torch.float32, std=0.08
    )


@pytest.fixture(scope="module")
def model(folder):
    return Qwen2VL.from_pretrained(folder, device="cpu")


@pytest.fixture(scope="module")
def processor(folder):
    return Processor.from_pretrained(folder)


@pytest.fixture(scope="module")
def inputs(processor):
    image = np.random.default_rng(0).integers(0, 256, (56, 84, 3), dtype=np.uint8)
    return processor([{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "Hi"}]}])


def _run(model, inputs, processor=None, **options):
    options.setdefault("eos_token_ids", ENDLESS)
    options.setdefault("max_new_tokens", 16)
    tokenizer = processor.tokenizer if processor else None
    return generate(model, inputs, tokenizer=tokenizer, config=GenerationConfig(**options))


def test_streamed_pieces_join_to_the_text(model, processor, inputs):
    result = _run(model, inputs, processor, max_new_tokens=40)
    config = GenerationConfig(max_new_tokens=40, eos_token_ids=ENDLESS)
    assert "".join(stream(model, inputs, tokenizer=processor.tokenizer, config=config)) == result.texts[0]
    assert result.texts[0] == processor.decode(result.sequences[0])
    assert result.finish_reasons == ["length"] and len(result.sequences[0]) == 40
    assert result.timings["decode_steps"] == 39 and result.prompt_tokens == [inputs["input_ids"].shape[1]]


def test_stop_strings_end_the_text_and_never_show(model, processor, inputs):
    text = _run(model, inputs, processor, max_new_tokens=40).texts[0]
    stop = text[10:14]
    at = text.index(stop)
    result = _run(model, inputs, processor, max_new_tokens=40, stop=(stop, "never there"))
    assert result.texts[0] == text[:at] and result.finish_reasons == ["stop_string"]
    config = GenerationConfig(max_new_tokens=40, eos_token_ids=ENDLESS, stop=(stop,))
    pieces = list(stream(model, inputs, tokenizer=processor.tokenizer, config=config))
    assert "".join(pieces) == text[:at]
    with pytest.raises(PromptError, match="stop strings need a tokenizer"):
        _run(model, inputs, stop=("x",))


def test_end_ids_end_a_row_and_leave_the_others(model, processor):
    batch = processor([[{"role": "user", "content": text}] for text in ("Hi", "Tell me more than that, please.")])
    free = _run(model, batch, max_new_tokens=12).sequences
    end = free[0][5]
    got = _run(model, batch, max_new_tokens=12, eos_token_ids=(end,))
    for sequence, reason, full in zip(got.sequences, got.finish_reasons, free, strict=True):
        assert sequence == (full[: full.index(end)] if end in full else full)
        assert reason == ("stop" if end in full else "length")


def test_sampling_is_seeded_per_row(model, processor):
    batch = processor([[{"role": "user", "content": text}] for text in ("Hi", "Tell me more than that.")])
    options = {"do_sample": True, "temperature": 1.5, "max_new_tokens": 12}
    first, again = (_run(model, batch, seed=7, **options).sequences for _ in range(2))
    assert first == again and first != _run(model, batch, seed=8, **options).sequences
    alone = processor([{"role": "user", "content": "Tell me more than that."}])
    assert _run(model, alone, seed=8, **options).sequences[0] == first[1], "row 1 draws with seed + 1"
    assert _run(model, alone, do_sample=True, top_k=1, seed=1).sequences == _run(model, alone).sequences


@pytest.mark.parametrize(("top_k", "top_p", "penalty"), [(5, 1.0, 1.0), (0, 0.3, 1.0), (20, 0.8, 1.3)])
def test_the_distribution_is_transformers(model, top_k, top_p, penalty):
    """Draws fall where transformers' processors leave probability, in its proportions."""
    ids = torch.tensor([[3, 4, 5, 4]])
    logits = torch.randn(1, 512) * 4
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(penalty)])
    scores = processors(ids, logits.clone())
    c = model.config
    scores[:, [c.image_token_id, c.video_token_id, c.vision_token_id]] = float("-inf")
    scores = scores / 0.7
    if top_k:
        scores = TopKLogitsWarper(top_k)(ids, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(ids, scores)
    expected = scores.softmax(-1)[0]
    config = GenerationConfig(
        do_sample=True, temperature=0.7, top_k=top_k, top_p=top_p, repetition_penalty=penalty, seed=3
    )
    chooser = _Chooser(model, {"input_ids": ids}, config)
    seen = None if chooser.seen is None else chooser.seen.clone()
    counts = torch.zeros(512)
    for _ in range(2000):
        counts[chooser(logits)[0]] += 1
        if seen is not None:
            chooser.seen.copy_(seen)
    assert torch.count_nonzero(counts[expected == 0]) == 0
    # 2000 draws: five standard deviations of a proportion are at most 0.056.
    torch.testing.assert_close(counts / 2000, expected, rtol=0, atol=0.056)


def test_placeholders_are_never_generated(model, processor, inputs):
    c = model.config
    banned = [c.image_token_id, c.video_token_id, c.vision_token_id]
    chooser = _Chooser(model, inputs, GenerationConfig())
    logits = torch.zeros(1, 512)
    logits[0, banned] = 100.0
    logits[0, 42] = 1.0
    assert chooser(logits) == [42]


def test_context_is_checked_before_anything_runs(model, inputs, monkeypatch):
    monkeypatch.setattr(model, "encode_media", lambda *a: pytest.fail("the tower ran"))
    length = inputs["input_ids"].shape[1]
    with pytest.raises(ContextLengthError, match=f"the prompt has {length} tokens and max_new_tokens is 32768"):
        _run(model, inputs, max_new_tokens=32768)


def test_the_checkpoint_defaults_are_used(model):
    model.generation_defaults, saved = (
        {"do_sample": True, "top_p": 0.5, "eos_token_id": 3},
        model.generation_defaults,
    )
    try:
        config = GenerationConfig.from_model(model, temperature=0.5)
        assert (config.do_sample, config.top_p, config.temperature) == (True, 0.5, 0.5)
    finally:
        model.generation_defaults = saved


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be an integer >= 1, got 0"),
        ({"temperature": 0}, "temperature must be > 0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]"),
        ({"top_k": -1}, "top_k must be an integer >= 0"),
        ({"repetition_penalty": -1}, "repetition_penalty must be > 0"),
        ({"stop": "word"}, "stop must be a sequence of non-empty strings, got 'word'"),
    ],
)
def test_generation_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        GenerationConfig(**options)


def _without(inputs, *names):
    return {k: v for k, v in inputs.items() if k not in names}


def test_wrong_calls_name_the_argument(model, inputs):
    grid, pixels = inputs["image_grid_thw"], inputs["pixel_values"]
    ids = inputs["input_ids"]
    cases = [
        (_without(inputs, "image_grid_thw"), "pixel_values and image_grid_thw must be given together"),
        ({**inputs, "pixel_values": pixels[:-1]}, r"pixel_values must have shape \(24, 1176\) .* got \(23, 1176\)"),
        ({**inputs, "pixel_values": pixels[:, :-1]}, r"pixel_values must have shape \(24, 1176\)"),
        ({**inputs, "image_grid_thw": grid * 2, "pixel_values": pixels.repeat(8, 1)}, "image"),
        ({**inputs, "image_grid_thw": torch.tensor([[1, 3, 8]])}, "height and width divisible by 2, got"),
        ({**inputs, "attention_mask": inputs["attention_mask"][:, :-1]}, "attention_mask must have input_ids' shape"),
        ({**inputs, "attention_mask": torch.zeros_like(ids)}, "every sequence needs at least one token"),
        ({**inputs, "input_ids": ids[0]}, r"input_ids must be integers of shape \(B, L\)"),
        ({**inputs, "input_ids": ids.float()}, "input_ids must be integers"),
        ({**inputs, "position_ids": torch.zeros(1, 3, 4)}, "position_ids must have shape"),
        ({**inputs, "input_ids": ids.masked_fill(ids == model.config.image_token_id, 5)}, "image"),
        (_without(inputs, "image_grid_thw", "pixel_values"), "image"),
        (
            {**inputs, "pixel_values_videos": pixels.float(), "video_grid_thw": grid,
             "position_ids": torch.zeros(3, *ids.shape).long()},
            "must have one dtype",
        ),
    ]  # fmt: skip
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            model(**arguments)


def test_cache_limits(model):
    cache = KVCache(model.config.text, 1, 4, device=model.device, dtype=model.dtype)
    with torch.no_grad():
        with pytest.raises(ContextLengthError, match="the cache holds 4 tokens a sequence, 5 are needed"):
            model(torch.arange(5)[None], cache=cache)
        with pytest.raises(PromptError, match="cache holds 1 sequences, input_ids has 2"):
            model(torch.zeros(2, 3, dtype=torch.int64), cache=cache)
    with pytest.raises(PromptError, match=r"call the model under torch.no_grad\(\)"):
        model(torch.arange(3)[None], cache=cache)
    assert cache.lengths == [0] and cache.next_position.tolist() == [0]


def test_a_failed_call_leaves_the_cache_as_it_was(model, monkeypatch):
    cache = KVCache(model.config.text, 1, 8, device=model.device, dtype=model.dtype)
    with torch.no_grad():
        model(torch.arange(3)[None], cache=cache)
        monkeypatch.setattr(model.model.layers[1], "forward", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(torch.arange(2)[None], cache=cache)
    assert cache.lengths == [3] and cache.next_position.tolist() == [3]


def test_stream_takes_one_sequence(model, processor):
    batch = processor([[{"role": "user", "content": text}] for text in ("a", "b")])
    with pytest.raises(PromptError, match="stream takes a batch of one, got 2"):
        next(stream(model, batch, tokenizer=processor.tokenizer))


def test_unwritten_slots_are_never_read(model, processor):
    """A ragged batch over a cache full of NaN answers as over any other."""
    batch = processor([[{"role": "user", "content": text}] for text in ("a", "Tell me more than that, please.")])
    with torch.no_grad():
        outputs = []
        for poison in (0.0, float("nan")):
            cache = KVCache(model.config.text, 2, 64, device=model.device, dtype=model.dtype)
            cache.k.fill_(poison)
            cache.v.fill_(poison)
            model(**batch, cache=cache)
            outputs.append(model(torch.tensor([[5, 6], [7, 8]]), cache=cache))
            outputs.append(model(torch.tensor([[5], [7]]), cache=cache))
    assert torch.equal(outputs[0], outputs[2]) and torch.equal(outputs[1], outputs[3])
    assert torch.isfinite(outputs[0]).all()
