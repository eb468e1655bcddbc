"""Patch coordinates of the vision tower, against plain loops over blocks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen2vl_kernels import BackendError, vision_positions


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
)
def test_block_order(merge_size, items, dtype):
    grids = [[t, h * merge_size, w * merge_size] for t, h, w in items]
    # Transposed and back: the grid may have any strides.
    positions = vision_positions(torch.tensor(grids, dtype=dtype).T.contiguous().T, merge_size)
    assert positions.dtype == torch.int64
    assert positions.tolist() == block_order(grids, merge_size)


def test_no_grids():
    assert vision_positions(torch.empty(0, 3, dtype=torch.int64)).shape == (0, 2)


def test_refusals():
    grid = torch.tensor([[1, 4, 4]])
    with pytest.raises(TypeError, match=r"grid_thw must be a torch\.Tensor, got list"):
        vision_positions([[1, 4, 4]])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="grid_thw must have one of the dtypes int64, int32"):
        vision_positions(grid.float())
    with pytest.raises(ValueError, match=r"grid_thw must have shape \(n, 3\), got \(3,\)"):
        vision_positions(grid[0])
    with pytest.raises(ValueError, match=r"grid_thw\[1\] must hold numbers of at least 1, got \(0, 4, 4\)"):
        vision_positions(torch.tensor([[1, 4, 4], [0, 4, 4]]))
    with pytest.raises(ValueError, match=r"grid_thw\[0\] must have its height and width divisible by 3"):
        vision_positions(grid, 3)
    with pytest.raises(ValueError, match="merge_size must be at least 1, got 0"):
        vision_positions(grid, 0)
    with pytest.raises(BackendError, match="backend 'native' does not serve cpu tensors"):
        vision_positions(grid, backend="native")


def test_opcheck():
    torch.library.opcheck(torch.ops.qwen2vl.vision_positions.default, (torch.tensor([[2, 4, 6], [1, 2, 2]]), 2))
