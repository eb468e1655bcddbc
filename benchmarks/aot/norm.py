"""layer_norm and rms_norm at the widths of the vision tower and of the three language models."""

from __future__ import annotations

from functools import partial

import torch

from qwen2vl_kernels.triton import norm

from .compiler import Specimen, label, meta

_TOKENS = 4100


def _forward(columns: int, dtype: torch.dtype, centred: bool) -> None:
    x, weight = meta(_TOKENS, columns, dtype=dtype), meta(columns, dtype=dtype)
    bias = weight if centred else None
    norm.launch_forward(x, None, weight, bias, 1e-6, centred, statistics=False)
    norm.launch_forward(x, x, weight, bias, 1e-6, centred)


def _backward(columns: int, dtype: torch.dtype, centred: bool) -> None:
    x, statistics = meta(_TOKENS, columns, dtype=dtype), meta(_TOKENS, dtype=torch.float32)
    norm.launch_backward(x, x, x, meta(columns, dtype=dtype), statistics, statistics, centred, centred)


def _specimens(op: str, columns: int, dtype: torch.dtype, further: bool = False) -> tuple[Specimen, ...]:
    name, centred = f"{op} {columns} {label(dtype)}", op == "layer_norm"
    return (
        Specimen(name, partial(_forward, columns, dtype, centred), wide=0.9, further=further),
        Specimen(f"{name} backward", partial(_backward, columns, dtype, centred), wide=0.9, further=further),
    )


SPECIMENS = (
    *_specimens("layer_norm", 1280, torch.bfloat16),
    *_specimens("layer_norm", 1280, torch.float32, further=True),
    *_specimens("rms_norm", 1536, torch.bfloat16),
    *_specimens("rms_norm", 1536, torch.float32, further=True),
    *_specimens("rms_norm", 3584, torch.bfloat16, further=True),
    *_specimens("rms_norm", 8192, torch.bfloat16),
)
