"""A conversation's next prompt is read from where it departs from the last one and its answer, with the same result."""

import gc
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.random_checkpoint import small_config, write_random_checkpoint
from qwen2vl import (
    ContextLengthError,
    Conversation,
    GenerationConfig,
    Processor,
    PromptError,
    Qwen2VL,
    generate,
    stream,
)
from qwen2vl.agents.loop import model_writer
from qwen2vl.cache import KVCache
from qwen2vl.cli.chat import _Chat

ENDLESS = (10**6,)


def _picture(seed, height=56, width=84):
    return {
        "type": "image",
        "image": np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8),
        "min_pixels": height * width,
        "max_pixels": height * width,
    }


def _video(seed, frames=4):
    video = list(np.random.default_rng(seed).integers(0, 256, (frames, 56, 56, 3), dtype=np.uint8))
    return {"type": "video", "video": video}


def _user(text, *media):
    return {"role": "user", "content": [*media, {"type": "text", "text": text}]}


def _answer(text):
    return {"role": "assistant", "content": text}


class Read:
    """What the model is given to read, what it makes of it, and how many pictures and videos its tower encodes."""

    def __init__(self, model, monkeypatch):
        self.tokens, self.logits, self.encoded = [], [], []
        prefill, encode = model.prefill, model.encode_patches

        def reading(call, *args, **kwargs):
            self.tokens.append(sum(call.counts))
            self.logits.append(prefill(call, *args, **kwargs))
            return self.logits[-1]

        def encoding(media, *graphs):
            self.encoded.append(sum(len(one.grids) for one in media))
            return encode(media, *graphs)

        monkeypatch.setattr(model, "prefill", reading)
        monkeypatch.setattr(model, "encode_patches", encoding)


@pytest.fixture
def read(model, monkeypatch):
    return Read(model, monkeypatch)


@pytest.fixture
def ask(model, processor, read):
    """Answers messages with a conversation and without, holds one against the other, and returns the first."""

    def answers(conversation, messages, on_token=None, **options):
        config = GenerationConfig(**{"max_new_tokens": 6, "eos_token_ids": ENDLESS, **options})
        inputs = processor(messages)
        given = {"tokenizer": processor.tokenizer, "config": config}
        got = generate(model, inputs, **given, on_token=on_token, conversation=conversation)
        alone = generate(model, inputs, **given)
        assert got.sequences == alone.sequences and got.texts == alone.texts
        assert got.finish_reasons == alone.finish_reasons and got.prompt_tokens == alone.prompt_tokens
        torch.testing.assert_close(read.logits[-2], read.logits[-1], rtol=1e-4, atol=1e-4)
        assert read.tokens[-2] == read.tokens[-1] - got.cached_tokens[0] and alone.cached_tokens == [0]
        return got

    return answers


MEDIA = {
    "none": ([], []),
    "first": ([_picture(0)], []),
    "second": ([], [_picture(0)]),
    "both": ([_picture(0), _picture(1, 84, 28)], [_picture(2)]),
    "video first": ([_video(0)], []),
    "video second": ([_picture(0)], [_video(0)]),
    "videos": ([_video(0, 6), _picture(0)], [_picture(1), _video(1, 2)]),
}


@pytest.mark.parametrize("media", MEDIA)
def test_a_turn_is_read_behind_the_turn_before(media, ask, read, processor):
    """Three turns, the third without a picture of its own; each reads its question, and encodes what is new."""
    conversation, messages, seen = Conversation(), [], 0
    for text, new in zip(("What is it?", "And this?", "Tell me more."), (*MEDIA[media], []), strict=True):
        messages.append(_user(text, *new))
        result = ask(conversation, messages)
        seen += len(new)
        assert read.encoded[-2:] == [len(new), seen]
        if len(messages) > 1:
            before = processor(messages[:-2])["input_ids"].shape[1]
            assert result.cached_tokens[0] >= before, "all of the last prompt"
        assert conversation.tokens == result.prompt_tokens[0] + len(result.sequences[0]) - 1
        messages.append(_answer(result.texts[0]))


def test_in_bf16_logits_are_as_near_as_rounding_allows(folder, processor, monkeypatch):
    """The two-times rule, against float32."""
    models = {dtype: Qwen2VL.from_pretrained(folder, device="cpu", dtype=dtype) for dtype in ("float32", "bfloat16")}
    first = processor([_user("What is it?", _picture(0))])
    second = processor([_user("What is it?", _picture(0)), _answer("A cat."), _user("Where?", _picture(1))])
    config, logits = GenerationConfig(max_new_tokens=1), {}
    for name, dtype, kept in (("exact", "float32", False), ("whole", "bfloat16", False), ("kept", "bfloat16", True)):
        reader, conversation = Read(models[dtype], monkeypatch), Conversation()
        if kept:
            generate(models[dtype], first, config=config, conversation=conversation)
        generate(models[dtype], second, config=config, conversation=conversation)
        logits[name] = reader.logits[-1].double()
        monkeypatch.undo()
    errors = {name: (logits[name] - logits["exact"]).norm() / logits["exact"].norm() for name in ("whole", "kept")}
    assert 0 < errors["kept"] <= 2 * errors["whole"]


def test_what_departs_is_read_again(ask, processor):
    """Another system prompt, an earlier turn changed or taken back, another picture of the same or another shape."""
    conversation = Conversation()
    question = [_user("What is it?", _picture(0))]
    first = ask(conversation, question)
    asked = [*question, _answer(first.texts[0]), _user("And this?", _picture(1, 56, 112))]
    second = ask(conversation, asked)
    opened = second.cached_tokens[0]
    assert ask(conversation, asked).cached_tokens == [second.prompt_tokens[0] - 1], "one token is always read"
    assert ask(conversation, question).cached_tokens == [first.prompt_tokens[0] - 1], "a turn taken back"
    ask(conversation, asked)
    for other, least in (
        (_picture(2, 56, 112), opened),
        (_picture(1, 112, 56), opened),
        (_picture(1, 28, 224), opened),
    ):
        changed = [*asked[:2], _user("And this?", other)]
        (kept,) = ask(conversation, changed).cached_tokens
        assert kept == processor(asked)["input_ids"][0].tolist().index(processor.tokenizer.id("<|image_pad|>"), least)
        ask(conversation, asked)
    for other in ([_user("What is it?", _picture(3)), *asked[1:]], [_user("What is it?"), *asked[1:]]):
        (kept,) = ask(conversation, other).cached_tokens
        assert 0 < kept < first.prompt_tokens[0] - 10
        ask(conversation, asked)
    system = [{"role": "system", "content": "Be brief."}, *asked]
    (kept,) = ask(conversation, system).cached_tokens
    assert 0 < kept < 10
    conversation.forget()
    assert conversation.tokens == 0 and ask(conversation, asked).cached_tokens == [0]


def test_pictures_that_change_places_are_not_taken_for_one_another(ask, processor):
    """Ids and grids are the same; or ids and pixels are, of one colour, and the grids differ."""
    one, two, conversation = _picture(0), _picture(1), Conversation()
    ask(conversation, [_user("Which?", one, two)])
    begun = (
        processor([_user("Which?", one, two)])["input_ids"][0].tolist().index(processor.tokenizer.id("<|image_pad|>"))
    )
    assert ask(conversation, [_user("Which?", two, one)]).cached_tokens == [begun]
    assert ask(conversation, [_user("Which?", two, two)]).cached_tokens[0] > begun
    wide, high = ({**one, "image": np.full((h, w, 3), 90, np.uint8)} for h, w in ((56, 84), (84, 56)))
    ask(conversation, [_user("Which?", wide)])
    assert ask(conversation, [_user("Which?", high)]).cached_tokens == [begun]


@pytest.mark.parametrize("ended", ["length", "stop", "stop_string", "interrupt", "left"])
def test_whatever_ended_the_answer(ended, ask, model, processor, read):
    """What was said of it, where a turn repeats that, is not read again."""
    conversation, question = Conversation(), [_user("What is it?", _picture(0))]
    free = ask(Conversation(), question, max_new_tokens=30)
    options, said = {"max_new_tokens": 30}, ""
    if ended == "stop":
        options["eos_token_ids"] = (free.sequences[0][7],)
    elif ended == "stop_string":
        options["stop"] = (free.texts[0][9:13],)
    elif ended == "length":
        options["max_new_tokens"] = 5
    if ended in ("interrupt", "left"):
        config = GenerationConfig(eos_token_ids=ENDLESS, **options)
        given = {"tokenizer": processor.tokenizer, "config": config, "conversation": conversation}
        if ended == "left":
            pieces = stream(model, processor(question), **given)
            said = "".join(next(pieces) for _ in range(6))
            assert conversation.tokens == 0, "a cache is one answer's"
            del pieces
        else:
            pieces = []

            def stop(row, token, piece):
                pieces.append(piece)
                if len(pieces) == 8:
                    raise KeyboardInterrupt

            with pytest.raises(KeyboardInterrupt):
                generate(model, processor(question), on_token=stop, **given)
            said = "".join(pieces)
    else:
        said = ask(conversation, question, **options).texts[0]
    begun, held = processor(question)["input_ids"][0].tolist(), conversation.tokens
    messages = [*question, _answer(said), _user("And?")]
    pairs = zip(begun + free.sequences[0], processor(messages)["input_ids"][0].tolist(), strict=False)
    same = next(n for n, (one, other) in enumerate(pairs) if one != other)
    assert ask(conversation, messages, max_new_tokens=8).cached_tokens == [min(held, same)]
    assert min(held, same) > len(begun)


@pytest.mark.parametrize("where", ["tower", "layers", "commit", "step"])
def test_an_answer_that_fails_leaves_what_was_read_before(where, ask, model, processor, monkeypatch):
    conversation, question = Conversation(), [_user("What is it?", _picture(0))]
    first = ask(conversation, question)
    asked = [*question, _answer(first.texts[0]), _user("And this?", _picture(1))]

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        owner, name = {
            "tower": (model.visual, "forward"),
            "layers": (model.model.layers[1].mlp, "forward"),
            "commit": (KVCache, "commit"),
            "step": (KVCache, "commit_step"),
        }[where]
        patch.setattr(owner, name, fail)
        with pytest.raises(KeyboardInterrupt):
            generate(model, processor(asked), config=GenerationConfig(max_new_tokens=4), conversation=conversation)
    whole = processor(asked)["input_ids"].shape[1]
    assert (conversation.tokens == whole) == (where == "step")
    assert ask(conversation, asked).cached_tokens[0] >= first.prompt_tokens[0]


def test_a_cache_grows_with_its_conversation(ask):
    """From one capacity to the next, the tokens that are kept with it."""
    conversation, messages = Conversation(), []
    for turn in range(6):
        messages.append(_user("x" * 80))
        result = ask(conversation, messages, max_new_tokens=3)
        assert (result.cached_tokens[0] > 60) == (turn > 0)
        messages.append(_answer(result.texts[0]))
    assert result.prompt_tokens[0] > 512


def test_two_answers_at_the_same_time(model, processor):
    """One goes on in the cache, the other reads its prompt; neither sees the other's tokens."""
    conversation, config = Conversation(), GenerationConfig(max_new_tokens=8, eos_token_ids=ENDLESS)
    given = {"tokenizer": processor.tokenizer, "config": config}
    prompts = [processor([_user(text)]) for text in ("What is it?", "What is that?")]
    alone = [generate(model, prompt, **given).texts[0] for prompt in prompts]
    generate(model, prompts[0], **given, conversation=conversation)
    running = [stream(model, prompt, **given, conversation=conversation) for prompt in prompts]
    texts = ["", ""]
    while any(pieces := [next(one, "") for one in running]):
        texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
    assert texts == alone and alone[0] != alone[1]


def test_nothing_is_kept_of_other_weights(folder, processor):
    """Of another model, nor of one whose weights have changed, nor beside hooks or an adapter, which nobody counts."""
    model, other = (Qwen2VL.from_pretrained(folder, device="cpu") for _ in range(2))
    conversation, prompt = Conversation(), processor([_user("What is it?", _picture(0))])

    def cached(model):
        config = GenerationConfig(max_new_tokens=2)
        got = generate(model, prompt, config=config, conversation=conversation)
        assert got.sequences == generate(model, prompt, config=config).sequences
        return got.cached_tokens[0]

    whole = prompt["input_ids"].shape[1]
    assert [cached(model), cached(model), cached(other), cached(other)] == [0, whole - 1, 0, whole - 1]
    with torch.no_grad():
        other.visual.merger.ln_q.weight.mul_(-1)
    assert [cached(other), cached(other)] == [0, whole - 1]
    handle = other.visual.merger.register_forward_hook(lambda *a: None)
    assert [cached(other), cached(other), conversation.tokens] == [0, 0, 0]
    handle.remove()
    assert [cached(other), cached(other)] == [0, whole - 1]
    other.model.layers[0].self_attn.q_proj.lora_A = other.model.layers[0].self_attn.q_proj.get_delta_weight = 1
    assert [cached(other), cached(other), conversation.tokens] == [0, 0, 0]


def test_what_a_conversation_cannot_keep_is_refused(model, processor):
    prompt, config = processor([_user("What is it?", _picture(0))]), GenerationConfig(max_new_tokens=2)
    two = processor([[_user("a")], [_user("b")]])
    features = model.encode_media(prompt["pixel_values"], prompt["image_grid_thw"])
    encoded = {name: value for name, value in prompt.items() if name != "pixel_values"} | {"features": features}
    placed = {**prompt, "position_ids": torch.zeros(3, *prompt["input_ids"].shape, dtype=torch.int64)}
    for given, options, message in (
        (two, config, "conversation: wants one prompt with one answer, got 2 prompts with 1 answers each"),
        (prompt, replace(config, do_sample=True, num_return_sequences=2), "got 1 prompts with 2 answers each"),
        (encoded, config, "conversation: wants ids and pixels, .*, got features"),
        (placed, config, "conversation: wants ids and pixels, .*, got position_ids"),
    ):
        with pytest.raises(PromptError, match=message):
            generate(model, given, config=options, conversation=Conversation())


def test_agents_and_chat_keep_theirs(model, processor, read, capsys):
    """An agent's earlier picture that is left out later is where reading begins again."""
    config = GenerationConfig(max_new_tokens=4, eos_token_ids=ENDLESS)
    write, messages = model_writer(model, processor, config=config), [_user("Go.", _picture(0))]
    for n in range(3):
        text = write(messages)
        messages += [_answer(text), _user("On.", _picture(n + 1))]
    assert read.encoded == [1, 1, 1] and read.tokens[1] < read.tokens[0] and read.tokens[2] < read.tokens[0]
    messages[0] = _user("Go.", {"type": "text", "text": "(left out)"})
    write(messages)
    assert read.encoded[-1] == 3 and read.tokens[-1] > 2 * read.tokens[0] - 60

    read.tokens.clear()
    chat = _Chat(model, processor, config, {}, None)
    for line in ("What is it?", "And?", "/system Be brief.", "And?", "/reset", "What is it?"):
        assert chat.take(line)
    assert len(read.tokens) == 4 and read.tokens[1] < read.tokens[0] < read.tokens[2]
    assert chat.conversation.tokens > 0 and capsys.readouterr().out.count("\n") == 4


def _alive():
    """Python's containers and their bytes, tensors and theirs, and caches."""
    gc.collect()
    found = gc.get_objects()
    containers = [one for one in found if type(one) in (list, dict, set, tuple)]
    # Not what another test's tracer has left, whose sizes are no numbers.
    tensors = [one for one in found if type(one) in (torch.Tensor, torch.nn.Parameter)]
    caches = sum(type(one) is KVCache for one in found)
    sizes = sum(map(sys.getsizeof, containers)) - sys.getsizeof(found) - sys.getsizeof(containers)
    return len(containers), sizes, len(tensors), sum(one.nbytes for one in tensors), caches


def test_a_thousand_turns_do_not_grow(tmp_path, capsys):
    """Of chat, begun anew where the context is full, which a turn then says."""
    config = small_config()
    text = replace(config.text, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    text = replace(text, intermediate_size=64, mrope_section=(4, 6, 6), max_position_embeddings=256)
    config = replace(config, text=text, vision=replace(config.vision, hidden_size=64, depth=1))
    write_random_checkpoint(tmp_path, config, dtype=torch.float32)
    model, processor = Qwen2VL.from_pretrained(tmp_path, device="cpu"), Processor.from_pretrained(tmp_path)
    chat = _Chat(model, processor, GenerationConfig(max_new_tokens=2, eos_token_ids=ENDLESS), {}, None)
    alive, full = [], 0
    for turn in range(1, 1001):
        try:
            chat.ask("x")
        except ContextLengthError:
            full += 1
            chat.turns.clear()  # the next turn finds the cache of the full conversation
        if turn in (100, 550, 1000):
            chat.turns.clear()
            chat.ask("x")
            capsys.readouterr()
            alive.append(_alive())
    assert full > 10 and alive[0][4] == 1
    (containers, sizes, *tensors), (containers_in_the_end, sizes_in_the_end, *tensors_in_the_end) = alive[1:]
    assert tensors == tensors_in_the_end
    assert containers_in_the_end < containers + 45, "less than one in ten turns"
    assert sizes_in_the_end < sizes + 450 * 4, "less than half a number a turn"
