"""Cross-entropy of the head's logits without the logits: a few rows at a time, gradients made on the way forward.

    loss = sum over t with target(t) != -100 of  logsumexp(W h_t) - (W h_t)[target(t)]

With a vocabulary of 151,936, the float32 logits of 8192 tokens and their gradient would take 10 GB. Here each chunk's
logits live only until ``softmax - onehot`` has been multiplied into the gradients of ``h`` and ``W``, and rows without
a target never meet the head. The softmax is float32 (float64 for float64 input).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .errors import TrainingConfigError
from .packing import IGNORE

#: Rows whose logits exist at once; 256 of a vocabulary of 151,936 in float32 are 156 MB.
CHUNK_ROWS = 256
KINDS = ("chunked", "liger", "full")


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, scale: float, rows: int):
        kept = (targets != IGNORE).nonzero().squeeze(1)
        h, t = hidden[kept], targets[kept]  # (N, C), (N,)
        accurate = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        total = torch.zeros((), dtype=accurate, device=hidden.device)
        grad_h = torch.zeros_like(hidden) if wants_hidden else None
        # Chunks add up in float32: bfloat16 would lose the later ones.
        grad_w = torch.zeros_like(weight, dtype=accurate) if wants_weight else None
        for begin in range(0, h.shape[0], rows):
            h_c, t_c = h[begin : begin + rows], t[begin : begin + rows]
            logits = F.linear(h_c, weight).to(accurate)  # (n, V)
            chosen, largest = logits.gather(1, t_c[:, None]), logits.amax(1, keepdim=True)
            # In the logits' place: one exponential serves the sum and the softmax, and no second chunk exists.
            d = logits.sub_(largest).exp_()
            sums = d.sum(1, keepdim=True)
            total += (sums.log() + largest - chosen).sum()
            if not (wants_hidden or wants_weight):
                continue
            d = d.mul_(scale / sums)
            d = d.scatter_add_(1, t_c[:, None], d.new_full((t_c.shape[0], 1), -scale)).to(hidden.dtype)
            if grad_h is not None:
                grad_h[kept[begin : begin + rows]] = d @ weight
            if grad_w is not None:
                # In place when the types agree, which saves the copy of a (V, C) product.
                grad_w = grad_w.addmm_(d.T, h_c) if d.dtype == accurate else grad_w.add_(d.T @ h_c)
        ctx.grads = (grad_h, None if grad_w is None else grad_w.to(weight.dtype))
        return total * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor):
        if ctx.grads is None:
            raise RuntimeError("chunked cross-entropy: its gradients were made in the forward and are used up")
        grads, ctx.grads = ctx.grads, None
        return (*(g if g is None else g.mul_(grad.to(g.dtype)) for g in grads), None, None, None)


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    scale: float = 1.0,
    kind: str = "chunked",
    chunk_rows: int = CHUNK_ROWS,
) -> torch.Tensor:
    """``scale`` times the summed cross-entropy of ``hidden @ weight.T`` against ``targets``.

    Args:
        hidden: ``(T, C)`` floats. weight: ``(V, C)``, same dtype and device.
        targets: ``(T,)`` int64, -100 where no loss is taken.
        scale: one over the supervised tokens of the whole step, say, so that parts of a batch add up to its mean.
        kind: ``"chunked"``: this module's; ``"liger"``: Liger's fused Triton kernel (CUDA, liger-kernel installed);
            ``"full"``: all logits at once.
        chunk_rows: rows whose logits exist at once with ``"chunked"``.

    Returns a scalar, float32 (float64 for float64 input). Its backward can run once, and has no second derivative.
    Raises ``ValueError``/``TypeError`` for arguments that do not fit, :class:`TrainingConfigError` for a kind that
    cannot serve here.
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden and weight must be (T, C) and (V, C), got {(*hidden.shape,)} and {(*weight.shape,)}")
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64 ({hidden.shape[0]},), got {targets.dtype} {(*targets.shape,)}")
    if weight.dtype != hidden.dtype:
        raise TypeError(f"weight must have hidden's dtype {hidden.dtype}, got {weight.dtype}")
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows must be positive, got {chunk_rows}")
    if kind == "chunked":
        return _ChunkedCrossEntropy.apply(hidden, weight, targets, scale, chunk_rows)  # type: ignore[return-value]
    if kind == "full":
        accurate = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        logits = F.linear(hidden, weight).to(accurate)
        return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum") * scale
    if kind == "liger":
        check_kind(kind, hidden.device)
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss  # type: ignore[import-not-found]

        loss = LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORE, reduction="sum", accum_dtype=torch.float32)
        return loss(weight, hidden, targets) * scale
    raise TrainingConfigError(f"loss: must be one of {', '.join(KINDS)}, got {kind!r}")


def check_kind(kind: str, device: torch.device) -> None:
    """Raise :class:`TrainingConfigError` when this kind of loss cannot run on ``device``."""
    if kind not in KINDS:
        raise TrainingConfigError(f"loss: must be one of {', '.join(KINDS)}, got {kind!r}")
    if kind != "liger":
        return
    if device.type != "cuda":
        raise TrainingConfigError(f"loss: 'liger' runs on CUDA, the model is on {device.type}")
    try:
        import liger_kernel.transformers  # type: ignore[import-not-found]  # noqa: F401
    except ImportError as error:
        raise TrainingConfigError(f"loss: 'liger' needs the package liger-kernel: {error}") from error


@torch.no_grad()
def sample_losses(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    chunk_rows: int = CHUNK_ROWS,
) -> torch.Tensor:
    """``(S,)`` summed cross-entropy of each sample, for telling which of a pack's samples a bad loss came from."""
    bounds = cu_seqlens.tolist()
    segments = [slice(a, b) for a, b in zip(bounds, bounds[1:], strict=False)]
    return torch.stack([linear_cross_entropy(hidden[s], weight, targets[s], chunk_rows=chunk_rows) for s in segments])
