"""What a token falls by, in float64, one id after another: another writing of sample_tokens_'s formula."""

from __future__ import annotations

import math

import torch

#: What a call may ask for: nothing, each by itself, the released checkpoints' defaults, and what no float divides by.
SETTINGS = (
    {},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 2.5, "top_p": 0.9},
    {"top_k": 1},
    {"top_k": 10**6, "top_p": 0.3},
    {"top_k": 20, "top_p": 0.6, "repetition_penalty": 1.3},
    {"temperature": 0.01, "top_k": 1, "top_p": 0.001, "repetition_penalty": 1.05},
    {"temperature": 0.01},
    {"temperature": 1e-320, "top_p": 0.0},
    {"temperature": 1e300, "repetition_penalty": 0.7},
    {"top_p": 1 - 2**-53},
)


def rows(columns: int) -> torch.Tensor:
    """``(4, columns)`` scores: wandering with equals among them, all equal, one finite, steep ones after -0 and 0."""
    wander = (torch.randn(columns) * 3).round(decimals=1)
    one = torch.full((columns,), -math.inf)
    one[columns * 2 // 3] = -7.0
    steep = torch.arange(columns).remainder(7) * -4.0
    steep[columns // 2 :] += 0.0  # no zero of these is below another
    return torch.stack([wander, torch.full((columns,), 2.5), one, steep])


def kept(
    scores: list[float],
    seen: list[bool] | None,
    banned: list[int],
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
) -> dict[int, float]:
    """Of each id that may be drawn its chance, in the order of ids."""
    s = list(scores)
    for i, marked in enumerate(seen or ()):
        if marked:
            s[i] = s[i] * repetition_penalty if s[i] < 0 else s[i] / repetition_penalty
    order = sorted((i for i in range(len(s)) if s[i] > -math.inf and i not in banned), key=lambda i: (-s[i], i))
    if top_k:
        last = s[order[min(top_k, len(order)) - 1]]
        order = [i for i in order if s[i] >= last]
    weights = [math.exp((s[i] - s[order[0]]) / temperature) if s[i] != s[order[0]] else 1.0 for i in order]
    total, reached, chosen = math.fsum(weights), 0.0, {}
    for i, weight in zip(order, weights, strict=True):
        if chosen and reached >= top_p * total:
            break
        chosen[i] = weight
        reached += weight
    return {i: chosen[i] / math.fsum(chosen.values()) for i in sorted(chosen)}


def draws(chances: dict[int, float]) -> tuple[list[float], list[int]]:
    """Numbers, and the ids that they must give: at both ends of what each id has, and at the ends of all. No number is
    closer to another id's than float32's roundings of the chances."""
    numbers, ids, begin = [0.0], [next(i for i, chance in chances.items() if chance > 1e-12)], 0.0
    for i, chance in chances.items():
        if chance > 1e-3:
            numbers += [begin + 0.02 * chance, begin + 0.98 * chance]
            ids += [i, i]
        begin += chance
    numbers.append(1 - 2**-53)
    ids.append([i for i, chance in chances.items() if chance > 1e-12][-1])
    return numbers, ids
