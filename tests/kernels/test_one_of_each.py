"""The program that compute-sanitizer watches runs every op that has kernels."""

from __future__ import annotations

from qwen2vl_kernels.core.backends import PREFERENCE, unavailable
from tests.conftest import DEVICE

from .one_of_each import main


def test_every_op_with_kernels_is_in_it():
    kernels = {
        op
        for op, row in PREFERENCE.items()
        for b in row[DEVICE]
        if b in ("triton", "cuda", "sm90") and unavailable(b, DEVICE) is None
    }
    assert set(main(DEVICE)) == kernels
