"""Stands for the extension's attention on Hopper: the formula over the tiles that a launch names, read and written at
the addresses it is given, in the CPU's memory. So what it is told has to be right to the last stride."""

from __future__ import annotations

import ctypes
import math
from types import SimpleNamespace

import torch

from qwen2vl_kernels.core import attention_sm90, native

STREAM = 4711


class Extension:
    """Counts launches, and refuses what the kernel could not be launched with."""

    def __init__(self) -> None:
        self.launches: list[SimpleNamespace] = []
        self.built = [kernel.key for kernel in attention_sm90.kernels()]

    def attention_built(self):
        return self.built

    def attention_forward(self, q, k, v, out, lse, tiles, sizes, config, bounds, scale, device, stream):
        heads, kv_heads, columns, element, causal = sizes
        assert (columns, element, bool(causal), *config) in self.built, "no such kernel is linked"
        assert stream == STREAM and heads % kv_heads == 0 and bounds[0] < bounds[1]
        for address, row, head, _ in (q, k, v):
            assert address % 16 == 0 and row % 8 == head % 8 == 0 and row and head, "no map describes it"
        dtype = (torch.bfloat16, torch.float16)[element]
        inputs = [
            tensor_at(address, (rows, n, columns), (row, head, 1), dtype)
            for (address, row, head, rows), n in zip((q, k, v), (heads, kv_heads, kv_heads), strict=True)
        ]
        rows = q[3]
        results = tensor_at(out, (rows, heads, columns), (heads * columns, columns, 1), dtype)
        logs = tensor_at(lse, (heads, rows), (rows, 1), torch.float32) if lse else None
        address, count, width = tiles
        assert width in (3, 4) and count > 0
        listed = tensor_at(address, (count, width), (width, 1), torch.int32).tolist()
        known = attention_sm90.Sm90Config(*config[:4])  # of the head's own layout, unless another is asked for
        if attention_sm90.Kernel(columns, dtype, bool(causal), known).key[3:] != tuple(config):
            known = attention_sm90.Sm90Config(*config)
        seen = SimpleNamespace(config=known, bounds=tuple(bounds), rows=[], count=count)
        self.launches.append(seen)
        for first, begin, end, *own in listed:
            own_end = own[0] if own else end
            if first < own_end and bounds[0] < end - begin <= bounds[1]:
                at = slice(first, min(first + 64 * config[0], own_end))
                seen.rows += range(at.start, at.stop)
                _attend(*inputs, results, logs, at, slice(begin, end), end - own_end if causal else None, scale)


def _attend(q, k, v, out, lse, rows, keys, past, scale) -> None:
    """One tile, in base 2; ``past``: how far behind its own place a row sees keys, with a causal mask."""
    group = q.shape[1] // k.shape[1]
    ks, vs = (x[keys].transpose(0, 1).repeat_interleave(group, 0).float() for x in (k, v))
    scores = q[rows].transpose(0, 1).float() @ ks.mT * scale
    if past is not None:
        row, key = torch.arange(rows.start, rows.stop), torch.arange(keys.start, keys.stop)
        scores = scores.masked_fill(key > (row + past)[:, None], -math.inf)
    most = (
        scores.amax(-1, keepdim=True) if keys.stop > keys.start else scores.new_full((*scores.shape[:2], 1), -math.inf)
    )
    p = (scores - most.nan_to_num(neginf=0.0)).exp2()
    sums = p.sum(-1, keepdim=True)
    out[rows] = (p.to(v.dtype).float() @ vs / torch.where(sums > 0, sums, 1.0)).transpose(0, 1).to(out.dtype)
    if lse is not None:
        lse[:, rows] = (most + sums.log2()).squeeze(-1)


def tensor_at(address, shape, strides, dtype) -> torch.Tensor:
    """Memory of this process as a tensor."""
    if 0 in shape:
        return torch.empty(shape, dtype=dtype)
    count = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    memory = (ctypes.c_char * (count * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).as_strided(shape, strides)


def install(monkeypatch) -> Extension:
    """Put it into the extension's place, as on a Hopper card; launches are on tensors of the CPU."""
    made = Extension()
    monkeypatch.setattr(native, "sm90_reason", lambda: None)
    monkeypatch.setattr(native, "cuda", lambda: made)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: SimpleNamespace(cuda_stream=STREAM))
    return made
