"""A kernel that ptxas 12.8.93 (Triton 3.6 and 3.7) compiles wrongly for capability 9; the gates must see it.

Attention over heads of 80 columns as 64 + 16, with a loop of its own for the last, masked keys, which is not pipelined:
what was this package's default when it first met a GPU. The descriptors of later steps of the product of the narrow
block come from uniform registers that nothing has written, so that its columns are wrong and addresses may fault.

Run as a module, it prints what the compiler that Python imports makes of it, as JSON: the failures of the gates.
"""

import json

import torch
import triton
import triton.language as tl

from benchmarks.aot.compiler import Specimen, compile_for, meta
from qwen2vl_kernels.core.launching import launch


@triton.jit
def _step(q0, q1, k, v, start, end, row_stride, o0, o1, m_i, l_i, STEP: tl.constexpr, MASKED: tl.constexpr):
    key = start + tl.arange(0, STEP)
    there = key < end
    at = key.to(tl.int64)[:, None] * row_stride
    first, second = tl.arange(0, 64)[None, :], 64 + tl.arange(0, 16)[None, :]
    mask = there[:, None] if MASKED else None
    other = 0.0 if MASKED else None
    k0, k1 = tl.load(k + at + first, mask=mask, other=other), tl.load(k + at + second, mask=mask, other=other)
    qk = tl.dot(q1, tl.trans(k1), tl.dot(q0, tl.trans(k0)))
    if MASKED:
        qk = tl.where(there[None, :], qk, float("-inf"))
    m_new = tl.maximum(m_i, tl.max(qk, 1))
    p = tl.exp2(qk - m_new[:, None])
    alpha = tl.exp2(m_i - m_new)
    l_i = l_i * alpha + tl.sum(p, 1)
    p = p.to(v.dtype.element_ty)
    o0 = tl.dot(p, tl.load(v + at + first, mask=mask, other=other), o0 * alpha[:, None])
    o1 = tl.dot(p, tl.load(v + at + second, mask=mask, other=other), o1 * alpha[:, None])
    return o0, o1, m_new, l_i


@triton.jit
def two_loops_kernel(q, k, v, out, end, row_stride, ROWS: tl.constexpr, STEP: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = (row < end)[:, None]
    at = row.to(tl.int64)[:, None] * row_stride
    first, second = tl.arange(0, 64)[None, :], 64 + tl.arange(0, 16)[None, :]
    q0, q1 = tl.load(q + at + first, mask=live, other=0.0), tl.load(q + at + second, mask=live, other=0.0)
    o0, o1 = tl.zeros((ROWS, 64), tl.float32), tl.zeros((ROWS, 16), tl.float32)
    m_i, l_i = tl.full((ROWS,), float("-inf"), tl.float32), tl.zeros((ROWS,), tl.float32)
    whole = end // STEP * STEP
    for start in range(0, whole, STEP):
        o0, o1, m_i, l_i = _step(q0, q1, k, v, start, end, row_stride, o0, o1, m_i, l_i, STEP, False)
    for start in tl.range(whole, end, STEP, num_stages=1):
        o0, o1, m_i, l_i = _step(q0, q1, k, v, start, end, row_stride, o0, o1, m_i, l_i, STEP, True)
    tl.store(out + at + first, (o0 / l_i[:, None]).to(out.dtype.element_ty), mask=live)
    tl.store(out + at + second, (o1 / l_i[:, None]).to(out.dtype.element_ty), mask=live)


def _run() -> None:
    x = meta(4100, 80, dtype=torch.bfloat16)
    sizes = {"ROWS": 128, "STEP": 64, "num_warps": 8, "num_stages": 2}
    launch(two_loops_kernel, (33,), x.device, q=x, k=x, v=x, out=x, end=4100, row_stride=80, **sizes)


if __name__ == "__main__":
    reports = list(compile_for(Specimen("two loops", _run), "sm_90"))
    print(json.dumps({"triton": triton.__version__, "kernel": reports[0].kernel, "failures": reports[0].failures}))
