"""Products of few bf16 rows on the CPU: every instruction set against float64, and when PyTorch's own is taken."""

import os
import threading
import time

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from qwen2vl_kernels import use_backend
from qwen2vl_kernels.core import matmul, native
from tests.conftest import assert_two_times

KERNELS = native.cpu().few_rows_kernels()


def operands(rows, outputs, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator).bfloat16() for s in ((rows, width), (outputs, width), (outputs,))]


def few_rows(x, weight, bias=None, *, kernel=0, threads=1, room=0):
    """By that kernel, into poisoned rows with room behind each."""
    y = torch.full((x.shape[0], weight.shape[0] + room), float("nan"), dtype=torch.bfloat16)
    sizes = (x.shape[0], weight.shape[0], x.shape[1])
    views = [native.view(t) for t in (x, weight, bias, y[:, : weight.shape[0]])]
    native.cpu().few_rows(*views, sizes, (threads, kernel))
    assert y[:, weight.shape[0] :].isnan().all()
    return y[:, : weight.shape[0]]


def test_the_portable_form_is_always_there():
    assert KERNELS[-1] == "portable" and len(set(KERNELS)) == len(KERNELS)


@pytest.mark.parametrize("kernel", range(len(KERNELS)), ids=KERNELS)
@pytest.mark.parametrize(
    ("rows", "outputs", "width"),
    [(1, 1, 1), (1, 5, 31), (2, 7, 33), (3, 4, 64), (4, 9, 100), (5, 33, 257), (8, 70, 1536), (31, 3, 96)],
)
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
def test_sums_are_those_of_float64_rounded(kernel, rows, outputs, width, with_bias):
    x, weight, bias = operands(rows, outputs, width)
    bias = bias if with_bias else None
    got = few_rows(x, weight, bias, kernel=kernel, threads=2, room=3)
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert_two_times(got, exact.bfloat16(), exact, 1e-6)


@pytest.mark.parametrize("kernel", range(len(KERNELS)), ids=KERNELS)
def test_strided_rows(kernel):
    x, weight, bias = operands(6, 40, 200)
    wanted = few_rows(x[::2, 8:150], weight[::3, 20:162], bias[:14], kernel=kernel)
    dense = few_rows(x[::2, 8:150].contiguous(), weight[::3, 20:162].contiguous(), bias[:14].clone(), kernel=kernel)
    assert torch.equal(wanted, dense)


@pytest.mark.parametrize("kernel", range(len(KERNELS)), ids=KERNELS)
def test_bits_depend_neither_on_the_rows_beside_nor_on_threads(kernel):
    x, weight, bias = operands(8, 203, 417)
    whole = few_rows(x, weight, bias, kernel=kernel, threads=1)
    for threads in (2, 7):
        assert torch.equal(few_rows(x, weight, bias, kernel=kernel, threads=threads), whole)
    for rows in (slice(0, 1), slice(3, 5), slice(2, 8)):
        assert torch.equal(few_rows(x[rows], weight, bias, kernel=kernel), whole[rows])
    for outputs in (slice(0, 1), slice(5, 12), slice(201, 203)):
        got = few_rows(x, weight[outputs], bias[outputs], kernel=kernel)
        assert torch.equal(got, whole[:, outputs])


@pytest.mark.parametrize("kernel", range(len(KERNELS)), ids=KERNELS)
def test_values_that_are_no_numbers_reach_their_own_sums_alone(kernel):
    x, weight, _ = operands(3, 9, 70)
    x[1, 69], weight[4, 3], weight[6, 0] = float("nan"), float("inf"), 3e38
    x[:, 0] = 2
    exact = F.linear(x.double(), weight.double())
    got = few_rows(x, weight, kernel=kernel)
    assert got.isnan().equal(exact.isnan()) and got[:, 4].isinf()[[0, 2]].all()
    assert got[:, 6].isinf()[[0, 2]].all()  # beyond bf16
    others = [0, 1, 2, 3, 5, 7, 8]
    assert got[[0, 2]][:, others].isfinite().all()


def test_rounding_is_to_nearest_with_ties_to_even():
    values = [1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-16, -(1 + 2**-8), 0.0, 65280.0]
    parts = torch.tensor([[v - torch.tensor(v).bfloat16().item() for v in values]]).T
    weight = torch.cat([torch.tensor([values]).T.bfloat16().float(), parts], 1)
    assert torch.equal(weight.bfloat16().float(), weight), "two numbers of bf16 each"
    x = torch.ones(1, 2).bfloat16()
    for kernel in range(len(KERNELS)):
        got = few_rows(x, weight.bfloat16(), kernel=kernel)
        assert torch.equal(got[0], torch.tensor(values).bfloat16())


def test_several_threads_may_call():
    x, weight, bias = operands(2, 2000, 512)
    wanted = few_rows(x, weight, bias)
    found, begun = [], threading.Barrier(6)

    def call():
        begun.wait()
        found.extend(torch.equal(few_rows(x, weight, bias, threads=3), wanted) for _ in range(30))

    callers = [threading.Thread(target=call) for _ in range(6)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert found == [True] * 180


def test_threads_that_wait_take_no_time():
    x, weight, _ = operands(1, 4000, 1024)
    for _ in range(3):
        few_rows(x, weight, threads=4)
    begin = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - begin < 0.1


def test_a_forked_process_has_threads_of_its_own():
    x, weight, _ = operands(1, 4000, 1024)
    wanted = few_rows(x, weight, threads=4)
    if pid := os.fork():
        deadline = time.monotonic() + 60
        while (ended := os.waitpid(pid, os.WNOHANG)) == (0, 0):
            assert time.monotonic() < deadline, os.kill(pid, 9)
            time.sleep(0.01)
        assert ended[1] == 0
        return
    status = 1
    try:
        status = 0 if all(torch.equal(few_rows(x, weight, threads=4), wanted) for _ in range(50)) else 2
    finally:
        os._exit(status)


def test_sizes_that_cannot_be_are_refused():
    x, weight, _ = operands(1, 4, 8)
    views = [native.view(t) for t in (x, weight, None, torch.empty(1, 4, dtype=torch.bfloat16))]
    few = native.cpu().few_rows
    for sizes, options in (((-1, 4, 8), (1, 0)), ((1, 4, 8), (1, -1)), ((1, 4, 8), (1, len(KERNELS)))):
        with pytest.raises(ValueError, match=r"negative|no such kernel"):
            few(*views, sizes, options)
    with pytest.raises(ValueError, match="elements of two bytes"):
        few(native.view(x.float()), *views[1:], (1, 4, 8), (1, 0))
    few(*views, (0, 4, 8), (1, 0))
    few(*views, (1, 0, 8), (0, 0))


class Seen(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names = [*getattr(self, "names", []), function.overloadpacket.__name__]
        return function(*args, **(kwargs or {}))


def taken(monkeypatch, x, weight, bias=None):
    """Whether `matmul.linear` calls the extension."""
    calls = []
    monkeypatch.setattr(matmul, "_few_rows", lambda *given: calls.append(1) or F.linear(*given))
    matmul.linear(x, weight, bias)
    return bool(calls)


@torch.no_grad()
def test_where_it_is_taken(monkeypatch):
    monkeypatch.setattr(matmul, "slow_on_cpu", lambda dtype: False)
    x, weight, bias = operands(8, 16, 32)
    assert taken(monkeypatch, x, weight, bias) and taken(monkeypatch, x[0], weight)
    assert taken(monkeypatch, x.view(2, 4, 32), torch.nn.Parameter(weight), torch.nn.Parameter(bias))
    assert not taken(monkeypatch, torch.cat([x, x[:1]]), weight)
    monkeypatch.setattr(matmul, "slow_on_cpu", lambda dtype: True)
    assert taken(monkeypatch, x.repeat(3, 1), weight) and not taken(monkeypatch, x.repeat(4, 1), weight)
    assert not taken(monkeypatch, x[:0], weight)
    assert not taken(monkeypatch, x, weight.T.contiguous().T)
    for other in (torch.float32, torch.float16):
        assert not taken(monkeypatch, x.to(other), weight.to(other))


@torch.no_grad()
def test_where_somebody_looks_on_pytorchs_own_is_taken(monkeypatch):
    x, weight, bias = operands(2, 16, 32)
    with torch.enable_grad():
        assert not taken(monkeypatch, x, weight)
    with torch.autocast("cpu", dtype=torch.float16):
        assert not taken(monkeypatch, x, weight)
    with Seen() as seen:
        assert not taken(monkeypatch, x, weight)
    assert seen.names
    with torch.device("cpu"):  # a function mode
        assert not taken(monkeypatch, x, weight)
    with use_backend("eager"):
        assert not taken(monkeypatch, x, weight)
    with use_backend(rms_norm="eager"):
        assert taken(monkeypatch, x, weight)

    class Own(torch.Tensor):
        pass

    assert not taken(monkeypatch, x, weight.as_subclass(Own))
    monkeypatch.undo()
    batched = torch.func.vmap(lambda row: matmul.linear(row, weight, bias))(x)
    torch.testing.assert_close(batched, F.linear(x, weight, bias), atol=0.1, rtol=0.02)


@torch.no_grad()
def test_what_comes_out_has_the_shape_of_pytorchs(monkeypatch):
    x, weight, bias = operands(8, 16, 32)
    for given in (x, x[0], x.view(2, 2, 2, 32), x.T.contiguous().T, x.view(2, 4, 32).transpose(0, 1)):
        got = matmul.linear(given, weight, bias)
        wanted = F.linear(given.double(), weight.double(), bias.double())
        assert got.shape == wanted.shape and got.dtype == torch.bfloat16
        assert_two_times(got, wanted.bfloat16(), wanted, 1e-6)
    with pytest.raises(RuntimeError):
        matmul.linear(x, weight[:, :8])


def test_a_compiled_call_is_traced_through():
    x, weight, _ = operands(2, 16, 32)
    with torch.no_grad():
        compiled = torch.compile(matmul.linear, backend="eager", fullgraph=True)(x, weight)
    torch.testing.assert_close(compiled, F.linear(x, weight))
