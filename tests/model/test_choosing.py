"""What callers put between logits and choice, and what they learn of it, against transformers' own generate."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from qwen2vl import GenerationConfig, Processor, PromptError, Qwen2VL, Qwen2VLError, assets, generate, stream
from qwen2vl.choosing import Chooser
from tests.model import oracle
from tests.test_docs import ROOT, blocks

ENDLESS = (10**6,)
PROMPTS = ("Hi", "Tell me more than that, please.", "Where is it?")


@pytest.fixture(scope="module")
def theirs(folder):
    return oracle.load(folder)


@pytest.fixture(scope="module")
def batch(processor):
    return processor([_user(prompt) for prompt in PROMPTS])


def _user(text):
    return [{"role": "user", "content": text}]


def _banned(model):
    """What an answer never holds here, and may hold in transformers unless it is told."""
    return [model.config.image_token_id, model.config.video_token_id, model.config.vision_token_id]


def _ask_transformers(theirs, model, inputs, **options):
    """One prompt, to transformers' generate with scores and logits, 16 tokens."""
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": ENDLESS[0], **options}
    return theirs.generate(
        inputs["input_ids"],
        attention_mask=torch.ones_like(inputs["input_ids"]),
        max_new_tokens=16,
        suppress_tokens=_banned(model),
        output_scores=True,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )


class Wander(LogitsProcessor):
    """Likes ids that lie far from the last one of the answer, and forbids all that it holds; ours and transformers'."""

    def __init__(self, prompt_tokens=0):
        self.prompt_tokens = prompt_tokens

    def __call__(self, ids, scores):
        for row, answer in zip(scores, ids, strict=True):
            answer = torch.as_tensor(answer[self.prompt_tokens :], dtype=torch.int64)
            if len(answer):
                row += (torch.arange(len(row)) - answer[-1]).abs() / 100
                row[answer] = -torch.inf
        return scores


class Even:
    """Even ids only, in scores of its own."""

    def __call__(self, ids, scores):
        return scores.masked_fill(torch.arange(scores.shape[1]) % 2 == 1, -torch.inf)


@pytest.mark.parametrize("penalty", [1.0, 1.4])
def test_processors_stand_where_transformers_has_them(penalty, theirs, model, processor, batch):
    config = GenerationConfig(max_new_tokens=16, eos_token_ids=ENDLESS, repetition_penalty=penalty)
    got = generate(model, batch, config=config, logits_processors=[Wander(), Even()]).sequences
    assert got != generate(model, batch, config=config).sequences
    for prompt, sequence in zip(PROMPTS, got, strict=True):
        inputs = processor(_user(prompt))
        length = inputs["input_ids"].shape[1]
        own = LogitsProcessorList([Wander(length), Even()])
        expected = _ask_transformers(theirs, model, inputs, logits_processor=own, repetition_penalty=penalty)
        assert sequence == expected.sequences[0, length:].tolist()
        assert len(set(sequence)) == 16 and not any(token % 2 for token in sequence)


def test_processors_see_every_answer_grow_and_come_before_the_draw(model, processor, batch):
    """Also in a stream; what they forbid is never drawn, and a row that ended does not grow."""
    free = generate(model, batch, config=GenerationConfig(max_new_tokens=8, eos_token_ids=ENDLESS)).sequences
    end = next(token for token in free[0] if token not in free[1])
    seen = []

    def look(answers, scores):
        seen.append([list(answer) for answer in answers])
        return scores

    config = GenerationConfig(max_new_tokens=8, eos_token_ids=(end,))
    got = generate(model, batch, config=config, logits_processors=(look,))
    assert got.sequences[1] == free[1] and len(got.sequences[0]) < 8
    assert seen == [[sequence[:n] for sequence in got.sequences] for n in range(8)]
    allowed = torch.tensor([65, 66, 67])
    drawn = GenerationConfig(max_new_tokens=40, eos_token_ids=ENDLESS, temperature=5.0, seed=1)

    def letters(answers, scores):
        return torch.full_like(scores, -torch.inf).index_copy(1, allowed, scores[:, allowed])

    answers = generate(model, batch, config=drawn, logits_processors=[letters]).sequences
    assert {token for answer in answers for token in answer} == set(allowed.tolist())
    options = {"tokenizer": processor.tokenizer, "config": drawn, "logits_processors": [letters]}
    one = processor(_user("Hi"))
    assert "".join(stream(model, one, **options)) == generate(model, one, **options).texts[0]


def test_a_row_that_ended_may_be_left_without_a_choice(model, batch):
    """A grammar that is through allows nothing more, in a row where nobody asks."""
    free = generate(model, batch, config=GenerationConfig(max_new_tokens=8, eos_token_ids=ENDLESS)).sequences
    end = next(token for token in free[0] if token not in free[1])

    def close(answers, scores):
        scores[torch.tensor([len(answer) < max(map(len, answers)) for answer in answers])] = -torch.inf
        return scores

    for shaped in ({}, {"top_k": 1}):
        config = GenerationConfig(max_new_tokens=8, eos_token_ids=(end,), **shaped)
        assert generate(model, batch, config=config, logits_processors=[close]).sequences[1] == free[1]


def test_placeholders_stay_impossible(model, batch):
    banned = _banned(model)

    def insist(answers, scores):
        scores[:, banned] = 1e4
        return scores

    config = GenerationConfig(max_new_tokens=4, eos_token_ids=ENDLESS)
    plain = generate(model, batch, config=config).sequences
    assert generate(model, batch, config=config, logits_processors=[insist]).sequences == plain


@pytest.mark.parametrize(
    ("process", "message"),
    [
        (lambda answers, scores: None, r"logits_processors\[1\] must return floats .*, got NoneType"),
        (lambda answers, scores: scores[:, :-1], r"floats of shape \(3, 512\), got torch.float32 \(3, 511\)"),
        (lambda answers, scores: scores > 0, r"must return floats of shape \(3, 512\), got torch.bool \(3, 512\)"),
        (lambda answers, scores: scores.index_fill(0, torch.tensor([2]), -torch.inf), "no token to choose in row 2"),
        (lambda answers, scores: scores * torch.nan, "must leave finite scores, got nan among its scores in row 0"),
    ],
)
@pytest.mark.parametrize("shaped", [{}, {"temperature": 0.7}], ids=["greedy", "drawn"])
def test_what_a_processor_may_not_return_is_named(shaped, process, message, model, batch):
    config = GenerationConfig(max_new_tokens=4, **shaped)
    with pytest.raises(Qwen2VLError, match=message):
        generate(model, batch, config=config, logits_processors=[lambda answers, scores: scores, process])


@pytest.mark.parametrize("wrong", [Even(), ["even"], [Even(), None]], ids=["one", "name", "None"])
def test_what_is_no_processor_is_refused_at_the_call(wrong, model, processor):
    with pytest.raises(Qwen2VLError, match="logits_processors: wants a sequence of callables, got"):
        stream(model, processor(_user("Hi")), tokenizer=processor.tokenizer, logits_processors=wrong)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"repetition_penalty": 1.4},
        {"temperature": 0.7, "top_k": 9, "top_p": 0.9},
        {"temperature": 1.3, "repetition_penalty": 0.8},
    ],
    ids=str,
)
def test_logprobs_are_those_of_transformers(options, theirs, model, processor, batch, monkeypatch):
    """Of its logits and of its scores, along the answers that were drawn here."""
    config = GenerationConfig(max_new_tokens=16, eos_token_ids=ENDLESS, seed=4, logprobs=5, **options)
    result = generate(model, batch, config=config)
    shaped = {"do_sample": config.samples, **({"top_k": 0} | options if config.samples else options)}
    for prompt, sequence, told in zip(PROMPTS, result.sequences, result.logprobs, strict=True):
        inputs = processor(_user(prompt))
        draws = iter(sequence)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "multinomial", lambda *_, draws=draws, **__: torch.tensor([[next(draws)]]))
            expected = _ask_transformers(theirs, model, inputs, **shaped)
        assert expected.sequences[0, -16:].tolist() == sequence
        for got, scores in (("processed_logprob", expected.scores), ("logprob", expected.logits)):
            of_chosen = theirs.compute_transition_scores(expected.sequences, scores, normalize_logits=True)
            found = torch.tensor([getattr(one, got) for one in told])
            torch.testing.assert_close(found, of_chosen[0], rtol=0, atol=1e-4)
        for one, logits in zip(told, expected.logits, strict=True):
            values, ids = logits[0].log_softmax(-1).topk(5)
            assert list(one.top) == ids.tolist()
            torch.testing.assert_close(torch.tensor(list(one.top.values())), values, rtol=0, atol=1e-4)
    assert abs(result.logprobs[0][-1].logprob - result.logprobs[1][-1].logprob) > 1e-3, "rows differ"
    if options:
        assert abs(result.logprobs[0][3].logprob - result.logprobs[0][3].processed_logprob) > 1e-3


def test_logprobs_go_with_the_tokens(model, batch, processor):
    """An end is no token of an answer, what a processor forbids changes nothing of the model's, 0 gives no others."""
    options = {"max_new_tokens": 8, "logprobs": 0}
    free = generate(model, batch, config=GenerationConfig(eos_token_ids=ENDLESS, **options))
    end = next(token for token in free.sequences[0] if token not in free.sequences[1])
    ended = generate(model, batch, config=GenerationConfig(eos_token_ids=(end,), **options))
    assert len(ended.sequences[0]) < len(ended.sequences[1]) == 8
    for sequence, told, whole in zip(ended.sequences, ended.logprobs, free.logprobs, strict=True):
        assert len(told) == len(sequence) and not any(one.top for one in told)
        torch.testing.assert_close(
            torch.tensor([o[:2] for o in told]), torch.tensor([o[:2] for o in whole[: len(told)]])
        )
    assert generate(model, batch, config=GenerationConfig(max_new_tokens=8)).logprobs == []

    def only(answers, scores):
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([65]), 0.0)

    config = GenerationConfig(max_new_tokens=1, eos_token_ids=ENDLESS, logprobs=10**6)
    (told,) = generate(model, processor(_user("Hi")), config=config, logits_processors=[only]).logprobs[0]
    assert told.processed_logprob == 0 > told.logprob == told.top[65] and len(told.top) == 512


DRAWN = {"temperature": 1.5, "repetition_penalty": 1.2, "max_new_tokens": 12, "eos_token_ids": ENDLESS}


def _of_many_kinds(processor):
    image = np.random.default_rng(0).integers(0, 256, (56, 84, 3), dtype=np.uint8)
    shown = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "What is it?"}]}]
    return processor([_user("Hi"), shown, _user("Tell me more than that, please.")]), processor(shown)


def test_an_answer_is_that_of_its_prompt_alone(model, processor):
    """Whatever the batch, and however many more are asked for; every one as if it had read the prompt itself."""
    inputs, shown = _of_many_kinds(processor)
    config = GenerationConfig(seed=7, num_return_sequences=4, logprobs=2, **DRAWN)
    result = generate(model, inputs, config=config, tokenizer=processor.tokenizer)
    assert len(set(map(tuple, result.sequences))) == len(result.sequences) == len(result.texts) == 12
    counts = inputs["attention_mask"].sum(1).tolist()
    assert result.prompt_tokens == [count for count in counts for _ in range(4)]
    alone = generate(model, shown, config=replace(config, seed=8))
    assert alone.sequences == result.sequences[4:8], "row 1 draws with seed + 1"
    fewer = generate(model, inputs, config=replace(config, num_return_sequences=2)).sequences
    assert fewer == [sequence for n, sequence in enumerate(result.sequences) if n % 4 < 2]
    assert generate(model, inputs, config=replace(config, num_return_sequences=1)).sequences == result.sequences[::4]
    for sequence, told in zip(alone.sequences, alone.logprobs, strict=True):
        answer = torch.tensor([sequence])
        whole = {**shown, "input_ids": torch.cat((shown["input_ids"], answer), 1), "attention_mask": None}
        with torch.no_grad():
            logits = model(**whole)[0, -len(sequence) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, answer.T).squeeze(1)
        torch.testing.assert_close(torch.tensor([one.logprob for one in told]), expected, rtol=0, atol=1e-4)


def test_answers_are_penalised_for_their_own_prompt(model):
    config = GenerationConfig(top_k=1, repetition_penalty=2.0, num_return_sequences=2)
    chooser = Chooser(model, {"input_ids": torch.tensor([[3], [4]])}, config)
    logits = torch.zeros(4, 512)
    logits[:, 3], logits[:, 4] = 3.0, 2.0
    assert chooser(logits, [[]] * 4, [False] * 4).tokens.tolist() == [4, 4, 3, 3]


def test_many_answers_read_a_prompt_once(model, processor, monkeypatch):
    calls = []
    for owner, name in ((model.visual, "forward"), (model, "prefill")):
        run = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, run=run, name=name, **k: calls.append(name) or run(*a, **k))
    inputs, _ = _of_many_kinds(processor)
    pieces = {}
    result = generate(
        model,
        inputs,
        config=GenerationConfig(seed=7, num_return_sequences=3, **DRAWN),
        tokenizer=processor.tokenizer,
        on_token=lambda index, token, piece: pieces.setdefault(index, []).append(piece),
    )
    assert sorted(calls) == ["forward", "prefill"]
    assert ["".join(pieces[index]) for index in range(9)] == result.texts


def test_every_answer_ends_by_itself(model, processor, batch):
    """At an end, at a stop string or by its length; the others go on as they would have."""
    config = GenerationConfig(seed=7, num_return_sequences=3, **DRAWN)
    tokenizer = processor.tokenizer
    free = generate(model, batch, config=config, tokenizer=tokenizer)
    end, stop = free.sequences[1][4], next(char for char in free.texts[5] if char.isalpha())
    got = generate(model, batch, config=replace(config, eos_token_ids=(end,), stop=(stop,)), tokenizer=tokenizer)
    assert {"stop", "stop_string", "length"} == set(got.finish_reasons)
    for n, whole in enumerate(free.sequences):
        assert got.sequences[n] == whole[: len(got.sequences[n])]
        assert tokenizer.decode(got.sequences[n]).startswith(got.texts[n])
        after = whole[len(got.sequences[n])] if got.finish_reasons[n] == "stop" else end
        assert after == end and stop not in got.texts[n]
        assert (got.finish_reasons[n] == "length") == (end not in whole and stop not in free.texts[n])


def test_answers_to_a_prompt_have_its_room(model, processor, batch, monkeypatch):
    config = GenerationConfig(seed=7, num_return_sequences=2, **DRAWN)
    free = generate(model, batch, config=config)
    text = replace(model.config.text, max_position_embeddings=max(free.prompt_tokens) + 3)
    monkeypatch.setattr(model, "config", replace(model.config, text=text))
    got = generate(model, batch, config=config)
    lengths = [3 if count == max(free.prompt_tokens) else 12 for count in free.prompt_tokens]
    assert sorted(lengths) == [3, 3, 12, 12, 12, 12]
    assert got.sequences == [whole[:length] for whole, length in zip(free.sequences, lengths, strict=True)]
    assert got.finish_reasons == ["context" if length == 3 else "length" for length in lengths]


def test_stream_gives_one_answer(model, processor):
    config = GenerationConfig(num_return_sequences=2, temperature=1.0)
    with pytest.raises(PromptError, match="config: stream gives one answer, got num_return_sequences=2"):
        stream(model, processor(_user("Hi")), tokenizer=processor.tokenizer, config=config)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.5, "seed": 3}], ids=["greedy", "drawn"])
def test_the_page_gives_json_by_a_schema(options):
    """Its processor, on a batch with answers of several lengths; no token of the toy's would be JSON by itself."""
    pytest.importorskip("llguidance", reason="llguidance is not installed, which makes JSON by a schema")
    (block,) = (one for one in blocks(ROOT / "docs" / "model.md") if "import llguidance" in one.code)
    model, processor = Qwen2VL.from_pretrained(assets.FOLDER, device="cpu"), Processor.from_pretrained(assets.FOLDER)
    inputs = processor([_user(prompt) for prompt in PROMPTS])
    names = {"model": model, "processor": processor, "inputs": inputs, "generate": generate}
    names["GenerationConfig"] = lambda **given: GenerationConfig(**given, **options)
    exec(compile(block.code, "docs/model.md", "exec"), names)
    result = names["result"]
    assert result.finish_reasons == ["stop"] * len(PROMPTS)
    for text in result.texts:
        found = json.loads(text)
        assert found.keys() == {"colour", "count"} and found["colour"] in ("red", "green")
        assert isinstance(found["count"], int) and 0 <= found["count"] <= 9
    free = generate(model, inputs, tokenizer=processor.tokenizer, config=GenerationConfig(max_new_tokens=8))
    assert not any(text.startswith("{") for text in free.texts)
