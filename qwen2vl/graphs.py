"""CUDA graphs of parts of a model: what captures one, where its memory comes from, and what it holds for.

Steps of decoding (:mod:`qwen2vl.decoding`) and the vision tower (:mod:`qwen2vl.tower_graph`) are captured by this.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from qwen2vl_kernels.core.backends import PREFERENCE, forced, forced_everywhere, resolve

from .adapter import adapted
from .cache import KVCache
from .moe import Experts, SeparateExperts
from .quantised_experts import QuantExperts

if TYPE_CHECKING:
    from .model import Qwen2VL

_lock = Lock()
_pools: WeakKeyDictionary[nn.Module, dict[Any, Any]] = WeakKeyDictionary()


def unfit(model: Qwen2VL, part: nn.Module) -> str:
    """Why ``part`` of ``model`` cannot be captured, "" where it can."""
    if not KVCache.asynchronous(model.device):
        return f"wants a model on a CUDA device, and QWEN2VL_GRAPHS=1 in the environment, it is on {model.device}"
    if model.parallel is not None:
        return "the model is split over processes, whose sums no graph of ours holds"
    return unfit_for_keeping(model, part) or _read_on_the_host(model, part)


def unfit_for_keeping(model: Qwen2VL, part: nn.Module) -> str:
    """Why what ``part`` of ``model`` does may not be kept from one call for the next, "" where it may."""
    if adapted(model):
        return "the model has an adapter, which may be switched without notice; merge_adapter() first"
    if any(one._forward_hooks or one._forward_pre_hooks for one in part.modules()):
        return "the model has hooks, which a replay would not call"
    return ""


def _read_on_the_host(model: Qwen2VL, part: nn.Module) -> str:
    if any(isinstance(one, SeparateExperts) for one in part.modules()):
        return "which experts have tokens is read on the host, as they are not quantised alike"
    for kind, op in ((Experts, "grouped_linear"), (QuantExperts, "grouped_quant_linear")):
        if any(isinstance(one, kind) for one in part.modules()) and resolve(op, model.device.type, None) != "triton":
            return f"which experts have tokens is read on the host; backend 'triton' of {op} does not read it"
    return ""


def weights_of(part: nn.Module) -> tuple:
    """Where the parameters lie that a graph reads; values may change there."""
    return tuple((one.data_ptr(), one.dtype, one.shape) for one in part.parameters())


def versions_of(part: nn.Module) -> tuple:
    """What changes with any parameter or buffer, as far as PyTorch counts changes: of those made in inference mode, and
    of what is reached through ``Tensor.data``, it does not."""
    held = (*part.parameters(), *part.buffers())
    return tuple((one.data_ptr(), one.dtype, one.shape, None if one.is_inference() else one._version) for one in held)


def setting_of(device: torch.device) -> tuple:
    """What a graph is captured under, beside its weights; first the stream on which it is replayed, as graphs that
    share memory must not run side by side."""
    kind = device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    stream = torch.cuda.current_stream(device) if kind == "cuda" else None
    precise = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
    return stream, autocast, *precise, forced_everywhere(), *map(forced, PREFERENCE)


def round_up(count: int) -> int:
    """The next power of two or one and a half times one, so that few graphs serve many sizes."""
    above = 1 << (count - 1).bit_length()
    return above * 3 // 4 if count <= above * 3 // 4 else above


def new_pool() -> Any:
    """Memory that graphs share."""
    return torch.cuda.graph_pool_handle()


def pool_of(model: nn.Module, setting: tuple) -> Any:
    """What all graphs of ``model`` that are replayed on one stream share: there each is done, and its result read or
    copied, before the next one begins."""
    with _lock:
        pools = _pools.setdefault(model, {})
        if setting[0] not in pools:
            pools[setting[0]] = new_pool()
        return pools[setting[0]]


def capturing(device: torch.device) -> bool:
    """Whether a graph is captured now, by whomever."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def capture(
    run: Callable[[], torch.Tensor], device: torch.device, pool: Any
) -> tuple[Callable[[], None], torch.Tensor]:
    """Run it twice, so that kernels are compiled and libraries have their workspaces, and capture it; returns what
    replays it, and its result, which every replay overwrites."""
    with torch.cuda.device(device):
        here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            for _ in range(2):
                run()
        here.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as one that loads data, may allocate meanwhile.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            result = run()
    return graph.replay, result
