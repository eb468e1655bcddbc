"""Choosing tokens, stopping, streaming, limits, and what a wrong call to the model says."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from qwen2vl import (
    Box,
    CheckpointError,
    ContextLengthError,
    GenerationConfig,
    GroundingError,
    Located,
    PromptError,
    Quad,
    Qwen2VLError,
    generate,
    stream,
)
from qwen2vl.cache import KVCache
from qwen2vl.choosing import Choice, Chooser
from qwen2vl.progress import Row

ENDLESS = (10**6,)


@pytest.fixture(scope="module")
def inputs(processor):
    image = np.random.default_rng(0).integers(0, 256, (56, 84, 3), dtype=np.uint8)
    return processor([{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "Hi"}]}])


def _run(model, inputs, processor=None, **options):
    options.setdefault("eos_token_ids", ENDLESS)
    options.setdefault("max_new_tokens", 16)
    tokenizer = processor.tokenizer if processor else None
    return generate(model, inputs, tokenizer=tokenizer, config=GenerationConfig(**options))


def _choose(chooser, logits):
    return chooser(logits, [[]], [False]).tokens.item()


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


def test_a_control_token_is_a_stop_string(model, processor, inputs, monkeypatch):
    """Whichever it is, in an answer that would go on; texts do not show it."""
    tokenizer = processor.tokenizer
    written = tokenizer.encode_plain("one two three four")
    at, banned = 2, {model.config.image_token_id, model.config.video_token_id, model.config.vision_token_id}
    names = [name for name, token in tokenizer.special_ids.items() if token not in banned]
    assert {"<|object_ref_end|>", "<|box_end|>", "<|im_end|>", "<|endoftext|>"} <= set(names)
    for name in names:
        answer = [*written[:at], tokenizer.id(name), *written[at:]]
        pending = iter(answer * 2)
        monkeypatch.setattr(Chooser, "__call__", lambda *_, pending=pending: Choice(torch.tensor([next(pending)])))
        result = _run(model, inputs, processor, max_new_tokens=len(answer), stop=("never there", name))
        assert result.sequences == [written[:at]] and result.texts == [tokenizer.decode(written[:at])]
        assert result.finish_reasons == ["stop_string"], name
        config = GenerationConfig(max_new_tokens=len(answer), eos_token_ids=ENDLESS, stop=(name,))
        pending = iter(answer)
        monkeypatch.setattr(Chooser, "__call__", lambda *_, pending=pending: Choice(torch.tensor([next(pending)])))
        assert "".join(stream(model, inputs, tokenizer=tokenizer, config=config)) == result.texts[0]


def _answers(monkeypatch, tokenizer, *texts):
    """The next answers of a batch, as ids; markers are control tokens."""
    rows = []
    for text in texts:
        pieces = [p for p in re.split(r"(<\|\w+\|>)", text) if p]
        rows.append([i for p in pieces for i in ([tokenizer.id(p)] if p[0] == "<" else tokenizer.encode_plain(p))])
    end = tokenizer.id("<|im_end|>")
    steps = zip(*[row + [end] * (max(map(len, rows)) + 1 - len(row)) for row in rows], strict=True)
    monkeypatch.setattr(Chooser, "__call__", lambda *_: Choice(torch.tensor(next(steps))))


def test_a_result_offers_its_places(model, processor, monkeypatch):
    """Each row's own, in pixels of the picture as it was given, upright; texts show no markers."""
    turned = Image.new("RGB", (200, 100))
    turned.getexif()[0x0112] = 6
    clip, small = np.zeros((4, 56, 84, 3), np.uint8), Image.new("RGB", (80, 40))
    find = {"type": "text", "text": "Find the cat."}
    chats = [
        [{"role": "user", "content": [*({"type": kind, kind: one} for kind, one in media), find]}]
        for media in (
            [("image", turned)],
            [],
            [("video", clip)],
            [("image", turned), ("image", small)],
        )
    ]
    cat = "<|object_ref_start|>the cat<|object_ref_end|>"
    box, quad = (
        "<|box_start|>(100,200),(500,1000)<|box_end|>",
        "<|quad_start|>(0,0),(500,0),(500,500),(0,500)<|quad_end|>",
    )
    texts = [f"Here: {cat}{box}{quad}", box, f"{cat}{box}", f"{cat} {box}"]
    _answers(monkeypatch, processor.tokenizer, *texts)
    result = _run(model, processor(chats), processor, max_new_tokens=100, eos_token_ids=())
    assert [raw.startswith(text) for raw, text in zip(result.raw_texts, texts, strict=True)] == [True] * 4
    assert "<|" not in "".join(result.texts)
    place, corners = Box(100, 200, 500, 999), Quad(((0, 0), (500, 0), (500, 500), (0, 500)))
    assert (
        result.places()
        == result.places(0)
        == [
            Located("the cat", place, 0, (10, 40, 50, 199.8)),
            Located("the cat", corners, 0, ((0, 0), (50, 0), (50, 100), (0, 100))),
        ]
    )
    assert result.places(1) == [Located(None, place, None, None)]
    assert result.places(2) == [Located("the cat", place, 0, pytest.approx((8.4, 11.2, 42, 55.944)))]
    assert result.places(3) == [Located("the cat", place, None, None)]
    assert result.places(3, media=1) == [Located("the cat", place, 1, pytest.approx((8, 8, 40, 39.96)))]
    for arguments, error, match in (
        ({"row": 4}, PromptError, "row: wants the index of one of 4 answers, got 4"),
        ({"row": 3, "media": 2}, GroundingError, "media: wants the index of one of 2 images and videos, got 2"),
        ({"row": 1, "media": 0}, GroundingError, "of 0 images and videos"),
    ):
        with pytest.raises(error, match=match):
            result.places(**arguments)


def test_every_answer_of_a_prompt_has_the_prompts_media(model, processor, monkeypatch):
    picture = {"type": "image", "image": Image.new("RGB", (200, 100))}
    chats = [[{"role": "user", "content": [*media, {"type": "text", "text": "Find."}]}] for media in ([], [picture])]
    box = "<|box_start|>(100,200),(500,500)<|box_end|>"
    _answers(monkeypatch, processor.tokenizer, *[box] * 4)
    drawn = {"max_new_tokens": 60, "eos_token_ids": (), "temperature": 1.0, "num_return_sequences": 2}
    result = _run(model, processor(chats), processor, **drawn)
    assert [result.places(row)[0].pixels for row in range(4)] == [None, None, *[(20, 20, 100, 50)] * 2]


def test_seeds_of_rows(model, processor):
    chats = [[{"role": "user", "content": text}] for text in ("Say.", "Say it.")]
    drawn = {"max_new_tokens": 8, "temperature": 2.0}
    first = _run(model, processor(chats), processor, **drawn, seed=5).sequences
    assert first == _run(model, processor(chats), processor, **drawn, seed=[5, 6]).sequences
    turned = _run(model, processor(chats[::-1]), processor, **drawn, seed=[6, 5]).sequences
    assert turned == first[::-1] != _run(model, processor(chats[::-1]), processor, **drawn, seed=5).sequences
    with pytest.raises(Qwen2VLError, match="seed: wants one for each of 2 prompts, got 3"):
        _run(model, processor(chats), processor, **drawn, seed=[1, 2, 3])


def test_a_place_that_a_stop_token_ends_is_whole(model, processor, inputs, monkeypatch):
    _answers(monkeypatch, processor.tokenizer, "<|box_start|>(1,2),(3,4)<|box_end|>, and more")
    result = _run(model, inputs, processor, max_new_tokens=60, stop=("<|box_end|>",))
    assert result.finish_reasons == ["stop_string"] and [one.place for one in result.places()] == [Box(1, 2, 3, 4)]
    _answers(monkeypatch, processor.tokenizer, "x")
    with pytest.raises(PromptError, match="give generate a tokenizer"):
        _run(model, inputs, max_new_tokens=1).places()
    plain = dict(inputs)  # tensors alone: what they were made of is not known
    _answers(monkeypatch, processor.tokenizer, "<|box_start|>(1,2),(3,4)<|box_end|>")
    result = _run(model, plain, processor, max_new_tokens=60, eos_token_ids=())
    assert result.places() == [Located(None, Box(1, 2, 3, 4), None, None)]


@pytest.mark.parametrize("text", ["cat<|object_ref_end|>", "<|box_end|>\n", "<|box_end|><|im_end|>"])
def test_a_stop_string_that_could_never_be_found_is_refused(text, model, processor, inputs):
    with pytest.raises(PromptError, match=r"stop: wants control tokens by themselves.* with <"):
        _run(model, inputs, processor, stop=(text,))
    with pytest.raises(PromptError, match="stop: wants control tokens by themselves"):
        stream(model, inputs, tokenizer=processor.tokenizer, config=GenerationConfig(stop=(text,)))


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
    for likeliest in ({"top_k": 1}, {"top_p": 0}, {"top_p": 0.0, "temperature": 9.0}):
        assert _run(model, alone, do_sample=True, seed=1, **likeliest).sequences == _run(model, alone).sequences


def _filtered(config, ids, logits, banned):
    """The distribution that transformers' processors leave of one row's logits."""
    scores = RepetitionPenaltyLogitsProcessor(config.repetition_penalty)(ids, logits.clone())
    scores[:, banned] = float("-inf")
    steps = [TemperatureLogitsWarper(config.temperature)]
    steps += [TopKLogitsWarper(config.top_k)] if config.top_k else []
    steps += [TopPLogitsWarper(config.top_p)] if config.top_p < 1 else []
    return LogitsProcessorList(steps)(ids, scores).softmax(-1)[0]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "penalty"),
    [
        (1.0, 0, 1.0, 1.3),
        (0.7, 5, 1.0, 1.0),
        (1.5, 0, 0.3, 1.0),
        (1.5, 0, 0.0, 1.0),
        (1.5, 9, 1e-9, 1.3),
        (1.0, 0, 0.8, 1.3),
        (0.7, 60, 0.8, 1.3),
        (1.2, 60, 0.9, 0.8),
    ],
)
def test_the_distribution_is_transformers(model, temperature, top_k, top_p, penalty):
    """Flat logits, ids already seen among the likeliest with both signs, two rows, one of them padded."""
    logits = torch.randn(2, 512) - 1.5
    order = logits.argsort(-1, descending=True)
    ids = order[:, :96:3].clone()  # ranks 0, 3, .. 93; about 30 scores of a row are positive
    mask = torch.ones_like(ids)
    mask[0, :8] = 0
    ids[0, :8] = order[0, 1]  # padding, and a likely id: it has not been seen
    for row in (0, 1):
        signs = logits[row, ids[row][mask[row].bool()]] > 0
        assert 0 < signs.sum() < len(signs)
    config = GenerationConfig(
        do_sample=True, temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=penalty, seed=3
    )
    chooser = Chooser(model, {"input_ids": ids, "attention_mask": mask}, config)
    got = chooser.probabilities(chooser.scores(logits))
    got = got / got.sum(-1, keepdim=True)
    c = model.config
    for row in (0, 1):
        real = ids[row][mask[row].bool()][None]
        banned = [c.image_token_id, c.video_token_id, c.vision_token_id]
        expected = _filtered(config, real, logits[row][None], banned)
        if top_p > 1e-3:
            assert (expected > 0).sum() >= 5 and expected.max() < 0.5, "a distribution that says something"
        torch.testing.assert_close(got[row], expected, rtol=1e-5, atol=1e-6)


def test_an_answers_own_tokens_are_penalised(model):
    config = GenerationConfig(repetition_penalty=2.0)
    chooser = Chooser(model, {"input_ids": torch.tensor([[3]])}, config)
    logits = torch.zeros(1, 512)
    logits[0, 7], logits[0, 8] = 3.0, 2.0
    assert [_choose(chooser, logits) for _ in range(3)] == [7, 8, 7]


def test_draws_fall_by_the_distribution(model):
    logits = torch.randn(1, 512)
    chooser = Chooser(model, {"input_ids": torch.tensor([[3]])}, GenerationConfig(do_sample=True, top_k=8, seed=3))
    expected = chooser.probabilities(chooser.scores(logits))[0]
    counts = torch.bincount(torch.tensor([_choose(chooser, logits) for _ in range(4000)]), minlength=512)
    assert torch.count_nonzero(counts[expected == 0]) == 0
    # 4000 draws: five standard deviations of a proportion are at most 0.04.
    torch.testing.assert_close(counts / 4000, expected, rtol=0, atol=0.04)


class _Letters:
    """A decoder that makes one character of a token and keeps ``tail`` for the end."""

    def __init__(self, tail=""):
        self.tail = tail

    def push(self, token):
        return chr(token)

    def finish(self):
        return self.tail


@pytest.mark.parametrize(
    ("stop", "text", "pieces", "reason"),
    [
        ((), "abc", ["a", "b", "c"], ""),
        # Held back while it may become the stop string, and gone when it does.
        (("abc",), "xabcz", ["x", "", "", ""], "stop_string"),
        # A near miss is released at the character that tells, but for what may begin the stop string anew.
        (("abc",), "abxab", ["", "", "abx", "", ""], ""),
        (("aab",), "aaab", ["", "", "a", ""], "stop_string"),
        # Two stop strings that overlap: the earlier end wins, and nothing of either was shown.
        (("abcd", "bc"), "xabcd", ["x", "", "", "a"], "stop_string"),
        # Both end at one character: the text ends where the earlier one begins.
        (("bc", "abc"), "xabc", ["x", "", "", ""], "stop_string"),
        (("bcde", "abx"), "abcdq", ["", "", "a", "", "bcdq"], ""),
        (("a", "bc"), "bca", ["", ""], "stop_string"),
    ],
)
def test_text_that_may_begin_a_stop_string_is_held_back(stop, text, pieces, reason):
    row = Row(_Letters(), stop)
    got = []
    for letter in text:
        got.append(row.push(ord(letter), {}, 99))
        assert "".join(got) == row.text[: row.shown]
        if row.reason:
            break
    assert got == pieces and row.reason == reason
    if reason:
        assert row.text == "".join(pieces)


def test_text_held_back_is_released_at_the_end():
    row = Row(_Letters(tail="!"), ("abc",))
    assert [row.push(ord(x), {0: "stop"}, 99) for x in "ab"] == ["", ""]
    assert row.push(0, {0: "stop"}, 99) == "ab!" and row.reason == "stop" and row.ids == [97, 98]
    row = Row(_Letters(), ("abc",))
    assert [row.push(ord(x), {}, 2) for x in "ab"] == ["", "ab"] and row.reason == "length"
    row = Row(_Letters(tail="c"), ("abc",))  # a stop string that the decoder's last characters complete
    assert [row.push(ord(x), {}, 2) for x in "ab"] == ["", ""] and row.reason == "stop_string"


def test_placeholders_are_never_generated(model, processor, inputs):
    c = model.config
    banned = [c.image_token_id, c.video_token_id, c.vision_token_id]
    chooser = Chooser(model, inputs, GenerationConfig())
    logits = torch.zeros(1, 512)
    logits[0, banned] = 100.0
    logits[0, 42] = 1.0
    assert _choose(chooser, logits) == 42


def _with_context(model, monkeypatch, limit):
    text = replace(model.config.text, max_position_embeddings=limit)
    monkeypatch.setattr(model, "config", replace(model.config, text=text))


def test_a_prompt_without_room_for_an_answer_is_refused_before_anything_runs(model, processor, inputs, monkeypatch):
    monkeypatch.setattr(model.visual, "forward", lambda *a, **k: pytest.fail("the tower ran"))
    length = inputs["input_ids"].shape[1]
    _with_context(model, monkeypatch, length)
    refusal = rf"leave room for an answer in the model's context of {length} tokens, got {length} in row 0;"
    with pytest.raises(ContextLengthError, match=refusal):
        _run(model, inputs, max_new_tokens=1)
    with pytest.raises(ContextLengthError, match=refusal):
        stream(model, inputs, tokenizer=processor.tokenizer)
    said = ("a", "Tell me " * length, "b", "Tell me more " * length)
    batch = processor([[{"role": "user", "content": text}] for text in said])
    with pytest.raises(ContextLengthError, match=r"got \d+ in row 1, \d+ in row 3;"):
        _run(model, batch)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)], ids=str)
def test_the_room_for_an_answer_is_that_of_its_own_prompt(order, model, processor, monkeypatch):
    """One answer fills the context at its fifth token, one has room to spare, one ends there in both ways at once."""
    asked = [processor([{"role": "user", "content": "Tell me more. " * n}]) for n in (30, 3, 25)]
    lengths = [one["input_ids"].shape[1] for one in asked]
    limit, wanted = lengths[0] + 5, lengths[0] + 5 - lengths[2]
    assert wanted > 20 and lengths[1] + wanted < limit
    free = [_run(model, one, max_new_tokens=wanted).sequences[0] for one in asked]
    _with_context(model, monkeypatch, limit)
    batch = processor([[{"role": "user", "content": "Tell me more. " * (30, 3, 25)[n]}] for n in order])
    together = _run(model, batch, processor, max_new_tokens=wanted)
    rooms, reasons = (5, wanted, wanted), ("context", "length", "length")
    assert together.sequences == [free[n][: rooms[n]] for n in order]
    assert together.finish_reasons == [reasons[n] for n in order]
    for n, one in enumerate(asked):
        alone = _run(model, one, max_new_tokens=wanted)
        assert alone.sequences == [free[n][: rooms[n]]] and alone.finish_reasons == [reasons[n]]
    config = GenerationConfig(max_new_tokens=wanted, eos_token_ids=ENDLESS)
    pieces = stream(model, asked[0], tokenizer=processor.tokenizer, config=config)
    assert "".join(pieces) == together.texts[order.index(0)]


def test_the_checkpoint_defaults_are_used(model, monkeypatch):
    monkeypatch.setattr(
        model, "generation_defaults", {"do_sample": True, "top_p": 0.5, "top_k": None, "pad_token_id": 3}
    )
    config = GenerationConfig.from_model(model, repetition_penalty=2.0)
    assert config == GenerationConfig(do_sample=True, top_p=0.5, repetition_penalty=2.0)
    monkeypatch.setattr(model, "generation_defaults", {"do_sample": True, "temperature": 0.0})
    assert GenerationConfig.from_model(model) == GenerationConfig(do_sample=False), "temperature 0 is greedy"
    assert GenerationConfig.from_model(model, do_sample=True, temperature=0.7).temperature == 0.7


@pytest.mark.parametrize(
    "setting", [{"temperature": 1.9}, {"temperature": 1.0}, {"top_p": 0.9}, {"top_k": 50}], ids=str
)
def test_a_setting_that_shapes_draws_draws(setting, model, inputs, monkeypatch):
    """With nothing said, beside the released checkpoints' settings, and where a checkpoint is greedy."""
    greedy = _run(model, inputs).sequences
    drawn = _run(model, inputs, seed=1, do_sample=True, **setting).sequences
    assert drawn != greedy, "the seed does not show the difference"
    assert _run(model, inputs, seed=1, **setting).sequences == drawn
    assert replace(GenerationConfig(), **setting).samples
    released = {"do_sample": True, "temperature": 0.01, "top_k": 1, "top_p": 0.001}
    for defaults in ({}, released, {"do_sample": False, "temperature": 0.1}, {"temperature": 0.1}):
        monkeypatch.setattr(model, "generation_defaults", defaults)
        config = GenerationConfig.from_model(model, seed=1, max_new_tokens=16, eos_token_ids=ENDLESS, **setting)
        assert generate(model, inputs, config=config).sequences == drawn


@pytest.mark.parametrize("setting", [{"temperature": 0.7}, {"top_p": 0.9}, {"top_k": 50}], ids=str)
def test_a_setting_that_would_do_nothing_is_refused(setting, model, monkeypatch):
    ((name, value),) = setting.items()
    with pytest.raises(ValueError, match=f"{name} must be left out with do_sample=False.* got {value}"):
        GenerationConfig(do_sample=False, **setting)
    with pytest.raises(ValueError, match=f"{name} must be left out with do_sample=False"):
        GenerationConfig.from_model(model, do_sample=False, **setting)
    assert not GenerationConfig(do_sample=False, temperature=1.0, top_p=1.0, top_k=0).samples, "these change nothing"
    for said in ({"do_sample": False}, {}):  # a checkpoint's file may hold both, as many do
        monkeypatch.setattr(model, "generation_defaults", {**said, **setting})
        assert GenerationConfig.from_model(model) == GenerationConfig(do_sample=False)
        assert GenerationConfig.from_model(model, do_sample=True) == GenerationConfig(do_sample=True, **setting)


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": "hot"},
        {"temperature": -1},
        {"top_p": 2},
        {"top_k": "many"},
        {"max_new_tokens": 0},
        {"do_sample": "no"},
    ],
    ids=str,
)
def test_defaults_that_mean_nothing_are_the_checkpoints_fault(values, model, monkeypatch):
    monkeypatch.setattr(model, "generation_defaults", values)
    with pytest.raises(CheckpointError, match=f"generation_config.json: {next(iter(values))} must be"):
        GenerationConfig.from_model(model)


@pytest.mark.parametrize("many", [False, True], ids=["integer", "list"])
def test_the_checkpoints_end_ids_end_an_answer(many, model, inputs, monkeypatch):
    free = _run(model, inputs).sequences[0]
    end = next(token for at, token in enumerate(free) if at >= 3 and token not in free[:at])
    monkeypatch.setattr(model, "generation_defaults", {"eos_token_id": [500, end] if many else end})
    got = generate(model, inputs, config=GenerationConfig(max_new_tokens=16))
    assert got.sequences[0] == free[: free.index(end)] and got.finish_reasons == ["stop"]
    assert _run(model, inputs).sequences[0] == free, "ids that the caller names come first"


def test_without_stated_end_ids_the_configs_end_an_answer(model, inputs, monkeypatch):
    free = _run(model, inputs).sequences[0]
    end = next(token for at, token in enumerate(free) if at >= 3 and token not in free[:at])
    monkeypatch.setattr(model, "generation_defaults", {})
    for name in ("eos_token_id", "bos_token_id"):
        monkeypatch.setattr(model, "config", replace(model.config, **{name: end}))
        got = generate(model, inputs, config=GenerationConfig(max_new_tokens=16))
        assert got.sequences[0] == free[: free.index(end)] and got.finish_reasons == ["stop"]
        monkeypatch.undo()
        monkeypatch.setattr(model, "generation_defaults", {})


def test_sampling_takes_its_seed_from_torch_and_reseeds_nothing(model, inputs):
    options = {"do_sample": True, "temperature": 1.5, "max_new_tokens": 12}
    answers, following = [], []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        answers += [_run(model, inputs, **options).sequences for _ in range(2)]
        following.append(torch.rand(()).item())
    assert answers[:2] == answers[2:4], "torch.manual_seed repeats an answer"
    assert answers[0] != answers[1] and answers[0] != answers[4], "and does not make all answers one"
    assert following[0] == following[1] != following[2]
    before = torch.get_rng_state()
    _run(model, inputs, seed=5, **options)
    assert torch.equal(torch.get_rng_state(), before), "a seed of its own leaves torch's generator alone"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be an integer >= 1, got 0"),
        ({"max_new_tokens": -5}, "max_new_tokens must be an integer >= 1, got -5"),
        ({"max_new_tokens": True}, "max_new_tokens must be an integer >= 1, got True"),
        ({"num_return_sequences": 0, "top_k": 5}, r"num_return_sequences must be an integer in \[1, 65536\], got 0"),
        ({"num_return_sequences": 10**11, "top_k": 5}, r"must be an integer in \[1, 65536\], got 100000000000"),
        ({"temperature": 10**5000}, r"temperature must be > 0 .*got one of 2\*\*63 or more"),
        ({"top_p": -(10**400)}, r"top_p must be in \[0, 1\], got "),
        ({"repetition_penalty": 10**400}, r"repetition_penalty must be > 0, got one of 2\*\*63 or more"),
        ({"max_new_tokens": 10**5000}, r"max_new_tokens must be an integer >= 1, got one of 2\*\*63 or more"),
        ({"seed": [10**5000]}, "seed must be .*got one of type list with a number of thousands of digits"),
        ({"temperature": -(10**5000)}, "temperature must be > 0 .*got one of type int with a number of thousands"),
        ({"seed": 1 << 63}, r"seed must be an integer, several or None, got one of 2\*\*63 or more"),
        ({"stop": ["a" * 10**6, ""]}, r"stop must be a sequence of non-empty strings, got \['aaa"),
        ({"num_return_sequences": 3}, "num_return_sequences must be 1 where the likeliest token is taken, got 3"),
        ({"num_return_sequences": 2, "do_sample": False}, "must be 1 where the likeliest token is taken, got 2"),
        ({"logprobs": -1}, "logprobs must be an integer >= 0, got -1"),
        ({"logprobs": True}, "logprobs must be an integer >= 0, got True"),
        ({"seed": "one"}, "seed must be an integer, several or None, got 'one'"),
        ({"eos_token_ids": 7}, "eos_token_ids must be a sequence of integers >= 0, got 7"),
        ({"eos_token_ids": ("x",)}, "eos_token_ids must be a sequence of integers >= 0"),
        ({"do_sample": 0}, "do_sample must be True, False or None, got 0"),
        ({"temperature": 0}, "temperature must be > 0"),
        ({"temperature": float("inf")}, "temperature must be > 0"),
        ({"top_p": -0.1}, r"top_p must be in \[0, 1\], got -0.1"),
        ({"top_p": float("nan")}, r"top_p must be in \[0, 1\]"),
        ({"top_k": -1}, "top_k must be an integer >= 0"),
        ({"repetition_penalty": -1}, "repetition_penalty must be > 0"),
        ({"stop": "word"}, "stop must be a sequence of non-empty strings, got 'word'"),
        ({"stop": (7,)}, "stop must be a sequence of non-empty strings"),
    ],
)
def test_generation_options_are_checked(options, message):
    with pytest.raises(Qwen2VLError, match=message):
        GenerationConfig(**options)


def _without(inputs, *names):
    return {k: v for k, v in inputs.items() if k not in names}


def test_wrong_calls_name_the_argument(model, inputs):
    grid, pixels = inputs["image_grid_thw"], inputs["pixel_values"]
    ids = inputs["input_ids"]
    positions = torch.arange(ids.shape[1]).expand(3, 1, -1)
    no_media = _without(inputs, "image_grid_thw", "pixel_values")
    cases = [
        (_without(inputs, "image_grid_thw"), "pixel_values and image_grid_thw must be given together"),
        (_without(inputs, "pixel_values"), "pixel_values and image_grid_thw must be given together"),
        ({**inputs, "pixel_values": pixels[:-1]}, r"pixel_values must have shape \(24, 1176\) .* got \(23, 588\)"),
        ({**inputs, "pixel_values": pixels[:, :-1]}, r"pixel_values must have shape \(24, 1176\)"),
        ({**inputs, "image_grid_thw": grid * 2, "pixel_values": pixels.repeat(8, 1)}, "image"),
        ({**inputs, "image_grid_thw": torch.tensor([[1, 3, 8]])}, "height and width divisible by 2, got"),
        ({**inputs, "image_grid_thw": grid.float()}, r"image_grid_thw must be integers .*, got torch.float32"),
        ({**inputs, "image_grid_thw": grid[0]}, r"image_grid_thw must be integers of shape \(n, 3\), got .* \(3,\)"),
        ({**inputs, "image_grid_thw": grid[:0]}, "pixel_values has 24 rows, but image_grid_thw has no item"),
        (
            {**no_media, "input_ids": torch.tensor([[5, 6]]), "attention_mask": None, "pixel_values": pixels,
             "image_grid_thw": grid[:0]},
            "pixel_values has 24 rows, but image_grid_thw has no item",
        ),
        ({**inputs, "attention_mask": inputs["attention_mask"][:, :-1]}, "attention_mask must have input_ids' shape"),
        ({**inputs, "attention_mask": torch.zeros_like(ids)}, "every sequence needs at least one token"),
        ({**inputs, "input_ids": ids[0]}, r"input_ids must be integers of shape \(B, L\)"),
        ({**inputs, "input_ids": ids.float()}, "input_ids must be integers"),
        ({"input_ids": ids[:0]}, r"input_ids must be integers of shape \(B, L\), not empty, got .* \(0, "),
        ({"input_ids": ids[:, :0]}, r"input_ids must be integers of shape \(B, L\), not empty"),
        ({"input_ids": torch.tensor([[1, 512]])}, r"input_ids must be in \[0, 512\), got 512"),
        ({**inputs, "position_ids": torch.zeros(1, 3, 4)}, "position_ids must have shape"),
        ({**inputs, "input_ids": ids.masked_fill(ids == model.config.image_token_id, 5)}, "image"),
        (no_media, "image"),
        ({**no_media, "position_ids": positions}, "input_ids has 6 image placeholders, the images given make 0 tokens"),
        ({**inputs, "pixel_values": pixels.float()}, r"got \(24, 588\) torch.float32"),
        ({**inputs, "pixel_values_videos": pixels, "video_grid_thw": grid * torch.tensor([2, 1, 1]),
          "position_ids": torch.zeros(3, *ids.shape).long()}, r"must have shape \(48, 1176\) .* got \(24, 588\)"),
    ]  # fmt: skip
    for arguments, message in cases:
        with pytest.raises(PromptError, match=message):
            model(**arguments)


def test_a_negative_id_is_named(model):
    with pytest.raises(PromptError, match=r"input_ids must be in \[0, 512\), got -1"):
        model(torch.tensor([[1, -1, 5]]))


@pytest.mark.parametrize("shape", [(0, 3), (1, 0)], ids=str)
def test_generate_refuses_an_empty_batch(shape, model, processor):
    empty = {"input_ids": torch.zeros(shape, dtype=torch.int64)}
    with pytest.raises(PromptError, match="input_ids must be integers of shape"):
        generate(model, empty)


def test_placeholders_without_pixels_are_refused_on_a_warm_cache(model, inputs):
    ids = inputs["input_ids"]
    cache = KVCache(model.config.text, 1, 64, device=model.device, dtype=model.dtype)
    with torch.no_grad():
        model(torch.arange(3)[None], cache=cache)
        for arguments in (
            {},
            {"attention_mask": torch.ones_like(ids)},
            {"position_ids": torch.zeros(3, *ids.shape).long()},
        ):
            with pytest.raises(PromptError, match="image"):
                model(ids, cache=cache, **arguments)
    assert cache.lengths == [3] and cache.next_position.tolist() == [3]


def test_token_types_of_transformers_processors_are_taken(model, inputs):
    types = (inputs["input_ids"] == model.config.image_token_id).int()
    with torch.no_grad():
        assert torch.equal(model(**inputs, mm_token_type_ids=types), model(**inputs))
    with_types = {**inputs, "mm_token_type_ids": types}
    assert _run(model, with_types).sequences == _run(model, inputs).sequences


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


def test_stream_refuses_at_the_call(model, processor):
    batch = processor([[{"role": "user", "content": text}] for text in ("a", "b")])
    with pytest.raises(PromptError, match="stream takes a batch of one, got 2"):
        stream(model, batch, tokenizer=processor.tokenizer)


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


def test_the_processor_is_not_a_tokenizer(model, processor, inputs):
    with pytest.raises(TypeError, match="tokenizer must be a processor's tokenizer, got Processor"):
        generate(model, inputs, tokenizer=processor)
