"""Tokenizer wrapper, ChatML rendering and synthetic tokenizer, against transformers on the same files."""

import json
import unicodedata

import jinja2
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from benchmarks.byte_tokenizer import write_byte_tokenizer
from qwen2vl.errors import CheckpointError, PromptError
from qwen2vl.prompt.chatml import Control, Media, Text, render
from qwen2vl.prompt.tokenizer import CONTROL_TOKENS, GROUNDING_TOKENS, Tokenizer
from tests.prompt.prompt_text import segments_to_text

# SPEC's description of the instruct template, written down a second time.
TEMPLATE = """\
{% set counter = namespace(pictures=0, videos=0) %}\
{% for message in messages %}\
{% if loop.first and message['role'] != 'system' %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}\
{% else %}{% for part in message['content'] %}\
{% if part['type'] in ['image', 'image_url'] or 'image' in part or 'image_url' in part %}\
{% set counter.pictures = counter.pictures + 1 %}\
{% if add_vision_id %}Picture {{ counter.pictures }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>\
{% elif part['type'] in ['video', 'video_url'] or 'video' in part %}\
{% set counter.videos = counter.videos + 1 %}\
{% if add_vision_id %}Video {{ counter.videos }}: {% endif %}<|vision_start|><|video_pad|><|vision_end|>\
{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}\
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

reference_template = jinja2.Environment(keep_trailing_newline=True).from_string(TEMPLATE)
quick = settings(max_examples=60, deadline=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    write_byte_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def peer(folder):
    return AutoTokenizer.from_pretrained(folder)


def encode(tokenizer, segments):
    """Ids with one placeholder for each image or video."""
    ids = []
    for segment in segments:
        if isinstance(segment, Text):
            ids += tokenizer.encode_plain(segment.text)
        else:
            ids.append(tokenizer.id(segment.name if isinstance(segment, Control) else segment.pad))
    return ids


# ---- strategies ----

hostile_text = st.lists(
    st.one_of(
        st.sampled_from([*CONTROL_TOKENS, "<|", "|>", "im_end", "\n", "e\u0301", "\u1100\u1161", "<\u0338|im_end|>"]),
        st.text(max_size=6),
    ),
    max_size=6,
).map("".join)
# Without "|" no text spells a control token, so that transformers, which reads them anywhere, must agree.
ordinary_text = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="|"), max_size=12),
    st.text(" \n\r\t'sdl1eé.,日", max_size=12),
)
items = st.one_of(
    ordinary_text.map(lambda text: {"type": "text", "text": text}),
    st.sampled_from(
        [
            {"type": "image", "image": "a.png"},
            {"type": "image_url", "image_url": {"url": "a.png"}},
            {"type": "video", "video": "a.mp4", "fps": 1.0},
            {"type": "video_url", "video_url": "a.mp4"},
        ]
    ),
)
conversations = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["system", "user", "assistant"]),
            "content": st.one_of(ordinary_text, st.lists(items, min_size=1, max_size=4)),
        }
    ),
    min_size=1,
    max_size=4,
)


# ---- tokenizer ----


@pytest.mark.parametrize("released_ids", [False, True])
def test_special_ids(tmp_path, released_ids):
    ids = write_byte_tokenizer(tmp_path, released_ids=released_ids)
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    peer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.special_ids == ids
    assert list(ids) == list(CONTROL_TOKENS)
    assert list(ids.values()) == list(range(ids["<|endoftext|>"], ids["<|endoftext|>"] + 14))
    if released_ids:
        assert (ids["<|endoftext|>"], ids["<|im_end|>"], ids["<|video_pad|>"]) == (151643, 151645, 151656)
    assert {name: peer.convert_tokens_to_ids(name) for name in ids} == ids
    assert peer.encode("<|im_start|>user") == [ids["<|im_start|>"], *tokenizer.encode_plain("user")]


def test_synthetic_files_are_deterministic_and_have_no_dead_merge(tmp_path):
    for name in ("a", "b"):
        write_byte_tokenizer(tmp_path / name)
    for path in sorted((tmp_path / "a").iterdir()):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    tokenizer = Tokenizer.from_pretrained(tmp_path / "a")
    merged = range(256, tokenizer.pad_id)
    assert [tokenizer.encode_plain(tokenizer.token_bytes(i).decode()) for i in merged] == [[i] for i in merged]


@quick
@given(hostile_text)
def test_text_never_gives_special_ids_and_round_trips(tokenizer, text):
    ids = tokenizer.encode_plain(text)
    assert not set(ids) & set(tokenizer.special_ids.values())
    assert tokenizer.decode(ids, skip_special_tokens=False) == unicodedata.normalize("NFC", text)


@quick
@given(ordinary_text)
def test_encode_plain_equals_transformers(tokenizer, peer, text):
    assert tokenizer.encode_plain(text) == peer.encode(text, add_special_tokens=False)


@quick
@given(st.lists(st.integers(0, 400), max_size=20), st.booleans())
def test_stream_pieces_concatenate_to_decode(tokenizer, ids, skip):
    decoder = tokenizer.stream_decoder(skip_special_tokens=skip)
    pieces = [decoder.push(token_id) for token_id in ids] + [decoder.finish()]
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=skip)


@quick
@given(st.text(max_size=12))
def test_stream_never_emits_half_a_character(tokenizer, text):
    decoder = tokenizer.stream_decoder()
    so_far = ""
    for token_id in tokenizer.encode_plain(text):
        so_far += decoder.push(token_id)
        assert unicodedata.normalize("NFC", text).startswith(so_far)
    assert so_far == unicodedata.normalize("NFC", text)
    assert decoder.finish() == ""


def test_stream_waits_for_the_last_byte_of_a_character(tokenizer):
    ids = tokenizer.encode_plain("日!")
    decoder = tokenizer.stream_decoder()
    assert [decoder.push(token_id) for token_id in ids] == ["", "", "日", "!"]
    decoder.push(ids[0])
    assert decoder.finish() == "\ufffd"
    assert decoder.push(ids[3]) == "!"


def test_decode_takes_tensors_and_keeps_markers_on_request(tokenizer):
    ids = torch.tensor([tokenizer.id("<|box_start|>"), *tokenizer.encode_plain("(1,2)"), tokenizer.id("<|box_end|>")])
    assert tokenizer.decode(ids) == "(1,2)"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|box_start|>(1,2)<|box_end|>"
    assert tokenizer.batch_decode(torch.stack([ids, ids])) == ["(1,2)", "(1,2)"]
    with pytest.raises(ValueError, match="ids: wants token ids"):
        tokenizer.decode([-1])


def test_control_tokens_not_flagged_special_stay_out_of_text(folder, tmp_path):
    data = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    for token in data["added_tokens"]:
        token["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert len(tokenizer.encode_plain("<|im_end|>")) > 1
    assert tokenizer.decode([tokenizer.id("<|im_end|>")]) == ""


def test_damaged_tokenizers_are_refused(folder, tmp_path):
    data = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    path = tmp_path / "tokenizer.json"

    def refused(match, **changes):
        path.write_text(json.dumps(data | changes), encoding="utf-8")
        with pytest.raises(CheckpointError, match=match):
            Tokenizer.from_pretrained(tmp_path)

    with pytest.raises(CheckpointError, match="no such file"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"vocab\.json with merges.txt is not read"):
        Tokenizer.from_pretrained(tmp_path)
    path.write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match="not a readable tokenizer"):
        Tokenizer.from_pretrained(tmp_path)

    without = [token for token in data["added_tokens"] if token["content"] != "<|image_pad|>"]
    vocabulary = {name: i for name, i in data["model"]["vocab"].items() if name != "<|image_pad|>"}
    refused(
        r"lacks the special tokens <\|image_pad\|>",
        added_tokens=without,
        model=data["model"] | {"vocab": vocabulary},
    )
    refused("decoder ByteLevel", decoder={"type": "Fuse"})
    # Without splitting, and taking whole words from the vocabulary, text would spell control tokens.
    plain = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    refused("ordinary text can spell", pre_tokenizer=plain, model=data["model"] | {"ignore_merges": True})


@pytest.mark.parametrize("text", [None, b"bytes", 3, "a\ud800b"])
def test_encode_plain_refuses_what_is_no_text(tokenizer, text):
    with pytest.raises(PromptError, match=r"^text: "):
        tokenizer.encode_plain(text)


# ---- rendering ----


@quick
@given(conversations, st.booleans(), st.booleans())
def test_rendering_equals_template_and_transformers(tokenizer, peer, messages, generate, vision_id):
    segments = render(messages, add_generation_prompt=generate, add_vision_id=vision_id)
    options = {"add_generation_prompt": generate, "add_vision_id": vision_id}
    text = reference_template.render(messages=messages, **options)
    assert segments_to_text(segments) == text
    assert peer.apply_chat_template(messages, tokenize=False, **options) == text
    assert encode(tokenizer, segments) == peer.encode(text, add_special_tokens=False)


def test_rendering_equals_plain_fast_tokenizer(folder, tokenizer):
    peer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    messages = [
        {
            "role": "user",
            "content": [{"text": "  Where\n\n"}, {"image": "a.png"}, {"text": "\n is "}, {"text": "it's?"}],
        },
        {
            "role": "assistant",
            "content": "<|object_ref_start|>it<|object_ref_end|><|box_start|>(1,2),(3,4)<|box_end|>",
        },
    ]
    segments = render(messages)
    assert encode(tokenizer, segments) == peer.encode(segments_to_text(segments))


def test_neighbouring_text_is_tokenised_as_one(tokenizer):
    joined = render([{"role": "user", "content": "What is it"}])
    parts = render([{"role": "user", "content": [{"text": "Wh"}, {"text": ""}, {"text": "at is it"}]}])
    assert parts == joined


@quick
@given(st.sampled_from(["system", "user", "assistant"]), hostile_text, st.booleans())
def test_no_text_adds_control_tokens(tokenizer, role, text, as_list):
    def special(content):
        segments = render([{"role": "system", "content": "s"}, {"role": role, "content": content}])
        return [i for i in encode(tokenizer, segments) if i in tokenizer.special_ids.values()]

    extra = list(special([{"type": "text", "text": text}] if as_list else text))
    for token_id in special("plain"):
        extra.remove(token_id)
    allowed = {tokenizer.id(name) for name in GROUNDING_TOKENS} if role == "assistant" else set()
    assert set(extra) <= allowed


def test_grounding_markers_are_control_tokens_only_in_assistant_turns():
    text = "<|box_start|>(1,2)<|box_end|><|im_end|>"
    assert Control("<|box_start|>") not in render([{"role": "user", "content": text}])
    assert render([{"role": "assistant", "content": text}], add_generation_prompt=False)[-7:] == [
        Text("assistant\n"),
        Control("<|box_start|>"),
        Text("(1,2)"),
        Control("<|box_end|>"),
        Text("<|im_end|>"),
        Control("<|im_end|>"),
        Text("\n"),
    ]


@quick
@given(
    st.sampled_from(["system", "user", "assistant"]),
    st.lists(st.one_of(st.sampled_from(GROUNDING_TOKENS), ordinary_text), max_size=6).map("".join),
    st.booleans(),
)
def test_text_that_asks_for_it_has_grounding_markers_in_any_turn(tokenizer, peer, role, text, loss):
    item = {"type": "text", "text": text, "grounding": True, "loss": loss}
    messages = [
        {"role": role, "content": [{"type": "text", "text": "See: "}, item, {"type": "image", "image": "a.png"}]}
    ]
    theirs = [{"role": role, "content": [{"type": "text", "text": f"See: {text}"}, {"type": "image"}]}]
    want = peer.apply_chat_template(theirs, tokenize=False)
    segments = render(messages, add_generation_prompt=False)
    assert segments_to_text(segments) == want
    if loss or role != "assistant":  # what a runtime inserted is tokenised apart
        assert encode(tokenizer, segments) == peer.encode(want, add_special_tokens=False)


@quick
@given(hostile_text, st.sampled_from(["system", "user", "assistant"]))
def test_asking_for_grounding_gives_no_other_control_token(tokenizer, text, role):
    def control(**flags):
        segments = render([{"role": role, "content": [{"type": "text", "text": text, **flags}]}])
        return [s.name for s in segments if isinstance(s, Control)], encode(tokenizer, segments)

    names, ids = control(grounding=True)
    assert [name for name in names if name not in GROUNDING_TOKENS] == [
        name for name in control(grounding=False)[0] if name not in GROUNDING_TOKENS
    ]
    assert sum(token in tokenizer.special_ids.values() for token in ids) == len(names)
    assert all(marker in names for marker in GROUNDING_TOKENS if marker in text)


def test_media_keep_source_options_and_place():
    picture = object()
    messages = [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": picture, "min_pixels": 3136, "max_pixels": None, "text": None},
                {
                    "video_url": {"url": "v.mp4", "detail": "auto"},
                    "nframes": 8,
                    "video_start": 0,
                    "video_end": 2.5,
                },
            ],
        }
    ]
    image, video = (segment for segment in render(messages) if isinstance(segment, Media))
    assert image == Media("image", picture, {"min_pixels": 3136}, "messages[0].content[0]")
    assert video == Media("video", "v.mp4", {"num_frames": 8, "start": 0.0, "end": 2.5}, "messages[0].content[1]")


@pytest.mark.parametrize("key", ["tool_calls", "name", "loss", "refusal", "max_pixel"])
def test_a_key_whose_value_is_none_counts_as_absent(key):
    """As tables and the objects of chat clients write what nobody set; in messages, in items and in URLs."""
    plain = [
        {"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image", "image": "a"}]},
        {"role": "assistant", "content": "y"},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "b"}}]},
    ]

    def filled(value):
        if isinstance(value, list):
            return [filled(item) for item in value]
        return {**{k: filled(v) for k, v in value.items()}, key: None} if isinstance(value, dict) else value

    assert filled(plain)[0]["content"][1][key] is None and filled(plain)[2]["content"][0]["image_url"][key] is None
    assert render(filled(plain)) == render(plain)


@pytest.mark.parametrize("kind", ["image", "video"])
def test_newer_source_keys_and_details(peer, kind):
    items = [{"type": kind, key: "a file", "image_url": None} for key in (kind, "url", "path")]
    details = [None, "auto", "high", "low"]
    items += [{"type": f"{kind}_url", f"{kind}_url": {"url": "a file", "detail": detail}} for detail in details]
    messages = [{"role": "user", "content": items}]
    segments = render(messages)
    media = [segment for segment in segments if isinstance(segment, Media)]
    assert [(item.kind, item.source, item.options) for item in media] == [(kind, "a file", {})] * 7
    assert [item.detail for item in media] == ["auto"] * 5 + ["high", "low"]
    without_none = [{key: value for key, value in item.items() if value is not None} for item in items]
    theirs = peer.apply_chat_template([{"role": "user", "content": without_none}], tokenize=False)
    assert segments_to_text(render(messages, add_generation_prompt=False)) == theirs


def user(*content):
    return [{"role": "user", "content": "ok"}, {"role": "user", "content": list(content)}]


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ("hello", r"^messages: wants a list of messages, got a str; write"),
        ({"role": "user", "content": "x"}, r"^messages: wants a list of messages, got dict"),
        (None, r"^messages: .* got NoneType"),
        ([], r"^messages: wants at least one message"),
        (["hello"], r"^messages\[0\]: wants a dict .* got str"),
        (
            [{"role": "tool", "content": "x"}],
            r"^messages\[0\].role: .*'system', 'user', 'assistant', got 'tool'",
        ),
        ([{"role": ["user"], "content": "x"}], r"^messages\[0\].role: "),
        ([{"content": "x"}], r"^messages\[0\].role: .* got None"),
        ([{"role": "user"}], r"^messages\[0\].content: wants a str or a list of items, got NoneType"),
        ([{"role": "user", "content": 3}], r"^messages\[0\].content: .* got int"),
        ([{"role": "user", "content": []}], r"^messages\[0\].content: .* empty list"),
        (
            [{"role": "user", "content": "x", "name": "y"}],
            r"^messages\[0\]: unknown key 'name'; a message takes 'role'",
        ),
        (user("x"), r"^messages\[1\].content\[0\]: wants a dict, got str; write"),
        (user({}), r"^messages\[1\].content\[0\]: wants a 'type'"),
        (user({"text": "x", "image": "y"}), r"^messages\[1\].content\[0\]: .*got 'text', 'image'"),
        (user({"text": "x"}, {"type": "audio"}), r"^messages\[1\].content\[1\].type: .* got 'audio'"),
        (user({"type": "text", "text": 3}), r"^messages\[1\].content\[0\].text: wants a str, got int"),
        (
            user({"type": "text", "text": "x", "fps": 1}),
            r"unknown key 'fps'; a text item takes 'type', 'text', 'grounding', 'loss'$",
        ),
        (user({"text": "x", "grounding": 1}), r"content\[0\].grounding: wants True or False, got 1"),
        (user({"image": "x", "grounding": True}), r"unknown key 'grounding'; an image item"),
        (user({"type": "image"}), r"^messages\[1\].content\[0\].image: is missing"),
        (user({"type": "image", "image": None}), r"^messages\[1\].content\[0\].image: is missing"),
        (
            user({"type": "image", "image": "a", "max_pixel": 9}),
            r"unknown key 'max_pixel'; an image item .*'max_pixels'",
        ),
        (user({"type": "image", "image": "a", "fps": 1}), r"unknown key 'fps'; an image item takes"),
        (
            user({"type": "image", "image": "a", "max_pixels": 0}),
            r"\.max_pixels: wants a positive int, got 0",
        ),
        (
            user({"type": "image", "image": "a", "max_pixels": True}),
            r"\.max_pixels: wants a positive int, got True",
        ),
        (
            user({"type": "image", "image": "a", "resized_height": 28}),
            r"resized_height and resized_width together",
        ),
        (
            user({"type": "image_url", "image_url": {"uri": "a"}}),
            r"content\[0\].image_url: unknown key 'uri'",
        ),
        (user({"type": "image_url", "image_url": {}}), r"content\[0\].image_url.url: is missing"),
        (
            user({"image_url": {"url": "a", "detail": "highest"}}),
            r"image_url.detail: wants one of 'auto', 'high', 'low', got 'highest'",
        ),
        (user({"image_url": {"url": "a", "detail": ["low"]}}), r"image_url.detail: wants one of"),
        (user({"url": "a"}), r"^messages\[1\].content\[0\]: wants a 'type' or exactly one of"),
        (user({"type": "image", "image": "a", "url": "b"}), r"wants one of 'image', 'url', 'path', got 'image', 'url'"),
        (user({"type": "video", "path": "a", "url": "b"}), r"wants one of 'video', 'url', 'path', got 'url', 'path'"),
        (user({"type": "text", "text": "a", "url": "b"}), r"unknown key 'url'; a text item"),
        (user({"type": "image_url", "image_url": "a", "path": "b"}), r"unknown key 'path'; an image item"),
        (user({"video": "a", "fps": float("nan")}), r"\.fps: wants a positive number, got nan"),
        (user({"video": "a", "fps": 0}), r"\.fps: wants a positive number, got 0"),
        (user({"video": "a", "video_start": -1}), r"\.video_start: wants seconds"),
        (user({"video": "a", "video_end": "3"}), r"\.video_end: wants seconds"),
        (user({"video": "a", "fps": 1, "nframes": 4}), r"wants fps or num_frames, got both"),
        (user({"video": "a", "num_frames": 4, "nframes": 4}), r"'nframes', 'num_frames' mean the same"),
    ],
)
def test_malformed_messages(messages, match):
    with pytest.raises(PromptError, match=match):
        render(messages)


json_values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-5, 5),
        st.floats(),
        st.sampled_from(["user", "text", "image", "x"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "image", "video", "fps"]), inner, max_size=3
        ),
    ),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(
    st.one_of(
        json_values,
        st.lists(st.fixed_dictionaries({"role": st.just("user"), "content": st.lists(json_values, max_size=3)})),
    )
)
def test_any_messages_render_or_raise_prompt_error(tokenizer, messages):
    try:
        segments = render(messages)
    except PromptError as error:
        assert str(error).startswith("messages")
    else:
        assert encode(tokenizer, segments)[0] == tokenizer.id("<|im_start|>")
