"""The loss of a pack's supervised rows, summed: the kernels' own in chunks, Liger's, or PyTorch's of all logits."""

from __future__ import annotations

import torch

from qwen2vl_kernels import linear_cross_entropy

from .errors import TrainingConfigError
from .packing import IGNORE

KINDS = ("chunked", "liger", "full")


def summed_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    scale: float = 1.0,
    kind: str = "chunked",
    chunk_rows: int | None = None,
) -> torch.Tensor:
    """``scale`` times the summed cross-entropy of ``hidden @ weight.T`` against ``targets``.

    Args:
        hidden: ``(T, C)`` floats. weight: ``(V, C)``, same dtype and device.
        targets: ``(T,)`` int64, -100 where no loss is taken; such rows never meet the head.
        scale: one over the supervised tokens of the whole step, say, so that parts of a batch add up to its mean.
        kind: ``"chunked"``: :func:`qwen2vl_kernels.linear_cross_entropy`; ``"liger"``: Liger's fused Triton kernel
            (CUDA, liger-kernel installed); ``"full"``: all logits at once.
        chunk_rows: rows whose logits exist at once with ``"chunked"``; ``None`` chooses.

    Returns a scalar, float32 (float64 for float64 input).
    Raises ``ValueError``/``TypeError`` for arguments that do not fit, :class:`TrainingConfigError` for a kind that
    cannot serve here.
    """
    check_kind(kind, hidden.device)
    if kind == "liger":
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss  # type: ignore[import-not-found]

        loss = LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORE, reduction="sum", accum_dtype=torch.float32)
        return loss(weight, hidden, targets) * scale
    if kind == "full":
        chunk_rows, backend = None, "eager"
    else:
        backend = None
        # Elsewhere than on a CPU the op may not wait for how many there are; shapes that do not fit it refuses.
        if hidden.device.type != "cpu" and targets.shape == hidden.shape[:1]:
            kept = (targets != IGNORE).nonzero().squeeze(1)
            hidden, targets = hidden.index_select(0, kept), targets.index_select(0, kept)
    loss = linear_cross_entropy(
        hidden, weight, targets, ignore_index=IGNORE, reduction="sum", chunk_rows=chunk_rows, backend=backend
    )
    return loss * scale


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
    chunk_rows: int | None = None,
) -> torch.Tensor:
    """``(S,)`` summed cross-entropy of each sample, for telling which of a pack's samples a bad loss came from."""
    losses = linear_cross_entropy(hidden, weight, targets, ignore_index=IGNORE, reduction="none", chunk_rows=chunk_rows)
    return torch.stack([sample.sum() for sample in losses.split(cu_seqlens.diff().tolist())])
