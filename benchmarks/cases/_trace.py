"""What one forward of a vision tower is made of: seconds, launches and bytes, part by part.

Every operation that PyTorch dispatches, and every Triton kernel that our ops launch beside the dispatcher, runs inside
a range of PyTorch's profiler that has the name of its part. The part follows from the parameter that an operation
touches and, between products, from the last one touched: the same rules sort any implementation of the same tower.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch.autograd import DeviceType  # pyright: ignore[reportPrivateImportUsage]
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

from qwen2vl_kernels.core import launching

#: "copies" are those around the blocks' products and residual additions; "other" is what comes before the first.
LAYER = ("linear", "attention", "rotary", "norm", "activation", "residual, copies")
#: Parts that happen once a forward, not once a layer.
ONCE = ("patch embedding", "merger", "other")
PARTS = (*LAYER, *ONCE)

_PREFIX = "part: "
#: Modules of our Triton kernels whose part is always the same; the others' follows as an operation's does.
_KERNELS = {"attention_forward": "attention", "rotary": "rotary", "norm": "norm", "elementwise": "activation"}
_PRODUCTS = ("mm", "bmm", "matmul", "softmax", "attention")


@dataclass
class Trace:
    """One forward by part.

    ``launches`` are kernels on a GPU, on a CPU operations that are no views. ``bytes`` counts every tensor that one of
    them reads and every one that it writes once, whatever caches or the kernel make of it.
    """

    seconds: Counter[str] = field(default_factory=Counter)
    launches: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)

    def of_layers(self, counter: Counter[str]) -> float:
        """The sum over the parts that every layer has."""
        return sum(counter[part] for part in LAYER)


def trace(call: Callable[[], Any], tower: torch.nn.Module) -> Trace:
    """Run ``call``, which runs ``tower`` once, and sort what it does. Warm up before."""
    device = next(tower.parameters()).device
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    found, sorter = Trace(), _Sorter(tower)
    with profile(activities=activities) as profiler, sorter, sorter.kernels():
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    found.bytes = sorter.bytes
    events: list[Any] = list(profiler.events() or ())
    if device.type == "cuda":
        _of_kernels(found, [e for e in events if e.device_type == DeviceType.CUDA])
        return found
    found.launches = sorter.launches
    for event in events:
        if event.name.startswith(_PREFIX):
            found.seconds[event.name.removeprefix(_PREFIX)] += event.cpu_time_total * 1e-6
    return found


def _of_kernels(found: Trace, events: list[Any]) -> None:
    """A GPU's events are kernels, and ranges drawn around the kernels that were launched inside of them."""
    ranges = sorted(
        (e.time_range.start, e.time_range.end, e.name.removeprefix(_PREFIX))
        for e in events
        if e.name.startswith(_PREFIX)
    )
    at = 0
    for event in sorted((e for e in events if not e.name.startswith(_PREFIX)), key=lambda e: e.time_range.start):
        while at + 1 < len(ranges) and ranges[at + 1][0] <= event.time_range.start:
            at += 1
        inside = bool(ranges) and ranges[at][0] <= event.time_range.start <= ranges[at][1]
        part = ranges[at][2] if inside else "other"
        found.launches[part] += 1
        found.seconds[part] += (event.time_range.end - event.time_range.start) * 1e-6


class _Sorter(TorchDispatchMode):
    def __init__(self, tower: torch.nn.Module) -> None:
        super().__init__()
        self.weights = {p.data_ptr(): name for name, p in tower.named_parameters()}
        #: Parameters in another dtype, for the next product, kept so that their memory is nobody else's until then.
        self.converted: dict[int, tuple[str, torch.Tensor]] = {}
        self.last = ""  # the parameter touched last
        self.attending = False  # a product without parameters has come since the projection to q, k and v
        self.bytes: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = list(_tensors((args, kwargs)))
        operation = func.overloadpacket.__name__
        part = self.part(operation, given)
        with record_function(_PREFIX + part):
            result = func(*args, **kwargs)
        if operation not in ("to", "_to_copy"):
            if any(x.data_ptr() in self.converted for x in given):
                self.converted.clear()
        elif given[0].data_ptr() in self.weights:
            self.converted[result.data_ptr()] = (self.weights[given[0].data_ptr()], result)
        moved = _moved(func._schema, args, kwargs, result)
        self.bytes[part] += moved
        self.launches[part] += moved > 0
        return result

    @contextmanager
    def kernels(self) -> Iterator[None]:
        """Inside, our Triton kernels are sorted as well, which the dispatcher does not see."""

        def launch(kernel: Any, grid: Any, device: Any, **named: Any) -> None:
            given = list(_tensors(tuple(named.values())))
            part = _KERNELS.get(kernel.__module__.rpartition(".")[2]) or self.part(kernel.__name__, given)
            with record_function(_PREFIX + part):
                launching.launch(kernel, grid, device, **named)
            self.bytes[part] += sum(map(_bytes, given))
            self.launches[part] += 1

        with ExitStack() as stack:
            for module in [m for name, m in sys.modules.items() if name.startswith("qwen2vl_kernels.")]:
                if module is not launching and getattr(module, "launch", None) is launching.launch:
                    stack.enter_context(mock.patch.object(module, "launch", launch))
            yield

    def part(self, operation: str, given: list[torch.Tensor]) -> str:
        names = self.weights | {at: name for at, (name, _) in self.converted.items()}
        touched = next((names[x.data_ptr()] for x in given if x.data_ptr() in names), None)
        if touched is not None and "merger" not in self.last:
            self.last, self.attending = touched, False
        for word, part in (("merger", "merger"), ("patch_embed", "patch embedding")):
            if word in self.last and (touched or word == "merger"):
                return part
        if touched is not None:
            return "norm" if "norm" in touched else "linear"
        if ".qkv." in self.last:
            # Whole heads are turned; the attention on a CPU copies them one by one.
            self.attending |= any(word in operation for word in _PRODUCTS)
            alone = max((x.ndim for x in given), default=0) < 3
            return "attention" if self.attending or alone else "rotary"
        if ".fc1." in self.last:
            return "activation"
        return "residual, copies" if self.last else "other"


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, dict):
        yield from _tensors(list(values.values()))
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _tensors(value)


def _moved(schema: Any, args: tuple, kwargs: dict[str, Any], result: Any) -> int:
    """Bytes read and written; none by views, and none by what only allocates."""
    if schema.name.rpartition("::")[2].startswith(("empty", "new_empty")):
        return 0
    by_name = dict(zip((a.name for a in schema.arguments), args, strict=False)) | kwargs
    read, written = 0, 0
    for argument in schema.arguments:
        size = sum(map(_bytes, _tensors(by_name.get(argument.name))))
        writes = argument.alias_info is not None and argument.alias_info.is_write
        fills = argument.is_out or (writes and schema.name in ("aten::copy_", "aten::fill_", "aten::zero_"))
        written += size * writes
        read += size * (not fills)
    had = {x.untyped_storage().data_ptr() for x in _tensors((args, kwargs))}
    new = sum(_bytes(x) for x in _tensors(result) if x.untyped_storage().data_ptr() not in had)
    return read + written + new if new or written else 0


def _bytes(x: torch.Tensor) -> int:
    """Bytes of the distinct elements: a dimension that is only repeated costs nothing."""
    return x.element_size() * math.prod(n for n, stride in zip(x.shape, x.stride(), strict=True) if stride)
