"""Rows appended for the matrix products' sake: chosen where they help, and without influence on anything."""

import numpy as np
import pytest
import torch

from benchmarks.random_checkpoint import small_config, write_random_checkpoint
from qwen2vl import Processor, Qwen2VL
from qwen2vl.cache import KVCache
from qwen2vl.layers import idle_rows


def test_where_they_are_appended():
    sizes = {(300, torch.bfloat16): 4, (304, torch.float16): 0, (255, torch.bfloat16): 0, (301, torch.float32): 0}
    for (rows, dtype), expected in sizes.items():
        assert idle_rows(torch.zeros(rows, 2, dtype=dtype)) == expected
    assert idle_rows(torch.zeros(301, 2, dtype=torch.bfloat16, device="meta")) == 0


@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
def test_they_change_nothing(grad, tmp_path, monkeypatch):
    """float32 with 4 idle rows everywhere: features, logits, cache and gradients of a call without any."""
    folder = write_random_checkpoint(tmp_path, small_config(False), dtype=torch.float32, std=0.08)
    model = Qwen2VL.from_pretrained(folder, device="cpu")
    image = np.random.default_rng(0).integers(0, 256, (56, 84, 3), dtype=np.uint8)
    messages = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "Hi"}]}]
    inputs = Processor.from_pretrained(folder)([messages, [{"role": "user", "content": "Only text, and longer."}]])

    def run():
        model.zero_grad()
        cache = None
        if not grad:
            cache = KVCache(model.config.text, 2, 80, device=model.device, dtype=model.dtype)
            cache.k.zero_(), cache.v.zero_()
        with torch.set_grad_enabled(grad):
            logits = model(**inputs, cache=cache)
        if cache is None:
            logits.square().sum().backward()
            return [logits.detach(), *(p.grad.clone() for p in model.parameters())]
        with torch.no_grad():
            step = model(torch.tensor([[5], [6]]), cache=cache)
        return [logits, step, cache.k, cache.v]

    expected = run()
    seen = []
    for module in ("vision", "text"):
        monkeypatch.setattr(f"qwen2vl.{module}.idle_rows", lambda x: seen.append(x.shape[0]) or 4)
    got = run()
    assert len(seen) == 2, "tower and decoder, not the decoding step"
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6 * max(1.0, b.abs().max().item()))
