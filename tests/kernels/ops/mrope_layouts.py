"""Made-up batches for the M-RoPE position tests, and the paper's rule that says what their positions are.

A sequence is a list of parts: ``("text", n)`` or ``("image" | "video", t, h, w)`` in tokens.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from hypothesis import strategies as st

from qwen2vl_kernels.core.backends import unavailable

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


def cut(ids: torch.Tensor, kept: torch.Tensor, items: list[tuple], cuts: list[int]):
    """The chunks of one sequence: ids, mask, and the ``("image" | "video", t, h, w)`` that begin in each."""
    begins, at = [], 0
    vision = [token for token in range(len(ids)) if kept[token] and ids[token] in (IMAGE, VIDEO)]
    for item in items:
        begins.append(vision[at])
        at += item[1] * item[2] * item[3]
    for first, last in pairwise([0, *cuts, len(ids)]):
        begun = [item for item, begin in zip(items, begins, strict=True) if first <= begin < last]
        yield ids[first:last], kept[first:last], begun


def chunked(run, sequences, mask, cuts: list[list[int]], merge_size: int, packed: bool):
    """Positions, deltas and final state of a batch whose rows go through ``run`` in chunks cut at ``cuts[row]``.

    ``run(ids, images, videos, mask, cu_seqlens, state)`` returns what ``mrope_positions_chunk`` does. All rows have
    as many chunks; padded to the longest on the right, or packed.
    """
    ids, want, want_delta = expected_batch(sequences, mask)
    chunks = [
        list(cut(ids[row], mask[row], [p for p in parts if p[0] != "text"], cuts[row]))
        for row, parts in enumerate(sequences)
    ]
    state, delta, made = None, None, [[] for _ in sequences]
    for step in zip(*chunks, strict=True):
        begun = [items for _, _, items in step]
        lengths = [len(part) for part, _, _ in step]
        cu = None
        if packed:
            part_ids, part_mask = (torch.cat([one[n] for one in step])[None] for n in (0, 1))
            cu = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        else:
            part_ids, part_mask = (torch.zeros(len(step), max(lengths), dtype=torch.int64) for _ in range(2))
            for row, (one_ids, one_mask, _) in enumerate(step):
                part_ids[row, : len(one_ids)], part_mask[row, : len(one_ids)] = one_ids, one_mask
        images, videos = (grids(begun, modality, merge_size) for modality in ("image", "video"))
        positions, delta, state = run(part_ids, images, videos, part_mask, cu, state)
        at = 0
        for row, length in enumerate(lengths):
            made[row].append(positions[:, 0, at : at + length] if packed else positions[:, row, :length])
            at += length
    return torch.stack([torch.cat(parts, 1) for parts in made], 1), delta, state, want, want_delta


@st.composite
def chunked_batches(draw):
    sequences, merge_size, mask = draw(batches())
    count = draw(st.integers(0, 4))
    place = st.integers(0, mask.shape[1])
    cuts = [sorted(draw(st.lists(place, min_size=count, max_size=count))) for _ in sequences]
    return sequences, mask, cuts, merge_size, draw(st.booleans())
