"""From the logits to the next token, as chat asks for it: sample_tokens_ beside transformers' own processors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch

from qwen2vl_kernels import sample_tokens_

from ..case import Check, Context, Workload, equal
from ._ops import BACKENDS, DTYPE, made, random

#: The released checkpoints' defaults, and what callers ask for.
SETTINGS = {
    "as released": {"temperature": 0.01, "top_k": 1, "top_p": 0.001, "repetition_penalty": 1.05},
    "top_k and top_p": {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.0},
    "top_p": {"temperature": 1.0, "top_k": 0, "top_p": 0.9, "repetition_penalty": 1.0},
}
TRANSFORMERS = "transformers' processors"
_PROMPT = 1024


def workloads(context: Context, vocabulary: int) -> Iterator[Workload]:
    """Rows of ``vocabulary`` scores; a call's bytes are the logits' and the map's of seen ids, each once."""
    for rows in (1, 8) if context.quick or context.device.type == "cpu" else (1, 8, 64):
        for name, setting in SETTINGS.items():
            yield _choosing(context, rows, vocabulary, name, setting)


def _choosing(context: Context, rows: int, vocabulary: int, name: str, setting: dict[str, Any]) -> Workload:
    logits = random(context, rows, vocabulary, scale=3)
    if setting["top_k"] == 1:
        logits[:, vocabulary // 3] = 30.0  # no other is as high, so that all take it
    prompt = torch.arange(_PROMPT, device=context.device).remainder(vocabulary).expand(rows, -1)
    penalised = setting["repetition_penalty"] != 1
    uniforms = torch.linspace(0.01, 0.99, rows, dtype=torch.float64, device=context.device)

    def ours(backend: str) -> Callable[[], torch.Tensor]:
        seen = None
        if penalised:
            seen = torch.zeros(rows, vocabulary, dtype=torch.bool, device=context.device).scatter_(1, prompt, True)
        return partial(sample_tokens_, logits, uniforms, seen, **setting, backend=backend)

    # On a GPU the kernels come by name until one has run them.
    contenders = [
        made(one, partial(ours, one), peer=False, trial=one == "triton") for one in BACKENDS[context.device.type]
    ]
    contenders.append(made(TRANSFORMERS, lambda: _processors(logits, prompt, setting), module="transformers"))

    def gate(outputs: Mapping[str, Any]) -> list[Check]:
        """The formula's tokens; transformers draws by numbers of its own, so that it is held to those where only one
        token is left."""
        want = ours("eager")()
        held = {who: got for who, got in outputs.items() if who != TRANSFORMERS or setting["top_k"] == 1}
        return [equal(f"{who}'s tokens", got, want, who) for who, got in held.items()]

    return Workload(
        f"choice of {vocabulary:,} ids, {name}: {rows} rows",
        contenders,
        gate=gate,
        bytes=logits.nbytes + rows * vocabulary * penalised,
        dtype=DTYPE,
    )


def _processors(logits: torch.Tensor, prompt: torch.Tensor, setting: dict[str, Any]) -> Callable[[], torch.Tensor]:
    """What its ``generate`` does between the logits and a token."""
    from transformers import LogitsProcessorList
    from transformers.generation import logits_process as kinds

    chain = LogitsProcessorList()
    if setting["repetition_penalty"] != 1:
        chain.append(kinds.RepetitionPenaltyLogitsProcessor(setting["repetition_penalty"]))
    chain.append(kinds.TemperatureLogitsWarper(setting["temperature"]))
    if setting["top_k"]:
        chain.append(kinds.TopKLogitsWarper(setting["top_k"]))
    chain.append(kinds.TopPLogitsWarper(setting["top_p"]))

    def choose() -> torch.Tensor:
        scores = chain(prompt, logits.float())  # pyright: ignore[reportArgumentType]
        return torch.multinomial(scores.softmax(-1), 1).squeeze(1)

    return choose
