"""What people do to models, with transformers' code and with ours: equal outputs, calls of hooks and saved memory.

A way prepares a model: checkpointing, offloading, sharding, adapters, hooks. Each is tried stock, with the classes
patched and with one model patched, before the model is prepared and after. To add one, write a function and list it.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from qwen2vl_kernels.integrations import transformers as adapter

from ..conftest import assert_two_times, relative_error
from ..kernels.ops.mrope_layouts import IMAGE, PAD, VIDEO
from .tiny_models import FAMILIES, VERSION, model, prompt

#: float32 through some layers: two orders of the same sums differ by less, relative to the largest value.
ROUNDING = 1e-5
#: bf16 through some layers: what two roundings of the same sums differ by, where stock's happens to be exact.
FLOOR = 2e-3

LANGUAGE = r".*language_model.*\.(q_proj|v_proj|down_proj)"
ROWS = ((("image", 1, 4, 6),), (("image", 1, 4, 2), ("image", 1, 2, 2)))


@dataclass(frozen=True)
class Way:
    """How a model is prepared, and what nobody can ask of it then."""

    prepare: Callable[[Any, Any], Any]
    low: bool = False  # computes in bf16
    exact: str = "plain"  # and this way the same in float32
    training: bool = False
    memory: bool = True  # whether all that autograd saves is seen by its hooks
    gradients: bool = True  # of all parameters; offloaded ones are on the meta device, and get none
    arguments: dict[str, Any] = field(default_factory=dict)
    #: Why one model that is patched after it was prepared stays as it is.
    left: str = ""


def plain(net: Any, folder: Any) -> Any:
    return net


def checkpointed(reentrant: bool) -> Callable:
    def prepare(net: Any, folder: Any) -> Any:
        net.gradient_checkpointing_enable({"use_reentrant": reentrant})
        net.enable_input_require_grads()  # without it the reentrant kind has nothing to differentiate by
        return net.train()

    return prepare


def on_disk(net: Any, folder: Any) -> Any:
    """As ``from_pretrained(device_map=..., offload_folder=...)`` leaves a model."""
    pytest.importorskip("accelerate")
    net.save_pretrained(folder)
    devices = {"model.visual": "cpu", "model.language_model": "disk", "lm_head": "cpu"}
    return type(net).from_pretrained(folder, device_map=devices, offload_folder=folder / "offload").eval()


def offloaded(net: Any, folder: Any) -> Any:
    return pytest.importorskip("accelerate").cpu_offload(net, execution_device=torch.device("cpu"))


def sharded(net: Any, folder: Any) -> Any:
    """FSDP2 as Accelerate and most scripts call it: blocks, then the rest, inputs cast. ``generate`` calls the tower
    by itself, and PEFT's the model below the wrapper, so that they are parts too."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    whole = net.get_base_model() if hasattr(net, "peft_config") else net
    tower, layers = whole.model.visual, whole.model.language_model.layers
    for part in (*tower.blocks, tower, *layers, whole.model, whole.lm_head, net):
        fully_shard(part, mp_policy=policy)
    return net


def adapted(**settings: Any) -> Callable:
    def prepare(net: Any, folder: Any) -> Any:
        peft = pytest.importorskip("peft")
        tuned = peft.LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, task_type="CAUSAL_LM", **settings)
        torch.manual_seed(3)
        net = peft.get_peft_model(net, tuned, "one")
        torch.manual_seed(4)
        net.add_adapter("two", tuned)
        for parameter in net.parameters():
            parameter.requires_grad_(parameter.requires_grad or settings.get("target_modules") is None)
        return net.eval()

    return prepare


def tuned_norms(net: Any, folder: Any) -> Any:
    """PEFT's wrappers around norms."""
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(net, peft.LNTuningConfig(target_modules=["norm1", "norm2", "input_layernorm"])).eval()


def whole_parts(net: Any, folder: Any) -> Any:
    """PEFT's other way: parts that are trained whole, in wrappers."""
    peft = pytest.importorskip("peft")
    parts = ["norm1", "norm2", "input_layernorm", "merger", "act_fn"]
    parts = [part for part in parts if any(name.endswith(part) for name, _ in net.named_modules())]
    return peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=LANGUAGE, modules_to_save=parts)).eval()


def hooked(net: Any, folder: Any) -> Any:
    """On every module, each call kept by name and shape."""
    net.calls = Counter()

    def keep(name: str, kind: str) -> Callable:
        def hook(module: nn.Module, *given: Any) -> None:
            seen = next(iter(given[-1]), None) if isinstance(given[-1], tuple) else given[-1]
            net.calls[name, kind, tuple(seen.shape) if isinstance(seen, torch.Tensor) else None] += 1

        return hook

    for name, module in net.named_modules():
        if name and "rotary" not in name:
            module.register_forward_hook(keep(name, "forward"))
            module.register_forward_pre_hook(keep(name, "before"))
            if isinstance(module, (nn.Linear, nn.LayerNorm, nn.GELU, nn.Sequential)):
                module.register_full_backward_hook(keep(name, "backward"))
    return net


def one_hook(net: Any, folder: Any) -> Any:
    """On parts that ours read or write without calling them, while their neighbours have none."""
    net.calls = Counter()
    names = ("blocks.1.norm2", "merger.mlp.1", "merger.act_fn", "layers.0.self_attn.k_proj", "layers.0.mlp.act_fn")
    for name, module in net.named_modules():
        if name.endswith(names):
            module.register_forward_hook(lambda *_, name=name: net.calls.update([name]))
    return net


def copied(net: Any, folder: Any) -> Any:
    copy_of = copy.deepcopy(net)
    with torch.no_grad():  # what runs the original's weights shows
        for parameter in net.parameters():
            parameter.zero_()
    return copy_of


def compiled(net: Any, folder: Any) -> Any:
    torch._dynamo.reset()
    net.compile(backend="eager")
    return net


WAYS = {
    "plain": Way(plain),
    "reentrant": Way(checkpointed(True), training=True),
    "checkpointed": Way(checkpointed(False), training=True),
    "device_map": Way(on_disk, left="a hook that offloads", gradients=False),
    "cpu_offload": Way(offloaded, left="a hook that offloads", memory=False, gradients=False),
    "fsdp": Way(sharded, low=True, memory=False),
    "fsdp_lora": Way(
        lambda *given: sharded(adapted(target_modules=LANGUAGE)(*given), None), low=True, exact="lora", memory=False
    ),
    "lora": Way(adapted(target_modules=LANGUAGE), training=True),
    "lora_in_both": Way(adapted(target_modules="all-linear"), training=True),
    "alora": Way(adapted(target_modules=LANGUAGE, alora_invocation_tokens=[13])),
    "by_row": Way(adapted(target_modules=LANGUAGE), arguments={"adapter_names": ["one", "two"]}),
    "modules_to_save": Way(whole_parts),
    "ln_tuning": Way(tuned_norms),
    "hooks": Way(hooked),
    "one_hook": Way(one_hook),
    "deepcopy": Way(copied),
    "compile": Way(compiled, memory=False),
    "autocast": Way(plain, low=True),
}


@pytest.fixture(autouse=True)
def restored():
    adapter.restore()
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", adapter.PatchWarning)  # what was wrapped since keeps what it has
        adapter.restore()


@pytest.fixture(scope="module")
def process_group():
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class _Saved(torch.autograd.graph.saved_tensors_hooks):
    """Bytes that autograd keeps for the backward, each memory once, parameters left out."""

    def __init__(self, net: nn.Module) -> None:
        parameters = {_memory(p) for p in net.parameters()}
        self.kept: dict[int, torch.Tensor] = {}

        def pack(x: torch.Tensor) -> torch.Tensor:
            if _memory(x) not in parameters:
                self.kept[_memory(x)] = x
            return x

        super().__init__(pack, lambda x: x)

    def __enter__(self) -> _Saved:
        super().__enter__()
        return self

    @property
    def bytes(self) -> int:
        return sum(x.untyped_storage().nbytes() for x in self.kept.values())


def _memory(x: torch.Tensor) -> int:
    local = x.to_local() if hasattr(x, "to_local") else x  # a shard's
    return local.untyped_storage()._cdata


def forward(net: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    with torch.no_grad():
        return {"logits": net(**inputs).logits.float()[inputs["attention_mask"].bool()]}


def backward(net: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    net.zero_grad()
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    with _Saved(net) as saved:
        loss = net(**inputs, labels=labels).loss
    loss.backward()
    found = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    whole = {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in found.items()}
    return {"loss": loss.detach().float(), "bytes": saved.bytes, "gradients": {n: g.float() for n, g in whole.items()}}


def generate(net: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    settings = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": PAD, "suppress_tokens": [IMAGE, VIDEO]}
    given = net.generate(**inputs, **settings, return_dict_in_generate=True, output_logits=True)
    return {"tokens": given.sequences[:, -3:], "logits": given.logits[0].float()}


DEEDS = {"forward": forward, "backward": backward, "generate": generate}


def _results(way: Way, family: str, patched: str, first: bool, folder: Any) -> dict[str, dict[str, Any]]:
    """What comes of each deed, and how often checkpoints and hooks were called."""
    net = model(family)

    def patch() -> None:
        if patched != "stock":
            adapter.apply(None if patched == "class" else net)

    if first:
        patch()
    net = way.prepare(net, folder)
    if not first:
        patch()
    inputs, results = {**prompt(family, ROWS), **way.arguments}, {}
    for deed, do in DEEDS.items():
        stale = next(module for module in net.modules() if hasattr(module, "rope_deltas"))
        stale.rope_deltas = None  # of the batch before
        net.train(way.training and deed == "backward")
        with torch.autocast("cpu", torch.bfloat16, enabled=way is WAYS["autocast"]):
            results[deed] = do(net, inputs) | {"calls": dict(getattr(net, "calls", {}))}
    return results


_stock: dict[tuple[str, str], dict] = {}


@cache
def _exact(name: str, family: str) -> dict[str, dict[str, Any]]:
    return _results(WAYS[name], family, "stock", True, None)


CELLS = [
    pytest.param(
        name,
        family,
        patched,
        first,
        id=f"{name}-{family}-{patched}-{'before' if first else 'after'}",
        marks=[pytest.mark.long] if name == "compile" else [],  # half a minute each
    )
    for name in WAYS
    for family in FAMILIES
    for patched in ("class", "instance")
    for first in (True, False)
    if not (name == "device_map" and patched == "instance" and first)  # a model is loaded before it is patched
]


@pytest.mark.parametrize(("name", "family", "patched", "first"), CELLS)
def test_as_stock(name, family, patched, first, tmp_path, request):
    way = WAYS[name]
    if "fsdp" in name:
        request.getfixturevalue("process_group")
    if name == "cpu_offload" and family == "Qwen3VL" and VERSION < (5, 9):
        pytest.skip("stock cannot: up to 5.8 it indexes the offloaded weight of pos_embed")
    exact = _exact(way.exact, family)
    if (name, family) not in _stock:
        _stock[name, family] = _results(way, family, "stock", True, tmp_path / "stock")
    want = _stock[name, family]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", adapter.PatchWarning)
        got = _results(way, family, patched, first, tmp_path)
    told = [str(one.message) for one in told if one.category is adapter.PatchWarning]
    left = way.left if patched == "instance" and not first else ""
    assert [one for one in told if not left or left not in one] == []
    assert bool(told) == bool(left)
    assert got.keys() == want.keys()
    for deed, results in want.items():
        _assert_as_stock(way, got[deed], results, exact.get(deed, {}))


def _assert_as_stock(way: Way, got: dict[str, Any], want: dict[str, Any], exact: dict[str, Any]) -> None:
    assert got["calls"] == want["calls"]
    for name in ("logits", "loss"):
        if name in want and way.low:
            assert_two_times(got[name], want[name], exact[name], FLOOR)
        elif name in want:
            torch.testing.assert_close(got[name], want[name], rtol=0, atol=ROUNDING * float(want[name].abs().max()))
    if "tokens" in want and not way.low:
        assert torch.equal(got["tokens"], want["tokens"])
    if "bytes" in want and way.memory:
        assert got["bytes"] <= 1.05 * want["bytes"]
    if "gradients" in want:
        assert got["gradients"].keys() == want["gradients"].keys() and (want["gradients"] or not way.gradients)
        for kind in ("visual", "language_model"):
            named = [n for n in want["gradients"] if kind in n]
            if not named:
                continue
            every = [torch.cat([of[n].flatten() for n in named]) for of in (got["gradients"], want["gradients"])]
            if way.low:
                assert_two_times(*every, torch.cat([exact["gradients"][n].flatten() for n in named]), FLOOR)
            else:
                assert relative_error(*every) < ROUNDING
