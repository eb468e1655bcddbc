"""torch.compile over a vision block and a decoder layer: one graph, the eager results, with and without autograd."""

import pytest
import torch

from benchmarks.random_checkpoint import small_config
from qwen2vl import Qwen2VL
from qwen2vl.cache import KVCache
from qwen2vl.text import Pack
from qwen2vl.vision import Pack as VisionPack
from qwen2vl_kernels import plan_tiles, use_backend
from tests.conftest import triton_where_it_serves

CU = torch.tensor([0, 8, 20], dtype=torch.int32)


@pytest.fixture(scope="module")
def model():
    return Qwen2VL.from_config(small_config(), device="cpu", dtype="float32", std=0.1)


@pytest.fixture(params=["default", "triton"], autouse=True)
def _backends(request):
    with use_backend(**(triton_where_it_serves() if request.param == "triton" else {})):
        yield


def _whole_graph(module):
    torch._dynamo.reset()
    return torch.compile(module, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
def test_vision_block(model, grad):
    block, x, (cos, sin) = model.visual.blocks[0], torch.randn(20, 160), torch.randn(2, 20, 40).unbind()
    pack = VisionPack((cos, sin), CU, 12, plan_tiles(CU, 20))
    with torch.set_grad_enabled(grad):
        expected, got = block(x, None, pack), _whole_graph(block)(x, None, pack)
    torch.testing.assert_close(got, expected)
    assert got[0].requires_grad == grad


@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
def test_decoder_layer(model, grad):
    layer, x = model.model.layers[0], torch.randn(20, 256)
    pack = Pack(torch.arange(60).view(3, 20), model.model.inv_freq(model.device), [8, 12], CU, tiles=plan_tiles(CU, 20))
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(_whole_graph(layer)(x, None, pack), layer(x, None, pack))


def test_decoder_layer_with_a_cache(model):
    """Prefill and a decoding step: what is returned and what is written to the cache."""
    layer = model.model.layers[0]
    caches = [KVCache(model.config.text, 1, 30, device=model.device, dtype=model.dtype) for _ in range(2)]
    with torch.no_grad():
        for new in (20, 1):
            x = torch.randn(new, 256)
            outputs = []
            for cache, run in zip(caches, (layer, _whole_graph(layer)), strict=True):
                total = [cache.lengths[0] + new]
                cu = torch.tensor([0, new], dtype=torch.int32)
                inv_freq = model.model.inv_freq(model.device)
                positions = torch.arange(new).expand(3, -1) + cache.lengths[0]
                outputs.append(run(x, None, Pack(positions, inv_freq, [new], cu, cache, cache.slots([new]), total)))
                cache.commit([new], cache.next_position)
            torch.testing.assert_close(outputs[1], outputs[0])
            stored = [cache.k[0, 0, : cache.lengths[0]] for cache in caches]
            torch.testing.assert_close(stored[1], stored[0])
