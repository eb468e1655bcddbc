"""Ops called by their names in torch.ops, where no public function has checked: what would leave memory is refused."""

import pytest
import torch

import qwen2vl_kernels  # noqa: F401  registers the ops
from qwen2vl_kernels import image_to_patches, images_to_patches
from qwen2vl_kernels.core import native
from qwen2vl_kernels.core.library import _LIBRARY
from qwen2vl_kernels.core.namespace import torch_ops

needs_native = pytest.mark.skipif(native.cpu_reason() is not None, reason=str(native.cpu_reason()))


def floats(*shape: int) -> torch.Tensor:
    return torch.rand(shape)


def ints(*values, dtype=torch.int64) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


BOUNDS = ints(0, 3, 4, dtype=torch.int32)
GRID = ints([1, 2, 2])
ANGLES = (ints([0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3]), floats(4), None, None, [2, 1, 1], False, False)
PACK = (floats(4, 2, 8), floats(4, 2, 8), floats(4, 2, 8), BOUNDS, None, None, None, 3, 3, False, 0.3, False)
BACK = (
    floats(4, 2, 8),
    None,
    *PACK[:3],
    floats(4, 2, 8),
    floats(2, 4),
    None,
    None,
    BOUNDS,
    None,
    3,
    3,
    False,
    0.3,
    False,
)
QUANTISED = (floats(3, 64), torch.zeros(5, 32, dtype=torch.uint8), floats(5, 2), None, floats(5), 1, 32)
QUANTISED_BADLY = {1: torch.zeros(5, 31, dtype=torch.uint8), 2: floats(4, 2), 4: floats(4), 5: 2, 6: 64}
GROUPED = (torch.zeros(2, 5, 32, dtype=torch.uint8), floats(2, 5, 2), BOUNDS, None, ints(range(64), range(64)))
GROUPED_BADLY = {
    1: torch.zeros(2, 5, 31, dtype=torch.uint8),
    2: floats(2, 4, 2),
    3: ints(0, 3, 9, dtype=torch.int32),
    4: torch.zeros(2, 5, 2, dtype=torch.uint8),
    5: ints(range(63), range(63)),
}
LOSS = (floats(4, 8), floats(6, 8), ints(0, 1, 2, 3), floats(6), -100)
APPEND = (floats(4, 2, 8), floats(4, 2, 8), floats(1, 6, 2, 8), floats(1, 6, 2, 8), ints(0, 1, 2, 3), None, None, None)
IMAGE = (torch.zeros(30, 31, 3, dtype=torch.uint8), 28, 28, 14, 2, None, None, None)
POSITIONS = (ints([1, 9, 1]), GRID, None, None, None)
TABLE = ints([1], [0], dtype=torch.int32)
KV = (floats(2, 2, 8), floats(2, 6, 2, 8), floats(2, 6, 2, 8))
#: Arguments that each op takes, and others by their places that it must refuse.
CALLS = {
    "image_to_patches": (
        (*IMAGE, "eager"),
        {0: torch.zeros(30, 1, 3, dtype=torch.uint8).expand(30, 31, 3), 1: 27, 8: "cuda"},
    ),
    "mrope_positions": ((*POSITIONS, 9, 8, 2, "eager"), {1: ints([1, 2]), 3: ints([1]), 7: 0, 8: "cuda"}),
    "mrope_positions_chunk": (
        (*POSITIONS, torch.zeros(1, 7, dtype=torch.int64), 9, 8, 2, "eager"),
        {5: ints([0, 0]), 8: 0},
    ),
    "vision_positions": ((GRID, 2, None, "eager"), {0: ints(1, 2, 2), 1: 0, 2: -1, 3: "cuda"}),
    "quick_gelu_forward": ((floats(3, 8), floats(8)), {1: floats(7)}),
    "quick_gelu_forward_": ((floats(3, 8), floats(8)), {1: floats(1)}),
    "quick_gelu_backward": ((floats(3, 8), floats(3, 8), floats(8)), {0: floats(2, 8), 2: floats(7)}),
    "swiglu_forward": ((floats(3, 8), floats(3, 8)), {1: floats(2, 8)}),
    "swiglu_forward_": ((floats(3, 8), floats(3, 8)), {1: floats(3, 7)}),
    "swiglu_backward": ((floats(3, 4), floats(3, 8), None), {0: floats(3, 8), 1: floats(3, 7)}),
    "norm_forward": (
        (floats(3, 8), None, floats(8), floats(8), 1e-6, True, ints(2, 0, 1)),
        {1: floats(2, 8), 2: floats(7), 3: floats(9), 6: ints(0, 1, 3)},
    ),
    "norm_backward": (
        (floats(3, 8), floats(3, 8), None, floats(8), floats(3), floats(3), True, True, None),
        {0: floats(2, 8), 2: floats(3, 7), 3: floats(7), 4: floats(2), 5: floats(1).expand(3), 8: ints(0, -1, 1)},
    ),
    "rope_tables": ((ints([0, 1], [1, 0]), floats(4)), {0: ints([0, 1, 2]), 1: floats(2, 2)}),
    "gemm_forward": ((floats(3, 8), floats(5, 8), floats(5), True, False), {1: floats(5, 9), 2: floats(4)}),
    "quant_linear_forward": (QUANTISED, QUANTISED_BADLY),
    "quant_linear_native": (QUANTISED, QUANTISED_BADLY),
    "quant_linear_values": (
        (*QUANTISED[1:4], 1, 32, torch.float32, 64),
        {0: torch.zeros(5, 31, dtype=torch.uint8), 1: floats(4, 2), 3: 2, 4: 64, 5: torch.int32, 6: 128},
    ),
    "rotate": (
        (floats(4, 2, 8), floats(4, 1, 8), *ANGLES),
        {1: floats(3, 1, 8), 2: ints([0, 1]), 3: floats(5), 6: [4, 1, 1]},
    ),
    "rotate_": (
        (floats(4, 2, 8), floats(4, 1, 8), *ANGLES),
        {0: floats(4, 2, 1).expand(4, 2, 8), 2: None, 3: None, 4: floats(4, 4)},
    ),
    "append_kv": (
        (*APPEND, [0, 0, 0], False, None, False, "eager"),
        {0: floats(4, 2, 1).expand(4, 2, 8), 2: floats(1, 6, 1, 8), 4: ints(0, 1, 2, 6), 12: "cuda"},
    ),
    "kvcache_attention": ((*KV, [1, 1], [2, 7 - 1], 0.3, "eager"), {3: [1, 2], 4: [2, 7], 1: floats(2, 6, 2, 7)}),
    "kvcache_attention_decode": (
        (*KV, ints(2, 6, dtype=torch.int32), 0.3, "eager", TABLE),
        {0: floats(3, 2, 8), 1: floats(2, 6, 3, 8), 2: floats(2, 5, 2, 8), 3: ints(2, 6), 5: "varlen", 6: TABLE + 1},
    ),
    "decode_attention_": (
        (
            *(floats(2, 2, 8), floats(2, 1, 8), floats(2, 1, 8), floats(2, 6, 1, 8), floats(2, 6, 1, 8)),
            *(ints(2, 6, dtype=torch.int32), ints(1, 5), floats(4), ints([0], [0], dtype=torch.int32)),
            *(0.3, False, "eager"),
        ),
        {
            1: floats(1, 1, 8),
            3: floats(1, 6, 1, 8),
            4: floats(2, 5, 1, 8),
            5: ints(2, 6),
            7: floats(3),
            8: ints([0], [0]),
        },
    ),
    "rms_norm_linear": (
        (floats(2, 4), floats(4), [floats(3, 4)], [floats(3)], 1e-6, False, "eager"),
        {1: floats(3), 2: [floats(3, 5)], 3: [floats(2)], 6: "cuda"},
    ),
    "rms_norm_swiglu": (
        (floats(2, 4), floats(4), floats(3, 4), floats(3, 4), 1e-6, False, "eager"),
        {1: floats(5), 2: floats(3, 3), 3: floats(2, 4)},
    ),
    "linear_add_": (
        (floats(2, 3), floats(2, 4), floats(3, 4), False, "eager"),
        {0: floats(2, 4), 1: floats(1, 4), 2: floats(3, 5)},
    ),
    "sample_tokens_": (
        (floats(2, 5), floats(2).double(), floats(2, 5) < 0.5, ints(3), 0.7, 2, 0.9, 1.3, "eager"),
        {
            0: floats(2, 0),
            1: floats(3).double(),
            2: floats(2, 4) < 0.5,
            3: floats(1),
            4: 0.0,
            5: -1,
            6: 1.1,
            7: 0.0,
            8: "cuda",
        },
    ),
    "linear_cross_entropy_forward": (
        (*LOSS, "mean", 0.0, None, False, [False] * 3),
        {1: floats(6, 9), 2: ints(0, 1), 3: floats(5), 5: "all", 7: 0, 9: [True]},
    ),
    "linear_cross_entropy_backward": (
        (floats(4), *LOSS, 0.0, None, False, [True] * 3),
        {0: floats(3), 3: ints(0, 1, 2)},
    ),
    "grouped_linear_forward": (
        (floats(4, 8), floats(2, 6, 8), BOUNDS, False),
        {0: floats(3, 8), 1: floats(3, 6, 8), 2: ints(0, 5, 4, dtype=torch.int32)},
    ),
    "grouped_linear_backward": (
        (floats(4, 6), floats(4, 8), floats(2, 6, 8), BOUNDS, False, [True, True]),
        {0: floats(3, 6), 1: floats(4, 7), 3: ints(1, 2, 3, dtype=torch.int32), 5: [True]},
    ),
    "grouped_quant_linear_forward": (
        (floats(4, 64), *GROUPED, 1, 32, "eager"),
        {0: floats(3, 64), **GROUPED_BADLY, 6: 2, 7: 64, 8: "cuda"},
    ),
    "grouped_quant_linear_backward": (
        (floats(4, 5), *GROUPED, 1, 32, 64, "eager"),
        {0: floats(4, 6), **GROUPED_BADLY, 6: 2, 7: 64, 8: 128, 9: "cuda"},
    ),
    "group_by_expert_forward": ((ints([1, 0], [2, 1]), 3), {0: floats(2, 2), 1: 0}),
    "varlen_attention": (
        (*PACK, False, "eager"),
        {
            0: floats(4, 2, 1).expand(4, 2, 8),
            2: floats(3, 2, 8),
            3: ints(0, 9, dtype=torch.int32),
            5: floats(4, 4),
            7: 1,
        },
    ),
    "varlen_attention_backward": (
        (*BACK, "eager"),
        {0: floats(3, 2, 8), 5: floats(4, 1, 8), 6: floats(7), 9: ints(0, 2, 1, dtype=torch.int32)},
    ),
}


def test_every_op_with_kernels_of_its_own_is_here():
    assert {name.split("/")[-2] for name in _LIBRARY._op_impls if name.endswith("/CPU")} == set(CALLS)


@pytest.mark.parametrize(("name", "place"), [(name, place) for name, (_, bad) in CALLS.items() for place in bad])
def test_what_does_not_fit_is_refused_and_nothing_else(name, place):
    good, bad = CALLS[name]
    op = getattr(torch_ops, name)
    copies = [x.clone() if isinstance(x, torch.Tensor) else x for x in good]
    op(*copies)
    with pytest.raises((ValueError, TypeError), match=r"^\w+: "):
        op(*(bad[place] if n == place else x for n, x in enumerate(copies)))


@needs_native
def test_an_image_is_cut_by_any_number_of_threads():
    image = torch.arange(60 * 62 * 3).remainder(251).byte().view(60, 62, 3)
    want = image_to_patches(image, 56, 56, num_threads=1)
    for threads in (2**31, 2**63 - 1, 2**70):
        assert torch.equal(image_to_patches(image, 56, 56, num_threads=threads, backend="native"), want)


@pytest.mark.parametrize("backend", ["eager", pytest.param("native", marks=needs_native)])
def test_sizes_that_no_memory_holds_are_refused_by_name(backend):
    """Rows that lie in one place make any height cheap to ask for."""
    image = torch.zeros(2, 2, 3, dtype=torch.uint8)
    height = 2**29 // 28 * 28
    out = torch.zeros(1, 588, dtype=torch.uint8).expand(height // 14 * 2, 588)
    with pytest.raises(ValueError, match="image_to_patches: out is overwritten, and several of its elements share"):
        image_to_patches(image, height, 28, out=out, backend=backend)
    with pytest.raises(ValueError, match="images_to_patches: out is overwritten"):
        images_to_patches([image], [(height, 28)], temporal_patch_size=1, out=out, backend=backend)
    for size in (2**40 * 28, 2**70 * 28):
        with pytest.raises(ValueError, match=f"image_to_patches: height must be at most 536870911, got {size}"):
            image_to_patches(image, size, 28, backend=backend)
    with pytest.raises(ValueError, match="image_to_patches: patch_size must be at most 1024, got 1025"):
        image_to_patches(image, 1025, 1025, patch_size=1025, merge_size=1, backend=backend)
