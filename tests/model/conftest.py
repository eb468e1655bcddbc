"""A small float32 checkpoint and what loads from it, once for each file; a file with other needs overrides it."""

import pytest
import torch

from benchmarks.random_checkpoint import small_config, write_random_checkpoint
from qwen2vl import Processor, Qwen2VL


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Weights large enough that greedy answers wander instead of repeating one token, and a head of its own."""
    folder = tmp_path_factory.mktemp("checkpoint")
    return write_random_checkpoint(folder, small_config(tie_word_embeddings=False), dtype=torch.float32, std=0.08)


@pytest.fixture(scope="module")
def model(folder):
    return Qwen2VL.from_pretrained(folder, device="cpu")


@pytest.fixture(scope="module")
def processor(folder):
    return Processor.from_pretrained(folder)
