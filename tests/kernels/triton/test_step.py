"""The kernels of a step of decoding, products of few rows and attention that appends, against formulas in float64."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.aot.step import layer
from qwen2vl_kernels import BackendError, decode_attention_, linear_add_, rms_norm_linear, rms_norm_swiglu, use_backend
from qwen2vl_kernels.core import launching
from qwen2vl_kernels.core.launching import Target, record
from qwen2vl_kernels.ops.decode_attention import decode_attention_ref
from qwen2vl_kernels.ops.few_rows import linear_add_ref, rms_norm_linear_ref, rms_norm_swiglu_ref
from qwen2vl_kernels.triton import attention_step
from tests.conftest import DEVICE, assert_two_times

needs_triton = pytest.mark.skipif(launching.reason(DEVICE) is not None, reason=str(launching.reason(DEVICE)))
#: The kernels: Triton's, and on a CPU the extension's.
KERNELS = [pytest.param("triton", marks=needs_triton), *(["native"] if DEVICE == "cpu" else [])]
of_kernels = pytest.mark.parametrize("kernel", KERNELS)
EPS = torch.finfo(torch.bfloat16).eps
ROOT = Path(__file__).resolve().parents[3]


def _random(*shape, scale=1.0):
    return (torch.randn(shape, device=DEVICE) * scale).bfloat16()


def _double(given):
    return [[_double([one])[0] for one in x] if isinstance(x, list) else x if x is None else x.double() for x in given]


def _guarded(*shape, scale=1.0):
    """A contiguous tensor between numbers that are none."""
    count = torch.Size(shape).numel()
    wide = torch.full((count + 64,), float("nan"), device=DEVICE).bfloat16()
    wide[32 : 32 + count] = _random(count, scale=scale)
    return wide[32 : 32 + count].view(shape)


# ---------------------------------------------------------------------------------------------------- products, formula


def test_the_formulas_are_those_of_a_layer():
    """Of transformers' modules in float64."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP, Qwen2RMSNorm

    config = transformers.Qwen2Config(hidden_size=24, intermediate_size=40)
    norm, mlp = Qwen2RMSNorm(24, 1e-5).double(), Qwen2MLP(config).double()
    torch.nn.init.uniform_(norm.weight)
    x, q, k = torch.randn(3, 24).double(), torch.nn.Linear(24, 6).double(), torch.nn.Linear(24, 4, bias=False).double()
    with torch.no_grad():
        both = rms_norm_linear(x, norm.weight, [q.weight, k.weight], [q.bias, None], eps=1e-5)
        torch.testing.assert_close(both, torch.cat([q(norm(x)), k(norm(x))], 1))
        h = rms_norm_swiglu(x, norm.weight, mlp.gate_proj.weight, mlp.up_proj.weight, eps=1e-5)
        total = x.clone()
        assert linear_add_(total, h, mlp.down_proj.weight) is total
        torch.testing.assert_close(total, x + mlp(norm(x)))


# ----------------------------------------------------------------------------------------------------- products, kernel

#: rows, columns of x, rows of the weights: a tile cut and whole, in both directions.
SHAPES = [(1, 96, (24,)), (3, 1024, (40, 16, 24)), (8, 1544, (33, 9)), (5, 8, (1, 1, 1))]


@of_kernels
@pytest.mark.parametrize(("rows", "columns", "counts"), SHAPES)
def test_norm_linear(rows, columns, counts, kernel):
    x, norm = _guarded(rows, columns, scale=7), _guarded(columns)
    weights = [_guarded(n, columns, scale=columns**-0.5) for n in counts]
    biases = [_guarded(n) if place != 1 else None for place, n in enumerate(counts)]
    got = rms_norm_linear(x, norm, weights, biases, eps=0.3, backend=kernel)
    eager = rms_norm_linear_ref(x, norm, weights, biases, 0.3)
    assert_two_times(got, eager, rms_norm_linear_ref(*_double([x, norm, weights, biases]), 0.3), EPS)


@of_kernels
@pytest.mark.parametrize(("rows", "columns", "count"), [(1, 96, 40), (8, 776, 17)])
def test_norm_swiglu(rows, columns, count, kernel):
    given = [_guarded(rows, columns), _guarded(columns), *(_guarded(count, columns, scale=0.1) for _ in range(2))]
    got = rms_norm_swiglu(*given, backend=kernel)
    assert_two_times(got, rms_norm_swiglu_ref(*given, 1e-6), rms_norm_swiglu_ref(*_double(given), 1e-6), EPS)


@of_kernels
@pytest.mark.parametrize(("rows", "columns", "count"), [(1, 1544, 40), (8, 96, 17)])
def test_linear_add(rows, columns, count, kernel):
    residual, x, weight = _guarded(rows, count), _guarded(rows, columns), _guarded(count, columns, scale=0.1)
    exact, eager = residual.double(), residual.clone()
    linear_add_ref(exact, x.double(), weight.double())
    linear_add_ref(eager, x, weight)
    assert linear_add_(residual, x, weight, backend=kernel) is residual
    assert_two_times(residual, eager, exact, EPS)


@needs_triton
def test_a_row_is_bitwise_the_same_beside_others():
    x, norm, weight = _random(8, 200), _random(200), _random(33, 200)
    together = rms_norm_linear(x, norm, [weight], backend="triton")
    for row in (0, 7):
        assert torch.equal(rms_norm_linear(x[row : row + 1], norm, [weight], backend="triton"), together[row : row + 1])


def test_caches_without_slots():
    given = _step([0], capacity=0)
    empty = [one[:0] for one in given[:7]]
    for backend in (None, "eager"):
        assert decode_attention_(*empty, given[7], given[8][:0], backend=backend).shape == empty[0].shape


@pytest.mark.skipif(DEVICE != "cpu", reason="the extension takes tensors of a CPU")
def test_where_the_extension_has_no_form():
    few, weight, norm = _random(2, 16), _random(4, 16), _random(16)
    for given, words in (
        ((_random(9, 16), norm, [weight]), "takes at most 8 rows, x has 9"),
        ((few, norm, [_random(16, 4).T]), "takes tensors whose last dimension is contiguous"),
        ((few.float(), norm.float(), [weight.float()]), r"takes bfloat16, got torch\.float32"),
    ):
        assert rms_norm_linear(*given).shape[1] == 4
        with pytest.raises(BackendError, match=f"rms_norm_linear: backend 'native' {words}"):
            rms_norm_linear(*given, backend="native")
    for given, words in ((_step([3], columns=24), "6/2x24"), (_step([3], dtype=torch.float16), "torch.float16")):
        assert decode_attention_(*_copied(given)).shape == given[0].shape
        with pytest.raises(BackendError, match=f"decode_attention_: backend 'native' takes bfloat16 .*{words}"):
            decode_attention_(*given, backend="native")


@needs_triton
def test_where_the_kernel_has_no_form():
    """A call takes the formula; whoever names the kernel is told."""
    few, many, weight, norm = _random(2, 16), _random(9, 16), _random(4, 16), _random(16)
    assert rms_norm_linear(many, norm, [weight]).shape == (9, 4)
    for forced in ({"backend": "triton"}, {}):
        with use_backend(rms_norm_linear="triton"):
            with pytest.raises(BackendError, match="rms_norm_linear: backend 'triton' takes at most 8 rows, x has 9"):
                rms_norm_linear(many, norm, [weight], **forced)
            with pytest.raises(BackendError, match=r"takes bfloat16, got torch\.float32"):
                rms_norm_linear(few.float(), norm.float(), [weight.float()], **forced)
            with pytest.raises(BackendError, match="takes contiguous weights"):
                rms_norm_linear(few, norm, [_random(16, 4).T], **forced)


# ------------------------------------------------------------------------------------------------------------ attention


def _step(lengths, heads=6, kv_heads=2, columns=32, capacity=300, dtype=torch.bfloat16):
    """A packed projection, and caches in which all that no row holds is NaN."""
    batch = len(lengths)
    packed = torch.randn(batch, heads + 2 * kv_heads, columns, device=DEVICE).to(dtype)
    q, k, v = packed.split([heads, kv_heads, kv_heads], 1)
    caches = [torch.full((batch, kv_heads, capacity, columns), float("nan"), device=DEVICE).to(dtype) for _ in range(2)]
    for cache in caches:
        for row, length in enumerate(lengths):
            if 1 < length <= capacity:
                cache[row, :, : length - 1] = torch.randn(kv_heads, length - 1, columns, device=DEVICE).to(dtype)
    on_device = {"device": DEVICE}
    seqlens = torch.tensor(lengths, dtype=torch.int32, **on_device)
    positions = torch.tensor([3, 0, 41_000, 77, 9, 2, 1][:batch], **on_device)
    arrived = torch.zeros(batch, kv_heads, dtype=torch.int32, **on_device)
    inv_freq = torch.rand(columns // 2, **on_device)
    return [q, k, v, *(cache.transpose(1, 2) for cache in caches), seqlens, positions, inv_freq, arrived]


def _copied(given, wide=False):
    floats = lambda x: x.double() if wide and x.dtype != torch.float32 and x.is_floating_point() else x.clone()  # noqa: E731
    return [floats(x) for x in given]


@pytest.fixture
def few_splits(monkeypatch):
    """So that a short cache already has splits of several blocks each, and of different numbers of them."""
    monkeypatch.setattr(attention_step, "MAX_SPLITS", 2)


LENGTHS = [1, 64, 65, 300, 190]


def test_the_formula_is_append_and_attention():
    from qwen2vl_kernels import append_kv, kvcache_attention

    given = _step(LENGTHS, dtype=torch.float32)
    q, k, v, k_cache, v_cache, seqlens, positions, inv_freq, _ = _copied(given)
    slots = torch.arange(5, device=DEVICE) * 300 + seqlens - 1
    angles = {"positions": positions.expand(3, -1), "inv_freq": inv_freq, "section": (16, 0, 0)}
    k_cache, v_cache = (x.contiguous() for x in (k_cache, v_cache))
    append_kv(k, v, k_cache, v_cache, slots, q=q, **angles, backend="eager")
    expected = kvcache_attention(q, k_cache, v_cache, None, seqlens, backend="eager")
    torch.testing.assert_close(decode_attention_(*given, backend="eager"), expected)
    for ours, theirs in ((given[3], k_cache), (given[4], v_cache)):
        torch.testing.assert_close(ours, theirs, equal_nan=True)


@of_kernels
@pytest.mark.parametrize(
    ("heads", "kv_heads", "columns", "dtype"),
    [(6, 2, 32, torch.bfloat16), (16, 1, 16, torch.float16), (2, 2, 128, torch.bfloat16), (7, 1, 64, torch.bfloat16)],
)
def test_attention_against_the_formula(heads, kv_heads, columns, dtype, few_splits, kernel):
    """A row of each kind: the first token, a block full, one begun, the whole cache; and two that hold nothing."""
    if (kernel, dtype) == ("native", torch.float16):
        pytest.skip("the extension takes bfloat16")
    given = _step([*LENGTHS, 0, 301], heads, kv_heads, columns, dtype=dtype)
    for tensor in given[3:5]:
        tensor[5:] = 7
    eager, exact = _copied(given), _copied(given, wide=True)
    exact[7] = given[7]
    wanted, precise = decode_attention_ref(*eager, 0.3), decode_attention_ref(*exact, 0.3)
    got = decode_attention_(*given, softmax_scale=0.3, backend=kernel)
    assert_two_times(got, wanted, precise, torch.finfo(dtype).eps)
    assert got[5:].count_nonzero() == 0 and given[8].count_nonzero() == 0
    for ours, theirs in zip(given[3:5], eager[3:5], strict=True):
        assert torch.equal(ours.nan_to_num(5), theirs.nan_to_num(5))  # bitwise, keys rotated, and nothing else written


@needs_triton
def test_attention_of_a_row_is_bitwise_the_same_in_any_batch(few_splits):
    given = _step([190, 300, 64])
    alone = [_copied([x[row : row + 1] for x in given[:7]]) for row in range(3)]
    together = decode_attention_(*given, backend="triton")
    for row, some in enumerate(alone):
        assert torch.equal(decode_attention_(*some, given[7], given[8][:1], backend="triton"), together[row : row + 1])


@needs_triton
def test_where_attention_has_no_form():
    for given, words in (
        (_step([3], columns=24), "6/2x24"),
        (_step([3], heads=34), "34/2x32"),
        (_step([3], dtype=torch.float32), "torch.float32"),
    ):
        assert decode_attention_(*_copied(given)).shape == given[0].shape
        with pytest.raises(BackendError, match=f"decode_attention_: backend 'triton' takes 16-bit .*{words}"):
            decode_attention_(*given, backend="triton")


# ----------------------------------------------------------------------------------------------------- what is launched


def test_launches_follow_from_shapes_alone(monkeypatch):
    """A layer of the 2B, on tensors without memory: five launches, all dependent from Hopper on where asked for."""
    monkeypatch.setattr(launching, "INTERPRETED", False)
    for capability, asked, dependent in ((80, True, False), (90, True, True), (100, True, True), (90, False, False)):
        with record(Target("cuda", capability)) as launches:
            layer(3, 12, 2, 8960, prefetch=asked)
        assert [one.grid for one in launches] == [(128,), (3 * 32, 2), (96,), (560,), (96,)]
        assert [one.options.get("launch_pdl", False) for one in launches] == [dependent] * 5


_CODE = """
import json, re, tempfile, torch
from pathlib import Path
from benchmarks.aot import compiler
from benchmarks.aot.step import layer
from qwen2vl_kernels.core.launching import Target, record

found = []
with record(Target("cuda", 90)) as launches:
    layer(1, 12, 2, 8960)
for one in launches:
    source, _ = compiler._source(one)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiler._compile(source, one, "cuda", 90, 32).asm["cubin"])
        text = compiler.disassembled(cubin)
    names = re.findall(r"\\b(ACQBULK|PREEXIT|LDG\\.E\\.128|LDG|STG|HMMA|ATOMG|EXIT|CCTL\\.IVALL)\\b", text)
    found.append([one.options["num_warps"], names])
print(json.dumps(found))
"""


def test_the_machine_code_asks_for_weights_before_it_waits():
    """48 KB a program for sm_90, 16 bytes at a time; every program waits, once, before anything is stored."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", _CODE], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 5
    for place, (warps, names) in enumerate(found):
        assert names.count("ACQBULK") == 1 and names[names.index("ACQBULK") + 1] == "PREEXIT", names
        before, after = names[: names.index("ACQBULK")], names[names.index("ACQBULK") :]
        assert not {"STG", "HMMA", "EXIT", "ATOMG"} & set(before) and {"STG", "HMMA"} <= set(after), names
        if place == 1:  # the attention's first keys and values
            assert before.count("LDG.E.128") * warps * 32 * 16 == 32 << 10
            assert names.index("ATOMG") < names.index("CCTL.IVALL")
        else:
            assert before.count("LDG.E.128") * warps * 32 * 16 == 48 << 10, names
