"""Attention for Hopper (csrc/cuda/attention_forward.cuh) on the host, against the formula in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qwen2vl_kernels.ops.varlen_attention import varlen_attention_ref
from tests.kernels.attention_on_host import Case, Shape, run_case

SHORT, LONG = Shape(consumers=2, keys=128), Shape()
TIMES = ["timing=early", "timing=late", "seed=1"]
MANY = [*TIMES, *(f"seed={seed}" for seed in range(2, 19))]

#: Boundaries of packs, none of which is a multiple of a tile.
PACKS = {
    "one row": [0, 1],
    "around a warpgroup": [0, 1, 64, 128, 193],
    "empty": [0, 0, 130, 130],
    "mixed": [0, 257, 273, 274],
    "several steps": [0, 300],
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
    """The formula in ``dtype``, lse in powers of two; rows behind the segments are zero and minus infinity there."""
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
    if error.numel():
        floor = torch.finfo(case.q.dtype).eps * want[:rows].abs().max()
        assert error.max() <= 2 * allowed.max() + floor, (error.max(), allowed.max(), floor)
        assert error.square().mean().sqrt() <= 2 * allowed.square().mean().sqrt() + floor / 100
    torch.testing.assert_close(lse[:, :rows].double(), want_lse[:, :rows], rtol=1e-6, atol=2e-5)


@pytest.mark.parametrize("name", PACKS)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_packs_by_the_formula(name: str, causal: bool) -> None:
    case = replace(packed(PACKS[name]), causal=causal)
    assert_right(case, *run_case(LONG, case, "seed=1"))
