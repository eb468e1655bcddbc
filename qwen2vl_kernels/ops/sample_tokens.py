"""The next token of every row from its logits: repetition penalty, banned ids, temperature, top_k, top_p, draw.

With a row's logits l, its seen ids and one number u in [0, 1):

    s_i = l_i / r where l_i >= 0 and l_i r else, for seen ids (Keskar et al. 2019, section 4.1), l_i for others,
          minus infinity for banned ids
    m_i = exp((s_i - max s) / temperature), as a whole number of some small unit
    K   = {i: s_i is one of the top_k highest}, with everything equal to the last of these
    P   = the smallest set that begins the ids of K, ordered by s and among equals by id, and whose masses sum to at
          least top_p times those of K; at least one id (Holtzman et al. 2020)
    token = the first id of P, in the order of ids, at which the sum of the masses so far passes u times all of P's

Masses are whole numbers, so that their sums are the same in any order, and what has none is never drawn. Their unit is
2^-52 of their sum in the formula, and 2^-43 of the highest in the kernels, which round them once less. A row whose
highest s is not finite, as where all are minus infinity or one is no number, has no masses and gives token 0. Without u
the token is the first of the highest s, NaN among these.

Shapes: logits ``(B, V)``, u ``(B,)``, seen ``(B, V)``. Inference only.
"""

from __future__ import annotations

import math

import torch

from ..core.backends import resolve
from ..core.checks import Checker, no_overlap
from ..core.library import direct, mark_written, register_opaque
from ..core.namespace import torch_ops
from ..triton.sampling import BITS, launch_sampling

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
#: Of these no sum of masses reaches 2^62.
_MOST_COLUMNS = 1 << 62 - BITS


def sample_tokens_ref(
    logits: torch.Tensor,
    uniforms: torch.Tensor | None,
    seen: torch.Tensor | None,
    banned: torch.Tensor | None,
    temperature: float,
    top_k: int,
    top_p: float,
    repetition_penalty: float,
) -> torch.Tensor:
    """The formula, scores in float32, masses in int64."""
    s = logits.float()
    if seen is not None:
        s = torch.where(seen, torch.where(s < 0, s * repetition_penalty, s / repetition_penalty), s)
    if banned is not None:
        s = s.index_fill(1, banned, -math.inf)
    if uniforms is None:
        tokens = s.argmax(-1)
    else:
        kth = order = None
        k = min(top_k, s.shape[1])
        if top_p < 1:
            s, order = s.sort(dim=-1, descending=True, stable=True)
            kth = s.narrow(1, k - 1, 1) if k else None
        elif k:
            kth = s.topk(k, -1).values.narrow(1, -1, 1)
        if kth is not None:
            s = s.masked_fill(s < kth, -math.inf)
        if temperature != 1:
            s = s / min(max(temperature, 1e-30), 1e30)
        mass = (s.softmax(-1).nan_to_num(nan=0.0) * 2.0**52).long()
        if order is not None:
            reached = mass.cumsum(-1)
            enough = reached.narrow(1, -1, 1).double() * max(top_p, 2.0**-62)
            mass = reached.scatter_(1, order, mass.masked_fill(reached - mass >= enough, 0))
        reached = mass.cumsum(-1)
        # A number below one times their sum, which a double holds, stays below it.
        point = (uniforms.unsqueeze(1) * reached.narrow(1, -1, 1)).long()
        # Without masses none passes it.
        tokens = torch.searchsorted(reached, point, right=True).squeeze(1).remainder(s.shape[1])
    if seen is not None:
        seen.scatter_(1, tokens.unsqueeze(1), True)
    return tokens


def _check(logits, uniforms, seen, banned, temperature, top_k, top_p, repetition_penalty, backend) -> str:
    """Refuse what does not fit; returns the backend that serves."""
    check = Checker("sample_tokens_")
    check.tensor("logits", logits, ("B", "V"), dtypes=_FLOATS, contiguous_last=True)
    columns = logits.shape[1]
    check.require(0 < columns <= _MOST_COLUMNS, f"logits must have 1 to {_MOST_COLUMNS} columns, got {columns}")
    if uniforms is not None:
        check.tensor("uniforms", uniforms, ("B",), dtypes=(torch.float64,))
    if seen is not None:
        check.tensor("seen", seen, ("B", "V"), dtypes=(torch.bool,), contiguous_last=True)
    if banned is not None:
        check.tensor("banned", banned, ("n",), dtypes=(torch.int64,), contiguous_last=True)
    for name, value in (("temperature", temperature), ("top_p", top_p), ("repetition_penalty", repetition_penalty)):
        if not isinstance(value, (int, float)):
            raise TypeError(f"sample_tokens_: {name} must be a number, got {type(value).__name__}")
    if not isinstance(top_k, int):
        raise TypeError(f"sample_tokens_: top_k must be an int, got {type(top_k).__name__}")
    check.require(temperature > 0, f"temperature must be > 0 (without uniforms it is greedy), got {temperature}")
    check.require(top_k >= 0, f"top_k must be >= 0, got {top_k}")
    check.require(0 <= top_p <= 1, f"top_p must be in [0, 1], got {top_p}")
    positive = repetition_penalty > 0 and math.isfinite(repetition_penalty)
    check.require(positive, f"repetition_penalty must be > 0, got {repetition_penalty}")
    check.require(
        repetition_penalty == 1 or seen is not None, f"repetition_penalty {repetition_penalty} must come with seen"
    )
    check.require(not logits.requires_grad or not torch.is_grad_enabled(), "logits must not require grad")
    return resolve("sample_tokens", logits.device.type, backend)


def _run(logits, uniforms, seen, banned, temperature, top_k, top_p, repetition_penalty, backend) -> torch.Tensor:
    given = (logits, uniforms, seen, banned, temperature, top_k, top_p, repetition_penalty)
    return launch_sampling(*given) if backend == "triton" else sample_tokens_ref(*given)


register_opaque(
    "sample_tokens_(Tensor logits, Tensor? uniforms, Tensor(a!)? seen, Tensor? banned, float temperature, int top_k,"
    " float top_p, float repetition_penalty, str backend) -> Tensor",
    fake=lambda logits, *_: logits.new_empty(logits.shape[0], dtype=torch.int64),
    check=_check,
    CPU=_run,
    CUDA=_run,
)


def sample_tokens_(
    logits: torch.Tensor,
    uniforms: torch.Tensor | None = None,
    seen: torch.Tensor | None = None,
    banned: torch.Tensor | None = None,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    backend: str | None = None,
) -> torch.Tensor:
    """The next token of every row, drawn or the likeliest.

    Args:
        logits: ``(B, V)`` float32, bfloat16 or float16, any stride of rows, V at most 524,288; only read.
        uniforms: ``(B,)`` float64 in [0, 1), by which each row's token falls; ``None`` takes the likeliest, the first
            of several.
        seen: ``(B, V)`` bool, ids whose scores the penalty shrinks; the chosen ids are marked in it.
        banned: ``(n,)`` int64 in [0, V), ids that no row may choose.
        temperature: > 0; the smaller, the likelier the likeliest. Values that float32 cannot divide by count as the
            last that it can.
        top_k: keep so many of the highest scores, and what equals the last of them; 0 keeps all.
        top_p: keep the smallest set of the highest scores that has this share of what top_k keeps, of equal scores
            those with lower ids, at least one; 1 keeps all.
        repetition_penalty: > 0; divides positive and multiplies negative scores of what ``seen`` marks.
        backend: ``None`` (choose), ``"triton"`` (two launches), ``"eager"``.

    Returns ``(B,)`` int64. A row's token depends on nothing of other rows. Where a row's highest score is not finite,
    0 is drawn. Raises ``TypeError``/``ValueError`` naming the argument that does not fit, also for
    logits that require grad and for ``seen`` in memory that another argument has, and :class:`BackendError` for a
    backend that does not serve.
    """
    given = (logits, uniforms, seen, banned, temperature, top_k, top_p, repetition_penalty)
    name = _check(*given, backend)
    no_overlap("sample_tokens_", {"seen": seen}, {"logits": logits, "uniforms": uniforms, "banned": banned})
    if not direct(*given[:4]):
        return torch_ops.sample_tokens_(*given, name)
    tokens = _run(*given, name)
    mark_written(seen)
    return tokens
