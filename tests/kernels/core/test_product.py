"""Linear layers on a CPU whose products of 16-bit numbers are slow."""

import pytest
import torch
import torch.nn.functional as F

from qwen2vl_kernels.core import matmul
from tests.conftest import assert_two_times


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=str)
def layer(request):
    generator = torch.Generator().manual_seed(0)
    shapes = ((40, 96), (72, 96), (72,))
    return [torch.randn(shape, generator=generator).to(request.param) for shape in shapes]


@pytest.mark.parametrize("shape", [(40,), (2, 20)], ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
def test_slow_products_are_made_in_float32_and_rounded_once(monkeypatch, layer, shape, with_bias):
    monkeypatch.setattr(matmul, "slow_on_cpu", lambda dtype: True)
    x, weight, bias = layer
    x, bias = x.view(*shape, 96), bias if with_bias else None
    with torch.no_grad():
        got = matmul.linear(x, weight, bias)
    wide = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    assert torch.equal(got, wide.to(x.dtype))
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert_two_times(got, F.linear(x, weight, bias), exact, 1e-6)


@pytest.mark.parametrize("why", ["fast", "few rows", "gradients"])
def test_others_are_pytorchs_own(monkeypatch, layer, why):
    monkeypatch.setattr(matmul, "slow_on_cpu", lambda dtype: why != "fast")
    monkeypatch.setattr(matmul, "_has_few_rows", lambda *given: False)  # which test_few_rows.py has
    x, weight, bias = layer
    x = x[:8] if why == "few rows" else x
    seen = []
    monkeypatch.setattr(F, "linear", lambda *given: seen.append(given) or x)
    with torch.set_grad_enabled(why == "gradients"):
        matmul.linear(x, weight, bias)
    assert [given[0].dtype for given in seen] == [x.dtype] and seen[0][1] is weight


def test_float32_is_never_slow():
    assert not matmul.slow_on_cpu(torch.float32)
