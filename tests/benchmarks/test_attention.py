"""What the case attention measures on a GPU, which it can say without one: inputs are made when they are asked for."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from benchmarks.case import Context, Skip
from benchmarks.cases import attention
from benchmarks.packs import Pack, packs
from benchmarks.providers import PEERS
from qwen2vl_kernels.core import launching

GPU = Context(device=torch.device("cuda"))
PEERS_OF_ALL = {"torch varlen", "cuDNN, ragged", "flash-attn 2", "flash-attn 3", "fa3-fwd", "flash-attn 4"}


def test_no_workload_makes_the_inputs_of_another():
    found = list(attention.workloads(GPU))
    assert len(found) == 2 * len(packs()) and not torch.cuda.is_initialized()
    names = [workload.name for workload in found]
    assert len(set(names)) == len(names)
    for workload in found:
        ours = [provider.name for provider in workload.providers if not provider.peer]
        assert ours == ["chosen", "sm90", "triton", "sdpa"]
        assert {provider.name for provider in workload.providers if provider.trial} <= {"sm90"}
        skipped = {provider.name: provider.skipped for provider in workload.providers if not provider.peer}
        assert skipped["sm90"] == ("its backward is triton's" if workload.name.endswith("backward") else None)
        peers = {provider.name for provider in workload.providers if provider.peer}
        assert peers >= PEERS_OF_ALL and workload.gate is not None
    equal = {workload.name for workload in found if "cuDNN" in {provider.name for provider in workload.providers}}
    assert "4 of 4096, 16 heads of 80" in equal and "causal 8 of 2048, 28/4 heads of 128, backward" in equal
    assert not any(name.startswith(("9 photos", "1 of 16384 and")) for name in equal)


def test_prefill_and_heads_of_72_are_among_the_first():
    first = {(p.heads, p.kv_heads, p.columns, p.causal) for p in islice(packs(), 6)}
    assert {(16, 16, 80, False), (28, 4, 128, True), (16, 16, 72, False)} == first


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_useful_operations_are_counted(causal):
    pack = Pack("2 of 3", (3, 3), 4, 2, 80, causal)
    forward, backward = attention._both(GPU, pack)
    pairs = 2 * (1 + 2 + 3 if causal else 9)
    assert forward.flops == 4 * 80 * 4 * pairs and backward.flops == 2.5 * forward.flops
    assert forward.bytes == 2 * 2 * 6 * 80 * (4 + 2 + 2)


def test_a_wrong_or_missing_peer_is_skipped_and_not_gated(monkeypatch):
    """A red gate would stop everyone."""
    assert {module for module in attention._FLASH.values()} < set(PEERS)
    monkeypatch.setattr(launching, "_target", lambda index: launching.Target("cuda", 90))
    inputs = attention._Inputs(GPU, packs()[0])
    with pytest.raises(Skip, match="is not installed"):
        attention._flash("flash_attn.cute", inputs, False)
    monkeypatch.setattr(attention.providers, "why_not", lambda module: None)
    monkeypatch.setattr("qwen2vl_kernels.core.attention_peers._loaded", lambda name: attention)
    with pytest.raises(Skip, match="silently wrong dq where head_dim is no multiple of 32"):
        attention._flash("flash_attn.cute", inputs, True)
    with pytest.raises(Skip, match="it has a forward pass only"):
        attention._flash("fa3_fwd_interface", inputs, True)
