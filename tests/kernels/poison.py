"""Outputs full of NaN before a kernel writes them, so that what it leaves out is seen."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def poisoned(monkeypatch):
    """``torch.empty`` and its kin return NaN (integers: the least) instead of whatever the memory held."""

    def wrap(function):
        def poisoned_empty(*args, **kwargs):
            made = function(*args, **kwargs)
            if made.is_meta or made.numel() == 0:
                return made
            if made.dtype.is_floating_point:
                return made.fill_(torch.nan)
            return made if made.dtype == torch.bool else made.fill_(torch.iinfo(made.dtype).min)

        return poisoned_empty

    # PyTorch keeps what it takes for constructors when `torch.device(...)` is first entered: not these.
    with torch.device("cpu"):
        torch.empty(0)
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, wrap(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", wrap(torch.Tensor.new_empty))
