"""What a prompt may cost, whatever its text, its tokenizer and its chat template hold."""

import pytest

from benchmarks.byte_tokenizer import write_byte_tokenizer
from qwen2vl.errors import PromptError
from qwen2vl.prompt.processor import Processor
from qwen2vl.prompt.tokenizer import MAX_CHARACTERS, Tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    write_byte_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def processor(folder):
    return Processor(Tokenizer.from_pretrained(folder))


class Untouchable:
    """A tokenizer that must not be reached."""

    def encode(self, *args, **options):
        raise AssertionError("text without bound reached the tokenizer")


def user(text):
    return [{"role": "user", "content": text}]


def test_long_text_is_refused_before_the_tokenizer_sees_it(folder, monkeypatch):
    processor = Processor(Tokenizer.from_pretrained(folder))
    monkeypatch.setattr(processor.tokenizer, "backend", Untouchable())
    long = " " * (MAX_CHARACTERS + 1)
    with pytest.raises(PromptError, match=f"max_characters = {MAX_CHARACTERS}, got {MAX_CHARACTERS + 1}"):
        processor.tokenizer.encode_plain(long)
    with pytest.raises(PromptError, match="messages: characters of text: wants at most"):
        processor(user(long))
    # Texts of a conversation count together, and before its pictures are opened.
    half = {"type": "text", "text": " " * (MAX_CHARACTERS // 2 + 1)}
    with pytest.raises(PromptError, match="characters of text"):
        processor(user([half, {"type": "image", "image": "no such file"}, half]))
    with pytest.raises(PromptError, match="characters of text"):
        processor.supervised_document([half, {"type": "image", "image": "no such file"}, half])


def test_the_limit_of_text_is_the_operators(folder):
    tokenizer = Tokenizer.from_pretrained(folder, max_characters=5)
    assert tokenizer.decode(tokenizer.encode_plain("abcde")) == "abcde"
    with pytest.raises(PromptError, match="max_characters = 5, got 6"):
        tokenizer.encode_plain("abcdef")
    for bad in (0, -1, 1.5, True, None):
        with pytest.raises(ValueError, match="max_characters: wants a positive int"):
            Tokenizer.from_pretrained(folder, max_characters=bad)


def test_a_prompt_of_thirty_thousand_tokens_is_taken(processor):
    assert processor(user("word " * 30_000))["input_ids"].shape[1] > 30_000


def test_a_panic_of_the_tokenizer_is_a_prompt_error(folder, monkeypatch):
    class PanicException(BaseException):  # as Rust code raises it
        pass

    class Panicking:
        def encode(self, *args, **options):
            raise PanicException("retry-limit-in-match over")

    tokenizer = Tokenizer.from_pretrained(folder)
    monkeypatch.setattr(tokenizer, "backend", Panicking())
    with pytest.raises(PromptError, match="cannot cope with these 3 characters: retry-limit"):
        tokenizer.encode_plain("abc")
