"""The kernels of kvcache_attention with lengths on the device, against its formula in float64."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qwen2vl_kernels import kvcache_attention
from qwen2vl_kernels.core import launching
from qwen2vl_kernels.core.launching import Target, record
from qwen2vl_kernels.ops.kvcache_attention import kvcache_attention_decode_ref
from qwen2vl_kernels.triton import attention_decode
from qwen2vl_kernels.triton.attention_decode import decode_config, launch_decode, splits_of
from tests.conftest import DEVICE, assert_two_times

pytestmark = pytest.mark.skipif(launching.reason(DEVICE) is not None, reason=str(launching.reason(DEVICE)))

CAPACITY = 150
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def two_splits(monkeypatch):
    """So that a short cache already has splits of several blocks each, and of different numbers of them."""
    monkeypatch.setattr(attention_decode, "MAX_SPLITS", 2)


def _inputs(total, heads, kv_heads, columns, v_columns, dtype=torch.float32, capacity=CAPACITY):
    """Caches that are parts of wider tensors, in which all that no row holds is NaN."""
    q = torch.randn(len(total), heads + 1, columns + 3, device=DEVICE).to(dtype)[:, 1:, :columns]
    k, v = (
        torch.full((len(total), kv_heads + 1, capacity + 2, wide + 8), float("nan"), device=DEVICE).to(dtype)
        for wide in (columns, v_columns)
    )
    k, v = k[:, 1:, 1:-1, :columns].transpose(1, 2), v[:, 1:, 1:-1, :v_columns].transpose(1, 2)
    for row, seen in enumerate(total):
        for cache in (k, v):
            cache[row, :seen] = torch.randn(cache[row, :seen].shape, device=DEVICE).to(dtype)
    lengths = torch.zeros(len(total), 2, dtype=torch.int32, device=DEVICE)
    lengths[:, 1] = torch.tensor(total)
    return q, k, v, lengths[:, 1]


def _compare(q, k, v, lengths, floor):
    got = kvcache_attention(q, k, v, None, lengths, softmax_scale=0.21, backend="triton")
    eager = kvcache_attention_decode_ref(q, k, v, lengths, 0.21)
    exact = kvcache_attention_decode_ref(q.double(), k.double(), v.double(), lengths, 0.21)
    assert got.dtype == q.dtype
    assert_two_times(got, eager, exact, floor)
    return got


@pytest.mark.parametrize(("columns", "v_columns"), [(64, 64), (72, 72), (80, 80), (96, 96), (128, 128), (80, 48)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_widths(columns, v_columns, dtype):
    """A row of each kind: empty, one key, blocks cut and whole, the whole cache."""
    given = _inputs([0, 1, 64, 97, CAPACITY], 4, 2, columns, v_columns, dtype)
    got = _compare(*given, torch.finfo(dtype).eps)
    assert got[0].count_nonzero() == 0


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 1), (12, 2), (7, 1), (16, 2), (17, 1), (100, 1)])
def test_groups_of_query_heads(heads, kv_heads):
    """Of fewer than a matrix instruction has rows, of more, and of more than one program takes."""
    _compare(*_inputs([CAPACITY, 33], heads, kv_heads, 16, 16), 4 * torch.finfo(torch.float32).eps)


def test_the_largest_score_may_stand_in_any_split():
    """Weights far apart: a split that holds none of the mass adds nothing, and nothing overflows."""
    q, k, v, lengths = _inputs([CAPACITY] * 4, 2, 1, 16, 16)
    for row, place in enumerate((0, 40, 75, CAPACITY - 1)):
        k[row, place] = 400 * q[row, 0]
    got = _compare(q, k, v, lengths, 4 * torch.finfo(torch.float32).eps)
    for row, place in enumerate((0, 40, 75, CAPACITY - 1)):
        torch.testing.assert_close(got[row, 0], v[row, place, 0])


def test_a_row_is_bitwise_the_same_in_any_batch_and_behind_any_memory():
    q, k, v, lengths = _inputs([90, CAPACITY, 5], 6, 2, 80, 80, torch.bfloat16)
    together = launch_decode(q, k, v, lengths, 0.2)
    for row in range(3):
        one = slice(row, row + 1)
        alone = launch_decode(q[one].clone(), k[one].clone().nan_to_num(7.0), v[one].clone(), lengths[one], 0.2)
        assert torch.equal(alone, together[one])


def test_nothing_to_do():
    for batch, capacity in ((0, 9), (2, 0)):
        q, k, v, lengths = _inputs([0] * batch, 2, 1, 16, 16, capacity=capacity)
        assert launch_decode(q, k, v, lengths, 0.2).tolist() == torch.zeros(batch, 2, 16).tolist()


def test_launches_follow_from_shapes_alone(monkeypatch):
    """On tensors without memory, whose lengths nobody can read: two launches, the same for a cache's every state."""
    monkeypatch.undo()
    cache, lengths = (
        torch.empty(s, dtype=d, device="meta") for s, d in (((2, 5000, 4, 128), torch.half), ((2,), torch.int))
    )
    for capability, dependent in ((80, False), (90, True), (100, True)):
        monkeypatch.setattr(launching, "INTERPRETED", False)
        with record(Target("cuda", capability)) as launches:
            launch_decode(torch.empty(2, 28, 128, dtype=torch.half, device="meta"), cache, cache, lengths, 0.2)
        assert [one.grid for one in launches] == [(2 * 64, 4), (2, 28)]
        assert [one.options.get("launch_pdl", False) for one in launches] == [dependent] * 2
        assert [one.arguments["DEPENDENT"] for one in launches] == [dependent] * 2


def test_splits_are_few_kinds(monkeypatch):
    monkeypatch.undo()
    block_n = decode_config(torch.bfloat16, Target("cuda", 90)).block_n
    assert {splits_of(capacity, block_n) for capacity in range(1, 40_000, 7)} == {1, 2, 4, 8, 16, 32, 64}
    assert [splits_of(block_n * n, block_n) for n in (1, 2, 3, 64, 1000)] == [1, 2, 4, 64, 64]


_CODE = """
import json, re, tempfile, torch
from pathlib import Path
from benchmarks.aot import compiler
from benchmarks.aot.decode import SPECIMENS
from qwen2vl_kernels.core.launching import Target, record

found = {}
with record(Target("cuda", 90)) as launches:
    SPECIMENS[0].run()
for one in launches:
    source, _ = compiler._source(one)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiler._compile(source, one, "cuda", 90, 32).asm["cubin"])
        text = compiler.disassembled(cubin)
    found[one.kernel.__name__] = re.findall(r"\\b(ACQBULK|PREEXIT|LDG|LDGSTS|STG|HMMA)\\b", text)
print(json.dumps(found))
"""


def test_the_machine_code_waits_before_it_touches_memory():
    """For sm_90: both are launched while the kernel before them ends, which writes what they read."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", _CODE]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert list(found) == ["_attend_kernel", "_combine_kernel"]
    for names in found.values():
        assert names[:2] == ["ACQBULK", "PREEXIT"] and names.count("ACQBULK") == 1, names
        assert {"LDG", "STG"} <= set(names)
    assert "HMMA" in found["_attend_kernel"] and "LDGSTS" in found["_attend_kernel"]
