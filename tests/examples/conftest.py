"""The small model's beginning, of random weights, and its processor."""

import pytest

from examples.small.plan import SEED
from examples.small.shape import write_beginning
from qwen2vl.prompt.processor import Processor


@pytest.fixture(scope="module")
def beginning(tmp_path_factory):
    folder = tmp_path_factory.mktemp("beginning")
    write_beginning(folder, seed=SEED)
    return folder


@pytest.fixture(scope="module")
def processor(beginning):
    return Processor.from_pretrained(beginning)
