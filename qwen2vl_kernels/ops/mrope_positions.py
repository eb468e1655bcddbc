"""Positions of M-RoPE: the temporal, height and width coordinate of every token of a batch.

Multimodal rotary embedding (Qwen2-VL, arXiv 2409.12191, section 2.1). Walking one sequence with s = 0:

    text token                  (T, H, W) = (s, s, s)                                 then s += 1
    image or video, t*h*w long  (T, H, W) = (s + k, s + i, s + j), (k, i, j) row-major then s += max(t, h, w)

where a grid of patches (t, gh, gw) gives h = gh / spatial_merge_size and w = gw / spatial_merge_size. The
marks around an image are text. Every modality thus starts at the largest position before it plus one.
Generation goes on at ``index + delta`` on all three axes, index counting the unmasked tokens of the sequence.

Shapes: input_ids ``(B, L)`` int64 or int32, grids ``(n, 3)``, positions ``(3, B, L)``, delta ``(B,)``.
Both results are int64.
"""

from __future__ import annotations

from enum import IntEnum
from itertools import pairwise, product

import torch

from .. import _native
from .._backend import resolve
from .._checks import INTS, Checker
from .._library import register_opaque

_MASKS = (torch.int64, torch.bool, torch.int32, torch.uint8, torch.int8)


class _Error(IntEnum):
    """MropeError of csrc/cpu/mrope_positions.h."""

    NONE = 0
    GRID_ENTRY = 1
    GRID_NOT_MERGED = 2
    NO_GRID = 3
    INTERRUPTED = 4
    CUT = 5
    UNUSED_GRID = 6


def mrope_positions_ref(
    input_ids: torch.Tensor,
    image_grid_thw: torch.Tensor | None,
    video_grid_thw: torch.Tensor | None,
    attention_mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    *,
    image_token_id: int,
    video_token_id: int,
    spatial_merge_size: int = 2,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rule above, token by token. Reads every tensor on the host and refuses what does not fit."""
    batch, length = input_ids.shape
    ids = input_ids.flatten().tolist()
    kept = [True] * len(ids) if attention_mask is None else attention_mask.bool().flatten().tolist()
    bounds = [row * length for row in range(batch + 1)] if cu_seqlens is None else cu_seqlens.tolist()
    grids = [[] if g is None else g.tolist() for g in (image_grid_thw, video_grid_thw)]
    modality = {image_token_id: 0, video_token_id: 1}
    used = [0, 0]

    def refuse(error: _Error, video: int, item: int, token: int = -1, found: int = 0) -> None:
        _refuse(error, video, item, token, found, input_ids, image_grid_thw, video_grid_thw, spatial_merge_size)

    for video, item in [(v, i) for v in (0, 1) for i in range(len(grids[v]))]:
        t, gh, gw = grids[video][item]
        if min(t, gh, gw) < 1:
            refuse(_Error.GRID_ENTRY, video, item)
        if gh % spatial_merge_size or gw % spatial_merge_size:
            refuse(_Error.GRID_NOT_MERGED, video, item)

    positions = [(0, 0, 0)] * len(ids)
    deltas = []
    for first, last in pairwise(bounds):
        slots = [token for token in range(first, last) if kept[token]]
        s = at = 0
        while at < len(slots):
            video = modality.get(ids[slots[at]])
            if video is None:
                positions[slots[at]] = (s, s, s)
                s, at = s + 1, at + 1
                continue
            item = used[video]
            if item == len(grids[video]):
                refuse(_Error.NO_GRID, video, item, slots[at])
            t, gh, gw = grids[video][item]
            h, w = gh // spatial_merge_size, gw // spatial_merge_size
            run = slots[at : at + t * h * w]
            for found, token in enumerate(run):
                if modality.get(ids[token]) != video:
                    refuse(_Error.INTERRUPTED, video, item, token, found)
            if len(run) < t * h * w:
                refuse(_Error.CUT, video, item, last, len(run))
            for token, (k, i, j) in zip(run, product(range(t), range(h), range(w)), strict=True):
                positions[token] = (s + k, s + i, s + j)
            s, at, used[video] = s + max(t, h, w), at + len(run), item + 1
        deltas.append(s - len(slots))
    for video in (0, 1):
        if used[video] < len(grids[video]):
            refuse(_Error.UNUSED_GRID, video, used[video])

    made = torch.tensor(positions, dtype=torch.int64).reshape(batch, length, 3).permute(2, 0, 1).contiguous()
    return made.to(input_ids.device), torch.tensor(deltas, dtype=torch.int64, device=input_ids.device)


def _refuse(error, video, item, token, found, input_ids, image_grid_thw, video_grid_thw, merge_size) -> None:
    """Word what the walk over the tokens found wrong."""
    modality = "video" if video else "image"
    name, grids = f"{modality}_grid_thw", video_grid_thw if video else image_grid_thw
    count = 0 if grids is None else grids.shape[0]
    grid = tuple(grids[item].tolist()) if grids is not None and item < count else (0, 0, 0)
    row, column = divmod(token, input_ids.shape[1]) if token >= 0 and input_ids.shape[1] else (0, 0)
    if error == _Error.GRID_ENTRY:
        what = f"{name}[{item}] must hold numbers of at least 1, got {grid}"
    elif error == _Error.GRID_NOT_MERGED:
        what = f"{name}[{item}] must have its height and width divisible by {merge_size}, got {grid}"
    elif error == _Error.NO_GRID:
        what = f"{name} has {count} grids, but input_ids[{row}, {column}] is one more {modality} placeholder"
    elif error == _Error.UNUSED_GRID:
        what = f"{name} has {count} grids, but the unmasked input_ids hold placeholders for only {item} of them"
    else:
        t, gh, gw = grid
        needed = t * (gh // merge_size) * (gw // merge_size)
        end = (
            f"input_ids[{row}, {column}] is {int(input_ids[row, column])}"
            if error == _Error.INTERRUPTED
            else "their sequence ends there"
        )
        what = (
            f"input_ids must hold {needed} {modality} placeholders in a row for {name}[{item}] = {grid}, "
            f"got {found}: {end}"
        )
    raise ValueError(f"mrope_positions: {what}")


def _outputs(input_ids: torch.Tensor, cu_seqlens: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    sequences = input_ids.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    positions = torch.empty((3, *input_ids.shape), dtype=torch.int64, device=input_ids.device)
    return positions, torch.empty((sequences,), dtype=torch.int64, device=input_ids.device)


def _arguments(input_ids, image_grid_thw, video_grid_thw, attention_mask, cu_seqlens, delta) -> tuple:
    """Views and sizes in the order that both extensions take them."""
    images = 0 if image_grid_thw is None else image_grid_thw.shape[0]
    videos = 0 if video_grid_thw is None else video_grid_thw.shape[0]
    tensors = (input_ids, attention_mask, image_grid_thw, video_grid_thw, cu_seqlens)
    return (*map(_native.view, tensors), (*input_ids.shape, images, videos, delta.shape[0]))


def _run_native(
    input_ids, image_grid_thw, video_grid_thw, attention_mask, cu_seqlens, *, image_token_id, video_token_id,
    spatial_merge_size,
):  # fmt: skip
    positions, delta = _outputs(input_ids, cu_seqlens)
    error, video, item, token, found = _native.cpu().mrope_positions(
        *_arguments(input_ids, image_grid_thw, video_grid_thw, attention_mask, cu_seqlens, delta),
        (image_token_id, video_token_id, spatial_merge_size),
        positions.data_ptr(),
        delta.data_ptr(),
    )
    if error:
        _refuse(error, video, item, token, found, input_ids, image_grid_thw, video_grid_thw, spatial_merge_size)
    return positions, delta


def _run_cuda(
    input_ids, image_grid_thw, video_grid_thw, attention_mask, cu_seqlens, *, image_token_id, video_token_id,
    spatial_merge_size,
):  # fmt: skip
    extension, device = _native.cuda(), input_ids.device
    positions, delta = _outputs(input_ids, cu_seqlens)
    arguments = _arguments(input_ids, image_grid_thw, video_grid_thw, attention_mask, cu_seqlens, delta)
    *_, images, videos, _ = arguments[-1]
    words = (extension.mrope_workspace_bytes(input_ids.numel(), images, videos) + 7) // 8
    with torch.cuda.device(device):
        workspace = torch.empty((words,), dtype=torch.int64, device=device)
        extension.mrope_positions(
            *arguments,
            (image_token_id, video_token_id, spatial_merge_size),
            positions.data_ptr(),
            delta.data_ptr(),
            workspace.data_ptr(),
            positions.device.index,
            torch.cuda.current_stream(device).cuda_stream,
        )
    return positions, delta


_BACKENDS = {"eager": mrope_positions_ref, "native": _run_native, "cuda": _run_cuda}


def _run(
    input_ids, image_grid_thw, video_grid_thw, attention_mask, cu_seqlens, image_token_id, video_token_id,
    spatial_merge_size, backend,
):  # fmt: skip
    if backend != "cuda" and cu_seqlens is not None:
        _check_boundaries(cu_seqlens.tolist(), input_ids.shape[1])
    return _BACKENDS[backend](
        input_ids, image_grid_thw, video_grid_thw, attention_mask, cu_seqlens, image_token_id=image_token_id,
        video_token_id=video_token_id, spatial_merge_size=spatial_merge_size,
    )  # fmt: skip


def _check_boundaries(cu_seqlens: list[int], length: int) -> None:
    if cu_seqlens[0] != 0 or cu_seqlens[-1] > length or any(b < a for a, b in pairwise(cu_seqlens)):
        shown = cu_seqlens if len(cu_seqlens) <= 8 else [*cu_seqlens[:4], "...", *cu_seqlens[-3:]]
        raise ValueError(
            f"mrope_positions: cu_seqlens must start at 0, never fall, end at or before {length}, the number "
            f"of tokens, got {shown}"
        )


def _fake(input_ids, image_grid_thw, video_grid_thw, attention_mask, cu_seqlens, *_settings):
    return _outputs(input_ids, cu_seqlens)


register_opaque(
    "mrope_positions(Tensor input_ids, Tensor? image_grid_thw, Tensor? video_grid_thw, "
    "Tensor? attention_mask, Tensor? cu_seqlens, int image_token_id, int video_token_id, "
    "int spatial_merge_size, str backend) -> (Tensor positions, Tensor delta)",
    fake=_fake,
    CPU=_run,
    CUDA=_run,
)


def mrope_positions(
    input_ids: torch.Tensor,
    image_grid_thw: torch.Tensor | None,
    video_grid_thw: torch.Tensor | None,
    attention_mask: torch.Tensor | None = None,
    *,
    cu_seqlens: torch.Tensor | None = None,
    image_token_id: int,
    video_token_id: int,
    spatial_merge_size: int = 2,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions and position deltas of a padded batch, or of one row of packed sequences.

    Args:
        input_ids: ``(B, L)`` int64 or int32, any strides. Runs of ``image_token_id`` and ``video_token_id``
            stand for the images and videos of the whole batch, in order of appearance.
        image_grid_thw, video_grid_thw: ``(n, 3)`` int64 or int32, the grid ``(t, gh, gw)`` of every image and
            video in patches before merging; ``None`` where there are none.
        attention_mask: ``(B, L)`` bool or integer; zeros may stand anywhere (padding on either side) and
            their tokens are as good as absent. ``None``: every token counts.
        cu_seqlens: ``(S + 1,)`` int32 with B = 1: S packed sequences, each counted from zero. Segments may be
            empty. Tokens after the last boundary count as masked.
        image_token_id, video_token_id: the placeholders.
        spatial_merge_size: patches a side that make one token.
        backend: ``None`` (choose), ``"eager"``, ``"native"`` (CPU) or ``"cuda"``.

    Returns:
        positions: ``(3, B, L)`` int64, temporal, height and width; 0 on all three where masked.
        delta: ``(B,)`` int64, ``(S,)`` when packed; largest position + 1 - number of unmasked tokens, 0 for a
            sequence without any. (transformers 4.x subtracts the padded length instead.)

    Raises:
        TypeError, ValueError: naming the argument, for wrong types, dtypes, shapes or devices, and on the CPU
            also for grids with entries below 1 or not divisible by ``spatial_merge_size``, for placeholders
            and grids that do not match one to one, and for ``cu_seqlens`` that fall or leave the row.

    With ``"cuda"`` nothing is read on the host, so the call can be captured in a CUDA graph, and contents are
    not checked: placeholders are matched to grids by their count alone, one beyond the last grid is placed
    like text, a grid that holds no token is passed over, and boundaries are clamped to the row. No content
    leads outside of the tensors. Equal inputs give equal results bit for bit.
    """
    check = Checker("mrope_positions")
    check.tensor("input_ids", input_ids, ("B", "L"), dtypes=INTS)
    if image_grid_thw is not None:
        check.tensor("image_grid_thw", image_grid_thw, ("images", 3), dtypes=INTS)
    if video_grid_thw is not None:
        check.tensor("video_grid_thw", video_grid_thw, ("videos", 3), dtypes=INTS)
    if attention_mask is not None:
        check.tensor("attention_mask", attention_mask, ("B", "L"), dtypes=_MASKS)
    if cu_seqlens is not None:
        check.tensor("cu_seqlens", cu_seqlens, ("S+1",), dtypes=(torch.int32,))
        check.require(cu_seqlens.shape[0] > 0, "cu_seqlens must hold at least one boundary, got none")
        check.require(input_ids.shape[0] == 1, f"input_ids must have one row with cu_seqlens, got {input_ids.shape[0]}")
    check.require(
        input_ids.numel() < 2**31 - 1,
        f"input_ids must hold fewer than 2^31 - 1 tokens, got {input_ids.numel()}",
    )
    check.require(spatial_merge_size >= 1, f"spatial_merge_size must be at least 1, got {spatial_merge_size}")
    check.require(
        image_token_id != video_token_id,
        f"image_token_id and video_token_id must differ, got {image_token_id} twice",
    )
    chosen = resolve("mrope_positions", input_ids.device.type, backend)
    # The dispatcher is needed by tracers and for tensors without data; otherwise it only costs time.
    traced = torch.compiler.is_compiling() or type(input_ids) is not torch.Tensor or input_ids.is_meta
    run = torch.ops.qwen2vl.mrope_positions if traced else _run
    return run(
        input_ids, image_grid_thw, video_grid_thw, attention_mask, cu_seqlens, image_token_id, video_token_id,
        spatial_merge_size, chosen,
    )  # fmt: skip
