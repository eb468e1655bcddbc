"""The texts of errors: bounded and printable, whatever they quote."""

import pickle

import pytest

from qwen2vl import errors
from qwen2vl.errors import MAX_MESSAGE, DataError, PromptError, Qwen2VLError, readable
from qwen2vl.prompt.chatml import render

CLASSES = [one for one in vars(errors).values() if isinstance(one, type) and issubclass(one, Qwen2VLError)]
RUDE = "a\x1b[2J\x07\r\x00\x7f\x9b\u202eb\ud800"


@pytest.mark.parametrize("kind", CLASSES)
def test_every_error_is_bounded_and_printable(kind):
    assert str(kind("shard of 3:\n\ttensor é 字 😀")) == "shard of 3:\n\ttensor é 字 😀"
    error = kind(RUDE)
    assert str(error).isprintable() and str(error).startswith("a\\x1b[2J\\x07\\r") and "b\\ud800" in str(error)
    long = kind("begin " + "x" * 50_000_000 + " end")
    assert len(str(long)) <= MAX_MESSAGE
    assert str(long).startswith("begin x") and str(long).endswith("x end") and "characters" in str(long)
    for one in (error, long):
        again = pickle.loads(pickle.dumps(one))
        assert type(again) is kind and str(again) == str(one)
        assert str(kind(f"place: {one}")) == f"place: {one}"  # what was shortened is not shortened again


def test_a_sample_keeps_its_place_in_a_long_text():
    error = DataError("x" * 1_000_000, "shard.tar:" + "y\x1b" * 1_000_000)
    assert str(error).startswith("shard.tar:y\\x1b") and str(error).startswith(error.source)
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.source) == (str(error), error.source)


@pytest.mark.parametrize(
    "message", [{"role": "x" * 50_000_000}, {"role": "user", "content": "a", "y" * 50_000_000: 1}, {"role": RUDE}]
)
def test_messages_of_any_size_give_a_short_error(message):
    with pytest.raises(PromptError, match="messages") as caught:
        render([message])
    assert len(str(caught.value)) <= MAX_MESSAGE and str(caught.value).isprintable()


def test_what_is_readable_stays_as_it_is():
    for text in ("", "é\n\t字", "x" * MAX_MESSAGE):
        assert readable(text) == text
