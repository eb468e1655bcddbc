"""patch_embed and patch_merge in Triton, forward and backward, against the eager formulas and float64."""

from __future__ import annotations

import pytest
import torch

from qwen2vl_kernels import fold_patch_embed, patch_embed, patch_merge
from qwen2vl_kernels.core.backends import unavailable
from qwen2vl_kernels.ops.patch_embed import patch_embed_ref
from qwen2vl_kernels.ops.patch_merge import block_order, gather_blocks_ref, patch_merge_ref
from qwen2vl_kernels.triton.gemm import launch_gemm
from tests.conftest import DEVICE, assert_two_times
from tests.kernels.poison import poisoned  # noqa: F401

if (reason := unavailable("triton", DEVICE)) is not None:
    pytest.skip(f"triton: {reason}", allow_module_level=True)
pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def _results(run, arguments, grad, needs):
    arguments = [a.detach().clone().requires_grad_(n) for a, n in zip(arguments, needs, strict=True)]
    output = run(*arguments)
    return [
        output.detach(),
        *torch.autograd.grad(output, [a for a, n in zip(arguments, needs, strict=True) if n], grad),
    ]


def _two_times(run, ref, arguments, needs, floor=1e-6):
    with torch.no_grad():
        plain = run(*arguments)
    grad = torch.randn_like(plain)
    got, eager = _results(run, arguments, grad, needs), _results(ref, arguments, grad, needs)
    exact = _results(ref, [a if a.dtype == torch.uint8 else a.double() for a in arguments], grad.double(), needs)
    assert torch.equal(got[0], plain)
    for one, theirs, right in zip(got, eager, exact, strict=True):
        assert one.dtype == theirs.dtype and one.isfinite().all()
        assert_two_times(one, theirs, right, floor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 588, 8), (130, 588, 40), (5, 1176, 130), (33, 64, 128), (3, 24, 300)], ids=str)
@pytest.mark.parametrize("source", ["bytes", "float32", "same"])
def test_patch_embed(source, shape, dtype):
    tokens, depth, columns = shape
    if source == "bytes":
        patches = torch.randint(0, 256, (tokens, depth), dtype=torch.uint8, device=DEVICE)
    else:
        patches = torch.randn(tokens, depth, device=DEVICE).to(torch.float32 if source == "float32" else dtype)
    weight = torch.randn(columns, depth, device=DEVICE).mul(depth**-0.5).to(dtype)
    bias = torch.randn(columns, device=DEVICE).to(dtype)

    def ref(x, w, b):  # float64 patches would be rounded to a 16-bit weight
        return patch_embed_ref(x, w, b)

    _two_times(
        lambda x, w, b: patch_embed(x, w, b, backend="triton"), ref, (patches, weight, bias),
        (source == "same", True, True),
    )  # fmt: skip
    got = patch_embed(patches, weight, backend="triton")
    torch.testing.assert_close(
        got.float(), (patch_embed(patches, weight, bias, backend="triton").float() - bias.float()), rtol=2e-2, atol=4e-2
    )


def test_patch_embed_of_the_folded_convolution():
    weight = torch.randn(32, 3, 2, 14, 14, device=DEVICE).mul(0.05).bfloat16()
    pixels = torch.randint(0, 256, (7, 588), dtype=torch.uint8, device=DEVICE)
    folded = fold_patch_embed(weight, MEAN, STD, still=True)
    exact = patch_embed_ref(pixels, *(f.double() for f in folded))
    assert_two_times(patch_embed(pixels, *folded, backend="triton"), patch_embed_ref(pixels, *folded), exact, 1e-6)
    both = pixels.view(7, 3, 1, 196).expand(7, 3, 2, 196).flatten(1)
    got = patch_embed(both.bfloat16(), weight, backend="triton")  # the five-dimensional weight
    assert_two_times(
        got, patch_embed_ref(both.bfloat16(), weight), patch_embed_ref(both.double(), weight.double()), 1e-6
    )


def test_strided_patches_and_weights():
    wide = torch.randint(0, 256, (9, 700), dtype=torch.uint8, device=DEVICE)
    weight = torch.randn(20, 640, device=DEVICE).bfloat16()
    for x, w in (
        (wide[:, 7:595], weight[:, :588]),
        (wide.T[:9, :9].T, weight[:, 3:12]),
        (wide[:, ::2], weight[:, :350]),
    ):
        got, want = patch_embed(x, w, backend="triton"), patch_embed_ref(x, w)
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2.0)


def _merger(channels, hidden, out, merge, dtype):
    wide = merge * merge * channels
    shapes = [(channels,), (channels,), (hidden, wide), (hidden,), (out, hidden), (out,)]
    made = [torch.randn(shape, device=DEVICE) * (shape[-1] ** -0.5 if len(shape) == 2 else 1) for shape in shapes]
    return [m.to(dtype) for m in made]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("merge", [1, 2, 3])
def test_patch_merge(merge, dtype):
    x = torch.randn(6 * merge * merge, 40, device=DEVICE).mul(2).to(dtype)
    parameters = _merger(40, 36, 24, merge, dtype)
    run = lambda *a: patch_merge(*a, merge_size=merge, backend="triton")  # noqa: E731
    ref = lambda *a: patch_merge_ref(*a, None, merge)  # noqa: E731
    _two_times(run, ref, (x, *parameters), (True,) * 7, 2e-6)


@pytest.mark.parametrize("merge", [2, 3])
def test_patch_merge_from_raster_order(merge):
    grid = torch.tensor([[2, 2, 3], [1, 1, 1], [1, 3, 1]]) * torch.tensor([1, merge, merge])
    rows = int(grid.prod(1).sum())
    x, parameters = torch.randn(rows, 16, device=DEVICE), _merger(16, 12, 8, merge, torch.float32)
    run = lambda *a: patch_merge(*a, order="raster", grid_thw=grid, merge_size=merge, backend="triton")  # noqa: E731
    ref = lambda *a: patch_merge_ref(*a, grid, merge)  # noqa: E731
    _two_times(run, ref, (x, *parameters), (True,) * 7, 2e-6)
    order = block_order(grid, rows, merge)
    assert torch.equal(x[order.to(DEVICE)], gather_blocks_ref(x, grid, merge))


@pytest.mark.parametrize(
    "grid", [[[0, 0, 0]], [[5, 9, 9], [-1, 2, 2]], [[2**40, 2, 2]], [[1, 3, 1]], [[1, 2, 2], [1, 2, 2]]]
)
def test_no_grid_leads_outside(grid):
    order = block_order(torch.tensor(grid), 52, 2)
    assert order.shape == (52,) and int(order.min()) >= 0 and int(order.max()) < 52


def test_deterministic_and_the_same_in_every_pack():
    x, weight = torch.randn(300, 72, device=DEVICE).bfloat16(), torch.randn(150, 72, device=DEVICE).bfloat16()
    bias = torch.randn(150, device=DEVICE).bfloat16()
    first = launch_gemm(x, weight, bias, True)[0]
    assert torch.equal(first, launch_gemm(x, weight, bias, True)[0])
    assert torch.equal(first[131:140], launch_gemm(x[131:140], weight, bias, True)[0])


def test_no_rows():
    parameters = [p.requires_grad_() for p in _merger(16, 12, 8, 2, torch.float32)]
    out = patch_merge(torch.zeros(0, 16, device=DEVICE), *parameters, backend="triton")
    assert out.shape == (0, 8)
    assert not any(g.any() for g in torch.autograd.grad(out.sum(), parameters))
    empty = torch.zeros(0, 588, dtype=torch.uint8, device=DEVICE)
    assert patch_embed(empty, torch.zeros(8, 588, device=DEVICE), backend="triton").shape == (0, 8)


def test_gradcheck():
    x = torch.randn(8, 6, dtype=torch.float64, device=DEVICE, requires_grad=True)
    parameters = [p.double().requires_grad_() for p in _merger(6, 5, 4, 2, torch.float32)]
    assert torch.autograd.gradcheck(lambda *a: patch_merge(*a, backend="triton"), (x, *parameters))


def test_opcheck():
    x, weight, bias = (torch.randn(*s, device=DEVICE, requires_grad=True) for s in ((5, 12), (7, 12), (7,)))
    torch.library.opcheck(torch.ops.qwen2vl.gemm_forward.default, (x, weight, bias, True, True))
    pixels = torch.randint(0, 256, (5, 12), dtype=torch.uint8, device=DEVICE)
    torch.library.opcheck(torch.ops.qwen2vl.gemm_forward.default, (pixels, weight, None, False, False))
    order = torch.randperm(5, device=DEVICE)
    arguments = (x, None, bias.new_ones(12), bias.new_ones(12), 1e-6, True, order)
    torch.library.opcheck(torch.ops.qwen2vl.norm_forward.default, arguments)
