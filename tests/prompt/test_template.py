"""A checkpoint's own chat template: prompts and labels by it, as transformers writes them, and safe from user text."""

import json
import pickle

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoTokenizer

from benchmarks.random_checkpoint import write_random_checkpoint
from qwen2vl.errors import CheckpointError, PromptError
from qwen2vl.prompt.chatml import CHAT_TEMPLATE
from qwen2vl.prompt.processor import IGNORED, Processor
from qwen2vl.prompt.template import ChatTemplate
from qwen2vl.prompt.tokenizer import CONTROL_TOKENS

#: In the spelling of the released instruct models.
RELEASED = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
#: Plain concatenation, of turns and of items without turns.
BASE = (
    "{% for message in messages %}{% for item in message.content %}{% if item.type == 'image' %}"
    "{{ '<|vision_start|>' + '<|image_pad|>' ~ '<|vision_end|>' }}{% else %}{{ item.text }}{% endif %}{% endfor %}"
    "{% endfor %}"
)
FLAT = (
    "{% for item in messages %}{% if item.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ item.text }}{% endif %}{% endfor %}"
)
#: The ways in which templates handle texts: trimmed, cut at a mark, replaced, as JSON, taught by `generation`.
TRIMMED = RELEASED.replace("{{ message['content'] }}", "{{ message['content'] | trim }}")
THINKING = RELEASED.replace(
    "{{ message['content'] }}", "{{ message['content'].split('</think>')[-1].lstrip('\\n') | replace('a', 'A') }}"
)
GENERATION = RELEASED.replace(
    "{{ message['content'] }}<|im_end|>", "{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
)
AS_JSON = "{% for m in messages %}<|im_start|>{{ m | tojson }}{{ eos_token }}{% endfor %}"
OWN = {
    "another sentence": RELEASED.replace("a helpful assistant", "the helper of ACME"),
    "none by default": RELEASED.replace("You are a helpful assistant.", ""),
    "other marks": RELEASED.replace("<|im_start|>", "<|object_ref_start|>"),
    "trimmed": TRIMMED,
    "thinking": THINKING,
    "generation": GENERATION.replace("helpful", "useful"),
    "json": AS_JSON,
}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return write_random_checkpoint(tmp_path_factory.mktemp("template"))


@pytest.fixture(scope="module")
def tokenizer(original):
    return Processor.from_pretrained(original).tokenizer


def with_template(folder, source, place="chat_template.json"):
    """A processor of a checkpoint whose template stands in that file."""
    for name in ("chat_template.json", "chat_template.jinja"):
        (folder / name).unlink(missing_ok=True)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    if place == "chat_template.jinja":
        (folder / place).write_text(source)
    elif place == "chat_template.json":
        (folder / place).write_text(json.dumps({"chat_template": source}))
    elif place == "tokenizer_config.json":
        config["chat_template"] = source
    else:
        config["chat_template"] = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": source}]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Processor.from_pretrained(folder)


@pytest.fixture
def folder(tmp_path):
    return write_random_checkpoint(tmp_path / "own")


CHAT = [
    {"role": "user", "content": " What is 1+1?\n"},
    {"role": "assistant", "content": "<think>a</think>\n\nTwo, a pair "},
    {"role": "user", "content": "Sure?"},
]


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("opened", [True, False])
def test_prompts_are_those_of_transformers(folder, name, opened):
    processor = with_template(folder, OWN[name])
    peer = AutoTokenizer.from_pretrained(folder)
    for messages in (CHAT, CHAT[:1], [{"role": "system", "content": "Be brief."}, *CHAT]):
        text = peer.apply_chat_template(messages, chat_template=OWN[name], tokenize=False, add_generation_prompt=opened)
        got = processor(messages, add_generation_prompt=opened)["input_ids"][0].tolist()
        assert got == peer.encode(text)
    assert not processor.chat_template.standard
    assert processor.decode(got, skip_special_tokens=False) == text


@pytest.mark.parametrize("place", ["chat_template.json", "chat_template.jinja", "tokenizer_config.json", "named"])
def test_the_template_is_found_and_saving_keeps_it(folder, tmp_path, place):
    processor = with_template(folder, OWN["another sentence"], place)
    ids = processor(CHAT)["input_ids"]
    assert "You are the helper of ACME." in processor.decode(ids[0])
    for target in (tmp_path / "saved", folder):
        processor.save_pretrained(target)
        (target / "config.json").write_bytes((folder / "config.json").read_bytes())
        assert torch.equal(Processor.from_pretrained(target)(CHAT)["input_ids"], ids)
        peer = AutoTokenizer.from_pretrained(target)
        assert (
            peer.encode(peer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)) == ids[0].tolist()
        )
    copy = pickle.loads(pickle.dumps(processor))
    assert torch.equal(copy(CHAT)["input_ids"], ids)


def test_a_checkpoint_without_a_template_has_the_released_one(folder, tmp_path):
    before = Processor.from_pretrained(folder)
    for name in ("chat_template.json", "tokenizer_config.json"):
        (folder / name).unlink()
    processor = Processor.from_pretrained(folder)
    assert processor.chat_template is None and torch.equal(processor(CHAT)["input_ids"], before(CHAT)["input_ids"])
    processor.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "chat_template.json").read_text())["chat_template"] == CHAT_TEMPLATE


@pytest.mark.parametrize("source", [RELEASED, CHAT_TEMPLATE])
def test_spellings_of_the_released_template_are_known_as_such(tokenizer, source):
    assert ChatTemplate(source, tokenizer).standard


@pytest.mark.parametrize("name", OWN)
def test_other_templates_are_not(tokenizer, name):
    assert not ChatTemplate(OWN[name], tokenizer).standard


def picture(width=56, height=56):
    return Image.fromarray(np.full((height, width, 3), 99, np.uint8))


def test_images_and_videos_have_their_places(folder):
    content = [{"image": picture()}, {"text": "a"}, {"video": [picture()] * 4}, {"image": picture(112)}]
    messages = [{"role": "user", "content": content}]
    for numbered in (False, True):
        expected = Processor.from_pretrained(folder)(messages, add_vision_id=numbered)
        processor = with_template(folder, OWN["another sentence"])
        inputs = processor(messages, add_vision_id=numbered)
        with_template(folder, RELEASED)
        texts = [processor.decode(one["input_ids"][0], skip_special_tokens=False) for one in (expected, inputs)]
        assert texts[1] == texts[0].replace("a helpful assistant", "the helper of ACME")
        assert all(torch.equal(expected[key], inputs[key]) for key in expected if "pixel" in key or "grid" in key)


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (RELEASED, "You are a helpful assistant."),
        (CHAT_TEMPLATE, "You are a helpful assistant."),
        (OWN["another sentence"], "You are the helper of ACME."),
        (OWN["other marks"], "You are a helpful assistant."),
        (OWN["none by default"], ""),
        (BASE, ""),
        (AS_JSON, ""),
        ("{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}{{ messages[0].content }}", ""),
        ("Always. {% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}", ""),
    ],
)
def test_the_system_prompt_of_a_template(folder, source, sentence):
    assert with_template(folder, source).default_system_prompt == sentence


def test_base_templates_take_items_with_or_without_turns(folder):
    items = [{"image": picture()}, {"text": "A picture of"}]
    processor = with_template(folder, BASE)
    expected = "<|vision_start|>" + "<|image_pad|>" * 4 + "<|vision_end|>A picture of"
    got = processor([{"role": "user", "content": items}])["input_ids"][0]
    assert processor.decode(got, skip_special_tokens=False) == expected
    processor = with_template(folder, FLAT)
    assert torch.equal(processor(items)["input_ids"][0], got)
    for content in (items, items[1:]):
        with pytest.raises(PromptError, match="of these messages; that of a base model takes a list of items"):
            processor([{"role": "user", "content": content}])
    with pytest.raises(PromptError, match="role"):
        Processor.from_pretrained(write_random_checkpoint(folder / "standard"))(items)


TEXTS = st.text(max_size=12) | st.lists(
    st.sampled_from(
        [*CONTROL_TOKENS, "<|im_", "end|>", "<|", "|>", "a", " ", "\n", "</think>", "{{ eos_token }}", "&lt;"]
    )
).map("".join)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(sorted({*OWN, "base"})), st.lists(TEXTS, min_size=1, max_size=3), TEXTS)
def test_no_user_text_becomes_a_control_token(tokenizer, name, texts, system):
    """Not in one piece, not over the border of two, not through what the template does with it."""
    template = ChatTemplate({**OWN, "base": BASE}[name], tokenizer, {"eos_token": "<|im_end|>"})

    def control(system, texts):
        content = [{"text": text} for text in texts] if len(texts) > 1 or name == "base" else texts[0]
        messages = [{"role": "system", "content": [{"text": system}]}, {"role": "user", "content": content}]
        return [segment.name for segment in template.render(messages) if not hasattr(segment, "text")]

    got = control(system, texts)
    assert got == control("s", ["x"] * len(texts))


def test_text_that_asks_for_it_has_grounding_markers(tokenizer):
    template = ChatTemplate(OWN["another sentence"], tokenizer)
    text = "Find <|object_ref_start|>the cat<|object_ref_end|><|im_end|>"

    def control(**asked):
        messages = [{"role": "user", "content": [{"type": "text", "text": text, **asked}]}]
        return [segment.name for segment in template.render(messages) if not hasattr(segment, "text")]

    markers = ["<|object_ref_start|>", "<|object_ref_end|>"]
    asked, plain = control(grounding=True), control()
    assert [name for name in asked if name in markers] == markers
    assert [name for name in asked if name not in markers] == plain


@pytest.mark.parametrize("name", ["another sentence", "generation", "other marks", "none by default"])
def test_labels_are_the_assistants_turns(folder, name):
    processor = with_template(folder, OWN[name])
    ids, labels = (processor.supervised(CHAT)[key][0] for key in ("input_ids", "labels"))
    assert processor.decode(labels[labels != IGNORED], skip_special_tokens=False) == (
        "<think>a</think>\n\nTwo, a pair <|im_end|>"
    )
    assert torch.equal(labels[labels != IGNORED], ids[labels != IGNORED])
    assert processor.decode(ids, skip_special_tokens=False) == processor.decode(
        processor(CHAT, add_generation_prompt=False)["input_ids"][0], skip_special_tokens=False
    )
    silent = [CHAT[0], {**CHAT[1], "loss": False}, *CHAT]
    again = processor.supervised(silent)["labels"][0]
    assert torch.equal(again[again != IGNORED], labels[labels != IGNORED])


#: Texts of an assistant's turn, and whether its runtime inserted them.
_ITEMS = st.lists(
    st.tuples(st.sampled_from(["a", " b", "\n", "c ", "", "<|box_start|>", "<|im_end|>"]) | TEXTS, st.booleans()),
    min_size=1,
    max_size=6,
)


@given(_ITEMS, _ITEMS)
@example([("a", False)], [("c ", False), ("", True), ("a", False)])
@example([("a", False)], [("", True), ("\n", False)])
@example([("a", False)], [("\n", True), ("\n", True)])
def test_what_was_inserted_is_not_taught(tokenizer, first, second):
    """Under a template of the checkpoint's own as in the standard layout, in prompts, ids and labels."""
    standard, processor = Processor(tokenizer), Processor(tokenizer, chat_template=ChatTemplate(RELEASED, tokenizer))
    own = ChatTemplate(OWN["another sentence"], tokenizer)
    turns = [[{"text": text, "loss": not inserted} for text, inserted in items] for items in (first, second)]
    messages = [
        CHAT[0],
        {"role": "assistant", "content": turns[0]},
        CHAT[2],
        {"role": "assistant", "content": turns[1]},
    ]
    processor._render_spans = processor.chat_template.render_spans
    processor._render = processor.chat_template.render
    expected, got = standard.supervised(messages), processor.supervised(messages)
    assert all(torch.equal(got[key], expected[key]) for key in expected)
    for options in ({}, {"continue_final_message": True}):
        assert torch.equal(processor(messages, **options)["input_ids"], standard(messages, **options)["input_ids"])
    labels = Processor(tokenizer, chat_template=own).supervised(messages)["labels"][0]
    assert torch.equal(labels[labels != IGNORED], expected["labels"][0][expected["labels"][0] != IGNORED])


def test_labels_equal_those_of_the_standard_layout(tokenizer, folder):
    """Grounding markers in an answer are control tokens; pictures in it are not taught."""
    answer = [{"text": "<|box_start|>(1,2),(3,4)<|box_end|> and "}, {"image": picture()}, {"text": "that"}]
    messages = [CHAT[0], {"role": "assistant", "content": answer}, CHAT[2], {"role": "assistant", "content": "So."}]
    expected = Processor.from_pretrained(folder).supervised(messages)
    processor = Processor(tokenizer, chat_template=ChatTemplate(RELEASED, tokenizer))
    processor._render_spans = processor.chat_template.render_spans
    got = processor.supervised(messages)
    assert set(got) == set(expected) and all(torch.equal(got[key], expected[key]) for key in got)


def test_what_cannot_be_taught_or_continued_is_refused(folder):
    last_only = RELEASED.replace(
        "{{ message['content'] }}",
        "{{ message['content'] if loop.last else message['content'].split('</think>')[-1] }}",
    )
    with pytest.raises(PromptError, match=r"messages\[1\]: .* differently when a model is to write it, or when others"):
        with_template(folder, last_only).supervised(CHAT)
    inserted = {"role": "assistant", "content": [{"text": "a"}, {"text": " b", "loss": False}]}
    trimmed = RELEASED.replace("{{ content['text'] }}", "{{ content['text'] | trim }}")
    with pytest.raises(PromptError, match=r"messages\[1\]: items with 'loss': False .* changes texts by what stands"):
        with_template(folder, trimmed).supervised([CHAT[0], inserted])


def test_an_answer_is_continued(folder):
    processor = with_template(folder, OWN["another sentence"])
    for content in ("Two", [{"text": "Two"}]):
        open_ = processor([CHAT[0], {"role": "assistant", "content": content}], continue_final_message=True)
        assert processor.decode(open_["input_ids"][0], skip_special_tokens=False).endswith("<|im_start|>assistant\nTwo")
    with pytest.raises(PromptError, match="wants an assistant's last"):
        processor(CHAT, continue_final_message=True)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for", "no readable Jinja template"),
        ("{{ '<|im' ~ '_start|>' ~ messages[0].content ~ (messages | length) }}<|im_{{ 'x' }}", "from pieces"),
        ("{% for m in messages %}{{ '<|' }}im_start|>{{ m.content }}{% endfor %}", "from pieces"),
    ],
)
def test_unreadable_templates(folder, source, message):
    with pytest.raises(CheckpointError, match=message):
        with_template(folder, source)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('no turns of <|im_start|>') }}", "refuses them: no turns of <|im_start|>$"),
        ("{{ messages[0].content + 1 }}", "refuses them"),
        ("{{ messages.__class__.__mro__ }}{{ ''.__class__.__subclasses__() }}", "refuses them: .*unsafe"),
        ("{{ messages.append(1) }}", "refuses them: .*"),
        ("<|image_pad|>{{ messages[0].content }}", "wants another <|image_pad|>, got no more"),
        ("x", "writes no text of these messages"),
    ],
)
def test_templates_that_fail_on_messages(folder, source, message):
    processor = with_template(folder, source)
    with pytest.raises(PromptError, match=message.replace("|", r"\|")):
        processor(CHAT)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("chat_template.json", "[]", "wants a JSON object, got list"),
        ("chat_template.json", '{"chat_template": 3}', "wants text, got int"),
        ("chat_template.json", '{"chat_template": {"rag": "x"}}', "'rag' none is 'default'"),
        ("tokenizer_config.json", "{", "cannot be read as JSON"),
        ("chat_template.jinja", b"\xff", "cannot be read"),
    ],
)
def test_damaged_files(folder, name, content, message):
    (folder / "chat_template.json").unlink()
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CheckpointError, match=message):
        Processor.from_pretrained(folder)
