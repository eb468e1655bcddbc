"""Records of every kind and format to what the processor takes, and what is wrong with malformed ones."""

import json
import re

import pytest
import torch

from qwen2vl.errors import DataError, Qwen2VLError
from qwen2vl.prompt.processor import Processor
from qwen2vl.training.data import build_dataset, read_examples
from qwen2vl.training.data.entry import DataEntry
from qwen2vl.training.data.json_files import Raw
from qwen2vl.training.data.records import read_record
from tests.media.media_fixtures import numbered, video_bytes
from tests.training.data_files import chat, make_processor, png, taught, write_jsonl, write_tar

BOX = "<|object_ref_start|>cat<|object_ref_end|><|box_start|>(1,2),(3,4)<|box_end|>"


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return make_processor(tmp_path_factory.mktemp("tokenizer"))


def read(record, format="conversations", **options):
    entry = DataEntry.from_config({"path": "x", "format": format, **options})
    return read_record(Raw("x:1", json.dumps(record).encode(), "/media"), entry)


def text(value):
    return {"type": "text", "text": value}


def image(path):
    return {"type": "image", "image": path}


def test_tags_take_media_in_order_and_paths_start_from_the_folder():
    record = {
        "id": 7,
        "image": ["a.jpg", {"image": "/media/b.jpg", "max_pixels": 3136}],
        "videos": ["c.mp4", ["1.png", "2.png"]],
        "conversations": [
            {"from": "human", "value": "<image>\nand <video>, <image>?"},
            {"from": "gpt", "value": "No. <video>"},
        ],
    }
    kind, messages = read(record)
    assert kind == "conversation"
    assert messages == [
        {
            "role": "user",
            "content": [
                image("/media/a.jpg"),
                text("\nand "),
                {"type": "video", "video": "/media/c.mp4"},
                text(", "),
                {"type": "image", "image": "/media/b.jpg", "max_pixels": 3136},
                text("?"),
            ],
        },
        {
            "role": "assistant",
            "content": [text("No. "), {"type": "video", "video": ["/media/1.png", "/media/2.png"]}],
        },
    ]
    assert read({**record, "image": ["https://x/y.jpg", "data:,"]})[1][0]["content"][0] == image("https://x/y.jpg")
    assert read(record, media_root="/else")[1] == messages  # the reader of files puts it in place of the folder


OUTSIDE = (
    "/etc/hostname",
    "../a.jpg",
    "b/../../a.jpg",
    "/media",
    "/media-of-others/a.jpg",
    "file:///media/a.jpg",
    "FILE:///a",
)


@pytest.mark.parametrize("name", OUTSIDE)
def test_records_name_files_of_their_folder_alone(name):
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a"}]
    items = [{"type": "image_url", "image_url": {"url": name}}]
    for record in (
        {"image": name, "conversations": turns},
        {"image": [{"path": name}], "conversations": turns},
        {"video": [[name, "a.png"]], "text": "<video>"},
        {"text": f"<img>{name}</img>"},
        {"conversations": [{"from": "human", "value": items}, turns[1]]},
    ):
        with pytest.raises(DataError, match="media_root"):
            read(record)
        # A shard's sample takes what is called so among its own members, and no file.
        shard = Raw("x:1", json.dumps(record).encode(), None, {"b.png": b"", "a.png": b""})
        with pytest.raises(DataError, match=r"media_root|is no member of the sample"):
            read_record(shard, DataEntry.from_config({"path": "x", "format": "webdataset"}))
    # With roots of its own the processor says what may be opened.
    entry = DataEntry.from_config({"path": "x", "format": "conversations"})
    raw = Raw("x:1", json.dumps({"image": name, "conversations": turns}).encode(), "/media")
    assert read_record(raw, entry, anywhere=True)[1][0]["content"]


def test_a_media_root_lets_records_name_files_below_it(tmp_path, processor):
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "records").mkdir()
    record = chat(1, image="../a.png")
    record["conversations"][0]["value"] = "<image>"
    path = write_jsonl(tmp_path / "records" / "a.jsonl", [record | {"image": str(tmp_path / "a.png")}])
    with pytest.raises(DataError, match=r"a.jsonl:1: .*a.png' lies outside of"):
        list(read_examples(str(path), processor))
    (example,) = read_examples(str(path), processor, media_root=str(tmp_path))
    assert example.pixel_values is not None
    rooted = Processor(processor.tokenizer, roots=tmp_path)
    (example,) = read_examples(str(path), rooted)
    assert example.pixel_values is not None
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(DataError, match="outside of the roots"):
        list(read_examples(str(path), Processor(processor.tokenizer, roots=tmp_path / "elsewhere")))


def test_qwen_vl_markup():
    turns = [
        {"from": "user", "value": "Picture 1: <img>a b.jpg</img>\nFind <ref>cat</ref>"},
        {"from": "assistant", "value": "<ref>cat</ref><box>(1,2),(3,4)</box>"},
    ]
    _, messages = read({"conversations": turns})
    assert messages[0]["content"] == [text("Picture 1: "), image("/media/a b.jpg"), text("\nFind <ref>cat</ref>")]
    assert messages[1]["content"] == [text(BOX)]
    turns[0]["value"] = "Find the cat"
    assert read({"conversations": turns})[1][1]["content"] == [text(turns[1]["value"])]  # just text, without <img>


def test_sharegpt_messages_with_tags_items_and_system():
    record = {
        "messages": [
            {"role": "user", "content": "<image>Which?"},
            {"role": "assistant", "content": "This.", "loss": False},
            {
                "role": "user",
                "content": [
                    {"type": "image"},
                    {"type": "image_url", "image_url": {"url": "c.jpg", "detail": "low"}},
                    {"type": "video", "video": ["1.png"], "image": None},
                    {"type": "text", "text": "<image> is text here"},
                ],
            },
            {"role": "assistant", "content": "That."},
        ],
        "images": ["a.jpg", "b.jpg"],
        "videos": [],
        "system": "Be brief.",
    }
    _, messages = read(record, "sharegpt")
    assert messages[0] == {"role": "system", "content": "Be brief."}
    assert messages[2] == {"role": "assistant", "content": [text("This.")], "loss": False}
    assert messages[3]["content"] == [
        image("/media/b.jpg"),
        {"type": "image_url", "image_url": {"url": "/media/c.jpg", "detail": "low"}},
        {"type": "video", "video": ["/media/1.png"]},
        text("<image> is text here"),
    ]


def test_documents():
    record = {"text": f"A <image> then {BOX}<image>", "images": ["a.jpg", "b.jpg"]}
    for format in ("conversations", "sharegpt"):
        expected = [text("A "), image("/media/a.jpg"), text(f" then {BOX}"), image("/media/b.jpg")]
        assert read(record, format) == ("document", expected)


# ---- agents ----

PAPER = (
    'Back.\n*FUNCTION*: Home *ARGS*: {}\n*RESULT*: <image>\n*RETURN*: Now.\n*FUNCTION*: Tap *ARGS*: {"point": (3,4)}\n'
    "*RESULT*: <image>\n*RETURN*: Done."
)


def test_agents_turns_as_text():
    record = {
        "images": ["1.jpg", "2.jpg", "3.jpg"],
        "conversations": [{"from": "human", "value": "Go <image>"}, {"from": "gpt", "value": PAPER}],
    }
    _, messages = read(record, agent="paper")
    off = {"loss": False}
    assert messages[1]["content"] == [
        text("Back.\n*FUNCTION*: Home *ARGS*: {}\n*RESULT*"),
        text(": ") | off,
        image("/media/2.jpg") | off,
        text("\n*RETURN*") | off,
        text(': Now.\n*FUNCTION*: Tap *ARGS*: {"point": (3,4)}\n*RESULT*'),
        text(": ") | off,
        image("/media/3.jpg") | off,
        text("\n*RETURN*") | off,
        text(": Done."),
    ]
    assert read({**record, "agent": "paper"})[1] == messages
    assert read(record)[1][1]["content"][0] == text(PAPER.split("<image>")[0])  # not declared: words like others


def test_structured_calls():
    tool = {"name": "look", "description": "Looks.", "parameters": {"type": "object", "properties": {"at": {}}}}
    record = {
        "images": ["a.jpg"],
        "tools": json.dumps([tool]),
        "conversations": [
            {"from": "system", "value": "Help."},
            {"from": "human", "value": "What is it?"},
            {
                "from": "function_call",
                "value": '[{"name": "look", "arguments": {"at": 1}}, {"name": "look", "arguments": "{}"}]',
            },
            {"from": "observation", "value": f"{BOX} ✿FUNCTION✿"},
            {"from": "observation", "value": "<image>"},
            {"from": "gpt", "value": f"A {BOX}."},
        ],
    }
    for format, key in (("sharegpt", "conversations"), ("sharegpt", "messages")):
        turns = record["conversations"]
        if key == "messages":
            turns = [{"role": turn["from"], "content": turn["value"]} for turn in turns]
        _, messages = read({"images": ["a.jpg"], "tools": record["tools"], key: turns}, format)
        assert [message["role"] for message in messages] == ["system", "user", "assistant"]
        assert messages[0]["content"].startswith("Help.\n\n# Tools\n\n## You have access")
        assert "look: Looks. Parameters: {" in messages[0]["content"]
        assert messages[2]["content"] == [
            text('✿FUNCTION✿: look\n✿ARGS✿: {"at": 1}\n✿FUNCTION✿: look\n✿ARGS✿: {}\n✿RESULT✿'),
            text(f": {BOX} FUNCTION\n✿RESULT✿: ") | {"loss": False},
            image("/media/a.jpg") | {"loss": False},
            text("\n✿RETURN✿") | {"loss": False},
            text(f": A {BOX}."),
        ]
    _, messages = read({**record, "agent": "paper"})
    assert "# Actions" in messages[0]["content"] and "*FUNCTION*: look *ARGS*" in messages[2]["content"][0]["text"]


def _openai(*ids, content=None, **more):
    """A record of OpenAI's messages: a turn with two calls, and results that name the calls in the order of ``ids``."""
    calls = [
        {"id": name, "type": "function", "function": {"name": "look", "arguments": arguments}}
        for name, arguments in (("c1", '{"at": 1}'), ("c2", {"at": 2}))
    ]
    return {"messages": [
        {"role": "user", "content": "What is it?", "tool_calls": None},
        {"role": "assistant", "content": content, "tool_calls": calls},
        *({"role": "tool", "tool_call_id": name, "name": "look", "content": f"result {name}"} for name in ids),
        {"role": "assistant", "content": "A cat.", "tool_calls": []},
    ]} | more  # fmt: skip


@pytest.mark.parametrize("said", [None, "", "Let me see."])
def test_openai_tool_calls(said):
    """Read as the turns of calls and observations that say the same; results go by the ids of their calls."""
    structured = [
        {"role": "user", "content": "What is it?"},
        *([{"role": "assistant", "content": said}] if said else []),
        {"role": "function_call", "content": [{"name": "look", "arguments": {"at": n}} for n in (1, 2)]},
        {"role": "observation", "content": "result c1"},
        {"role": "observation", "content": "result c2"},
        {"role": "assistant", "content": "A cat."},
    ]
    structured[-4]["content"] = json.dumps(structured[-4]["content"])
    tools = [{"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": {}}}]
    want = read({"messages": structured, "tools": tools}, "sharegpt")
    for ids in (("c1", "c2"), ("c2", "c1")):
        assert read(_openai(*ids, content=said, tools=tools), "sharegpt") == want
    content = "".join(item["text"] for item in want[1][2]["content"])
    assert content.index("result c1") < content.index("result c2") < content.index("A cat.")


@pytest.mark.parametrize(
    ("record", "match"),
    [
        (_openai("c1"), r"tool_call_id: wants one result for each of the calls \['c1', 'c2'\], got \['c1'\]"),
        (_openai("c1", "c3"), r"each of the calls \['c1', 'c2'\], got \['c1', 'c3'\]"),
        (_openai("c1", "c1"), r"got \['c1', 'c1'\]"),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": [1]}]}, "unknown key 'tool_calls'; a turn of "),
        ({"messages": [{"role": "assistant", "tool_calls": {"id": 1}}]}, r"\[0\].tool_calls: wants a list, got dict"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"name": "f"}]}]}, r"tool_calls\[0\]: wants {'id'"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
            "is no JSON",
        ),
    ],
)  # fmt: skip
def test_openai_tool_calls_that_are_refused(record, match):
    with pytest.raises(Qwen2VLError, match=match):
        read(record, "sharegpt")


# ---- malformed records ----

TURNS = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]


def turns(*values):
    return {"conversations": [{"from": ("human", "gpt")[n % 2], "value": value} for n, value in enumerate(values)]}


MALFORMED = [
    ({}, "wants one of 'conversations', 'text', got none"),
    ({"conversations": TURNS, "text": "x"}, "got 'conversations', 'text'"),
    ({"conversations": []}, "conversations: wants a list of turns"),
    ({"conversations": "x"}, "conversations: wants a list of turns"),
    ({"conversations": [3]}, r"conversations\[0\]: wants an object, got int"),
    ({"conversations": [{"from": "bot", "value": "x"}]}, r"conversations\[0\].from: wants one of .*, got 'bot'"),
    ({"conversations": [{"from": ["gpt"], "value": "x"}]}, r"conversations\[0\].from: wants one of"),
    ({"conversations": [{"from": "gpt"}]}, r"conversations\[0\].value: wants a str, got NoneType"),
    ({"conversations": [{"role": "user", "content": "x"}]}, r"conversations\[0\]: unknown key 'role'"),
    ({"conversations": TURNS, "system": 3}, "system: wants a str, got int"),
    ({"conversations": [{"from": "system", "value": ""}], "system": ""}, r"conversations\[0\] is a system turn, too"),
    ({"text": 3}, "text: wants a str, got int"),
    ({"text": ["x"]}, "text: wants a str, got list"),
    (turns("<image>", "b"), "wants 1 or more images, one for each <image>, got 0"),
    ({**turns("<image><image>", "b"), "image": "a.jpg"}, "wants 2 or more images, one for each <image>, got 1"),
    ({**turns("<image>", "b"), "images": ["a", "b"]}, "has 2 images, but 1 <image> in its text"),
    ({**turns("a", "b"), "video": "a"}, "has 1 videos, but 0 <video>"),
    ({**turns("a", "b"), "image": "a", "images": ["a"]}, "wants 'image' or 'images', got both"),
    ({**turns("<image>", "b"), "image": 3}, r"image\[0\]: wants a path, got 3"),
    ({**turns("<image>", "b"), "image": ""}, r"image\[0\]: wants a path"),
    ({**turns("<image>", "b"), "image": {"max_pixels": 3}}, r"image\[0\]: wants one of 'image', 'url', 'path'"),
    ({**turns("<video>", "b"), "videos": [[]]}, r"videos\[0\]: wants a path"),
    (turns("a", f"{BOX}<|box_start|>(1,2)<|box_end|>"), r"messages\[1\].content\[0\].text: .* at character \d+ wants"),
    (turns("a", "<|box_start|>(1,2),(1000,3)<|box_end|>"), "got 1000"),
    ({"text": "<|quad_end|>"}, r"text\[0\].text: grounding: <\|quad_end\|> at character 0"),
    ({**turns("a", "✿FUNCTION✿: x"), "agent": "qwen"}, "wants ✿ARGS✿ next"),
    ({**turns("a", "*FUNCTION*: f *ARGS*: {}\n*RESULT*: x"), "agent": "paper"}, "before the turn ends"),
    ({**turns("a", "b"), "agent": "nous"}, "style: wants one of"),
    ({**turns("a", "b"), "tools": "["}, "tools: is no JSON"),
    ({**turns("a", "b"), "tools": {"name": "f"}}, "tools: wants a list, got dict"),
    ({**turns("a", "b"), "tools": [{"name": 3}]}, "action.name: wants a str, got int"),
    ({"conversations": [TURNS[0], {"from": "function_call", "value": "f(1)"}]}, "function_call: is no JSON"),
    ({"conversations": [TURNS[0], {"from": "function_call", "value": '{"name": "f"}'}]}, "function_call: wants {"),
    ({"conversations": [TURNS[0], {"from": "observation", "value": "x"}, TURNS[1]]}, "a result wants a call before it"),
    (
        {
            "conversations": [
                TURNS[0],
                {"from": "function_call", "value": {"name": "f", "arguments": {}}},
                {"from": "observation", "value": "x"},
            ]
        },
        "must not end with a result",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("record", "match"), MALFORMED, ids=range(len(MALFORMED)))
def test_malformed_records(record, match):
    with pytest.raises(Qwen2VLError, match=match):
        read(record)


def test_malformed_records_are_reported_with_file_and_line(processor, tmp_path):
    """All of them in one file, good ones in between, and a broken line."""
    lines = [line for record, _ in MALFORMED for line in (record, chat(1))] + ['{"conversations": [', "3", b"\xff"]
    write_jsonl(tmp_path / "bad.jsonl", lines)
    entry = {"path": str(tmp_path / "bad.jsonl"), "format": "conversations", "shuffle": False}
    data = build_dataset([entry], processor, max_tokens=99, epochs=1)
    assert len(list(data)) == len(MALFORMED) == data.report.used
    assert data.report.skipped == {"malformed": len(MALFORMED) + 3} and data.report.bad == len(MALFORMED) + 3
    for n, (problem, (_, match)) in enumerate(zip(data.report.problems, MALFORMED, strict=False)):
        assert problem.source == f"{entry['path']}:{2 * n + 1}"
        assert problem.message.startswith(f"{problem.source}: ") and re.search(match, problem.message)
    for problem, match in zip(
        data.report.problems[-3:], ("is no JSON", "wants a JSON object, got int", "is no JSON"), strict=True
    ):
        assert match in problem.message
    with pytest.raises(DataError, match=r"bad\.jsonl:1: wants one of") as caught:
        list(build_dataset([entry], processor, max_tokens=99, epochs=1, max_bad=0))
    assert caught.value.source == f"{entry['path']}:1"


# ---- whole samples ----


def one(path, processor, **options):
    (example,) = read_examples(str(path), processor, **options)
    return example


def test_every_kind_becomes_an_example(processor, tmp_path):
    (tmp_path / "a.png").write_bytes(png(84, 56))
    (tmp_path / "v.mp4").write_bytes(video_bytes(numbered(4, height=56, width=56)))
    image_turns = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": BOX}]
    kinds = {
        "text": chat(1),
        "pair": {"text": "<image>a cat", "image": "a.png"},
        "ocr": {"text": "<image>LINE ONE\nLINE TWO", "image": "a.png"},
        "interleaved": {"text": "a<image>b<image>c", "images": ["a.png", "a.png"]},
        "vqa and grounding": {"conversations": image_turns, "image": "a.png"},
        "video": {"text": "<video>goes", "video": "v.mp4"},
        "agent": {"conversations": [{"from": "gpt", "value": PAPER}], "images": ["a.png"] * 2, "agent": "paper"},
    }
    write_jsonl(tmp_path / "all.jsonl", kinds.values())
    found = dict(zip(kinds, read_examples(str(tmp_path / "all.jsonl"), processor, video_max_pixels=3136), strict=True))
    assert taught(processor, found["text"]) == "number 1<|im_end|>"
    assert taught(processor, found["interleaved"]) == "abc<|endoftext|>"
    assert taught(processor, found["vqa and grounding"]) == f"{BOX}<|im_end|>"
    agent = taught(processor, found["agent"])
    assert agent == PAPER.replace(": <image>\n*RETURN*", "") + "<|im_end|>"
    assert found["pair"].image_grid_thw.tolist() == [[1, 4, 6]] and found["pair"].pixel_values.shape == (24, 588)
    assert found["interleaved"].image_grid_thw.shape == (2, 3)
    assert found["video"].video_grid_thw.tolist() == [[2, 4, 4]] and found["video"].pixel_values is None
    assert found["video"].pixel_values_videos.dtype == torch.uint8
    assert found["text"].pixel_values is None and found["text"].source.endswith("all.jsonl:1")
    for example in found.values():
        assert example.input_ids.shape == example.labels.shape == (example.tokens,)
        pads = [processor.tokenizer.id(name) for name in ("<|image_pad|>", "<|video_pad|>")]
        assert (example.labels[torch.isin(example.input_ids, torch.tensor(pads))] == -100).all()


def test_samples_of_shards(processor, tmp_path):
    video = video_bytes(numbered(4, height=56, width=56))
    shard = write_tar(
        tmp_path / "s.tar",
        [
            ("pair.jpg", png()),
            ("pair.json", {"url": "metadata of a crawl"}),
            ("pair.txt", "a cat"),
            ("dir/own.v1.json", "{}"),
            ("chat.json", {**chat(5), "images": ["two.png", "chat.one.png"]} | turns("<image>a<image>", "5")),
            ("chat.one.png", png(84, 56)),
            ("chat.two.png", png(56, 56)),
            ("tags.0.png", png()),
            ("tags.1.png", png(84, 56)),
            ("tags.txt", "a<image>b<image>"),
            ("clip.MP4", video),
            ("clip.txt", "goes"),
            ("frames.json", {"text": "<video>x", "videos": [["0.png", "1.png"]]}),
            ("frames.0.png", png()),
            ("frames.1.png", png()),
            ("items.json", {"messages": [{"role": "assistant", "content": [{"image": "0.png"}, {"text": "1"}]}]}),
            ("items.0.png", png()),
            ("items.1.png", png()),
            ("other.json", {"text": "<image>x", "image": "/etc/passwd"}),
            ("broken.jpg", b"no picture"),
            ("broken.txt", "x"),
            ("alone.jpg", png()),
            ("README", "x"),
            ("twice.txt", "a"),
            ("twice.txt", "b"),
            ("latin.txt", b"\xe9"),
        ],
    )
    entry = {"path": str(shard), "format": "webdataset", "shuffle": False, "video_max_pixels": 3136}
    data = build_dataset([entry], processor, max_tokens=99, epochs=1)
    found = {example.source.rpartition(":")[2]: example for example in data}
    assert list(found) == ["pair", "chat", "tags", "clip", "frames", "items"]
    assert taught(processor, found["pair"]) == "a cat<|endoftext|>"
    assert processor.decode(found["pair"].input_ids[:1], skip_special_tokens=False) == "<|vision_start|>"
    assert found["chat"].image_grid_thw.tolist() == [[1, 4, 4], [1, 4, 6]]
    assert found["tags"].image_grid_thw.tolist() == [[1, 4, 4], [1, 4, 6]]
    assert found["clip"].video_grid_thw is not None and found["frames"].video_grid_thw.tolist()[0][0] == 1
    wrong = {problem.source.rpartition(":")[2]: problem for problem in data.report.problems}
    assert {key: problem.reason for key, problem in wrong.items()} == {
        "dir/own": "malformed",
        "other": "malformed",
        "broken": "media",
        "alone": "malformed",
        "README": "media",
        "twice": "media",
        "latin": "malformed",
    }
    assert "'/etc/passwd' is no member of the sample" in wrong["other"].message
    assert "wants a member json or txt, got jpg" in wrong["alone"].message
    assert "member 'README' wants an extension" in wrong["README"].message
    assert "has two members named 'txt'" in wrong["twice"].message
    assert "member txt is no UTF-8 text" in wrong["latin"].message
    assert all(problem.message.startswith(f"{shard}:") for problem in wrong.values())


def test_too_long_is_reported_not_cut(processor, tmp_path):
    (tmp_path / "a.png").write_bytes(png(560, 560))
    write_jsonl(tmp_path / "a.jsonl", [{"text": "<image>x", "image": "a.png"}, {"text": "y"}])
    entry = {"path": str(tmp_path / "a.jsonl"), "format": "conversations", "shuffle": False}
    data = build_dataset([entry], processor, max_tokens=403, epochs=1, max_bad=0)
    assert [example.tokens for example in data] == [2]  # 400 + 2 marks + 2 of text are one too many
    assert data.report.skipped == {"too long": 1} and data.report.bad == 0
    assert "a.jsonl:1: has 404 tokens, more than max_tokens = 403" in data.report.summary()
    assert [e.tokens for e in build_dataset([entry], processor, max_tokens=404, epochs=1)] == [404, 2]


@pytest.mark.parametrize(
    ("record", "match"),
    [
        ({"text": "<image>x", "image": "none.png"}, r":1: content\[0\]: no such file"),
        (turns("only a question"), ":1: has nothing to learn"),
        ({"text": ""}, ":1: has nothing to learn"),
        ({"conversations": [{"from": "gpt", "value": "x", "loss": False}]}, ":1: has nothing to learn"),
        (
            {"text": "<image>x", "image": {"path": "a.png", "max_pixel": 3}},
            r":1: content\[0\]: unknown key 'max_pixel'",
        ),
        ({"text": "<image>x", "image": "http://127.0.0.1:9/a.png"}, "allow_remote=True"),
    ],
)
def test_samples_that_give_no_example(processor, tmp_path, record, match):
    write_jsonl(tmp_path / "a.jsonl", [record])
    with pytest.raises(DataError, match=match):
        one(tmp_path / "a.jsonl", processor)
