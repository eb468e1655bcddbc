"""From a picture to the first token and the tokens after it: ours, transformers, and transformers on these kernels.

A call is what a program does with one picture: preprocess, encode, fill the cache, choose greedily. The patched calls
are those of the same model object after ``integrations.transformers.apply()``, the stock ones after ``restore()``. For
transformers the ids of the text are ready; ours tokenises its message. No sequence ends before its last token.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from qwen2vl import GenerationConfig, Processor, Qwen2VLConfig, generate

from .. import providers
from ..case import Case, Check, Context, Provider, Workload
from ..random_checkpoint import small_config
from ._ops import MODELING
from ._qwen2vl import Ours, Transformers, checkpoint, wide_config

QUESTION = "What is in this picture?"
PATCHED, STOCK = "transformers, patched", "transformers"
UNITS = {"picture to rows": "s", "first token": "s", "each token after it": "s"}
#: An id that no vocabulary has: nothing ends a sequence.
_NEVER = 10**9


@dataclass(frozen=True)
class Size:
    """A checkpoint's name, the picture's width and height, and how many tokens are generated."""

    name: str
    width: int
    height: int
    tokens: int


FULL = Size("2b", 1280, 960, 64)
#: Two layers of each tower, a small picture: CPUs without products of bf16 take seconds for it.
REDUCED = Size("2b-2-layers", 336, 252, 16)
QUICK = Size("small", 112, 84, 4)


def picture(size: Size) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (size.height, size.width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


class OursAnswers:
    """Our processor, model and loop."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
        self.model = Ours(folder, device, dtype).model
        self.processor = Processor.from_pretrained(folder)

    def __call__(self, image: Image.Image, tokens: int) -> dict[str, Any]:
        clock = _Clock()
        content = [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]
        inputs = self.processor([{"role": "user", "content": content}])
        clock.rows()
        config = GenerationConfig(max_new_tokens=tokens, eos_token_ids=(_NEVER,))
        generate(
            self.model, inputs.to(self.model.device), config=config, on_token=lambda row, token, _: clock.put(token)
        )
        return clock.result()


class TransformersAnswers:
    """transformers' image processor over PIL, model and ``generate``, on the ids that our processor gives."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        self.made = Transformers(folder, device, dtype)
        self.made.model.generation_config.eos_token_id = None
        self.images = Qwen2VLImageProcessorPil.from_pretrained(folder)
        self.device, self.processor = device, Processor.from_pretrained(folder)
        self.ids: dict[tuple[int, int], torch.Tensor] = {}

    def prepare(self, image: Image.Image) -> None:
        content = [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]
        self.ids[image.size] = self.processor([{"role": "user", "content": content}])["input_ids"].to(self.device)

    def __call__(self, image: Image.Image, tokens: int) -> dict[str, Any]:
        ids, clock = self.ids[image.size], _Clock()
        rows = self.images(images=[image], return_tensors="pt")
        clock.rows()
        kinds = (ids == self.made.config.image_token_id).int()
        self.made.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=kinds,
            **rows.to(self.device),
            max_new_tokens=tokens,
            do_sample=False,
            streamer=_Streamer(clock),
        )
        return clock.result()


class _Clock:
    """Seconds from its making to the rows and to every token."""

    def __init__(self) -> None:
        self.begin = time.perf_counter()
        self.prepared = 0.0
        self.times: list[float] = []
        self.tokens: list[int] = []

    def rows(self) -> None:
        self.prepared = time.perf_counter() - self.begin

    def put(self, token: int) -> None:
        self.times.append(time.perf_counter() - self.begin)
        self.tokens.append(token)

    def result(self) -> dict[str, Any]:
        first, last = self.times[0], self.times[-1]
        each = (last - first) / (len(self.times) - 1)
        return dict(zip(UNITS, (self.prepared, first, each), strict=True)) | {"tokens": self.tokens}


class _Streamer:
    """What transformers' ``generate`` takes: it is given the prompt, then every token, on the host."""

    def __init__(self, clock: _Clock) -> None:
        self.clock, self.prompt = clock, True

    def put(self, value: torch.Tensor) -> None:
        if not self.prompt:
            self.clock.put(int(value))
        self.prompt = False

    def end(self) -> None:
        pass


def _providers(context: Context, folder: Path, size: Size, dtype: torch.dtype) -> list[Provider]:
    image = picture(size)

    def make_ours() -> Provider:
        return Provider("ours", partial(OursAnswers(folder, context.device, dtype), image, size.tokens))

    ours = Provider("ours", make=make_ours)
    if (reason := providers.why_not("transformers")) is not None:
        return [ours, *(Provider(who, skipped=reason, peer=who == STOCK) for who in (PATCHED, STOCK))]
    from qwen2vl_kernels.integrations import transformers as kernels

    @cache
    def call() -> Callable[[], Any]:
        theirs = TransformersAnswers(folder, context.device, dtype)
        theirs.prepare(image)
        return partial(theirs, image, size.tokens)

    def patch() -> None:
        kernels.apply()

    return [
        ours,
        Provider(PATCHED, make=lambda: Provider(PATCHED, call(), before=patch)),
        Provider(STOCK, make=lambda: Provider(STOCK, call(), before=kernels.restore, peer=True), peer=True),
    ]


def gate(context: Context) -> list[Check]:
    """In float32 all three write the same tokens."""
    # Weights of 0.1: at 0.02 a small model mostly repeats its last token.
    folder = checkpoint(context, "small-gate", small_config(), torch.float32, 0.1)
    tokens = {}
    for declared in _providers(context, folder, Size("small", 280, 196, 24), torch.float32):
        try:
            provider = declared.ready()
            if provider.call is not None:
                if provider.before is not None:
                    provider.before()
                tokens[provider.name] = provider.call()["tokens"]
        except Exception as error:
            if not declared.peer or "CUDA error" in str(error):
                raise
    want = tokens.get(STOCK, tokens["ours"])
    assert len(set(want)) > 4, "a model that repeats one token compares nothing"
    return [
        Check(f"float32 tokens, {who}", sum(a != b for a, b in zip(got, want, strict=True)), 0)
        for who, got in tokens.items()
    ]


def workloads(context: Context) -> Iterator[Workload]:
    size = QUICK if context.quick else FULL if context.device.type == "cuda" else REDUCED
    presets = {"small": small_config, "2b-2-layers": partial(wide_config, 2), "2b": partial(Qwen2VLConfig.preset, "2b")}
    folder = checkpoint(context, size.name, presets[size.name]())

    def all_there(outputs: Mapping[str, Any]) -> list[Check]:
        """Also the warm-up: a call each."""
        return [Check(f"{who}'s tokens", abs(len(got["tokens"]) - size.tokens), 0, who) for who, got in outputs.items()]

    try:
        yield Workload(
            f"{size.name}, {size.width}x{size.height}, {size.tokens} tokens",
            _providers(context, folder, size, torch.bfloat16),
            gate=all_there,
            units=UNITS,
            min_rounds=3,
            max_rounds=9,
            budget_s=30.0,
        )
    finally:
        if providers.why_not("transformers") is None:
            from qwen2vl_kernels.integrations import transformers as kernels

            kernels.restore()


CASE = Case(
    "e2e",
    "From a picture to tokens in bf16, beside transformers' own and patched",
    workloads,
    gate,
    imports=MODELING,
)
