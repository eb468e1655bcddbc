"""Attention for Hopper (csrc/cuda/attention_forward.cuh) on the host, against the formula in float64.

What is asynchronous on the GPU happens at moments that a seed draws (host/sm90/), and what is not guaranteed is NaN or
ends the program. One program is built with the sanitizers here, all of them in the long tests.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qwen2vl_kernels.ops.varlen_attention import varlen_attention_ref
from tests.kernels.attention_on_host import NO_BOUND, Case, Shape, alone, run_case

LONG, SHORT = Shape(), Shape(consumers=2, keys=128)
#: What is linked, and what the tuner tries besides.
LINKED = [
    LONG,
    SHORT,
    Shape(72),
    Shape(72, 2, 128),
    Shape(64, 2, 128),
    Shape(64, 3, 128),
    Shape(96),
    Shape(96, 2, 128),
    Shape(128, 2, 128),
]
TRIED = [
    Shape(keys=112),
    Shape(keys=144, p_shared=True),
    Shape(consumers=2, keys=176),
    Shape(share=1),
    Shape(columns=64, across=80),
    Shape(columns=32, across=80),
    Shape(72, across=72, columns=16),
    Shape(128, 3, 80),
]
TIMES = ["early", "late", *map(str, range(18))]

#: Boundaries of packs, few of them multiples of a tile.
PACKS = {
    "one row": [0, 1],
    "around a warpgroup": [0, 1, 64, 128, 193],
    "empty": [0, 0, 130, 130],
    "mixed": [0, 257, 273, 274],
    "whole tiles": [0, 192, 384],
    "long": [0, 1000],
}


def packed(
    bounds: list[int],
    head: int = 80,
    heads: int = 2,
    kv_heads: int = 2,
    dtype: torch.dtype = torch.bfloat16,
    size: float = 1.0,
    behind: int = 3,
    seed: int = 0,
) -> Case:
    """Rows behind the last segment, ``behind`` of them, and what lies between rows and heads are NaN."""
    generator = torch.Generator().manual_seed(seed)
    total = bounds[-1] + behind
    tensors = []
    for count, pad in ((heads, 8), (kv_heads, 16), (kv_heads, 0)):
        buffer = torch.full((total, count, head + pad), float("nan"), dtype=dtype)
        buffer[: bounds[-1], :, :head] = size * torch.randn(bounds[-1], count, head, generator=generator).to(dtype)
        tensors.append(buffer[..., :head])
    return Case(*tensors, cu_seqlens=bounds)


def expected(case: Case, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The formula in ``dtype``, lse in powers of two."""
    q, k, v = (x.contiguous().to(dtype) for x in (case.q, case.k, case.v))
    own, keys = case.boundaries()
    out, lse = varlen_attention_ref(q, k, v, own, case.causal, case.softmax_scale, keys, return_lse=True)
    return out, lse / torch.log(torch.tensor(2.0, dtype=lse.dtype))


def assert_right(case: Case, out: torch.Tensor, lse: torch.Tensor) -> None:
    """Errors of at most twice the formula's in the same dtype; nothing is written behind the last segment."""
    rows = case.cu_seqlens[-1]
    want, want_lse = expected(case, torch.float64)
    same, _ = expected(case, case.q.dtype)
    assert out[rows:].isnan().all() and lse[:, rows:].isnan().all()
    error, allowed = (out[:rows].double() - want[:rows]).abs(), (same[:rows].double() - want[:rows]).abs()
    assert not error.isnan().any()
    floor = torch.finfo(case.q.dtype).eps * want[:rows].abs().max().item()
    assert error.max() <= 2 * allowed.max() + floor, (error.max(), allowed.max(), floor)
    assert error.square().mean().sqrt() <= 2 * allowed.square().mean().sqrt() + floor / 100
    torch.testing.assert_close(lse[:, :rows].double(), want_lse[:, :rows], rtol=1e-6, atol=2e-5)


@pytest.mark.parametrize("name", PACKS)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_packs_by_the_formula(name: str, causal: bool) -> None:
    case = replace(packed(PACKS[name]), causal=causal)
    assert_right(case, *run_case(LONG, case))


#: Every block of columns and number of consumers, each built once; make test-long has the others.
SOME = [(LONG, False), (LONG, True), (SHORT, True), (Shape(72), False), (Shape(64, 2, 128), True), (Shape(96), False)]


@pytest.mark.parametrize(
    ("shape", "causal"),
    [
        pytest.param(shape, causal, marks=() if (shape, causal) in SOME else pytest.mark.long, id=f"{shape}-{causal}")
        for shape in LINKED
        for causal in (False, True)
    ],
)
def test_every_kernel_that_is_linked(shape: Shape, causal: bool) -> None:
    dtype = torch.float16 if causal else torch.bfloat16
    case = replace(packed([0, 257, 273], shape.head, 6, 1, dtype, behind=0), causal=causal)
    assert_right(case, *run_case(shape, case, sanitized=shape == LONG))


def test_the_bits_do_not_depend_on_time() -> None:
    case = replace(packed([0, 130, 403], heads=3, kv_heads=1), causal=True)
    first = run_case(LONG, case, TIMES[0])
    assert_right(case, *first)
    for time in TIMES[1:]:
        for a, b in zip(first, run_case(LONG, case, time), strict=True):
            assert a.equal(b) or torch.equal(a.nan_to_num(7), b.nan_to_num(7)), time


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_the_bits_depend_on_the_segment_alone(causal: bool) -> None:
    """Neither on what else is packed, if only NaN, nor on the number of blocks."""
    case = replace(packed([0, 200, 500], behind=0), causal=causal)
    for x in (case.q, case.k, case.v):
        x[:200] = float("nan")
    apart, _ = run_case(LONG, alone(case, 1))
    for blocks in (1, 4, 30):
        together, _ = run_case(LONG, replace(case, blocks=blocks), "late")
        assert together[200:].equal(apart) and not apart.isnan().any()


def test_what_lies_behind_a_head_of_72_is_not_read() -> None:
    """Its last block of 16 columns has 8 of the next head's or of nobody's."""
    case = packed([0, 100], 72, behind=0)
    heads = torch.stack([case.v[:, 0], torch.full_like(case.v[:, 0], float("nan"))], 1)
    case = replace(case, q=case.q[:, :1], k=case.k[:, :1], v=heads[:, :1])
    assert_right(case, *run_case(Shape(72), case, sanitized=False))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_large_scores(dtype: torch.dtype) -> None:
    case = packed([0, 300], dtype=dtype, size=60)  # scores of up to some 15,000
    assert_right(case, *run_case(LONG, case))


def test_launches_of_short_and_of_long_segments_share_a_list() -> None:
    """Each takes its own, together they take all, once; a padded list ends in tiles that are none."""
    for padded in (False, True):
        case = replace(packed([0, 40, 140, 141, 397]), padded=padded)
        whole, _ = run_case(LONG, case)
        long, _ = run_case(LONG, replace(case, bounds=(99, NO_BOUND)))
        short, _ = run_case(LONG, replace(case, bounds=(-1, 99)))
        is_long = torch.tensor([40 <= row < 140 or 141 <= row < 397 for row in range(400)])
        assert long[is_long].equal(whole[is_long]) and long[~is_long].isnan().all()
        mine = ~is_long & (torch.arange(400) < 397)
        assert short[mine].equal(whole[mine]) and short[~mine].isnan().all()


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_keys_with_boundaries_of_their_own(causal: bool) -> None:
    """Causal masks end where both segments end; who sees no key has zeros, and minus infinity for its sum."""
    queries, keys = packed([0, 3, 3, 203, 210], heads=7, kv_heads=1), packed([0, 100, 250, 400, 400], kv_heads=1)
    case = replace(queries, k=keys.k, v=keys.v, cu_seqlens_k=keys.cu_seqlens, causal=causal)
    out, lse = run_case(LONG, case)
    assert_right(case, out, lse)
    blind = slice(3, 53) if causal else slice(203, 210)  # of 200 queries over 150 keys, and of 7 over none
    assert (out[blind] == 0).all() and (lse[:, blind] == float("-inf")).all()


# ------------------------------------------------------------------------------------------------ before a release


@pytest.mark.long
@pytest.mark.parametrize("shape", [*LINKED, *TRIED], ids=str)
def test_the_whole_grid(shape: Shape) -> None:
    """Every pack, causal and not, groups of 1, 6 and 7, both dtypes, 20 moments each, under the sanitizers."""
    for number, bounds in enumerate(PACKS.values()):
        for causal in (False, True):
            for heads in (1, 6, 7):
                dtype = (torch.bfloat16, torch.float16)[(number + heads + causal + (shape.share > 0)) % 2]
                if shape.share:
                    dtype = torch.bfloat16  # what the polynomial is for
                case = replace(packed(bounds, shape.head, heads, 1, dtype), causal=causal)
                first = run_case(shape, case, TIMES[0])
                assert_right(case, *first)
                for time in TIMES[1:] if heads == 1 or number == 1 else TIMES[1:3]:
                    for a, b in zip(first, run_case(shape, case, time), strict=True):
                        assert torch.equal(a.nan_to_num(7), b.nan_to_num(7)), (bounds, causal, heads, time)
