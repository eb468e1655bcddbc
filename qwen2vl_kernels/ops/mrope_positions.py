"""Positions of M-RoPE: the temporal, height and width coordinate of every token of a batch.

Multimodal rotary embedding (Qwen2-VL, arXiv 2409.12191, section 2.1). Walking one sequence with s = 0:

    text token                  (T, H, W) = (s, s, s)                                 then s += 1
    image or video, t*h*w long  (T, H, W) = (s + k, s + i, s + j), (k, i, j) row-major then s += max(t, h, w)

where a grid of patches (t, gh, gw) gives h = gh / spatial_merge_size and w = gw / spatial_merge_size. The
marks around an image are text. Every modality thus starts at the largest position before it plus one.
Generation goes on at ``index + delta`` on all three axes, index counting the unmasked tokens of the sequence.

A sequence may come in chunks, cut anywhere, an image or video included: ``mrope_positions_chunk`` takes the state that
the chunk before left and returns the next.

Shapes: input_ids ``(B, L)`` int64 or int32, grids ``(n, 3)``, positions ``(3, B, L)``, delta ``(B,)``.
Both results are int64.
"""

from __future__ import annotations

import math
from enum import IntEnum
from itertools import pairwise

import torch

from ..core import native
from ..core.backends import resolve
from ..core.checks import INTS, Checker
from ..core.library import register_opaque
from ..core.namespace import torch_ops

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
    STATE = 7


_STATE_SIZE = 7  # start, kept, modality (0 none, 1 image, 2 video), inside, t, h, w: MropeState of csrc/common/mrope.h


def mrope_positions_ref(
    input_ids: torch.Tensor,
    image_grid_thw: torch.Tensor | None,
    video_grid_thw: torch.Tensor | None,
    attention_mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
    *,
    image_token_id: int,
    video_token_id: int,
    spatial_merge_size: int = 2,
) -> tuple[torch.Tensor, ...]:
    """The rule above, token by token. Reads every tensor on the host and refuses what does not fit.

    With a state, sequences go on from it and may be cut; the third result is then the state they leave.
    """
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
    deltas, states = [], []
    for sequence, (first, last) in enumerate(pairwise(bounds)):
        slots = [token for token in range(first, last) if kept[token]]
        s, seen, opened, inside, *extent = [0] * _STATE_SIZE if state is None else state[sequence].tolist()
        if not _sound(s, seen, opened, inside, extent):
            refuse(_Error.STATE, 0, sequence)
        item = -1  # in the state
        at = 0
        while at < len(slots):
            if not opened:
                video = modality.get(ids[slots[at]])
                if video is None:
                    positions[slots[at]] = (s, s, s)
                    s, at = s + 1, at + 1
                    continue
                item = used[video]
                if item == len(grids[video]):
                    refuse(_Error.NO_GRID, video, item, slots[at])
                t, gh, gw = grids[video][item]
                opened, inside, extent = video + 1, 0, [t, gh // spatial_merge_size, gw // spatial_merge_size]
                used[video] += 1
            t, h, w = extent
            run = slots[at : at + t * h * w - inside]
            for found, token in enumerate(run, inside):
                if modality.get(ids[token]) != opened - 1:
                    refuse(_Error.INTERRUPTED, opened - 1, item, token, found)
            for index, token in enumerate(run, inside):
                positions[token] = (s + index // (h * w), s + index // w % h, s + index % w)
            inside, at = inside + len(run), at + len(run)
            if inside == t * h * w:
                s, opened, inside, extent = s + max(extent), 0, 0, [0, 0, 0]
        if opened and state is None:
            refuse(_Error.CUT, opened - 1, item, last, inside)
        states.append([s, seen + len(slots), opened, inside, *extent])
        deltas.append(s + max(extent) - (seen + len(slots) + math.prod(extent) - inside))
    for video in (0, 1):
        if used[video] < len(grids[video]):
            refuse(_Error.UNUSED_GRID, video, used[video])

    made = torch.tensor(positions, dtype=torch.int64).reshape(batch, length, 3).permute(2, 0, 1).contiguous()
    results = (made, torch.tensor(deltas, dtype=torch.int64))
    if state is not None:
        results += (torch.tensor(states, dtype=torch.int64).reshape(-1, _STATE_SIZE),)
    return tuple(result.to(input_ids.device) for result in results)


def _sound(start: int, kept: int, opened: int, inside: int, extent: list[int]) -> bool:
    """Whether a call may have left this state. The bounds are those of 64-bit sums."""
    if abs(start) > 2**61 or not 0 <= kept <= 2**61 or opened not in (0, 1, 2):
        return False
    if opened == 0:
        return inside == 0 and not any(extent)
    # No call has the tokens to complete an item of 2^31 - 1.
    return all(0 < side < 2**31 for side in extent) and 0 < inside < min(math.prod(extent), 2**31 - 1)


def _refuse(error, video, item, token, found, input_ids, image_grid_thw, video_grid_thw, merge_size) -> None:
    """Word what the walk over the tokens found wrong."""
    modality = "video" if video else "image"
    name, grids = f"{modality}_grid_thw", video_grid_thw if video else image_grid_thw
    count = 0 if grids is None else grids.shape[0]
    grid = tuple(grids[item].tolist()) if grids is not None and 0 <= item < count else (0, 0, 0)
    row, column = divmod(token, input_ids.shape[1]) if token >= 0 and input_ids.shape[1] else (0, 0)
    if error == _Error.STATE:
        what = f"state[{item}] must be what mrope_positions_chunk returned"
    elif item < 0:
        what = (
            f"input_ids must go on with the {modality} placeholders that state cut after {found}, got: "
            f"input_ids[{row}, {column}] is {int(input_ids[row, column])}"
        )
    elif error == _Error.GRID_ENTRY:
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


def _sequences(input_ids: torch.Tensor, cu_seqlens: torch.Tensor | None) -> int:
    return input_ids.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _outputs(input_ids, cu_seqlens, state) -> tuple[torch.Tensor, ...]:
    sequences = _sequences(input_ids, cu_seqlens)
    shapes = [(3, *input_ids.shape), (sequences,)] + ([] if state is None else [(sequences, _STATE_SIZE)])
    return tuple(torch.empty(shape, dtype=torch.int64, device=input_ids.device) for shape in shapes)


def _arguments(input_ids, image_grid_thw, video_grid_thw, attention_mask, cu_seqlens, state, tokens) -> tuple:
    """Views and numbers in the order that both extensions take them."""
    images = 0 if image_grid_thw is None else image_grid_thw.shape[0]
    videos = 0 if video_grid_thw is None else video_grid_thw.shape[0]
    tensors = (input_ids, attention_mask, image_grid_thw, video_grid_thw, cu_seqlens, state)
    sizes = (*input_ids.shape, images, videos, _sequences(input_ids, cu_seqlens))
    return (*map(native.view, tensors), sizes, tokens)


def _addresses(outputs: tuple[torch.Tensor, ...]) -> tuple[int, int, int]:
    positions, delta, *state = (output.data_ptr() for output in outputs)
    return (positions, delta, state[0] if state else 0)


def _run_native(input_ids, image_grid_thw, video_grid_thw, attention_mask, cu_seqlens, state, *tokens):
    """``tokens``: image_token_id, video_token_id and spatial_merge_size, here and below."""
    outputs = _outputs(input_ids, cu_seqlens, state)
    error, video, item, token, found = native.cpu().mrope_positions(
        *_arguments(input_ids, image_grid_thw, video_grid_thw, attention_mask, cu_seqlens, state, tokens),
        *_addresses(outputs),
    )
    if error:
        _refuse(error, video, item, token, found, input_ids, image_grid_thw, video_grid_thw, tokens[2])
    return outputs


def _run_cuda(input_ids, image_grid_thw, video_grid_thw, attention_mask, cu_seqlens, state, *tokens):
    extension, device = native.cuda(), input_ids.device
    outputs = _outputs(input_ids, cu_seqlens, state)
    arguments = _arguments(input_ids, image_grid_thw, video_grid_thw, attention_mask, cu_seqlens, state, tokens)
    _, _, images, videos, sequences = arguments[-2]
    words = (extension.mrope_workspace_bytes(input_ids.numel(), images, videos, sequences) + 7) // 8
    with torch.cuda.device(device):
        workspace = torch.empty((words,), dtype=torch.int64, device=device)
        extension.mrope_positions(
            *arguments,
            *_addresses(outputs),
            workspace.data_ptr(),
            workspace.device.index,
            torch.cuda.current_stream(device).cuda_stream,
        )
    return outputs


def _run_eager(input_ids, image_grid_thw, video_grid_thw, attention_mask, cu_seqlens, state, *tokens):
    named = dict(zip(("image_token_id", "video_token_id", "spatial_merge_size"), tokens, strict=True))
    return mrope_positions_ref(input_ids, image_grid_thw, video_grid_thw, attention_mask, cu_seqlens, state, **named)


_BACKENDS = {"eager": _run_eager, "native": _run_native, "cuda": _run_cuda}


def _run_chunk(input_ids, image_grid_thw, video_grid_thw, attention_mask, cu_seqlens, state, *settings):
    """``settings``: the tokens, then the backend."""
    *tokens, backend = settings
    if backend != "cuda" and cu_seqlens is not None:
        _check_boundaries(cu_seqlens.tolist(), input_ids.shape[1])
    inputs = (input_ids, image_grid_thw, video_grid_thw, attention_mask, cu_seqlens, state)
    return _BACKENDS[backend](*inputs, *tokens)


def _run(input_ids, image_grid_thw, video_grid_thw, attention_mask, cu_seqlens, *settings):
    return _run_chunk(input_ids, image_grid_thw, video_grid_thw, attention_mask, cu_seqlens, None, *settings)


def _check_boundaries(cu_seqlens: list[int], length: int) -> None:
    if cu_seqlens[0] != 0 or cu_seqlens[-1] > length or any(b < a for a, b in pairwise(cu_seqlens)):
        shown = cu_seqlens if len(cu_seqlens) <= 8 else [*cu_seqlens[:4], "...", *cu_seqlens[-3:]]
        raise ValueError(
            f"mrope_positions: cu_seqlens must start at 0, never fall, end at or before {length}, the number "
            f"of tokens, got {shown}"
        )


def _check_op(input_ids, image_grid_thw, video_grid_thw, attention_mask, cu_seqlens, *settings) -> None:
    _check("mrope_positions", input_ids, image_grid_thw, video_grid_thw, attention_mask, cu_seqlens, None, *settings)


_TENSORS = (
    "Tensor input_ids, Tensor? image_grid_thw, Tensor? video_grid_thw, Tensor? attention_mask, Tensor? cu_seqlens"
)
_SETTINGS = "int image_token_id, int video_token_id, int spatial_merge_size, str backend"

register_opaque(
    f"mrope_positions({_TENSORS}, {_SETTINGS}) -> (Tensor positions, Tensor delta)",
    fake=lambda ids, image, video, mask, cu_seqlens, *settings: _outputs(ids, cu_seqlens, None),
    check=_check_op,
    CPU=_run,
    CUDA=_run,
)
register_opaque(
    f"mrope_positions_chunk({_TENSORS}, Tensor state, {_SETTINGS}) -> (Tensor positions, Tensor delta, Tensor state)",
    fake=lambda ids, image, video, mask, cu_seqlens, state, *settings: _outputs(ids, cu_seqlens, state),
    check=lambda *arguments: _check("mrope_positions_chunk", *arguments),
    CPU=_run_chunk,
    CUDA=_run_chunk,
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
    inputs = (input_ids, image_grid_thw, video_grid_thw, attention_mask, cu_seqlens)
    tokens = (image_token_id, video_token_id, spatial_merge_size)
    chosen = _check("mrope_positions", *inputs, None, *tokens, backend)
    run = torch_ops.mrope_positions if _traced(input_ids) else _run
    positions, delta = run(*inputs, *tokens, chosen)
    return positions, delta


def mrope_positions_chunk(
    input_ids: torch.Tensor,
    image_grid_thw: torch.Tensor | None,
    video_grid_thw: torch.Tensor | None,
    attention_mask: torch.Tensor | None = None,
    *,
    state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    image_token_id: int,
    video_token_id: int,
    spatial_merge_size: int = 2,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """:func:`mrope_positions` of sequences that come in chunks: chunked prefill, a live video, a chat that grows.

    Chunks may be cut anywhere, an image or video included. Their positions, laid end to end, are those of the whole.
    A batch or pack may mix sequences that begin, go on and stay empty in this call.

    Args:
        input_ids, attention_mask, cu_seqlens, image_token_id, video_token_id, spatial_merge_size, backend: as for
            :func:`mrope_positions`.
        image_grid_thw, video_grid_thw: ``(n, 3)``, the images and videos that *begin* in this chunk, in order of
            appearance. One that an earlier chunk began is in ``state``.
        state: ``(B, 7)`` int64, ``(S, 7)`` when packed, as the call for the chunk before returned it, or rows of it
            in any order; a row of zeros begins a sequence. ``None``: all begin.

    Returns:
        positions: ``(3, B, L)`` int64.
        delta: ``(B,)`` or ``(S,)`` int64 of the sequences so far, an image that is cut counted as if complete.
        state: ``(B, 7)`` or ``(S, 7)`` int64 for the next chunk. ``state[:, 2]`` is zero where no image or video is
            cut; ask this of the last chunk, whose end no one else can check.

    Raises:
        TypeError, ValueError: as :func:`mrope_positions`, and for a ``state`` that no call returned or whose image is
            not gone on with. With ``"cuda"`` contents are not checked, and such a state counts as zeros.
    """
    inputs = (input_ids, image_grid_thw, video_grid_thw, attention_mask, cu_seqlens)
    tokens = (image_token_id, video_token_id, spatial_merge_size)
    chosen = _check("mrope_positions_chunk", *inputs, state, *tokens, backend)
    if state is None:
        state = input_ids.new_zeros((_sequences(input_ids, cu_seqlens), _STATE_SIZE), dtype=torch.int64)
    run = torch_ops.mrope_positions_chunk if _traced(input_ids) else _run_chunk
    positions, delta, following = run(*inputs, state, *tokens, chosen)
    return positions, delta, following


def _check(
    op: str,
    input_ids: torch.Tensor,
    image_grid_thw: torch.Tensor | None,
    video_grid_thw: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    state: torch.Tensor | None,
    image_token_id: int,
    video_token_id: int,
    spatial_merge_size: int,
    backend: str | None,
) -> str:
    """Refuse what either function refuses whatever the contents; returns the backend that serves."""
    check = Checker(op)
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
    if state is not None:
        check.tensor("state", state, ("S", _STATE_SIZE), dtypes=(torch.int64,))
        rows = _sequences(input_ids, cu_seqlens)
        check.require(
            state.shape[0] == rows, f"state must have a row for each of {rows} sequences, got {state.shape[0]}"
        )
    return resolve("mrope_positions", input_ids.device.type, backend)


def _traced(input_ids: torch.Tensor) -> bool:
    """Tracers and tensors without data need the dispatcher; otherwise it only costs time."""
    return torch.compiler.is_compiling() or type(input_ids) is not torch.Tensor or input_ids.is_meta
