"""Patch coordinates of the vision tower, against plain loops over blocks."""

from __future__ import annotations

import subprocess

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2vl_kernels import BackendError, vision_positions
from qwen2vl_kernels.core import native
from tests.kernels.on_host import SANITIZERS, build_on_host

from .mrope_layouts import needs

NAMES = ["native", "eager", "scan"]
BACKENDS = st.sampled_from(NAMES)


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


@pytest.mark.parametrize("backend", NAMES)
def test_the_default_device_changes_nothing(backend):
    grids = torch.tensor([[1, 4, 6], [2, 2, 2]])
    want = vision_positions(grids, backend=backend)
    with torch.device("meta"):
        assert torch.equal(vision_positions(grids, backend=backend), want)


@pytest.mark.parametrize("backend", NAMES)
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
        native.cpu().vision_positions(native.view(grids), 1, 2, patches, out.data_ptr())
    assert (out == -7).all()


@pytest.mark.parametrize("backend", NAMES)
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
    with pytest.raises(ValueError, match=r"merge_size must be in \[1, 2\^15\), got 0"):
        vision_positions(grid, 0)
    for wrong in (0, 15, 17) if backend != "scan" else ():
        with pytest.raises(ValueError, match=f"grid_thw must hold num_patches = {wrong} patches in all, got 16"):
            vision_positions(grid, num_patches=wrong, backend=backend)
    with pytest.raises(ValueError, match=r"num_patches must be in .*, got -1"):
        vision_positions(grid, num_patches=-1)
    with pytest.raises(ValueError, match="grid_thw must hold at most 2147483647 patches in all"):
        vision_positions(torch.tensor([[2**15, 2**8, 2**8]]), backend=backend)


def test_unknown_backend():
    with pytest.raises(BackendError, match="backend 'cuda' does not serve cpu tensors"):
        vision_positions(torch.tensor([[1, 4, 4]]), backend="cuda")


@pytest.mark.parametrize("num_patches", [None, 52])
@pytest.mark.parametrize("backend", NAMES)
def test_opcheck(backend, num_patches):
    arguments = (torch.tensor([[2, 4, 6], [1, 2, 2]]), 2, num_patches, backend)
    torch.library.opcheck(torch.ops.qwen2vl.vision_positions.default, arguments)


def test_meta_tensors():
    assert vision_positions(torch.empty(2, 3, dtype=torch.int64, device="meta"), num_patches=52).shape == (52, 2)


# ------------------------------------------------------------------------- the CUDA kernels, run on the CPU


@pytest.fixture(scope="module")
def on_host():
    return build_on_host("vision_positions", *SANITIZERS)


def _run_on_host(program, grids, merge_size, patches, threads=32):
    numbers = [len(grids), merge_size, patches, threads, *(n for grid in grids for n in grid)]
    ran = subprocess.run([program], input=" ".join(map(str, numbers)), capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    values = [int(n) for n in ran.stdout.split()]
    return [values[n : n + 2] for n in range(0, len(values), 2)]


@settings(max_examples=60, deadline=None)
@given(
    merge_size=st.integers(1, 3),
    items=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)), max_size=70),
    threads=st.sampled_from([32, 64]),
)
def test_cuda_kernels_on_host(on_host, merge_size, items, threads):
    grids = [[t, h * merge_size, w * merge_size] for t, h, w in items]
    want = block_order(grids, merge_size)
    assert _run_on_host(on_host, grids, merge_size, len(want), threads) == want


@settings(max_examples=60, deadline=None)
@given(
    grids=st.lists(st.tuples(entries, entries, entries), max_size=4),
    merge_size=st.sampled_from([1, 2, 3, 2**15 - 1]),
    patches=st.integers(0, 100),
)
def test_cuda_kernels_stay_in_bounds(on_host, grids, merge_size, patches):
    """Of any contents: what the good grids hold, as far as there is room, then zeros."""
    if (want := _padded(grids, merge_size, patches)) is not None:
        assert _run_on_host(on_host, grids, merge_size, patches) == want


@given(
    grids=st.lists(st.tuples(entries, entries, entries), max_size=4),
    merge_size=st.sampled_from([1, 2, 3, 2**15 - 1]),
    patches=st.integers(0, 100),
)
def test_the_scan_stays_in_bounds(grids, merge_size, patches):
    """The same by PyTorch's operations, none of which reads a grid on the host."""
    if (want := _padded(grids, merge_size, patches)) is not None:
        given = torch.tensor(grids, dtype=torch.int64).view(-1, 3)
        assert vision_positions(given, merge_size, num_patches=patches, backend="scan").tolist() == want


def _padded(grids, merge_size, patches):
    """Positions of ``patches`` patches; None where they are too many to write down."""
    good = [g for g in grids if min(g) > 0 and g[1] % merge_size == 0 and g[2] % merge_size == 0]
    want = []
    for grid in good:
        if len(want) < patches and grid[0] * grid[1] * grid[2] <= 10**4:
            want += block_order([grid], merge_size)
        elif len(want) < patches:
            return None
    return (want + [[0, 0]] * patches)[:patches]


# ---------------------------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [needs("cuda")])
@settings(max_examples=50, deadline=None)
@given(
    merge_size=st.integers(1, 3),
    items=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)), max_size=20),
    told=st.booleans(),
)
def test_cuda(backend, merge_size, items, told):
    grids = [[t, h * merge_size, w * merge_size] for t, h, w in items]
    want = torch.tensor(block_order(grids, merge_size), dtype=torch.int64).reshape(-1, 2)
    grid_thw = torch.tensor(grids, dtype=torch.int64).reshape(-1, 3).cuda()
    count = len(want) if told else None
    assert torch.equal(vision_positions(grid_thw, merge_size, num_patches=count, backend=backend).cpu(), want)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device")
@pytest.mark.parametrize("backend", [needs("cuda"), "scan"])
def test_cuda_graph_replay(backend):
    grid_thw = torch.tensor([[1, 4, 6], [2, 2, 2]]).cuda()
    vision_positions(grid_thw, num_patches=40, backend=backend)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        positions = vision_positions(grid_thw, num_patches=40, backend=backend)
    for grids in ([[1, 4, 6], [2, 2, 2]], [[4, 2, 2], [1, 4, 4]], [[0, 0, 0], [1, 6, 6]]):
        grid_thw.copy_(torch.tensor(grids))
        graph.replay()
        want = block_order([g for g in grids if min(g)], 2)
        assert positions.tolist() == (want + [[0, 0]] * 40)[:40]
