"""The tokenizer of generated text: the same every time, small, and loses nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from examples.small.tokenizer import VOCABULARY, train_merges, write_tokenizer
from qwen2vl.prompt.tokenizer import CONTROL_TOKENS, Tokenizer
from qwen2vl.samples import SKILLS, generate
from qwen2vl.samples.questions import QUESTIONS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer.from_pretrained(folder)


def test_ids_are_without_holes_and_special_tokens_last(folder, tokenizer):
    vocabulary = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    assert sorted(vocabulary.values()) == list(range(VOCABULARY))
    first = VOCABULARY - len(CONTROL_TOKENS)
    assert tokenizer.special_ids == {name: first + n for n, name in enumerate(CONTROL_TOKENS)}


def test_released_layout(folder):
    assert sorted(path.name for path in folder.iterdir()) == [
        "chat_template.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


@pytest.mark.parametrize(
    "text", ["", "Read the text.", "红色圆形，向左。", "빨간색 원이", "دائرة حمراء", "Mẹ đỏ\n\n ", "🙂 \x00 a  b"]
)
def test_any_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode_plain(text)) == text


def test_generated_text_comes_back_in_few_tokens(tokenizer):
    for skill in SKILLS:
        for index in range(20):
            for turn in generate(skill, 3, seed=9, index=index).record["messages"]:
                ids = tokenizer.encode_plain(turn["content"])
                assert tokenizer.decode(ids) == turn["content"]
    for wordings in QUESTIONS.values():
        for forms in wordings.values():
            for form in forms:
                assert len(tokenizer.encode_plain(form)) <= 14, form


def test_words_of_questions_are_tokens_and_read_strings_are_not(tokenizer):
    for word in (" red", " circle", "红色", "圆形", "yes"):
        assert len(tokenizer.encode_plain(word)) == 1
    for text in ("X7Kq", "HRZD"):
        assert len(tokenizer.encode_plain(text)) == 4


def test_equal_calls_write_equal_bytes(folder, tmp_path):
    """In other processes, with threads and without."""
    for threads in ("false", "true"):
        code = f"from examples.small.tokenizer import write_tokenizer; write_tokenizer({str(tmp_path / threads)!r})"
        env = {"TOKENIZERS_PARALLELISM": threads, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7"}
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, check=True)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            assert (tmp_path / threads / name).read_bytes() == (folder / name).read_bytes()


def test_a_size_of_choice(tmp_path):
    ids = write_tokenizer(tmp_path, size=400)
    assert max(ids.values()) == 399 and len(Tokenizer.from_pretrained(tmp_path).encode_plain("how")) >= 1


def test_merges_are_of_the_commonest_pairs_first():
    merges = train_merges(["to the the the", "that that to"], 10)  # th 5 times, Ġth 4, Ġthe 3, at and to 2
    assert merges == ["t h", "Ġ th", "Ġth e", "a t", "t o"]
    assert train_merges(["to the the the", "that that to"], 2) == merges[:2]
    assert train_merges(["abc"], 10) == []  # every pair comes once
