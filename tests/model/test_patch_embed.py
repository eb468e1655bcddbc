"""The tower's patch embedding folds the pixels' normalisation into its weight once, and again when that changes."""

import pytest
import torch

from qwen2vl import vision
from qwen2vl.config import IMAGE_MEAN, IMAGE_STD, VisionConfig
from qwen2vl_kernels import fold_patch_embed, patch_embed


@pytest.fixture
def made(monkeypatch):
    """A patch embedding, and what is folded from now on."""
    torch.manual_seed(0)
    module = vision.PatchEmbed(VisionConfig(hidden_size=8, embed_dim=16, num_heads=2, depth=1))
    torch.nn.init.normal_(module.proj.weight)
    folded = []
    monkeypatch.setattr(vision, "fold_patch_embed", lambda *a: folded.append(a[3]) or fold_patch_embed(*a))
    return module, folded


PATCHES = torch.arange(5 * 1176).view(5, 1176).remainder(251).byte()


def _right(module, patches=PATCHES):
    weight = module.proj.weight.detach().clone()
    return patch_embed(patches, *fold_patch_embed(weight, IMAGE_MEAN, IMAGE_STD, patches.shape[1] == 588))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_once_for_a_weight(made, frozen, mode):
    module, folded = made
    module.requires_grad_(not frozen)
    with mode():
        for _ in range(3):
            assert torch.equal(module(PATCHES), _right(module))
            assert torch.equal(module(PATCHES[:, :588]), _right(module, PATCHES[:, :588]))
    assert folded == [False, True]
    with torch.no_grad():  # what inference mode made serves outside of it
        assert torch.equal(module(PATCHES), _right(module)) and folded == [False, True]


@pytest.mark.parametrize("write", ["in place", "data", "numpy", "load_state_dict", "other storage", "dtype"])
def test_again_when_the_weight_changes(made, write):
    module, folded = made
    with torch.no_grad():
        module(PATCHES)
        other = torch.randn_like(module.proj.weight)
        if write == "in place":
            module.proj.weight.copy_(other)
        elif write == "data":
            module.proj.weight.data.copy_(other)
        elif write == "numpy":
            module.proj.weight.numpy()[:] = other.numpy()
        elif write == "load_state_dict":
            module.load_state_dict({"proj.weight": other})
        elif write == "other storage":
            module.proj.weight.data = other
        else:
            module.to(torch.bfloat16)
        assert torch.equal(module(PATCHES), _right(module)) and folded == [False, False]


def test_in_training_steps_gradients_go_through_it(made):
    module, folded = made
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    for _ in range(2):
        loss = module(PATCHES).square().mean()
        loss.backward()
        weight = module.proj.weight.detach().clone().requires_grad_()
        again = patch_embed(PATCHES, *fold_patch_embed(weight, IMAGE_MEAN, IMAGE_STD)).square().mean()
        torch.testing.assert_close(module.proj.weight.grad, torch.autograd.grad(again, weight)[0])
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            assert torch.equal(module(PATCHES), _right(module))
    assert len(folded) == 4


def test_copies_fold_their_own(made):
    import copy

    module, _ = made
    with torch.no_grad():
        module(PATCHES)
        other = copy.deepcopy(module)
        other.proj.weight.mul_(2)
        assert torch.equal(other(PATCHES), _right(other)) and torch.equal(module(PATCHES), _right(module))
    assert not {"folded"} & set(module.__dict__) and list(module.state_dict()) == ["proj.weight"]


def test_nothing_is_copied_to_a_device(monkeypatch):
    """The means and deviations go into the kernels as numbers."""

    def made(*_, **__):
        raise AssertionError("a tensor is made of host numbers")

    weight = torch.randn(4, 3, 2, 2, 2)
    want = fold_patch_embed(weight, IMAGE_MEAN, IMAGE_STD)
    for name in ("tensor", "as_tensor", "from_numpy"):
        monkeypatch.setattr(torch, name, made)
    got = fold_patch_embed(weight, IMAGE_MEAN, IMAGE_STD)
    assert all(torch.equal(one, two) for one, two in zip(got, want, strict=True))
