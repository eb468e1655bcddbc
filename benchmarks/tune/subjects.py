"""What is tuned: kernels at the shapes of Qwen2-VL, the most telling first."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any
from unittest import mock

import torch

from qwen2vl_kernels.core.tile_plan import plan_tiles
from qwen2vl_kernels.ops import quick_gelu
from qwen2vl_kernels.ops.layer_norm import layer_norm_ref
from qwen2vl_kernels.ops.mrope import mrope_ref
from qwen2vl_kernels.ops.patch_embed import patch_embed_ref
from qwen2vl_kernels.ops.rms_norm import rms_norm_ref
from qwen2vl_kernels.ops.swiglu import swiglu_ref
from qwen2vl_kernels.ops.varlen_attention import varlen_attention, varlen_attention_ref
from qwen2vl_kernels.ops.vision_rope import vision_rope_ref
from qwen2vl_kernels.triton import attention_backward, attention_forward, cross_entropy, elementwise, gemm, norm, rotary

from ..case import Check, relative_error, two_times

Tensors = tuple[torch.Tensor, ...]
#: The dtype of the inputs, by device. The rehearsal's are float16, which Triton's interpreter knows by itself.
DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float16}
#: What two kernels that round in other places may differ by, as a relative error: as in the case attention.
_AGREEMENT = 1e-2


@dataclass(frozen=True)
class Work:
    """Inputs on a device. ``run()`` launches and returns the results, ``check(results)`` compares them."""

    run: Callable[[], Tensors]
    check: Callable[[Tensors], list[Check]]


@dataclass(frozen=True)
class Subject:
    """A kernel at a shape.

    Attributes:
        group: the subjects that are launched with one configuration; they differ in ``shape``.
        kernel: name of the kernel that is timed; what else ``run`` launches is not.
        module, function: ``getattr(module, function)`` chooses the configuration.
        grid: fields of the configuration, and the values to try.
        make: the work on a device in a dtype; on "meta" there is nothing to check.
        place: of the configuration in what ``function`` returns, where that is a tuple.
        fixed: fields that all shapes of the group must share, as the bits of a result depend on them.
        columns: of the head, where a table has configurations by width. All shapes are one kernel then.
    """

    group: str
    shape: str
    kernel: str
    module: Any
    function: str
    grid: dict[str, tuple[int, ...]]
    make: Callable[[torch.device, torch.dtype], Work]
    place: int | None = None
    fixed: tuple[str, ...] = ()
    columns: int | None = None

    @property
    def name(self) -> str:
        return f"{self.group}, {self.shape}"

    @property
    def compiled_as(self) -> str:
        """Subjects that have this in common are the same kernels for the compiler."""
        return self.name if self.columns is None else self.group


@contextmanager
def configured(subject: Subject, fields: dict[str, int] | None) -> Iterator[list[Any]]:
    """Inside the block the subject's chooser returns its choice with ``fields`` replaced; yields what it returned."""
    choose, seen = getattr(subject.module, subject.function), []

    def chosen(*arguments: Any) -> Any:
        shipped = choose(*arguments)
        one = shipped if subject.place is None else shipped[subject.place]
        seen.append(one if fields is None else replace(one, **fields))
        if subject.place is None:
            return seen[-1]
        return (*shipped[: subject.place], seen[-1], *shipped[subject.place + 1 :])

    with mock.patch.object(subject.module, subject.function, chosen):
        yield seen


#: Parts of the names of a few subjects of each kind that Triton's interpreter can run by itself.
REHEARSED = ("forward 2x80", "pass 2/1x64", "rms_norm forward 1536", "swiglu forward")


def subjects(quick: bool = False) -> list[Subject]:
    """All of them; with ``quick`` at tiny shapes, with two values to try of two fields and one of the others."""
    found = [
        *_attentions(quick),
        *_rotations(quick),
        *_norms(quick),
        *_activations(quick),
        *_products(quick),
        *_losses(quick),
    ]
    return [replace(subject, grid=_ends(subject.grid)) for subject in found] if quick else found


def _ends(grid: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {name: (v[0], v[-1]) if place < 2 else (v[0],) for place, (name, v) in enumerate(grid.items())}


def _random(device: torch.device, dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    """Normal numbers, the same ones in every process."""
    if device.type == "meta":
        return lambda *shape: torch.empty(shape, dtype=dtype, device=device)
    generator = torch.Generator(device).manual_seed(0)
    return lambda *shape: torch.randn(shape, dtype=dtype, device=device, generator=generator)


def _results(formula: Callable, inputs: Sequence[torch.Tensor], grads: Tensors | None, double: bool) -> Tensors:
    """Results of the formula, or with ``grads`` its gradients for the floating inputs; in float64 with ``double``."""

    def to(x: torch.Tensor) -> torch.Tensor:
        return x.double() if double and x.is_floating_point() else x

    with torch.inference_mode(False), torch.set_grad_enabled(grads is not None):
        leaves = [to(x.clone()).requires_grad_(grads is not None and x.is_floating_point()) for x in inputs]
        out = formula(*leaves)
        out = out if isinstance(out, tuple) else (out,)
        if grads is None:
            return out
        return torch.autograd.grad(out, [x for x in leaves if x.requires_grad], [to(g.clone()) for g in grads])


def _checked(
    formula: Callable,
    inputs: Sequence[torch.Tensor],
    grads: Tensors | None = None,
    which: slice = slice(None),
    part: Callable[[Tensors], Tensors] = tuple,
) -> Callable[[Tensors], list[Check]]:
    """The two-times rule for ``part`` of the results, against the ``which`` of those of the formula."""

    @cache
    def references() -> tuple[Tensors, Tensors]:
        return tuple(_results(formula, inputs, grads, double)[which] for double in (False, True))  # type: ignore[return-value]

    def check(results: Tensors) -> list[Check]:
        rows = zip(part(results), *references(), strict=True)
        return [two_times(f"result {n}", got, low.view(got.shape), exact.view(got.shape), 1e-6)
                for n, (got, low, exact) in enumerate(rows)]  # fmt: skip

    return check


# --------------------------------------------------------------------------------------------------------- attention

#: The first field is the height of the tile that a program owns: queries in the forward and in their pass.
_ATTENTION = {"block_m": (64, 128), "block_n": (32, 64, 128), "num_warps": (4, 8)}
#: The pass over tiles of keys owns keys and takes queries.
_KEY_PASS = {"block_n": (64, 128), "block_m": (32, 64, 128), "num_warps": (4, 8)}


def _attentions(quick: bool) -> Iterator[Subject]:
    """Forward, the pass for keys and the pass for queries: each shape's three after each other."""
    vision = [("4 of 4096", (4096,) * 4), ("16 of 1024", (1024,) * 16), ("1 of 16384", (16384,))]
    vision.append(("64 of 256", (256,) * 64))
    shapes = [(name, lengths, 16, 16, 80, False) for name, lengths in vision]
    shapes.insert(2, ("causal 4096+2048+1333+715", (4096, 2048, 1333, 715), 28, 4, 128, True))
    shapes += [(name, lengths, 16, 16, 72, False) for name, lengths in vision[:2]]
    if quick:
        shapes = [("40+24", (40, 24), 2, 2, 80, False), ("96", (96,), 2, 2, 80, False)]
        shapes.append(("causal 40", (40,), 2, 1, 64, True))
    for shape, lengths, heads, kv_heads, columns, causal in shapes:
        head = f"{heads}{'' if heads == kv_heads else f'/{kv_heads}'}x{columns}"
        make = partial(_attention_work, lengths, heads, kv_heads, columns, causal)
        common = {"shape": shape, "columns": columns}
        yield Subject(
            f"attention forward {head}", kernel="_forward_kernel", module=attention_forward, function="forward_config",
            grid={**_ATTENTION, "num_stages": (2, 3, 4)}, make=partial(make, None), fixed=("block_n",), **common,
        )  # fmt: skip
        for place, (name, grid) in enumerate((("key", _KEY_PASS), ("query", _ATTENTION))):
            yield Subject(
                f"attention {name} pass {head}", kernel=f"_{name}_kernel", module=attention_backward,
                function="backward_config", grid={**grid, "num_stages": (1, 2, 3)}, make=partial(make, place),
                place=place, **common,
            )  # fmt: skip


def _attention_work(
    lengths: tuple[int, ...],
    heads: int,
    kv_heads: int,
    columns: int,
    causal: bool,
    place: int | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Work:
    """``place`` is that of a pass of the backward, whose statistics are PyTorch's: no forward kernel has a say."""
    random, total, longest = _random(device, dtype), sum(lengths), max(lengths)
    q, k, v = random(total, heads, columns), random(total, kv_heads, columns), random(total, kv_heads, columns)
    grad, scale = random(total, heads, columns), columns**-0.5
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    plan = plan_tiles(cu_seqlens, total, device=device)
    sdpa = partial(varlen_attention, cu_seqlens=cu_seqlens, max_seqlen=longest, causal=causal, backend="sdpa")
    formula = partial(varlen_attention_ref, cu_seqlens=cu_seqlens, causal=causal)
    grads = None if place is None else (grad,)
    which = slice(None) if place is None else (slice(1, 3), slice(0, 1))[place]
    if place is None:
        run = lambda: attention_forward.launch_forward(q, k, v, plan, longest, causal, scale)[:1]  # noqa: E731
    else:
        if device.type == "meta":
            out, lse = torch.empty_like(grad), torch.empty(heads, total, device=device)
        else:
            out, lse = sdpa(q, k, v), _log_sums(q, k, lengths, causal, scale)
        inputs = (grad, q, k, v, out, lse, plan)
        run = lambda: attention_backward.launch_backward(*inputs, causal, scale)[which]  # noqa: E731
    # The first key head and its queries against float64, which is slow; the whole against PyTorch's kernel.
    group = heads // kv_heads
    first = [q[:, :group], k[:, :1], v[:, :1]]
    own = tuple(g[:, :group] for g in grads or ()) or None
    part = lambda results: tuple(x[:, : (1 if place == 0 else group)] for x in results)  # noqa: E731
    exact = _checked(formula, first, own, which, part)
    whole = cache(lambda: _results(sdpa, (q, k, v), grads, False)[which])

    def check(results: Tensors) -> list[Check]:
        agree = [Check(f"all of result {n}", relative_error(got, want), _AGREEMENT)
                 for n, (got, want) in enumerate(zip(results, whole(), strict=True))]  # fmt: skip
        return [*exact(results), *agree]

    return Work(run, check)


def _log_sums(q: torch.Tensor, k: torch.Tensor, lengths: Sequence[int], causal: bool, scale: float) -> torch.Tensor:
    """The softmax's sums as powers of two, ``(Hq, T)`` float32: one head's scores of one segment at a time."""
    group, rows = q.shape[1] // k.shape[1], []
    for head in range(q.shape[1]):
        parts, begin = [], 0
        for n in lengths:
            at = slice(begin, begin + n)
            scores = q[at, head].float() @ k[at, head // group].float().T * scale
            if causal:
                scores.masked_fill_(torch.ones_like(scores, dtype=torch.bool).triu_(1), -math.inf)
            parts.append(scores.logsumexp(1))
            begin += n
        rows.append(torch.cat(parts))
    return torch.stack(rows) * math.log2(math.e)


# ----------------------------------------------------------------------------------------------------------- the rest


def _rotations(quick: bool) -> Iterator[Subject]:
    tokens = 24 if quick else 8192
    grid = {"block_m": (2, 4, 8, 16, 32), "heads": (2, 4, 8, 16, 32), "num_warps": (2, 4, 8)}

    def vision(device: torch.device, dtype: torch.dtype) -> Work:
        random = _random(device, dtype)
        qkv, angle = random(tokens, 3, 16, 80), random(tokens, 40).float()
        q, k, cos, sin = qkv[:, 0], qkv[:, 1], angle.cos(), angle.sin()
        return _rotation(q, k, {"cos": cos, "sin": sin}, vision_rope_ref, (cos, sin))

    def text(heads: int, kv_heads: int, device: torch.device, dtype: torch.dtype) -> Work:
        random, section = _random(device, dtype), (16, 24, 24)
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

    return Work(run, _checked(formula, (q, k, *tables)))


def _norms(quick: bool) -> Iterator[Subject]:
    tokens, warps = 32 if quick else 8192, (1, 2, 4, 8, 16)

    def forward(columns: int, centred: bool, device: torch.device, dtype: torch.dtype) -> Work:
        random = _random(device, dtype)
        x, residual, weight, bias = random(tokens, columns), random(tokens, columns), random(columns), random(columns)
        biases = (bias,) if centred else ()
        run = lambda: norm.launch_forward(x, residual, weight, *(biases or (None,)), 1e-6, centred)[:2]  # noqa: E731

        def formula(x: torch.Tensor, residual: torch.Tensor, *parameters: torch.Tensor) -> Tensors:
            # In float64 too of the rounded sum, which is what the norm's input is.
            total = (x.to(dtype) + residual.to(dtype)).to(x.dtype)
            norm: Callable = layer_norm_ref if centred else rms_norm_ref
            return norm(total, *parameters), total

        return Work(run, _checked(formula, (x, residual, weight, *biases)))

    def backward(columns: int, centred: bool, device: torch.device, dtype: torch.dtype) -> Work:
        random = _random(device, dtype)
        s, dy, weight, bias = random(tokens, columns), random(tokens, columns), random(columns), random(columns)
        wide = s.float()
        mean = wide.mean(1) if centred else wide.new_zeros(tokens)
        rstd = ((wide - mean[:, None]).square().mean(1) + 1e-6).rsqrt()
        biases = (bias,) if centred else ()
        run = lambda: norm.launch_backward(dy, s, None, weight, mean, rstd, centred, centred)[: 2 + centred]  # noqa: E731
        formula: Callable = layer_norm_ref if centred else rms_norm_ref
        return Work(run, _checked(formula, (s, weight, *biases), (dy,)))

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
        random = _random(device, dtype)
        x, other = random(tokens, columns), random(columns) if biased else random(tokens, columns)
        bias, up = (other, None) if biased else (None, other)
        if not backward:

            def run() -> Tensors:
                y = torch.empty_like(x)
                elementwise.launch_forward(x, bias, up, y, scale)
                return (y,)

            return Work(run, _checked(formula, (x, other)))
        grad = random(tokens, columns)

        def run_backward() -> Tensors:
            dx, dup = torch.empty_like(x), None if up is None else torch.empty_like(up)
            second = elementwise.launch_backward(grad, x, bias, up, dx, dup, scale)
            second = dup if second is None else second
            assert second is not None
            return dx, second

        return Work(run_backward, _checked(formula, (x, other), (grad,)))

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
        random = _random(device, dtype)
        x, weight = random(rows, depth), random(columns, depth)
        if not gelu:  # patches come as bytes
            x = (x.float() * 40 + 128).clamp(0, 255).to(torch.uint8)

        def formula(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            y = patch_embed_ref(x, weight)
            return torch.nn.functional.gelu(y) if gelu else y

        return Work(lambda: gemm.launch_gemm(x, weight, None, gelu)[:1], _checked(formula, (x, weight)))

    for name, rows, depth, columns, gelu in (
        ("patch_embed of bytes", tokens, 588, 128 if quick else 1280, False),
        ("patch_merge fc1 + GELU", tokens // 4, 5120 if not quick else 256, 5120 if not quick else 256, True),
    ):
        make = partial(work, rows, depth, columns, gelu)
        yield Subject("product", name, "_gemm_kernel", gemm, "config", grid, make)


def _losses(quick: bool) -> Iterator[Subject]:
    rows, columns = (4, 5000) if quick else (1024, 151_936)

    def work(device: torch.device, dtype: torch.dtype) -> Work:
        logits, target = _random(device, dtype)(rows, columns), torch.arange(rows, device=device) * 97 % columns

        def run() -> Tensors:
            loss = torch.empty(rows, device=device)
            return loss, cross_entropy.launch_rows(logits.clone(), target, None, loss, -100, 0.0, True)

        def formula(logits: torch.Tensor) -> Tensors:
            logs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(1)
            chosen = torch.nn.functional.one_hot(target, columns)
            return -(logs * chosen).sum(1), (logs.exp() - chosen).to(logits.dtype)

        return Work(run, _checked(formula, (logits,)))

    grid = {"block_n": (2048, 4096, 8192, 16384), "num_warps": (8, 16, 32)}
    yield Subject(f"cross_entropy {columns}", f"{rows} rows", "_row_kernel", cross_entropy, "config", grid, work)
