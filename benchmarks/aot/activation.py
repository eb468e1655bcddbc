"""quick_gelu at the width of the vision tower, swiglu at those of the language models."""

from __future__ import annotations

from functools import partial

import torch

from qwen2vl_kernels.ops import quick_gelu
from qwen2vl_kernels.triton import elementwise

from .compiler import Specimen, label, meta

_TOKENS = 4100


def _quick_gelu(dtype: torch.dtype, biased: bool) -> None:
    x, bias = meta(_TOKENS, 5120, dtype=dtype), meta(5120, dtype=dtype) if biased else None
    elementwise.launch_forward(x, bias, None, torch.empty_like(x), quick_gelu.SCALE)
    elementwise.launch_forward(x, bias, None, x, quick_gelu.SCALE)
    elementwise.launch_backward(x, x, bias, None, torch.empty_like(x), None, quick_gelu.SCALE)


def _swiglu(columns: int, dtype: torch.dtype, packed: bool) -> None:
    dy = meta(_TOKENS, columns, dtype=dtype)
    gate, up = meta(_TOKENS, 2 * columns, dtype=dtype).chunk(2, -1) if packed else (dy, torch.empty_like(dy))
    dgate, dup = meta(_TOKENS, 2 * columns, dtype=dtype).chunk(2, -1) if packed else (gate, up)
    elementwise.launch_forward(gate, None, up, torch.empty_like(dy), 1.0)
    elementwise.launch_backward(dy, gate, None, up, dgate, dup, 1.0)


SPECIMENS = (
    *(
        Specimen(f"quick_gelu 5120 {label(dtype)}{' + bias' * biased}", partial(_quick_gelu, dtype, biased), wide=0.9)
        for dtype in (torch.bfloat16, torch.float32)
        for biased in (False, True)
    ),
    *(
        Specimen(
            f"swiglu {columns} {label(dtype)}{' packed' * packed}", partial(_swiglu, columns, dtype, packed), wide=0.9
        )
        for columns, dtype, packed in (
            (8960, torch.bfloat16, False),
            (8960, torch.float32, False),
            (18944, torch.bfloat16, True),
            (29568, torch.float16, False),
        )
    ),
)
