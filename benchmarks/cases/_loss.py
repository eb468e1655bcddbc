"""The loss of the training case: who computes it, on which inputs, and what its operations move, counted."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from qwen2vl.training.errors import TrainingConfigError
from qwen2vl.training.loss import check_kind, summed_loss
from qwen2vl_kernels import linear_cross_entropy
from qwen2vl_kernels.core.backends import unavailable
from qwen2vl_kernels.ops.linear_cross_entropy import chunk_size

from ._training import grads_on

#: kind -> its name in the table; ours first.
KINDS = {
    "chunked": "chunked",
    "triton": "triton",
    "full": "full logits",
    "torch": "torch.linear_cross_entropy",
    "liger": "Liger",
}
OURS = ("chunked", "triton")


def why_not(kind: str, device: torch.device) -> str | None:
    """Why this kind of loss cannot run on ``device``, or ``None`` when it can."""
    if kind == "triton":
        return "on a CPU kernels are only interpreted" if device.type == "cpu" else unavailable(kind, device.type)
    if kind == "torch":
        return None if hasattr(torch.nn, "LinearCrossEntropyOptions") else f"torch {torch.__version__} has none"
    try:
        check_kind(kind, device)
    except TrainingConfigError as error:
        return str(error)
    return None


def inputs(
    tokens: int, width: int, vocabulary: int, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """States ``(tokens, width)``, a head ``(vocabulary, width)`` and a target for every row."""
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn((tokens, width), generator=generator, device=device).to(dtype).requires_grad_()
    weight = torch.randn((vocabulary, width), generator=generator, device=device).mul_(0.02).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(vocabulary, (tokens,), generator=generator, device=device)


def loss_and_gradients(kind: str, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor):
    """``(loss, gradient of hidden, gradient of weight)`` of the mean."""
    with grads_on(), torch.enable_grad():
        if kind == "triton":
            loss = linear_cross_entropy(hidden, weight, targets, backend="triton")
        elif kind == "torch":  # PyTorch's own, in chunks of its choice
            options = torch.nn.LinearCrossEntropyOptions()
            loss = F.linear_cross_entropy(hidden, weight, targets, options=options)
        else:
            loss = summed_loss(hidden, weight, targets, scale=1 / targets.shape[0], kind=kind)
        return (loss.detach(), *torch.autograd.grad(loss, (hidden, weight)))


def counted_bytes(kind: str, tokens: int, width: int, vocabulary: int, itemsize: int, device: str) -> float:
    """Bytes between memory and the operations of one forward and backward, each reading and writing all it touches.

    Of logits, the head and the head's gradient; hidden states are a hundredth. ``kind`` is "chunked", "triton" or
    "full". ``itemsize`` 2 or 4; what is not float32 is converted where an operation computes in it.
    """
    wide, head, logits = 4, vocabulary * width, tokens * vocabulary
    down = up = 0 if itemsize == wide else itemsize + wide  # a conversion of every number
    if kind == "full":
        # Logits, log-softmax, the gradient of the one and of the other; the head is read twice, its gradient written.
        each = itemsize + up + 2 * wide + wide + 3 * wide + down + 2 * itemsize
        return logits * each + head * 3 * itemsize
    if kind == "triton":
        each = itemsize + 3 * itemsize + 2 * itemsize  # written, read twice and overwritten, read by two products
    else:
        each = itemsize + up + (1 + 2 + 2 + 1 + 2) * wide + down + 2 * itemsize  # amax, sub, exp, sum, mul
    chunks = -(-tokens // chunk_size(tokens, vocabulary, device))
    # The sum of the head's gradient, float32, is read and written once a chunk, and its factor once.
    of_head = chunks * (2 * itemsize + 2 * wide) + down + 2 * itemsize
    return logits * each + head * of_head
