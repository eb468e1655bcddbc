"""The model under FSDP2 with mixed precision as it comes, which casts what layers are called with."""

import pytest
import torch
import torch.distributed as dist

from benchmarks.random_checkpoint import small_config
from qwen2vl import Qwen2VL
from tests.conftest import assert_two_times


@pytest.fixture
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _results(dtype: str, mixed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and the gradients of all parameters, of an image and text."""
    torch.manual_seed(0)
    config = small_config()
    model = Qwen2VL.from_config(config, device="cpu", dtype=dtype, std=0.05)
    if mixed:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        for part in (*model.visual.blocks, *model.model.layers, model):
            fully_shard(part, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    ids = [1] * 900 + [config.image_token_id] * 6 + [2, 3, 4]  # the image stands where 16-bit frequencies would be off
    pixels = torch.randn(24, 1176, generator=torch.Generator().manual_seed(1))
    logits = model(torch.tensor([ids]), pixel_values=pixels, image_grid_thw=torch.tensor([[1, 4, 6]]))
    logits[0, -1].float().logsumexp(0).backward()
    gradients = [p.grad.full_tensor() if mixed else p.grad for p in model.parameters() if p.grad is not None]
    return logits[0, -10:].detach().float(), torch.cat([g.float().flatten() for g in gradients])


def test_inputs_are_cast_and_frequencies_are_not(process_group):
    exact, low, got = _results("float32", False), _results("bfloat16", False), _results("float32", True)
    for mine, plain, reference in zip(got, low, exact, strict=True):
        assert_two_times(mine, plain, reference, 1e-3)
