"""What a file of records may cost, and which files its records may name."""

import json
import re
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2vl.errors import DataError
from qwen2vl.training.data import json_files, read_examples
from qwen2vl.training.data.records import _in_order_of_calls, _tagged
from tests.steps import assert_linear
from tests.training.data_files import chat, make_processor, numbers


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return make_processor(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("empty", [b"\n", b"\r\n"])
def test_empty_lines_cost_no_memory(tmp_path, empty, monkeypatch):
    monkeypatch.setattr(json_files, "_CHUNK_BYTES", 1 << 16)
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b"{}\n" + empty * 1_000_000 + b"[]")
    tracemalloc.start()
    try:
        spans = json_files._index_lines(str(path))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    size = path.stat().st_size
    assert spans.tolist() == [[0, 2, 1], [size - 2, size, 1_000_002]]
    assert peak < 6 << 20  # some 60 times a chunk; one int64 a line would be 8 MB


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1 << 20])
def test_lines_are_found_whatever_the_chunks(tmp_path, chunk, monkeypatch):
    monkeypatch.setattr(json_files, "_CHUNK_BYTES", chunk)
    rng = np.random.default_rng(chunk)
    for _ in range(200):
        data = bytes(rng.choice(list(b"\n\n\r\raab"), rng.integers(0, 30)))
        path = tmp_path / "lines.jsonl"
        path.write_bytes(data)
        want, at = [], 0
        for n, line in enumerate(data.split(b"\n"), 1):
            if line not in (b"", b"\r"):
                want.append([at, at + len(line), n])
            at += len(line) + 1
        assert json_files._index_lines(str(path)).tolist() == want


def test_a_record_without_bound_is_a_bad_sample(tmp_path, processor, monkeypatch):
    monkeypatch.setattr(json_files, "MAX_RECORD", 1 << 20)
    path = tmp_path / "lines.jsonl"
    path.write_text(json.dumps(chat(1)) + "\n" + json.dumps(chat(2, id="x" * (1 << 20))) + "\n" + json.dumps(chat(3)))
    assert numbers(processor, read_examples(str(path), processor, max_bad=1)) == [1, 3]
    with pytest.raises(DataError, match=r"lines.jsonl:2: wants a record of at most 1 MB, got 10\d+ bytes"):
        list(read_examples(str(path), processor))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(["<image>", "<video>", "<img>", "</img>", "a", "\n", "<", "img>"]), max_size=25))
def test_tags_are_found_as_one_expression_would(pieces):
    text = "".join(pieces)
    split = re.split("(<image>|<video>|<img>.*?</img>)", text, flags=re.DOTALL)
    assert list(_tagged(text)) == [(n % 2 == 1, piece) for n, piece in enumerate(split) if piece]


def test_tags_without_an_end_are_one_pass():
    for text in ("<img>", "</img>", "<img><image>", "<img>a</img>"):
        assert_linear(lambda n, text=text: list(_tagged(text * n)), 100)


def test_results_find_their_calls_in_one_pass():
    class Id(str):
        compared = 0

        def __eq__(self, other):
            Id.compared += 1
            return str.__eq__(self, other)

        __hash__ = str.__hash__

    ids = [Id(n) for n in range(400)]
    run = [{"role": "call", "ids": ids}, *({"role": "result", "answers": Id(n)} for n in reversed(range(400)))]
    assert [turn["answers"] for turn in _in_order_of_calls(run)[1:]] == ids
    assert Id.compared <= 5000
