"""Made-up batches for the M-RoPE position tests, and the paper's rule that says what their positions are.

A sequence is a list of parts: ``("text", n)`` or ``("image" | "video", t, h, w)`` in tokens.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import strategies as st

from qwen2vl_kernels._backend import unavailable

IMAGE, VIDEO, TEXT, PAD = 7, 8, 1, 0
IDS: dict[str, Any] = {"image_token_id": IMAGE, "video_token_id": VIDEO}


def needs(backend: str):
    """A parameter that is skipped, saying why, where the backend cannot run."""
    reason = unavailable(backend, "cpu")
    return pytest.param(backend, marks=pytest.mark.skipif(reason is not None, reason=f"{backend}: {reason}"))


def paper_rule(parts: list[tuple]) -> list[tuple[int, int, int]]:
    """Each modality starts at the largest position before it plus one; vision offsets it along each axis."""
    positions: list[tuple[int, int, int]] = []
    for part in parts:
        start = 1 + max(max(p) for p in positions) if positions else 0
        if part[0] == "text":
            positions += [(start + n, start + n, start + n) for n in range(part[1])]
        else:
            _, t, h, w = part
            positions += [(start + k, start + i, start + j) for k in range(t) for i in range(h) for j in range(w)]
    return positions


def token_ids(parts: list[tuple]) -> list[int]:
    ids: list[int] = []
    for part in parts:
        if part[0] == "text":
            ids += [TEXT] * part[1]
        else:
            ids += [IMAGE if part[0] == "image" else VIDEO] * (part[1] * part[2] * part[3])
    return ids


def grids(sequences: list[list[tuple]], modality: str, merge_size: int) -> torch.Tensor:
    rows = [[p[1], p[2] * merge_size, p[3] * merge_size] for s in sequences for p in s if p[0] == modality]
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 3)


side = st.integers(1, 4)
part = st.one_of(
    st.tuples(st.just("text"), st.integers(1, 5)),
    st.tuples(st.just("image"), st.just(1), side, side),
    st.tuples(st.just("video"), st.integers(1, 9), side, side),
)
sequence = st.lists(part, max_size=5)


@st.composite
def batches(draw):
    """Sequences with the masked slots of a batch spread as padding on one side or anywhere."""
    sequences = draw(st.lists(sequence, min_size=1, max_size=4))
    merge_size = draw(st.integers(1, 3))
    lengths = [len(token_ids(parts)) for parts in sequences]
    width = max(lengths) + draw(st.integers(0, 3))
    side = draw(st.sampled_from(["left", "right", "anywhere"]))
    mask = torch.zeros(len(sequences), width, dtype=torch.int64)
    for row, length in enumerate(lengths):
        slots = list(range(width))
        if side == "anywhere":
            slots = sorted(draw(st.permutations(slots))[:length])
        else:
            slots = slots[:length] if side == "right" else slots[width - length :]
        mask[row, slots] = 1
    return sequences, merge_size, mask


def expected_batch(sequences, mask):
    """ids, positions and deltas of a batch by the paper's rule."""
    ids = torch.full(mask.shape, PAD, dtype=torch.int64)
    positions = torch.zeros(3, *mask.shape, dtype=torch.int64)
    delta = torch.zeros(len(sequences), dtype=torch.int64)
    for row, parts in enumerate(sequences):
        kept, made = mask[row].bool(), paper_rule(parts)
        if made:
            ids[row, kept] = torch.tensor(token_ids(parts))
            positions[:, row, kept] = torch.tensor(made).T
            delta[row] = 1 + max(max(p) for p in made) - len(made)
    return ids, positions, delta
