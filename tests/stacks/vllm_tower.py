"""vLLM's own Qwen2-VL tower on a CPU: stock = patched = transformers', on mixed grids. ``make test-stacks`` runs it.

vLLM is imported without the packages of a GPU: operators that its wheel or torchvision's would define are declared, and
the process is a group of one.
"""

# ruff: noqa: E402  (what vLLM's imports look for comes before them)
from __future__ import annotations

import os
import tempfile

os.environ["VLLM_TARGET_DEVICE"] = "cpu"

import torch
import torch.nn.functional as F

_DECLARED = [torch.library.Library("torchvision", "DEF"), torch.library.Library("_C", "FRAGMENT")]
for _name in ("nms", "qnms"):
    _DECLARED[0].define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
_DECLARED[1].define("gelu_quick(Tensor! out, Tensor input) -> ()")

from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.models.qwen2_vl import Qwen2VisionTransformer

from qwen2vl_kernels.integrations import vllm as adapter
from qwen2vl_kernels.integrations import vllm_layers
from tests.stacks.calls import count_calls

OPS = {"vision_rope": "vision_rope_", "quick_gelu": "quick_gelu", "vision_attention": "varlen_attention"}
GRIDS = [[1, 4, 6], [1, 8, 4], [3, 2, 4], [1, 2, 2]]


def tower(config: Qwen2VLVisionConfig, weights: dict) -> torch.nn.Module:
    made = Qwen2VisionTransformer(config, norm_eps=1e-6)
    made.load_weights(weights.items())
    for module in made.modules():
        if isinstance(module, LinearBase):
            module.cpu_linear = F.linear  # what vLLM sets once it has loaded a whole model
    return made.eval()


def main() -> None:
    calls = count_calls(vllm_layers, OPS.values())
    torch.manual_seed(0)
    config = Qwen2VLVisionConfig(depth=2, embed_dim=160, hidden_size=64, num_heads=2, mlp_ratio=2)
    theirs = Qwen2VisionTransformerPretrainedModel(config).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    weights = dict(theirs.state_dict())
    patches = torch.randn(sum(t * h * w for t, h, w in GRIDS), 1176)
    out = theirs(patches, grid_thw=torch.tensor(GRIDS))
    want = out if isinstance(out, torch.Tensor) else out.pooler_output
    stock = tower(config, weights)(patches, GRIDS)
    print("transformers - vLLM     ", (want - stock).abs().max().item(), "of", want.abs().max().item())
    torch.testing.assert_close(stock, want, rtol=1e-4, atol=1e-4)
    for value, features in (
        (None, ()),
        ("vllm", adapter.DEFAULT),
        ("vllm:default,vision_attention", ("vision_rope", "quick_gelu", "vision_attention")),
    ):
        os.environ.pop("QWEN2VL_KERNELS", None)
        if value is not None:
            os.environ["QWEN2VL_KERNELS"] = value
        adapter.plugin()  # what every process of a server calls
        rows = adapter.status()
        for row in rows:
            print(row.feature, row.label, row.state, row.reason)
        assert {row.feature for row in rows if row.state == "applied"} == set(features)
        assert not calls
        patched = tower(config, weights)(patches, GRIDS)
        print("vLLM patched - vLLM     ", (patched - stock).abs().max().item(), dict(calls))
        assert calls == {OPS[feature]: config.depth for feature in features}
        torch.testing.assert_close(patched, stock, rtol=1e-4, atol=1e-4)
        adapter.restore()
        calls.clear()
    assert torch.equal(tower(config, weights)(patches, GRIDS), stock) and not calls, "after restore()"


if __name__ == "__main__":
    with tempfile.NamedTemporaryFile() as file, set_current_vllm_config(VllmConfig()), torch.inference_mode():
        init_distributed_environment(1, 0, f"file://{file.name}", 0, "gloo")
        initialize_model_parallel(1)
        main()
    print("vLLM: stock = patched = transformers")
