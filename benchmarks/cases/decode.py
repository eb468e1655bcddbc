"""Decoding at the 2B's shapes with random bf16 weights: time to first token, and what each token after it takes.

A contender fills its cache with prompts of text, chooses greedily, and has every token on the host before it counts. A
token's share of the ceiling is that of the bytes that its step must read: each weight of the decoder and the head once
for all rows, and the keys and values of every row. transformers runs by its forward, without what its ``generate``
adds, over the cache that grows and over the static one, and compiled over the latter as its ``generate`` compiles. vLLM
generates as many tokens behind a prompt that it has cached.

Quantised weights, made of the same ones, are compared with them, and with transformers', in workloads of their own, and
so are ways from the logits to a token that is drawn.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Protocol

import torch

from qwen2vl import GenerationConfig, Qwen2VLConfig
from qwen2vl.cache import KVCache
from qwen2vl.choosing import Chooser
from qwen2vl.decoding import Steps, Underway, begin_steps, wants_graphs
from qwen2vl.quantising import quantise
from qwen2vl_kernels import use_backend

from .. import providers
from ..case import Case, Check, Context, Provider, Skip, Workload, equal
from ..random_checkpoint import small_config
from . import _choice
from ._ops import MODELING
from ._qwen2vl import Ours, Transformers, checkpoint, decode_bytes, decode_flops, prefill_flops

DYNAMIC, STATIC, COMPILED = "transformers", "transformers, static cache", "transformers, static cache, compiled"
VLLM = "vLLM"
#: Steps by the kernels that come by name until a GPU has run them; for bfloat16, so that the gate's model has none.
LAUNCHES = "ours, five launches a layer"
_KERNELS = ("kvcache_attention_decode", "decode_attention", "rms_norm_linear", "rms_norm_swiglu", "linear_add")
#: Quantised weights, and what they are compared with.
FORMS, BF16 = ("awq", "gptq-int8", "fp8"), "ours in bf16"
#: Seconds that compiling may take.
COMPILES_S = {"cpu": 600, "cuda": 120}


@dataclass(frozen=True)
class Size:
    """A checkpoint's name, tokens of a prompt, and how many are decoded behind its first one."""

    name: str
    prompt: int
    steps: int


FULL = Size("2b", 1024, 64)
#: A CPU reads a long prompt for minutes; what a step reads are the weights either way.
ON_CPU = Size("2b", 128, 8)
QUICK = Size("small", 24, 4)


class Contender(Protocol):
    """One that decodes; tokens are given as ``(rows, steps)`` on the host."""

    def fill(self) -> torch.Tensor:
        """Read the prompts, and choose the first token of each, ``(rows, 1)``."""
        ...

    def rewind(self) -> None:
        """Forget what was decoded behind the first tokens."""
        ...

    def decode(self) -> torch.Tensor:
        """The tokens behind the first ones."""
        ...


class OursDecodes:
    """Our model as :func:`qwen2vl.generate` runs it, by a captured step or by steps that are launched one by one."""

    def __init__(self, ours: Ours, ids: torch.Tensor, steps: int, graphs: bool, kernels: Sequence[str] = ()) -> None:
        self.model, self.ids, self.count, self.graphs = ours.model, ids, steps, graphs
        self.backends = dict.fromkeys(kernels, "triton")
        # Greedily, nothing is kept from one choice to the next.
        self.choose = Chooser(ours.model, {"input_ids": ids}, GenerationConfig(max_new_tokens=steps + 1))
        self.steps: Steps | None = None

    def fill(self) -> torch.Tensor:
        model, (rows, tokens) = self.model, self.ids.shape
        if self.steps is not None:
            self.steps.close()
        capacity = tokens + self.count + 1
        filled = KVCache(model.config.text, rows, capacity, device=model.device, dtype=model.dtype)
        logits = model(self.ids, cache=filled, last_only=True)[:, 0]
        with use_backend(**self.backends):
            self.steps = begin_steps(model, filled, 1, capacity, self.graphs)
        self.first = Underway(self.choose(logits, [], []))
        return self.first.wait().tokens.unsqueeze(1)

    def rewind(self) -> None:
        assert self.steps is not None, "fill comes first"
        self.steps.cache.forget(self.steps.cache.lengths[0] - self.ids.shape[1])

    def decode(self) -> torch.Tensor:
        assert self.steps is not None, "fill comes first"
        with use_backend(**self.backends):
            return self._decode(self.steps)

    def _decode(self, steps: Steps) -> torch.Tensor:
        underway, told, ahead = self.first, [], KVCache.asynchronous(self.model.device)
        for _ in range(self.count):
            if not ahead:
                told.append(underway.wait().tokens)
            following = Underway(self.choose(steps(underway.tokens), [], []))
            if ahead:
                told.append(underway.wait().tokens)
            underway = following
        told.append(underway.wait().tokens)
        return torch.stack(told[1:], 1)


class TransformersDecodes:
    """transformers' forward over one of its caches; ``limit_s``: seconds that compiling it may take."""

    def __init__(self, made: Transformers, ids: torch.Tensor, steps: int, kind: str, limit_s: int = 0) -> None:
        self.model, self.ids, self.count, self.kind, self.limit_s = made.model, ids, steps, kind, limit_s
        self.forward: Callable[..., Any] = self.model
        self.cache: Any = None

    def fill(self) -> torch.Tensor:
        from transformers import DynamicCache, StaticCache

        config = self.model.config.get_text_config(decoder=True)
        if self.kind == DYNAMIC:
            self.cache = DynamicCache(config=config)
        elif self.cache is None:  # a compiled step wants the cache where it was
            self.cache = StaticCache(config=config, max_cache_len=self.ids.shape[1] + self.count + 1)
        else:
            self.cache.reset()
        self.model.model.rope_deltas = None
        output = self.model(input_ids=self.ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.first = output.logits[:, -1].argmax(-1, keepdim=True)
        self.deltas = self.model.model.rope_deltas
        if self.kind == COMPILED and self.forward is self.model:
            self._compile()
        return self.first.cpu()

    def _compile(self) -> None:
        from transformers.generation.configuration_utils import CompileConfig

        # On a CPU there are no graphs, which this mode would bring.
        mode = "reduce-overhead" if self.ids.device.type == "cuda" else "default"
        self.forward = self.model.get_compiled_call(CompileConfig(mode=mode))
        with limited(self.limit_s, "compiling"):
            self.decode()
        self.rewind()

    def rewind(self) -> None:
        self.model.model.rope_deltas = self.deltas  # one model serves several contenders
        tokens = self.ids.shape[1]
        if self.kind == DYNAMIC:
            self.cache.crop(tokens - self.cache.get_seq_length())
            return
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(tokens)

    def decode(self) -> torch.Tensor:
        tokens, told = self.first, []
        for _ in range(self.count):
            output = self.forward(input_ids=tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
            tokens = output.logits[:, -1].argmax(-1, keepdim=True)
            told.append(tokens.cpu())  # as a loop that may stop reads it
        return torch.cat(told, 1)


class VllmDecodes:
    """vLLM's engine with its own graphs. Its cache keeps the prompts, so that ``decode`` is steps alone, the first of
    which reads what is left of a prompt's last block."""

    def __init__(self, engine: Any, ids: torch.Tensor, steps: int) -> None:
        self.engine, self.count = engine, steps
        self.prompts = [{"prompt_token_ids": row} for row in ids.tolist()]

    def _generate(self, tokens: int) -> torch.Tensor:
        from vllm import SamplingParams  # type: ignore[import-not-found]

        greedy = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        answers = self.engine.generate(self.prompts, greedy, use_tqdm=False)
        return torch.tensor([answer.outputs[0].token_ids for answer in answers])

    def fill(self) -> torch.Tensor:
        self.engine.reset_prefix_cache()
        return self._generate(1)

    def rewind(self) -> None:
        pass

    def decode(self) -> torch.Tensor:
        return self._generate(self.count)


@contextmanager
def limited(seconds: int, what: str) -> Iterator[None]:
    """Raises :class:`Skip` where what is done inside takes longer; in a thread beside the main one nothing does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(*_: Any) -> None:
        raise Skip(f"{what} takes longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def prompts(rows: int, tokens: int, device: torch.device) -> torch.Tensor:
    """``(rows, tokens)`` ids of noise, no row like another."""
    return torch.randint(10, 200, (rows, tokens), generator=torch.Generator().manual_seed(rows)).to(device)


class Contenders:
    """Makes those that take part, each model once, for any number of rows."""

    def __init__(self, context: Context, folder: Path, size: Size, dtype: torch.dtype) -> None:
        self.device, self.folder, self.size, self.dtype = context.device, folder, size, dtype
        self.ours = cache(lambda: Ours(folder, self.device, dtype))
        self.theirs = cache(lambda: Transformers(folder, self.device, dtype))
        self.engine = cache(self._engine)
        self.quantised = cache(self._quantised)

    def _quantised(self, form: str) -> Ours:
        made, plain = Ours(self.folder, self.device, self.dtype), self.ours().model
        made.model.visual, made.model.model.embed_tokens = plain.visual, plain.model.embed_tokens  # held once
        quantise(made.model, form)
        return made

    def _engine(self) -> Any:
        from vllm import LLM  # type: ignore[import-not-found]

        room = self.size.prompt + self.size.steps + 1
        return LLM(str(self.folder), dtype=self.dtype, max_model_len=room, max_num_seqs=8, gpu_memory_utilization=0.3)

    def each(self, rows: int) -> Iterator[tuple[str, str | None, Callable[[], Contender]]]:
        """Name, why it takes no part or None, and what makes it."""
        ids, steps, device = prompts(rows, self.size.prompt, self.device), self.size.steps, self.device
        yield "ours", None, lambda: OursDecodes(self.ours(), ids, steps, wants_graphs(self.ours().model, None))
        if KVCache.asynchronous(device):
            yield "ours, step by step", None, lambda: OursDecodes(self.ours(), ids, steps, False)
            yield LAUNCHES, None, lambda: OursDecodes(self.ours(), ids, steps, True, _KERNELS)
        reason, limit_s = providers.why_not("transformers"), COMPILES_S["cuda" if device.type == "cuda" else "cpu"]
        for kind in (DYNAMIC, STATIC, COMPILED):
            make = partial(lambda kind: TransformersDecodes(self.theirs(), ids, steps, kind, limit_s), kind)
            yield kind, reason, make
        reason = providers.why_not("vllm") if device.type == "cuda" else "the engine is measured on a GPU alone"
        yield VLLM, reason, lambda: VllmDecodes(self.engine(), ids, steps)

    def formats(self, rows: int) -> Iterator[tuple[str, str | None, Callable[[], Contender]]]:
        """Likewise: ours quantised, and both as they are. On a GPU by the kernels that come by name until one has run
        them."""
        ids, steps = prompts(rows, self.size.prompt, self.device), self.size.steps
        kernels = ("quant_linear",) if self.device.type == "cuda" else ()

        def made(make: Callable[[], Ours], *kernels: str) -> Contender:
            ours = make()
            return OursDecodes(ours, ids, steps, wants_graphs(ours.model, None), kernels)

        for form in FORMS:
            yield f"ours, {form}", None, partial(made, partial(self.quantised, form), *kernels)
        yield BF16, None, partial(made, self.ours)
        theirs = lambda: TransformersDecodes(self.theirs(), ids, steps, DYNAMIC)  # noqa: E731
        yield DYNAMIC, providers.why_not("transformers"), theirs


def _provider(name: str, reason: str | None, make: Callable[[], Provider]) -> Provider:
    peer, trial = _is_peer(name), _is_trial(name)
    if reason is not None:
        return Provider(name, skipped=reason, peer=peer, trial=trial)
    return Provider(name, make=make, peer=peer, trial=trial)


def _is_peer(name: str) -> bool:
    return name == BF16 or not name.startswith("ours")


def _is_trial(name: str) -> bool:
    """On a GPU, these kernels are taken by name."""
    return name.removeprefix("ours, ") in FORMS


def _filling(contenders: Contenders, rows: int) -> Iterator[Provider]:
    """Compiled steps and steps launched one by one fill as the others of their kind do."""

    def made(name: str, make: Callable[[], Contender]) -> Provider:
        return Provider(name, make().fill, peer=name != "ours")

    for name, reason, make in contenders.each(rows):
        if name in ("ours", DYNAMIC, STATIC, VLLM):
            yield _provider(name, reason, partial(made, name, make))


def _decoding(contenders: Iterable[tuple[str, str | None, Callable[[], Contender]]]) -> Iterator[Provider]:
    def made(name: str, make: Callable[[], Contender]) -> Provider:
        contender = make()
        contender.fill()
        peer, trial = _is_peer(name), _is_trial(name)
        return Provider(name, contender.decode, peer=peer, trial=trial, before=contender.rewind)

    for name, reason, make in contenders:
        yield _provider(name, reason, partial(made, name, make))


def gate(context: Context) -> list[Check]:
    """In float32, where two ways of one sum hardly ever choose differently, all write the same tokens."""
    # Weights of 0.1: at 0.02 a small model mostly repeats its last token.
    folder = checkpoint(context, "small-gate", small_config(), torch.float32, 0.1)
    contenders = Contenders(context, folder, Size("small", 24, 16), torch.float32)
    tokens = {}
    for name, reason, make in contenders.each(3):
        if reason is not None or name in (COMPILED, VLLM, LAUNCHES):  # these at their turn
            continue
        try:
            contender = make()
            first = contender.fill()
            contender.decode()
            contender.rewind()
            tokens[name] = torch.cat((first, contender.decode()), 1)
        except Exception as error:
            if name.startswith("ours") or "CUDA error" in str(error):
                raise
    want = tokens.get(DYNAMIC, tokens["ours"])
    config = contenders.ours().config
    placeholders = torch.tensor([config.image_token_id, config.video_token_id, config.vision_token_id])
    same = torch.isin(want, placeholders).cumsum(1) == 0  # ours never writes one, and goes on otherwise there
    assert same.sum() > 24 and len(want[same].unique()) > 8, "models that repeat a few tokens compare nothing"
    return [
        Check(f"float32 tokens, {name}", float(((got != want) & same).sum()), 0, name) for name, got in tokens.items()
    ]


def workloads(context: Context) -> Iterator[Workload]:
    size = QUICK if context.quick else FULL if context.device.type == "cuda" else ON_CPU
    preset = small_config() if context.quick else Qwen2VLConfig.preset("2b")
    text = preset.text
    yield from _choice.workloads(context, text.vocab_size)
    contenders = Contenders(context, checkpoint(context, size.name, preset), size, torch.bfloat16)
    for rows in (1, 8):

        def all_there(outputs: Mapping[str, Any], rows: int = rows, tokens: int = size.steps) -> list[Check]:
            want = torch.tensor([rows, tokens])
            return [equal(f"{who}'s tokens", torch.tensor(got.shape), want, who) for who, got in outputs.items()]

        yield Workload(
            f"{size.name}, {rows} rows: first token after {size.prompt}",
            list(_filling(contenders, rows)),
            gate=partial(all_there, tokens=1),
            flops=rows * prefill_flops(text, size.prompt),
            bytes=decode_bytes(text, 0, 2),
            dtype=torch.bfloat16,
            min_rounds=2,
            budget_s=5.0,
        )
        seen = rows * (size.prompt + (size.steps + 1) / 2)
        yield Workload(
            f"{size.name}, {rows} rows: a token after {size.prompt}",
            list(_decoding(contenders.each(rows))),
            gate=all_there,
            flops=decode_flops(text, 0) + (decode_flops(text, round(seen)) - decode_flops(text, 0)) / rows,
            bytes=decode_bytes(text, round(seen), 2) / rows,
            dtype=torch.bfloat16,
            per_call=rows * size.steps,
            unit="token",
            min_rounds=3,
            max_rounds=20,
            budget_s=20.0,
        )
        # Without a ceiling: what a token must read differs from one to the other.
        yield Workload(
            f"{size.name}, {rows} rows: a token after {size.prompt}, quantised",
            list(_decoding(contenders.formats(rows))),
            gate=all_there,
            dtype=torch.bfloat16,
            per_call=rows * size.steps,
            unit="token",
            min_rounds=3,
            max_rounds=20,
            budget_s=20.0,
        )


CASE = Case(
    "decode",
    "Decoding with random bf16 weights, beside transformers over both of its caches and vLLM",
    workloads,
    gate,
    imports=MODELING,
)
