"""The tokens of images and videos are counted per item, conversation and call, before there is room for any."""

import numpy as np
import pytest
from PIL import ImageFile

from benchmarks.byte_tokenizer import write_byte_tokenizer
from qwen2vl.errors import MediaError, PromptError
from qwen2vl.media.options import Limits
from qwen2vl.prompt.processor import Processor
from qwen2vl.prompt.tokenizer import IMAGE_PAD, Tokenizer
from tests.media.media_fixtures import png_with_header, video_bytes


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_byte_tokenizer(folder, released_ids=True)
    return Tokenizer.from_pretrained(folder)


def picture(tokens):
    return {"image": np.zeros((28, 28 * tokens, 3), np.uint8), "min_pixels": 28 * 28}


def user(*content):
    return [{"role": "user", "content": list(content)}]


def test_an_item_does_not_raise_the_limit_of_items(tokenizer, monkeypatch):
    def load(image):
        raise AssertionError("pixels are decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    item = {"image": png_with_header(56, 56), "min_pixels": 1_400_000_000}
    assert len(item["image"]) < 84
    processor = Processor(tokenizer)
    wanted = r"^messages\[0\]\.content\[0\]: .*would be \d+ tokens, more than max_item_tokens = 32768"
    for call in (processor, processor.supervised):
        with pytest.raises(MediaError, match=wanted):
            call(user(item))
    with pytest.raises(MediaError, match="more than max_item_tokens = 32768"):
        processor(user({"image": item["image"]}), min_pixels=1_400_000_000)
    with pytest.raises(MediaError, match="more than max_item_tokens = 32768"):
        processor.supervised_document([item])


def test_conversations_and_calls_have_limits(tokenizer):
    processor = Processor(tokenizer, limits=Limits(max_item_tokens=20, max_prompt_tokens=40, max_call_tokens=100))
    assert processor(user(picture(20), picture(20)))["input_ids"].eq(tokenizer.id(IMAGE_PAD)).sum() == 40
    assert len(processor([user(picture(20), picture(20))] * 2)["input_ids"]) == 2
    with pytest.raises(MediaError, match="would be 21 tokens, more than max_item_tokens = 20"):
        processor(user(picture(21)))
    with pytest.raises(PromptError, match="videos of conversation 1 would be more than max_prompt_tokens = 40 tokens"):
        processor([user(picture(20)), user(picture(20), picture(20), picture(1))])
    with pytest.raises(PromptError, match="videos of this call would be more than max_call_tokens = 100 tokens"):
        processor([user(picture(20), picture(20))] * 2 + [user(picture(20), picture(1))])
    frames = [np.zeros((28, 28 * 10, 3), np.uint8)] * 4
    clip = {"video": frames, "min_pixels": 28 * 28, "max_pixels": 28 * 280}
    with pytest.raises(PromptError, match="max_prompt_tokens = 40"):
        processor(user(clip, clip, picture(1)))


def test_the_time_of_a_video_is_the_operators(tokenizer):
    clip = video_bytes([np.zeros((56, 56, 3), np.uint8)] * 4)
    processor = Processor(tokenizer, limits=Limits(video_timeout=1e-6))
    with pytest.raises(MediaError, match=r"^messages\[0\]\.content\[0\]: .*within video_timeout = 1e-06 s"):
        processor(user({"video": clip}))
