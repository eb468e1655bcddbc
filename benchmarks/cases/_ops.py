"""What the cases of single ops share: providers made of a call, forward and backward, and the two-times gate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from qwen2vl_kernels import BackendError

from .. import providers
from ..case import Check, Context, Provider, Skip, Workload, two_times

Tensors = Sequence[torch.Tensor]

DTYPE = torch.bfloat16

#: What the cases beside transformers' models import before their processes are forked.
MODELING = ("transformers.models.qwen2_vl.modeling_qwen2_vl",)

BACKENDS = {"cuda": ("triton", "eager"), "cpu": ("eager",)}


def token_counts(context: Context) -> Sequence[int]:
    """On a GPU from a thumbnail's to a long context's; on a CPU, where the formulas run, one."""
    if context.quick:
        return (64,)
    return (1024, 8192, 16384) if context.device.type == "cuda" else (1024,)


def random(context: Context, *shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator(context.device).manual_seed(seed)
    return (torch.randn(shape, generator=generator, device=context.device) * scale).to(DTYPE)


def made(
    name: str,
    make: Callable[[], Callable[[], Any]],
    *,
    module: str | None = None,
    peer: bool = True,
    trial: bool = False,
) -> Provider:
    """The provider of ``make()``, which is called when it is its turn.

    It is skipped where ``module`` is missing or older, or the backend cannot run here.
    """

    def provider() -> Provider:
        if module is not None and (reason := providers.why_not(module)) is not None:
            raise Skip(reason)
        call = make()
        return Provider(name, call, peer=peer, trial=trial, before=getattr(call, "before", None))

    return Provider(name, make=provider, peer=peer, trial=trial, refuses=(BackendError, ImportError))


def compiled(context: Context, function: Callable, tokens: int) -> Callable[[], Callable] | None:
    """What makes ``function`` through torch.compile, on a GPU at one size, as each takes seconds; else ``None``."""
    if context.device.type != "cuda" or tokens != 8192:
        return None

    def make() -> Callable:
        keep_for_another_backward()
        return torch.compile(function, dynamic=False)

    return make


def keep_for_another_backward() -> None:
    """Let what is compiled from now on go backward again and again: by default it gives its memory away."""
    from torch._functorch import config

    config.donated_buffer = False


class Op:
    """One op on one set of inputs, with who runs it.

    Args:
        formula: what transformers does, written out, in the inputs' precision; it is a peer, also compiled, and in
            float64 the truth. It and all others take the inputs and return a tensor or a tuple.
        ours: called with the inputs and ``backend=``.
        inputs: tensors; those in ``constants`` stay as they are in float64 and have no gradient.
        written: tensors that come after the constants and are written into: whoever runs has copies of its own, or the
            gate would compare one memory with itself.
        peers: name -> (module that must be there, function that makes the callable). A callable with a true attribute
            ``in_place`` overwrites its inputs: it gets copies of its own, restored before every sample.
    """

    def __init__(
        self,
        context: Context,
        formula: Callable,
        ours: Callable,
        inputs: Tensors,
        constants: Tensors = (),
        written: Tensors = (),
        peers: Mapping[str, tuple[str, Callable[[], Callable]]] | None = None,
        floor: float = 1e-6,
    ) -> None:
        self.context, self.formula, self.ours, self.floor = context, formula, ours, floor
        self.inputs, self.constants, self.written = tuple(inputs), tuple(constants), tuple(written)
        self.peers = dict(peers or {})

    def forward(self, series: str, tokens: int, *, bytes: float, flops: float | None = None) -> Workload:
        def prepare(run: Callable) -> Callable[[], Any]:
            return partial(run, *self.inputs, *self.constants, *(x.clone() for x in self.written))

        return self._workload(series, tokens, prepare, bytes, flops)

    def backward(self, series: str, tokens: int, *, bytes: float, flops: float | None = None) -> Workload:
        """The gradients of the inputs alone: the forward is done before the clock starts."""
        return self._workload(f"{series}, backward", tokens, self._gradient, bytes, flops)

    def _workload(self, series: str, tokens: int, prepare: Callable, bytes: float, flops: float | None) -> Workload:
        contenders = [
            made(backend, lambda b=backend: prepare(partial(self.ours, backend=b)), peer=False)
            for backend in BACKENDS[self.context.device.type]
        ]
        contenders.append(made("transformers' formula", lambda: prepare(self.formula)))
        if (fast := compiled(self.context, self.formula, tokens)) is not None:
            contenders.append(made("the same, torch.compile", lambda: prepare(fast())))
        for peer, (module, make) in self.peers.items():
            contenders.append(self._peer(peer, module, make, prepare))
        return Workload(
            f"{series}, {tokens} tokens",
            contenders,
            gate=partial(self._gate, prepare),
            bytes=bytes,
            flops=flops,
            dtype=DTYPE,
            series=series,
            size=tokens,
        )

    def _peer(self, name: str, module: str, make: Callable[[], Callable], prepare: Callable) -> Provider:
        def prepared() -> Callable[[], Any]:
            run = make()
            if not getattr(run, "in_place", False):
                return prepare(run)
            originals = self.inputs
            copies = self.inputs = tuple(x.clone() for x in originals)
            try:
                call = prepare(run)
            finally:
                self.inputs = originals
            resets = [*zip(copies, originals, strict=True), *getattr(call, "gradients", ())]
            return _Restored(call, resets)

        return made(name, prepared, module=module)

    def _gradient(self, run: Callable) -> Callable[[], Tensors]:
        with torch.inference_mode(False), torch.enable_grad():
            inputs = [x.clone().requires_grad_() for x in self.inputs]
            outputs = _tuple(run(*inputs, *(c.clone() for c in self.constants)))
            grads = [self._grad(n, o) for n, o in enumerate(outputs)]

        def call() -> Tensors:
            with torch.inference_mode(False):
                return torch.autograd.grad(outputs, inputs, grads, retain_graph=True)

        call.gradients = [(g, g.clone()) for g in grads]  # for peers that write into what they are given
        return call

    def _grad(self, n: int, output: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator(output.device).manual_seed(100 + n)
        shape = (output.numel(),)
        made = torch.randn(shape, generator=generator, device=output.device).to(DTYPE)
        return made.view(output.shape).to(output.dtype)

    def _gate(self, prepare: Callable, outputs: Mapping[str, Any]) -> list[Check]:
        keep = self.inputs, self.written
        low = _tuple(prepare(self.formula)())
        self.inputs, self.written = (tuple(x.double() if x.is_floating_point() else x for x in xs) for xs in keep)
        try:
            exact = _tuple(prepare(self.formula)())
        finally:
            self.inputs, self.written = keep
        return [
            two_times(f"{name}, result {n}", got, low[n].view(got.shape), exact[n].view(got.shape), self.floor, name)
            for name, results in outputs.items()
            for n, got in enumerate(_tuple(results))
        ]


class _Restored:
    """A call that overwrites what it is given, and ``before`` it, what puts that right."""

    def __init__(self, call: Callable[[], Any], resets: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.call, self.resets = call, resets

    def __call__(self) -> Any:
        return self.call()

    def before(self) -> None:
        for target, source in self.resets:
            target.copy_(source)


def _tuple(results: Any) -> Tensors:
    return (results,) if isinstance(results, torch.Tensor) else tuple(results)
