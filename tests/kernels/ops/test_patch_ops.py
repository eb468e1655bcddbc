"""patch_embed, fold_patch_embed and patch_merge against Conv3d, the processor's arithmetic and transformers' merger."""

import pytest
import torch
from transformers.models.qwen2_vl.modeling_qwen2_vl import PatchMerger

from qwen2vl_kernels import fold_patch_embed, patch_embed, patch_merge
from qwen2vl_kernels.ops.patch_merge import gather_blocks_ref
from tests.conftest import assert_two_times, relative_error

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def test_patch_embed_is_the_strided_convolution():
    weight, patches = torch.randn(32, 3, 2, 14, 14), torch.randn(7, 1176)
    conv = torch.nn.functional.conv3d(patches.view(7, 3, 2, 14, 14), weight, stride=(2, 14, 14)).flatten(1)
    torch.testing.assert_close(patch_embed(patches, weight), conv, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(patch_embed(patches, weight.flatten(1), torch.ones(32)), conv + 1, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("still", [False, True], ids=["video", "still"])
def test_folding_equals_normalising_first(dtype, still):
    weight = torch.randn(64, 3, 2, 14, 14).mul(0.05).to(dtype)
    pixels = torch.randint(0, 256, (50, 3, 2, 14, 14), dtype=torch.uint8)
    if still:
        pixels[:, :, 1] = pixels[:, :, 0]
    mean, std = (torch.tensor(x).double().view(3, 1, 1, 1) for x in (MEAN, STD))
    exact = ((pixels.double() / 255 - mean) / std).flatten(1) @ weight.double().flatten(1).T
    normalised = ((pixels.float() / 255 - mean.float()) / std.float()).flatten(1)
    eager = patch_embed(normalised, weight)
    rows = pixels[:, :, 0].flatten(1) if still else pixels.flatten(1)
    got = patch_embed(rows, *fold_patch_embed(weight, MEAN, STD, still))
    assert got.dtype == dtype
    assert_two_times(got, eager, exact, 1e-6)


def test_folding_is_differentiable():
    weight = torch.randn(2, 3, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: fold_patch_embed(w, MEAN, STD), (weight,))


def _merger(channels=20, hidden=12, merge=2, dtype=torch.float32):
    theirs = PatchMerger(dim=hidden, context_dim=channels, spatial_merge_size=merge).to(dtype)
    for parameter in theirs.parameters():
        parameter.data.normal_()
    ours = [theirs.ln_q.weight, theirs.ln_q.bias, *theirs.mlp[0].parameters(), *theirs.mlp[2].parameters()]
    return theirs, [p.data for p in ours]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_patch_merge_matches_transformers(dtype):
    theirs, parameters = _merger(dtype=dtype)
    x = torch.randn(24, 20).to(dtype)
    with torch.no_grad():
        assert relative_error(patch_merge(x, *parameters), theirs(x)) < 1e-6


def test_raster_order_gathers_blocks():
    """Block order is defined by hand here: for every block, its rows top to bottom, left to right."""
    _, parameters = _merger()
    grid = torch.tensor([[2, 4, 6], [1, 2, 2]])
    x = torch.randn(52, 20)
    order, base = [], 0
    for t, h, w in grid.tolist():
        for k in range(t):
            for i in range(0, h, 2):
                for j in range(0, w, 2):
                    order += [base + k * h * w + (i + a) * w + j + b for a in (0, 1) for b in (0, 1)]
        base += t * h * w
    assert torch.equal(gather_blocks_ref(x, grid), x[order])
    raster = patch_merge(x, *parameters, order="raster", grid_thw=grid)
    assert torch.equal(raster, patch_merge(x[order], *parameters))


def test_merge_size_three():
    theirs, parameters = _merger(merge=3)
    x = torch.randn(18, 20)
    with torch.no_grad():
        assert relative_error(patch_merge(x, *parameters, merge_size=3), theirs(x)) < 1e-6


def test_refusals():
    _, parameters = _merger()
    x = torch.randn(24, 20)
    with pytest.raises(ValueError, match="x must have a multiple of 4 rows, got 23"):
        patch_merge(x[:23], *parameters)
    with pytest.raises(ValueError, match="order must be 'block' or 'raster', got 'rows'"):
        patch_merge(x, *parameters, order="rows")
    with pytest.raises(TypeError, match=r"grid_thw must be a torch.Tensor, got NoneType"):
        patch_merge(x, *parameters, order="raster")
    with pytest.raises(ValueError, match="grid_thw describes 16 patches, but x has 24 rows"):
        patch_merge(x, *parameters, order="raster", grid_thw=torch.tensor([[1, 4, 4]]))
    with pytest.raises(ValueError, match="patches has 1176 values a row, but weight takes 588"):
        patch_embed(torch.zeros(2, 1176), torch.zeros(8, 588))
    with pytest.raises(ValueError, match="std must be positive"):
        fold_patch_embed(torch.zeros(8, 3, 2, 2, 2), MEAN, (1.0, 0.0, 1.0))
    with pytest.raises(ValueError, match="mean must have 3 values, got 1"):
        fold_patch_embed(torch.zeros(8, 3, 2, 2, 2), (0.5,), STD)


def test_autocast_is_pytorchs_for_matrix_products():
    """The dtype of ``F.linear`` there, in compiled code as well; float64 is left as it is, as by PyTorch."""
    x, weight, bias = torch.randn(8, 24), torch.randn(6, 24), torch.randn(6)
    norm, fc1, fc2 = torch.randn(2, 24), torch.randn(16, 96), torch.randn(6, 16)
    merger = (*norm, fc1, torch.randn(16), fc2, bias)
    for run, inputs in ((patch_embed, (x, weight, bias)), (patch_merge, (x, *merger))):
        with torch.autocast("cpu", torch.bfloat16):
            plain, want = run(*inputs), torch.nn.functional.linear(x, weight, bias)
            torch._dynamo.reset()
            compiled = torch.compile(run, fullgraph=True, backend="eager")(*inputs)
            assert run(*(t.double() for t in inputs)).dtype == torch.float64
        assert plain.dtype == compiled.dtype == want.dtype == torch.bfloat16
        assert torch.equal(plain, run(*(t.bfloat16() for t in inputs))) and torch.equal(plain, compiled)
        assert run(*inputs).dtype == torch.float32
        assert run(*(t.to("meta") for t in inputs)).is_meta  # which PyTorch has no autocast for
