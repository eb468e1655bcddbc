"""SGLang's own Qwen2-VL tower on a CPU: stock = patched = transformers', on mixed grids. ``make test-stacks`` runs it.

SGLang is imported without the packages of a GPU: operators that torchvision would define are declared, and the process
is a group of one. The plugin is found by SGLang itself, through the entry points that pyproject.toml declares.
"""

# ruff: noqa: E402  (what SGLang's imports look for comes before them)
from __future__ import annotations

import os
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch

_DECLARED = torch.library.Library("torchvision", "DEF")
for _name in ("nms", "qnms"):
    _DECLARED.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from sglang.srt import plugins
from sglang.srt.layers.activation import QuickGELU
from sglang.srt.layers.attention import vision
from sglang.srt.layers.rotary_embedding import utils as rotary
from sglang.srt.models.qwen2_vl import Qwen2VisionTransformer
from sglang.srt.plugins.hook_registry import HookRegistry
from sglang.srt.runtime_context import get_context, get_parallel
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

from qwen2vl_kernels.integrations import sglang as adapter
from qwen2vl_kernels.integrations import sglang_layers
from tests.stacks.calls import count_calls

OPS = {"vision_rope": "vision_rope", "quick_gelu": "quick_gelu", "vision_attention": "varlen_attention"}
OURS = sglang_layers.BACKEND
GRIDS = [[1, 4, 6], [1, 8, 4], [3, 2, 4], [1, 2, 2]]
HOLDERS = (rotary, vision, QuickGELU, vision.VisionAttention)


def tower(config: Qwen2VLVisionConfig, weights: dict) -> torch.nn.Module:
    made = Qwen2VisionTransformer(config, norm_eps=1e-6)
    made.load_state_dict({name.replace("attn.qkv.", "attn.qkv_proj."): tensor for name, tensor in weights.items()})
    return made.eval()


def on_gpu_of(major: int):
    """SGLang's choice of an attention backend takes the device for a GPU of that compute capability."""
    return patch.multiple(vision, is_cuda=lambda: True, get_device_capability=lambda: (major, 0))


def chosen(major: int, head_dim: int) -> str:
    with on_gpu_of(major):
        return vision.VisionAttention._determine_attention_backend(SimpleNamespace(head_size=head_dim), None)


def held() -> list[dict]:
    """All that the adapter may change."""
    tables = vision.QKV_BACKEND_IMPL, HookRegistry._hooks, dict.fromkeys(HookRegistry._patched)
    return [dict(vars(holder)) for holder in HOLDERS] + [dict(table) for table in tables]


def load_as_sglang_does() -> None:
    """As every process of a server does, from a distribution that has pyproject.toml's entry points.

    First without the variable that switches the plugin on, which must change nothing, then with it.
    """
    heading = f'[project.entry-points."{plugins.GENERAL_PLUGINS_GROUP}"]'
    after = (Path(__file__).parents[2] / "pyproject.toml").read_text().partition(heading)[2]
    names = after.partition("\n[")[0].replace('"', "")
    with tempfile.TemporaryDirectory() as folder:
        about = Path(folder, "qwen2vl-0.dist-info")
        about.mkdir()
        (about / "METADATA").write_text("Metadata-Version: 2.1\nName: qwen2vl\nVersion: 0\n")
        (about / "entry_points.txt").write_text(f"[{plugins.GENERAL_PLUGINS_GROUP}]{names}")
        sys.path.insert(0, folder)
        try:
            before = held()
            os.environ.pop("QWEN2VL_KERNELS", None)
            plugins.load_plugins()
            assert held() == before, "a plugin that is not switched on"
            plugins._plugins_loaded = False  # as in a new process
            os.environ["QWEN2VL_KERNELS"] = "sglang"
            plugins.load_plugins()
        finally:
            os.environ.pop("QWEN2VL_KERNELS", None)
            sys.path.remove(folder)


def main() -> None:
    calls = count_calls(sglang_layers, OPS.values())
    torch.manual_seed(0)
    config = Qwen2VLVisionConfig(depth=2, embed_dim=160, hidden_size=64, num_heads=2, mlp_ratio=2)
    theirs = Qwen2VisionTransformerPretrainedModel(config).eval()
    config.in_chans = 3  # what SGLang reads, in released checkpoints
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    weights = dict(theirs.state_dict())
    patches, grids = torch.randn(sum(t * h * w for t, h, w in GRIDS), 1176), torch.tensor(GRIDS)
    out = theirs(patches, grid_thw=grids)
    want = out if isinstance(out, torch.Tensor) else out.pooler_output
    get_context().override_server_args(device="cpu", mm_attention_backend=None).install()
    stock, before = tower(config, weights)(patches, grids), held()
    print("transformers - SGLang   ", (want - stock).abs().max().item(), "of", want.abs().max().item())
    torch.testing.assert_close(stock, want, rtol=1e-4, atol=1e-4)

    for how in (load_as_sglang_does, adapter.apply):
        how()
        rows = adapter.status()
        for row in rows:
            print(row.feature, row.label, row.state, row.reason)
        assert len(rows) == 7 and {row.state for row in rows} == {"applied"}
        hooks = [row for row in rows if isinstance(row, adapter.Hook)]
        assert len(hooks) == 5 and all(hook.is_set() for hook in hooks)
        assert vision.apply_rotary_pos_emb is rotary.apply_rotary_pos_emb is not before[0]["apply_rotary_pos_emb"]
        assert [chosen(8, 80), chosen(8, 64), chosen(9, 80), chosen(10, 80)] == [OURS, "triton_attn", "fa3", "fa4"]
        # The backend is chosen when a tower is built; what ours then does, it does on a CPU as well.
        for device, features in ((nullcontext(), ("vision_rope", "quick_gelu")), (on_gpu_of(8), tuple(OPS))):
            with device:
                patched = tower(config, weights)
            out = patched(patches, grids)
            print("SGLang patched - SGLang ", (out - stock).abs().max().item(), dict(calls))
            assert calls == {OPS[feature]: config.depth for feature in features}
            torch.testing.assert_close(out, stock, rtol=1e-4, atol=1e-4)
            calls.clear()
        adapter.restore()
        assert held() == before, "after restore()"
        assert chosen(8, 80) == "triton_attn"
    assert torch.equal(tower(config, weights)(patches, grids), stock) and not calls, "after restore()"


if __name__ == "__main__":
    alone = {"tp_rank": 0, "attn_tp_rank": 0, "tp_group": None, "attn_tp_group": None}
    with get_parallel().override(**alone), torch.inference_mode():
        main()
    print("SGLang: stock = patched = transformers")
