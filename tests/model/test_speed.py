"""The speed of an answer beside that of a copy."""

import pytest
import torch

from qwen2vl import GenerationConfig, generate, speed
from qwen2vl.speed import copy_rate, decoding, step_bytes


def test_a_step_reads_the_decoder_the_head_and_the_cache(model):
    text = model.config.text
    decoder = sum(p.numel() for n, p in model.named_parameters() if n.startswith(("model.layers.", "model.norm.")))
    head = text.vocab_size * text.hidden_size
    assert step_bytes(model, 0) == 4 * (decoder + head)
    a_token = 2 * 4 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim
    assert step_bytes(model, 10, rows=3) - step_bytes(model, 0) == 30 * a_token


def test_a_copy_reads_and_writes(monkeypatch):
    monkeypatch.setitem(speed._COPIED, "cpu", 1 << 20)
    rate = copy_rate(torch.device("cpu"))
    assert 1e8 < rate < 1e13


def test_what_is_told_of_an_answer(model, processor, monkeypatch):
    monkeypatch.setattr("qwen2vl.speed.copy_rate", lambda device: 1e9)
    inputs = processor([[{"role": "user", "content": text}] for text in ("Say.", "Say it.")])
    config = GenerationConfig(max_new_tokens=5, eos_token_ids=(999,))
    result = generate(model, inputs, tokenizer=processor.tokenizer, config=config)
    told = decoding(model, result)
    seconds = result.timings["decode"]
    assert told["tokens_per_s"] == pytest.approx(8 / seconds)
    seen = sum(result.prompt_tokens) / 2 + 2
    assert told["step_bytes"] == round(step_bytes(model, seen, 2)) and told["copy_bytes_per_s"] == 1e9
    assert told["share_of_copy"] == pytest.approx(step_bytes(model, seen, 2) * 4 / seconds / 1e9)
    one = generate(model, inputs, config=GenerationConfig(max_new_tokens=1))
    assert decoding(model, one) == {}
