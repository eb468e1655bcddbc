"""A linear layer for each group of rows, and the sort that makes groups of a router's choices.

    grouped_linear(x, weight, bounds)[m] = weight[g] @ x[m]  for  bounds[g] <= m < bounds[g + 1], 0 behind the last
    group_by_expert(experts): the stable sort of the choices, its inverse, and the bounds of the groups

Shapes: x ``(M, K)``, weight ``(G, N, K)``, bounds ``(G + 1,)`` int32; experts ``(T, k)`` integers. dtypes: float32,
bfloat16, float16, sums in float32. This is what a mixture of experts computes (Shazeer et al. 2017, arXiv 1701.06538;
without padding or dropped tokens, as in MegaBlocks, arXiv 2211.15841). The kernels are in ``triton.grouped_gemm``.

The reference reads the bounds on the host, where they tell which experts have rows: on a GPU it waits for them, and
cannot be captured in a CUDA graph. The kernels do neither.
"""

from __future__ import annotations

import torch

from ..core.backends import resolve
from ..core.checks import INTS, Checker
from ..core.groups import check_bounds
from ..core.library import direct, first_order, register_composite, register_opaque, watched
from ..core.matmul import in_autocast_dtype, linear
from ..core.namespace import torch_ops
from ..triton.grouped_gemm import launch_rows, launch_sort, launch_weight


def grouped_linear_ref(
    x: torch.Tensor, weight: torch.Tensor, bounds: torch.Tensor, *, upcast: bool = False
) -> torch.Tensor:
    """One product after another, for the groups that have rows; in float32 with ``upcast``."""
    if upcast:
        return grouped_linear_ref(x.float(), weight.float(), bounds).to(x.dtype)
    ends = bounds.tolist()
    groups = zip(ends[:-1], ends[1:], weight.unbind(0), strict=True)  # one gradient for all of weight, not one a group
    # The first group has a product even without rows, so that what is differentiated depends on both operands.
    parts = [linear(x[begin:end], matrix) for begin, end, matrix in groups if end > begin or begin == 0]
    return torch.cat([*parts, x.new_zeros(x.shape[0] - ends[-1], weight.shape[1])])


def group_by_expert_ref(experts: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The sort of PyTorch."""
    flat = experts.flatten().long()
    flat = torch.where((flat < 0) | (flat >= num_experts), num_experts, flat)
    found, order = flat.sort(stable=True)
    places = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=order.device))
    ends = torch.arange(num_experts + 1, device=order.device)
    return order, places, torch.searchsorted(found, ends, out_int32=True)


def _forward(x: torch.Tensor, weight: torch.Tensor, bounds: torch.Tensor, triton: bool) -> torch.Tensor:
    return launch_rows(x, weight, bounds) if triton else grouped_linear_ref(x, weight, bounds)


def _run_backward(dy, x, weight, bounds, triton, wants):
    """``(dx, dweight)``, empty where not wanted."""
    dx, dweight = x.new_empty(0), weight.new_empty(0)
    if wants[0]:
        dx = launch_rows(dy, weight, bounds, True) if triton else grouped_linear_ref(dy, weight.mT, bounds)
    if wants[1] and triton:
        dweight = launch_weight(dy, x, bounds)
    elif wants[1]:
        ends = bounds.tolist()
        dweight = torch.stack([dy[a:b].T @ x[a:b] for a, b in zip(ends[:-1], ends[1:], strict=True)])
    return dx, dweight


def _fake_forward(x, weight, bounds, triton):
    return x.new_empty((x.shape[0], weight.shape[1]))


def _fake_backward(dy, x, weight, bounds, triton, wants):
    return x.new_empty(x.shape if wants[0] else 0), weight.new_empty(weight.shape if wants[1] else 0)


def _fake_sort(experts, num_experts):
    order = experts.new_empty(experts.numel(), dtype=torch.int64)
    return order, torch.empty_like(order), experts.new_empty(num_experts + 1, dtype=torch.int32)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bounds, ctx.triton = inputs
    ctx.save_for_backward(x, weight, bounds)


def _backward(ctx, dy):
    wants = list(ctx.needs_input_grad[:2])
    arguments = (dy, *ctx.saved_tensors, ctx.triton, wants)
    grads = first_order("grouped_linear", torch_ops.grouped_linear_backward, *arguments)
    return *(grad if want else None for grad, want in zip(grads, wants, strict=True)), None, None


def _check(op: str, x, weight, bounds, dy=None, wants=(True, True)) -> Checker:
    """Refuse what does not fit; bounds by their values where the host has them."""
    check = Checker(op)
    check.tensor("x", x, ("M", "K"))
    check.tensor("weight", weight, ("G", "N", "K"), like=x)
    check.require(0 not in weight.shape, "weight must have a group, a row and a column at least")
    check_bounds(check, bounds, weight.shape[0], x.shape[0])
    if dy is not None:
        check.tensor("dy", dy, ("M", "N"), like=x)
        check.require(len(wants) == 2, f"wants must have two entries, got {len(wants)}")
    return check


def _check_sort(op: str, experts, num_experts) -> None:
    check = Checker(op)
    check.tensor("experts", experts, ("T", "k"), dtypes=INTS)
    check.require(0 < num_experts < 2**15, f"num_experts must be from 1 to {2**15 - 1}, got {num_experts}")
    check.require(experts.numel() < 2**31, "experts must have fewer than 2^31 entries")


register_opaque(
    "grouped_linear_forward(Tensor x, Tensor weight, Tensor bounds, bool triton) -> Tensor",
    fake=_fake_forward,
    check=lambda x, weight, bounds, triton: _check("grouped_linear_forward", x, weight, bounds),
    setup_context=_setup_context,
    backward=_backward,
    CPU=_forward,
    CUDA=_forward,
)
register_opaque(
    "grouped_linear_backward(Tensor dy, Tensor x, Tensor weight, Tensor bounds, bool triton, bool[] wants)"
    " -> (Tensor, Tensor)",
    fake=_fake_backward,
    check=lambda dy, x, weight, bounds, triton, wants: _check("grouped_linear_backward", x, weight, bounds, dy, wants),
    CPU=_run_backward,
    CUDA=_run_backward,
)
register_opaque(
    "group_by_expert_forward(Tensor experts, int num_experts) -> (Tensor, Tensor, Tensor)",
    fake=_fake_sort,
    check=lambda experts, num_experts: _check_sort("group_by_expert_forward", experts, num_experts),
    CPU=launch_sort,
    CUDA=launch_sort,
)


def grouped_linear(
    x: torch.Tensor, weight: torch.Tensor, bounds: torch.Tensor, *, backend: str | None = None
) -> torch.Tensor:
    """Each group's rows times its matrix, with gradients for ``x`` and ``weight``.

    Args:
        x: ``(M, K)``, rows sorted by group.
        weight: ``(G, N, K)``, same dtype.
        bounds: ``(G + 1,)`` int32 on the same device, rising from 0 to at most M; groups may be empty.
        backend: ``None`` (choose), ``"triton"``, ``"eager"``.

    Returns ``(M, N)``, zero in rows behind the last bound. With ``"triton"`` a row's bits do not depend on the rows of
    other groups, nor on how many there are. Under autocast ``x`` and ``weight`` are taken in its dtype. Raises
    ``TypeError``/``ValueError`` naming the argument that does not fit; bounds on a GPU, which nobody reads on the host,
    are cut to the rows.
    """
    x, weight = in_autocast_dtype(x, weight)
    _check("grouped_linear", x, weight, bounds)
    triton = resolve("grouped_linear", x.device.type, backend) == "triton"
    if triton and direct(x, weight):
        return launch_rows(x, weight, bounds)
    if triton or x.is_meta or torch.compiler.is_compiling() or watched():  # nothing there can follow the bounds
        return torch_ops.grouped_linear_forward(x, weight, bounds, triton)
    return grouped_linear_ref(x, weight, bounds)


def group_by_expert(
    experts: torch.Tensor, num_experts: int, *, backend: str | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sort a router's choices by expert, those of one expert in the order of the tokens.

    Args:
        experts: ``(T, k)`` integers, the experts of each token. What is outside of ``[0, num_experts)`` is a choice of
            none and comes last, behind the last bound.
        backend: ``None`` (choose), ``"triton"``, ``"eager"``.

    Returns ``(order, places, bounds)``: ``order (T k,)`` int64, the flat choice at each place; ``places (T k,)`` int64,
    its inverse, the place of each choice; ``bounds (num_experts + 1,)`` int32, where each expert's choices begin and
    the last one's end. Nothing is read on the host. Raises ``TypeError``/``ValueError`` naming what does not fit.
    """
    _check_sort("group_by_expert", experts, num_experts)
    if resolve("group_by_expert", experts.device.type, backend) == "eager":
        return group_by_expert_ref(experts, num_experts)
    return (launch_sort if direct(experts) else torch_ops.group_by_expert_forward)(experts, num_experts)


register_composite("grouped_linear(Tensor x, Tensor weight, Tensor bounds) -> Tensor", grouped_linear)
register_composite("group_by_expert(Tensor experts, int num_experts) -> (Tensor, Tensor, Tensor)", group_by_expert)
