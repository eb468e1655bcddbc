"""The Triton ops captured in a CUDA graph once, replayed on other contents and padding."""

from __future__ import annotations

import pytest
import torch

import qwen2vl_kernels as K
from qwen2vl_kernels.core.backends import unavailable

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device"),
    pytest.mark.skipif(unavailable("triton", "cuda") is not None, reason=f"triton: {unavailable('triton', 'cuda')}"),
]

SECTION = (16, 24, 24)


def _layer(x, residual, q, k, v, positions, inv_freq, caches, slots, weight, gate):
    """What surrounds the matrix products and the attention of a decoder layer, in the order of one."""
    normed, total = K.add_rms_norm(x, residual, weight, backend="triton")
    given = {"positions": positions, "inv_freq": inv_freq, "section": SECTION, "overwrite_k": True}
    K.append_kv(k, v, *caches, slots, q=q, **given, backend="triton")
    return normed, total, K.swiglu(gate, normed, backend="triton"), K.quick_gelu(total, weight, backend="triton")


def test_a_decoder_layer():
    tokens, columns = 24, 256
    generator = torch.Generator("cuda").manual_seed(0)

    def fill(*shape):
        return torch.randn(shape, generator=generator, device="cuda").bfloat16()

    shapes = [(tokens, columns), (tokens, columns), (tokens, 3, 128), (tokens, 2, 128), (tokens, 2, 128)]
    tensors = [fill(*shape) for shape in shapes]
    positions = torch.randint(0, 999, (3, tokens), device="cuda")
    inv_freq, weight = torch.rand(64, device="cuda"), fill(columns)
    caches = [torch.zeros(4, 16, 2, 128, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    slots, gate = torch.arange(tokens, device="cuda"), fill(tokens, columns)
    static = (*tensors, positions, inv_freq, caches, slots, weight, gate)
    _layer(*static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _layer(*static)
    for round in range(3):
        fresh = [fill(*shape) for shape in shapes]
        for target, source in zip(tensors, fresh, strict=True):
            target.copy_(source)
        positions.copy_(torch.randint(0, 999, (3, tokens), device="cuda"))
        slots.copy_(torch.randperm(64, device="cuda")[:tokens])
        slots[tokens - 5 * round :] = -1  # padding
        for cache in caches:
            cache.zero_()
        graph.replay()
        got = [t.clone() for t in (*captured, *tensors, *caches)]
        for cache in caches:
            cache.zero_()
        again = _layer(*fresh, positions, inv_freq, caches, slots, weight, gate)
        for one, two in zip(got, (*again, *fresh, *caches), strict=True):
            assert torch.equal(one, two)


def test_decoding_while_rows_grow():
    """Lengths change from replay to replay, to those of empty and of full rows."""
    q = torch.randn(4, 12, 128, device="cuda").bfloat16()
    caches = [torch.randn(4, 9000, 2, 128, device="cuda").bfloat16() for _ in range(2)]
    lengths = torch.ones(4, dtype=torch.int32, device="cuda")

    def run():
        return K.kvcache_attention(q, *caches, None, lengths, backend="triton")

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for values in ([1, 64, 65, 4097], [0, 9000, 8999, 1]):
        lengths.copy_(torch.tensor(values))
        q.copy_(torch.randn(q.shape))
        graph.replay()
        got = captured.clone()
        assert torch.equal(got, run())
        want = K.kvcache_attention(q.double(), *(x.double() for x in caches), None, lengths, backend="eager")
        torch.testing.assert_close(got.double(), want, rtol=0.02, atol=0.01)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("backend", ["triton", "chunked"])
def test_the_loss_and_its_gradients(backend, reduction):
    """Nothing waits for how many rows count, which changes from replay to replay."""
    hidden = torch.randn(300, 64, device="cuda").bfloat16().requires_grad_()
    weight = torch.randn(1000, 64, device="cuda").bfloat16().requires_grad_()
    target = torch.randint(1000, (300,), device="cuda")

    def run():
        loss = K.linear_cross_entropy(hidden, weight, target, reduction=reduction, chunk_rows=128, backend=backend)
        return loss, *torch.autograd.grad(loss.sum() / 3, (hidden, weight))

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for ignored in (0, 40, 300):
        target.copy_(torch.randint(1000, (300,)))
        target[:ignored] = -100
        graph.replay()
        got = [x.clone() for x in captured]
        for one, two in zip(got, run(), strict=True):
            assert torch.equal(one.nan_to_num(7), two.nan_to_num(7))


def test_a_merger_from_raster_order():
    x = torch.randn(40, 64, device="cuda").bfloat16()
    shapes = ((64,), (64,), (96, 256), (96,), (72, 96), (72,))
    parameters = [torch.randn(shape, device="cuda").bfloat16() for shape in shapes]
    grid = torch.tensor([[1, 4, 6], [4, 2, 2]], device="cuda")
    run = lambda: K.patch_merge(x, *parameters, order="raster", grid_thw=grid, backend="triton")  # noqa: E731
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for grids in ([[1, 4, 6], [4, 2, 2]], [[1, 4, 4], [1, 6, 4]]):
        grid.copy_(torch.tensor(grids))
        graph.replay()
        got = captured.clone()
        assert torch.equal(got, run())


@pytest.mark.parametrize("planned", ["in the graph", "before it", "before it, on the host"])
@pytest.mark.parametrize("turned", [False, True], ids=["plain", "rope"])
@pytest.mark.parametrize("backend", ["triton", "sm90", "torch", "flash"])
def test_attention_over_segments_that_change(planned, turned, backend):
    """Captured once, replayed on other boundaries, empty segments and rows that no segment holds."""
    if (reason := unavailable(backend, "cuda")) is not None:
        pytest.skip(f"{backend}: {reason}")
    total, shape = 400, (400, 3, 4, 80)
    qkv = torch.randn(shape, device="cuda").bfloat16()
    cu_seqlens = torch.tensor([0, 100, 230, 400], dtype=torch.int32, device="cuda")
    angles = torch.rand(total, 40, device="cuda") * 6
    rope = (angles.cos(), angles.sin()) if turned else None
    ours = cu_seqlens.cpu() if planned.endswith("host") else cu_seqlens.clone()
    plan = K.plan_tiles(ours, total, device="cuda", padded=True)

    def run():
        tiles = plan if planned.startswith("before") else K.plan_tiles(cu_seqlens, total)
        return K.varlen_attention(*qkv.unbind(1), cu_seqlens, total, tiles=tiles, rope=rope, backend=backend)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for bounds in ([0, 100, 230, 400], [0, 0, 3, 390], [0, 390, 390, 390], [0, 0, 0, 0]):
        qkv.copy_(torch.randn(shape, device="cuda"))
        cu_seqlens.copy_(torch.tensor(bounds))
        if planned.startswith("before"):
            plan.update_(cu_seqlens)
        graph.replay()
        got = captured.clone()
        host = torch.tensor(bounds, dtype=torch.int32)
        want = K.varlen_attention(*qkv.unbind(1), host, total, rope=rope, backend=backend)
        assert torch.equal(got, want) if backend in ("triton", "sm90") else (got - want).abs().max() < 2e-2
        assert not got[bounds[-1] :].any()
