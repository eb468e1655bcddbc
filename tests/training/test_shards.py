"""Shards that are forged or damaged: what they say of themselves is not believed, and costs what they are large."""

import tarfile
import tracemalloc

import pytest

from qwen2vl.errors import DataError
from qwen2vl.training.data import build_dataset
from qwen2vl.training.data.shards import Shards
from tests.training.data_files import chat, make_processor, numbers, write_tar

BLOCK = tarfile.BLOCKSIZE
SIZES = {"2**40": 2**40, "2**70": 2**70, "-1": -1, "-512": -512, "-1024": -1024, "-2**70": -(2**70)}


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return make_processor(tmp_path_factory.mktemp("processor"))


def header(name: str, size: int, kind: bytes = b"0", tail: bytes = b"") -> bytes:
    """A header of 512 bytes with any size, ``tail`` at byte 386, where old sparse headers have their map."""
    info = tarfile.TarInfo(name)
    info.type = kind
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT)[-BLOCK:])
    binary = (size % 2**96 | 1 << 95).to_bytes(12, "big")  # as GNU tar has it
    block[124:136] = f"{size:011o}\0".encode() if 0 <= size < 8**11 else binary
    block[386 : 386 + len(tail)] = tail
    block[148:156] = b" " * 8
    block[148:156] = f"{sum(block):06o}\0 ".encode()
    return bytes(block)


def block(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


def pax(key: str, value: object) -> bytes:
    record = f" {key}={value}\n"
    length = len(record) + 2
    record = f"{length + (length > 99)}{record}".encode()
    return header("pax", len(record), b"x") + block(record)


FORGED = {f"size {name}": header("3.json", size) + bytes(2 * BLOCK) for name, size in SIZES.items()}
FORGED |= {f"long name {name}": header("l", size, b"L") + bytes(2 * BLOCK) for name, size in SIZES.items()}
FORGED |= {f"pax header {name}": header("p", size, b"x") + bytes(2 * BLOCK) for name, size in SIZES.items()}
FORGED |= {
    f"pax size {name}": pax("size", size) + header("3.json", 3) + bytes(3 * BLOCK) for name, size in SIZES.items()
}
FORGED |= {
    "long names of long names": (header("l", 4, b"L") + block(b"3.j\0")) * 5000,
    "long name of 1 MiB": header("l", 2**20, b"L") + bytes(2**20) + header("3.json", 3) + bytes(BLOCK),
    "pax entries without end": header("p", BLOCK, b"x") + b"1" * BLOCK + header("3.json", 3) + bytes(BLOCK),
    "a header of noise": b"\x7f" * BLOCK + header("3.json", 3) + bytes(BLOCK),
    "half a header": header("3.json", 3)[:100],
    "half a member": header("3.json", 1000) + b"{" * 200,
    "sparse, old": header("3.json", 0, b"S", b"00000000000\0" * 8 + b"\0" + b"00120000000000\0"[-12:]) + bytes(BLOCK),
    "sparse, of pax": pax("GNU.sparse.size", 10 * 2**30) + header("3.json", 3) + bytes(BLOCK),
    "sparse, of pax 1.0": pax("GNU.sparse.major", 1) + header("3.json", 3) + bytes(BLOCK),
}


@pytest.mark.parametrize("kind", FORGED)
def test_what_is_forged_is_a_bad_sample(processor, tmp_path, kind):
    good = write_tar(tmp_path / "a.tar", [("1.json", chat(1)), ("2.json", chat(2))]).read_bytes()
    with tarfile.open(tmp_path / "a.tar") as archive:
        end = [m.offset_data + m.size for m in archive][-1]
    path = tmp_path / "b.tar"
    path.write_bytes(block(good[:end]) + FORGED[kind])
    tracemalloc.start()
    try:
        raws = [raw for raw, _ in Shards([str(path)]).read(0, 1, 1, {})]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 << 20, "bytes"
    assert len(raws) in (2, 3) and all(len(raw.error) < 400 for raw in raws)
    entry = {"path": str(path), "format": "webdataset", "shuffle": False}
    data = build_dataset([entry], processor, max_tokens=99, epochs=1, max_bad=1)
    assert numbers(processor, data) in ([1], [1, 2]) and data.report.bad == 1
    with pytest.raises(DataError, match=r"b\.tar"):
        list(build_dataset([entry], processor, max_tokens=99, epochs=1, max_bad=0))


def test_a_member_of_10_gib_is_not_read(processor, tmp_path):
    """The file has holes, so that it is there and takes no place."""
    path = tmp_path / "a.tar"
    with path.open("wb") as file:
        file.write(header("1.mp4", 10 * 2**30))
        file.truncate(BLOCK + 10 * 2**30 + 2 * BLOCK)
    entry = {"path": str(path), "format": "webdataset"}
    data = build_dataset([entry], processor, max_tokens=99, epochs=1)
    assert not list(data) and "has 10737418240 bytes, more than max_sample_bytes, 2147483648" in data.report.summary()
    small = write_tar(tmp_path / "b.tar", [("1.json", chat(1))])
    for limit, found in ((50, []), (1000, [1])):
        entry = {"path": str(small), "format": "webdataset", "max_sample_bytes": limit}
        assert numbers(processor, build_dataset([entry], processor, max_tokens=99, epochs=1)) == found
    with pytest.raises(DataError, match=r"data\[0\]\.max_sample_bytes: wants an int of at least 1, got 0"):
        build_dataset([{**entry, "max_sample_bytes": 0}], processor, max_tokens=99)


def test_a_shard_without_its_end_is_whole(processor, tmp_path):
    """Two empty blocks end an archive, and not all that write one write them."""
    path = write_tar(tmp_path / "a.tar", [("1.json", chat(1))])
    data = path.read_bytes()
    path.write_bytes(data[: 2 * BLOCK])
    entry = {"path": str(path), "format": "webdataset"}
    assert numbers(processor, build_dataset([entry], processor, max_tokens=99, epochs=1, max_bad=0)) == [1]
