"""Patch embedding: bytes with the folded weight beside normalised float32 rows, from the host and on the device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from qwen2vl.image import IMAGE_MEAN, IMAGE_STD
from qwen2vl_kernels import fold_patch_embed, patch_embed

from ..case import Case, Check, Context, Provider, Workload, two_times
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
    weight = random(context, columns, 3, 2, 14, 14, scale=1176**-0.5)
    pixels = torch.randint(0, 256, (tokens, 3, 1 if still else 2, 196), dtype=torch.uint8)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGE_MEAN, IMAGE_STD))
    both = pixels.expand(-1, -1, 2, -1)
    rows = ((both / 255 - mean) / std).flatten(1)  # (T, 1176) float32, what transformers' processor hands over
    folded = fold_patch_embed(weight, IMAGE_MEAN, IMAGE_STD, still)
    flat = weight.flatten(1)
    exact = F.linear(rows.to(device).double(), flat.double())
    low = _formula(rows.to(device), flat)
    ours_in, theirs_in = pixels.flatten(1), rows
    if copied:
        ours_in, theirs_in = ours_in.pin_memory(), theirs_in.pin_memory()
    else:
        ours_in, theirs_in = ours_in.to(device), theirs_in.to(device)

    def bring(x: torch.Tensor) -> torch.Tensor:
        return x.to(device, non_blocking=True)

    def ours(backend: str) -> Provider:
        return made(backend, lambda: lambda: patch_embed(bring(ours_in), *folded, backend=backend), peer=False)

    contenders = [ours(backend) for backend in BACKENDS[device.type]]
    contenders.append(made("linear on float32 rows", lambda: lambda: _formula(bring(theirs_in), flat)))
    if (fast := compiled(context, _formula, tokens)) is not None:
        contenders.append(made("the same, torch.compile", lambda: lambda: fast(bring(theirs_in), flat)))
    series = f"patch_embed of {'stills' if still else 'videos'}{', from the host' if copied else ''}"
    return Workload(
        f"{series}, {tokens} tokens",
        contenders,
        gate=partial(_gate, exact, low),
        bytes=ours_in.nbytes + folded[0].nbytes + 2 * tokens * columns,
        flops=2 * tokens * columns * ours_in.shape[1],
        dtype=DTYPE,
        series=series,
        size=tokens,
    )


def _gate(exact: torch.Tensor, low: torch.Tensor, outputs: Mapping[str, Any]) -> list[Check]:
    return [two_times(name, got, low, exact, 1e-6) for name, got in outputs.items()]


CASE = Case("patch_embed", "Patches to embeddings, from bytes and from normalised rows", workloads)
