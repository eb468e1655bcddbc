"""Rotary embeddings: three-axis of the language models' q and k, two-axis of the vision tower's.

Our M-RoPE works out its angles from the positions; the others take cosines and sines that are ready, which a model
makes once for all layers and which are not counted. The declared bytes are q and k read and written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from qwen2vl_kernels import append_kv, mrope, vision_rope
from qwen2vl_kernels.ops.mrope import mrope_cos_sin

from ..case import Case, Context, Workload
from ._ops import Op, random, token_counts

SECTION = (16, 24, 24)


def workloads(context: Context) -> Iterator[Workload]:
    for tokens in token_counts(context):
        yield from _vision(context, tokens, 16, 80)
        yield from _mrope(context, tokens, 12, 2)
        if not context.quick:
            yield from _mrope(context, tokens, 28, 4)


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """As transformers' functions: the whole row times the cosine, plus the swapped row times the sine."""
    half = x.shape[-1] // 2
    swapped = torch.cat((-x[..., half:], x[..., :half]), -1)
    return x * cos + swapped * sin


def _double(table: torch.Tensor) -> torch.Tensor:
    return torch.cat((table, table), -1).unsqueeze(1)  # (T, 1, D)


def _vision(context: Context, tokens: int, heads: int, columns: int) -> Iterator[Workload]:
    q, k = random(context, tokens, heads, columns), random(context, tokens, heads, columns, seed=1)
    angles = torch.rand(tokens, columns // 2, device=context.device) * 6
    cos, sin = angles.cos(), angles.sin()

    def formula(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        """transformers' apply_rotary_pos_emb_vision: float32 inside."""
        wide = torch.promote_types(q.dtype, torch.float32)
        return tuple(_turn(x.to(wide), _double(cos), _double(sin)).to(x.dtype) for x in (q, k))

    def flash() -> Callable:
        from flash_attn.layers.rotary import apply_rotary_emb  # pyright: ignore[reportMissingImports]

        def run(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
            return tuple(apply_rotary_emb(x[None], cos, sin)[0] for x in (q, k))

        return run

    op = Op(context, formula, vision_rope, (q, k), (cos, sin), peers={"flash-attn": ("flash_attn", flash)})
    name, moved = f"vision_rope {heads}x{columns}", 2 * (q.nbytes + k.nbytes)
    yield op.forward(name, tokens, bytes=moved)
    yield op.backward(name, tokens, bytes=moved)


def _mrope(context: Context, tokens: int, heads: int, kv_heads: int) -> Iterator[Workload]:
    q, k = random(context, tokens, heads, 128), random(context, tokens, kv_heads, 128, seed=1)
    with torch.inference_mode(False):  # autograd may keep them
        positions = torch.randint(0, 4096, (3, tokens), device=context.device)
        inv_freq = 1e6 ** -(torch.arange(64, device=context.device) / 64)
        cos, sin = mrope_cos_sin(positions, inv_freq, SECTION)
        full = [_double(t).to(q.dtype) for t in (cos, sin)]  # in the model's dtype, as transformers hands them on

    def formula(q: torch.Tensor, k: torch.Tensor, *_: torch.Tensor) -> Any:
        tables = full if q.dtype != torch.float64 else [_double(t).double() for t in (cos, sin)]
        return tuple(_turn(x, *tables) for x in (q, k))

    def liger() -> Callable:
        from liger_kernel.ops.qwen2vl_mrope import (  # pyright: ignore[reportMissingImports]
            LigerQwen2VLMRopeFunction,
        )

        with torch.inference_mode(False):
            angles = positions.unsqueeze(-1) * inv_freq  # (3, T, 64)
            tables = [torch.cat((t, t), -1).to(q.dtype).unsqueeze(1) for t in (angles.cos(), angles.sin())]

        def run(q: torch.Tensor, k: torch.Tensor, *_: torch.Tensor) -> Any:
            heads_first = (x.transpose(0, 1)[None] for x in (q, k))  # views, as a model has them
            turned = LigerQwen2VLMRopeFunction.apply(*heads_first, *tables, list(SECTION))
            return tuple(x[0].transpose(0, 1) for x in turned)

        run.in_place = True
        return run

    def ours(q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, backend: str) -> Any:
        return mrope(q, k, positions, inv_freq, SECTION, backend=backend)

    op = Op(context, formula, ours, (q, k), (positions,), peers={"Liger": ("liger_kernel", liger)})
    name, moved = f"mrope {heads}+{kv_heads}x128", 2 * (q.nbytes + k.nbytes)
    yield op.forward(name, tokens, bytes=moved)
    yield op.backward(name, tokens, bytes=moved)
    yield _append(context, q, k, positions, inv_freq, (cos, sin), full)


def _append(context: Context, q, k, positions, inv_freq, tables, full) -> Workload:
    """q and k turned, k and v stored into pages of 16 in one launch, beside the rotation and two scatters."""
    tokens, kv_heads, _ = k.shape
    v = random(context, tokens, kv_heads, 128, seed=2)
    slots = torch.randperm(-(-tokens // 16) * 16, device=context.device)[:tokens]

    caches = [torch.zeros(-(-tokens // 16), 16, kv_heads, 128, dtype=k.dtype, device=context.device) for _ in range(2)]

    def ours(q, k, v, turned, k_cache, v_cache, backend: str) -> Any:
        # Turned again and again while it is timed, whose values do not matter; the gate sees the first call's.
        append_kv(
            k, v, k_cache, v_cache, slots, q=turned, positions=positions, inv_freq=inv_freq, section=SECTION,
            backend=backend,
        )  # fmt: skip
        return turned, k_cache, v_cache

    def formula(q, k, v, _, k_cache, v_cache) -> Any:
        angles = full if k.dtype != torch.float64 else [_double(t).double() for t in tables]
        k_cache.flatten(0, 1).index_copy_(0, slots, _turn(k, *angles))
        v_cache.flatten(0, 1).index_copy_(0, slots, v)
        return _turn(q, *angles), k_cache, v_cache

    moved = 2 * (q.nbytes + k.nbytes + v.nbytes)
    op = Op(context, formula, ours, (q, k, v), written=(q, *caches))
    return op.forward(f"append_kv {q.shape[1]}+{kv_heads}x128", tokens, bytes=moved)


CASE = Case("rope", "M-RoPE, vision RoPE and the cache append, forward and backward", workloads)
