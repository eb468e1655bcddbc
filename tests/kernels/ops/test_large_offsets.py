"""Offsets beyond 2^31 elements: a few rows, heads, columns and slots that lie that far apart.

The memory between them is never touched, so that it costs address space only.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from qwen2vl_kernels import (
    append_kv,
    grouped_linear,
    grouped_quant_linear,
    kvcache_attention,
    layer_norm,
    mrope,
    mrope_,
    patch_embed,
    quick_gelu,
    quick_gelu_,
    rms_norm,
    swiglu,
    varlen_attention,
)
from qwen2vl_kernels.core.backends import unavailable
from qwen2vl_kernels.triton.cross_entropy import launch_rows
from tests.conftest import DEVICE

if (reason := unavailable("triton", DEVICE)) is not None:
    pytest.skip(f"triton: {reason}", allow_module_level=True)

FAR = 2**30  # a stride that fits 32 bits; three of it do not


@pytest.fixture(scope="module")
def memory():
    """3.2 GiB elements of bfloat16."""
    try:
        return torch.empty(3 * FAR + 2**20, dtype=torch.bfloat16, device=DEVICE)
    except RuntimeError as error:
        pytest.skip(f"6.4 GB cannot be reserved: {error}")


def _spread(memory: torch.Tensor, *shape: int, far: int) -> torch.Tensor:
    """Random values of ``shape``, neighbours in dimension ``far`` FAR elements apart, the others packed."""
    dense = torch.randn(shape, device=DEVICE).bfloat16()
    strides = list(torch.empty([n if d != far else 1 for d, n in enumerate(shape)], device="meta").stride())
    strides[far] = FAR
    return memory.as_strided(shape, strides).copy_(dense)


ROWWISE: dict[str, Callable] = {
    "rms_norm": lambda x, backend: rms_norm(x, torch.ones_like(x[0]).contiguous(), backend=backend),
    "layer_norm": lambda x, backend: layer_norm(x, *[torch.ones_like(x[0]).contiguous()] * 2, backend=backend),
    "quick_gelu": lambda x, backend: quick_gelu(x, backend=backend),
    "swiglu": lambda x, backend: swiglu(x, x, backend=backend),
    "patch_embed": lambda x, backend: patch_embed(
        x, torch.ones(8, x.shape[1], device=DEVICE).bfloat16(), backend=backend
    ),
}


@pytest.mark.parametrize("far", [0, 1], ids=["rows", "columns"])
@pytest.mark.parametrize("name", ROWWISE)
def test_rows_and_columns(memory, name, far):
    x = _spread(memory, *((4, 16) if far == 0 else (5, 4)), far=far)
    got, want = ROWWISE[name](x, "triton"), ROWWISE[name](x.contiguous(), "triton")
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["rms_norm", "layer_norm", "quick_gelu", "swiglu"])
def test_gradients(memory, name):
    x = _spread(memory, 4, 16, far=0).requires_grad_()
    dense = x.detach().clone().contiguous().requires_grad_()
    grads = [torch.autograd.grad(ROWWISE[name](t, "triton").float().square().sum(), t)[0] for t in (x, dense)]
    assert torch.equal(*grads)


@pytest.mark.parametrize("far", ["rows", "groups", "matrix rows"])
def test_grouped_products(memory, far):
    x, weight = torch.randn(4, 16, device=DEVICE).bfloat16(), torch.randn(4, 4, 16, device=DEVICE).bfloat16()
    bounds = torch.tensor([0, 1, 2, 3, 4], dtype=torch.int32, device=DEVICE)
    one = _spread(memory, 4, 16, far=0) if far == "rows" else x
    other = weight if far == "rows" else _spread(memory, 4, 4, 16, far=0 if far == "groups" else 1)
    grad, results = torch.randn(4, 4, device=DEVICE).bfloat16(), []
    for operands in ((one, other), (one.clone().contiguous(), other.clone().contiguous())):
        given = [t.detach().requires_grad_() for t in operands]
        y = grouped_linear(*given, bounds, backend="triton")
        results.append([y, *torch.autograd.grad(y, given, grad)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("far", ["rows", "groups", "matrix rows"])
def test_grouped_products_with_quantised_weights(memory, far):
    x, weight = torch.randn(4, 64, device=DEVICE).bfloat16(), torch.randint(0, 256, (4, 4, 64), device=DEVICE).byte()
    bounds = torch.tensor([0, 1, 2, 3, 4], dtype=torch.int32, device=DEVICE)
    rest = torch.rand(4, 4, 2, device=DEVICE), bounds
    want = grouped_quant_linear(x, weight, *rest, block=(1, 32), backend="triton")
    if far == "rows":
        x = memory.as_strided((4, 64), (FAR, 1)).copy_(x)
    else:
        strides = (FAR, 64, 1) if far == "groups" else (64, FAR, 1)
        weight = memory.view(torch.uint8).as_strided((4, 4, 64), strides).copy_(weight)
    assert torch.equal(grouped_quant_linear(x, weight, *rest, block=(1, 32), backend="triton"), want)


@pytest.mark.parametrize("far", [0, 1], ids=["tokens", "heads"])
def test_rotation(memory, far):
    shape = (4, 2, 16) if far == 0 else (3, 4, 16)
    q = _spread(memory, *shape, far=far)
    dense, k = q.clone().contiguous(), torch.randn(shape[0], 1, 16, device=DEVICE).bfloat16()
    positions = torch.randint(0, 99, (3, shape[0]), device=DEVICE)
    settings = (positions, torch.rand(8, device=DEVICE), (2, 3, 3))
    want = mrope(dense, k, *settings, backend="triton")[0]
    assert torch.equal(mrope(q, k, *settings, backend="triton")[0], want)
    mrope_(q, k, *settings, backend="triton")
    assert torch.equal(q, want)


def test_in_place(memory):
    x = _spread(memory, 4, 16, far=0)
    want = quick_gelu(x.clone().contiguous(), backend="triton")
    assert torch.equal(quick_gelu_(x, backend="triton"), want)


def test_rows_of_logits(memory):
    logits, loss = _spread(memory, 4, 50, far=0), torch.empty(2, 4, device=DEVICE)
    dense, target = logits.clone().contiguous(), torch.tensor([3, 49, -100, 0], device=DEVICE)
    want, got = (launch_rows(x, target, None, loss[n], -100, 0.0, True) for n, x in enumerate((dense, logits)))
    assert torch.equal(got, want) and torch.equal(loss[0], loss[1]) and loss.all(1).tolist() == [False, False]


def test_slots(memory):
    """Blocks of a cache that far apart, and a contiguous one whose last slots are."""
    k = torch.randn(2, 1, 16, device=DEVICE).bfloat16()
    v = torch.randn(2, 1, 16, device=DEVICE).bfloat16()
    keys, values = memory.as_strided((4, 2, 2, 16), (FAR, 32, 16, 1)).split(1, 2)
    slots = torch.tensor([7, 1], device=DEVICE)
    append_kv(k, v, keys, values, slots, backend="triton")
    assert torch.equal(keys[3, 1], k[0]) and torch.equal(keys[0, 1], k[1])
    assert torch.equal(values[3, 1], v[0]) and torch.equal(values[0, 1], v[1])
    capacity = 3 * FAR // 32
    keys, values = memory[: capacity * 32].view(1, capacity, 2, 16).split(1, 2)
    append_kv(k, v, keys, values, torch.tensor([capacity - 1, 5], device=DEVICE), backend="triton")
    assert torch.equal(keys[0, -1], k[0]) and torch.equal(keys[0, 5], k[1])
    assert torch.equal(values[0, -1], v[0]) and torch.equal(values[0, 5], v[1])


@pytest.mark.parametrize("far", [0, 1], ids=["tokens", "heads"])
def test_attention(memory, far):
    """Forward, backward and with rotary tables, q, k and v each that far apart."""
    cu = torch.tensor([0, 3, 4], dtype=torch.int32)
    tables = torch.rand(2, 4, 8, device=DEVICE).unbind()
    shape = (4, 2, 16) if far == 0 else (4, 4, 16)
    for rope in (None, tables):
        results = []
        x = _spread(memory, *shape, far=far)
        for rows in (x, x.clone().contiguous()):
            rows = rows.detach().requires_grad_()
            out = varlen_attention(rows, rows, rows, cu, 3, rope=rope, backend="triton")
            results.append((out, *torch.autograd.grad(out.float().square().sum(), rows)))
        assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


@pytest.mark.parametrize("far", [0, 1, 2], ids=["rows", "slots", "heads"])
def test_a_cache(memory, far):
    """Of one that is read by its lengths on the device."""
    cache = _spread(memory, *[4 if d == far else 2 for d in range(3)], 16, far=far)
    q = torch.randn(cache.shape[0], 2 * cache.shape[2], 16, device=DEVICE).bfloat16()
    lengths = torch.full((len(q),), cache.shape[1], dtype=torch.int32, device=DEVICE)
    got, want = (kvcache_attention(q, x, x, None, lengths, backend="triton") for x in (cache, cache.contiguous()))
    assert torch.equal(got, want) and want.count_nonzero() > 0
