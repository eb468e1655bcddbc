"""Matrix products of few rows with what surrounds them in a decoder layer, one launch each.

With n = rms_norm(x) = x / sqrt(mean(x^2) + eps) * norm_weight:

    rms_norm_linear   y = [n W_1^T + b_1, n W_2^T + b_2, ...]        (queries, keys and values; or the head)
    rms_norm_swiglu   y = silu(n G^T) * (n U^T)                      (the first half of an MLP, Shazeer 2020)
    linear_add_       residual += x W^T                              (what ends attention and the MLP)

Shapes: x ``(R, K)``, weights ``(N, K)``, residual ``(R, N)``. dtypes: float32, bfloat16, float16. A step of decoding
has one row a sequence, and reading the weights is all the work there is: the kernels (``triton.few_rows``, and
``csrc/cpu/decoder_step`` on a CPU) take up to 8 rows of bfloat16 and read each weight once. Other rows and dtypes are
the formula's, of PyTorch's operations. Inference only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from ..core import native
from ..core.backends import BackendError, forced, resolve
from ..core.checks import Checker, no_overlap
from ..core.formulas import rms_normed
from ..core.library import direct, mark_written, register_opaque
from ..core.matmul import in_autocast_dtype
from ..core.namespace import torch_ops
from ..triton.few_rows import MAX_ROWS, launch_linear_add, launch_norm_linear, launch_norm_swiglu


def rms_norm_linear_ref(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    eps: float,
    prefetch: bool = False,
) -> torch.Tensor:
    """The formula in PyTorch's operations, which read nothing ahead."""
    n = rms_normed(x, norm_weight, eps)
    return torch.cat([F.linear(n, weight, bias) for weight, bias in zip(weights, biases, strict=True)], 1)


def rms_norm_swiglu_ref(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    gate_weight: torch.Tensor,
    up_weight: torch.Tensor,
    eps: float,
    prefetch: bool = False,
) -> torch.Tensor:
    """The formula, the activation in (at least) float32."""
    n = rms_normed(x, norm_weight, eps)
    gate, up = (
        F.linear(n, weight).to(torch.promote_types(x.dtype, torch.float32)) for weight in (gate_weight, up_weight)
    )
    return (F.silu(gate) * up).to(x.dtype)


def linear_add_ref(residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, prefetch: bool = False) -> None:
    """The formula; residual is overwritten."""
    residual.add_(F.linear(x, weight))


def _serve(op: str, x: torch.Tensor, backend: str | None, given: Sequence[torch.Tensor]) -> str:
    """The backend that serves: a kernel where it has a form for the tensors and comes first, or is named."""
    name = resolve(op, x.device.type, backend)
    if name == "eager" or (unfit := _unfit(name, x, given)) is None:
        return name
    if backend is not None or forced(op) is not None:
        raise BackendError(f"{op}: backend {name!r} {unfit}")
    return "eager"


def _unfit(name: str, x: torch.Tensor, given: Sequence[torch.Tensor]) -> str | None:
    if x.dtype != torch.bfloat16:
        return f"takes bfloat16, got {x.dtype}"
    if x.shape[0] > MAX_ROWS:
        return f"takes at most {MAX_ROWS} rows, x has {x.shape[0]}"
    if name == "native":
        dense = all(one.stride(-1) == 1 for one in (x, *given))
        return None if dense else "takes tensors whose last dimension is contiguous"
    if torch.version.hip is not None:
        return "takes NVIDIA's cards, whose matrix instructions have a side of 8"
    return None if all(one.is_contiguous() for one in given) else "takes contiguous weights"


def _native_linear(x, norm_weight, weights, biases, eps, prefetch) -> torch.Tensor:
    counts = [one.shape[0] for one in weights]
    y = x.new_empty((x.shape[0], sum(counts)))
    native.cpu().rms_norm_linear(
        native.view(x), native.view(norm_weight), eps, list(map(native.view, weights)), list(map(native.view, biases)),
        counts, native.view(y), tuple(x.shape), (torch.get_num_threads(), 0),
    )  # fmt: skip
    return y


def _native_swiglu(x, norm_weight, gate_weight, up_weight, eps, prefetch) -> torch.Tensor:
    y = x.new_empty((x.shape[0], gate_weight.shape[0]))
    views = (native.view(gate_weight), native.view(up_weight), native.view(y))
    sizes = (*y.shape, x.shape[1])
    options = (torch.get_num_threads(), 0, 0)
    native.cpu().rms_norm_swiglu(native.view(x), native.view(norm_weight), eps, *views, sizes, options)
    return y


def _native_add(residual, x, weight, prefetch) -> None:
    views, sizes = (native.view(residual), native.view(x), native.view(weight)), (*residual.shape, x.shape[1])
    native.cpu().linear_add(*views, sizes, (torch.get_num_threads(), 0))


def _refuse_grad(op: str, *tensors: torch.Tensor | None) -> None:
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        raise ValueError(f"{op}: no argument may require grad; call it under torch.no_grad()")


# ------------------------------------------------------------------------------------------------------ rms_norm_linear


def _check_linear(x, norm_weight, weights, biases, eps, prefetch, backend) -> str:
    check = Checker("rms_norm_linear")
    check.tensor("x", x, ("R", "K"))
    check.tensor("norm_weight", norm_weight, ("K",), like=x)
    check.require(1 <= len(weights) <= 3, f"weights must be one to three, got {len(weights)}")
    check.require(len(biases) == len(weights), f"biases must be one for each weight, None too, got {len(biases)}")
    for n, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        check.tensor(f"weights[{n}]", weight, (f"N{n}", "K"), like=x)
        if bias is not None:
            check.tensor(f"biases[{n}]", bias, (f"N{n}",), like=x)
    return _serve("rms_norm_linear", x, backend, (norm_weight, *weights, *(b for b in biases if b is not None)))


_LINEAR: dict[str, Callable[..., torch.Tensor]] = {
    "eager": rms_norm_linear_ref,
    "native": _native_linear,
    "triton": launch_norm_linear,
}


def _run_linear(x, norm_weight, weights, biases, eps, prefetch, backend) -> torch.Tensor:
    return _LINEAR[backend](x, norm_weight, weights, biases, eps, prefetch)


register_opaque(
    "rms_norm_linear(Tensor x, Tensor norm_weight, Tensor[] weights, Tensor?[] biases, float eps, bool prefetch,"
    " str backend) -> Tensor",
    fake=lambda x, norm_weight, weights, *_: x.new_empty((x.shape[0], sum(one.shape[0] for one in weights))),
    check=_check_linear,
    CPU=_run_linear,
    CUDA=_run_linear,
)


def rms_norm_linear(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None] | None = None,
    *,
    eps: float = 1e-6,
    prefetch: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """The RMSNorm of rows times up to three weights, whose products stand side by side.

    Args:
        x: ``(R, K)`` bfloat16, float16 or float32.
        norm_weight: ``(K,)``, x's dtype, as all that follow.
        weights: one to three of ``(N_i, K)``.
        biases: ``(N_i,)`` or ``None`` for each weight; default none.
        eps: added to the mean square.
        prefetch: on cards from Hopper on, read weights before the kernel ahead in the stream has ended (programmatic
            dependent launch). Only where no kernel launched since the last ordinary one writes them.
        backend: ``None`` (choose), ``"triton"`` (R at most 8, bfloat16, contiguous weights), ``"native"`` (the CPU's; R
            at most 8, bfloat16), ``"eager"``.

    Under autocast the tensors are taken in its dtype, as PyTorch does for matrix products.

    Returns ``(R, N_1 + N_2 + N_3)`` in x's dtype. Raises ``TypeError``/``ValueError`` naming the argument that does not
    fit, also when one requires grad, and :class:`BackendError` for a backend that does not serve.
    """
    op = "rms_norm_linear"
    given = [None] * len(weights) if biases is None else list(biases)
    x, norm_weight, *both = in_autocast_dtype(x, norm_weight, *weights, *given)
    weights, given = both[: len(weights)], both[len(weights) :]
    name = _check_linear(x, norm_weight, weights, given, eps, prefetch, backend)
    _refuse_grad(op, x, norm_weight, *weights, *given)
    if direct(x, norm_weight, *weights, *given):
        return _LINEAR[name](x, norm_weight, weights, given, eps, prefetch)
    return torch_ops.rms_norm_linear(x, norm_weight, weights, given, eps, prefetch, name)


# ------------------------------------------------------------------------------------------------------ rms_norm_swiglu


def _check_swiglu(x, norm_weight, gate_weight, up_weight, eps, prefetch, backend) -> str:
    check = Checker("rms_norm_swiglu")
    check.tensor("x", x, ("R", "K"))
    check.tensor("norm_weight", norm_weight, ("K",), like=x)
    check.tensor("gate_weight", gate_weight, ("N", "K"), like=x)
    check.tensor("up_weight", up_weight, ("N", "K"), like=x)
    return _serve("rms_norm_swiglu", x, backend, (norm_weight, gate_weight, up_weight))


_SWIGLU: dict[str, Callable[..., torch.Tensor]] = {
    "eager": rms_norm_swiglu_ref,
    "native": _native_swiglu,
    "triton": launch_norm_swiglu,
}


def _run_swiglu(x, norm_weight, gate_weight, up_weight, eps, prefetch, backend) -> torch.Tensor:
    return _SWIGLU[backend](x, norm_weight, gate_weight, up_weight, eps, prefetch)


register_opaque(
    "rms_norm_swiglu(Tensor x, Tensor norm_weight, Tensor gate_weight, Tensor up_weight, float eps, bool prefetch,"
    " str backend) -> Tensor",
    fake=lambda x, norm_weight, gate_weight, *_: x.new_empty((x.shape[0], gate_weight.shape[0])),
    check=_check_swiglu,
    CPU=_run_swiglu,
    CUDA=_run_swiglu,
)


def rms_norm_swiglu(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    gate_weight: torch.Tensor,
    up_weight: torch.Tensor,
    *,
    eps: float = 1e-6,
    prefetch: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """The gated activation of the RMSNorm of rows, ``silu(n G^T) * (n U^T)``.

    Args as in :func:`rms_norm_linear`; ``gate_weight`` and ``up_weight`` are ``(N, K)``.

    Returns ``(R, N)`` in x's dtype. Raises as :func:`rms_norm_linear`.
    """
    x, norm_weight, gate_weight, up_weight = in_autocast_dtype(x, norm_weight, gate_weight, up_weight)
    name = _check_swiglu(x, norm_weight, gate_weight, up_weight, eps, prefetch, backend)
    _refuse_grad("rms_norm_swiglu", x, norm_weight, gate_weight, up_weight)
    if direct(x, norm_weight, gate_weight, up_weight):
        return _SWIGLU[name](x, norm_weight, gate_weight, up_weight, eps, prefetch)
    return torch_ops.rms_norm_swiglu(x, norm_weight, gate_weight, up_weight, eps, prefetch, name)


# ---------------------------------------------------------------------------------------------------------- linear_add_


def _check_add(residual, x, weight, prefetch, backend) -> str:
    check = Checker("linear_add_")
    check.tensor("residual", residual, ("R", "N"))
    check.tensor("x", x, ("R", "K"), like=residual)
    check.tensor("weight", weight, ("N", "K"), like=residual)
    return _serve("linear_add", x, backend, (residual, weight))


_ADD: dict[str, Callable[..., None]] = {
    "eager": linear_add_ref,
    "native": _native_add,
    "triton": launch_linear_add,
}


def _run_add(residual, x, weight, prefetch, backend) -> None:
    _ADD[backend](residual, x, weight, prefetch)


register_opaque(
    "linear_add_(Tensor(a!) residual, Tensor x, Tensor weight, bool prefetch, str backend) -> ()",
    fake=lambda *_: None,
    check=_check_add,
    CPU=_run_add,
    CUDA=_run_add,
)


def linear_add_(
    residual: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    prefetch: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """Add ``x W^T`` to ``residual`` in place.

    Args:
        residual: ``(R, N)``, overwritten; x: ``(R, K)``; weight: ``(N, K)``, all of one dtype.
        prefetch, backend: as in :func:`rms_norm_linear`; the kernel wants ``residual`` contiguous too.

    Under autocast x and weight are taken in its dtype, which must then be residual's.

    Returns ``residual``. Raises as :func:`rms_norm_linear`, and ``ValueError`` where residual shares memory with
    another argument or with itself.
    """
    x, weight = in_autocast_dtype(x, weight)
    name = _check_add(residual, x, weight, prefetch, backend)
    _refuse_grad("linear_add_", residual, x, weight)
    no_overlap("linear_add_", {"residual": residual}, {"x": x, "weight": weight})
    if direct(residual, x, weight):
        _ADD[name](residual, x, weight, prefetch)
        mark_written(residual)
    else:
        torch_ops.linear_add_(residual, x, weight, prefetch, name)
    return residual
