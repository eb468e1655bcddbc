"""linear_cross_entropy's rows at the vocabularies of the language models, and at one that no vector divides."""

from __future__ import annotations

from functools import partial

import torch

from qwen2vl_kernels.triton.cross_entropy import launch_rows

from .compiler import Specimen, label, meta

_ROWS = 1024


def _rows(columns: int, dtype: torch.dtype, smoothing: float, gradient: bool) -> None:
    logits, target = meta(_ROWS, columns, dtype=dtype), meta(_ROWS, dtype=torch.int64)
    loss = meta(_ROWS, dtype=torch.float32)
    launch_rows(logits, target, None, loss, -100, smoothing, gradient)
    if gradient:
        launch_rows(logits, target, loss, loss, -100, smoothing, gradient)


def _specimens(
    columns: int, dtype: torch.dtype, smoothing: float = 0.0, further: bool = False
) -> tuple[Specimen, Specimen]:
    """The loss alone and the gradient. Shares are of the program's text, in which the single numbers of a row (target,
    its logit, loss, scale) stand beside two vectors a loop."""
    name = f"cross_entropy {columns} {label(dtype)}{' smoothed' * (smoothing > 0)}"
    run, vectors = partial(_rows, columns, dtype, smoothing), columns % 16 == 0
    return (
        Specimen(name, partial(run, False), wide=0.6 * vectors, further=further),
        Specimen(f"{name} gradient", partial(run, True), wide=0.8 * vectors, further=further),
    )


SPECIMENS = (
    *_specimens(151_936, torch.bfloat16),
    *_specimens(152_064, torch.bfloat16, smoothing=0.1),
    *_specimens(151_936, torch.float32, further=True),
    *_specimens(151_936, torch.float16, smoothing=0.1, further=True),
    *_specimens(50_257, torch.bfloat16, further=True),
)
