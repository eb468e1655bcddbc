"""Patch coordinates of the vision tower, against plain loops over blocks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen2vl_kernels import BackendError, _native, vision_positions

BACKENDS = st.sampled_from(["native", "eager"])


def block_order(grids: list[list[int]], merge_size: int) -> list[list[int]]:
    return [
        [block_row * merge_size + row, block_column * merge_size + column]
        for t, gh, gw in grids
        for _ in range(t)
        for block_row in range(gh // merge_size)
        for block_column in range(gw // merge_size)
        for row in range(merge_size)
        for column in range(merge_size)
    ]


@given(
    merge_size=st.integers(1, 3),
    items=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.int32, torch.int64]),
    backend=BACKENDS,
)
def test_block_order(merge_size, items, dtype, backend):
    grids = [[t, h * merge_size, w * merge_size] for t, h, w in items]
    # Transposed and back: the grid may have any strides.
    positions = vision_positions(torch.tensor(grids, dtype=dtype).T.contiguous().T, merge_size, backend=backend)
    assert positions.dtype == torch.int64
    assert positions.tolist() == block_order(grids, merge_size)


@pytest.mark.parametrize("backend", ["native", "eager"])
def test_no_grids(backend):
    assert vision_positions(torch.empty(0, 3, dtype=torch.int64), backend=backend).shape == (0, 2)


entries = st.one_of(st.integers(-3, 5), st.sampled_from([2**31, 2**40, 2**62, 2**63 - 1, -(2**63)]))


@given(st.lists(st.tuples(entries, entries, entries), min_size=1, max_size=3), st.integers(1, 3), BACKENDS)
def test_grids_of_any_content_are_served_or_refused(grids, merge_size, backend):
    good = all(min(g) > 0 and g[1] % merge_size == 0 and g[2] % merge_size == 0 for g in grids)
    if good and sum(t * h * w for t, h, w in grids) < 2**31:
        assert vision_positions(torch.tensor(grids), merge_size, backend=backend).tolist() == block_order(
            grids, merge_size
        )
        return
    with pytest.raises(ValueError, match=r"grid_thw(\[\d\])? must (hold|have)"):
        vision_positions(torch.tensor(grids), merge_size, backend=backend)


@pytest.mark.parametrize("patches", [0, 15, 17, -1])
def test_the_extension_never_writes_past_its_room(patches):
    grids, out = torch.tensor([[1, 4, 4]]), torch.full((16, 2), -7)
    with pytest.raises(ValueError):
        _native.cpu().vision_positions(_native.view(grids), 1, 2, patches, out.data_ptr())
    assert (out == -7).all()


@pytest.mark.parametrize("backend", ["native", "eager"])
def test_refusals(backend):
    grid = torch.tensor([[1, 4, 4]])
    with pytest.raises(TypeError, match=r"grid_thw must be a torch\.Tensor, got list"):
        vision_positions([[1, 4, 4]])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="grid_thw must have one of the dtypes int64, int32"):
        vision_positions(grid.float())
    with pytest.raises(ValueError, match=r"grid_thw must have shape \(n, 3\), got \(3,\)"):
        vision_positions(grid[0])
    with pytest.raises(ValueError, match=r"grid_thw\[1\] must hold numbers of at least 1, got \(0, 4, 4\)"):
        vision_positions(torch.tensor([[1, 4, 4], [0, 4, 4]]), backend=backend)
    with pytest.raises(ValueError, match=r"grid_thw\[0\] must have its height and width divisible by 3"):
        vision_positions(grid, 3, backend=backend)
    with pytest.raises(ValueError, match="merge_size must be at least 1, got 0"):
        vision_positions(grid, 0)
    with pytest.raises(ValueError, match="grid_thw must hold at most 2147483647 patches in all"):
        vision_positions(torch.tensor([[2**15, 2**8, 2**8]]), backend=backend)


def test_unknown_backend():
    with pytest.raises(BackendError, match="backend 'cuda' does not serve cpu tensors"):
        vision_positions(torch.tensor([[1, 4, 4]]), backend="cuda")


@pytest.mark.parametrize("backend", ["native", "eager"])
def test_opcheck(backend):
    torch.library.opcheck(
        torch.ops.qwen2vl.vision_positions.default, (torch.tensor([[2, 4, 6], [1, 2, 2]]), 2, backend)
    )
