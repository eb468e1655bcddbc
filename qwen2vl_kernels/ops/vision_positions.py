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

from ..core import native
from ..core.backends import resolve
from ..core.checks import INTS, Checker
from ..core.library import register_opaque
from ..core.namespace import torch_ops

MAX_PATCHES = 2**31 - 1  # of one call: 32 GB of positions


def vision_positions_ref(grid_thw: torch.Tensor, merge_size: int = 2, num_patches: int | None = None) -> torch.Tensor:
    """Grid by grid: coordinates in raster order, regrouped into merge blocks, repeated t times."""
    parts = []
    _check_count(_held(grid_thw, merge_size), num_patches)
    for t, gh, gw in grid_thw.tolist():
        blocks = (gh // merge_size, merge_size, gw // merge_size, merge_size)
        rows = torch.arange(gh, device=grid_thw.device).view(blocks[0], merge_size, 1, 1).expand(blocks)
        columns = torch.arange(gw, device=grid_thw.device).view(1, 1, blocks[2], merge_size).expand(blocks)
        raster = torch.stack((rows, columns), -1)  # (gh/m, m, gw/m, m, 2)
        frame = raster.transpose(1, 2).reshape(gh * gw, 2)
        parts.append(frame.repeat(t, 1))
    return torch.cat(parts) if parts else torch.empty((0, 2), dtype=torch.int64, device=grid_thw.device)


def vision_positions_scan(grid_thw: torch.Tensor, merge_size: int, num_patches: int | None) -> torch.Tensor:
    """Patch by patch: whose grid it lies in, by the running sum of the grids, and where in its frame. With
    ``num_patches`` nothing is read on the host, and contents count as they do for the CUDA kernel."""
    if num_patches is None:
        num_patches = _held(grid_thw, merge_size)
    m, room, grids = merge_size, MAX_PATCHES + 1, grid_thw.long()
    if not grids.shape[0]:
        return grids.new_zeros((num_patches, 2))
    good = (grids.amin(1) > 0) & (grids.narrow(1, 1, 2) % m == 0).all(1)
    grids = grids.clamp(0, room)  # no product of two passes an int64, and nothing that has a place changes
    t, height, width = grids.unbind(1)
    area = (height * width).clamp(max=room)
    sizes = (t * area).clamp(max=room) * good
    ends = sizes.cumsum(0)
    patch = torch.arange(num_patches, device=grids.device)
    item = torch.searchsorted(ends, patch, right=True).clamp(max=grids.shape[0] - 1)
    start, frame, across = (
        x.index_select(0, item) for x in (ends - sizes, area.clamp(min=1), (width // m).clamp(min=1))
    )
    inside = (patch - start) % frame
    block, place = inside // (m * m), inside % (m * m)
    row = block // across * m + place // m
    column = block % across * m + place % m
    return torch.stack((row, column), 1) * (patch < sizes.sum()).unsqueeze(1)


def _held(grid_thw: torch.Tensor, merge_size: int) -> int:
    """Patches of the grids, which are read on the host and must be good."""
    total = 0
    for item, (t, gh, gw) in enumerate(grid_thw.tolist()):
        total += t * gh * gw
        if min(t, gh, gw) < 1 or gh % merge_size or gw % merge_size:
            _refuse(grid_thw, item, merge_size)
    if total > MAX_PATCHES:
        _refuse(grid_thw, -1, merge_size)
    return total


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


def _check_count(held: int, num_patches: int | None) -> None:
    if num_patches is not None and held != num_patches:
        raise ValueError(f"vision_positions: grid_thw must hold num_patches = {num_patches} patches in all, got {held}")


def _count(grid_thw: torch.Tensor, merge_size: int) -> int:
    """Patches of grids on the CPU."""
    item, patches = native.cpu().count_patches(native.view(grid_thw), grid_thw.shape[0], merge_size, MAX_PATCHES)
    if patches < 0:
        _refuse(grid_thw, item, merge_size)
    return patches


def _run_native(grid_thw: torch.Tensor, merge_size: int, num_patches: int | None) -> torch.Tensor:
    patches = _count(grid_thw, merge_size)
    _check_count(patches, num_patches)
    positions = torch.empty((patches, 2), dtype=torch.int64, device="cpu")
    view = native.view(grid_thw)
    native.cpu().vision_positions(view, grid_thw.shape[0], merge_size, patches, positions.data_ptr())
    return positions


def _run_cuda(grid_thw: torch.Tensor, merge_size: int, num_patches: int | None) -> torch.Tensor:
    device, items = grid_thw.device, grid_thw.shape[0]
    if num_patches is None:
        num_patches = _count(grid_thw.cpu(), merge_size)
    with torch.cuda.device(device):
        positions = torch.empty((num_patches, 2), dtype=torch.int64, device=device)
        workspace = torch.empty((items,), dtype=torch.int64, device=device)
        native.cuda().vision_positions(
            native.view(grid_thw),
            items,
            merge_size,
            num_patches,
            positions.data_ptr(),
            workspace.data_ptr(),
            positions.device.index,
            torch.cuda.current_stream(device).cuda_stream,
        )
    return positions


_BACKENDS = {
    "eager": vision_positions_ref,
    "native": _run_native,
    "cuda": _run_cuda,
    "scan": vision_positions_scan,
}


def _run(grid_thw: torch.Tensor, merge_size: int, num_patches: int | None, backend: str) -> torch.Tensor:
    return _BACKENDS[backend](grid_thw, merge_size, num_patches)


def _fake(grid_thw: torch.Tensor, merge_size: int, num_patches: int | None, backend: str) -> torch.Tensor:
    patches = torch.library.get_ctx().new_dynamic_size() if num_patches is None else num_patches
    return torch.empty((patches, 2), dtype=torch.int64, device=grid_thw.device)


def _check(grid_thw: torch.Tensor, merge_size: int, num_patches: int | None, backend: str | None) -> str:
    """Refuse what is refused whatever the contents; returns the backend that serves."""
    check = Checker("vision_positions")
    check.tensor("grid_thw", grid_thw, ("n", 3), dtypes=INTS)
    check.require(1 <= merge_size < 2**15, f"merge_size must be in [1, 2^15), got {merge_size}")
    check.require(
        num_patches is None or 0 <= num_patches <= MAX_PATCHES,
        f"num_patches must be in [0, {MAX_PATCHES}], got {num_patches}",
    )
    return resolve("vision_positions", grid_thw.device.type, backend)


register_opaque(
    "vision_positions(Tensor grid_thw, int merge_size, SymInt? num_patches, str backend) -> Tensor",
    fake=_fake,
    check=_check,
    CPU=_run,
    CUDA=_run,
)


def vision_positions(
    grid_thw: torch.Tensor, merge_size: int = 2, *, num_patches: int | None = None, backend: str | None = None
) -> torch.Tensor:
    """Patch coordinates for :func:`vision_rope_tables`.

    Args:
        grid_thw: ``(n, 3)`` int64 or int32, ``(t, gh, gw)`` of every image or video in patches.
        merge_size: patches a side of a merge block.
        num_patches: T, where the caller knows it (the rows of ``pixel_values``). On a GPU nothing is then read on
            the host, the call can be captured in a CUDA graph, and contents are not checked: a grid with an entry
            below 1 or sides that ``merge_size`` does not divide holds nothing, patches beyond the last grid are at
            (0, 0), and grids beyond T are left out.
        backend: ``None`` (choose), ``"native"`` (CPU), ``"cuda"``, ``"scan"`` (PyTorch's operations, which read nothing
            on the host of any device where ``num_patches`` is given: for a GPU without our extension), ``"eager"``.

    Returns ``(T, 2)`` int64 on grid_thw's device: the row and column of each patch within its frame. Raises
    ``TypeError``/``ValueError`` naming ``grid_thw``, ``merge_size`` or ``num_patches`` for wrong types, shapes or
    contents; ``ValueError`` too where ``num_patches`` is given, on the CPU, and not what the grids hold, unless
    ``"scan"`` is named.
    """
    chosen = _check(grid_thw, merge_size, num_patches, backend)
    if torch.compiler.is_compiling() or type(grid_thw) is not torch.Tensor or grid_thw.is_meta:
        return torch_ops.vision_positions(grid_thw, merge_size, num_patches, chosen)
    return _run(grid_thw, merge_size, num_patches, chosen)
