"""The CUDA kernels of the M-RoPE position builder: run on the CPU everywhere, on a GPU where there is one.

For the CPU they are compiled with a stand-in for threads, barriers and shuffles (host/cuda_on_host.h).
"""

from __future__ import annotations

import subprocess

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2vl_kernels import mrope_positions, mrope_positions_chunk
from qwen2vl_kernels.ops.mrope_positions import mrope_positions_ref
from tests.kernels.on_host import SANITIZERS, build_on_host

from .mrope_layouts import (
    IDS,
    IMAGE,
    TEXT,
    VIDEO,
    batches,
    chunked,
    chunked_batches,
    expected_batch,
    grids,
    needs,
    paper_rule,
    token_ids,
)

UNWRITTEN = -(2**63)  # what the host program fills its outputs with


@pytest.fixture(scope="module")
def on_host(tmp_path_factory):
    return build_on_host("mrope_positions", tmp_path_factory.mktemp("host"))


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    return build_on_host("mrope_positions", tmp_path_factory.mktemp("sanitized"), *SANITIZERS)


def _run_on_host(program, ids, image, video, mask, cu, merge_size, threads, state=None):
    sequences = ids.shape[0] if cu is None else len(cu) - 1
    head = [
        *ids.shape,
        len(image),
        len(video),
        sequences,
        IMAGE,
        VIDEO,
        merge_size,
        mask is not None,
        cu is not None,
        state is not None,
    ]
    tensors = [t for t in (ids, mask, image, video, cu, state) if t is not None]
    numbers = [*map(int, head), threads, *(n for t in tensors for n in t.flatten().tolist())]
    ran = subprocess.run([program], input=" ".join(map(str, numbers)), capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    values = torch.tensor([int(n) for n in ran.stdout.split()], dtype=torch.int64)
    positions, delta, after = values.split([3 * ids.numel(), sequences, 0 if state is None else state.numel()])
    return positions.view(3, *ids.shape), delta, *([] if state is None else [after.view(-1, 7)])


@settings(max_examples=60, deadline=None)
@given(batch=batches(), threads=st.sampled_from([32, 64, 96]))
def test_cuda_kernels_on_host(on_host, batch, threads):
    sequences, merge_size, mask = batch
    ids, positions, delta = expected_batch(sequences, mask)
    image, video = (grids(sequences, modality, merge_size) for modality in ("image", "video"))
    got = _run_on_host(on_host, ids, image, video, mask, None, merge_size, threads)
    assert torch.equal(got[0], positions)
    assert torch.equal(got[1], delta)


@settings(max_examples=60, deadline=None)
@given(batch=chunked_batches(), threads=st.sampled_from([32, 64]))
def test_cuda_kernels_on_host_in_chunks(on_host, batch, threads):
    sequences, mask, cuts, merge_size, packed = batch

    def run(ids, image, video, mask, cu, state):
        state = torch.zeros(len(sequences), 7, dtype=torch.int64) if state is None else state
        return _run_on_host(on_host, ids, image, video, mask, cu, merge_size, threads, state)

    positions, delta, state, want, want_delta = chunked(run, sequences, mask, cuts, merge_size, packed)
    assert torch.equal(positions, want)
    assert torch.equal(delta, want_delta)
    assert torch.equal(state[:, 0], mask.sum(1) + delta) and not state[:, 2:].any()


def test_cuda_kernels_on_host_in_many_steps(on_host):
    """More tokens than 32 threads scan in 8 steps, more images than they scan in one, and empty segments."""
    parts = [
        part
        for n in range(60)
        for part in (("text", 1 + n % 3), ("image", 1, 1 + n % 4, 5), ("video", n % 5 + 1, 2, 1))
    ]
    sequences = [parts[:50], [], parts[50:], []]
    bounds = [0]
    for one in sequences:
        bounds.append(bounds[-1] + len(token_ids(one)))
    tail = [TEXT, IMAGE, TEXT]
    ids = torch.tensor([[i for one in sequences for i in token_ids(one)] + tail])
    cu = torch.tensor(bounds, dtype=torch.int32)
    image, video = (grids(sequences, modality, 2) for modality in ("image", "video"))
    assert ids.numel() > 8 * 32 * 4 and len(image) > 32
    got = _run_on_host(on_host, ids, image, video, None, cu, 2, 32)
    want = mrope_positions_ref(ids, image, video, None, cu, **IDS)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


number = st.one_of(st.integers(-2, 9), st.sampled_from([-(2**63), 2**31 - 1, 2**31, 2**62, 2**63 - 1]))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_cuda_kernels_stay_in_bounds(sanitized, data):
    """Whatever the contents, no access outside of the arrays and no overflow: sanitizers end the program."""

    def filled(*shape, values):
        count = int(torch.tensor(shape).prod())
        made = data.draw(st.lists(values, min_size=count, max_size=count))
        return torch.tensor(made, dtype=torch.int64).view(shape)

    packed = data.draw(st.booleans())
    rows, columns = 1 if packed else data.draw(st.integers(1, 3)), data.draw(st.integers(1, 40))
    ids = filled(rows, columns, values=st.sampled_from([TEXT, IMAGE, VIDEO]))
    mask = filled(rows, columns, values=st.integers(0, 1)) if data.draw(st.booleans()) else None
    image, video = (filled(data.draw(st.integers(0, 4)), 3, values=number) for _ in range(2))
    cu = filled(data.draw(st.integers(1, 5)), values=st.integers(-3, 50)) if packed else None
    count = rows if cu is None else len(cu) - 1
    state = filled(count, 7, values=number) if data.draw(st.booleans()) else None
    outputs = _run_on_host(sanitized, ids, image, video, mask, cu, data.draw(st.integers(1, 3)), 32, state)
    assert not any((output == UNWRITTEN).any() for output in outputs)
    assert outputs[1].shape == (count,)


# ---------------------------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [needs("cuda")])
@settings(max_examples=100, deadline=None)
@given(batch=batches())
def test_cuda(batch, backend):
    sequences, merge_size, mask = batch
    ids, positions, delta = expected_batch(sequences, mask)
    image, video = (grids(sequences, modality, merge_size).cuda() for modality in ("image", "video"))
    got = mrope_positions(ids.cuda(), image, video, mask.cuda(), **IDS, spatial_merge_size=merge_size, backend=backend)
    assert torch.equal(got[0].cpu(), positions)
    assert torch.equal(got[1].cpu(), delta)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [needs("cuda")])
@settings(max_examples=50, deadline=None)
@given(batch=chunked_batches())
def test_cuda_in_chunks(batch, backend):
    sequences, mask, cuts, merge_size, packed = batch

    def run(ids, image, video, mask, cu, state):
        moved = (None if t is None else t.cuda() for t in (ids, image, video, mask))
        cu = None if cu is None else cu.cuda()
        return mrope_positions_chunk(
            *moved, state=state, cu_seqlens=cu, **IDS, spatial_merge_size=merge_size, backend=backend
        )

    positions, delta, state, want, want_delta = chunked(run, sequences, mask, cuts, merge_size, packed)
    assert torch.equal(positions.cpu(), want)
    assert torch.equal(delta.cpu(), want_delta)
    assert not state[:, 2:].any()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [needs("cuda")])
def test_cuda_graph_replay(backend):
    """Captured once with padded boundaries, replayed on other contents."""
    first = [[("text", 3), ("image", 1, 2, 2), ("text", 5)], [("text", 8)]]
    second = [[("text", 12)], [("text", 1), ("video", 1, 2, 2), ("text", 3)]]
    ids = torch.empty(1, 20, dtype=torch.int64, device="cuda")
    cu = torch.empty(6, dtype=torch.int32, device="cuda")
    image = torch.empty(1, 3, dtype=torch.int64, device="cuda")
    video = torch.empty(1, 3, dtype=torch.int64, device="cuda")

    def load(sequences):
        made = [i for parts in sequences for i in token_ids(parts)]
        ids.copy_(torch.tensor([made]))
        bounds = [0, len(token_ids(sequences[0]))] + [len(made)] * 4
        cu.copy_(torch.tensor(bounds, dtype=torch.int32))
        for grid, modality in ((image, "image"), (video, "video")):
            rows = grids(sequences, modality, 2)
            grid.copy_(rows if len(rows) else torch.zeros(1, 3, dtype=torch.int64))

    def run():
        return mrope_positions(ids, image, video, cu_seqlens=cu, **IDS, backend=backend)

    load(first)
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        positions, delta = run()
    for sequences in (second, first):
        load(sequences)
        graph.replay()
        made = [p for parts in sequences for p in paper_rule(parts)]
        assert torch.equal(positions[:, 0].cpu(), torch.tensor(made).T)
        shifts = [
            0 if parts == [] else 1 + max(map(max, paper_rule(parts))) - len(paper_rule(parts)) for parts in sequences
        ]
        assert delta.tolist() == [*shifts, 0, 0, 0]
