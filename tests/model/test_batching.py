"""Answers to many conversations: in order, each as alone, a bad one apart from the rest."""

import pytest
import torch
from PIL import Image

from benchmarks.random_checkpoint import write_random_checkpoint
from examples.demo.media import write_video
from qwen2vl import GenerationConfig, Processor, Qwen2VL, generate
from qwen2vl.batching import generate_all
from qwen2vl.errors import ContextLengthError, MediaError, PromptError, Qwen2VLError


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = write_random_checkpoint(tmp_path_factory.mktemp("answers") / "model", std=0.1, dtype=torch.float32)
    write_video(folder.parent / "clip.mp4", width=56, height=56, seconds=2, fps=4)
    return Qwen2VL.from_pretrained(folder, device="cpu"), Processor.from_pretrained(folder), folder.parent


def text(content):
    return [{"role": "user", "content": content}]


def conversations(folder):
    image = Image.linear_gradient("L").resize((84, 56)).convert("RGB")
    clip = {"type": "video", "video": str(folder / "clip.mp4")}
    return [
        text("Say a word. " * 9),
        text([{"type": "image", "image": image}, {"type": "text", "text": "What?"}]),
        text("Say."),
        text([clip, {"type": "image", "image": image.rotate(90)}, {"type": "text", "text": "And now?"}]),
        text([{"type": "image", "image": image.resize((28, 56))}, clip]),
    ]


def test_joined_inputs_are_those_of_one_call(made):
    _, processor, folder = made
    chats = conversations(folder)
    for side in ("left", "right"):
        joined = processor.join([processor(chat) for chat in chats], padding_side=side)
        whole = processor(chats, padding_side=side)
        assert joined.keys() == whole.keys()
        assert [(m.row, m.num_tokens) for m in joined.media] == [(m.row, m.num_tokens) for m in whole.media]
        for name, tensor in whole.items():
            assert torch.equal(joined[name], tensor), name
    refused = [
        ([], "at least one, got none"),
        ([processor(chats)], r"inputs\[0\]: wants rows without padding"),
        ([processor.supervised(chats[2])], "without labels"),
    ]
    for wrong, message in refused:
        with pytest.raises(PromptError, match=message):
            processor.join(wrong)
    with pytest.raises(PromptError, match="padding_side"):
        processor.join([processor(chats[2])], padding_side="both")


@pytest.mark.parametrize("config", [
    GenerationConfig(max_new_tokens=6),
    GenerationConfig(max_new_tokens=6, temperature=1.3, top_k=40, seed=5),
], ids=["greedy", "sampled"])  # fmt: skip
@pytest.mark.parametrize("batch_tokens", [1, 150, 8192])
def test_each_answer_is_the_one_it_has_alone_and_in_its_place(made, config, batch_tokens):
    model, processor, folder = made
    chats = conversations(folder)
    found = list(generate_all(model, processor, chats, config=config, batch_tokens=batch_tokens, first=3))
    assert [answer.index for answer in found] == [3, 4, 5, 6, 7]
    for n, (answer, chat) in enumerate(zip(found, chats, strict=True)):
        own = config if config.seed is None else GenerationConfig(**vars(config) | {"seed": config.seed + 3 + n})
        alone = generate(model, processor(chat), tokenizer=processor.tokenizer, config=own)
        assert answer.error is None
        assert (answer.text, list(answer.token_ids)) == (alone.texts[0], alone.sequences[0])
        assert (answer.finish_reason, answer.prompt_tokens) == (alone.finish_reasons[0], alone.prompt_tokens[0])


def test_batches_are_formed_by_tokens(made, monkeypatch):
    model, processor, _ = made
    chats = [text("word " * (40 if n % 3 else 1)) for n in range(70)]
    seen = []

    def counted(model, inputs, **arguments):
        seen.append(tuple(inputs["input_ids"].shape))
        return generate(model, inputs, **arguments)

    monkeypatch.setattr("qwen2vl.batching.generate", counted)
    found = list(generate_all(model, processor, chats, config=GenerationConfig(max_new_tokens=2), batch_tokens=1000))
    assert [answer.index for answer in found] == list(range(70))
    assert all(rows * (length + 2) <= 1000 for rows, length in seen) and sum(rows for rows, _ in seen) == 70
    assert len(seen) < 16  # and not 70
    padded = sum(rows * length for rows, length in seen)
    assert padded < 1.1 * sum(answer.prompt_tokens for answer in found)


def test_a_bad_conversation_stands_apart(made):
    model, processor, _ = made
    wrong = PromptError("line 4: no JSON")
    chats = [
        text("Say."),
        text([{"type": "image", "image": "no-such-file.png"}]),
        [{"role": "nobody", "content": "x"}],
        wrong,
        text("a b " * 40000),
        text("Say it."),
    ]
    config = GenerationConfig(max_new_tokens=3)
    found = list(generate_all(model, processor, chats, config=config, on_error="skip"))
    assert [type(answer.error) for answer in found] == [
        type(None), MediaError, PromptError, PromptError, ContextLengthError, type(None),
    ]  # fmt: skip
    assert found[3].error is wrong and "no-such-file.png" in str(found[1].error)
    assert found[0].token_ids and found[5].token_ids and not found[2].token_ids
    answers = generate_all(model, processor, chats, config=config)
    assert next(answers) == found[0]
    with pytest.raises(MediaError, match=r"no-such-file\.png"):
        next(answers)


def test_relative_paths_begin_at_the_base(made, tmp_path):
    _, _, folder = made
    Image.new("RGB", (28, 28), "red").save(tmp_path / "red.png")
    inside = Processor.from_pretrained(folder / "model", base=tmp_path, roots=tmp_path)
    item = [{"type": "image", "image": "red.png"}, {"type": "image", "image": str(tmp_path / "red.png")}]
    assert len(inside(text(item)).media) == 2
    with pytest.raises(MediaError, match="outside of the roots"):
        inside(text([{"type": "image", "image": "../red.png"}]))
    with pytest.raises(MediaError, match=r"base: '.*nowhere' is no folder"):
        Processor.from_pretrained(folder / "model", base=tmp_path / "nowhere")
    with pytest.raises(MediaError, match="base must be a folder, got 3"):
        Processor.from_pretrained(folder / "model", base=3)


def test_refusals(made):
    model, processor, _ = made
    for given, message in (
        ({"on_error": "stop"}, "on_error: wants 'raise' or 'skip', got 'stop'"),
        ({"batch_tokens": 0}, "batch_tokens: wants an integer of at least 1, got 0"),
        ({"config": GenerationConfig(temperature=1.0, num_return_sequences=2)}, "config: wants one answer to a prompt"),
        ({"config": GenerationConfig(temperature=1.0, seed=[1, 2])}, r"config: seed wants one integer, got \[1, 2\]"),
        ({"first": -1}, "first: wants an integer of at least 0, got -1"),
    ):
        with pytest.raises(Qwen2VLError, match=message):
            generate_all(model, processor, [], **given)
    assert list(generate_all(model, processor, [])) == []
