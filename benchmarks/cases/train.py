"""Training on samples of mixed lengths: packing and the chunked loss beside padded batches and full logits.

A step takes the same four samples on both sides, transformers' padded to the longest, as its users' loops do; the same
optimizer updates the same parameters, and tokens/s count real tokens, never padding. On a CPU everything is float32:
not every one has bf16 matrix units, and without them PyTorch's bf16 products measure an emulation.

Transformers also runs with its samples sorted by length first, the best that padding can do, which trainers offer at
the price of batches that are all alike. Memory is taken in a process for each side.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from qwen2vl import Qwen2VLConfig
from qwen2vl.training.example import Example
from qwen2vl.training.flops import training_flops, work_of
from qwen2vl.training.packing import collate
from qwen2vl.training.stages import PARTS

from .. import providers
from ..case import Case, Check, Context, Provider, Workload, relative_error, two_times
from ..random_checkpoint import small_config
from . import _loss
from ._ops import MODELING
from ._qwen2vl import checkpoint
from ._training import (
    MIX,
    SIDES,
    SMALL_MIX,
    Ours,
    Transformers,
    gradients,
    grads_on,
    make_samples,
    padded_tokens,
    steps_of,
    train,
    train_config,
)
from ._worker import in_subprocess

#: Rounding of float32 through a few layers and back: two orders of the same sums differ by less.
_FLOAT32 = 1e-5
_FLOAT32_GRADIENTS = 1e-4


@dataclass(frozen=True)
class Sizes:
    """``count`` samples in steps of ``batch``; the loss is measured on ``tokens`` rows of ``width``."""

    count: int
    batch: int
    tokens: int
    width: int
    vocabulary: int


FULL = Sizes(count=24, batch=4, tokens=1024, width=1536, vocabulary=151_936)
QUICK = Sizes(count=4, batch=2, tokens=64, width=32, vocabulary=2048)


def _dtype(context: Context) -> torch.dtype:
    return torch.bfloat16 if context.device.type == "cuda" else torch.float32


def gate(context: Context) -> list[Check]:
    """Same weights, same samples: each step's loss and gradients in float32 on a small model, and every sample's loss
    on the model that is timed, in its dtype."""
    device = context.device
    with grads_on():
        checks = _loss_gate(context)
    if (reason := providers.why_not("transformers")) is not None:
        return checks + _gate_alone(context, reason)
    folder = checkpoint(context, "small-gate", small_config(), torch.float32, 0.1)
    with grads_on():
        sides = [kind(folder, device, torch.float32) for kind in (Ours, Transformers)]
        for n, step in enumerate(steps_of(make_samples(sides[0].config, 8, SMALL_MIX), 4)):
            (got, ours), (want, theirs) = (gradients(side, step) for side in sides)
            checks.append(Check(f"float32 loss of step {n}", relative_error(got, want), _FLOAT32))
            missing = sorted(set(ours) ^ set(theirs))
            if missing:
                checks.append(Check(f"float32 gradients of step {n}: {missing[0]} has one on one side", 1, 0))
                continue
            worst = max(ours, key=lambda name: relative_error(ours[name], theirs[name]))
            error = relative_error(ours[worst], theirs[worst])
            checks.append(Check(f"float32 gradients of step {n}, worst of {worst}", error, _FLOAT32_GRADIENTS))
        checks.append(_losses(context, device))
    return checks


def _losses(context: Context, device: torch.device) -> Check:
    """Every sample's loss with the weights and in the dtype that are timed."""
    sizes, folder, dtype = _sizes(context), _folder(context), _dtype(context)

    def losses(kind: type[Ours] | type[Transformers], precision: torch.dtype) -> torch.Tensor:
        side = kind(folder, device, precision)
        steps = steps_of(make_samples(side.config, sizes.count, _mix(context)), sizes.batch)
        return torch.cat([side.losses(side.prepare(step)) for step in steps])

    got, exact = losses(Ours, dtype), losses(Transformers, torch.float32)
    if dtype == torch.float32:
        return Check("float32 loss of every sample", relative_error(got, exact), _FLOAT32)
    return two_times("bf16 loss of every sample", got, losses(Transformers, dtype), exact, _FLOAT32)


def _gate_alone(context: Context, reason: str) -> list[Check]:
    """Without a peer, the packed losses against those of samples one by one with full logits."""
    folder = checkpoint(context, "small-gate", small_config(), torch.float32, 0.1)
    with grads_on():
        side = Ours(folder, context.device, torch.float32)
        samples = make_samples(side.config, 8, SMALL_MIX)
        packed = side.losses(samples)
        side.step.loss = "full"
        with torch.no_grad():
            packs = [collate([e], side.config).to(context.device) for e in samples]
            alone = torch.stack([side.step(pack) for pack in packs])
    return [Check(f"float32 packed against alone ({reason})", relative_error(packed, alone), _FLOAT32)]


def _sizes(context: Context) -> Sizes:
    return QUICK if context.quick else FULL


def _mix(context: Context):
    return SMALL_MIX if context.quick else MIX


def _folder(context: Context) -> Path:
    if context.quick:
        return checkpoint(context, "small-gate", small_config(), torch.float32, 0.1)
    return checkpoint(context, "train", train_config(), torch.float32)


def workloads(context: Context) -> Iterator[Workload]:
    yield from _loops(context)
    yield from _memory(context)
    yield from _loss_rows(context)


def _loops(context: Context) -> Iterator[Workload]:
    sizes, folder, dtype, device = _sizes(context), _folder(context), _dtype(context), context.device
    reason = providers.why_not("transformers")
    config = Qwen2VLConfig.from_pretrained(folder)
    samples = make_samples(config, sizes.count, _mix(context))
    steps = steps_of(samples, sizes.batch)
    by_length = steps_of(sorted(samples, key=lambda e: e.tokens), sizes.batch)
    shortest = [min(samples, key=lambda e: e.tokens)]

    def provider(name: str, kind: type[Ours] | type[Transformers], order: list[list[Example]]) -> Provider:
        def make() -> Provider:
            with grads_on():
                side = kind(folder, device, dtype)
                call = partial(train, side, [side.prepare(step) for step in order])
                # A pass takes ten seconds on a small machine; a short sample touches all weights and states too.
                warm = partial(train, side, [side.prepare(shortest)])
            return Provider(name, call, peer=name != "ours", warm=warm)

        return Provider(name, make=make, peer=name != "ours")

    contenders = [provider("ours", Ours, steps)]
    if reason is None:
        for name, order in (("transformers", steps), ("transformers, sorted by length", by_length)):
            contenders.append(provider(name, Transformers, order))
    else:
        contenders.append(Provider("transformers", skipped=reason, peer=True))
    tokens = sum(e.tokens for e in samples)
    waste, least = (1 - tokens / padded_tokens(order) for order in (steps, by_length))
    flops = sum(training_flops(config, work_of(collate(step, config)), set(PARTS)) for step in steps)
    yield Workload(
        name=f"all parts, {len(steps)} steps of {sizes.batch} samples, {tokens} tokens; "
        f"of padded batches {100 * waste:.0f} % are padding, sorted {100 * least:.0f} %",
        providers=contenders,
        flops=flops / tokens,
        dtype=dtype,
        per_call=tokens,
        unit="token",
        min_rounds=2,
        max_rounds=3,
        budget_s=60.0,
    )


def _memory(context: Context) -> Iterator[Workload]:
    sizes, reason = _sizes(context), providers.why_not("transformers")
    measured = partial(
        in_subprocess,
        "train",
        folder=_folder(context),
        device=context.device,
        dtype=str(_dtype(context)).removeprefix("torch."),
        count=sizes.count,
        batch=sizes.batch,
    )
    for checkpointing in (False,) if context.quick else (False, True):
        yield Workload(
            name=f"memory of the longest of these steps, activations {'checkpointed' if checkpointing else 'kept'}",
            providers=[
                Provider(who, partial(measured, who, checkpointing=checkpointing), peer=who != "ours")
                if who == "ours" or reason is None
                else Provider(who, skipped=reason, peer=True)
                for who in SIDES
            ],
            units={"peak": "B", "peak over the state": "B"},
            min_rounds=1,
            max_rounds=1,
        )


# ----------------------------------------------------------------------------------------------------------- the loss


def _loss_rows(context: Context) -> Iterator[Workload]:
    sizes, device, dtype = _sizes(context), context.device, _dtype(context)
    shape = {"tokens": sizes.tokens, "width": sizes.width, "vocabulary": sizes.vocabulary}
    alone = partial(in_subprocess, "loss", folder="", device=device, dtype=str(dtype).removeprefix("torch."), **shape)
    name = f"loss, {sizes.tokens} rows of {sizes.width}, vocabulary {sizes.vocabulary}"
    providers = []
    for kind, title in _loss.KINDS.items():
        reason = _loss.why_not(kind, device)
        call = partial(alone, kind) if reason is None else None
        providers.append(Provider(title, call, skipped=reason, peer=kind not in _loss.OURS))
    yield Workload(
        name=name,
        providers=providers,
        units={"seconds": "s", "peak over the inputs": "B"},
        min_rounds=2,
        max_rounds=2,
    )
    for itemsize, place in ((4, "cpu"), (2, "cuda")):
        count = partial(_loss.counted_bytes, **shape, itemsize=itemsize, device=place)
        yield Workload(
            name=f"{name}, {'float32 on a CPU' if place == 'cpu' else 'bf16 on a GPU'}, counted",
            providers=[
                Provider(_loss.KINDS[kind], lambda kind=kind, count=count: {"moved": count(kind)}, peer=kind == "full")
                for kind in ("chunked", "triton", "full")
            ],
            units={"moved": "B"},
            min_rounds=1,
            max_rounds=1,
        )


def _loss_gate(context: Context) -> list[Check]:
    """Loss and gradients of two chunks over the whole vocabulary, narrow, as a full width takes seconds a call.

    In float32 beside the full logits; in bf16 by the two-times rule, the full logits of float32 being exact.
    """
    dtype = _dtype(context)
    hidden, weight, targets = inputs = _loss.inputs(300, 64, _sizes(context).vocabulary, context.device, dtype)
    kinds = [kind for kind in _loss.KINDS if kind != "full" and _loss.why_not(kind, context.device) is None]
    parts = ("loss", "gradient of the states", "gradient of the head")
    low = _loss.loss_and_gradients("full", *inputs)
    wide = [x.detach().float().requires_grad_() for x in (hidden, weight)]
    exact = _loss.loss_and_gradients("full", wide[0], wide[1], targets)
    checks = []
    for kind in kinds:
        for part, got, rounded, true in zip(parts, _loss.loss_and_gradients(kind, *inputs), low, exact, strict=True):
            name = f"{_loss.KINDS[kind]} loss: {part}"
            if dtype == torch.float32:
                checks.append(Check(name, relative_error(got, true), _FLOAT32))
            else:
                checks.append(two_times(name, got, rounded, true, _FLOAT32))
    return checks


CASE = Case(
    "train",
    "Training: packing and the chunked loss beside transformers' padded batches",
    workloads,
    gate,
    limit_s=300.0,
    imports=MODELING,
)
