"""Order, shares of ranks and workers, resuming, mixing, and files that are damaged."""

import functools
import http.server
import json
import threading
from collections import Counter
from itertools import islice

import pytest
import torch
from torch.utils.data import DataLoader

from qwen2vl.errors import DataError
from qwen2vl.prompt.processor import Processor
from qwen2vl.training.data import build_dataset
from tests.training.data_files import chat, make_processor, numbers, write_jsonl, write_tar


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return make_processor(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def entries(tmp_path_factory):
    """The same 13 numbers as lines, as an array and in three shards, with a bad record in each."""
    folder = tmp_path_factory.mktemp("data")
    records = [chat(n) for n in range(13)]
    write_jsonl(folder / "lines.jsonl", [*records[:5], "{", "", *records[5:]])
    (folder / "array.json").write_text(json.dumps([*records[:5], 3, *records[5:]], indent=1), encoding="utf-8")
    for shard, part in enumerate((records[:6], records[6:7], records[7:])):
        members = [(f"{shard}{n}.json", record) for n, record in enumerate(part)]
        write_tar(folder / f"s-{shard:02}.tar", [*members, *([("bad.json", "{")] if shard == 1 else [])])
    return {
        "lines": {"path": str(folder / "lines.jsonl"), "format": "conversations"},
        "array": {"path": str(folder / "array.json"), "format": "conversations"},
        "shards": {"path": str(folder / "s-{00..02}.tar"), "format": "webdataset"},
    }


KINDS = ("lines", "array", "shards")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", [1, 2, 5])
def test_ranks_share_an_epoch_completely_and_disjointly(processor, entries, kind, world):
    parts = [
        build_dataset([entries[kind]], processor, seed=3, rank=r, world=world, max_tokens=99, epochs=1)
        for r in range(world)
    ]
    found = [number for part in parts for number in numbers(processor, part)]
    assert sorted(found) == list(range(13))
    assert sum(part.report.bad for part in parts) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_resuming_equals_going_on(processor, entries, kind):
    """From every place, over the end of epochs, with threads and without, through JSON."""

    def make(threads=0):
        two = [entries[kind], {**entries["lines"], "shuffle": False, "weight": 0.5}]
        return build_dataset(two, processor, seed=5, max_tokens=99, threads=threads)

    whole = numbers(processor, islice(make(), 60))
    assert numbers(processor, islice(make(2), 60)) == whole
    for cut in (0, 1, 7, 20, 43):
        data = make(2)
        stream = iter(data)
        assert numbers(processor, islice(stream, cut)) == whole[:cut]
        state = json.loads(json.dumps(data.state_dict()))
        again = make()
        again.load_state_dict(state)
        assert again.report.used == cut
        assert numbers(processor, islice(again, 60 - cut)) == whole[cut:]


def test_orders_differ_by_epoch_and_seed_and_repeat(processor, entries):
    def first(count, **options):
        return numbers(processor, islice(build_dataset([entries["lines"]], processor, max_tokens=99, **options), count))

    two = first(26, seed=1)
    assert sorted(two[:13]) == sorted(two[13:]) == list(range(13)) and two[:13] != two[13:]
    assert first(26, seed=1) == two and first(26, seed=2) != two


def test_a_position_counts_once_however_often_it_comes(processor, tmp_path):
    """Of every reason, over epochs and where a state is loaded in between."""
    bad = ["{broken", chat(1, image="absent.png"), chat("9" * 99)]
    bad[1]["conversations"][0]["value"] = "<image>Which?"
    write_jsonl(tmp_path / "few.jsonl", [chat(0), *bad])
    entry = {"path": str(tmp_path / "few.jsonl"), "format": "conversations"}
    data = build_dataset([entry], processor, max_tokens=99, max_bad=2)
    for _ in range(2):
        assert numbers(processor, islice(data, 10)) == [0] * 10
        assert data.report.skipped == {"malformed": 1, "media": 1, "too long": 1} and data.report.bad == 2
        assert [problem.source[-2:] for problem in sorted(data.report.problems, key=lambda p: p.source)] == [
            ":2", ":3", ":4",
        ]  # fmt: skip
        state = json.loads(json.dumps(data.state_dict()))
        data = build_dataset([entry], processor, max_tokens=99, max_bad=2)
        data.load_state_dict(state)
    summary = data.report.summary()
    assert summary.startswith("20 samples used, 1 skipped as malformed, 1 skipped as media, 1 skipped as too long\n")
    assert len(summary.splitlines()) == 4


@pytest.mark.parametrize("kind", ["lines", "array", "shards"])
@pytest.mark.parametrize("world", [1, 2, 4, 30])
def test_passes_are_counted(processor, entries, kind, world):
    """Of every consumer: after all records of 30 epochs were dealt out, 30; shards dealt out whole or not."""
    for rank in range(min(world, 5)):
        data = build_dataset(
            [entries[kind]], processor, max_tokens=99, max_bad=None, epochs=30, rank=rank, world=world, threads=0
        )
        assert data.epoch() == 0
        passed = []
        for _ in data:
            passed.append(data.epoch())
        assert passed == sorted(passed)
        assert passed[-1] == pytest.approx(30, abs=1.1 * max(1, world / 3 if kind == "shards" else world / 13)), passed
        assert data.epoch(json.loads(json.dumps(data.state_dict()))) == data.epoch() >= passed[-1]


def test_weights(processor, entries):
    tables = [{**entries["lines"], "weight": 3}, {**entries["array"], "weight": 1}]
    sources = [e.source for e in islice(build_dataset(tables, processor, max_tokens=99), 40)]
    for n in (8, 20, 40):
        assert abs(sum("lines" in source for source in sources[:n]) - 0.75 * n) <= 3  # two of 28 records are bad
    finite = build_dataset(tables, processor, max_tokens=99, epochs=1)
    assert Counter(numbers(processor, finite)) == {n: 2 for n in range(13)}


def test_workers_of_a_loader_share_too(processor, entries):
    data = build_dataset([entries["lines"]], processor, max_tokens=99, epochs=1)
    found = list(DataLoader(data, batch_size=None, num_workers=2))
    assert sorted(numbers(processor, found)) == list(range(13))
    assert all(isinstance(example.input_ids, torch.Tensor) for example in found)


def test_states_of_something_else(processor, entries):
    data = build_dataset([entries["lines"]], processor, max_tokens=99)
    next(iter(data))
    state = data.state_dict()
    for change, match in (({"seed": 1}, r"state\.seed"), ({"world": 2}, r"state\.part")):
        with pytest.raises(DataError, match=match):
            build_dataset([entries["lines"]], processor, max_tokens=99, **change).load_state_dict(state)
    with pytest.raises(DataError, match=r"state\.entries"):
        build_dataset([entries["array"]], processor, max_tokens=99).load_state_dict(state)


@pytest.mark.parametrize(
    ("table", "match"),
    [
        ({"format": "sharegpt"}, r"data\[0\]\.path: is missing"),
        ({"path": "x", "format": "csv"}, r"data\[0\]\.format: wants one of .* got 'csv'"),
        ({"path": "x", "format": "sharegpt", "wieght": 2}, r"data\[0\]: unknown key 'wieght'"),
        ({"path": "x", "format": "sharegpt", "weight": 0}, r"data\[0\]\.weight: wants a positive number"),
        ({"path": "x", "format": "sharegpt", "max_pixels": 1.5}, r"data\[0\]\.max_pixels: wants an int"),
        ({"path": "x", "format": "sharegpt", "agent": "nous"}, r"data\[0\]\.agent: wants one of"),
        ({"path": "/none/x.jsonl", "format": "sharegpt"}, r"/none/x\.jsonl: no such file"),
        ({"path": "s-{3..1}.tar", "format": "webdataset"}, r"runs backwards"),
        (3, r"data\[0\]: wants a table, got int"),
    ],
)
def test_tables_that_say_nothing_readable(processor, table, match):
    with pytest.raises(DataError, match=match):
        build_dataset([table], processor, max_tokens=99)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[1,\n2,\n}", r"a\.json:3: is no JSON array"),
        ("[1,\n2 3]", r"a\.json:2: is no JSON array: wants , or \]"),
        ("[1\n]\nx", r"a\.json:3: goes on behind its array"),
        ("[1,\n\udcff]", r"a\.json:2: is no UTF-8"),
        ("[]", "holds no record"),
        ("", "holds no record"),
    ],
)
def test_files_that_break_off(processor, tmp_path, text, match):
    (tmp_path / "a.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=match):
        build_dataset([{"path": str(tmp_path / "a.json"), "format": "conversations"}], processor, max_tokens=99)


def test_damaged_shards_and_limits(processor, tmp_path):
    good = write_tar(tmp_path / "a.tar", [("1.json", chat(1)), ("2.json", chat(2))])
    (tmp_path / "b.tar").write_bytes(good.read_bytes()[:560])
    (tmp_path / "c.tar").write_bytes(b"no tar at all" * 99)
    entry = {"path": str(tmp_path / "*.tar"), "format": "webdataset", "shuffle": False}
    data = build_dataset([entry], processor, max_tokens=99, epochs=1)
    assert numbers(processor, data) == [1, 2]
    assert data.report.skipped["media"] >= 2 and "c.tar: is in a damaged tar file" in data.report.summary()
    with pytest.raises(DataError, match=r"max_bad is 1"):
        list(build_dataset([entry], processor, max_tokens=99, epochs=1, max_bad=1))
    only = {**entry, "path": str(tmp_path / "c.tar")}
    with pytest.raises(DataError, match="1000 samples in a row could not be used"):
        next(iter(build_dataset([only], processor, max_tokens=99, max_bad=None)))


def test_shards_are_fetched_from_a_server_where_that_is_allowed(processor, tmp_path):
    """As from disk, one that the server lacks reported, and resumed in the middle of one."""
    for n in range(2):
        write_tar(tmp_path / f"s-{n}.tar", [(f"{i}.json", chat(10 * n + i)) for i in range(3)])
    handler = functools.partial(_Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}/s-{{0..2}}.tar"
        entry = {"path": address, "format": "webdataset", "shuffle": False}
        remote = Processor(processor.tokenizer, allow_remote=True)
        data = build_dataset([entry], remote, max_tokens=99, epochs=1)
        stream = iter(data)
        assert numbers(processor, [next(stream) for _ in range(4)]) == [0, 1, 2, 10]
        resumed = build_dataset([entry], remote, max_tokens=99, epochs=1)
        resumed.load_state_dict(data.state_dict())
        assert numbers(processor, stream) == numbers(processor, resumed) == [11, 12]
        assert data.report.skipped == {"media": 1} and "s-2.tar: " in data.report.summary()
        forbidden = build_dataset([entry], processor, max_tokens=99, epochs=1)
        assert not list(forbidden) and "allow_remote=True" in forbidden.report.summary()
        server.shutdown()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass
