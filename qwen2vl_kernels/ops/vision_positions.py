"""Row and column of every patch of a batch of images and videos, in the order in which the patches lie.

The vision tower's 2D rotary embedding (Qwen2-VL, arXiv 2409.12191, section 2.1) takes patch coordinates, and
patches lie in merge blocks: block row, block column, then row and column within the block. For a grid of
2 x 4 patches and ``merge_size`` 2 the order is

    0 1 4 5
    2 3 6 7

Every temporal step of a video repeats the coordinates of its frame.
Shapes: grid_thw ``(n, 3)``, result ``(T, 2)`` int64 with T the sum of t * gh * gw over the grids.
"""

from __future__ import annotations

import torch

from .. import _native
from .._backend import resolve
from .._checks import INTS, Checker
from .._library import register_opaque

MAX_PATCHES = 2**31 - 1  # of one call: 32 GB of positions


def vision_positions_ref(grid_thw: torch.Tensor, merge_size: int = 2) -> torch.Tensor:
    """Grid by grid: coordinates in raster order, regrouped into merge blocks, repeated t times."""
    parts, total = [], 0
    for item, (t, gh, gw) in enumerate(grid_thw.tolist()):
        total += t * gh * gw
        if min(t, gh, gw) < 1 or gh % merge_size or gw % merge_size:
            _refuse(grid_thw, item, merge_size)
    if total > MAX_PATCHES:
        _refuse(grid_thw, -1, merge_size)
    for t, gh, gw in grid_thw.tolist():
        blocks = (gh // merge_size, merge_size, gw // merge_size, merge_size)
        rows = torch.arange(gh, device=grid_thw.device).view(blocks[0], merge_size, 1, 1).expand(blocks)
        columns = torch.arange(gw, device=grid_thw.device).view(1, 1, blocks[2], merge_size).expand(blocks)
        raster = torch.stack((rows, columns), -1)  # (gh/m, m, gw/m, m, 2)
        frame = raster.transpose(1, 2).reshape(gh * gw, 2)
        parts.append(frame.repeat(t, 1))
    return torch.cat(parts) if parts else torch.empty((0, 2), dtype=torch.int64, device=grid_thw.device)


def _refuse(grid_thw: torch.Tensor, item: int, merge_size: int) -> None:
    """Word what is wrong with a grid, or with the sum of all."""
    if item < 0:
        raise ValueError(f"vision_positions: grid_thw must hold at most {MAX_PATCHES} patches in all")
    grid = tuple(grid_thw[item].tolist())
    if min(grid) < 1:
        raise ValueError(f"vision_positions: grid_thw[{item}] must hold numbers of at least 1, got {grid}")
    raise ValueError(
        f"vision_positions: grid_thw[{item}] must have its height and width divisible by {merge_size}, got {grid}"
    )


def _run_native(grid_thw: torch.Tensor, merge_size: int = 2) -> torch.Tensor:
    items, view = grid_thw.shape[0], _native.view(grid_thw)
    item, patches = _native.cpu().count_patches(view, items, merge_size, MAX_PATCHES)
    if patches < 0:
        _refuse(grid_thw, item, merge_size)
    positions = torch.empty((patches, 2), dtype=torch.int64)
    _native.cpu().vision_positions(view, items, merge_size, patches, positions.data_ptr())
    return positions


_BACKENDS = {"eager": vision_positions_ref, "native": _run_native}


def _run(grid_thw: torch.Tensor, merge_size: int, backend: str) -> torch.Tensor:
    return _BACKENDS[backend](grid_thw, merge_size)


def _fake(grid_thw: torch.Tensor, merge_size: int, backend: str) -> torch.Tensor:
    patches = torch.library.get_ctx().new_dynamic_size()
    return torch.empty((patches, 2), dtype=torch.int64, device=grid_thw.device)


register_opaque(
    "vision_positions(Tensor grid_thw, int merge_size, str backend) -> Tensor",
    fake=_fake,
    CPU=_run,
    CUDA=_run,
)


def vision_positions(grid_thw: torch.Tensor, merge_size: int = 2, *, backend: str | None = None) -> torch.Tensor:
    """Patch coordinates for :func:`vision_rope_tables`.

    Args:
        grid_thw: ``(n, 3)`` int64 or int32, ``(t, gh, gw)`` of every image or video in patches.
        merge_size: patches a side of a merge block.
        backend: ``None`` (choose), ``"native"``, ``"eager"``.

    Returns ``(T, 2)`` int64 on grid_thw's device: the row and column of each patch within its frame. T
    depends on the contents, so grids that live on a GPU are read on the host: keep them on the CPU and move
    the result. Raises ``TypeError``/``ValueError`` naming ``grid_thw`` or ``merge_size`` for wrong types,
    shapes or contents.
    """
    check = Checker("vision_positions")
    check.tensor("grid_thw", grid_thw, ("n", 3), dtypes=INTS)
    check.require(merge_size >= 1, f"merge_size must be at least 1, got {merge_size}")
    chosen = resolve("vision_positions", grid_thw.device.type, backend)
    if torch.compiler.is_compiling() or type(grid_thw) is not torch.Tensor:
        return torch.ops.qwen2vl.vision_positions(grid_thw, merge_size, chosen)
    return _run(grid_thw, merge_size, chosen)
