"""``use_backend("eager")`` is the reference model: the formulas alone, in prefill, decoding and a resumed chunk."""

import pytest
import torch

from qwen2vl import GenerationConfig, Qwen2VL, generate
from qwen2vl.demo.checkpoint import small_config
from qwen2vl_kernels import use_backend
from qwen2vl_kernels.ops import kvcache_attention, varlen_attention


@pytest.fixture(scope="module")
def model():
    return Qwen2VL.from_config(small_config(), device="cpu", dtype="float32", std=0.1)


def test_eager_runs_the_references_only(model, monkeypatch):
    inputs = {"input_ids": torch.randint(0, 400, (2, 30))}
    config = GenerationConfig(max_new_tokens=12, eos_token_ids=(10**6,))
    expected = generate(model, inputs, config=config).sequences

    def refuse(*_arguments, **_options):
        pytest.fail("a fused attention ran under use_backend('eager')")

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", refuse)
    with use_backend("eager"):
        assert generate(model, inputs, config=config).sequences == expected
    with pytest.raises(pytest.fail.Exception):
        generate(model, inputs, config=config)  # without the switch it would have been used


@pytest.mark.parametrize("module", [varlen_attention, kvcache_attention], ids=lambda m: m.__name__.split(".")[-1])
def test_every_table_entry_has_an_implementation(module):
    from qwen2vl_kernels._backend import PREFERENCE

    table = PREFERENCE[module.__name__.split(".")[-1]]
    assert {name for row in table.values() for name in row} == set(module._BACKENDS)
