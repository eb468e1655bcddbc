"""Cross-entropy of a linear layer's outputs without the outputs: a few rows of logits exist at a time.

    z_t = W h_t + b
    loss_t = log(sum(exp(z_t))) - (1 - s) z_t[y_t] - s mean(z_t)           0 where y_t is ignore_index
    d loss_t / d z_t = softmax(z_t) - (1 - s) onehot(y_t) - s / V

as ``torch.nn.functional.cross_entropy`` of ``linear(h, W, b)`` has it, with label smoothing s (Szegedy et al. 2016,
section 7). The sum and the mean make the gradients of h, W and b on the way forward, while a chunk's logits are there
(Hsu et al. 2024, arXiv 2410.10989), and the backward multiplies them by what it is given. ``reduction="none"`` has to
know that first, so its backward makes the logits again.

Shapes: hidden ``(..., C)``, weight ``(V, C)``, bias ``(V,)``, target ``(...)`` int64. dtypes: float32, bfloat16,
float16, with logits rounded to the dtype as a linear layer's are; softmax, loss and the sums of the gradients of W and
b over chunks are float32. The kernel is in ``triton.cross_entropy``; the matrix products are PyTorch's.

Bytes of n rows in a chunk, b a number's: the products write n V b of logits, the kernel reads them twice and writes
their gradient once, and two products read that: 6 n V b beside 6 n V C FLOPs. The sum of W's gradient is read and
written once a chunk, 8 V C bytes beside the 2 n V C FLOPs of its product, whatever n is: so chunks are not small.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch._C._autograd import _get_current_graph_task_keep_graph as keeps_graph

from ..core.backends import resolve
from ..core.checks import Checker
from ..core.launching import cdiv
from ..core.library import direct, first_order, register_composite, register_opaque
from ..core.matmul import in_autocast_dtype, slow_on_cpu
from ..core.namespace import torch_ops
from ..triton.cross_entropy import launch_rows

REDUCTIONS = ("mean", "sum", "none")

#: Rows of a chunk. The product for W's gradient is bound by arithmetic once 2 n FLOPs an element outweigh its 8 bytes:
#: from n = 4 FLOP/B on, 700 on a Hopper card (700 TFLOP/s, 4 TB/s). On a CPU, where n = 20 would do for that, each
#: product also packs the head anew: of 1024 rows of 1536 over 50,000 words, chunks of 256 took 3 to 6 % longer than of
#: 512 (one core of a Xeon), and these 3 % longer than all at once.
_ROWS, _ROWS_ON_CPU = 1024, 512
#: Most logits of a chunk of that many rows, for vocabularies far larger than language models have.
_LOGITS = 1 << 28
#: Elements of a large tensor that are converted at once: what that needs besides stays in tens of megabytes.
_PIECE = 1 << 23


def chunk_size(rows: int, vocabulary: int, device_type: str) -> int:
    """Rows whose logits exist at once: equal chunks of about the best size, none of them more than 1.5 times that.

    A short last chunk would cost a whole pass over the sum of W's gradient.
    """
    best = max(1, min(_ROWS_ON_CPU if device_type == "cpu" else _ROWS, _LOGITS // vocabulary))
    even = cdiv(rows, max(1, round(rows / best)))
    return max(1, min(cdiv(even, 8) * 8, rows))  # in eights, as matrix units want them


def linear_cross_entropy_ref(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """All logits at once, rounded to their dtype, and PyTorch's cross-entropy of them in (at least) float32."""
    logits = F.linear(hidden, weight, bias).reshape(target.numel(), weight.shape[0])
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = F.cross_entropy(
        wide, target.reshape(-1), ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
    )
    return loss.view(target.shape) if reduction == "none" else loss


def _rows_in_torch(
    logits: torch.Tensor,
    target: torch.Tensor,
    scale: torch.Tensor | None,
    loss: torch.Tensor,
    ignore_index: int,
    smoothing: float,
    gradient: bool,
) -> torch.Tensor:
    """:func:`launch_rows` in PyTorch's operations: one exponential, in the logits' place, for sum and softmax."""
    dtype, columns = logits.dtype, logits.shape[1]
    logits = logits.to(loss.dtype)
    y = target[:, None]
    known = (y >= 0) & (y < columns)
    y = torch.where(known, y, 0)
    chosen, largest = logits.gather(1, y), logits.amax(1, keepdim=True)
    mean = logits.mean(1, keepdim=True) if smoothing else None
    d = logits.sub_(largest).exp_()
    sums = d.sum(1, keepdim=True)
    value = sums.log() + largest - (1 - smoothing) * chosen
    if mean is not None:
        value -= smoothing * mean
    # 0 for rows to be ignored, NaN for targets that name no column, as nobody could refuse these on the host.
    factor = torch.where(known, 1.0, torch.nan).to(loss.dtype).masked_fill_(target[:, None] == ignore_index, 0)
    torch.where(factor == 0, factor, value * factor, out=loss[:, None])
    if not gradient:
        return logits
    if scale is not None:
        factor = factor * scale[:, None]
    d = d.mul_(factor / sums)
    if smoothing:
        d = d.sub_(factor * (smoothing / columns))
    return d.scatter_(1, y, d.gather(1, y) - (1 - smoothing) * factor).to(dtype)


def _add_product(total: torch.Tensor, d: torch.Tensor, h: torch.Tensor) -> None:
    """``total (V, C) += d (n, V)^T @ h (n, C)`` in total's precision, without a second tensor of its size."""
    if d.dtype == total.dtype:
        total.addmm_(d.T, h)
        return
    on_cuda = d.device.type == "cuda" and torch.version.hip is None
    slow = d.device.type == "cpu" and slow_on_cpu(d.dtype)
    if d.dtype == torch.bfloat16 and not on_cuda and not slow:
        total.add_(d.T @ h)  # rounded once a chunk; such a product is several times faster than one of float32
        return
    wide = h if on_cuda else h.to(total.dtype)
    columns = max(1, _PIECE // max(1, h.shape[1]))
    for part, of_part in zip(total.split(columns), d.split(columns, 1), strict=True):
        if on_cuda:
            part.add_(torch.mm(of_part.T, wide, out_dtype=total.dtype))
        else:
            part.addmm_(of_part.T.to(total.dtype), wide)


def _supervised(target: torch.Tensor, ignore_index: int, vocabulary: int) -> torch.Tensor | None:
    """Places of the targets that count, ``None`` for all of them. Read on the host, so for CPU tensors only.

    Raises ``ValueError`` for a target that names no column.
    """
    kept = (target != ignore_index).nonzero().squeeze(1)
    if kept.numel():
        ends = [int(end) for end in target[kept].aminmax()]
        if wrong := [end for end in ends if not 0 <= end < vocabulary]:
            wanted = f"in [0, {vocabulary}) or ignore_index = {ignore_index}"
            raise ValueError(f"linear_cross_entropy: target must be {wanted}, got {wrong[0]}")
    return None if kept.numel() == target.numel() else kept


def _summed(dtype: torch.dtype) -> torch.dtype:
    """What holds sums of gradients until the backward: float16 overflows where the mean it is scaled to does not."""
    return torch.float32 if dtype == torch.float16 else dtype


def _run(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None,
    ignore_index: int,
    reduction: str,
    smoothing: float,
    chunk_rows: int | None,
    triton: bool,
    wants: list[bool],
    scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """``(loss, gradients of hidden, weight and bias, count of targets)``, the gradients empty unless wanted.

    They are those of the sum, or of the sum of ``scale (...)`` times each loss.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    rows, device = hidden.reshape(target.numel(), hidden.shape[-1]), hidden.device
    target = target.reshape(-1).contiguous()
    scale = None if scale is None else scale.reshape(-1).contiguous()
    kept = _supervised(target, ignore_index, weight.shape[0]) if device.type == "cpu" else None
    count = target.numel() if kept is None else kept.numel()
    size = chunk_rows or chunk_size(count, weight.shape[0], device.type)
    losses = torch.empty(count, dtype=wide, device=device)
    make = torch.empty if kept is None else torch.zeros
    dhidden = make(hidden.shape if wants[0] else 0, dtype=hidden.dtype, device=device)
    dweight = torch.zeros(weight.shape if wants[1] else 0, dtype=wide, device=device)
    dbias = torch.zeros(weight.shape[0] if wants[2] else 0, dtype=wide, device=device)
    for begin in range(0, count, size):
        part = slice(begin, begin + size)
        at = part if kept is None else kept[part]
        h, y = rows[at], target[at]
        if device.type != "cpu":  # nothing that is ignored, a NaN say, may reach the products
            h = h.masked_fill((y == ignore_index)[:, None], 0)
        d = (launch_rows if triton else _rows_in_torch)(
            F.linear(h, weight, bias),
            y,
            None if scale is None else scale[at],
            losses[part],
            ignore_index,
            smoothing,
            any(wants),
        )
        if wants[0]:
            dhidden.view(rows.shape)[at] = d @ weight
        if wants[1]:
            _add_product(dweight, d, h)
        if wants[2]:
            dbias += d.sum(0, dtype=wide)
        del d  # before the next chunk's logits are made
    supervised = (target != ignore_index).sum().to(wide)
    if reduction != "none":
        loss = losses.sum() if reduction == "sum" else losses.sum() / supervised
    elif kept is None:
        loss = losses.view(hidden.shape[:-1])
    else:
        loss = losses.new_zeros(target.numel()).index_copy_(0, kept, losses).view(hidden.shape[:-1])
    return loss, dhidden, dweight.to(_summed(weight.dtype)), dbias.to(_summed(weight.dtype)), supervised


def _forward(hidden, weight, target, bias, ignore_index, reduction, smoothing, chunk_rows, triton, wants):
    """:func:`_run`; with ``reduction="none"`` the gradients wait for the backward."""
    made = [want and reduction != "none" for want in wants]
    return _run(hidden, weight, target, bias, ignore_index, reduction, smoothing, chunk_rows, triton, made)


def _fake_gradients(hidden, weight, wants):
    summed = _summed(weight.dtype)
    return (
        torch.empty(hidden.shape if wants[0] else 0, dtype=hidden.dtype, device=hidden.device),
        torch.empty(weight.shape if wants[1] else 0, dtype=summed, device=hidden.device),
        torch.empty(weight.shape[0] if wants[2] else 0, dtype=summed, device=hidden.device),
    )


def _fake_forward(hidden, weight, target, bias, ignore_index, reduction, smoothing, chunk_rows, triton, wants):
    made = [want and reduction != "none" for want in wants]
    loss = torch.empty(
        target.shape if reduction == "none" else (),
        dtype=torch.promote_types(hidden.dtype, torch.float32),
        device=hidden.device,
    )
    return loss, *_fake_gradients(hidden, weight, made), loss.new_empty(())


def _run_backward(grad, hidden, weight, target, bias, ignore_index, smoothing, chunk_rows, triton, wants):
    """Gradients of the sum of ``grad`` times the losses of the rows."""
    return _run(hidden, weight, target, bias, ignore_index, "none", smoothing, chunk_rows, triton, wants, grad)[1:4]


def _setup_context(ctx, inputs, output) -> None:
    hidden, weight, target, bias, *ctx.options, ctx.wants = inputs
    _, *made, count = output
    ctx.mark_non_differentiable(*made, count)
    ctx.set_materialize_grads(False)
    again = ctx.options[1] == "none"
    ctx.save_for_backward(hidden, weight, bias, *((target,) if again else (*made, count)))


def _backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 10
    hidden, weight, bias, *saved = ctx.saved_tensors
    ignore_index, reduction, *rest = ctx.options
    if reduction == "none":
        run = torch_ops.linear_cross_entropy_backward
        arguments = (grad, hidden, weight, saved[0], bias, ignore_index, *rest, ctx.wants)
    else:
        run, arguments = _scaled, (grad, hidden, weight, bias, *saved, reduction == "mean")
    found = first_order("linear_cross_entropy", run, *arguments)
    grads = [
        g.to(x.dtype) if want and g is not None else None
        for g, x, want in zip(found, (hidden, weight, bias), ctx.wants, strict=True)
    ]
    return grads[0], grads[1], None, grads[2], *(None,) * 6


def _scaled(grad, hidden, weight, bias, dhidden, dweight, dbias, count, mean):
    """The gradients of the sum times ``grad``, or for the mean times ``grad / count``: zeros where nothing counts."""
    factor = grad / count.clamp(min=1) if mean else grad
    made = zip((dhidden, dweight, dbias), (hidden, weight, bias), strict=True)
    return [g if x is None or not g.numel() else _times(g, factor, x.dtype) for g, x in made]


def _times(x: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``x * factor`` in factor's precision, rounded once to ``dtype``; in x's memory unless a later backward needs it.

    A GPU would round a scalar on it to x's dtype first, so that there the factor has a dimension.
    """
    if x.device.type != "cpu":
        factor = factor.reshape(1)
    if not direct(x):
        return (x * factor).to(dtype)
    in_place = x.dtype == dtype and not keeps_graph()
    return torch.mul(x, factor, out=x if in_place else torch.empty_like(x, dtype=dtype))


def _check(op: str, hidden, weight, target, bias, reduction, label_smoothing, chunk_rows) -> Checker:
    """Refuse what does not fit."""
    check = Checker(op)
    check.tensor("hidden", hidden, (..., "C"))
    check.tensor("weight", weight, ("V", "C"), like=hidden)
    check.tensor("target", target, tuple(hidden.shape[:-1]), dtypes=(torch.int64,))
    if bias is not None:
        check.tensor("bias", bias, ("V",), like=hidden)
    check.require(weight.shape[0] > 0, "weight must have a row at least, got none")
    check.require(reduction in REDUCTIONS, f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    check.require(0 <= label_smoothing <= 1, f"label_smoothing must be in [0, 1], got {label_smoothing}")
    check.require(chunk_rows is None or chunk_rows > 0, f"chunk_rows must be positive, got {chunk_rows}")
    return check


def _check_forward(hidden, weight, target, bias, ignore_index, reduction, smoothing, chunk_rows, triton, wants) -> None:
    op = "linear_cross_entropy_forward"
    check = _check(op, hidden, weight, target, bias, reduction, smoothing, chunk_rows)
    check.require(len(wants) == 3, f"wants must have three entries, got {len(wants)}")


def _check_backward(grad, hidden, weight, target, bias, ignore_index, smoothing, chunk_rows, triton, wants) -> None:
    check = _check("linear_cross_entropy_backward", hidden, weight, target, bias, "none", smoothing, chunk_rows)
    check.tensor("grad", grad, tuple(target.shape))
    check.require(len(wants) == 3, f"wants must have three entries, got {len(wants)}")


_OPTIONS = "int ignore_index, str reduction, float smoothing, int? chunk_rows, bool triton, bool[] wants"
register_opaque(
    f"linear_cross_entropy_forward(Tensor hidden, Tensor weight, Tensor target, Tensor? bias, {_OPTIONS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_forward,
    check=_check_forward,
    setup_context=_setup_context,
    backward=_backward,
    CPU=_forward,
    CUDA=_forward,
)
register_opaque(
    "linear_cross_entropy_backward(Tensor grad, Tensor hidden, Tensor weight, Tensor target, Tensor? bias,"
    f" {_OPTIONS.replace(' str reduction,', '')}) -> (Tensor, Tensor, Tensor)",
    check=_check_backward,
    fake=lambda grad, hidden, weight, target, bias, *options: _fake_gradients(hidden, weight, options[-1]),
    CPU=_run_backward,
    CUDA=_run_backward,
)


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    chunk_rows: int | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """``cross_entropy(linear(hidden, weight, bias), target)`` in memory for the logits of a few rows.

    Args:
        hidden: ``(..., C)``, rows of any strides.
        weight: ``(V, C)``, same dtype; whole: the part of a sharded parameter is refused. It need not require grad.
        target: ``(...)`` int64, hidden's shape without C: a column, or ``ignore_index``. Nothing is shifted.
        bias: ``(V,)`` or ``None``.
        ignore_index: rows with this target have no loss, no gradient and no weight in the mean.
        reduction: ``"mean"`` over the rows that are not ignored (NaN, with gradients of zero, where all are),
            ``"sum"``, or ``"none"``, which computes the logits twice where a gradient is wanted.
        label_smoothing: in [0, 1], what the target shares with all columns alike.
        chunk_rows: rows whose logits exist at once; ``None`` chooses (:func:`chunk_size`).
        backend: ``None`` (choose), ``"chunked"`` (PyTorch's operations), ``"triton"``, ``"eager"`` (all at once).

    Returns a scalar, with ``"none"`` target's shape, in float32 (float64 for float64 inputs). Under autocast the inputs
    are taken in its dtype, as a linear layer's are. Same bits every time, given PyTorch's products.

    Raises ``TypeError``/``ValueError`` naming the argument that does not fit; on the CPU also for targets that name no
    column, which on a GPU, where nobody reads them on the host, make the loss and its gradients NaN.
    """
    for name, x in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if type(x).__name__ == "DTensor":
            raise TypeError(
                f"linear_cross_entropy: {name} must be whole, got a sharded DTensor; call inside the module whose "
                "forward gathers it, or give its full_tensor()"
            )
    hidden, weight, bias = in_autocast_dtype(hidden, weight, bias)
    _check("linear_cross_entropy", hidden, weight, target, bias, reduction, label_smoothing, chunk_rows)
    chosen = resolve("linear_cross_entropy", hidden.device.type, backend)
    if chosen == "eager":
        return linear_cross_entropy_ref(hidden, weight, target, bias, ignore_index, reduction, label_smoothing)
    options = (ignore_index, reduction, label_smoothing, chunk_rows, chosen == "triton")
    if direct(hidden, weight, bias):
        return _run(hidden, weight, target, bias, *options, [False] * 3)[0]
    tracked = torch.is_grad_enabled()
    wants = [tracked and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    return torch_ops.linear_cross_entropy_forward(hidden, weight, target, bias, *options, wants)[0]


register_composite(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor target, Tensor? bias=None, *, int ignore_index=-100,"
    ' str reduction="mean", float label_smoothing=0.0, int? chunk_rows=None) -> Tensor',
    linear_cross_entropy,
)
