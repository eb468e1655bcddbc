"""The CUDA kernels of image_to_patches against the CPU's bytes: run on the CPU everywhere, on a GPU where there is one.

For the CPU they are compiled with a stand-in for threads and barriers (host/cuda_on_host.h); the program runs the
launches of csrc/cuda/image_to_patches_plan.h one after the other.
"""

from __future__ import annotations

import ctypes
import subprocess
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qwen2vl_kernels import image_to_patches, images_to_patches
from qwen2vl_kernels.core import native
from qwen2vl_kernels.ops.image_to_patches import _DTYPES, _Frame, _options, _raw, _run_native
from tests.kernels.on_host import SANITIZERS, build_on_host

from .mrope_layouts import needs

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
UNWRITTEN = 77


@pytest.fixture(scope="module")
def on_host(tmp_path_factory):
    return build_on_host("image_to_patches", tmp_path_factory.mktemp("host"))


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    return build_on_host("image_to_patches", tmp_path_factory.mktemp("sanitized"), *SANITIZERS)


def noise(seed: int, *shape: int) -> np.ndarray:
    """Half of the values at the ends of the range, where the cubic's overshoot has to be clipped."""
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 256, shape, np.uint8)
    return np.where(rng.random(shape) < 0.5, np.where(values < 128, 0, 255), values).astype(np.uint8)


def options_of(dtype=torch.uint8, patch: int = 14, merge: int = 2):
    normal = () if dtype == torch.uint8 else (MEAN, STD)
    return _options("image_to_patches", patch, merge, *(normal or (None, None)), dtype, None)


@dataclass
class Limits:
    """FrameLimits of the program, and the threads of its blocks."""

    frames: int = 64
    between: int = 24 << 20
    staged: int = 32 << 10
    threads: int = 32


def run_on_host(program, frames, options, buffer, limits=None) -> torch.Tensor:
    """``buffer`` as the kernels leave it: every ``out`` of the frames is a view of it."""
    limits = limits or Limits()
    data = b"" if (table := options.table()) is None else ctypes.string_at(table.data_ptr(), table.nbytes)
    data += ctypes.string_at(buffer.data_ptr(), buffer.nbytes)
    head = [options.patch, options.merge, _DTYPES.index(options.dtype), limits.frames, limits.between, limits.staged]
    data = np.array([*head, limits.threads, len(frames), buffer.nbytes], np.int64).tobytes() + data
    for address, height, width, channels, stride, new_height, new_width, out, *place in _raw(frames):
        low, high = min(0, (height - 1) * stride), max(0, (height - 1) * stride) + width * channels
        sizes = [height, width, channels, stride, new_height, new_width, out - buffer.data_ptr(), *place]
        data += np.array([*sizes, high - low, -low], np.int64).tobytes() + ctypes.string_at(address + low, high - low)
    ran = subprocess.run([program], input=data, capture_output=True)
    assert ran.returncode == 0, ran.stderr.decode()[-2000:]
    return torch.frombuffer(bytearray(ran.stdout), dtype=buffer.dtype).view(buffer.shape)


def check(program, image, height, width, *, dtype=torch.uint8, patch=14, merge=2, copies=1, shift=0, limits=None):
    """One frame into a buffer with poison around it, and between its copies and channels."""
    options = options_of(dtype, patch, merge)
    patches, area = height // patch * (width // patch), patch * patch
    buffer = torch.full((patches + 1, 3, copies * area + 5), UNWRITTEN).to(dtype)
    frame = _Frame(image, height, width, buffer[1:, :, shift:], copies)
    got = run_on_host(program, [frame], options, buffer, limits)
    _run_native([frame], options)
    assert torch.equal(got, buffer)


sides, targets = st.integers(1, 260), st.integers(1, 6).map(lambda n: 28 * n)


@st.composite
def cases(draw) -> dict:
    limits = Limits(staged=draw(st.sampled_from([0, 32 << 10])), threads=draw(st.sampled_from([32, 64, 128])))
    image = noise(draw(st.integers(0, 2**32)), draw(sides), draw(sides), draw(st.sampled_from([1, 3, 4])))
    return {
        **dict(image=image, height=draw(targets), width=draw(targets), dtype=draw(st.sampled_from(_DTYPES))),
        **dict(copies=draw(st.integers(1, 2)), shift=draw(st.integers(0, 5)), limits=limits),
    }


def case(source: tuple[int, int], height: int, width: int, channels: int = 3, **others) -> dict:
    return dict(image=noise(0, *source, channels), height=height, width=width, **others)


@settings(max_examples=50)
@given(cases())
@example(case((1, 1), 28, 28))
@example(case((28, 336), 28, 336, 4, copies=2))
@example(case((28, 260), 28, 336, shift=4, limits=Limits(threads=128)))
@example(case((260, 336), 28, 336, shift=1))
@example(case((100, 64), 28, 28))
@example(case((101, 64), 28, 28))  # the first height at which rows go first
@example(case((256, 60), 28, 168, dtype=torch.bfloat16, copies=2, shift=3))
def test_cuda_kernels_on_host(on_host, case):
    check(on_host, **case)


@settings(max_examples=40)
@given(cases())
def test_cuda_kernels_stay_in_bounds(sanitized, case):
    """No access outside of the pixels, the result, the workspace and shared memory: sanitizers end the program."""
    check(sanitized, **case)


@pytest.mark.parametrize("staged", [0, 1 << 10, 32 << 10])
@pytest.mark.parametrize("source", [(5000, 1), (1, 5000), (40, 3000), (1500, 40), (30, 30)])
@pytest.mark.parametrize("size", [(28, 56), (140, 28)])
def test_extreme_ratios(sanitized, source, size, staged):
    check(sanitized, noise(1, *source, 3), *size, limits=Limits(staged=staged))


@pytest.mark.parametrize(("patch", "merge"), [(16, 2), (14, 1), (7, 3), (11, 1), (1, 1), (2, 3), (57, 1), (150, 1)])
@pytest.mark.parametrize("source", [(60, 130), (700, 30), None])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_other_patch_and_merge_sizes(sanitized, patch, merge, source, dtype):
    """Patches wider than a tile, of odd area, and tiles that end in the middle of a patch's rows."""
    height, width = 2 * patch * merge, 12 * patch * merge
    image = noise(5, *(source or (height, width)), 3)
    check(sanitized, image, height, width, patch=patch, merge=merge, dtype=dtype)


@pytest.mark.parametrize("views", ["rows apart", "rows apart by words", "upside down", "every second row"])
@pytest.mark.parametrize("size", [(84, 112), (28, 112), (120, 112), (84, 92)])
def test_rows_are_read_where_they_lie(sanitized, views, size):
    frame = noise(6, 120, 92, 3)
    wide = noise(7, 120, 200, 3)
    wide[:, 12:104] = frame
    image = {
        "rows apart": noise(7, 120, 201, 3)[:, 12:104],
        "rows apart by words": wide[:, 12:104],
        "upside down": frame[::-1],
        "every second row": np.repeat(frame, 2, 0)[::2],
    }[views]
    height, width = size[0] // 4, size[1] // 4  # patches of 4, so that one axis may keep its size
    check(sanitized, image, 4 * height, 4 * width, patch=4, merge=1)


@pytest.mark.parametrize("limits", [Limits(), Limits(frames=2), Limits(between=1), Limits(between=30000, threads=64)])
@pytest.mark.parametrize("dtype", _DTYPES)
def test_frames_of_many_sizes_share_launches(sanitized, limits, dtype):
    """Two clips of one size, a clip that keeps its size and a still, each frame into its own slot."""
    clips = [noise(20, 5, 40, 90, 3), noise(21, 2, 40, 90, 3), noise(22, 3, 56, 28, 4), noise(23, 1, 130, 31, 1)]
    sizes = [(56, 84), (56, 84), (56, 28), (28, 28)]
    options, area = options_of(dtype), 196
    rows = [height * width // area for height, width in sizes]
    buffer = torch.full((sum(n * -(-len(clip) // 2) for n, clip in zip(rows, clips, strict=True)), 1176), UNWRITTEN)
    buffer, start, frames = buffer.to(dtype), 0, []
    for clip, (height, width), count in zip(clips, sizes, rows, strict=True):
        for t, image in enumerate(clip):
            out = buffer[start : start + count].unflatten(1, (3, -1))[:, :, t % 2 * area :]
            last = t == len(clip) - 1
            frames.append(_Frame(image, height, width, out, 2 if last and t % 2 == 0 else 1))
            start += count if t % 2 or last else 0
    got = run_on_host(sanitized, frames, options, buffer, limits)
    _run_native(frames, options)
    assert torch.equal(got, buffer)
    normal = {} if dtype == torch.uint8 else {"mean": MEAN, "std": STD, "dtype": dtype}
    assert torch.equal(got, images_to_patches(clips, sizes, **normal))


def test_frames_of_one_size_may_go_to_places_of_other_strides(sanitized):
    options, buffer = options_of(), torch.full((12, 3, 2, 500), UNWRITTEN, dtype=torch.uint8)
    outs = [buffer[:4, :, 0], buffer[4:8, :, 1], buffer[8:].view(4, 2, 3, 500)[:, 0]]
    frames = [_Frame(noise(n, 40, 30, 3), 28, 28, out) for n, out in enumerate(outs)]
    got = run_on_host(sanitized, frames, options, buffer)
    _run_native(frames, options)
    assert torch.equal(got, buffer)


# ------------------------------------------------------------------------------------- what the extension refuses


@pytest.mark.skipif(native._cuda is None, reason="the CUDA extension is not built")
@pytest.mark.parametrize("change", [{1: 0}, {3: 2}, {5: 30}, {7: 0}, {10: 0}, {0: 0}, {2: 2**40}])
def test_the_extension_checks_what_it_is_given(change):
    frame = [16, 30, 30, 3, 90, 28, 28, 16, 588, 196, 1]
    for at, value in change.items():
        frame[at] = value
    with pytest.raises(ValueError):
        native.cuda().image_to_patches_workspace_bytes([tuple(frame)], (14, 2, 0, 0, 1, 0))
    with pytest.raises(ValueError):
        native.cuda().image_to_patches([tuple(frame)], (14, 2, 0, 0, 1, 0), 16, 0, 0)


@pytest.mark.skipif(native._cuda is None, reason="the CUDA extension is not built")
def test_a_clip_needs_no_more_memory_than_a_launch_of_it():
    frame = (16, 1080, 1920, 3, 5760, 560, 980, 16, 1176, 392, 1)
    one, many = (
        native.cuda().image_to_patches_workspace_bytes([frame] * count, (14, 2, 0, 0, 1, 0)) for count in (1, 768)
    )
    assert one < 4 << 20 and many < 25 << 20


# ---------------------------------------------------------------------------------------------- on a GPU


def on_gpu(test):
    return pytest.mark.gpu(pytest.mark.parametrize("backend", [needs("cuda")])(test))


def normalised(dtype) -> dict:
    return {} if dtype == torch.uint8 else {"mean": MEAN, "std": STD, "dtype": dtype}


@on_gpu
@settings(max_examples=200)
@given(case=cases())
def test_cuda(case, backend):
    check_on_gpu(backend, **case)


@on_gpu
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("source", [(2160, 3840), (3000, 700), (5000, 1), (1, 5000), (1344, 900), (1008, 1500)])
@pytest.mark.parametrize("dtype", _DTYPES)
def test_cuda_on_large_frames(source, channels, dtype, backend):
    check_on_gpu(backend, noise(1, *source, channels), 1008, 1344, dtype=dtype)
    check_on_gpu(backend, noise(2, *source, channels), 28, 56, dtype=dtype)


def check_on_gpu(backend, image, height, width, dtype=torch.uint8, copies=1, shift=0, limits=None):
    wide = torch.full((height * width // 196, 3 * copies * 196 + shift), UNWRITTEN, device="cuda").to(dtype)
    given = {"temporal_patch_size": copies, "backend": backend, **normalised(dtype)}
    images_to_patches([torch.from_numpy(image).cuda()], [(height, width)], out=wide[:, shift:], **given)
    want = images_to_patches([image], [(height, width)], **{**given, "backend": "native"})
    assert torch.equal(wide[:, shift:].cpu(), want)
    assert (wide[:, :shift] == UNWRITTEN).all()


@on_gpu
@pytest.mark.parametrize("dtype", _DTYPES)
@pytest.mark.parametrize("slots", [1, 2, 3])
def test_cuda_batches(dtype, slots, backend):
    clip = noise(21, 77, 120, 90, 3)  # more frames than a launch takes
    items = [noise(20, 50, 70, 3), clip, [noise(22, 30, 30, 1), noise(23, 90, 31, 4)], clip[:5, 7:, :61]]
    sizes = [(56, 84), (84, 56), (56, 28), (28, 28)]
    there = [torch.from_numpy(item).cuda() if isinstance(item, np.ndarray) else
             [torch.from_numpy(frame).cuda() for frame in item] for item in items]  # fmt: skip
    given = {"temporal_patch_size": slots, **normalised(dtype)}
    want = images_to_patches(items, sizes, **given)
    wide = torch.full((len(want), want.shape[1] + 7), UNWRITTEN, device="cuda").to(dtype)
    images_to_patches(there, sizes, out=wide[:, 3:-4], backend=backend, **given)
    assert torch.equal(wide[:, 3:-4].cpu(), want)
    assert (wide[:, :3] == UNWRITTEN).all() and (wide[:, -4:] == UNWRITTEN).all()


@on_gpu
def test_cuda_refuses_other_devices_and_serves_the_registered_op(backend):
    image = noise(1, 30, 40, 3)
    there = torch.from_numpy(image).cuda()
    with pytest.raises(ValueError, match="out must be on cuda:0 like the pixels, got cpu"):
        image_to_patches(there, 28, 28, out=torch.empty(4, 588, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"items\[1\] must be on cuda:0 like those before it, got cpu"):
        images_to_patches([there, image], [(28, 28)] * 2)
    want = image_to_patches(image, 28, 56)
    assert torch.equal(torch.ops.qwen2vl.image_to_patches(there, 28, 56, 14, 2, None, None, None, backend).cpu(), want)
    compiled = torch.compile(lambda x: image_to_patches(x, 28, 56), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(there).cpu(), want)


@on_gpu
def test_cuda_follows_the_current_stream(backend):
    """Uploaded, resized and used on a side stream with no wait on the host, while the default stream is busy."""
    image = noise(2, 1000, 900, 3)
    pinned = torch.from_numpy(image).pin_memory()
    stream = torch.cuda.Stream()
    image_to_patches(pinned.cuda(), 504, 448, backend=backend)  # loads the kernels, which may take a while
    torch.cuda.synchronize()
    torch.cuda._sleep(400_000_000)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        made = image_to_patches(pinned.to("cuda", non_blocking=True), 504, 448, backend=backend)
        assert not stream.query(), "the call waited"
        got = made.to("cpu", non_blocking=False)
    assert torch.equal(got, image_to_patches(image, 504, 448))


@on_gpu
@pytest.mark.parametrize("dtype", _DTYPES)
def test_cuda_graph_replay(dtype, backend):
    """Captured once, replayed on other pixels; its launches need nothing that has changed since."""
    images = torch.from_numpy(noise(3, 3, 130, 170, 3))
    place, tall = torch.empty_like(images, device="cuda"), torch.zeros(300, 64, 3, dtype=torch.uint8, device="cuda")
    given = normalised(dtype)

    def run():
        return images_to_patches([place, tall], [(84, 112), (28, 28)], backend=backend, **given)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = run()
    for pixels in (images, images.flip(1)):
        place.copy_(pixels)
        tall.copy_(pixels[0, :1, :64].expand(300, 64, 3))
        made.fill_(UNWRITTEN)
        graph.replay()
        want = images_to_patches([pixels, tall.cpu()], [(84, 112), (28, 28)], **given)
        assert torch.equal(made.cpu(), want)


@on_gpu
def test_cuda_beyond_two_to_the_31_bytes(backend):
    """Pixels, bytes in between and patches each pass 2^31 bytes."""
    side = 28 * 960
    image = torch.randint(0, 256, (side + 1, side - 1, 3), dtype=torch.uint8, device="cuda")
    got = image_to_patches(image, side, side, backend=backend)
    assert got.numel() > 2**31
    assert torch.equal(got.cpu(), image_to_patches(image.cpu(), side, side))
