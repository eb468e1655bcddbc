"""Patch embedding: bytes with the folded weight beside normalised float32 rows, from the host and on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F

from qwen2vl.config import IMAGE_MEAN, IMAGE_STD
from qwen2vl_kernels import fold_patch_embed, patch_embed

from ..case import Case, Check, Context, Workload, two_times
from ._ops import BACKENDS, DTYPE, compiled, made, random, token_counts


def workloads(context: Context) -> Iterator[Workload]:
    for tokens in token_counts(context):
        yield _workload(context, tokens, still=True, copied=False)
        yield _workload(context, tokens, still=False, copied=False)
        if context.device.type == "cuda":
            yield _workload(context, tokens, still=True, copied=True)


def _formula(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """transformers' patch embedding as the product it is; its convolution is slower."""
    return F.linear(rows.to(weight.dtype), weight)


def _workload(context: Context, tokens: int, *, still: bool, copied: bool) -> Workload:
    """``copied``: from pinned memory of the host, the way to the device included."""
    device, columns = context.device, 1280
    values = 196 * 3 * (1 if still else 2)  # of a patch

    @cache
    def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """Bytes, rows, the weight as it is, and folded with its bias."""
        weight = random(context, columns, 3, 2, 14, 14, scale=1176**-0.5)
        pixels = torch.randint(0, 256, (tokens, 3, 1 if still else 2, 196), dtype=torch.uint8)
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGE_MEAN, IMAGE_STD))
        both = pixels.expand(-1, -1, 2, -1)
        rows = ((both / 255 - mean) / std).flatten(1)  # (T, 1176) float32, what transformers' processor hands over
        folded = fold_patch_embed(weight, IMAGE_MEAN, IMAGE_STD, still)
        put = torch.Tensor.pin_memory if copied else partial(torch.Tensor.to, device=device)
        return put(pixels.flatten(1)), put(rows), weight.flatten(1), folded

    def bring(x: torch.Tensor) -> torch.Tensor:
        return x.to(device, non_blocking=True)

    def ours(backend: str) -> Callable[[], torch.Tensor]:
        pixels, _, _, folded = inputs()
        return lambda: patch_embed(bring(pixels), *folded, backend=backend)

    def theirs(formula: Callable) -> Callable[[], torch.Tensor]:
        _, rows, flat, _ = inputs()
        return lambda: formula(bring(rows), flat)

    def gate(outputs: Mapping[str, Any]) -> list[Check]:
        _, rows, flat, _ = inputs()
        exact, low = F.linear(bring(rows).double(), flat.double()), _formula(bring(rows), flat)
        return [two_times(name, got, low, exact, 1e-6, name) for name, got in outputs.items()]

    contenders = [made(backend, partial(ours, backend), peer=False) for backend in BACKENDS[device.type]]
    contenders.append(made("linear on float32 rows", partial(theirs, _formula)))
    if (fast := compiled(context, _formula, tokens)) is not None:
        contenders.append(made("the same, torch.compile", lambda: theirs(fast())))
    series = f"patch_embed of {'stills' if still else 'videos'}{', from the host' if copied else ''}"
    return Workload(
        f"{series}, {tokens} tokens",
        contenders,
        gate=gate,
        bytes=tokens * values + 2 * columns * values + 2 * tokens * columns,
        flops=2 * tokens * columns * values,
        dtype=DTYPE,
        series=series,
        size=tokens,
    )


CASE = Case("patch_embed", "Patches to embeddings, from bytes and from normalised rows", workloads)
