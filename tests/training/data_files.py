"""Data files written on the spot, and a processor for them."""

import io
import json
import tarfile

import numpy as np
from PIL import Image

from benchmarks.byte_tokenizer import write_byte_tokenizer
from qwen2vl.prompt.processor import Processor
from qwen2vl.prompt.tokenizer import Tokenizer


def make_processor(folder):
    write_byte_tokenizer(folder)
    return Processor(Tokenizer.from_pretrained(folder))


def png(width=56, height=56, value=0):
    file = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), value, np.uint8)).save(file, "PNG")
    return file.getvalue()


def write_jsonl(path, records):
    """Records are dicts, or text or bytes to stand on a line as they are."""
    lines = [record if isinstance(record, (str, bytes)) else json.dumps(record) for record in records]
    path.write_bytes(b"".join((line.encode() if isinstance(line, str) else line) + b"\n" for line in lines))
    return path


def write_tar(path, members):
    """Members are (name, bytes, str or something to write as JSON)."""
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            if not isinstance(data, bytes):
                data = (data if isinstance(data, str) else json.dumps(data)).encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def chat(number, **more):
    """A conversation that carries a number."""
    turns = [{"from": "human", "value": "Which?"}, {"from": "gpt", "value": f"number {number}"}]
    return {"conversations": turns, **more}


def taught(processor, example):
    """The text that an example teaches."""
    kept = example.input_ids[example.labels != -100]
    assert (example.labels[example.labels != -100] == kept).all()
    return processor.decode(kept, skip_special_tokens=False)


def numbers(processor, examples):
    return [int("".join(taught(processor, e).removesuffix("<|im_end|>").split()[-1:])) for e in examples]
