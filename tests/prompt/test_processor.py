"""Messages with real media to tensors: expansion, order, padding, limits, and what a checkpoint says."""

import base64
import io
import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoTokenizer, Qwen2VLImageProcessorPil

import qwen2vl
import qwen2vl.prompt.processor
from benchmarks.byte_tokenizer import write_byte_tokenizer
from benchmarks.random_checkpoint import write_random_checkpoint
from qwen2vl.config import Qwen2VLConfig
from qwen2vl.errors import CheckpointError, MediaError, PromptError
from qwen2vl.media.image import preprocess_image
from qwen2vl.media.video import preprocess_video
from qwen2vl.model import Qwen2VL
from qwen2vl.prompt.chatml import LOW_DETAIL_PIXELS, render
from qwen2vl.prompt.inputs import MediaInfo
from qwen2vl.prompt.processor import Processor
from tests.prompt.prompt_text import segments_to_text

IMAGE_PAD, VIDEO_PAD = 151655, 151656


def picture(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def user(*content):
    return [{"role": "user", "content": list(content)}]


def write_checkpoint(folder, **config):
    folder.mkdir(exist_ok=True)
    write_byte_tokenizer(folder, released_ids=True)
    data = Qwen2VLConfig.preset("2b").to_dict() | config
    (folder / "config.json").write_text(json.dumps(data), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def processor(folder):
    return Processor.from_pretrained(folder)


@pytest.fixture(scope="module")
def peer(folder):
    return AutoTokenizer.from_pretrained(folder)


def test_224_pixels_square_are_66_tokens(processor):
    inputs = processor(user({"type": "image", "image": picture(224, 224)}))
    ids = inputs["input_ids"][0].tolist()
    start = ids.index(151652)
    assert ids[start : start + 66] == [151652, *[IMAGE_PAD] * 64, 151653]
    assert ids.count(IMAGE_PAD) == 64
    assert inputs["image_grid_thw"].tolist() == [[1, 16, 16]]
    assert (inputs["pixel_values"].shape, inputs["pixel_values"].dtype) == ((256, 588), torch.uint8)
    assert inputs.media == [MediaInfo("image", "messages[0].content[0]", (224, 224), (224, 224), (1, 16, 16), 64)]


def test_many_images_keep_their_order_and_the_first_wrong_one_is_named(processor, tmp_path, monkeypatch):
    """Files are read by several threads at once, objects that may be shared by none."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    pixels = [picture(56, 28 * n, n) for n in range(2, 12)]
    files = [tmp_path / f"{n}.png" for n in range(10)]
    for file, image in zip(files, pixels, strict=True):
        image.save(file)
    with open(files[0], "rb") as stream:
        shared = [{"image": stream}, *[{"image": Image.open(files[1])}] * 3]
        inputs = processor(user(*[{"image": str(file)} for file in files], *shared))
    alone = [processor(user({"image": image}))["pixel_values"] for image in [*pixels, pixels[0], *[pixels[1]] * 3]]
    assert torch.equal(inputs["pixel_values"], torch.cat(alone))
    files[4].write_bytes(b"no image")
    files[8].unlink()
    for _ in range(5):
        with pytest.raises(MediaError, match=r"^messages\[0\]\.content\[4\]: .*4\.png"):
            processor(user(*[{"image": str(file)} for file in files]))


def test_an_image_crosses_few_files(processor, tmp_path):
    """From messages to patches every file of this package whose functions run has something to add."""
    picture(56, 84).save(tmp_path / "a.png")
    messages = user({"image": str(tmp_path / "a.png")}, {"text": "What is it?"})
    processor(messages)
    root, crossed = str(Path(qwen2vl.__file__).parent), set()
    previous = sys.getprofile()
    sys.setprofile(lambda frame, event, argument: crossed.add(frame.f_code.co_filename))
    try:
        processor(messages)
    finally:
        sys.setprofile(previous)
    ours = {str(Path(name).relative_to(root)) for name in crossed if name.startswith(root + os.sep)}
    prompt = {f"prompt/{name}.py" for name in ("processor", "messages", "chatml", "tokenizer", "budget", "inputs")}
    media = {"image", "png", "sources", "strictness", "effort", "options", "patches"}
    assert ours == prompt | {f"media/{name}.py" for name in media} | {"files.py"}


def test_text_only_has_no_pixels(processor, peer):
    messages = [{"role": "user", "content": "What is this?"}]
    inputs = processor(messages)
    assert set(inputs) == {"input_ids", "attention_mask"}
    assert inputs["input_ids"].tolist() == [peer.encode(segments_to_text(render(messages)))]
    assert inputs["attention_mask"].unique().tolist() == [1]
    assert {tensor.dtype for tensor in inputs.values()} == {torch.int64}
    assert inputs.media == []


parts = st.one_of(
    st.sampled_from(["", "What", " is\n", "12.5 é"]).map(lambda text: {"type": "text", "text": text}),
    st.tuples(st.integers(20, 120), st.integers(20, 120)).map(lambda size: {"image": picture(*size)}),
    st.tuples(st.integers(1, 5), st.integers(28, 90)).map(
        lambda clip: {"video": [picture(clip[1], 56, n) for n in range(clip[0])], "max_pixels": 3136}
    ),
)
chats = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant"]), "content": st.lists(parts, min_size=1, max_size=3)}
    ),
    min_size=1,
    max_size=3,
)


def expanded(messages, media, *, vision_id):
    """The template's text with every placeholder repeated as transformers' processor does it."""
    text = segments_to_text(render(messages, add_vision_id=vision_id))
    for item in media:
        text = text.replace(f"<|{item.kind}_pad|>", f"<{item.kind}>" * item.num_tokens, 1)
    return text.replace("<image>", "<|image_pad|>").replace("<video>", "<|video_pad|>")


@settings(max_examples=20, deadline=None)
@given(st.lists(chats, min_size=1, max_size=3), st.sampled_from(["left", "right"]), st.booleans())
def test_batches_equal_single_runs_and_transformers_tokens(processor, peer, batch, side, vision_id):
    inputs = processor(batch, padding_side=side, add_vision_id=vision_id)
    singles = [processor(messages, add_vision_id=vision_id) for messages in batch]
    length = inputs["input_ids"].shape[1]
    for row, (messages, single) in enumerate(zip(batch, singles, strict=True)):
        expected = peer.encode(expanded(messages, single.media, vision_id=vision_id))
        assert single["input_ids"].tolist() == [expected]
        pads, ones = [151643] * (length - len(expected)), [1] * len(expected)
        zeros = [0] * len(pads)
        assert inputs["input_ids"][row].tolist() == (pads + expected if side == "left" else expected + pads)
        assert inputs["attention_mask"][row].tolist() == (zeros + ones if side == "left" else ones + zeros)
    for key in ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"):
        of_singles = [single[key] for single in singles if key in single]
        assert (key in inputs) == bool(of_singles)
        assert not of_singles or torch.equal(inputs[key], torch.cat(of_singles))
    assert [m.num_tokens for m in inputs.media] == [m.num_tokens for single in singles for m in single.media]


def test_media_keep_their_order_and_are_read_once(processor, monkeypatch):
    read = []

    def counting(source, *args, **options):
        read.append(source)
        return preprocess_image(source, *args, **options)

    monkeypatch.setattr(qwen2vl.prompt.processor, "preprocess_image", counting)
    pictures = [picture(56 + 28 * n, 84, n) for n in range(4)]
    first = user({"image": pictures[0]}, {"text": "and"}, {"image": pictures[1]}) + user({"image": pictures[2]})
    inputs = processor([first, user({"image_url": pictures[3]})])
    assert read == pictures
    expected = [preprocess_image(image) for image in pictures]
    assert inputs["image_grid_thw"].tolist() == [list(patches.grid_thw) for patches in expected]
    assert np.array_equal(inputs["pixel_values"], np.concatenate([patches.patches for patches in expected]))
    assert [m.where for m in inputs.media] == [
        "messages[0][0].content[0]",
        "messages[0][0].content[2]",
        "messages[0][1].content[0]",
        "messages[1][0].content[0]",
    ]


def test_every_kind_of_source_gives_the_same_inputs(processor, tmp_path):
    image = picture(70, 90)
    path = tmp_path / "photo.png"
    image.save(path)
    data = path.read_bytes()
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    wanted = processor(user({"image": image}))
    items = [
        {"image": source} for source in (str(path), path, path.as_uri(), data, io.BytesIO(data), np.asarray(image), uri)
    ]
    items += [{"type": "image_url", "image_url": {"url": uri}}, {"type": "image_url", "image_url": uri}]
    for item in items:
        inputs = processor(user(item))
        assert all(torch.equal(inputs[key], wanted[key]) for key in wanted), item


def tokens(processor, item, **options):
    (media,) = processor(user(item), **options).media
    return media.num_tokens


def test_pixel_limits_item_over_call_over_processor(folder, processor):
    image = picture(280, 280)  # 100 tokens as it is
    small = Processor.from_pretrained(folder, max_pixels=25 * 784)
    item = {"type": "image", "image": image}
    assert tokens(processor, item) == 100
    assert tokens(small, item) == 25
    assert tokens(small, item, max_pixels=36 * 784) == 36
    assert tokens(small, item | {"max_pixels": 49 * 784}, max_pixels=36 * 784) == 49
    assert tokens(processor, item | {"min_pixels": 144 * 784}) == 144
    # A limit given alone moves the inherited other one.
    assert tokens(processor, item | {"max_pixels": 784}) == 1
    assert tokens(small, item, min_pixels=144 * 784) == 144
    assert tokens(processor, item | {"resized_height": 56, "resized_width": 84}) == 6
    with pytest.raises(MediaError, match=r"^messages\[0\].content\[0\]: .*min_pixels must not exceed max_pixels"):
        processor(user(item), min_pixels=5000, max_pixels=4000)


def test_low_detail_caps_and_never_raises_the_limits(folder, processor):
    image = picture(1120, 560)  # 800 tokens
    small = Processor.from_pretrained(folder, max_pixels=100 * 784)
    large = Processor.from_pretrained(folder, min_pixels=900 * 784)
    low, high, auto = (
        {"type": "image_url", "image_url": {"url": image, "detail": detail}} for detail in ("low", "high", "auto")
    )
    assert LOW_DETAIL_PIXELS == 200_704
    assert tokens(processor, high) == tokens(processor, auto) == 800
    assert 200 < tokens(processor, low) <= 256
    assert tokens(large, low) == tokens(processor, low)
    assert tokens(small, low) == tokens(small, auto) <= 100
    assert tokens(processor, low | {"max_pixels": 64 * 784}) <= 64
    (video,) = processor(user({"video_url": {"url": [image] * 2, "detail": "low"}})).media
    assert 200 < video.num_tokens <= 256


def test_local_files_can_be_forbidden(folder, tmp_path):
    picture(56, 56).save(tmp_path / "a.png")
    path = str(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    tokenizer = Processor.from_pretrained(folder).tokenizer
    for closed in (
        Processor.from_pretrained(folder, allow_local_files=False),
        Processor(tokenizer, allow_local_files=False),
    ):
        for item in (
            {"image": path},
            {"type": "image", "path": path},
            {"type": "image_url", "image_url": {"url": f"file://{path}"}},
            {"video": path},
            {"video": [data, path]},
        ):
            with pytest.raises(MediaError, match=r"^messages\[0\].content\[0\]: .*allow_local_files is False"):
                closed(user(item))
        assert tokens(closed, {"image": data}) == tokens(closed, {"image": Image.open(tmp_path / "a.png")}) == 4
    assert tokens(Processor(tokenizer), {"type": "image", "path": path}) == 4


def test_local_files_can_be_held_to_folders(folder, tmp_path):
    for place in ("open", "closed"):
        (tmp_path / place).mkdir()
        picture(56, 56).save(tmp_path / place / "a.png")
    (tmp_path / "open" / "link.png").symlink_to(tmp_path / "closed" / "a.png")
    tokenizer = Processor.from_pretrained(folder).tokenizer
    root = tmp_path / "open"
    for held in (Processor.from_pretrained(folder, roots=root), Processor(tokenizer, roots=[str(root)])):
        assert tokens(held, {"image": str(tmp_path / "open" / "a.png")}) == 4
        for name in ("closed/a.png", "open/link.png", "open/../closed/a.png"):
            with pytest.raises(MediaError, match=r"^messages\[0\].content\[0\]: .*lies outside of the roots.*/open'$"):
                held(user({"image": str(tmp_path / name)}))
    with pytest.raises(MediaError, match=r"^roots: .* is no folder"):
        Processor.from_pretrained(folder, roots=tmp_path / "none")


def test_unknown_options_are_listed(folder, processor):
    """By everything that takes options as keywords: what is wrong, and what there is."""
    calls = (
        lambda **options: processor([{"role": "user", "content": "x"}], **options),
        lambda **options: processor.supervised([{"role": "user", "content": "x"}], **options),
        lambda **options: processor.supervised_document("x", **options),
        lambda **options: Processor(processor.tokenizer, **options),
        lambda **options: Processor.from_pretrained(folder, **options),
        lambda **options: preprocess_image(picture(56, 56), **options),
        lambda **options: preprocess_video([picture(56, 56)], **options),
    )
    for call in calls:
        with pytest.raises(
            TypeError, match=r"unexpected keyword argument 'max_pixel'; .* min_pixels, max_pixels, fps, "
        ):
            call(max_pixel=784)
        call(max_pixels=7840)


def test_options_of_a_processor_are_defaults_of_its_calls(folder):
    frames = [picture(84, 56, n) for n in range(8)]
    processor = Processor.from_pretrained(folder, num_frames=4, video_max_pixels=6 * 784, max_video_tokens=100)
    assert tokens(processor, {"video": frames}) == 12
    assert tokens(processor, {"video": frames}, num_frames=8) == 24
    assert tokens(processor, {"video": frames}, fps=1.0) == 24  # a rate wins over an inherited number
    assert tokens(processor, {"video": frames, "fps": 1.0}, num_frames=4) == 24
    assert tokens(processor, {"video": frames}, fps=1.0, num_frames=4) == 12  # and loses against one beside it
    assert tokens(processor, {"video": frames}, max_video_tokens=3) == 2  # one for each time step of two frames


@pytest.mark.parametrize("value", [0, -5, 2.5, "784", True])
@pytest.mark.parametrize("name", ["min_pixels", "max_pixels", "video_min_pixels", "video_max_pixels"])
def test_pixel_limits_of_a_call_are_checked(processor, name, value):
    with pytest.raises(MediaError, match=f"^{name} must be a positive integer, got"):
        processor([{"role": "user", "content": "x"}], **{name: value})


@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, "2", True])
def test_options_of_frames_are_checked_where_they_are_given(processor, value):
    with pytest.raises(MediaError, match=r"^fps must be a finite number > 0, got"):
        processor([{"role": "user", "content": "x"}], fps=value)
    with pytest.raises(MediaError, match=r"^num_frames must be a positive integer, got"):
        processor([{"role": "user", "content": "x"}], num_frames=value)


def test_video_options_and_progress(processor):
    frames = [picture(84, 56, n) for n in range(8)]
    item = {"type": "video", "video": frames}
    calls = []
    inputs = processor(user(item), video_max_pixels=6 * 784, progress=lambda *step: calls.append(step))
    assert inputs["video_grid_thw"].tolist() == [[4, 4, 6]]
    expected = preprocess_video(frames, video_min_pixels=6 * 784, video_max_pixels=6 * 784)
    assert np.array_equal(inputs["pixel_values_videos"], expected.patches)
    assert (inputs["input_ids"] == VIDEO_PAD).sum() == 24
    assert calls[-1] == (8, 8)
    (media,) = inputs.media
    assert (media.kind, media.native_fps, media.duration) == ("video", 2.0, expected.duration)
    assert media.frame_times == expected.frame_times

    small = {"video_max_pixels": 6 * 784}
    assert tokens(processor, item | {"nframes": 4}, **small) == 12
    assert tokens(processor, item, num_frames=4, **small) == 12
    assert tokens(processor, item | {"fps": 1.0}, num_frames=4, **small) == 24  # the item's rate wins
    assert tokens(processor, item | {"max_pixels": 4 * 784}, **small) == 8
    assert tokens(processor, item, max_video_tokens=8, **small) == 4
    assert tokens(processor, item | {"total_pixels": 8 * 784}, **small) == 4
    assert tokens(processor, item | {"resized_height": 28, "resized_width": 56}, video_min_pixels=784) == 8
    with pytest.raises(PromptError, match=r"content\[0\].total_pixels: wants at least 784, got 783"):
        processor(user(item | {"total_pixels": 783}))


def test_media_errors_name_their_place(processor, tmp_path):
    good = {"image": picture(56, 56)}
    text = tmp_path / "note.png"
    text.write_text("not an image")
    for bad in ({"image": str(tmp_path / "none.png")}, {"image": str(text)}, {"image": b""}, {"image": 3}):
        with pytest.raises(MediaError, match=r"^messages\[1\].content\[1\]: "):
            processor(user(good) + user(good, bad))
        with pytest.raises(MediaError, match=r"^messages\[1\]\[0\].content\[0\]: "):
            processor([user(good), user(bad)])
    with pytest.raises(MediaError, match=r"^messages\[0\].content\[0\]: .*allow_remote"):
        processor(user({"image": "https://example.invalid/a.png"}))
    for bad in ({"video": str(text)}, {"video": []}, {"video": [b"x"]}):
        with pytest.raises(MediaError, match=r"^messages\[0\].content\[0\]: "):
            processor(user(bad))


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ("Describe this.", r"^messages: wants a list of messages, got a str; write"),
        ([], r"^messages: wants at least one message"),
        ([[]], r"^messages\[0\]: wants at least one message"),
        (
            [user({"text": "x"}), {"role": "user", "content": "x"}],
            r"^messages\[1\]: wants a list of messages, got dict",
        ),
        ([{"role": "user", "content": "x"}, user({"text": "x"})], r"^messages\[1\]: wants a dict"),
        ([user({"text": "x"}), [{"role": "me", "content": "x"}]], r"^messages\[1\]\[0\].role: "),
        (
            user({"image": "missing.png"}, {"txt": "x"}),
            r"^messages\[0\].content\[1\]: ",
        ),  # before any file is read
    ],
)
def test_malformed_batches(processor, messages, match):
    with pytest.raises(PromptError, match=match):
        processor(messages)


def test_padding_side_is_checked(processor):
    with pytest.raises(PromptError, match=r"^padding_side: wants 'left' or 'right', got 'top'"):
        processor([{"role": "user", "content": "x"}], padding_side="top")


def test_injected_placeholders_stay_text(processor):
    inputs = processor(user({"text": "<|image_pad|><|vision_start|>"}, {"image": picture(56, 56)}))
    assert (inputs["input_ids"] == IMAGE_PAD).sum() == 4
    assert (inputs["input_ids"] == 151652).sum() == 1
    assert "<|image_pad|><|vision_start|>" in processor.decode(inputs["input_ids"][0])
    assert processor.batch_decode(inputs["input_ids"]) == [processor.decode(inputs["input_ids"][0])]


def test_inputs_to_device(processor):
    inputs = processor(user({"image": picture(56, 56)}))
    moved = inputs.to("meta")
    assert {tensor.device.type for tensor in moved.values()} == {"meta"}
    assert moved.media == inputs.media
    assert inputs["input_ids"].device.type == "cpu"


# ---- checkpoint folders ----


@pytest.mark.parametrize(
    ("name", "content", "limits"),
    [
        (None, None, (3136, 12_845_056)),
        ("preprocessor_config.json", {}, (3136, 12_845_056)),
        (
            "preprocessor_config.json",
            {"min_pixels": 6272, "max_pixels": 1_003_520, "patch_size": 14},
            (6272, 1_003_520),
        ),
        ("preprocessor_config.json", {"size": {"shortest_edge": 784, "longest_edge": 7840}}, (784, 7840)),
        ("preprocessor_config.json", {"size": {"min_pixels": 784, "max_pixels": 7840}}, (784, 7840)),
        ("preprocessor_config.json", {"max_pixels": 9408, "size": {"longest_edge": 784}}, (3136, 9408)),
        ("processor_config.json", {"image_processor": {"size": {"longest_edge": 7840}}}, (3136, 7840)),
    ],
)
def test_limits_of_a_checkpoint(tmp_path, name, content, limits):
    write_checkpoint(tmp_path)
    if name:
        (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
    processor = Processor.from_pretrained(tmp_path)
    assert (processor.min_pixels, processor.max_pixels) == limits
    raised = Processor.from_pretrained(str(tmp_path), min_pixels=20_000_000)
    assert (raised.min_pixels, raised.max_pixels) == (20_000_000, 20_000_000)


@pytest.mark.parametrize(
    ("name", "content", "limits"),
    [
        (None, None, (100_352, 602_112)),
        ("preprocessor_config.json", {"min_pixels": 784, "max_pixels": 7840}, (100_352, 602_112)),
        ("video_preprocessor_config.json", {"min_pixels": 784, "max_pixels": 7840}, (784, 7840)),
        ("video_preprocessor_config.json", {"size": {"shortest_edge": 784, "longest_edge": 7840}}, (784, 7840)),
        ("video_preprocessor_config.json", {"size": {"longest_edge": 7840}}, (7840, 7840)),
        ("processor_config.json", {"video_processor": {"size": {"longest_edge": 200_000}}}, (100_352, 200_000)),
        # transformers 4.52 to 4.57 wrote the released limits of images into it, which it never was told of frames.
        ("video_preprocessor_config.json", {"min_pixels": 3136, "max_pixels": 12_845_056}, (100_352, 602_112)),
    ],
)
def test_limits_of_the_frames_of_a_checkpoint(tmp_path, name, content, limits):
    write_checkpoint(tmp_path)
    if name:
        (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
    options = Processor.from_pretrained(tmp_path).options
    assert (options.video_min_pixels, options.video_max_pixels) == limits
    given = Processor.from_pretrained(tmp_path, video_max_pixels=50_176).options
    assert (given.video_min_pixels, given.video_max_pixels) == (min(limits[0], 50_176), 50_176)


@pytest.mark.parametrize("name", ["preprocessor_config.json", "video_preprocessor_config.json"])
@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "wants a JSON object of settings, got list"),
        ('{"patch_size": 16}', "patch_size is 16 for (image|video)s, but 14 in config.json"),
        ('{"merge_size": 1}', "merge_size is 1"),
        ('{"max_pixels": "many"}', "max_pixels wants a positive int, got 'many'"),
        ('{"size": {"shortest_edge": -1}}', "min_pixels wants a positive int, got -1"),
        ('{"size": 448}', "size wants an object, got 448"),
        ('{"image_mean": [0.5, 0.5, 0.5]}', "image_mean .* is not supported"),
        ('{"image_std": "x"}', "image_std .* is not supported"),
    ],
)
def test_damaged_preprocessor_config(tmp_path, name, content, match):
    write_checkpoint(tmp_path)
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError, match=match):
        Processor.from_pretrained(tmp_path)


def test_contradicting_or_missing_files(tmp_path):
    write_checkpoint(tmp_path, image_token_id=7)
    with pytest.raises(CheckpointError, match=r"image_token_id is 7 in config.json, but <\|image_pad\|> is 151655"):
        Processor.from_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        Processor.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        Processor.from_pretrained(tmp_path / "nowhere")


def same_processors(one, two):
    messages = user(
        {"text": "What is <|im_end|> né 12?"}, {"image": picture(300, 200)}, {"video": [picture(56, 84)] * 3}
    )
    ours, theirs = one(messages), two(messages)
    assert set(ours) == set(theirs) and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert (one.min_pixels, one.max_pixels) == (two.min_pixels, two.max_pixels)
    assert one.tokenizer.special_ids == two.tokenizer.special_ids


@pytest.mark.parametrize("elsewhere", [True, False])
def test_what_is_saved_loads_again(tmp_path, elsewhere):
    """Model and processor, into a new folder and over their own one; transformers reads the same limits and prompt."""
    source = write_random_checkpoint(tmp_path / "source")
    target = tmp_path / "target" if elsewhere else source
    limits = {"max_pixels": 30 * 784, "video_min_pixels": 7840, "video_max_pixels": 20 * 784}
    processor, model = Processor.from_pretrained(source, **limits), Qwen2VL.from_pretrained(source)
    model.save_pretrained(target)
    assert processor.save_pretrained(str(target)) == target
    again = Processor.from_pretrained(target)
    same_processors(processor, again)
    assert again.options == processor.options
    assert Qwen2VL.from_pretrained(target).config == model.config
    assert not [path.name for path in target.iterdir() if path.name.startswith(".")]

    limits = Qwen2VLImageProcessorPil.from_pretrained(target).size
    assert (limits["shortest_edge"], limits["longest_edge"]) == (3136, 30 * 784)
    # Its processor of videos, which reads the same names, wants torchvision.
    limits = json.loads((target / "video_preprocessor_config.json").read_text())["size"]
    assert limits == {"shortest_edge": 7840, "longest_edge": 20 * 784}
    peer = AutoTokenizer.from_pretrained(target)
    messages = [{"role": "user", "content": "What is this?"}]
    text = peer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert peer.encode(text) == again(messages)["input_ids"][0].tolist()

    # A second save changes nothing: saving is not a way to drift.
    files = {path.name: path.read_bytes() for path in target.iterdir()}
    again.save_pretrained(target)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == files


def test_saving_keeps_no_older_limits(tmp_path):
    """transformers 5 prefers processor_config.json, so what that says of images must not stay behind."""
    write_checkpoint(tmp_path)
    path = tmp_path / "processor_config.json"
    old = {"size": {"longest_edge": 7840}}
    path.write_text(json.dumps({"image_processor": old, "video_processor": old, "processor_class": "X"}))
    processor = Processor.from_pretrained(tmp_path, max_pixels=9408, video_max_pixels=8624)
    processor.save_pretrained(tmp_path)
    saved = json.loads(path.read_text())
    assert saved["image_processor"]["max_pixels"] == 9408 and saved["processor_class"] == "X"
    assert saved["video_processor"]["max_pixels"] == 8624
    assert Processor.from_pretrained(tmp_path).options == processor.options


def test_extra_tokens_of_a_tokenizer_are_saved(tmp_path):
    write_random_checkpoint(tmp_path / "a")
    processor = Processor.from_pretrained(tmp_path / "a")
    processor.tokenizer.backend.add_tokens(["<tool>"])
    processor.save_pretrained(tmp_path / "b")
    (tmp_path / "b" / "config.json").write_bytes((tmp_path / "a" / "config.json").read_bytes())
    again = Processor.from_pretrained(tmp_path / "b")
    assert again.tokenizer.encode_plain("a <tool>") == processor.tokenizer.encode_plain("a <tool>")
    assert AutoTokenizer.from_pretrained(tmp_path / "b").encode("<tool>") == again.tokenizer.encode_plain("<tool>")
    assert "<tool>" not in again.tokenizer.special_ids
