"""The whole model at the 2B's shapes with random bf16 weights: vision tower, prefill, decoding, peak memory.

Both models map the same checkpoint and take turns in one process; peak memory is taken in a process each. An exact run
at full size is too dear for a gate, so the gate compares small shapes in float32, and in bf16 holds the 2B's widths
with two layers to the two-times rule, at lengths that take the same kernels as the full ones.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import cast

import torch

from qwen2vl import Qwen2VLConfig

from .. import providers
from ..case import Case, Check, Context, Provider, Workload, relative_error, two_times
from ..random_checkpoint import small_config
from ._ops import MODELING
from ._qwen2vl import (
    MODELS,
    Ours,
    Transformers,
    by_graph,
    checkpoint,
    decode_bytes,
    decode_flops,
    graph_check,
    make_prompt,
    prefill_flops,
    unallocated,
    vision_flops,
    weight_bytes,
    wide_config,
)
from ._worker import in_subprocess

#: Rounding of float32 through a few layers: two orders of the same sums differ by less.
_FLOAT32 = 1e-5


@dataclass(frozen=True)
class Sizes:
    """``side``: patches of the image's edge; ``text``: text tokens, vision marks included; ``steps``: decoded."""

    side: int
    text: int
    steps: int


FULL = Sizes(side=72, text=37, steps=16)  # 1008 x 1008 pixels, 1296 + 37 = 1333 tokens
QUICK = Sizes(side=16, text=20, steps=4)
GATE = Sizes(side=34, text=20, steps=3)  # 1156 patches and 309 tokens: long enough for the blocked attention


def gate(context: Context) -> list[Check]:
    """Ours against transformers on one small model in float32, and by the two-times rule in bf16 at full width.

    Where transformers is missing or fails, ours in bf16 against our own eager float32 run.
    """
    if providers.why_not("transformers") is not None:
        return _gate_alone(context)
    try:
        return _gate_beside(context)
    except Exception as error:  # if it was one of ours, it comes again
        if "CUDA error" in str(error):
            raise
        traceback.print_exc()
        return _gate_alone(context)


def _gate_beside(context: Context) -> list[Check]:
    device = context.device
    # Weights of 0.1: at 0.02 a small model passes its input through and a wrong layer would hardly show.
    folder = checkpoint(context, "small-gate", small_config(), torch.float32, 0.1)
    ours, theirs = (_outputs(kind(folder, device, torch.float32), GATE, device) for kind in (Ours, Transformers))
    checks = [Check(f"float32 {k}", relative_error(ours[k], theirs[k]), _FLOAT32) for k in ours]
    wide = small_config() if context.quick else wide_config(2)
    folder = checkpoint(context, "small" if context.quick else "2b-2-layers", wide)
    exact = _outputs(Transformers(folder, device, torch.float32), GATE, device)
    low = _outputs(Transformers(folder, device), GATE, device)
    ours = Ours(folder, device)
    got = _outputs(ours, GATE, device)
    checks += [two_times(f"bf16 {k}, 2x transformers' error", got[k], low[k], exact[k]) for k in got]
    if device.type == "cuda":
        prompt, tower = make_prompt(ours.config, GATE.side, GATE.text, GATE.steps, device), "vision from bytes"
        checks.append(graph_check(ours, prompt.pixels, prompt.grid, low[tower], exact[tower]))
    return checks


def _gate_alone(context: Context) -> list[Check]:
    """Without a peer, our bf16 against our own eager float32 run."""
    from qwen2vl_kernels import use_backend

    device = context.device
    folder = checkpoint(context, "small-gate", small_config(), torch.float32, 0.1)
    with use_backend("eager"):
        exact = _outputs(Ours(folder, device, torch.float32), GATE, device)
        low = _outputs(Ours(folder, device), GATE, device)
    got = _outputs(Ours(folder, device), GATE, device)
    return [two_times(f"bf16 {k}, 2x eager's error", got[k], low[k], exact[k], 1e-4) for k in got]


def _outputs(model: Ours | Transformers, sizes: Sizes, device: torch.device) -> dict[str, torch.Tensor]:
    """What each part of the model makes of one prompt; later parts are fed with given features, not with errors."""
    prompt = make_prompt(model.config, sizes.side, sizes.text, sizes.steps, device)
    outputs = {"vision from floats": model.vision(prompt.rows, prompt.grid)}
    bytes_ = prompt.pixels if isinstance(model, Ours) else prompt.rows
    outputs["vision from bytes"] = model.vision(bytes_, prompt.grid)
    features = torch.randn(outputs["vision from floats"].shape, generator=torch.Generator().manual_seed(1))
    features = (0.02 * features).to(outputs["vision from floats"])
    outputs["prefill"] = model.prefill(prompt, features)
    outputs["decode"] = model.decode(prompt)
    return {name: output.float() for name, output in outputs.items()}


def workloads(context: Context) -> Iterator[Workload]:
    sizes = QUICK if context.quick else FULL
    name, preset = ("small", small_config()) if context.quick else ("2b", Qwen2VLConfig.preset("2b"))
    folder, device = checkpoint(context, name, preset), context.device
    config = Qwen2VLConfig.from_pretrained(folder)
    reason = providers.why_not("transformers")
    peak = partial(in_subprocess, "peak", folder=folder, device=device, side=sizes.side, text=sizes.text, steps=8)
    yield Workload(
        name=f"{name}: memory of load, image, prompt, 8 steps",
        providers=_each(reason, lambda who: Provider(who, partial(peak, who), peer=who != "ours")),
        units={"peak": "B", "weights": "B", "peak - weights": "B"},
        late=True,
        min_rounds=1,
        max_rounds=1,
    )

    @cache
    def model(who: str) -> Ours | Transformers:
        return MODELS[who](folder, device)

    prompt = make_prompt(config, sizes.side, sizes.text, sizes.steps, device)
    warm_up = make_prompt(config, GATE.side, GATE.text, GATE.steps, device)

    def tower(who: str, rows: str) -> Provider:
        title = f"{who}, uint8 pixels" if rows == "pixels" else who

        def make() -> Provider:
            call = partial(model(who).vision, getattr(prompt, rows), prompt.grid)
            # A whole call takes a minute on a small machine; a small image touches all weights too.
            warm = partial(model(who).vision, getattr(warm_up, rows), warm_up.grid)
            return Provider(title, call, peer=who != "ours", warm=warm if device.type == "cpu" else None)

        return Provider(title, make=make, peer=who != "ours")

    patches = prompt.rows.shape[0]
    yield Workload(
        name=f"{name}: vision tower, {patches} patches",
        providers=[
            tower("ours", "pixels"),
            by_graph(lambda: cast(Ours, model("ours")), prompt.pixels, prompt.grid),
            *_each(reason, lambda who: tower(who, "rows")),
        ],
        flops=vision_flops(config.vision, patches),
        bytes=weight_bytes(unallocated(config).visual),
        dtype=torch.bfloat16,
        min_rounds=2,
        budget_s=10.0,
    )

    features = torch.randn(patches // 4, config.text.hidden_size, generator=torch.Generator().manual_seed(1))
    features = (0.02 * features).to(device, torch.bfloat16)

    def filling(who: str) -> Provider:
        make = lambda: Provider(who, partial(model(who).prefill, prompt, features), peer=who != "ours")  # noqa: E731
        return Provider(who, make=make, peer=who != "ours")

    yield Workload(
        name=f"{name}: prefill, {prompt.tokens} tokens",
        providers=_each(reason, filling),
        flops=prefill_flops(config.text, prompt.tokens),
        bytes=decode_bytes(config.text, 0, 2),
        dtype=torch.bfloat16,
        min_rounds=3,
        budget_s=10.0,
    )

    def decoding(who: str) -> Provider:
        def make() -> Provider:
            filled = model(who)
            filled.prefill(prompt, features)
            rewind = partial(filled.rewind, prompt)
            return Provider(who, partial(filled.decode, prompt), peer=who != "ours", before=rewind)

        return Provider(who, make=make, peer=who != "ours")

    seen = prompt.tokens + sizes.steps // 2
    yield Workload(
        name=f"{name}: decode, a token after {prompt.tokens}",
        providers=_each(reason, decoding),
        flops=decode_flops(config.text, seen),
        bytes=decode_bytes(config.text, seen, 2),
        dtype=torch.bfloat16,
        per_call=sizes.steps,
        min_rounds=5,
        budget_s=20.0,
    )


def _each(reason: str | None, make: Callable[[str], Provider]) -> list[Provider]:
    """Ours and transformers, or the reason why not."""
    peer = make("transformers") if reason is None else Provider("transformers", skipped=reason, peer=True)
    return [make("ours"), peer]


CASE = Case(
    "model",
    "Qwen2-VL with random bf16 weights, beside transformers with sdpa",
    workloads,
    gate,
    imports=MODELING,
)
