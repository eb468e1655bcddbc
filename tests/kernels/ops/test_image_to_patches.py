"""image_to_patches against Pillow's resize, a NumPy transpose and transformers' PIL processor."""

import numpy as np
import PIL
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from qwen2vl_kernels import image_to_patches, images_to_patches, use_backend
from qwen2vl_kernels.core import native
from qwen2vl_kernels.ops.image_to_patches import _Frame, _options, _run_native, _value_table

BICUBIC = Image.Resampling.BICUBIC
KERNELS = native.cpu().row_kernels()  # instruction sets of this machine
PILLOW = int(PIL.__version__.split(".")[0])
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def pillow_resize(image: Image.Image, height: int, width: int) -> np.ndarray:
    """Pillow's resize in the order of Pillow 13, which any version follows when it gets one axis at a time."""
    down = image.height - height
    rows_first = down > 0 and down > 2 * (image.width - width)
    first = (image.width, height) if rows_first else (width, image.height)
    return np.asarray(image.resize(first, BICUBIC).resize((width, height), BICUBIC).convert("RGB"))


def transposed(pixels: np.ndarray, p: int = 14, m: int = 2) -> np.ndarray:
    h, w = pixels.shape[:2]
    blocks = pixels.reshape(h // p // m, m, p, w // p // m, m, p, 3)
    return blocks.transpose(0, 3, 1, 4, 6, 2, 5).reshape(-1, 3 * p * p)


def noise(seed: int, *shape: int) -> np.ndarray:
    """Half of the values at the ends of the range, where the cubic's overshoot has to be clipped."""
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 256, shape, np.uint8)
    return np.where(rng.random(shape) < 0.5, np.where(values < 128, 0, 255), values).astype(np.uint8)


def with_kernels(kernels: int, image: np.ndarray, height: int, width: int, threads: int = 1) -> np.ndarray:
    out = torch.full((height * width // 196, 588), 77, dtype=torch.uint8)
    options = _options("image_to_patches", 14, 2, None, None, None, threads)
    _run_native([_Frame(image, height, width, out.unflatten(1, (3, -1)))], options, kernels)
    return out.numpy()


sides = st.one_of(st.integers(1, 70), st.integers(1, 5000))
targets = st.integers(1, 12).map(lambda n: 28 * n)


@settings(max_examples=60)
@given(sides, sides, targets, targets, st.integers(0, 2**32), st.integers(1, 3))
@example(1, 1, 28, 28, 0, 1)
@example(5000, 1, 28, 28, 0, 2)
@example(1, 5000, 336, 28, 0, 2)
@example(3, 2, 56, 336, 0, 1)
@example(28, 336, 28, 336, 0, 1)
@example(28, 500, 28, 336, 0, 1)
@example(500, 336, 28, 336, 0, 1)
@example(300, 100, 84, 56, 0, 2)
@example(101, 64, 28, 28, 0, 1)  # the first height at which rows go first
@example(100, 64, 28, 28, 0, 1)
@pytest.mark.parametrize("kernels", range(len(KERNELS)), ids=KERNELS)
def test_resize_is_pillows(kernels, height, width, new_height, new_width, seed, threads):
    image = noise(seed, height, width, 3)
    got = with_kernels(kernels, image, new_height, new_width, threads)
    np.testing.assert_array_equal(got, transposed(pillow_resize(Image.fromarray(image), new_height, new_width)))


@pytest.mark.skipif(PILLOW < 13, reason="Pillow before 13 resizes columns first whatever the shape")
@settings(max_examples=60)
@given(sides, sides, targets, targets, st.integers(0, 2**32))
@example(101, 64, 28, 28, 0)
@example(100, 64, 28, 28, 0)
def test_resize_is_pillows_in_one_call(height, width, new_height, new_width, seed):
    image = noise(seed, height, width, 3)
    expected = Image.fromarray(image).resize((new_width, new_height), BICUBIC)
    got = image_to_patches(image, new_height, new_width, num_threads=2)
    np.testing.assert_array_equal(got, transposed(np.asarray(expected)))


@settings(max_examples=25)
@given(st.integers(1, 300), st.integers(1, 300), targets, targets, st.sampled_from([1, 3, 4]), st.integers(0, 99))
@example(100, 64, 28, 28, 4, 0)
@example(300, 64, 28, 28, 4, 0)
@example(300, 64, 28, 28, 1, 0)
def test_eager_formula_equals_native(height, width, new_height, new_width, channels, seed):
    image = torch.from_numpy(noise(seed, height, width, channels))
    native = image_to_patches(image, new_height, new_width)
    assert torch.equal(image_to_patches(image, new_height, new_width, backend="eager"), native)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("size", [(56, 84), (90, 61), (400, 61)])
def test_channels_are_pillows_conversions(channels, size):
    image = noise(3, *size, channels)
    pil = Image.fromarray(image[..., 0] if channels == 1 else image)
    if channels == 4:
        white = Image.new("RGBA", pil.size, (255, 255, 255, 255))
        pil = Image.alpha_composite(white, pil)
    expected = transposed(pillow_resize(pil.convert("RGB"), 56, 84))
    np.testing.assert_array_equal(image_to_patches(image, 56, 84), expected)


def test_every_opacity_over_white_is_pillows():
    values, alphas = np.meshgrid(np.arange(256), np.arange(256))
    image = np.stack([values, 255 - values, values // 2, alphas], -1).astype(np.uint8)[:252, :252]
    white = Image.new("RGBA", (252, 252), (255, 255, 255, 255))
    expected = np.asarray(Image.alpha_composite(white, Image.fromarray(image)).convert("RGB"))
    np.testing.assert_array_equal(image_to_patches(image, 252, 252), transposed(expected))


@pytest.mark.parametrize(("patch", "merge"), [(14, 2), (16, 2), (14, 1), (7, 3), (1, 1)])
@pytest.mark.parametrize("source", [(60, 130), (48, 96), (500, 30)])
def test_other_patch_and_merge_sizes(patch, merge, source):
    height, width = 2 * patch * merge, 3 * patch * merge
    image = noise(5, *source, 3)
    got = image_to_patches(image, height, width, patch_size=patch, merge_size=merge)
    expected = transposed(pillow_resize(Image.fromarray(image), height, width), patch, merge)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("backend", ["eager", "native"])
def test_defaults_of_dtype_and_device_change_nothing(backend):
    photo = noise(5, 60, 90, 3)
    values = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
    run = lambda: images_to_patches([photo], [(28, 56)], backend=backend, **values)  # noqa: E731
    want = run()
    default = torch.get_default_dtype()
    for dtype, device in ((torch.bfloat16, "cpu"), (torch.float64, "cpu"), (default, "meta")):
        _value_table.cache_clear()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                assert torch.equal(run(), want)
        finally:
            torch.set_default_dtype(default)


@pytest.mark.parametrize("views", ["rows apart", "upside down", "every second row", "tensor"])
def test_rows_are_read_where_they_lie(views):
    frame = noise(6, 120, 90, 3)
    wide = noise(7, 120, 200, 3)
    wide[:, 13:103] = frame
    image = {
        "rows apart": wide[:, 13:103],
        "upside down": frame[::-1],
        "every second row": np.repeat(frame, 2, 0)[::2],
        "tensor": torch.from_numpy(wide)[:, 13:103],
    }[views]
    expected = transposed(pillow_resize(Image.fromarray(np.ascontiguousarray(image)), 84, 112))
    np.testing.assert_array_equal(image_to_patches(image, 84, 112), expected)


def test_nothing_is_read_beyond_the_last_pixel():
    """The last row of an image ends where its memory does; neighbours of a view may hold anything."""
    frame = noise(8, 64, 50, 3)
    expected = image_to_patches(frame, 56, 56)
    for fill in (0, 255):
        wide = np.full((66, 60, 3), fill, np.uint8)
        wide[1:65, 5:55] = frame
        assert torch.equal(image_to_patches(wide[1:65, 5:55], 56, 56), expected)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_do_not_change_a_byte(threads):
    image = noise(9, 1100, 900, 3)
    one = image_to_patches(image, 1008, 1036, num_threads=1)
    assert torch.equal(image_to_patches(image, 1008, 1036, num_threads=threads), one)
    np.testing.assert_array_equal(one, transposed(pillow_resize(Image.fromarray(image), 1008, 1036)))


class TestNormalised:
    @pytest.mark.parametrize("size", [(56, 84), (130, 99), (77, 500)])
    def test_values_are_those_of_transformers(self, size):
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        image = noise(10, *size, 3)
        theirs = Qwen2VLImageProcessorPil()(Image.fromarray(image), return_tensors="pt")
        _, rows, columns = theirs["image_grid_thw"][0].tolist()
        ours = images_to_patches([image], [(14 * rows, 14 * columns)], mean=MEAN, std=STD)
        assert torch.equal(ours, theirs["pixel_values"])

    def test_bfloat16_rounds_the_float32_values_once(self):
        image = noise(11, 60, 60, 3)
        wide = image_to_patches(image, 56, 56, mean=MEAN, std=STD)
        assert wide.dtype == torch.float32
        assert torch.equal(image_to_patches(image, 56, 56, mean=MEAN, std=STD, dtype=torch.bfloat16), wide.bfloat16())

    def test_formula(self):
        image = noise(12, 56, 56, 3)
        exact = transposed(image).reshape(-1, 3, 196) / 255.0
        exact = (exact - np.array(MEAN)[:, None]) / np.array(STD)[:, None]
        got = image_to_patches(image, 56, 56, mean=MEAN, std=STD).numpy().reshape(-1, 3, 196)
        assert np.abs(got - exact).max() < 3e-7  # three roundings of numbers below 4

    def test_eager_equals_native(self):
        image = noise(13, 70, 40, 4)
        for dtype in (torch.float32, torch.bfloat16):
            made = [
                image_to_patches(image, 56, 56, mean=MEAN, std=STD, dtype=dtype, backend=b) for b in ("eager", None)
            ]
            assert torch.equal(*made)


class TestBatches:
    def test_images_and_clips_are_packed_in_order(self):
        still, clip = noise(20, 50, 70, 3), noise(21, 5, 40, 30, 4)
        frames = [noise(22, 30, 30, 1), noise(23, 90, 31, 3)]
        got = images_to_patches([still, clip, frames], [(56, 84), (28, 28), (56, 28)], num_threads=3)
        slices = lambda frame, h, w: image_to_patches(frame, h, w).view(-1, 3, 1, 196)  # noqa: E731
        parts = [torch.cat([slices(still, 56, 84)] * 2, 2)]
        parts += [torch.cat([slices(clip[a], 28, 28), slices(clip[b], 28, 28)], 2) for a, b in ((0, 1), (2, 3), (4, 4))]
        parts += [torch.cat([slices(frame, 56, 28) for frame in frames], 2)]
        assert torch.equal(got, torch.cat([part.flatten(1) for part in parts]))

    def test_one_slot_a_row_gives_each_frame_its_own(self):
        still, clip = noise(24, 50, 70, 3), noise(25, 3, 40, 30, 3)
        got = images_to_patches([still, clip], [(56, 84), (28, 28)], temporal_patch_size=1)
        expected = [image_to_patches(still, 56, 84), *(image_to_patches(frame, 28, 28) for frame in clip)]
        assert torch.equal(got, torch.cat(expected))

    @pytest.mark.parametrize("slots", [3, 4])
    def test_a_short_last_step_repeats_its_last_frame(self, slots):
        clip = noise(26, slots + 1, 30, 30, 3)
        got = images_to_patches([clip], [(28, 28)], temporal_patch_size=slots).view(2, 4, 3, slots, 196)
        last = image_to_patches(clip[-1], 28, 28).view(4, 3, 196)
        for slot in range(slots):
            assert torch.equal(got[1, :, :, slot], last)
            assert torch.equal(got[0, :, :, slot], image_to_patches(clip[slot], 28, 28).view(4, 3, 196))

    def test_eager_equals_native(self):
        items, sizes = [noise(27, 33, 44, 3), noise(28, 3, 50, 20, 3)], [(28, 56), (56, 28)]
        assert torch.equal(images_to_patches(items, sizes, backend="eager"), images_to_patches(items, sizes))
        with use_backend(image_to_patches="eager"):
            assert torch.equal(images_to_patches(items, sizes), images_to_patches(items, sizes, backend="native"))

    def test_nothing_in_nothing_out(self):
        assert images_to_patches([], []).shape == (0, 1176)


class TestOut:
    @pytest.mark.parametrize("backend", ["native", "eager"])
    def test_a_frame_goes_into_its_slot_and_nowhere_else(self, backend):
        frame = noise(30, 60, 60, 3)
        buffer = torch.full((3, 16, 3, 2, 196), 201, dtype=torch.uint8)
        slot = buffer[1, :, :, 1]
        made = image_to_patches(frame, 56, 56, out=slot, backend=backend)
        assert made is slot
        assert torch.equal(slot.reshape(16, 588), image_to_patches(frame, 56, 56))
        untouched = torch.ones_like(buffer, dtype=torch.bool)
        untouched[1, :, :, 1] = False
        assert (buffer[untouched] == 201).all()

    @pytest.mark.parametrize("backend", ["native", "eager"])
    @pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
    def test_rows_apart(self, backend, dtype):
        normal = {} if dtype == torch.uint8 else {"mean": MEAN, "std": STD, "dtype": dtype}
        items, sizes = [noise(31, 60, 60, 3), noise(32, 3, 33, 33, 3)], [(56, 56), (28, 28)]
        buffer = torch.full((16 + 8 + 2, 1200), 7).to(dtype)
        images_to_patches(items, sizes, out=buffer[1:-1, 5 : 5 + 1176], backend=backend, **normal)
        assert torch.equal(buffer[1:-1, 5 : 5 + 1176], images_to_patches(items, sizes, **normal))
        assert (buffer[0] == 7).all() and (buffer[-1] == 7).all()
        assert (buffer[:, :5] == 7).all() and (buffer[:, 5 + 1176 :] == 7).all()


RGB = np.zeros((30, 30, 3), np.uint8)
REFUSALS = [
    (dict(image=[1]), TypeError, "image must be a torch.Tensor or numpy.ndarray, got list"),
    (dict(image=RGB.astype(np.float32)), TypeError, "image must have dtype uint8, got float32"),
    (dict(image=torch.zeros(30, 30, 3)), TypeError, "image must have dtype uint8, got torch.float32"),
    (dict(image=RGB[0]), ValueError, r"image must have shape \(H, W, C\), C = 1, 3 or 4, no side 0, got \(30, 3\)"),
    (dict(image=np.zeros((3, 30, 30), np.uint8)), ValueError, r"C = 1, 3 or 4, no side 0, got \(3, 30, 30\)"),
    (dict(image=np.zeros((0, 30, 3), np.uint8)), ValueError, r"no side 0, got \(0, 30, 3\)"),
    (dict(image=RGB[:, ::-1]), ValueError, r"image must have contiguous pixels in each row, got strides \(90, -3, 1\)"),
    (dict(image=RGB[..., ::-1]), ValueError, "image must have contiguous pixels in each row"),
    (dict(image=RGB[:, ::2]), ValueError, "image must have contiguous pixels in each row"),
    (dict(height=30), ValueError, r"height must be a multiple of patch_size \* merge_size = 28, got 30"),
    (dict(width=0), ValueError, "width must be a positive integer, got 0"),
    (dict(width=28.0), ValueError, "width must be a positive integer, got 28.0"),
    (dict(merge_size=0), ValueError, "merge_size must be a positive integer, got 0"),
    (dict(num_threads=0), ValueError, "num_threads must be a positive integer, got 0"),
    (dict(mean=MEAN), ValueError, "mean and std go together"),
    (dict(mean=MEAN[:2], std=STD), ValueError, "mean must have 3 values, got 2"),
    (dict(mean=MEAN, std=(1, 0, 1)), ValueError, r"std must be positive, got \(1, 0, 1\)"),
    (dict(dtype=torch.float32), TypeError, "dtype must be uint8 without mean and std, got torch.float32"),
    (dict(mean=MEAN, std=STD, dtype=torch.uint8), TypeError, "dtype must be float32 or bfloat16 with mean and std"),
    (dict(out=np.zeros((4, 588))), TypeError, "out must be a torch.Tensor, got ndarray"),
    (dict(out=torch.zeros(4, 588)), TypeError, "out must have dtype torch.uint8, got torch.float32"),
    (dict(out=torch.zeros(4, 587, dtype=torch.uint8)), ValueError, r"out must have shape \(4, 588\), got \(4, 587\)"),
    (dict(out=torch.zeros(4, 3, 98, dtype=torch.uint8)), ValueError, r"out must have shape \(4, 3, 196\)"),
    (dict(out=torch.zeros(588, 4, dtype=torch.uint8).T), ValueError, "out must be contiguous in its last dimension"),
    (dict(backend="cuda"), ValueError, "backend 'cuda' does not serve cpu tensors"),
]


@pytest.mark.parametrize(("given", "error", "message"), REFUSALS)
def test_refusals_of_one_image(given, error, message):
    arguments = {"image": RGB, "height": 28, "width": 28, **given}
    with pytest.raises(error, match=f"image_to_patches: .*{message}"):
        image_to_patches(**arguments)


@pytest.mark.parametrize(
    ("items", "sizes", "given", "error", "message"),
    [
        ([RGB], [], {}, ValueError, "sizes must have one entry for each of 1 items, got 0"),
        ([RGB, []], [(28, 28)] * 2, {}, ValueError, r"items\[1\] must have at least one frame, got none"),
        ([[RGB, RGB[0]]], [(28, 28)], {}, ValueError, r"items\[0\]\[1\] must have shape"),
        ([RGB], [(28, 29)], {}, ValueError, r"sizes\[0\]\[1\] must be a multiple of"),
        ([RGB], [(28,)], {}, ValueError, r"sizes\[0\] must be \(height, width\), got \(28,\)"),
        ([RGB], [(28, 28)], {"temporal_patch_size": 0}, ValueError, "temporal_patch_size must be a positive integer"),
        ([RGB], [(28, 28)], {"out": torch.zeros(4, 588).byte()}, ValueError, r"out must have shape \(4, 1176\)"),
        ([torch.zeros(30, 30, 3, device="meta").byte(), RGB], [(28, 28)] * 2, {}, ValueError, r"items\[1\] must be on"),
    ],
)
def test_refusals_of_batches(items, sizes, given, error, message):
    with pytest.raises(error, match=f"images_to_patches: .*{message}"):
        images_to_patches(items, sizes, **given)


@pytest.mark.parametrize("change", [{1: 0}, {3: 2}, {5: 30}, {7: 0}, {10: 0}, {0: 0}, {2: 2**40}])
def test_the_extension_checks_what_it_is_given(change):
    out = np.zeros((4, 588), np.uint8)
    frame = [RGB.ctypes.data, 30, 30, 3, 90, 28, 28, out.ctypes.data, 588, 196, 1]
    for at, value in change.items():
        frame[at] = value
    with pytest.raises(ValueError):
        native.cpu().image_to_patches([tuple(frame)], (14, 2, 0, 0, 1, 0))


@pytest.mark.parametrize("options", [(0, 2, 0, 0, 1, 0), (14, 2, 3, 0, 1, 0), (14, 2, 1, 0, 1, 0), (14, 2, 0, 0, 0, 0),
                                     (14, 2, 0, 0, 1, 99)])  # fmt: skip
def test_the_extension_checks_its_options(options):
    with pytest.raises(ValueError):
        native.cpu().image_to_patches([], options)
