"""mrope, append_kv and vision_rope with the heads of the released models, in every form and source of angles."""

from __future__ import annotations

from functools import partial

import torch

from qwen2vl_kernels.triton.cache import launch_append
from qwen2vl_kernels.triton.rope_tables import launch_tables
from qwen2vl_kernels.triton.rotary import halves_of, launch_rotation

from .compiler import Specimen, label, meta

_TOKENS = 4100
_CHUNKED, _INTERLEAVED = (16, 24, 24), (24, 20, 20)


def _mrope(heads: int, kv_heads: int, dtype: torch.dtype, interleaved: bool, cached: bool, in_place: bool) -> None:
    q, k = meta(_TOKENS, heads, 128, dtype=dtype), meta(_TOKENS, kv_heads, 128, dtype=dtype)
    positions, inv_freq = meta(3, _TOKENS, dtype=torch.int64), meta(64, dtype=torch.float32)
    tables = halves_of(meta(32768, 128, dtype=dtype) if cached else None)
    section = _INTERLEAVED if interleaved else _CHUNKED
    outputs = (q, k) if in_place else (torch.empty_like(q), torch.empty_like(k))
    launch_rotation(q, k, *outputs, positions, None if cached else inv_freq, *tables, section, interleaved)


def _append(heads: int, kv_heads: int, dtype: torch.dtype, overwrite: bool) -> None:
    """Into pages of 16 slots, or into the rows of a contiguous cache."""
    packed = meta(_TOKENS, heads + 2 * kv_heads, 128, dtype=dtype)
    q, k, v = packed.split((heads, kv_heads, kv_heads), 1)
    cache = meta(*((4, 2048) if overwrite else (512, 16)), kv_heads, 128, dtype=dtype)
    positions, slots = meta(3, _TOKENS, dtype=torch.int64), meta(_TOKENS, dtype=torch.int64)
    inv_freq = meta(64, dtype=torch.float32)
    launch_append(k, v, cache, cache, slots, q, positions, inv_freq, _CHUNKED, False, None, overwrite)


def _vision(heads: int, columns: int, dtype: torch.dtype) -> None:
    qkv = meta(_TOKENS, 3, heads, columns, dtype=dtype)
    tables = (meta(_TOKENS, columns // 2, dtype=torch.float32) for _ in range(2))
    cos, sin = tables
    q, k = qkv[:, 0], qkv[:, 1]
    launch_rotation(q, k, q, k, cos=cos, sin=sin)
    launch_rotation(q, k, torch.empty_like(q), torch.empty_like(k), cos=cos, sin=sin, inverse=True)


def _tables() -> None:
    launch_tables(meta(_TOKENS, 2, dtype=torch.int64), meta(20, dtype=torch.float32))


def _specimen(heads: int, kv_heads: int, dtype: torch.dtype, form: str, further: bool = False) -> Specimen:
    run = partial(_mrope, heads, kv_heads, dtype, "interleaved" in form, "cache" in form, "in place" in form)
    return Specimen(f"mrope {heads}+{kv_heads} {label(dtype)} {form}", run, wide=0.8, further=further)


SPECIMENS = (
    _specimen(12, 2, torch.bfloat16, "in place"),
    _specimen(12, 2, torch.bfloat16, "new", further=True),
    _specimen(12, 2, torch.float32, "in place", further=True),
    _specimen(28, 4, torch.bfloat16, "in place, interleaved", further=True),
    _specimen(64, 8, torch.bfloat16, "in place, cache"),
    Specimen("append_kv 12+2 bfloat16 paged", partial(_append, 12, 2, torch.bfloat16, False), wide=0.8),
    Specimen(
        "append_kv 28+4 bfloat16 contiguous", partial(_append, 28, 4, torch.bfloat16, True), wide=0.8, further=True
    ),
    Specimen("vision_rope 16x80 bfloat16", partial(_vision, 16, 80, torch.bfloat16), wide=0.8),
    Specimen("vision_rope 16x80 float32", partial(_vision, 16, 80, torch.float32), wide=0.8, further=True),
    Specimen("vision_rope 16x64 bfloat16", partial(_vision, 16, 64, torch.bfloat16), wide=0.8, further=True),
    Specimen("vision_rope 16x128 float16", partial(_vision, 16, 128, torch.float16), wide=0.8, further=True),
    Specimen(
        "vision_rope 16x72 bfloat16", partial(_vision, 16, 72, torch.bfloat16), further=True
    ),  # halves of 72 bytes
    Specimen("vision_rope_tables 80", _tables),
)
