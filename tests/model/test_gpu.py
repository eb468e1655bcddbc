"""The same model on a GPU: answers of the CPU in float32, errors of the CPU in bf16."""

import numpy as np
import pytest
import torch

from qwen2vl import GenerationConfig, Processor, Qwen2VL, generate
from tests.conftest import assert_two_times

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device"),
]


@pytest.fixture(scope="module")
def inputs(folder):
    rng = np.random.default_rng(0)
    image, other = (rng.integers(0, 256, size, dtype=np.uint8) for size in ((224, 224, 3), (56, 84, 3)))
    clip = {"type": "video", "video": [other] * 6, "min_pixels": 3136}
    items = [{"type": "image", "image": image}, clip, {"type": "text", "text": "What is it?"}]
    return Processor.from_pretrained(folder)(
        [[{"role": "user", "content": items}], [{"role": "user", "content": "Hi"}]]
    )


def test_float32_equals_the_cpu(folder, inputs):
    cpu, gpu = (Qwen2VL.from_pretrained(folder, device=d) for d in ("cpu", "cuda"))
    keep = inputs["attention_mask"].bool()
    allowed, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, False
    try:
        with torch.no_grad():
            expected, got = cpu(**inputs), gpu(**inputs.to("cuda"))
        torch.testing.assert_close(got.cpu()[keep], expected[keep], rtol=1e-3, atol=1e-3)
        config = GenerationConfig(max_new_tokens=16, eos_token_ids=(10**6,))
        assert generate(gpu, inputs, config=config).sequences == generate(cpu, inputs, config=config).sequences
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


def test_bf16_is_as_close_as_on_the_cpu(folder, inputs):
    exact_model = Qwen2VL.from_pretrained(folder, device="cpu", dtype="bfloat16").double()
    cpu, gpu = (Qwen2VL.from_pretrained(folder, device=d, dtype="bfloat16") for d in ("cpu", "cuda"))
    with torch.no_grad():
        exact = exact_model(**inputs)
        assert_two_times(gpu(**inputs.to("cuda")).cpu(), cpu(**inputs), exact, 1e-3)
