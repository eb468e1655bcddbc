"""What is tuned: kernels at the shapes of Qwen2-VL, the most telling first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import torch

from qwen2vl_kernels.ops import quick_gelu
from qwen2vl_kernels.ops.few_rows import rms_norm_linear_ref, rms_norm_swiglu_ref
from qwen2vl_kernels.ops.kvcache_attention import kvcache_attention_decode_ref
from qwen2vl_kernels.ops.layer_norm import layer_norm_ref
from qwen2vl_kernels.ops.mrope import mrope_ref
from qwen2vl_kernels.ops.patch_embed import patch_embed_ref
from qwen2vl_kernels.ops.rms_norm import rms_norm_ref
from qwen2vl_kernels.ops.swiglu import swiglu_ref
from qwen2vl_kernels.ops.vision_rope import vision_rope_ref
from qwen2vl_kernels.triton import attention_decode, cross_entropy, elementwise, few_rows, gemm, norm, rotary

from . import attention
from .subject import Subject, Tensors, Work, checked, random_of

#: Parts of the names of a few subjects of each kind that Triton's interpreter can run by itself.
REHEARSED = ("forward 2x80", "pass 2/1x64", "rms_norm forward 1536", "swiglu forward")


def subjects(quick: bool = False) -> list[Subject]:
    """All of them; with ``quick`` at tiny shapes, with two values to try of two fields and one of the others."""
    found = [
        *attention.subjects(quick),
        *_decoding(quick),
        *_steps(quick),
        *_rotations(quick),
        *_norms(quick),
        *_activations(quick),
        *_products(quick),
        *_losses(quick),
    ]
    if quick:
        return [s if s.tried is not None else replace(s, grid=_ends(s.grid)) for s in found]
    return found


def _ends(grid: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {name: (v[0], v[-1]) if place < 2 else (v[0],) for place, (name, v) in enumerate(grid.items())}


def _decoding(quick: bool) -> Iterator[Subject]:
    capacity, lengths = (300, (270, 300, 9)) if quick else (32_768, (2048, 16_384))
    grid = {"block_n": (32, 64, 128), "num_warps": (2, 4, 8), "num_stages": (2, 3, 4)}

    def work(heads: int, kv_heads: int, seen: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Work:
        random, rows = random_of(device, dtype), len(seen)
        q, k, v = random(rows, heads, 128), *(random(rows, capacity, kv_heads, 128) for _ in range(2))
        end, scale = torch.tensor(seen, dtype=torch.int32, device=device), 128**-0.5
        formula = lambda q, k, v: kvcache_attention_decode_ref(q, k, v, end, scale)  # noqa: E731
        return Work(lambda: (attention_decode.launch_decode(q, k, v, end, scale),), checked(formula, (q, k, v)))

    for heads, kv_heads in ((12, 2), (28, 4)):
        for seen in (lengths,) if quick else ((one,) for one in lengths):
            yield Subject(
                f"decode {heads}/{kv_heads}x128", f"{'+'.join(map(str, seen))} of {capacity}", "_attend_kernel",
                attention_decode, "decode_config", grid, partial(work, heads, kv_heads, seen), fixed=("block_n",),
            )  # fmt: skip


def _steps(quick: bool) -> Iterator[Subject]:
    """The products of a layer and its attention. They take bfloat16, which the rehearsal has not."""
    if quick:
        return
    grid = {"block_n": (16, 32), "block_k": (64, 128, 256), "num_warps": (4, 8)}

    def linear(rows: int, counts: tuple[int, ...], columns: int, device: torch.device, dtype: torch.dtype) -> Work:
        random = random_of(device, dtype)
        x, norm, weights = random(rows, columns), random(columns), [random(n, columns) for n in counts]
        formula = lambda x, norm, *weights: rms_norm_linear_ref(x, norm, weights, [None] * len(weights), 1e-6)  # noqa: E731
        run = lambda: (few_rows.launch_norm_linear(x, norm, weights, [None] * len(weights), 1e-6, False),)  # noqa: E731
        return Work(run, checked(formula, (x, norm, *weights)))

    def gated(rows: int, count: int, columns: int, device: torch.device, dtype: torch.dtype) -> Work:
        random = random_of(device, dtype)
        x, norm, gate, up = random(rows, columns), random(columns), random(count, columns), random(count, columns)
        run = lambda: (few_rows.launch_norm_swiglu(x, norm, gate, up, 1e-6, False),)  # noqa: E731
        formula = lambda x, norm, gate, up: rms_norm_swiglu_ref(x, norm, gate, up, 1e-6)  # noqa: E731
        return Work(run, checked(formula, (x, norm, gate, up)))

    for rows, (counts, columns) in product((1, 8), (((1536, 256, 256), 1536), ((1536,), 8960), ((3584,), 18_944))):
        yield Subject(
            "few rows", f"{rows} x {columns} to {'+'.join(map(str, counts))}", "_product_kernel", few_rows, "config",
            grid, partial(linear, rows, counts, columns), fixed=("block_k", "num_warps"),
        )  # fmt: skip
    for rows, count, columns in ((1, 8960, 1536), (8, 8960, 1536), (1, 18_944, 3584)):
        yield Subject(
            "few rows, gated", f"{rows} x {columns} to 2 x {count}", "_product_kernel", few_rows, "config", grid,
            partial(gated, rows, count, columns), fixed=("block_k", "num_warps"),
        )  # fmt: skip


def _rotations(quick: bool) -> Iterator[Subject]:
    tokens = 24 if quick else 8192
    grid = {"block_m": (2, 4, 8, 16, 32), "heads": (2, 4, 8, 16, 32), "num_warps": (2, 4, 8)}

    def vision(device: torch.device, dtype: torch.dtype) -> Work:
        random = random_of(device, dtype)
        qkv, angle = random(tokens, 3, 16, 80), random(tokens, 40).float()
        q, k, cos, sin = qkv[:, 0], qkv[:, 1], angle.cos(), angle.sin()
        return _rotation(q, k, {"cos": cos, "sin": sin}, vision_rope_ref, (cos, sin))

    def text(heads: int, kv_heads: int, device: torch.device, dtype: torch.dtype) -> Work:
        random, section = random_of(device, dtype), (16, 24, 24)
        q, k = random(tokens, heads, 128), random(tokens, kv_heads, 128)
        positions = torch.arange(3 * tokens, device=device).view(3, tokens) % 4093
        inv_freq = 1e6 ** -(torch.arange(64, dtype=torch.float32, device=device) / 64)
        formula = lambda q, k, positions, inv_freq: mrope_ref(q, k, positions, inv_freq, section)  # noqa: E731
        return _rotation(
            q, k, {"positions": positions, "inv_freq": inv_freq, "section": section}, formula, (positions, inv_freq)
        )

    yield Subject("vision_rope", "16x80", "_rotate_kernel", rotary, "config", grid, vision)
    for heads, kv_heads in ((12, 2), (28, 4)):
        make = partial(text, heads, kv_heads)
        yield Subject("mrope", f"{heads}+{kv_heads}x128", "_rotate_kernel", rotary, "config", grid, make)


def _rotation(q: torch.Tensor, k: torch.Tensor, angles: dict[str, Any], formula: Callable, tables: Tensors) -> Work:
    """Into other tensors: in place the second call would rotate what the first one left."""

    def run() -> Tensors:
        outputs = torch.empty_like(q), torch.empty_like(k)
        rotary.launch_rotation(q, k, *outputs, **angles)
        return outputs

    return Work(run, checked(formula, (q, k, *tables)))


def _norms(quick: bool) -> Iterator[Subject]:
    tokens, warps = 32 if quick else 8192, (1, 2, 4, 8, 16)

    def forward(columns: int, centred: bool, device: torch.device, dtype: torch.dtype) -> Work:
        random = random_of(device, dtype)
        x, residual, weight, bias = random(tokens, columns), random(tokens, columns), random(columns), random(columns)
        biases = (bias,) if centred else ()
        run = lambda: norm.launch_forward(x, residual, weight, *(biases or (None,)), 1e-6, centred)[:2]  # noqa: E731

        def formula(x: torch.Tensor, residual: torch.Tensor, *parameters: torch.Tensor) -> Tensors:
            # In float64 too of the rounded sum, which is what the norm's input is.
            total = (x.to(dtype) + residual.to(dtype)).to(x.dtype)
            norm: Callable = layer_norm_ref if centred else rms_norm_ref
            return norm(total, *parameters), total

        return Work(run, checked(formula, (x, residual, weight, *biases)))

    def backward(columns: int, centred: bool, device: torch.device, dtype: torch.dtype) -> Work:
        random = random_of(device, dtype)
        s, dy, weight, bias = random(tokens, columns), random(tokens, columns), random(columns), random(columns)
        wide = s.float()
        mean = wide.mean(1) if centred else wide.new_zeros(tokens)
        rstd = ((wide - mean[:, None]).square().mean(1) + 1e-6).rsqrt()
        biases = (bias,) if centred else ()
        run = lambda: norm.launch_backward(dy, s, None, weight, mean, rstd, centred, centred)[: 2 + centred]  # noqa: E731
        formula: Callable = layer_norm_ref if centred else rms_norm_ref
        return Work(run, checked(formula, (s, weight, *biases), (dy,)))

    for columns, centred in ((1280, True), (1536, False), (3584, False), (8192, False)):
        name = "layer_norm" if centred else "rms_norm"
        for kind, make, rows in (("forward", forward, (1, 2, 4, 8)), ("backward", backward, (1, 2))):
            grid = {"block_m": rows, "num_warps": warps}
            make = partial(make, columns, centred)
            group, shape = f"{name} {kind} {columns}", f"{tokens} rows"
            yield Subject(group, shape, f"_{kind}_kernel", norm, f"{kind}_config", grid, make)


def _activations(quick: bool) -> Iterator[Subject]:
    tokens, grid = (
        8 if quick else 8192,
        {"block_m": (1, 2, 4, 8, 16), "block_n": (512, 1024, 2048), "num_warps": (2, 4, 8)},
    )

    def work(
        scale: float, formula: Callable, columns: int, biased: bool, backward: bool, device: Any, dtype: Any
    ) -> Work:
        random = random_of(device, dtype)
        x, other = random(tokens, columns), random(columns) if biased else random(tokens, columns)
        bias, up = (other, None) if biased else (None, other)
        if not backward:

            def run() -> Tensors:
                y = torch.empty_like(x)
                elementwise.launch_forward(x, bias, up, y, scale)
                return (y,)

            return Work(run, checked(formula, (x, other)))
        grad = random(tokens, columns)

        def run_backward() -> Tensors:
            dx, dup = torch.empty_like(x), None if up is None else torch.empty_like(up)
            second = elementwise.launch_backward(grad, x, bias, up, dx, dup, scale)
            second = dup if second is None else second
            assert second is not None
            return dx, second

        return Work(run_backward, checked(formula, (x, other), (grad,)))

    for name, scale, formula, columns, biased in (
        ("quick_gelu", quick_gelu.SCALE, quick_gelu.quick_gelu_ref, 5120, True),
        ("swiglu", 1.0, swiglu_ref, 8960, False),
    ):
        for kind in ("forward", "backward"):
            make = partial(work, scale, formula, columns, biased, kind == "backward")
            group = f"{name} {kind} {columns}"
            yield Subject(group, f"{tokens} rows", f"_{kind}_kernel", elementwise, "tile", grid, make)


def _products(quick: bool) -> Iterator[Subject]:
    tokens = 32 if quick else 8192
    grid = {
        "block_m": (64, 128, 256), "block_n": (64, 128, 256), "block_k": (32, 64), "num_warps": (4, 8),
        "num_stages": (2, 3, 4),
    }  # fmt: skip

    def work(rows: int, depth: int, columns: int, gelu: bool, device: torch.device, dtype: torch.dtype) -> Work:
        random = random_of(device, dtype)
        x, weight = random(rows, depth), random(columns, depth)
        if not gelu:  # patches come as bytes
            x = (x.float() * 40 + 128).clamp(0, 255).to(torch.uint8)

        def formula(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            y = patch_embed_ref(x, weight)
            return torch.nn.functional.gelu(y) if gelu else y

        return Work(lambda: gemm.launch_gemm(x, weight, None, gelu)[:1], checked(formula, (x, weight)))

    for name, rows, depth, columns, gelu in (
        ("patch_embed of bytes", tokens, 588, 128 if quick else 1280, False),
        ("patch_merge fc1 + GELU", tokens // 4, 5120 if not quick else 256, 5120 if not quick else 256, True),
    ):
        make = partial(work, rows, depth, columns, gelu)
        yield Subject("product", name, "_gemm_kernel", gemm, "config", grid, make)


def _losses(quick: bool) -> Iterator[Subject]:
    rows, columns = (4, 5000) if quick else (1024, 151_936)

    def work(device: torch.device, dtype: torch.dtype) -> Work:
        logits, target = random_of(device, dtype)(rows, columns), torch.arange(rows, device=device) * 97 % columns

        def run() -> Tensors:
            loss = torch.empty(rows, device=device)
            return loss, cross_entropy.launch_rows(logits.clone(), target, None, loss, -100, 0.0, True)

        def formula(logits: torch.Tensor) -> Tensors:
            logs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(1)
            chosen = torch.nn.functional.one_hot(target, columns)
            return -(logs * chosen).sum(1), (logs.exp() - chosen).to(logits.dtype)

        return Work(run, checked(formula, (logits,)))

    grid = {"block_n": (2048, 4096, 8192, 16384), "num_warps": (8, 16, 32)}
    yield Subject(f"cross_entropy {columns}", f"{rows} rows", "_row_kernel", cross_entropy, "config", grid, work)
