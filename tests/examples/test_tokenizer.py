"""The small model's tokenizer: the same every time, small, loses nothing, and spells what is read."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from examples.small.tokenizer import LANGUAGES, chosen_merges, write_tokenizer
from qwen2vl.prompt.tokenizer import CONTROL_TOKENS, Tokenizer
from qwen2vl.samples import SKILLS, generate
from qwen2vl.samples.questions import QUESTIONS
from qwen2vl.samples.vocabulary import ALPHABET, ENGLISH

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
    assert sorted(vocabulary.values()) == list(range(len(vocabulary))) and len(vocabulary) < 1000
    first = len(vocabulary) - len(CONTROL_TOKENS)
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
        for form in (form for language in LANGUAGES for form in wordings[language]):
            assert len(tokenizer.encode_plain(form)) <= 18, form


def test_words_of_questions_are_tokens(tokenizer):
    for word in (" red", " circle", " written", "红", "形", "system", "user", "assistant", ' {"', "),("):
        assert len(tokenizer.encode_plain(word)) == 1, word


@pytest.mark.parametrize("around", ["{}", 'Find the text "{}".', "找出文字“{}”。"])
def test_what_is_read_is_spelled_wherever_it_stands(tokenizer, around):
    """Character by character, so that every picture of a character has one name; see the module for ss, sy and us."""
    before, after = (tokenizer.encode_plain(part) for part in around.split("{}"))
    pairs = [a + b for a in ALPHABET for b in ALPHABET]
    words = [word.upper() for word in ENGLISH] + [w for w in ENGLISH if not any(p in w for p in ("ss", "sy", "us"))]
    for text in (*pairs, *words):
        ids = tokenizer.encode_plain(around.replace("{}", text))
        assert [tokenizer.decode([one]) for one in ids[len(before) : len(ids) - len(after)]] == list(text)


def test_equal_calls_write_equal_bytes(folder, tmp_path):
    """In another process with other hashes."""
    code = f"from examples.small.tokenizer import write_tokenizer; write_tokenizer({str(tmp_path / 'other')!r})"
    env = {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, check=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "other" / name).read_bytes() == (folder / name).read_bytes()


def test_merges_begin_with_no_letter_and_no_digit():
    assert chosen_merges(["at the 12", "to the"]) == ["Ġ t", "Ġt h", "Ġth e"]
    assert chosen_merges(["ab12"]) == []
    assert chosen_merges(["红"]) == ["ç º", "çº ¢"]
