"""The vision tower as a graph: the plan made on the device is the host's, and serves every pack with the same bits."""

import gc
import weakref
from collections import Counter
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.random_checkpoint import small_config
from qwen2vl import GenerationConfig, Qwen2VL, Qwen2VLConfig, Qwen2VLError, decoding, generate, graphs, tower_graph
from qwen2vl.cache import KVCache
from qwen2vl.layers import length_bound
from qwen2vl.tower_graph import Shape, device_pack, encode_padded
from qwen2vl.vision import Pack, frame_bounds
from qwen2vl_kernels import plan_tiles, use_backend, vision_positions
from qwen2vl_kernels.core import launching
from qwen2vl_kernels.core.backends import unavailable
from qwen2vl_kernels.core.tile_plan import make_tiles
from qwen2vl_kernels.ops.vision_positions import vision_positions_scan
from tests.conftest import assert_two_times, relative_error
from tests.kernels.poison import poisoned  # noqa: F401

from .graph_stand_in import OnDevice, capture_into

interpreted = pytest.mark.skipif(
    unavailable("triton", "cpu") is not None, reason=f"triton: {unavailable('triton', 'cpu')}"
)
packs = st.lists(
    st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5)).map(lambda g: (g[0], 2 * g[1], 2 * g[2])),
    min_size=1,
    max_size=5,
)


@pytest.fixture(scope="module")
def tower():
    return Qwen2VL.from_config(small_config(), device="cpu", dtype=torch.float32, std=0.1).visual


def _rows(grids, seed=0, values=1176):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (sum(t * h * w for t, h, w in grids), values), dtype=torch.uint8, generator=generator)


def _padded(grids, shape):
    return torch.nn.functional.pad(torch.tensor(grids), (0, 0, 0, shape.frames - len(grids)))


def _shape(grids, room=0):
    """Little more than a pack needs."""
    frames = sum(t for t, _, _ in grids)
    patches = sum(t * h * w for t, h, w in grids) + room
    return Shape(patches, frames + room // 4, max(h * w for _, h, w in grids))


# ---- the plan ----


@settings(max_examples=40)
@given(packs, st.integers(0, 12).map(lambda n: 4 * n))
def test_the_plan_is_the_hosts(tower, grids, room):
    """Bounds, positions, tables, and tiles in their order, that of equal lengths included; then nothing."""
    shape = _shape(grids, room)
    patches = shape.patches - room
    with use_backend(vision_positions="scan"):
        pack = device_pack(tower, _padded(grids, shape), shape)
    lengths = [h * w for t, h, w in grids for _ in range(t)]
    bounds = torch.tensor([0, *lengths, *[0] * (room // 4)]).cumsum(0, dtype=torch.int32)
    assert pack.cu_seqlens.dtype == torch.int32 and torch.equal(pack.cu_seqlens, bounds)
    positions = vision_positions(torch.tensor(grids))
    for got, table in zip(pack.rope, ("cos", "sin"), strict=True):
        angles = (positions.unsqueeze(-1) * tower.inv_freq(positions.device)).flatten(1)
        assert torch.equal(got[:patches], getattr(angles, table)())
        assert (got[patches:] == (table == "cos")).all(), "position (0, 0)"
    host = plan_tiles(torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32), patches)
    for rows in (4, 32, 128):
        want, got = host.tiles(rows), make_tiles(pack.cu_seqlens, rows, shape.patches, exact=False)
        assert torch.equal(got[: len(want)], want) and not got[len(want) :].any()


def test_grids_of_zeros_hold_no_frame():
    """Wherever they stand, as for positions."""
    grids = torch.tensor([[0, 0, 0], [2, 2, 4], [0, 0, 0], [1, 2, 2]])
    assert frame_bounds(grids).tolist() == [0, 8, 16, 20, 20]
    assert vision_positions(grids, num_patches=24, backend="scan")[20:].tolist() == [[0, 0]] * 4


@pytest.mark.parametrize(
    ("grids", "shape"),
    [
        ([(1, 2, 2)], (256, 16, 256)),
        ([(1, 16, 16)], (256, 16, 256)),
        ([(1, 16, 18)], (384, 16, 512)),
        ([(1, 72, 72)], (6144, 16, 8192)),
        ([(16, 16, 16), (1, 8, 8)], (6144, 64, 256)),
        ([(65, 2, 2)], (384, 96, 256)),  # as many frames as so many patches can make
    ],
)
def test_shapes(grids, shape):
    assert Shape.of(grids, 2) == shape


def test_a_kernel_is_chosen_as_for_the_eager_tower():
    """What a table tells lengths apart by, and whether angles are turned while loading, change at powers of two."""
    for side in range(2, 90, 2):
        longest = Shape.of([(1, side, side)], 2).longest
        assert side * side <= longest < max(2 * side * side, 257) and longest & (longest - 1) == 0


# ---- what it launches ----


def test_a_graph_of_the_2b_stays_on_the_device(monkeypatch):
    """280 operators, and 30 for the tiles of one height, whatever the pack: nothing is read or made by the host. A GPU
    without our extension makes positions by 40 in the place of one."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(launching, "_target", lambda index: launching.Target("cuda", 90))
    config = Qwen2VLConfig.preset("2b")
    config = replace(config, text=replace(config.text, num_hidden_layers=1))
    model, shape = Qwen2VL.from_config(config, device="meta"), Shape(6144, 16, 8192)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode():
        model.init_weights(torch.device("cuda"))
        x = torch.zeros(6144, 1280, dtype=torch.bfloat16, device="cuda")
        grid_thw = torch.zeros(16, 3, dtype=torch.int64, device="cuda")
        with use_backend(varlen_attention="triton"), OnDevice() as whole:
            tokens = encode_padded(model.visual, x, grid_thw, shape)
        pack = device_pack(model.visual, grid_thw, shape)
        with OnDevice() as plan:
            tiles = pack.tiles.tiles(64)
        with OnDevice() as scan:
            vision_positions_scan(grid_thw, 2, 6144)
    assert tokens.shape == (1536, 1536) and tiles.shape == (6144 // 64 + 16, 3)
    layers = model.config.vision.depth
    blocks = {"linear": 4 * layers, "norm_forward": 2 * layers + 1}
    blocks |= {"varlen_attention": layers, "quick_gelu_forward_": layers}
    merger_and_tables = {"gemm_forward": 2, "add": 1, "rope_tables": 1, "vision_positions": 1}
    assert Counter(blocks | merger_and_tables) <= whole.launched
    assert (whole.launched.total(), plan.launched.total(), scan.launched.total()) == (280, 30, 40)


# ---- the same bits ----


def _by_host(tower, x, grids):
    """The eager tower on so many rows, those behind the last item idle: the products of a library may sum in another
    order for another number of rows."""
    lengths = [h * w for t, h, w in grids for _ in range(t)]
    angles = (vision_positions(torch.tensor(grids)).unsqueeze(-1) * tower.inv_freq(x.device)).flatten(1)
    idle = (0, 0, 0, x.shape[0] - sum(lengths))
    rope = torch.nn.functional.pad(angles.cos(), idle), torch.nn.functional.pad(angles.sin(), idle)
    bounds = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    return tower.merger(tower.run(x, Pack(rope, bounds, length_bound(lengths), plan_tiles(bounds, x.shape[0]))))


@pytest.mark.parametrize("backend", ["eager", "sdpa", "blocked", pytest.param("triton", marks=interpreted)])
@pytest.mark.usefixtures("poisoned")
def test_what_is_captured_is_the_eager_tower(tower, backend):
    """Bit for bit, and behind the last item there may be anything."""
    grids = [(2, 2, 4), (1, 6, 2), (1, 2, 2)]
    cases = (0, 0.0), (24, 0.0), (24, torch.nan), (100, torch.inf)
    if backend == "triton":
        tower, cases = deepcopy(tower), cases[2:3]
        tower.blocks = tower.blocks[:1]
    with torch.inference_mode(), use_backend(varlen_attention=backend):
        x = tower.embed([_rows(grids)])
        for room, anything in cases:
            shape = _shape(grids, room)
            want = _by_host(tower, torch.cat((x, x.new_zeros((room, x.shape[1])))), grids)
            padded = torch.cat((x, x.new_full((room, x.shape[1]), anything)))
            with use_backend(vision_positions="scan"):
                got = encode_padded(tower, padded, _padded(grids, shape), shape)
            assert torch.equal(got[: len(x) // 4], want[: len(x) // 4]), (room, anything)
        assert relative_error(want[: len(x) // 4], tower.encode_embedded(x, grids)) < 1e-6


# ---- captured and replayed ----


@pytest.fixture
def ahead(monkeypatch):
    """The CPU as a device that the host does not wait for; a list with what was captured, by :class:`Recorder`."""
    captured = []
    monkeypatch.setattr(tower_graph, "_of_models", weakref.WeakKeyDictionary())
    monkeypatch.setattr(tower_graph, "capture", capture_into(captured))
    monkeypatch.setattr(graphs, "new_pool", object)
    monkeypatch.setattr(KVCache, "asynchronous", staticmethod(lambda device: True))
    for name, least in (("LEAST_PATCHES", 16), ("LEAST_FRAMES", 4)):
        monkeypatch.setattr(tower_graph, name, least)
    with use_backend(vision_positions="scan"), torch.no_grad():
        yield captured


@pytest.fixture
def rerun(ahead, monkeypatch):
    """The same where attention reads the host and a replay is another run: fast, for what is not about the graph."""

    def capture(run, device, pool):
        made = run()
        ahead.append(lambda: made.copy_(run()))
        return ahead[-1], made

    monkeypatch.setattr(tower_graph, "capture", capture)
    monkeypatch.setattr(tower_graph, "reads_host", lambda backend: False)
    return ahead


@pytest.fixture(scope="module")
def loaded():
    return Qwen2VL.from_config(small_config(tie_word_embeddings=False), device="cpu", dtype=torch.float32, std=0.1)


@pytest.fixture
def model(loaded):
    return deepcopy(loaded)


def _encode(model, grids, rows=None, graphs=None):
    return model.encode_media(_rows(grids) if rows is None else rows, torch.tensor(grids), graphs=graphs)[0]


def _assert_same(model, grids, rows=None):
    got, want = (_encode(model, grids, rows, asked) for asked in (True, False))
    assert got.shape == want.shape and relative_error(got, want) < 1e-6
    return got


@interpreted
@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_graph_serves_every_mix(model, ahead, monkeypatch):
    """One capture, and replays whose calls are the first's: other grids, fewer frames, after a picture of NaN."""
    monkeypatch.setattr(tower_graph, "LEAST_PATCHES", 32)
    model.visual.blocks = model.visual.blocks[:1]
    for grids in ([(1, 4, 6)], [(2, 2, 4), (1, 2, 2)], [(1, 2, 2)]):
        with use_backend(varlen_attention="triton"):
            got = _encode(model, grids)
            if sum(one.replays for one in ahead) == 1:
                assert _encode(model, grids, torch.full((24, 1176), torch.nan)).isnan().all()
        assert relative_error(got, _encode(model, grids, graphs=False)) < 1e-6
    (captured,) = tower_graph._of_models[model].captured
    assert [one.replays for one in ahead] == [4] and captured.x[:4].any() and not captured.x[4:].any()


def test_a_shape_is_captured_once(model, rerun):
    for grids in ([(1, 4, 4)], [(1, 6, 4)], [(2, 2, 2), (1, 4, 4)], [(1, 4, 4)], [(1, 4, 6)], [(3, 2, 2), (2, 2, 2)]):
        _assert_same(model, grids)
    assert len(rerun) == len({(16, 4, 16), (24, 4, 32), (24, 4, 16), (24, 6, 16)}) == 4


def test_all_kinds_of_rows_are_one_graph(model, rerun):
    """Of still images and of frames, bytes and floats, images beside a video."""
    grids = [(1, 4, 4)]
    pixels, still = _rows(grids), _rows(grids, values=588)
    kept = [_assert_same(model, grids, rows) for rows in (pixels, still, pixels.float() / 255)]
    assert relative_error(kept[0], kept[1]) > 1e-3, "and none has written over another's"
    assert torch.equal(kept[0], _encode(model, grids, pixels))
    media = (still, torch.tensor(grids), _rows([(1, 2, 4)], 2), torch.tensor([[1, 2, 4]]))
    for got, want in zip(model.encode_media(*media), model.encode_media(*media, graphs=False), strict=True):
        assert relative_error(got, want) < 1e-6
    assert len(rerun) == 2


def test_groups_are_replays(model, rerun, monkeypatch):
    model.max_vision_patches = 16
    _assert_same(model, [(3, 2, 4), (1, 4, 4), (1, 6, 6)])
    assert len(rerun) == 2, "two of 16 patches, and 36 at once"
    monkeypatch.setattr(tower_graph, "MOST_PATCHES", 32)
    _assert_same(model, [(1, 8, 8)])
    assert len(rerun) == 2, "more are encoded one launch after the other"


def test_weights_and_settings(model, rerun, monkeypatch):
    """A replay reads weights where they were, and what was captured under other settings is not replayed."""
    grids = [(1, 4, 4)]
    before = _assert_same(model, grids)
    for parameter in model.visual.parameters():
        parameter.mul_(1.25)
    assert relative_error(_assert_same(model, grids), before) > 1e-2 and len(rerun) == 1
    with use_backend("eager"), use_backend(vision_positions="scan"):
        _assert_same(model, grids)
    assert len(rerun) == 2
    torch.use_deterministic_algorithms(True)
    try:
        _assert_same(model, grids)
    finally:
        torch.use_deterministic_algorithms(False)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
        _assert_same(model, grids)
    assert len(rerun) == 4
    for parameter in model.visual.parameters():
        parameter.data = parameter.data.clone().neg()
    _assert_same(model, grids)
    assert len(rerun) == 5 and len(tower_graph._of_models[model].captured) == 1


def test_what_is_kept_is_bounded_and_ends_with_the_model(loaded, rerun, monkeypatch):
    model = deepcopy(loaded)
    for grids in ([(1, 4, 4)], [(1, 8, 8)], [(1, 4, 4)]):
        _encode(model, grids)
    kept = tower_graph._of_models[model]
    assert [one.key.shape.patches for one in kept.captured] == [64, 16] and len(rerun) == 2
    monkeypatch.setattr(tower_graph, "KEPT_BYTES", sum(one.bytes for one in kept.captured))
    _encode(model, [(1, 6, 4)])
    assert [one.key.shape.patches for one in kept.captured] == [16, 24]
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None and not tower_graph._of_models


@pytest.mark.parametrize("asked", [None, True, False])
def test_generate_takes_it(model, rerun, monkeypatch, asked):
    """By the argument that steps are captured by."""
    monkeypatch.setattr(decoding, "_of_models", weakref.WeakKeyDictionary())
    monkeypatch.setattr(decoding, "capture", capture_into([]))
    config = model.config
    image = [config.vision_start_token_id, *[config.image_token_id] * 4, config.vision_end_token_id]
    grids = torch.tensor([[1, 4, 4]])
    inputs = {"input_ids": torch.tensor([[5, *image, 7]]), "pixel_values": _rows(grids), "image_grid_thw": grids}
    generation = GenerationConfig(max_new_tokens=3, eos_token_ids=(10**6,))
    with monkeypatch.context() as patch:
        patch.setattr(KVCache, "asynchronous", staticmethod(lambda device: False))
        want = generate(model, inputs, config=generation).sequences
    assert generate(model, inputs, config=generation, graphs=asked).sequences == want
    assert len(rerun) == (asked is not False)


# ---- where the eager tower stays ----


def test_what_cannot_be_captured(model, rerun, monkeypatch):
    grids = [(1, 4, 4)]
    hooked = deepcopy(model)
    hooked.visual.blocks[1].mlp.register_forward_hook(lambda *a: None)
    with pytest.raises(Qwen2VLError, match="graphs: the model has hooks"):
        _encode(hooked, grids, graphs=True)
    assert torch.equal(_encode(hooked, grids), _encode(model, grids, graphs=False))
    with torch.enable_grad():
        with pytest.raises(Qwen2VLError, match="graphs: gradients of the tower are wanted"):
            _encode(model, grids, graphs=True)
        _encode(model, grids).sum().backward()
        assert all(one.grad is not None for one in model.visual.parameters())
        model.requires_grad_(False)
        rows = (_rows(grids) / 255.0).requires_grad_()
        _encode(model, grids, rows).sum().backward()
        assert rows.grad is not None and rows.grad.any(), "gradients of pixels are no replay's"
    monkeypatch.setattr(tower_graph, "reads_host", lambda backend: backend == "sdpa")
    with pytest.raises(Qwen2VLError, match="graphs: attention 'sdpa' reads the bounds of frames on the host"):
        _encode(model, grids, graphs=True)
    assert torch.equal(_encode(model, grids), _encode(model, grids, graphs=False))
    monkeypatch.setattr(KVCache, "asynchronous", staticmethod(lambda device: False))
    with pytest.raises(Qwen2VLError, match="graphs: wants a model on a CUDA device, and QWEN2VL_GRAPHS=1 in the envir"):
        _encode(model, grids, graphs=True)
    assert torch.equal(_encode(model, grids), _encode(model, grids, graphs=False)) and not rerun


# ---- on a GPU ----


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device")
def test_a_captured_tower_on_a_gpu(loaded, monkeypatch):
    monkeypatch.setenv("QWEN2VL_GRAPHS", "1")
    model = deepcopy(loaded).to("cuda", torch.bfloat16)
    exact = deepcopy(loaded)
    with torch.no_grad():
        for grids in ([(1, 16, 16)], [(2, 8, 8), (1, 4, 4)], [(1, 2, 2)], [(1, 16, 18)]):
            got, eager = (_encode(model, grids, graphs=asked) for asked in (True, False))
            assert_two_times(got.cpu(), eager.cpu(), _encode(exact, grids, graphs=False), 1e-3)
    assert len(tower_graph._of_models[model].captured) == 2
