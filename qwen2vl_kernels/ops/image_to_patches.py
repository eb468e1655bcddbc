"""8-bit pixels to patches: bicubic resize and the cut into packed rows, in one pass over the image.

The resize is Pillow's antialiased bicubic in its fixed-point arithmetic, bit for bit. Along an axis of n input and m
output pixels, output i lies at c = (i + 1/2) n/m and sums the input with Keys' cubic kernel (a = -1/2) k stretched by
s = max(1, n/m):

    w_ij = round(2^22 k((j + 1/2 - c) / s) / sum_j k(...))      out_i = clip((sum_j w_ij p_j + 2^21) >> 22, 0, 255)

Each axis is one pass that ends in bytes; an axis whose size does not change has none. Columns are resized first, or
rows where an image loses more than twice as many rows as columns (the rule of Pillow 13; older versions always begin
with the columns, which changes single bytes by one).

A frame of ``height x width`` becomes gh x gw patches of ``patch_size`` pixels a side, rows of the result in merge-block
order (block row, block column, row in block, column in block), each row over (channel, time slot, y, x): the order of
the patch embedding's weight. Values are the bytes, or with ``mean`` and ``std`` (p / 255 - mean) / std in float32,
rounded once where the result is bfloat16.
Shapes: image ``(H, W, C)`` uint8, C = 1 (grey), 3 (RGB) or 4 (RGBA, laid over white); result ``(gh * gw, 3 * p * p)``.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from ..core import native
from ..core.backends import resolve
from ..core.checks import no_overlap
from ..core.library import register_opaque
from ..core.namespace import torch_ops

_DTYPES = (torch.uint8, torch.float32, torch.bfloat16)  # in the order of PatchType in csrc/cpu/image_to_patches.h
_WEIGHT_BITS = 22
MAX_SIDE = (2**31 - 1) // 4  # of an image, before and after: what csrc/bind_frames.h takes
_MAX_PATCH = 1024  # likewise
_MAX_THREADS = 1024  # bands of work are made for each thread that is asked for
_PIXELS_PER_THREAD = 1 << 21  # in and out: about 2 ms; for less, waiting for a thread on a busy machine costs more

#: What the pixels of an image may come as.
Pixels = torch.Tensor | np.ndarray


def bicubic_weights(n: int, m: int) -> torch.Tensor:
    """``(m, n)`` int64: w_ij of the formula above, zero outside of each output's window."""
    scale = n / m
    stretch = max(1.0, scale)
    center = (torch.arange(m, dtype=torch.float64, device="cpu") + 0.5) * scale
    first = (center - 2 * stretch + 0.5).clamp(min=0).long()
    last = (center + 2 * stretch + 0.5).clamp(max=n).long()
    j = torch.arange(n, device="cpu")
    x = ((j - center[:, None] + 0.5) * (1 / stretch)).abs()
    near = ((-0.5 + 2) * x - (-0.5 + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * -0.5
    inside = (j >= first[:, None]) & (j < last[:, None])
    k = torch.where(x < 1, near, far).where(inside & (x < 2), 0.0)
    k = k / k.cumsum(1)[:, -1:]  # cumsum adds from left to right, as Pillow does; sum would round otherwise
    return (k * (1 << _WEIGHT_BITS) + torch.where(k < 0, -0.5, 0.5)).long()  # truncates


def resize_ref(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """``(H, W, C)`` uint8 to ``(height, width, C)`` uint8 by the formula, with each axis as one matrix product."""

    def along(axis: int, size: int, pixels: torch.Tensor) -> torch.Tensor:
        if pixels.shape[axis] == size:
            return pixels
        weights = bicubic_weights(pixels.shape[axis], size).double().to(pixels.device)
        # Exact in float64: sums of 22-bit weights times bytes stay far below 2^53.
        sums = (weights @ pixels.double().movedim(axis, 0).flatten(1)).unflatten(1, pixels.movedim(axis, 0).shape[1:])
        sums = sums.movedim(0, axis)
        return ((sums + (1 << (_WEIGHT_BITS - 1))) / (1 << _WEIGHT_BITS)).floor().clamp(0, 255).byte()

    rows_lost, columns_lost = image.shape[0] - height, image.shape[1] - width
    if rows_lost > 0 and rows_lost > 2 * columns_lost:
        return along(1, width, along(0, height, image))
    return along(0, height, along(1, width, image))


def rgb_ref(image: torch.Tensor) -> torch.Tensor:
    """``(H, W, 1 | 3 | 4)`` uint8 to RGB; opacity is applied over white with Pillow's rounding."""
    if image.shape[2] == 4:
        values, alpha = image[..., :3].int(), image[..., 3:].int()
        mixed = (values * alpha + 255 * (255 - alpha)) * 128 + 0x4000
        return ((((mixed >> 8) + mixed) >> 8) >> 7).byte()
    return image.expand(*image.shape[:2], 3)


def image_to_patches_ref(
    image: torch.Tensor, height: int, width: int, patch_size: int = 14, merge_size: int = 2
) -> torch.Tensor:
    """``(gh * gw, 3, p * p)`` uint8."""
    p, m = patch_size, merge_size
    pixels = resize_ref(rgb_ref(image), height, width)
    blocks = pixels.reshape(height // p // m, m, p, width // p // m, m, p, 3)
    return blocks.permute(0, 3, 1, 4, 6, 2, 5).reshape(-1, 3, p * p)


@lru_cache(maxsize=16)
def _value_table(mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype) -> torch.Tensor:
    """``(3, 256)``: what each byte of each channel becomes; p / 255 is rounded to float32, as in transformers.

    Whatever the default dtype and device are: the table is kept, and the extensions read it on the host.
    """
    bytes_ = (torch.arange(256, dtype=torch.float64, device="cpu") * (1 / 255)).float()
    shift, scale = (torch.tensor(v, dtype=torch.float32, device="cpu").view(3, 1) for v in (mean, std))
    return ((bytes_ - shift) / scale).to(dtype).contiguous()


@dataclass(frozen=True)
class _Options:
    """What all frames of one call share, checked."""

    op: str
    patch: int
    merge: int
    dtype: torch.dtype
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    threads: int | None  # None: chosen by size

    def table(self) -> torch.Tensor | None:
        return None if self.mean is None or self.std is None else _value_table(self.mean, self.std, self.dtype)


@dataclass(frozen=True)
class _Frame:
    """One frame, the size wanted, and its place in the result: ``out`` is ``(gh * gw, 3, >= copies * p * p)``."""

    pixels: Pixels
    height: int
    width: int
    out: torch.Tensor
    copies: int = 1


def _run_eager(frames: Sequence[_Frame], options: _Options) -> None:
    area = options.patch**2
    for frame in frames:
        image = frame.pixels if isinstance(frame.pixels, torch.Tensor) else torch.from_numpy(frame.pixels.copy())
        patches = image_to_patches_ref(image, frame.height, frame.width, options.patch, options.merge)
        if (table := options.table()) is not None:
            values = table.to(patches.device)
            patches = torch.stack([values[c][patches[:, c].long()] for c in range(3)], 1)
        for copy in range(frame.copies):
            frame.out[:, :, copy * area : (copy + 1) * area] = patches


def _raw(frames: Sequence[_Frame]) -> list[tuple[int, ...]]:
    """Frames as both extensions take them: RawFrame in csrc/bind_frames.h."""
    raw = []
    for frame in frames:
        image = frame.pixels
        if isinstance(image, torch.Tensor):
            address, row_bytes = image.data_ptr(), image.stride(0)
        else:
            address, row_bytes = image.__array_interface__["data"][0], image.strides[0]
        place = (frame.out.data_ptr(), frame.out.stride(0), frame.out.stride(1), frame.copies)
        raw.append((address, *image.shape, row_bytes, frame.height, frame.width, *place))
    return raw


def _run_native(frames: Sequence[_Frame], options: _Options, kernels: int = 0) -> None:
    """``kernels`` counts the instruction sets of this machine, best first."""
    table = options.table()
    address = 0 if table is None else table.data_ptr()
    threads = options.threads
    if threads is None:
        pixels = sum(frame.pixels.shape[0] * frame.pixels.shape[1] + frame.height * frame.width for frame in frames)
        threads = max(1, min(torch.get_num_threads(), pixels // _PIXELS_PER_THREAD))
    kind = _DTYPES.index(options.dtype)
    native.cpu().image_to_patches(_raw(frames), (options.patch, options.merge, kind, address, threads, kernels))


def _run_cuda(frames: Sequence[_Frame], options: _Options) -> None:
    """Launches on the current stream; nothing is copied from the host, nothing waits."""
    if not frames:
        return
    extension, device, table = native.cuda(), frames[0].out.device, options.table()
    address = 0 if table is None else table.data_ptr()  # host memory, read before the call returns
    raw, plain = _raw(frames), (options.patch, options.merge, _DTYPES.index(options.dtype), address, 1, 0)
    with torch.cuda.device(device):
        size = extension.image_to_patches_workspace_bytes(raw, plain)
        workspace = torch.empty((size,), dtype=torch.uint8, device=device)
        stream = torch.cuda.current_stream(device).cuda_stream
        extension.image_to_patches(raw, plain, workspace.data_ptr(), device.index, stream)


_BACKENDS = {"eager": _run_eager, "native": _run_native, "cuda": _run_cuda}


def _check_op(image, height, width, patch_size, merge_size, mean, std, dtype, backend) -> None:
    options = _options("image_to_patches", patch_size, merge_size, mean, std, dtype, None)
    device = _check_pixels(options, "image", image)
    _check_size(options, ("height", height), ("width", width))
    resolve("image_to_patches", device.type, backend)


def _run_op(image, height, width, patch_size, merge_size, mean, std, dtype, backend) -> torch.Tensor:
    options = _options("image_to_patches", patch_size, merge_size, mean, std, dtype, None)
    out = _packed(options, height // patch_size * (width // patch_size), 1, image.device)
    _BACKENDS[backend]([_Frame(image, height, width, out.unflatten(1, (3, -1)))], options)
    return out


def _fake(image, height, width, patch_size, merge_size, mean, std, dtype, backend):
    options = _options("image_to_patches", patch_size, merge_size, mean, std, dtype, None)
    return _packed(options, height // patch_size * (width // patch_size), 1, image.device)


register_opaque(
    "image_to_patches(Tensor image, int height, int width, int patch_size, int merge_size, float[]? mean, "
    "float[]? std, ScalarType? dtype, str backend) -> Tensor",
    fake=_fake,
    check=_check_op,
    CPU=_run_op,
    CUDA=_run_op,
)


def image_to_patches(
    image: Pixels,
    height: int,
    width: int,
    *,
    patch_size: int = 14,
    merge_size: int = 2,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
    num_threads: int | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Resize one image or frame and cut it into patches, one time slot of them.

    Args:
        image: ``(H, W, C)`` uint8 tensor or array, C = 1, 3 or 4; pixels contiguous, any row stride.
        height, width: size wanted, multiples of ``patch_size * merge_size``; see :func:`smart_resize`.
        mean, std: three values each, in units of p / 255: normalise. Both or neither.
        dtype: of normalised values, float32 (default) or bfloat16; bytes are uint8.
        out: written and returned instead of a new tensor: ``(gh * gw, 3 * p * p)`` with contiguous rows, or
            ``(gh * gw, 3, p * p)`` with contiguous last dimension, so that a frame can go straight into its slot of
            a video's rows. Pinned memory is welcome.
        num_threads: at most so many threads, never more than 1024; default up to ``torch.get_num_threads()``, by size.
            The GIL is released.
        backend: ``None`` (choose), ``"eager"``, ``"native"`` (CPU) or ``"cuda"``.

    Pixels on a GPU are resized there, by ``"cuda"`` on the current stream: nothing waits for the device, so that
    ``image.pin_memory().to("cuda", non_blocking=True)`` uploads the bytes while the host goes on, and a CUDA graph can
    capture the call; ``mean`` and ``std`` are constants of that graph.

    Returns ``(gh * gw, 3 * p * p)``, or ``out``. Equal inputs give equal bytes on every machine and backend.
    Raises ``TypeError``/``ValueError`` naming the argument that does not fit.
    """
    options = _options("image_to_patches", patch_size, merge_size, mean, std, dtype, num_threads)
    device = _check_pixels(options, "image", image)
    height, width = _check_size(options, ("height", height), ("width", width))
    chosen = resolve("image_to_patches", device.type, backend)
    if isinstance(image, torch.Tensor) and out is None and _traced(image):
        return torch_ops.image_to_patches(image, height, width, patch_size, merge_size, mean, std, dtype, chosen)
    patches = height // options.patch * (width // options.patch)
    if out is None:
        out = _packed(options, patches, 1, device)
    area = options.patch**2
    _check_out(options, out, (patches, 3, area) if getattr(out, "ndim", 2) == 3 else (patches, 3 * area), device)
    _BACKENDS[chosen]([_Frame(image, height, width, out if out.ndim == 3 else out.unflatten(1, (3, area)))], options)
    return out


def images_to_patches(
    items: Sequence[Pixels | Sequence[Pixels]],
    sizes: Sequence[tuple[int, int]],
    *,
    temporal_patch_size: int = 2,
    patch_size: int = 14,
    merge_size: int = 2,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
    num_threads: int | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Resize any number of images and clips and pack their patches, in one call whose threads share all of the work.

    Args:
        items: images ``(H, W, C)``, and clips as ``(T, H, W, C)`` or as sequences of frames ``(H, W, C)``, each as
            for :func:`image_to_patches`.
        sizes: ``(height, width)`` wanted of each item.
        temporal_patch_size: frames that share a row. A clip whose length is no multiple repeats its last frame; an
            image stands in every slot. With 1, an image gives the one half that a still image needs (588 values).
        out: ``(T, 3 * temporal_patch_size * p * p)`` with contiguous rows, written and returned.
        Others: as for :func:`image_to_patches`.

    Returns ``(T, 3 * temporal_patch_size * p * p)`` with T the sum of t * gh * gw, items one after the other.
    """
    options = _options("images_to_patches", patch_size, merge_size, mean, std, dtype, num_threads)
    slots = _positive(options.op, "temporal_patch_size", temporal_patch_size)
    if len(items) != len(sizes):
        raise ValueError(f"{options.op}: sizes must have one entry for each of {len(items)} items, got {len(sizes)}")
    clips, grids, device = [], [], None
    for n, (item, size) in enumerate(zip(items, sizes, strict=True)):
        frames = [item] if isinstance(item, (torch.Tensor, np.ndarray)) and item.ndim == 3 else list(item)
        if not frames:
            raise ValueError(f"{options.op}: items[{n}] must have at least one frame, got none")
        for t, frame in enumerate(frames):
            name = f"items[{n}]" if len(frames) == 1 else f"items[{n}][{t}]"
            here = _check_pixels(options, name, frame)
            if device is not None and here != device:
                raise ValueError(f"{options.op}: {name} must be on {device} like those before it, got {here}")
            device = here
        if len(size) != 2:
            raise ValueError(f"{options.op}: sizes[{n}] must be (height, width), got {size!r}")
        height, width = _check_size(options, (f"sizes[{n}][0]", size[0]), (f"sizes[{n}][1]", size[1]))
        clips.append((frames, height, width))
        grids.append((-(-len(frames) // slots), height // options.patch, width // options.patch))
    device = device or (out.device if out is not None else torch.device("cpu"))
    total = sum(math.prod(grid) for grid in grids)
    if out is None:
        out = _packed(options, total, slots, device)
    area = options.patch**2
    _check_out(options, out, (total, 3 * slots * area), device)
    chosen = resolve("image_to_patches", device.type, backend)

    jobs, start = [], 0
    for (frames, height, width), (_, rows, columns) in zip(clips, grids, strict=True):
        for first in range(0, len(frames), slots):
            patches = out[start : start + rows * columns].unflatten(1, (3, slots * area))
            start += rows * columns
            step = frames[first : first + slots]
            for slot, frame in enumerate(step):
                copies = slots - slot if slot == len(step) - 1 else 1
                jobs.append(_Frame(frame, height, width, patches[:, :, slot * area :], copies))
    _BACKENDS[chosen](jobs, options)
    return out


def _traced(image: torch.Tensor) -> bool:
    return torch.compiler.is_compiling() or type(image) is not torch.Tensor or image.is_meta


def _positive(op: str, name: str, value: object, most: int | None = None) -> int:
    try:
        number = -1 if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = -1
    if number < 1:
        raise ValueError(f"{op}: {name} must be a positive integer, got {value!r}")
    if most is not None and number > most:
        raise ValueError(f"{op}: {name} must be at most {most}, got {number}")
    return number


def _options(op, patch_size, merge_size, mean, std, dtype, num_threads) -> _Options:
    if (mean is None) != (std is None):
        raise ValueError(f"{op}: mean and std go together, got mean {mean!r} and std {std!r}")
    for name, values in (("mean", mean), ("std", std)):
        if values is not None and len(values) != 3:
            raise ValueError(f"{op}: {name} must have 3 values, got {len(values)}")
    if std is not None and not all(s > 0 for s in std):
        raise ValueError(f"{op}: std must be positive, got {tuple(std)}")
    dtypes = _DTYPES[:1] if mean is None else _DTYPES[1:]
    if dtype is None:
        dtype = dtypes[0]
    if dtype not in dtypes:
        wanted = "uint8 without mean and std" if mean is None else "float32 or bfloat16 with mean and std"
        raise TypeError(f"{op}: dtype must be {wanted}, got {dtype}")
    return _Options(
        op,
        _positive(op, "patch_size", patch_size, _MAX_PATCH),
        _positive(op, "merge_size", merge_size, _MAX_PATCH),
        dtype,
        None if mean is None else tuple(float(v) for v in mean),
        None if std is None else tuple(float(v) for v in std),
        None if num_threads is None else min(_positive(op, "num_threads", num_threads), _MAX_THREADS),
    )


def _check_pixels(options: _Options, name: str, image: object) -> torch.device:
    if not isinstance(image, (torch.Tensor, np.ndarray)):
        raise TypeError(f"{options.op}: {name} must be a torch.Tensor or numpy.ndarray, got {type(image).__name__}")
    if image.dtype not in (torch.uint8, np.uint8):
        raise TypeError(f"{options.op}: {name} must have dtype uint8, got {image.dtype}")
    shape = tuple(image.shape)
    if len(shape) != 3 or shape[2] not in (1, 3, 4) or 0 in shape:
        raise ValueError(f"{options.op}: {name} must have shape (H, W, C), C = 1, 3 or 4, no side 0, got {shape}")
    if max(shape) > MAX_SIDE:
        raise ValueError(f"{options.op}: {name} must have sides of at most {MAX_SIDE}, got {shape}")
    strides = image.stride() if isinstance(image, torch.Tensor) else image.strides
    if (strides[2] != 1 and shape[2] > 1) or (strides[1] != shape[2] and shape[1] > 1):
        raise ValueError(f"{options.op}: {name} must have contiguous pixels in each row, got strides {tuple(strides)}")
    return image.device if isinstance(image, torch.Tensor) else torch.device("cpu")


def _check_size(options: _Options, *sides: tuple[str, object]) -> list[int]:
    block, checked = options.patch * options.merge, []
    for name, value in sides:
        side = _positive(options.op, name, value)
        if side > MAX_SIDE:
            raise ValueError(f"{options.op}: {name} must be at most {MAX_SIDE}, got {side}")
        if side % block:
            raise ValueError(
                f"{options.op}: {name} must be a multiple of patch_size * merge_size = {block}, got {side}"
            )
        checked.append(side)
    return checked


def _packed(options: _Options, patches: int, slots: int, device: torch.device) -> torch.Tensor:
    return torch.empty((patches, 3 * slots * options.patch**2), dtype=options.dtype, device=device)


def _check_out(options: _Options, out: object, shape: tuple[int, ...], device: torch.device) -> None:
    if not isinstance(out, torch.Tensor):
        raise TypeError(f"{options.op}: out must be a torch.Tensor, got {type(out).__name__}")
    if out.dtype != options.dtype:
        raise TypeError(f"{options.op}: out must have dtype {options.dtype}, got {out.dtype}")
    if tuple(out.shape) != shape:
        raise ValueError(f"{options.op}: out must have shape {shape}, got {tuple(out.shape)}")
    if out.device != device:
        raise ValueError(f"{options.op}: out must be on {device} like the pixels, got {out.device}")
    if out.stride(-1) != 1:
        raise ValueError(f"{options.op}: out must be contiguous in its last dimension, got strides {out.stride()}")
    no_overlap(options.op, {"out": out}, {})
