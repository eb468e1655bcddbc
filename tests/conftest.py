"""Shared by all tests: seeds, the two-times error rule, and checkpoints that several files load."""

from __future__ import annotations

import importlib.util
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test reaches for the network

import hypothesis
import PIL
import pytest
import torch

from tests.crashes import (  # noqa: F401
    pytest_addoption,
    pytest_configure,
    pytest_handlecrashitem,
    pytest_runtest_call,
    pytest_runtest_makereport,
    pytest_runtest_protocol,
    pytest_sessionfinish,
    pytest_sessionstart,
)

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is decorated, so before the ops are imported
    if importlib.util.find_spec("triton") is not None:
        from tests import interpreter

        interpreter.repair()

if int(PIL.__version__.split(".")[0]) < 13:
    from tests import pillow

    pillow.repair()

#: Where a test of a Triton kernel puts its tensors: on a GPU the kernel runs as compiled, else it is interpreted.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Time limits per example measure the machine's other work, not the code.
hypothesis.settings.register_profile("no-deadline", deadline=None)
hypothesis.settings.load_profile("no-deadline")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def relative_error(got: torch.Tensor, exact: torch.Tensor) -> float:
    """Norm of the difference over the norm of the exact value, in float64. NaN never compares as small."""
    got, exact = got.double(), exact.double()
    return ((got - exact).norm() / exact.norm().clamp_min(1e-30)).item()


def assert_two_times(got: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor, floor: float) -> None:
    """``got`` may be at most twice as far from ``exact`` as the eager op in its precision, plus a rounding floor."""
    assert got.shape == exact.shape
    allowed = 2 * relative_error(eager, exact) + floor
    error = relative_error(got, exact)
    assert error <= allowed, f"relative error {error:.3g}, allowed {allowed:.3g}"


def triton_where_it_serves() -> dict[str, str]:
    """``use_backend``'s arguments for every op that has Triton kernels, for a model on the CPU; skips the test where
    they cannot run there."""
    from qwen2vl_kernels.core.backends import PREFERENCE, unavailable

    if (reason := unavailable("triton", "cpu")) is not None:
        pytest.skip(f"triton: {reason}")
    return {op: "triton" for op, row in PREFERENCE.items() if "triton" in row["cpu"]}
