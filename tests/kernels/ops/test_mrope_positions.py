"""M-RoPE positions on the CPU: golden cases, the paper's rule on made-up layouts, refusals, registration."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2vl_kernels import BackendError, mrope_positions, mrope_positions_chunk

from .mrope_layouts import (
    IDS,
    IMAGE,
    PAD,
    TEXT,
    VIDEO,
    batches,
    chunked,
    chunked_batches,
    expected_batch,
    grids,
    needs,
    paper_rule,
    sequence,
    token_ids,
)

GOLDEN_FILE = Path(__file__).resolve().parents[2] / "golden" / "mrope_positions.json"
GOLDEN = json.loads(GOLDEN_FILE.read_text())
CPU_BACKENDS = [needs("eager"), needs("native")]

# ---------------------------------------------------------------------------------------------- results


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("case", GOLDEN["cases"].values(), ids=GOLDEN["cases"])
def test_golden(case, backend):
    mask = torch.tensor(case["attention_mask"])
    image, video = (None if g is None else torch.tensor(g) for g in (case["image_grid_thw"], case["video_grid_thw"]))
    positions, delta = mrope_positions(
        torch.tensor(case["input_ids"]),
        image,
        video,
        mask,
        image_token_id=GOLDEN["ids"]["image_pad"],
        video_token_id=GOLDEN["ids"]["video_pad"],
        spatial_merge_size=GOLDEN["spatial_merge_size"],
        backend=backend,
    )
    kept = mask.bool()
    assert torch.equal(positions[:, kept], torch.tensor(case["position_ids"])[:, kept])
    assert not positions[:, ~kept].any()
    # The golden deltas subtract the padded length, ours the number of unmasked tokens.
    assert torch.equal(delta, torch.tensor(case["rope_deltas"]).flatten() + mask.shape[1] - kept.sum(1))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@settings(max_examples=150, deadline=None)
@given(batch=batches())
def test_paper_rule(batch, backend):
    sequences, merge_size, mask = batch
    ids, positions, delta = expected_batch(sequences, mask)
    got = mrope_positions(
        ids,
        grids(sequences, "image", merge_size),
        grids(sequences, "video", merge_size),
        mask,
        **IDS,
        spatial_merge_size=merge_size,
        backend=backend,
    )
    assert torch.equal(got[0], positions)
    assert torch.equal(got[1], delta)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@settings(max_examples=60, deadline=None)
@given(sequences=st.lists(sequence, max_size=5), tail=st.integers(0, 3))
def test_packed_equals_single_runs(sequences, tail, backend):
    bounds = [0]
    for parts in sequences:
        bounds.append(bounds[-1] + len(token_ids(parts)))
    ids = torch.tensor([[i for parts in sequences for i in token_ids(parts)] + [IMAGE] * tail], dtype=torch.int64)
    positions, delta = mrope_positions(
        ids,
        grids(sequences, "image", 2),
        grids(sequences, "video", 2),
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        **IDS,
        backend=backend,
    )
    assert delta.shape == (len(sequences),)
    assert not positions[:, :, bounds[-1] :].any()
    for n, parts in enumerate(sequences):
        rows = slice(bounds[n], bounds[n + 1])
        one, one_delta = mrope_positions(
            ids[:, rows], grids([parts], "image", 2), grids([parts], "video", 2), **IDS, backend=backend
        )
        assert torch.equal(positions[:, :, rows], one)
        assert torch.equal(delta[n : n + 1], one_delta)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_packed_with_a_mask(backend):
    sequences = [[("text", 2), ("image", 1, 2, 2)], [("text", 3)]]
    ids = torch.tensor([[TEXT, PAD, TEXT, IMAGE, IMAGE, IMAGE, IMAGE, PAD, TEXT, TEXT, TEXT]])
    positions, delta = mrope_positions(
        ids,
        grids(sequences, "image", 2),
        None,
        ids != PAD,
        cu_seqlens=torch.tensor([0, 8, 11], dtype=torch.int32),
        **IDS,
        backend=backend,
    )
    made = [*paper_rule(sequences[0]), *paper_rule(sequences[1])]
    assert torch.equal(positions[:, ids != PAD], torch.tensor(made).T)
    assert not positions[:, ids == PAD].any()
    assert delta.tolist() == [-2, 0]


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64])
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
def test_dtypes_and_strides(ids_dtype, mask_dtype, backend):
    sequences = [[("text", 2), ("image", 1, 2, 3), ("text", 1)], [("video", 4, 2, 1), ("text", 3)]]
    mask = torch.zeros(2, 12, dtype=torch.int64)
    mask[0, 3:], mask[1, :11] = 1, 1
    ids, positions, delta = expected_batch(sequences, mask)
    got = mrope_positions(
        ids.to(ids_dtype).T.contiguous().T,
        torch.cat((grids(sequences, "image", 2), torch.zeros(1, 3)), 1).int()[:, :3],
        grids(sequences, "video", 2).to(ids_dtype).T.contiguous().T,
        torch.stack((mask, 1 - mask), -1).to(mask_dtype)[..., 0],
        **IDS,
        backend=backend,
    )
    assert got[0].dtype == got[1].dtype == torch.int64
    assert torch.equal(got[0], positions)
    assert torch.equal(got[1], delta)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0)])
def test_empty(shape, backend):
    ids = torch.zeros(shape, dtype=torch.int64)
    positions, delta = mrope_positions(ids, None, torch.empty(0, 3, dtype=torch.int64), **IDS, backend=backend)
    assert positions.shape == (3, *shape)
    assert delta.tolist() == [0] * shape[0]


# ---------------------------------------------------------------------------------------------- chunks


def _chunk(backend, merge_size=2):
    def run(ids, images, videos, mask, cu_seqlens, state):
        return mrope_positions_chunk(
            ids, images, videos, mask, state=state, cu_seqlens=cu_seqlens, **IDS, spatial_merge_size=merge_size,
            backend=backend,
        )  # fmt: skip

    return run


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@settings(max_examples=150, deadline=None)
@given(batch=chunked_batches())
def test_chunks_laid_end_to_end(batch, backend):
    sequences, mask, cuts, merge_size, packed = batch
    positions, delta, state, want, want_delta = chunked(
        _chunk(backend, merge_size), sequences, mask, cuts, merge_size, packed
    )
    assert torch.equal(positions, want)
    assert torch.equal(delta, want_delta)
    assert torch.equal(state[:, 0], mask.sum(1) + delta) and torch.equal(state[:, 1], mask.sum(1))
    assert not state[:, 2:].any()


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_chunk_that_ends_inside_of_a_video(backend):
    """What follows the video is known before it is complete; rows of the state may be moved and strided."""
    run = _chunk(backend)
    ids = torch.tensor([[TEXT, TEXT, VIDEO, VIDEO, VIDEO], [TEXT] * 5])
    _, delta, state = run(ids, None, torch.tensor([[2, 4, 6]]), None, None, None)
    assert state.tolist() == [[2, 5, 2, 3, 2, 2, 3], [5, 5, 0, 0, 0, 0, 0]]
    assert delta.tolist() == [2 + 3 - (2 + 12), 0]
    moved = state.flip(0).T.contiguous().T
    positions, delta, after = run(torch.tensor([[TEXT] * 10, [VIDEO] * 9 + [TEXT]]), None, None, None, None, moved)
    want = paper_rule([("text", 2), ("video", 2, 2, 3), ("text", 1)])[5:]
    assert torch.equal(positions[:, 1].T, torch.tensor(want))
    assert positions[0, 0].tolist() == list(range(5, 15))
    assert delta.tolist() == [0, -9] and after[:, 2:].eq(0).all()
    assert torch.equal(moved, state.flip(0))  # not written to


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_refuses_chunks(backend):
    run = _chunk(backend)
    row = torch.tensor([[TEXT, IMAGE]])
    _, _, state = run(row, torch.tensor([[1, 4, 4]]), None, None, None, None)
    cases = [
        ([[IMAGE, TEXT]], r"go on with the image placeholders that state cut after 2, got: input_ids\[0, 1\] is 1"),
        ([[TEXT, IMAGE]], r"state cut after 1, got: input_ids\[0, 0\] is 1"),
        ([[VIDEO, IMAGE]], r"state cut after 1, got: input_ids\[0, 0\] is 8"),
        ([[IMAGE] * 4], r"image_grid_thw has 0 grids, but input_ids\[0, 3\] is one more image"),
    ]
    for ids, message in cases:
        with pytest.raises(ValueError, match=message):
            run(torch.tensor(ids), None, None, None, None, state)
    with pytest.raises(ValueError, match=r"image_grid_thw has 1 grids, .* for only 0"):
        run(torch.tensor([[TEXT]]), torch.tensor(FRAME), None, None, None, None)
    for column, value in [(0, 2**62), (1, -1), (2, 3), (2, 0), (3, 0), (3, 4), (4, 0), (5, -1), (6, 2**31)]:
        broken = state.clone()
        broken[0, column] = value
        with pytest.raises(ValueError, match=r"state\[0\] must be what mrope_positions_chunk returned"):
            run(torch.tensor([[IMAGE]]), None, None, None, None, broken)
    for wrong, error, message in [
        (state.int(), TypeError, "state must have one of the dtypes int64"),
        (state[:, :6], ValueError, r"state must have shape \(S, 7\)"),
        (state.repeat(2, 1), ValueError, "state must have a row for each of 1 sequences, got 2"),
        ([[0] * 7], TypeError, "mrope_positions_chunk: state must be a torch.Tensor, got list"),
        (state.to("meta"), ValueError, "state must be on cpu like input_ids, got meta"),
    ]:
        with pytest.raises(error, match=message):
            run(row, None, None, None, None, wrong)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_empty_chunks(backend):
    positions, delta, state = _chunk(backend)(torch.zeros(0, 4, dtype=torch.int64), None, None, None, None, None)
    assert positions.shape == (3, 0, 4) and delta.shape == (0,) and state.shape == (0, 7)
    start = torch.tensor([[3, 5, 1, 2, 1, 2, 2]])
    positions, delta, state = _chunk(backend)(torch.zeros(1, 0, dtype=torch.int64), None, None, None, None, start)
    assert positions.shape == (3, 1, 0) and torch.equal(state, start) and delta.tolist() == [3 + 2 - (5 + 2)]


# ---------------------------------------------------------------------------------------------- refusals

ROW = [[TEXT, IMAGE, IMAGE, IMAGE, IMAGE, TEXT]]
FRAME = [[1, 4, 4]]


def refused(
    backend,
    message,
    ids=ROW,
    image=FRAME,
    video=None,
    mask=None,
    cu=None,
    error: type[Exception] = ValueError,
    **kw,
):
    def tensor(value):
        return torch.tensor(value) if isinstance(value, list) else value

    cu = torch.tensor(cu, dtype=torch.int32) if isinstance(cu, list) else cu
    with pytest.raises(error, match=message):
        mrope_positions(
            tensor(ids),
            tensor(image),
            tensor(video),
            tensor(mask),
            cu_seqlens=cu,
            backend=backend,
            **{**IDS, **kw},
        )


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_refuses_contents(backend):
    refused(
        backend,
        r"image_grid_thw\[1\] must hold numbers of at least 1, got \(1, 0, 4\)",
        image=[*FRAME, [1, 0, 4]],
    )
    refused(backend, r"video_grid_thw\[0\] must hold numbers of at least 1, got \(-1, 2, 4\)", video=[[-1, 2, 4]])
    refused(
        backend,
        r"image_grid_thw\[0\] must have its height and width divisible by 2, got \(1, 3, 4\)",
        image=[[1, 3, 4]],
    )
    refused(backend, r"image_grid_thw\[0\] .* divisible by 3", spatial_merge_size=3)
    refused(
        backend,
        r"image_grid_thw has 0 grids, but input_ids\[0, 1\] is one more image placeholder",
        image=None,
    )
    refused(backend, r"video_grid_thw has 0 grids, but input_ids\[0, 5\]", ids=[[*ROW[0][:5], VIDEO]])
    refused(
        backend,
        r"image_grid_thw has 2 grids, but the unmasked input_ids hold placeholders for only 1",
        image=FRAME * 2,
    )
    refused(backend, "image_grid_thw has 1 grids, .* for only 0", mask=[[1, 0, 0, 0, 0, 1]])
    refused(
        backend,
        r"input_ids must hold 6 image placeholders .* got 4: input_ids\[0, 5\] is 1",
        image=[[1, 4, 6]],
    )
    refused(
        backend,
        r"got 2: input_ids\[0, 3\] is 8",
        ids=[[TEXT, IMAGE, IMAGE, VIDEO, IMAGE, IMAGE]],
        video=[[1, 2, 2]],
    )
    refused(backend, "got 4: their sequence ends there", ids=[ROW[0][:5]], image=[[1, 4, 6]])
    refused(backend, "got 2: their sequence ends there", cu=[0, 3, 6])
    refused(backend, r"image_grid_thw\[0\] = \(1, 4, 9223372036854775806\), got 4", image=[[1, 4, 2**63 - 2]])
    for bad in ([1, 6], [0, 4, 3], [0, 7], [0, -1, 6]):
        refused(backend, r"cu_seqlens must start at 0, never fall, end at or before 6", cu=bad)


def test_refuses_arguments():
    refused(None, "input_ids must be a torch.Tensor, got str", ids="text", error=TypeError)
    refused(None, "input_ids must have one of the dtypes int64, int32", ids=[[1.0]], error=TypeError)
    refused(None, r"input_ids must have shape \(B, L\), got \(1,\)", ids=[1])
    refused(None, r"image_grid_thw must have shape \(images, 3\), got \(3,\)", image=[1, 2, 3])
    refused(None, "video_grid_thw must have one of the dtypes", video=[[1.0, 2.0, 3.0]], error=TypeError)
    refused(None, r"attention_mask must have shape \(B, L\) with B=1, L=6, got \(1, 2\)", mask=[[1, 1]])
    refused(None, "attention_mask must have one of the dtypes", mask=[[1.0] * 6], error=TypeError)
    refused(None, "cu_seqlens must have one of the dtypes int32", cu=torch.tensor([0, 6]), error=TypeError)
    refused(None, "cu_seqlens must hold at least one boundary", cu=[])
    refused(None, "input_ids must have one row with cu_seqlens, got 2", ids=ROW * 2, cu=[0, 6])
    refused(None, "spatial_merge_size must be at least 1, got 0", spatial_merge_size=0)
    refused(None, "image_token_id and video_token_id must differ", image_token_id=VIDEO)
    refused(None, "image_grid_thw must be on cpu like input_ids, got meta", image=torch.tensor(FRAME).to("meta"))
    refused("cuda", "backend 'cuda' does not serve cpu tensors", error=BackendError)


@pytest.mark.parametrize("backend", [needs("native")])
@settings(max_examples=200, deadline=None)
@given(batch=batches(), data=st.data())
def test_native_refuses_what_eager_refuses(batch, data, backend):
    """Any one id, mask entry or grid number changed: the same result or the same words."""
    sequences, merge_size, mask = batch
    ids, _, _ = expected_batch(sequences, mask)
    image, video = (grids(sequences, modality, merge_size) for modality in ("image", "video"))
    target = data.draw(st.sampled_from([t for t in (ids, mask, image, video) if t.numel()] or [ids]))
    if target.numel():
        at = data.draw(st.integers(0, target.numel() - 1))
        target.view(-1)[at] = data.draw(st.sampled_from([-1, 0, 1, 2, 3, IMAGE, VIDEO, 2**40]))
    outcomes = []
    for name in ("eager", backend):
        try:
            made = mrope_positions(ids, image, video, mask, **IDS, spatial_merge_size=merge_size, backend=name)
            outcomes.append([t.tolist() for t in made])
        except ValueError as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]


# ---------------------------------------------------------------------------------------------- torch.library


def _library_arguments(backend):
    ids = torch.tensor(ROW * 2)
    cu = None
    return (
        ids,
        torch.tensor(FRAME * 2),
        None,
        torch.ones(2, 6, dtype=torch.bool),
        cu,
        IMAGE,
        VIDEO,
        2,
        backend,
    )


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_opcheck(backend):
    torch.library.opcheck(torch.ops.qwen2vl.mrope_positions.default, _library_arguments(backend))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_opcheck_of_chunks(backend):
    *tensors, image, video, merge_size, name = _library_arguments(backend)
    state = torch.zeros(2, 7, dtype=torch.int64)
    arguments = (*tensors, state, image, video, merge_size, name)
    torch.library.opcheck(torch.ops.qwen2vl.mrope_positions_chunk.default, arguments)


def test_traces_to_one_op():
    def positions(ids, grid):
        made, delta = mrope_positions(ids, grid, None, **IDS)
        return made + 1, delta

    ids, grid = torch.tensor(ROW), torch.tensor(FRAME)
    compiled = torch.compile(positions, backend="eager", fullgraph=True)
    for got, want in zip(compiled(ids, grid), positions(ids, grid), strict=True):
        assert torch.equal(got, want)


def test_meta_and_fake_tensors():
    ids = torch.empty(2, 6, dtype=torch.int64, device="meta")
    positions, delta = mrope_positions(ids, None, None, **IDS)
    assert (positions.shape, delta.shape, positions.device.type) == ((3, 2, 6), (2,), "meta")
    assert mrope_positions_chunk(ids, None, None, **IDS)[2].shape == (2, 7)
    cu = torch.empty(4, dtype=torch.int32, device="meta")
    assert mrope_positions(ids[:1], None, None, cu_seqlens=cu, **IDS)[1].shape == (3,)
